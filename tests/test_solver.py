"""The trust region on problems that need neither data nor a cluster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import nist
from nlsq_dask.normal_equations import NormalEquations
from nlsq_dask.solvers.minimize import minimize
from nlsq_dask.solvers.quadratic import build_quadratic, next_whitening
from nlsq_dask.solvers.subproblem import solve_subproblem
from nlsq_dask.solvers.trust_region import Evaluation, Tolerances, TrustRegion
from nlsq_dask.status import Status

INF = np.inf


def evaluate_with(residual, jacobian):
    """An evaluator from functions, whitened as the passes are."""

    def evaluate(params, whitening):
        with np.errstate(all="ignore"):
            r = residual(params)
            jac = np.linalg.solve(whitening.T, jacobian(params).T).T
        return Evaluation(params=params, whitening=whitening, normal=make_normal(jac, r))

    return evaluate


def make_normal(jac, r):
    return NormalEquations(
        gram=jac.T @ jac,
        grad=jac.T @ r,
        cost=np.float64(0.5 * r @ r),
        num_rows=np.int64(len(r)),
    )


def make_solver(k, bounds=None, **limits):
    lower, upper = bounds or (np.full(k, -INF), np.full(k, INF))
    options = {"distance_tol": 1e-9, "max_iterations": 500} | limits
    return TrustRegion(
        bounds=(np.asarray(lower, float), np.asarray(upper, float)),
        tolerances=Tolerances(**options),
    )


def solve(residual, jacobian, start, bounds=None, **limits):
    start = np.asarray(start, float)
    evaluate = evaluate_with(residual, jacobian)
    solver = make_solver(len(start), bounds, **limits)
    whitening = next_whitening(np.linalg.qr(jacobian(start), mode="r"))
    return minimize(evaluate, solver, solver.init(evaluate(start, whitening)))


def rosenbrock(p):
    return np.array([10 * (p[1] - p[0] ** 2), 1 - p[0], 0.1 * (p[0] + p[1])])


def rosenbrock_jacobian(p):
    return np.array([[-20 * p[0], 10.0], [-1.0, 0.0], [0.1, 0.1]])


BOXES = {
    "free": None,
    "inactive": ([-5, -5], [5, 5]),
    "one active": ([-5, -5], [0.5, 5]),
    "corner": ([-5, -5], [0.5, 0.1]),
    "below": ([1.2, -5], [5, 5]),
}


@pytest.mark.parametrize("box", BOXES)
def test_constrained_minima_are_scipys(box):
    start = [1.5, 2.0] if box == "below" else [-1.0, 0.05]
    state = solve(rosenbrock, rosenbrock_jacobian, start, BOXES[box])
    expected = scipy.optimize.least_squares(
        rosenbrock,
        start,
        jac=rosenbrock_jacobian,
        bounds=BOXES[box] or (-INF, INF),
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        max_nfev=2000,
    )
    assert state.status.is_success
    np.testing.assert_allclose(state.params, expected.x, rtol=1e-6, atol=1e-7)
    assert state.cost <= expected.cost * (1 + 1e-9)
    if BOXES[box] is not None:
        lower, upper = (np.asarray(side, float) for side in BOXES[box])
        assert np.all((state.params > lower) & (state.params < upper))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 6), radius=st.floats(1e-3, 1e3))
def test_subproblem_is_solved_exactly(seed, k, radius):
    """Against SLSQP-free optimality: no feasible point nearby is better, and the radius holds."""
    rng = np.random.default_rng(seed)
    jac, r = rng.normal(size=(k + 3, k)), rng.normal(size=k + 3)
    model = build_quadratic(make_normal(jac, r), np.eye(k))
    scale = np.linalg.norm(jac, axis=0)
    low, high = -rng.uniform(0.01, 2, k), rng.uniform(0.01, 2, k)
    step = solve_subproblem(model, scale, radius, (low, high))
    p = step.vector
    assert np.all((p >= low) & (p <= high))
    assert step.scaled_norm <= 1.11 * radius
    # KKT: the gradient of the damped model points out of the box at active bounds, and is
    # zero elsewhere.
    gradient = jac.T @ (jac @ p + r) + step.damping * scale**2 * p
    at_low, at_high = p <= low * (1 - 1e-7), p >= high * (1 - 1e-7)
    size = 1e-6 * np.linalg.norm(jac) * (np.linalg.norm(r) + 1)
    assert np.all(gradient[at_low] >= -size)
    assert np.all(gradient[at_high] <= size)
    assert np.all(np.abs(gradient[~at_low & ~at_high]) <= size)


@pytest.mark.parametrize("memory", [1.0, 1e8, 1e18])
def test_a_scale_that_remembers_larger_columns_hides_no_direction(memory):
    """From a start on a cliff the columns fall by many decades; what is left still counts."""
    rng = np.random.default_rng(6)
    jac, r = rng.normal(size=(9, 3)), rng.normal(size=9)
    model = build_quadratic(make_normal(jac, r), np.eye(3))
    scale = np.linalg.norm(jac, axis=0) * [1.0, memory, 1.0]
    nowhere = np.full(3, -INF), np.full(3, INF)
    newton = solve_subproblem(model, scale, INF, nowhere)
    np.testing.assert_allclose(newton.vector, -np.linalg.lstsq(jac, r)[0], rtol=1e-10)
    step = solve_subproblem(model, scale, 0.1 * newton.scaled_norm, nowhere)
    np.testing.assert_allclose(step.scaled_norm, 0.1 * newton.scaled_norm, rtol=0.051)
    gradient = jac.T @ (jac @ step.vector + r) + step.damping * scale**2 * step.vector
    assert np.all(np.abs(gradient) <= 1e-10 * scale * np.linalg.norm(r))
    assert step.reduction > 0


def test_falling_columns_are_not_convergence():
    """NIST's Nelson from a rate three times too large: the first step leaves a spike."""
    problem = nist.load("Nelson")

    def residual(p):
        return p[0] - p[1] * problem.x[0] * np.exp(-p[2] * problem.x[1]) - problem.y

    def jacobian(p):
        spike = -problem.x[0] * np.exp(-p[2] * problem.x[1])
        return np.stack([np.ones_like(spike), spike, -p[1] * problem.x[1] * spike], axis=-1)

    state = solve(residual, jacobian, [2.8, 8.6e-10, -0.172])
    assert state.status.is_success
    assert nist.digits(state.params, problem.values) >= 6


def test_only_failing_trials_is_not_convergence():
    evaluate = evaluate_with(rosenbrock, rosenbrock_jacobian)
    solver = make_solver(2)
    start = state = solver.init(evaluate(np.array([-1.0, 1.0]), np.eye(2)))
    broken = replace(start.evaluation.normal, cost=np.float64(np.nan))
    while state.status is Status.RUNNING:
        failed = Evaluation(params=state.trial, whitening=state.whitening, normal=broken)
        state = solver.update(state, failed)
    assert state.status is Status.STALLED
    assert state.params is start.params
    assert not state.status.is_success


def test_a_budget_of_one_iteration_is_success_only_if_a_test_was_met():
    state = solve(rosenbrock, rosenbrock_jacobian, [-1.0, 1.0], max_iterations=1)
    assert state.status is Status.MAX_ITERATIONS
    matrix = np.arange(12.0).reshape(4, 3) ** 2
    y = np.array([1.0, 2.0, 0.0, 1.0])
    start = np.linalg.lstsq(matrix, y, rcond=None)[0] * 1.01
    linear = solve(lambda p: matrix @ p - y, lambda p: matrix, start, max_iterations=1)
    assert linear.status.is_success


@pytest.mark.parametrize("name", ["ftol", "xtol", "gtol"])
def test_minpack_tests_act_only_when_given(name):
    loose = solve(rosenbrock, rosenbrock_jacobian, [-1.0, 1.0], distance_tol=1e-300, **{name: 1e-3})
    assert loose.status is Status[f"CONVERGED_{name.upper()}"]


def test_exact_data_converge_to_rounding():
    x = np.linspace(0, 3, 50)
    state = solve(
        lambda p: p[0] * np.exp(-p[1] * x) - 2 * np.exp(-0.7 * x),
        lambda p: np.stack([np.exp(-p[1] * x), -p[0] * x * np.exp(-p[1] * x)], axis=-1),
        [1.0, 1.0],
        data_square=float(np.sum(4 * np.exp(-1.4 * x))),
    )
    assert state.status.is_success
    np.testing.assert_allclose(state.params, [2.0, 0.7], rtol=1e-13)


def test_directions_without_data_are_left_alone_and_reported():
    x = np.linspace(1, 2, 20)
    state = solve(
        lambda p: p[0] * p[1] * x - 3 * x + 0.1 * np.sin(9 * x),
        lambda p: np.stack([p[1] * x, p[0] * x], axis=-1),
        [1.0, 1.0],
    )
    assert state.status is Status.UNIDENTIFIED
    np.testing.assert_allclose(np.prod(state.params), 2.98, atol=0.05)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_whitened_gram_keeps_the_digits(condition):
    """J of a given condition number: the plain gram loses its square, the whitened one none."""
    rng = np.random.default_rng(1)
    left = np.linalg.qr(rng.normal(size=(400, 5)))[0]
    right = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    jac = left * np.geomspace(1, 1 / condition, 5) @ right
    truth = rng.normal(size=5)
    r = -jac @ truth  # the minimum is at p = truth, with no residual left
    sample = jac[::4] + 1e-3 * rng.normal(size=(100, 5)) * np.abs(jac[::4])
    whitening = next_whitening(np.linalg.qr(sample, mode="r"))
    whitened = np.linalg.solve(whitening.T, jac.T).T
    model = build_quadratic(make_normal(whitened, r), whitening)
    again = next_whitening(model.factor)
    model = build_quadratic(make_normal(np.linalg.solve(again.T, jac.T).T, r), again)
    solution = np.linalg.solve(model.factor, -model.residual)
    assert np.linalg.norm(solution - truth) < 1e-16 * condition * 100 + 1e-13


def test_second_derivatives_that_overflow_are_left_out():
    rng = np.random.default_rng(0)
    normal = make_normal(rng.normal(size=(9, 2)), rng.normal(size=9))
    plain = build_quadratic(normal, np.eye(2))
    overflown = build_quadratic(normal, np.eye(2), np.array([[np.inf, 0.0], [0.0, np.nan]]))
    np.testing.assert_array_equal(overflown.factor, plain.factor)
