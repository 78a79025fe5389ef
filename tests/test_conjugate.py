"""Conjugate gradients by themselves, a move at a time, on quadratics of a few parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlsq_dask.solvers.conjugate import Limits, advance, begin, minimize_quadratic

INF = np.inf
TO_THE_END = Limits(max_products=50, tolerance=1e-12)


def steepest(residual, low, high):
    return np.clip(residual, low, high)


def start(grad, low=-INF, high=INF, scale=1.0, precondition=steepest):
    grad = np.asarray(grad, float)
    box = np.broadcast_to(low, grad.shape) * 1.0, np.broadcast_to(high, grad.shape) * 1.0
    return begin(grad, box, np.broadcast_to(scale, grad.shape) * 1.0, precondition)


def advanced(state, hessian, limits=TO_THE_END, precondition=steepest):
    """After one pass, in which the image is held to be that of the step."""
    after = advance(state, state.vectors @ hessian, precondition, limits)
    np.testing.assert_allclose(after.image, hessian @ after.step, atol=1e-12)
    assert after.num_products == state.num_products + 1
    return after


# -- what a state says of itself


def test_a_bound_is_active_where_a_force_pushes_against_it():
    """Below, between and above the bounds, each pushed down, not at all, and up."""
    position, residual = np.repeat([-1.0, 0.0, 1.0], 3), np.tile([-0.5, 0.0, 0.5], 3)
    state = start(np.zeros(9), -1.0, 1.0)
    state = replace(state, step=position, image=-residual)
    assert np.flatnonzero(state.active).tolist() == [0, 8]


def test_a_length_that_rounding_takes_below_zero_is_zero():
    state = replace(start([1.0]), step=np.array([1.0]), image=np.array([-1e-17]))
    assert state.seen_length == 0.0


def test_the_length_is_that_of_the_free_part_and_of_the_way_to_bounds():
    """√(rᵀd) of the first and the last, ‖D d‖ of the second, which goes to its bound."""
    state = start([-1.0, -2.0, 3.0], high=[INF, 1.0, INF], scale=2.0)
    assert state.length == state.first_length == pytest.approx(np.sqrt(1 + 9 + 4))
    assert not state.is_done
    assert not state.is_cut


def test_a_direction_uphill_has_no_length():
    """Of the free part; what goes to a bound is as long as ever."""
    uphill = start([-1.0, -2.0], high=[INF, 1.0], precondition=lambda *_: np.array([-0.5, 1.0]))
    assert uphill.length == 1.0
    assert start([-1.0], precondition=lambda *_: np.array([-0.5])).is_done


def test_the_smallest_ratio_is_one_at_most():
    """Where H exceeds M everywhere, the distance is no shorter for it."""
    hessian = np.diag([3.0, 5.0])
    state = advanced(start([1.0, 1.0]), hessian)
    assert advanced(state, hessian).smallest_ratio == 1.0


# -- moves


def test_the_free_part_goes_to_the_best_point_given_what_goes_to_bounds():
    hessian = np.array([[0.5, 0.1], [0.1, 0.5]])
    state = start([-2.0, -0.4], high=[1.0, 9.0])
    assert state.is_snapping.tolist() == [True, False]
    after = advanced(state, hessian)
    # 0.4 = 0.1 · 1 + 0.5 p
    np.testing.assert_allclose(after.step, [1.0, 0.6])
    assert after.is_done
    assert after.active.tolist() == [True, False]


def test_the_free_part_never_goes_backwards():
    """Given the first at its bound, the best of the second is below its own."""
    hessian = np.array([[1.0, 0.9], [0.9, 1.0]])
    after = advanced(start([-10.0, -0.1], low=0.0, high=[1.0, 5.0]), hessian)
    np.testing.assert_array_equal(after.step, [1.0, 0.0])


@pytest.mark.parametrize(
    ("grad", "high"), [([-2.0, -0.1, -0.2, 0.3], [1.0, INF, INF, INF]), ([-1.6] * 3, [1.5] * 3)]
)
def test_as_many_products_as_free_parameters_are_enough(grad, high):
    """Also where some go to bounds on the way, and where a bound ahead is not reached."""
    is_held = np.isfinite(high) & (np.array(grad) == -2.0)
    hessian = np.diag(np.where(is_held, 1.0, 100.0 * np.arange(1, len(grad) + 1)))
    state = start(grad, high=high)
    assert len(state.vectors) == 2
    state = minimize_quadratic(lambda v: v @ hessian, state, steepest, TO_THE_END)
    np.testing.assert_allclose(
        state.step, np.where(is_held, 1.0, -np.array(grad) / np.diag(hessian))
    )
    assert state.num_products == 3


def test_no_product_is_spent_on_nothing():
    state = advanced(start([1.0, 2.0]), np.eye(2), Limits(max_products=9, tolerance=0.0))
    assert state.length == 0.0
    assert state.is_done


@pytest.mark.parametrize("curvature", [0.0, -0.5])
def test_without_curvature_the_way_goes_to_the_bound(curvature):
    after = advanced(start([-1.0, 0.0], high=2.5), np.diag([curvature, 1.0]))
    np.testing.assert_array_equal(after.step, [2.5, 0.0])


def test_without_curvature_or_bound_the_way_goes_to_the_end_of_the_region():
    hessian, limits = np.zeros((2, 2)), Limits(max_products=9, tolerance=0.0, radius=25.0)
    state = start([-3.0, 4.0])
    state = minimize_quadratic(lambda v: v @ hessian, state, steepest, limits)
    np.testing.assert_allclose(state.step, [15.0, -20.0])
    assert state.is_cut
    assert state.is_done


@pytest.mark.parametrize(
    ("direction", "hessian"),
    [
        ([1.0, 0.0], np.eye(2)),  # across the force
        ([0.0, 0.5], np.zeros((2, 2))),  # against it, and nothing to hold it but the bound
        ([0.0, -0.5], np.diag([1.0, np.nan])),
    ],
)
def test_a_direction_along_which_nothing_falls_ends_the_solve(direction, hessian):
    def wrong(residual, low, high):
        return np.array(direction)

    state = start([0.0, 0.2], -1.0, 1.0, precondition=wrong)
    after = advance(state, state.vectors @ hessian, wrong, TO_THE_END)
    assert after.is_done
    assert not after.is_cut
    assert after.step.tolist() == [0.0, 0.0]
    assert after.num_products == 1


# -- the trust region


@given(
    seed=st.integers(0, 2**32 - 1),
    inside=st.floats(0.0, 0.999),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_a_step_ends_where_it_leaves_the_region(seed, inside, size):
    """From anywhere within it, in any direction: outward, across or back through the middle."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 2.0, 3)
    begun, way = rng.normal(size=(2, 3))
    begun *= inside * size / np.linalg.norm(scale * begun)
    way *= 10 ** rng.uniform(-1, 1) * size / np.linalg.norm(way)
    # The quadratic whose minimum is at the end of the way.
    state = replace(start(-(begun + way), scale=scale), step=begun, image=begun, direction=way)
    after = advanced(state, np.eye(3), replace(TO_THE_END, radius=size))
    share = (after.step - begun) @ way / (way @ way)
    np.testing.assert_allclose(after.step, begun + share * way, atol=1e-12 * size)
    length = np.linalg.norm(scale * after.step)
    is_beyond = np.linalg.norm(scale * (begun + way)) > size
    assert after.is_cut == is_beyond
    assert length == pytest.approx(size, rel=1e-9) if is_beyond else length <= size
    assert 0.0 < share < 1.0 if is_beyond else share == pytest.approx(1.0)
