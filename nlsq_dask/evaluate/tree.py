"""One fixed binary tree of sums over leaf indices.

Leaf ``i`` is node ``(0, i)``; node ``(level, i)`` is the sum of ``(level - 1, 2 i)`` and
``(level - 1, 2 i + 1)``, or the first alone where the second would be past the end. Whoever
computes which part, in whatever order: the same additions happen, so the bits are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from nlsq_dask.normal_equations import Sums

__all__ = ["Node", "fold_nodes", "split_leaves", "sum_range"]

Node: TypeAlias = tuple[int, int]


def sum_range(leaves: Iterable[tuple[int, Sums]]) -> dict[Node, Sums]:
    """Sums of consecutive leaves, merged as far up the tree as they go.

    A range of leaves comes to at most ``2 log2`` of its length nodes.
    """
    nodes: list[tuple[Node, Sums]] = []
    for index, sums in leaves:
        nodes.append(((0, index), sums))
        while len(nodes) > 1 and _are_siblings(nodes[-2][0], nodes[-1][0]):
            (_, right), ((level, i), left) = nodes.pop(), nodes.pop()
            nodes.append(((level + 1, i // 2), left + right))
    return dict(nodes)


def _are_siblings(left: Node, right: Node) -> bool:
    return left[0] == right[0] and left[1] % 2 == 0 and right[1] == left[1] + 1


def fold_nodes(nodes: Mapping[Node, Sums], num_leaves: int) -> Sums:
    """The root, from nodes that cover every leaf once."""

    def value(level: int, index: int) -> Sums:
        if (level, index) in nodes:
            return nodes[level, index]
        left = value(level - 1, 2 * index)
        has_right = (2 * index + 1) << (level - 1) < num_leaves
        return left + value(level - 1, 2 * index + 1) if has_right else left

    return value((num_leaves - 1).bit_length(), 0)


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
