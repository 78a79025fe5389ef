"""Marks of all rows: whether a pass is over the data that the pass before it was over.

Passes over other data than each other's come to nothing. Where a store has checksums, its codecs
refuse what was garbled; where it has none, and where chunks were written anew meanwhile, the marks
of chunks tell (``sources/marks.py``). They are added up, modulo 2⁶³, over the same runs of leaves
as the statistics by chunk are: what a pass sends does not grow with the data, and workers may come
and go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from nlsq_dask._typing import Int
from nlsq_dask.evaluate.tree import bin_level
from nlsq_dask.sources.marks import MARK_MODULUS

__all__ = [
    "Marks",
    "add_marks",
    "differing_leaves",
    "fold_marks",
    "leaves_that_differ",
    "merge_marks",
]

Marks = Int[np.ndarray, " bins"]

_MOST_NAMED = 16


def add_marks(by_leaf: Mapping[int, int], num_leaves: int) -> dict[int, int]:
    """The sums of some leaves' marks, by run of leaves."""
    level = bin_level(num_leaves)
    sums: dict[int, int] = {}
    for leaf, mark in by_leaf.items():
        sums[leaf >> level] = (sums.get(leaf >> level, 0) + mark) % MARK_MODULUS
    return sums


def merge_marks(parts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """Sums of several parts of the leaves as one."""
    sums: dict[int, int] = {}
    for part in parts:
        for run, mark in part.items():
            sums[run] = (sums.get(run, 0) + mark) % MARK_MODULUS
    return sums


def fold_marks(parts: Iterable[Mapping[int, int]], num_leaves: int) -> Marks | None:
    """The sums over all leaves; None where nothing was marked."""
    sums = merge_marks(parts)
    if not sums:
        return None
    runs = range(-(-num_leaves // 2 ** bin_level(num_leaves)))
    return np.array([sums.get(run, 0) for run in runs], np.int64)


def leaves_that_differ(sampled: Mapping[int, int], now: Marks, num_leaves: int) -> list[int]:
    """Of leaves that were looked at before, as far as they are told apart: up to 1,024 leaves.

    Of more, the process that has read a leaf remembers its mark.
    """
    if bin_level(num_leaves) > 0:
        return []
    return [leaf for leaf, mark in sampled.items() if int(now[leaf]) != mark][:_MOST_NAMED]


def differing_leaves(before: Marks, now: Marks, num_leaves: int) -> str:
    """Which leaves, or runs of leaves, have other marks than before."""
    length = 2 ** bin_level(num_leaves)
    runs = np.flatnonzero(before != now).tolist()
    named = [
        str(run) if length == 1 else f"{run * length}-{min((run + 1) * length, num_leaves) - 1}"
        for run in runs[:_MOST_NAMED]
    ]
    more = f" and {len(runs) - len(named)} more" if len(runs) > len(named) else ""
    return ", ".join(named) + more
