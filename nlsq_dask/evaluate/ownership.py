"""Which worker owns which leaves: sticky, so that its cached chunks stay of use."""

from __future__ import annotations

from collections.abc import Mapping

from nlsq_dask.evaluate.tree import split_leaves

__all__ = ["Ownership"]


class Ownership:
    """Ranges of leaves and their owners, kept from pass to pass as far as workers stay."""

    def __init__(self, num_leaves: int) -> None:
        self._num_leaves = num_leaves
        self._num_parts = 0
        self.ranges: tuple[range, ...] = ()
        self._owners: dict[range, str] = {}

    def refine(self, num_parts: int) -> None:
        """Cut the leaves into as many ranges, or leave those that there are if they are more.

        Each goes to who had its first leaf. What is cut finer stays so: workers that left may
        come back.
        """
        if num_parts <= self._num_parts:
            return
        owner_of = {leaf: owner for leaves, owner in self._owners.items() for leaf in leaves}
        self._num_parts = num_parts
        self.ranges = tuple(split_leaves(self._num_leaves, num_parts))
        self._owners = {r: owner_of[r.start] for r in self.ranges if r.start in owner_of}

    def assign(self, threads: Mapping[str, int]) -> dict[range, str]:
        """An owner for every range, in proportion to the workers' threads.

        Ranges of workers that left are given away, and a worker that has too little takes from
        the one that has most; everything else stays where it is.
        """
        kept = {leaves: owner for leaves, owner in self._owners.items() if owner in threads}
        load = dict.fromkeys(sorted(threads), 0)
        for owner in kept.values():
            load[owner] += 1

        def fullness_with(extra: int, address: str) -> tuple[float, str]:
            return (load[address] + extra) / threads[address], address

        def roomiest() -> str:
            return min(load, key=lambda address: fullness_with(1, address))

        for leaves in self.ranges:
            if leaves not in kept:
                kept[leaves] = roomiest()
                load[kept[leaves]] += 1
        while True:
            full, bare = max(load, key=lambda address: fullness_with(0, address)), roomiest()
            if fullness_with(1, bare)[0] >= fullness_with(0, full)[0]:
                break
            moved = max((r for r, owner in kept.items() if owner == full), key=lambda r: r.start)
            kept[moved] = bare
            load[full] -= 1
            load[bare] += 1
        self._owners = {leaves: kept[leaves] for leaves in self.ranges}
        return dict(self._owners)
