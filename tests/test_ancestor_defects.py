"""What the systems before this one got wrong, a test for each."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import xarray as xr

import problems
from nlsq_dask import HybridStreamingConfig, Status, fit_dataset
from test_solver import evaluate_with, make_solver


def rows(**columns):
    return xr.Dataset({name: ("row", values) for name, values in columns.items()})


def test_a_bound_active_in_a_correlated_problem_is_not_a_clipped_step():
    rng = np.random.default_rng(1)
    u = rng.normal(size=4_000)
    v = 0.95 * u + 0.3 * rng.normal(size=u.size)
    y = 2.0 * u - 1.0 * v + 0.1 * rng.normal(size=u.size)
    result = fit_dataset(
        rows(y=y, u=u, v=v), lambda u, v, a, b: a * u + b * v, p0=[1.0, 0.0], bounds={"a": (0, 1.5)}
    )
    expected = scipy.optimize.lsq_linear(
        np.stack([u, v], axis=-1), y, ([0, -np.inf], [1.5, np.inf])
    )
    assert result.success
    assert result.active.tolist() == [True, False]
    np.testing.assert_allclose(result.popt, expected.x, atol=1e-5 * result.perr.min())
    assert abs(result["b"] - -1.0) > 10 * result.perr[1]  # where clipping would have left it


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_the_unit_of_y_does_not_matter(unit):
    t, y = problems.make_decay(60_000)
    fits = [
        fit_dataset(
            rows(y=scale * y, t=t),
            problems.decay,
            y="y",
            p0={"amplitude": 1.0 * scale, "rate": 1.0, "offset": 0.1 * scale},
        )
        for scale in (1.0, unit)
    ]
    plain, scaled = fits
    assert plain.success
    assert scaled.status is plain.status
    assert scaled.num_passes == plain.num_passes
    factor = np.array([unit, 1.0, unit])
    assert np.all(np.abs(scaled.popt / factor - plain.popt) < 1e-6 * plain.perr)
    np.testing.assert_allclose(scaled.perr / factor, plain.perr, rtol=1e-6)


def test_a_model_of_nan_is_not_success():
    t, y = problems.make_decay(500)
    result = fit_dataset(
        rows(y=y, t=t), lambda t, a, b: a * jnp.sqrt(-1.0 - b**2) * t, y="y", p0=[1.0, 1.0]
    )
    assert not result.success
    assert result.status is Status.NOT_FINITE


def test_sigma_and_where_change_the_answer_as_they_should():
    t, y = problems.make_decay(5_000)
    rng = np.random.default_rng(2)
    sigma = np.where(t < 3, 0.02, 0.5)
    good = rng.uniform(size=t.size) > 0.3
    y = y + sigma * rng.normal(size=t.size) + np.where(good, 0.0, 5.0)
    ds = rows(y=y, t=t, sigma=sigma, good=good)
    result = fit_dataset(
        ds, problems.decay, y="y", p0=problems.P0, sigma="sigma", where="good", absolute_sigma=True
    )
    oracle = problems.scipy_decay(t[good], y[good], sigma[good], absolute_sigma=True)
    assert oracle.distance(result.popt) < 1e-5
    np.testing.assert_allclose(result.pcov, oracle.pcov, rtol=1e-6)
    plain = fit_dataset(ds.drop_vars(["sigma", "good"]), problems.decay, y="y", p0=problems.P0)
    assert oracle.distance(plain.popt) > 10


def test_a_first_step_that_is_rejected_is_not_convergence():
    """The root of an arc tangent from 3: Newton's step leads away."""

    def residual(p):
        return np.array([np.arctan(p[0]), 0.1])

    def jacobian(p):
        return np.array([[1 / (1 + p[0] ** 2)], [0.0]])

    evaluate = evaluate_with(residual, jacobian)
    solver = replace(make_solver(1), initial_radius=100.0)
    state = solver.init(evaluate(np.array([3.0]), np.eye(1)))
    state = solver.update(state, evaluate(state.trial, np.eye(1)))
    assert not state.was_accepted
    assert state.status is Status.RUNNING
    while state.status is Status.RUNNING:
        state = solver.update(state, evaluate(state.trial, np.eye(1)))
    assert state.status.is_success
    np.testing.assert_allclose(state.params, 0.0, atol=1e-9)


def test_a_polynomial_of_degree_nine_keeps_its_digits():
    x = np.linspace(0.0, 2.0, 60_000)
    powers = np.stack([x.astype(np.longdouble) ** j for j in range(10)], axis=-1)
    assert 1e6 < np.linalg.cond(powers.astype(np.float64)) < 1e7
    rng = np.random.default_rng(3)
    y = np.asarray(powers @ (-1.0) ** np.arange(10), np.float64) + 1e-3 * rng.normal(size=x.size)
    result = fit_dataset(
        rows(y=y, x=x),
        lambda x, c: sum(c[j] * x**j for j in range(10)),
        y="y",
        p0={"c": np.zeros(10)},
    )
    assert result.success
    expected = problems.solve_in_longdouble(powers, y)
    assert np.all(np.abs(result["c"] - expected) < 1e-3 * result.perr)


@pytest.mark.parametrize("order", ["time", "reversed", "y"])
def test_sorted_data_are_sampled_from_end_to_end(order):
    t, y = problems.make_decay(200_000)
    place = {"time": np.arange(t.size), "reversed": np.arange(t.size)[::-1], "y": np.argsort(y)}
    t, y = t[place[order]], y[place[order]]
    ds = rows(y=y, t=t).chunk(row=5_000)
    result = fit_dataset(
        ds, problems.decay, y="y", p0={"amplitude": 20.0, "rate": 5.0, "offset": -3.0}
    )
    assert result.success
    assert problems.scipy_decay(t, y).distance(result.popt) < 1e-5
    assert result.num_passes <= 5


@pytest.mark.parametrize("model", ["log", "reciprocal"])
def test_the_padding_of_a_ragged_chunk_is_not_evaluated_at_zero(model):
    x = np.linspace(0.5, 4.0, 2_501)
    term = {"log": jnp.log, "reciprocal": lambda x: 1 / x}[model]
    in_numpy = {"log": np.log, "reciprocal": np.reciprocal}[model]
    y = 2 * in_numpy(x) + 1 + 0.1 * np.random.default_rng(4).normal(size=x.size)
    ds = rows(y=y, x=x).chunk(row=1_000)
    result = fit_dataset(ds, lambda x, a, b: a * term(x) + b, y="y", p0=[0.1, 0.1])
    assert result.success
    assert result.num_rows == x.size
    expected = np.linalg.lstsq(np.stack([in_numpy(x), np.ones_like(x)], axis=-1), y, rcond=None)[0]
    np.testing.assert_allclose(result.popt, expected, rtol=1e-9)


@pytest.mark.parametrize("is_linear", [True, False])
def test_a_budget_of_one_iteration_is_success_only_if_a_test_was_met(is_linear):
    t, y = problems.make_decay(80_000)
    model = (lambda t, a, b: a * t + b) if is_linear else problems.decay
    config = HybridStreamingConfig(gauss_newton_max_iterations=1)
    result = fit_dataset(rows(y=y, t=t), model, y="y", config=config)
    assert not result.diagnostics["sample"]["is_everything"]
    assert result.num_passes == 2
    assert result.success is is_linear
    assert (result.distance <= config.distance_tol) is is_linear
    assert result.status is (Status.CONVERGED if is_linear else Status.MAX_ITERATIONS)


@pytest.mark.parametrize("max_iterations", [1, 100])
def test_the_covariance_is_that_of_the_parameters_returned(max_iterations):
    t, y = problems.make_decay(80_000)
    config = HybridStreamingConfig(gauss_newton_max_iterations=max_iterations)
    result = fit_dataset(rows(y=y, t=t), problems.decay, y="y", p0=problems.P0, config=config)
    jac = problems.decay_jacobian(t, result.popt)
    residual = problems.decay_numpy(t, result.popt) - y
    variance = residual @ residual / (t.size - 3)
    np.testing.assert_allclose(result.pcov, variance * np.linalg.inv(jac.T @ jac), rtol=1e-9)
    np.testing.assert_allclose(result.cost, 0.5 * residual @ residual, rtol=1e-12)
