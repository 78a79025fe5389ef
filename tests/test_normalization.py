"""Phase 0: scales of every strategy, and that nothing is lost on the way there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlsq_dask.warmup.normalization import build_normalizer

INF = np.inf
P0 = np.array([2.0, -3.0, 0.0, 5.0])
LOWER = np.array([0.0, -INF, -1.0, 4.0])
UPPER = np.array([10.0, 7.0, 1.0, INF])
STRATEGIES = ("auto", "bounds", "p0", "jacobian", "none")


@pytest.mark.parametrize(
    ("strategy", "offset", "scale"),
    [
        ("auto", [0, 0, -1, 0], [10, 3, 2, 5]),
        ("bounds", [0, 0, -1, 0], [10, 3, 2, 5]),
        ("p0", [0, 0, 0, 0], [2, 3, 1, 5]),
        ("none", [0, 0, 0, 0], [1, 1, 1, 1]),
        ("jacobian", [0, 0, 0, 0], [0.5, 3, 100, 5]),  # no slope in two: p0 instead
    ],
)
def test_scales_of_each_strategy(strategy, offset, scale):
    norms = np.array([2.0, 0.0, 0.01, np.inf])
    normalizer = build_normalizer(strategy, P0, (LOWER, UPPER), norms)
    np.testing.assert_array_equal(normalizer.offset, offset)
    np.testing.assert_array_equal(normalizer.scale, scale)
    np.testing.assert_array_equal(normalizer.jacobian, scale)
    assert normalizer.strategy == strategy


def test_the_jacobian_falls_back_to_p0_where_it_is_not_finite():
    normalizer = build_normalizer("jacobian", P0, (LOWER, UPPER), None)
    np.testing.assert_array_equal(normalizer.scale, [2, 3, 1, 5])


def test_bounds_without_width_or_too_wide_have_a_usable_scale():
    huge = np.finfo(np.float64).max
    bounds = np.array([1.0, -huge]), np.array([1.0, huge])
    normalizer = build_normalizer("bounds", np.array([1.0, 4.0]), bounds)
    np.testing.assert_array_equal(normalizer.scale, [1, 4])


def test_bounds_are_normalized_and_infinite_ones_stay():
    lower, upper = build_normalizer("auto", P0, (LOWER, UPPER)).bounds
    np.testing.assert_array_equal(lower, [0, -INF, 0, 0.8])
    np.testing.assert_array_equal(upper, [1, 7 / 3, 1, INF])


@given(
    strategy=st.sampled_from(STRATEGIES),
    values=st.lists(st.tuples(*[st.floats(-1e6, 1e6) for _ in range(3)]), min_size=1, max_size=6),
)
def test_there_and_back(strategy, values):
    lower, p0, upper = np.sort(np.array(values), axis=1).T
    normalizer = build_normalizer(strategy, p0, (lower, upper), np.abs(p0))
    back = normalizer.denormalize(normalizer.normalize(p0))
    reach = np.maximum(np.abs(p0), np.abs(normalizer.offset))
    assert np.all(np.abs(back - p0) <= 1e-14 * np.maximum(reach, normalizer.scale))
    assert np.all((back >= lower) & (back <= upper))


def test_the_jacobian_is_that_of_denormalize():
    normalizer = build_normalizer("auto", P0, (LOWER, UPPER))
    point = normalizer.normalize(P0)
    step = 2.0**-10
    for i, unit in enumerate(np.eye(4)):
        change = normalizer.denormalize(point + step * unit) - P0
        np.testing.assert_allclose(change / step, normalizer.jacobian[i] * unit, rtol=1e-9)
