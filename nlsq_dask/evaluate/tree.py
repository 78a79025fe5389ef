"""One fixed binary tree of sums over leaf indices.

Leaf ``i`` is node ``(0, i)``; node ``(level, i)`` is the sum of ``(level - 1, 2 i)`` and
``(level - 1, 2 i + 1)``, or the first alone where the second would be past the end. Whoever
computes which part, in whatever order: the same additions happen, so the bits are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, Self, TypeAlias, TypeVar

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.normal_equations import Sums

__all__ = [
    "Bin",
    "Bins",
    "Node",
    "bin_level",
    "bin_of",
    "bin_parts",
    "fold_bins",
    "fold_nodes",
    "split_leaves",
    "sum_range",
]

Node: TypeAlias = tuple[int, int]
Bin: TypeAlias = Float[np.ndarray, "4"]  # rows, rows left out, Σ r, Σ r²
Bins: TypeAlias = Float[np.ndarray, "bins 4"]


class _Additive(Protocol):
    def __add__(self, other: Self, /) -> Self: ...


_Value = TypeVar("_Value", bound=_Additive)

MAX_BINS = 1024


def bin_level(num_leaves: int) -> int:
    """The level of the tree with at most `MAX_BINS` nodes: theirs are the statistics by chunk."""
    return max(0, (-(-num_leaves // MAX_BINS) - 1).bit_length())


def sum_range(
    leaves: Iterable[tuple[int, _Value]], level: int, bin_of: Callable[[_Value], Bin]
) -> tuple[dict[Node, _Value], dict[Node, Bin]]:
    """Sums of consecutive leaves, merged as far up the tree as they go, and bins on the way.

    A range of leaves comes to at most ``2 log2`` of its length nodes. A bin is what is kept of
    each node at `level`, before it is merged further.
    """
    nodes: list[tuple[Node, _Value]] = []
    bins: dict[Node, Bin] = {}
    for index, sums in leaves:
        nodes.append(((0, index), sums))
        while True:
            node, value = nodes[-1]
            if node[0] == level:
                bins[node] = bin_of(value)
            if len(nodes) < 2 or not _are_siblings(nodes[-2][0], node):
                break
            (_, right), (_, left) = nodes.pop(), nodes.pop()
            nodes.append(((node[0] + 1, node[1] // 2), left + right))
    return dict(nodes), bins


def bin_parts(of: Any) -> tuple[Any, ...]:
    """What a bin holds, of sums or of anything that has their shape."""
    rows = of.rows
    return of.normal.num_rows, rows.num_masked, rows.residual_sum, rows.residual_square


def bin_of(sums: Sums) -> Bin:
    return np.array([float(part) for part in bin_parts(sums)])


def _are_siblings(left: Node, right: Node) -> bool:
    return left[0] == right[0] and left[1] % 2 == 0 and right[1] == left[1] + 1


def fold_nodes(nodes: Mapping[Node, Sums], num_leaves: int) -> Sums:
    """The root, from nodes that cover every leaf once."""
    return _sum_below((num_leaves - 1).bit_length(), 0, nodes, num_leaves)


def fold_bins(
    nodes: Mapping[Node, Sums], bins: Mapping[Node, Bin], num_leaves: int, level: int
) -> Bins:
    """The bins of all leaves: those that ranges kept, and those that lie across two ranges."""
    every = range(-(-num_leaves // 2**level))
    return np.stack(
        [
            bins[level, i]
            if (level, i) in bins
            else bin_of(_sum_below(level, i, nodes, num_leaves))
            for i in every
        ]
    )


def _sum_below(level: int, index: int, nodes: Mapping[Node, Sums], num_leaves: int) -> Sums:
    if (level, index) in nodes:
        return nodes[level, index]
    left = _sum_below(level - 1, 2 * index, nodes, num_leaves)
    has_right = (2 * index + 1) << (level - 1) < num_leaves
    return left + _sum_below(level - 1, 2 * index + 1, nodes, num_leaves) if has_right else left


def split_leaves(num_leaves: int, num_parts: int) -> list[range]:
    """Consecutive ranges of nearly equal length that begin at high nodes of the tree.

    Beginnings are multiples of a power of two, an eighth of a part at most: that keeps the
    number of nodes in each range small and the ranges even.
    """
    num_parts = max(1, min(num_parts, num_leaves))
    granule = 1 << max(0, (num_leaves // (8 * num_parts)).bit_length() - 1)
    units = -(-num_leaves // granule)
    bounds = [min(num_leaves, granule * (units * i // num_parts)) for i in range(num_parts + 1)]
    bounds[-1] = num_leaves
    return [range(a, b) for a, b in itertools.pairwise(bounds) if b > a]
