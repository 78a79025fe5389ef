"""The summation tree: the same additions whoever does them."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nlsq_dask.evaluate.ownership import Ownership
from nlsq_dask.evaluate.tree import (
    bin_level,
    bin_of,
    fold_bins,
    fold_nodes,
    split_leaves,
    sum_range,
)
from nlsq_dask.normal_equations import NormalEquations, RowStatistics, Sums


def make_leaf(value: float) -> Sums:
    return Sums(
        normal=NormalEquations(
            gram=np.array([[value]]),
            grad=np.array([value * 1.1]),
            cost=np.float64(value * 0.3),
            num_rows=np.int64(1),
        ),
        rows=RowStatistics(
            num_masked=np.int64(2),
            num_invalid=np.int64(0),
            num_bad_sigma=np.int64(0),
            num_stray=np.int64(0),
            residual_sum=np.float64(value),
            residual_square=np.float64(value**2),
        ),
    )


def reference_sum(values: list[float]) -> float:
    """The tree as it is defined, by recursion over lists."""
    if len(values) == 1:
        return values[0]
    half = 1 << ((len(values) - 1).bit_length() - 1)
    return reference_sum(values[:half]) + reference_sum(values[half:])


@given(
    num_leaves=st.integers(1, 200),
    cuts=st.lists(st.integers(1, 199), max_size=12),
    level=st.integers(0, 4),
)
def test_same_bits_for_any_split(num_leaves, cuts, level):
    values = np.random.default_rng(num_leaves).normal(size=num_leaves) * 1e3
    edges = sorted({0, num_leaves, *(cut for cut in cuts if cut < num_leaves)})
    nodes, bins = {}, {}
    for start, stop in itertools.pairwise(edges):
        part, kept = sum_range(
            ((i, make_leaf(values[i])) for i in range(start, stop)), level, bin_of
        )
        assert len(part) <= 2 * (stop - start).bit_length()
        nodes |= part
        bins |= kept
    total = fold_nodes(nodes, num_leaves)
    assert float(total.normal.gram[0, 0]) == reference_sum(list(values))
    assert int(total.normal.num_rows) == num_leaves
    width = 2**level
    by_bin = fold_bins(nodes, bins, num_leaves, level)
    expected = [values[i : i + width] for i in range(0, num_leaves, width)]
    assert [row[2] for row in by_bin] == [reference_sum(list(part)) for part in expected]
    assert [row[0] for row in by_bin] == [len(part) for part in expected]


@given(num_leaves=st.integers(1, 10**6))
def test_there_are_enough_bins_and_not_too_many(num_leaves):
    width = 2 ** bin_level(num_leaves)
    num_bins = -(-num_leaves // width)
    assert num_bins <= 1024
    assert width == 1 or num_bins > 512


@given(num_leaves=st.integers(1, 5_000), num_parts=st.integers(1, 40))
def test_ranges_cover_all_leaves_evenly(num_leaves, num_parts):
    ranges = split_leaves(num_leaves, num_parts)
    assert [i for leaves in ranges for i in leaves] == list(range(num_leaves))
    assert len(ranges) <= num_parts
    if num_leaves >= num_parts:
        longest = max(map(len, ranges))
        assert longest <= 1.25 * num_leaves / num_parts + 1


def test_ownership_is_sticky_and_gives_new_workers_work():
    ownership = Ownership(64)
    ownership.refine(8)
    first = ownership.assign({"a": 1, "b": 1})
    assert sorted(first.values()).count("a") == 4
    assert ownership.assign({"b": 1, "a": 1}) == first
    grown = ownership.assign({"a": 1, "b": 1, "c": 2})
    assert sorted(grown.values()).count("c") == 4
    assert sum(grown[leaves] == owner for leaves, owner in first.items()) == 4
    shrunk = ownership.assign({"b": 1, "c": 2})
    assert set(shrunk.values()) == {"b", "c"}
    assert all(shrunk[r] == owner for r, owner in grown.items() if owner == "c")


def test_ranges_are_cut_finer_for_more_workers_and_stay_where_they_were():
    ownership = Ownership(64)
    ownership.refine(1)
    assert ownership.assign({"a": 1}) == {range(64): "a"}
    ownership.refine(4)
    grown = ownership.assign({"a": 1, "b": 1})
    assert [leaf for leaves in grown for leaf in leaves] == list(range(64))
    assert sorted(grown.values()) == ["a", "a", "b", "b"]
    ownership.refine(2)  # one left, and may come back
    assert ownership.assign({"a": 1, "b": 1}) == grown
    ownership.refine(8)
    finer = ownership.assign({"a": 1, "b": 1})
    assert all(
        finer[part] == owner
        for leaves, owner in grown.items()
        for part in finer
        if part.start in leaves
    )
