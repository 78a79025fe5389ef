"""What becomes of a trial, and when a solve ends: every rule at its edge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from nlsq_dask.solvers.acceptance import (
    Progress,
    Tolerances,
    ending_of,
    judge,
    residual_scale,
    with_trial,
)
from nlsq_dask.solvers.subproblem import Step
from nlsq_dask.status import Status

EPS = 2.0**-52
INF = np.inf


@dataclass(frozen=True, kw_only=True)
class Point(Progress):
    """A standing in which every number is given."""

    cost_here: float = 1.0
    newton: float = 0.5
    cosine: float = 0.0
    worst: float = 1.0

    @property
    def cost(self):
        return self.cost_here

    @property
    def newton_reduction(self):
        return self.newton

    @property
    def tangent_cosine(self):
        return self.cosine

    @property
    def optimality(self):
        return self.worst


def make_step(vector=(1.0, 0.0), reduction=0.4, scaled_norm=2.0, damping=0.0):
    vector = np.array(vector)
    return Step(
        vector=vector,
        reduction=reduction,
        scaled_norm=scaled_norm,
        damping=damping,
        active=np.zeros(len(vector), bool),
    )


def make_point(**changes):
    return Point(
        **{
            "params": np.array([3.0, 4.0]),
            "trial": np.array([4.0, 4.0]),
            "scale": np.array([1.0, 2.0]),
            "radius": 3.0,
            "step": make_step(),
            "distance": 1.0,
            "contraction": None,
            "num_trials": 1,
            "num_accepted": 0,
            "was_accepted": False,
            "was_finite": True,
            "gain": np.nan,
            "status": Status.RUNNING,
        }
        | changes
    )


LIMITS = Tolerances(distance_tol=1e-6, max_iterations=10)


def test_noise_of_the_cost_is_that_of_its_sum_and_of_the_residuals():
    limits = replace(LIMITS, eps=1e-3, data_square=9.0)
    assert limits.cost_noise(2.0) == pytest.approx(0.2 + 10e-3 * 6.0 + 8e-6 * 9.0, rel=1e-12)
    assert Tolerances(distance_tol=1e-6, max_iterations=9).cost_noise(2.0) == 200 * EPS


@pytest.mark.parametrize(
    ("contraction", "remaining"), [(None, 3.0), (0.0, 3.0), (0.5, 6.0), (1.0, INF), (2.0, INF)]
)
def test_steps_still_to_come_are_a_geometric_series(contraction, remaining):
    assert make_point(distance=3.0, contraction=contraction).remaining_distance == remaining


def test_a_trial_that_is_not_finite_is_retried_nearer():
    after = judge(LIMITS, make_point(), None)
    assert after.radius == 0.5
    assert after.status is Status.RUNNING


@pytest.mark.parametrize(
    ("gain", "radius"),
    [
        (1.01e-4, 0.5),
        (0.2, 0.5),
        (0.25, 3.0),
        (0.5, 3.0),
        (0.75, 3.0),
        (0.76, 4.0),
        (1.5, 4.0),
    ],
)
def test_the_radius_follows_the_gain(gain, radius):
    tried = make_point(step=make_step(reduction=0.5), cost_here=1.0)
    candidate = replace(tried, cost_here=1.0 - 0.5 * gain, params=np.array([4.0, 4.0]))
    after = judge(LIMITS, tried, candidate)
    assert after.params is candidate.params
    assert after.radius == radius
    assert after.gain == pytest.approx(gain)
    assert after.status is Status.RUNNING
    wide = judge(LIMITS, replace(tried, radius=9.0), candidate)
    assert wide.radius == (9.0 if gain >= 0.25 else 0.5)


@pytest.mark.parametrize("fall", [-1.0, 0.0, 2.0**-14])
def test_a_step_that_gains_too_little_is_rejected(fall):
    """Up to 1e-4 of what was promised."""
    tried = make_point(step=make_step(reduction=1.0))
    candidate = replace(tried, cost_here=1.0 - fall, params=np.array([4.0, 4.0]))
    after = judge(LIMITS, tried, candidate)
    assert after.params is tried.params
    assert after.radius == 0.5
    assert after.gain == fall
    exactly = replace(tried, cost_here=1e-4)
    assert judge(LIMITS, exactly, replace(candidate, cost_here=0.0)).params is tried.params


def test_below_the_noise_of_the_cost_the_distance_decides():
    noise = LIMITS.cost_noise(1.0)
    tried = make_point(newton=noise, distance=0.5)
    nearer = replace(tried, distance=0.4, cost_here=2.0)
    assert judge(LIMITS, tried, nearer) is nearer
    for distance in (0.5, 0.6):
        after = judge(LIMITS, tried, replace(nearer, distance=distance))
        assert after.status is Status.CONVERGED_TO_ROUNDING
        assert after.distance == 0.5
    above = replace(tried, newton=2 * noise)
    assert judge(LIMITS, above, nearer).gain < 0


def test_a_radius_whose_steps_are_below_the_noise_is_a_stall():
    noise = LIMITS.cost_noise(1.0)
    tried = make_point(step=make_step(reduction=noise))
    assert judge(LIMITS, tried, replace(tried, cost_here=0.5)).status is Status.STALLED
    more = make_point(step=make_step(reduction=2 * noise))
    assert judge(LIMITS, more, replace(more, cost_here=0.5)).status is Status.RUNNING


@pytest.mark.parametrize(
    ("limits", "changes", "status"),
    [
        ({"ftol": 0.25}, {}, Status.CONVERGED_FTOL),
        ({"ftol": 0.24}, {}, Status.RUNNING),
        ({"ftol": 0.25}, {"promised": 0.26}, Status.RUNNING),
        ({"xtol": 0.12}, {}, Status.CONVERGED_XTOL),
        ({"gtol": 0.5}, {"worst": 0.5}, Status.CONVERGED_GTOL),
        ({"gtol": 0.5}, {"worst": 0.51}, Status.RUNNING),
        ({}, {"worst": 0.0}, Status.RUNNING),
    ],
)
def test_minpack_tests_at_their_edges(limits, changes, status):
    """Cost 1 falls by 0.25, as promised; the step has the scaled length 1 where the way is 8.5."""
    promised = changes.pop("promised", 0.25)
    tried = make_point(step=make_step(reduction=promised))
    candidate = replace(tried, cost_here=0.75, params=np.array([3.0, 4.0]), **changes)
    assert judge(replace(LIMITS, **limits), tried, candidate).status is status


def test_xtol_is_relative_to_the_scaled_length():
    """MINPACK's Δ <= xtol ‖D x‖, to second order in xtol."""
    tried = make_point(step=make_step(reduction=0.25))
    length = np.hypot(3.0, 8.0)
    candidate = replace(tried, cost_here=0.75)
    edge = 0.5 * (np.sqrt(length**2 + 4) - length)
    for xtol, status in ((1.001 * edge, Status.CONVERGED_XTOL), (0.999 * edge, Status.RUNNING)):
        assert judge(replace(LIMITS, xtol=xtol), tried, candidate).status is status


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, Status.RUNNING),
        ({"distance": 1e-6}, Status.CONVERGED),
        ({"distance": 1.01e-6}, Status.RUNNING),
        ({"distance": 1e-6, "cosine": 1e-3}, Status.CONVERGED),
        ({"distance": 1e-6, "cosine": 1.1e-3}, Status.RUNNING),
        ({"distance": 1e-6, "contraction": 0.5}, Status.RUNNING),
        ({"radius": EPS * np.hypot(3.0, 8.0)}, Status.STALLED),
        ({"radius": 2 * EPS * np.hypot(3.0, 8.0)}, Status.RUNNING),
        ({"params": np.zeros(2), "radius": 1e-308}, Status.STALLED),
        ({"params": np.zeros(2), "radius": 2.0**-1022}, Status.RUNNING),
        ({"step": make_step(scaled_norm=0.0)}, Status.STALLED),
        ({"step": make_step(scaled_norm=0.0), "was_accepted": True}, Status.RUNNING),
        ({"num_trials": 9}, Status.RUNNING),
        ({"num_trials": 10}, Status.MAX_ITERATIONS),
        ({"num_trials": 11}, Status.MAX_ITERATIONS),
    ],
)
def test_endings_at_their_edges(changes, status):
    assert ending_of(replace(LIMITS, tangent_tol=1e-3), make_point(**changes)) is status


def test_a_trial_is_strictly_within_the_bounds():
    bounds = np.array([2.0, -INF]), np.array([3.5, INF])
    point = with_trial(make_point(), make_step(vector=(0.5, 1.0)), bounds)
    np.testing.assert_array_equal(point.trial, [np.nextafter(3.5, 2.0), 5.0])
    point = with_trial(make_point(), make_step(vector=(-1.0, 1.0)), bounds)
    np.testing.assert_array_equal(point.trial, [np.nextafter(2.0, 3.5), 5.0])
    assert point.status is Status.RUNNING


@pytest.mark.parametrize(
    ("damping", "status"), [(0.0, Status.CONVERGED_TO_ROUNDING), (1.0, Status.STALLED)]
)
def test_a_step_too_short_to_move(damping, status):
    step = make_step(vector=(1e-17, 0.0), damping=damping)
    free = np.full(2, -INF), np.full(2, INF)
    point = with_trial(make_point(), step, free)
    assert point.status is status
    assert point.step is not step


@pytest.mark.parametrize(
    ("cost", "dof", "absolute", "scale"),
    [
        (8.0, 4, False, 2.0),
        (8.0, 4, True, 1.0),
        (0.5, 4, True, 0.5),
        (8.0, 0, False, 0.0),
        (8.0, -1, False, 0.0),
        (8.0, 0, True, 1.0),
        (8.0, 1, False, 4.0),
        (0.125, 1, True, 0.5),
    ],
)
def test_the_scale_of_a_residual(cost, dof, absolute, scale):
    assert residual_scale(replace(LIMITS, absolute_sigma=absolute), cost, dof) == scale
