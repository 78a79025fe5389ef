"""A last step that is taken without a pass to confirm it."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from nlsq_dask import FitInterrupted, HybridStreamingConfig, fit_dataset
from nlsq_dask.normal_equations import NormalEquations
from nlsq_dask.objective import dense
from nlsq_dask.solvers.trust_region import Evaluation, Tolerances, TrustRegion
from nlsq_dask.status import Status


def decay(x, a=1.0, k=1.0, c=0.0):
    return a * jnp.exp(-k * x) + c


def gauss(x, h=1.0, c=4.5, w=1.0, level=0.0):
    return h * jnp.exp(-0.5 * ((x - c) / w) ** 2) + level


def sine(x, a=1.0, w=1.95, p=0.0):
    return a * jnp.sin(w * x + p)


def power(x, a=1.0, p=1.0):
    return a * (x + 0.1) ** p


TRUTH = {
    decay: (2.0, 0.5, 0.1),
    gauss: (2.0, 5.0, 0.8, 0.3),
    sine: (1.5, 2.0, 0.3),
    power: (1.2, 0.7),
}


@pytest.fixture
def every_pass_is_long(monkeypatch):
    monkeypatch.setattr(dense, "_MANY_ROWS", 0)


def make_rows(model, seed, noise, num_rows=60_000, misfit=0.0):
    x = np.linspace(0, 10, num_rows)
    rng = np.random.default_rng([seed, 1])
    y = np.asarray(model(x, *TRUTH[model])) + misfit * np.sin(1.3 * x)
    return xr.Dataset({"y": ("x", y + noise * rng.normal(size=num_rows))}, {"x": x})


def fit(ds, model, **options):
    # A sample of a few rows, so that it takes passes to get to the end.
    config = HybridStreamingConfig(max_sample_fraction=0.05, distance_tol=1e-6, **options)
    return fit_dataset(ds, model, y="y", config=config)


@pytest.mark.usefixtures("every_pass_is_long")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("noise", [0.02, 2.0])
@pytest.mark.parametrize("misfit", [0.0, 0.2])
@pytest.mark.parametrize("model", [decay, gauss, sine, power])
def test_the_end_is_as_near_as_it_is_said_to_be(model, seed, noise, misfit, monkeypatch):
    ds = make_rows(model, seed, noise, misfit=misfit)
    landed = fit(ds, model)
    monkeypatch.setattr(dense, "_MANY_ROWS", 10**18)
    config = HybridStreamingConfig(max_sample_fraction=0.05, distance_tol=1e-11)
    exact = fit_dataset(ds, model, y="y", config=config)
    off = landed.popt - exact.popt
    distance = np.sqrt(off @ np.linalg.solve(exact.pcov, off))
    assert landed.success
    assert landed.distance <= 1e-6
    # `pcov` is of Gauss-Newton's model alone, and `exact` off by itself.
    assert distance <= 1.05 * landed.distance + 1e-9
    units = np.outer(exact.perr, exact.perr)
    np.testing.assert_allclose(landed.pcov / units, exact.pcov / units, atol=1e-6)
    np.testing.assert_allclose(landed.cost, exact.cost, rtol=1e-12)


@pytest.mark.usefixtures("every_pass_is_long")
def test_a_pass_is_saved_and_the_message_says_so(monkeypatch):
    ds = make_rows(decay, 2, 0.3, num_rows=200_000)
    landed = fit(ds, decay)
    monkeypatch.setattr(dense, "_MANY_ROWS", 10**18)
    confirmed = fit(ds, decay)
    assert landed.num_passes == confirmed.num_passes - 1
    assert len(landed.history) == landed.num_passes
    assert "was saved" in landed.message
    assert "was saved" not in confirmed.message
    # The passes that were made are the same; the last step leads to where the next one was.
    for one, other in zip(landed.history, confirmed.history, strict=False):
        np.testing.assert_array_equal(one.params, other.params)
    np.testing.assert_array_equal(landed.popt, confirmed.history[landed.num_passes].params)


def test_few_rows_are_confirmed():
    assert "was saved" not in fit(make_rows(decay, 2, 0.3, num_rows=200_000), decay).message


@pytest.mark.usefixtures("every_pass_is_long")
@pytest.mark.parametrize("precision", ["mixed", "float32"])
def test_a_gradient_in_fewer_digits_is_confirmed(precision):
    ds = make_rows(decay, 2, 0.3, num_rows=200_000)
    assert "was saved" not in fit(ds, decay, precision=precision).message


@pytest.mark.usefixtures("every_pass_is_long")
def test_a_fit_that_was_interrupted_lands_at_the_same_bits(tmp_path):
    ds, path = make_rows(decay, 2, 0.3, num_rows=200_000), tmp_path / "run.h5"
    whole = fit(ds, decay)
    assert "was saved" in whole.message

    def interrupt(record):
        if record.phase == 2 and record.num_passes == whole.num_passes:
            raise KeyboardInterrupt

    config = HybridStreamingConfig(max_sample_fraction=0.05)
    with pytest.raises(FitInterrupted):
        fit_dataset(ds, decay, y="y", config=config, checkpoint=path, callback=interrupt)
    again = fit(ds, decay, resume_from_checkpoint=str(path))
    np.testing.assert_array_equal(again.popt, whole.popt)
    np.testing.assert_array_equal(again.pcov, whole.pcov)
    assert (again.cost, again.num_passes) == (whole.cost, whole.num_passes)
    assert again.message == whole.message


# -- the solver alone

T = np.linspace(0, 4, 4000)
NOISE = 0.1 * np.random.default_rng(0).normal(size=T.size)


def evaluate(params, whitening):
    a, k = params
    shape = np.exp(-k * T)
    jac = np.column_stack([shape, -a * T * shape]) @ np.linalg.inv(whitening)
    r = a * shape - (2 * np.exp(-0.5 * T) + NOISE)
    normal = NormalEquations(
        gram=jac.T @ jac, grad=jac.T @ r, cost=np.asarray(0.5 * r @ r), num_rows=np.asarray(T.size)
    )
    return Evaluation(params=params, whitening=whitening, normal=normal)


def solver_with(lower=(-np.inf, -np.inf), distance_tol=1e-6):
    bounds = np.array(lower), np.full(2, np.inf)
    tolerances = Tolerances(distance_tol=distance_tol, tangent_tol=1e-4, max_iterations=50)
    return TrustRegion(bounds=bounds, tolerances=tolerances)


def near_the_end(solver):
    """A state within 1e-2 standard errors, that is still running."""
    state = solver.init(evaluate(np.array([1.999, 0.4995]), np.eye(2)))
    while state.distance > 1e-2:
        state = solver.update(state, evaluate(*state.question))
    assert state.status is Status.RUNNING
    return state


def test_it_lands_at_the_trial_and_foresees_what_is_left():
    solver = solver_with(distance_tol=1e-3)
    state = near_the_end(solver)
    landed = solver.land(state, lambda _: 0.0)
    assert landed.has_landed
    assert landed.status is Status.CONVERGED
    np.testing.assert_array_equal(landed.params, state.trial)
    there = solver.update(state, evaluate(*state.question))
    np.testing.assert_allclose(landed.cost, there.cost, rtol=1e-10)
    np.testing.assert_allclose(landed.distance, 10 * state.contraction * state.distance, rtol=1e-9)
    assert there.distance <= landed.distance


@pytest.mark.parametrize(
    ("share", "lands"), [(0.0, True), (0.05, True), (1.0, False), (np.inf, False), (np.nan, False)]
)
def test_what_is_foreseen_is_added_to_what_was_seen(share, lands):
    solver = solver_with(distance_tol=1e-3)
    state = near_the_end(solver)
    landed = solver.land(state, lambda _: share)
    assert landed.has_landed is lands
    if lands:
        left = (10 * state.contraction + share) * state.distance
        np.testing.assert_allclose(landed.distance, left, rtol=1e-9)


def test_the_way_is_that_of_the_last_newton_step_until_what_it_taught_is_forgotten():
    solver = solver_with(distance_tol=1e-3)
    state = near_the_end(solver)
    after = solver.update(state, evaluate(*state.question))
    np.testing.assert_array_equal(after.way, state.trial - state.params)
    assert solver.init(evaluate(np.array([1.9, 0.45]), np.eye(2))).way.tolist() == [0.0, 0.0]
    # Larger than the gram that it would correct: nothing is kept of it.
    wild = replace(state, secant=1e9 * np.eye(2))
    forgotten = solver.update(wild, evaluate(*wild.question))
    assert not forgotten.secant.any()
    assert not forgotten.way.any()


def test_only_what_is_across_the_way_is_foreseen():
    whitening = np.array([[2.0, 0.3], [0.0, 0.5]])
    way, step = np.array([1.0, -2.0]), np.array([0.4, 0.7])
    across = dense._across(step, way, whitening)
    assert abs((whitening @ across) @ (whitening @ way)) < 1e-14
    # What was taken off is along the way.
    assert abs(np.linalg.det([step - across, way])) < 1e-14
    np.testing.assert_array_equal(dense._across(step, np.zeros(2), whitening), step)
    np.testing.assert_allclose(dense._across(3 * way, way, whitening), 0.0, atol=1e-14)


@pytest.mark.parametrize(
    "change",
    [
        {"status": Status.MAX_PASSES},
        {"was_accepted": False},
        {"contraction": None},
        {"contraction": 0.9},
        {"distance": 0.011},
    ],
    ids=str,
)
def test_it_does_not_land(change):
    solver = solver_with(distance_tol=1e-3)
    state = replace(near_the_end(solver), **change)
    assert solver.land(state, lambda _: 0.0) is state


def test_nor_where_a_radius_a_bound_or_a_penalty_has_its_part():
    solver = solver_with(distance_tol=1e-3)
    state = near_the_end(solver)
    held = np.array([True, False])
    cut = replace(state, step=replace(state.step, damping=1e-3))
    bound = replace(state, newton=replace(state.newton, active=held))
    stopped = replace(state, step=replace(state.step, active=held))
    penalised = replace(state, evaluation=replace(state.evaluation, penalty_cost=1.0))
    for other in (cut, bound, stopped, penalised):
        assert solver.land(other, lambda _: 0.0) is other
