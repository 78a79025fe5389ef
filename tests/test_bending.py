"""What Gauss-Newton's model leaves out: learned from steps, and met before a step by the sample."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from nlsq_dask import fit_dataset
from nlsq_dask.normal_equations import NormalEquations
from nlsq_dask.objective.on_sample import SampleObjective
from nlsq_dask.solvers.bending import carried, is_slow, learned, relative_size
from nlsq_dask.solvers.trust_region import Evaluation, Tolerances, TrustRegion


def random_whitening(rng, k):
    return np.triu(rng.normal(size=(k, k))) + 3 * np.eye(k)


def random_symmetric(rng, k, size):
    half = rng.normal(size=(k, k))
    both = half + half.T
    return size * both / np.linalg.norm(both, 2)


# -- learned


@pytest.mark.parametrize("k", [1, 2, 5])
def test_as_many_steps_as_parameters_show_all_of_it(k):
    rng = np.random.default_rng(k)
    turned = np.linalg.qr(rng.normal(size=(k, k)))[0]
    gram, missing = np.eye(k), turned.T @ np.diag(np.linspace(0.1, 0.2, k)) @ turned
    secant = np.zeros((k, k))
    for step in np.linalg.qr(rng.normal(size=(k, k)))[0]:
        before = secant
        secant = learned(secant, gram, step, (missing - before) @ step)
        np.testing.assert_allclose(secant @ step, missing @ step, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(secant, secant.T, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(secant, missing, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("left", "is_learned"),
    [
        ([0.4, 0.0], True),
        ([0.5, 0.0], True),
        ([0.6, 0.0], False),  # no step of a model that was nearly right
        ([0.0, 0.4], False),  # across: no symmetric matrix of rank one does that
        ([0.0038, 0.04], False),
        ([0.0044, 0.04], True),
        ([0.0, 0.0], False),
        ([np.nan, 0.0], False),
    ],
)
def test_what_is_no_small_correction_is_not_learned(left, is_learned):
    step = np.array([2.0, 0.0])
    secant = learned(np.zeros((2, 2)), np.eye(2), step, np.array(left))
    assert secant.any() == is_learned
    if is_learned and left[1] == 0:
        np.testing.assert_allclose(secant, np.diag([left[0] / 2, 0.0]))


def test_what_has_grown_too_large_is_forgotten():
    known = np.diag([0.375, 0.0])
    step = np.array([1.0, 0.0])
    kept = learned(known, np.eye(2), step, np.array([0.125, 0.0]))
    np.testing.assert_array_equal(kept, np.diag([0.5, 0.0]))
    assert not learned(known, np.eye(2), step, np.array([0.126, 0.0])).any()
    # A gram that has become smaller makes the same large.
    assert not learned(known, 0.7 * np.eye(2), step, np.zeros(2)).any()
    assert not learned(known, np.diag([1.0, 0.0]), step, np.zeros(2)).any()


def test_size_is_the_largest_share_of_the_gram():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(4, 4))
    gram, secant = half @ half.T, random_symmetric(rng, 4, 1.0)
    shares = np.linalg.eigvals(np.linalg.solve(gram, secant))
    np.testing.assert_allclose(relative_size(secant, gram), np.abs(shares).max(), rtol=1e-9)
    assert relative_size(np.zeros((4, 4)), np.zeros((4, 4))) == 0
    assert relative_size(np.full((4, 4), np.nan), gram) == np.inf


def test_it_stays_the_same_form_along_other_columns():
    rng = np.random.default_rng(1)
    before, after = random_whitening(rng, 3), random_whitening(rng, 3)
    secant, step = random_symmetric(rng, 3, 0.3), rng.normal(size=3)
    moved = carried(secant, before, after)
    form = (before @ step) @ secant @ (before @ step)
    np.testing.assert_allclose((after @ step) @ moved @ (after @ step), form, rtol=1e-12)


def test_a_hundredth_is_not_slow():
    assert [is_slow(size) for size in (0.0, 0.01, 0.011, np.inf)] == [False, False, True, True]


# -- in the trust region


T = np.linspace(0, 3, 60)


def evaluation_at(params, whitening, noise, curvature=None):
    """Of ``a exp(-b t)`` with residuals that are no noise."""
    a, b = params
    decay = np.exp(-b * T)
    residual = a * decay - 2 * np.exp(-0.7 * T) - noise
    jac = np.column_stack([decay, -a * T * decay]) @ np.linalg.inv(whitening)
    normal = NormalEquations(
        gram=jac.T @ jac,
        grad=jac.T @ residual,
        cost=np.asarray(0.5 * residual @ residual),
        num_rows=np.asarray(len(T)),
    )
    return Evaluation(params=params, whitening=whitening, normal=normal, curvature=curvature)


SOLVER = TrustRegion(
    bounds=(np.full(2, -np.inf), np.full(2, np.inf)),
    tolerances=Tolerances(distance_tol=1e-9, max_iterations=30),
)
NOISE = 0.4 * np.sin(3 * T)


def distances(solver, noise, *, learns):
    state = solver.init(evaluation_at(np.array([2.2, 0.8]), np.eye(2), noise))
    seen = [state.distance]
    while state.status.name == "RUNNING":
        if not learns:
            state = replace(state, secant=np.zeros((2, 2)))
        state = solver.update(state, evaluation_at(*state.question, noise))
        seen.append(state.distance)
    assert state.status.is_success
    return seen


def test_steps_teach_what_structured_residuals_leave_out():
    forgetful, learning = (distances(SOLVER, NOISE, learns=learns) for learns in (False, True))
    assert len(learning) <= len(forgetful) - 4
    # Gauss-Newton alone is linear; what is learned makes it faster with every step.
    ratios = np.divide(learning[2:], learning[1:-1])
    assert np.all(np.diff(np.log(ratios[:4])) < 0)


def test_second_derivatives_from_elsewhere_replace_what_was_learned():
    state = SOLVER.init(evaluation_at(np.array([2.2, 0.8]), np.eye(2), NOISE))
    assert not state.wants_curvature
    state = SOLVER.update(state, evaluation_at(*state.question, NOISE))
    state = SOLVER.update(state, evaluation_at(*state.question, NOISE))
    assert state.secant.any()
    assert state.wants_curvature
    given = evaluation_at(*state.question, NOISE, curvature=np.zeros((2, 2)))
    state = SOLVER.update(state, given)
    assert not state.secant.any()
    assert state.wants_curvature


def exact_remainder(params, step, whitening):
    a, b = params
    decay = np.exp(-b * T)
    along = -2 * step[0] * step[1] * T * decay + a * (step[1] * T) ** 2 * decay
    jac = np.column_stack([decay, -a * T * decay]) @ np.linalg.inv(whitening)
    return 0.5 * jac.T @ along


def test_a_bent_step_ends_nearer_to_the_minimum():
    start = SOLVER.init(evaluation_at(np.array([2.02, 0.72]), np.eye(2), 0.0 * T))
    way = start.params, start.step.vector, start.whitening
    bent = SOLVER.bend(start, exact_remainder(*way))
    ends = [np.abs(state.trial - [2, 0.7]).max() for state in (start, bent)]
    assert ends[1] < 0.05 * ends[0]
    assert bent.step.is_newton
    assert bent.step.reduction < start.step.reduction  # of the model, whose minimum it leaves
    after = SOLVER.update(bent, evaluation_at(*bent.question, 0.0 * T))
    assert after.was_accepted
    assert after.gain == pytest.approx(1, abs=0.01)
    assert not after.turn.any()
    # The way that was foreseen teaches nothing.
    assert relative_size(after.secant, np.eye(2)) < 1e-3


@pytest.mark.parametrize("remainder", [[np.nan, 0.0], [np.inf, 0.0], [30.0, 0.0]])
def test_a_step_is_not_bent_by_much_or_by_what_is_no_number(remainder):
    start = SOLVER.init(evaluation_at(np.array([2.02, 0.72]), np.eye(2), 0.0 * T))
    assert SOLVER.bend(start, np.array(remainder)) is start


def test_a_bent_step_stays_within_the_bounds():
    upper = np.array([np.inf, 0.7003])
    solver = replace(SOLVER, bounds=(np.full(2, -np.inf), upper))
    start = solver.init(evaluation_at(np.array([1.98, 0.68]), np.eye(2), 0.0 * T))
    turned = 4 * exact_remainder(start.params, start.step.vector, start.whitening)
    assert SOLVER.bend(start, turned).trial[1] > 0.7006
    assert 0.7002 < solver.bend(start, turned).trial[1] < 0.7003


# -- in a fit


NUM_ROWS = 2_000_000


def exponential(t, a, b, c):
    return a * jnp.exp(-b * t) + c


def dataset(misfit):
    rng = np.random.default_rng(5)
    t = rng.uniform(0, 10, NUM_ROWS)
    y = 2.5 * np.exp(-1.3 * t) + 0.5 + 0.1 * rng.normal(size=NUM_ROWS) + misfit * np.sin(3 * t)
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


@pytest.fixture
def points(monkeypatch):
    """Where second derivatives of the sample were taken."""
    seen, taken = [], SampleObjective.curvature

    def curvature(self, params, whitening):
        seen.append(params)
        return taken(self, params, whitening)

    monkeypatch.setattr(SampleObjective, "curvature", curvature)
    return seen


def test_noise_asks_for_no_second_derivatives(points):
    p0 = {"a": 1.0, "b": 1.0, "c": 0.0}
    result = fit_dataset(dataset(0.0), exponential, y="y", x="t", p0=p0)
    assert result.success
    assert result.num_passes <= 3
    assert points == []


def test_structured_misfit_does(points):
    p0 = {"a": 1.0, "b": 1.0, "c": 0.0}
    result = fit_dataset(dataset(0.3), exponential, y="y", x="t", p0=p0)
    assert result.success
    assert result.num_passes <= 4
    assert len(points) >= result.num_passes
