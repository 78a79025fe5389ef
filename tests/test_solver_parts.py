"""Quadratic models, steps and whole solves against dense algebra, and in other units."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlsq_dask.solvers import subproblem
from nlsq_dask.solvers.minimize import minimize
from nlsq_dask.solvers.quadratic import (
    QuadraticModel,
    build_quadratic,
    next_whitening,
    rank_tolerance,
    spectrum_of,
)
from nlsq_dask.solvers.subproblem import solve_subproblem
from nlsq_dask.solvers.triangle import solve_triangle
from nlsq_dask.solvers.trust_region import Evaluation, TrustRegion
from nlsq_dask.status import Status
from test_solver import evaluate_with, make_normal, make_solver, rosenbrock, rosenbrock_jacobian

SEEDS = st.integers(0, 2**32 - 1)
EPS = 2.0**-52
INF = np.inf


# -- the quadratic model


def whitened(seed, k):
    rng = np.random.default_rng(seed)
    jac, r = rng.normal(size=(k + 4, k)), rng.normal(size=k + 4)
    whitening = np.triu(rng.normal(size=(k, k)), 1) + np.diag(rng.uniform(0.5, 3.0, k))
    return jac, r, whitening


@settings(max_examples=20)
@given(seed=SEEDS, k=st.integers(1, 5), bend=st.sampled_from([None, 0.4, -0.4]))
def test_the_model_is_the_quadratic_with_second_derivatives(seed, k, bend):
    jac, r, whitening = whitened(seed, k)
    curvature = None
    if bend is not None:
        random = np.random.default_rng([seed, 1]).normal(size=(k, k))
        random = random @ random.T
        lower = np.linalg.cholesky(jac.T @ jac)
        size = np.linalg.eigvalsh(np.linalg.solve(lower, np.linalg.solve(lower, random).T))[-1]
        curvature = bend / size * random
    model = build_quadratic(make_normal(jac, r), whitening, curvature)
    hessian = whitening.T @ (jac.T @ jac + (0 if bend is None else curvature)) @ whitening
    grad = whitening.T @ jac.T @ r
    np.testing.assert_allclose(model.factor.T @ model.factor, hessian, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(model.grad, grad, rtol=1e-9, atol=1e-9)
    plain = whitening.T @ jac.T @ jac @ whitening
    np.testing.assert_allclose(model.column_norms, np.sqrt(np.diag(plain)), rtol=1e-9)
    step = np.random.default_rng([seed, 2]).normal(size=k)
    expected = -step @ grad - 0.5 * step @ hessian @ step
    assert model.reduction(step) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert model.cost == pytest.approx(0.5 * r @ r)


@pytest.mark.parametrize(("bend", "is_used"), [(-0.85, True), (-0.9, True), (-0.95, False)])
def test_second_derivatives_may_flatten_the_model_to_a_tenth(bend, is_used):
    """Up to rounding at the tenth itself, which a sixteenth of it keeps clear of."""
    jac, r = np.vstack([np.diag([2.0, 3.0]), np.zeros((1, 2))]), np.array([1.0, 1.0, 1.0])
    curvature = np.diag([4.0 * (bend if bend != -0.9 else -0.9 + 1 / 160), 0.0])
    model = build_quadratic(make_normal(jac, r), np.eye(2), curvature)
    hessian = jac.T @ jac + (curvature if is_used else 0)
    np.testing.assert_allclose(model.factor.T @ model.factor, hessian, rtol=1e-12, atol=1e-15)


def model_of_gram(gram, grad):
    normal = replace(make_normal(np.eye(len(grad)), np.zeros(len(grad))), gram=gram, grad=grad)
    return build_quadratic(normal, np.eye(len(grad)))


def test_three_columns_that_are_one_have_one_direction():
    model = model_of_gram(np.ones((3, 3)), np.ones(3))
    values = np.linalg.svd(model.factor, compute_uv=False)
    np.testing.assert_allclose(values, [np.sqrt(3), 0.0, 0.0], atol=1e-15)
    np.testing.assert_allclose(model.grad, np.ones(3), rtol=1e-14)


def test_no_information_is_no_direction():
    model = model_of_gram(np.zeros((2, 2)), np.zeros(2))
    np.testing.assert_array_equal(model.factor, 0.0)
    np.testing.assert_array_equal(model.residual, 0.0)


def test_a_small_column_is_no_rounding():
    model = model_of_gram(np.diag([1.0, 1e-20]), np.array([0.0, 1e-10]))
    np.testing.assert_allclose(np.abs(np.diag(model.factor)), [1.0, 1e-10], rtol=1e-14)
    np.testing.assert_allclose(model.grad, [0.0, 1e-10], rtol=1e-14)


@pytest.mark.parametrize("ratio", [1e-12, 1.2e-13, 1e-14])
def test_eigenvalues_below_the_rounding_of_the_gram_are_none(ratio):
    gram = np.array([[1.0, 1 - ratio], [1 - ratio, 1.0]]) * np.outer([1.0, 1e3], [1.0, 1e3])
    grad = np.array([1.0, 1e3])
    model = model_of_gram(gram, grad)
    values = np.linalg.svd(model.factor / [1.0, 1e3], compute_uv=False)
    assert values[0] == pytest.approx(np.sqrt(2), rel=1e-9)
    assert values[1] == (pytest.approx(np.sqrt(ratio), rel=1e-3) if ratio > 2e-13 else 0.0)
    np.testing.assert_allclose(model.grad, grad, rtol=1e-9)


def test_a_column_that_no_row_sees_is_zero():
    jac, r = np.array([[3.0, 0.0], [4.0, 0.0]]), np.array([1.0, 1.0])
    model = build_quadratic(make_normal(jac, r), np.eye(2))
    np.testing.assert_allclose(model.factor.T @ model.factor, [[25.0, 0], [0, 0]], atol=1e-14)
    np.testing.assert_allclose(model.grad, [7.0, 0.0], atol=1e-14)
    np.testing.assert_allclose(model.column_norms, [5.0, 0.0])


def test_the_spectrum_says_what_is_identified():
    factor = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    scale = np.array([2.0, 1.0, 5.0])
    spectrum = spectrum_of(factor, scale)
    left, values, right = np.linalg.svd(factor / scale)
    np.testing.assert_allclose(spectrum.values, values, atol=1e-15)
    np.testing.assert_allclose(
        spectrum.left @ np.diag(spectrum.values) @ spectrum.right, left * values @ right, atol=1e-14
    )
    assert spectrum.rank == 2
    assert spectrum.condition_number == INF
    assert spectrum_of(np.diag([4.0, 1.0]), np.ones(2)).condition_number == 4.0
    assert rank_tolerance(3) == 12 * EPS
    edge = spectrum_of(np.diag([1.0, 8 * EPS]), np.ones(2))
    assert edge.is_identified.tolist() == [True, False]
    assert spectrum_of(np.diag([1.0, 8.01 * EPS]), np.ones(2)).rank == 2
    assert spectrum_of(np.zeros((2, 2)), np.ones(2)).rank == 0


@pytest.mark.parametrize(
    "factor",
    [
        np.array([[2.0, 1.0], [0.0, 3.0]]),
        np.array([[2.0, 0.0], [0.0, 0.0]]),
        np.array([[1e-9, 0.0], [0.0, 0.0]]),
        np.zeros((2, 2)),
    ],
)
def test_the_next_whitening_is_invertible(factor):
    """The factor upon 1e-8 of its column norms; of the largest where a column is zero."""
    norms = np.linalg.norm(factor, axis=0)
    floor = 1e-8 * np.where(norms > 0, norms, norms.max() or 1.0)
    r = next_whitening(factor)
    expected = factor.T @ factor + np.diag(floor**2)
    np.testing.assert_array_equal(r, np.triu(r))
    size = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(
        r.T @ r / np.outer(size, size), expected / np.outer(size, size), atol=1e-12
    )


# -- the step


@settings(max_examples=40)
@given(seed=SEEDS, k=st.integers(1, 5), share=st.floats(1e-4, 0.9), decades=st.floats(0, 8))
def test_a_step_that_the_radius_cuts_is_as_long_as_it(seed, k, share, decades):
    rng = np.random.default_rng(seed)
    jac, r = (
        rng.normal(size=(k + 3, k)) * 10 ** rng.uniform(-decades, decades, k),
        rng.normal(size=k + 3),
    )
    model = build_quadratic(make_normal(jac, r), np.eye(k))
    scale = model.column_norms * 10 ** rng.uniform(0, 2, k)
    nowhere = np.full(k, -INF), np.full(k, INF)
    newton = solve_subproblem(model, scale, INF, nowhere)
    assert newton.is_newton
    assert not newton.active.any()
    assert newton.reduction == pytest.approx(0.5 * model.residual @ model.residual, rel=1e-9)
    step = solve_subproblem(model, scale, share * newton.scaled_norm, nowhere)
    assert not step.is_newton
    assert step.scaled_norm == pytest.approx(share * newton.scaled_norm, rel=0.0501)
    assert step.scaled_norm == pytest.approx(np.linalg.norm(scale * step.vector))
    assert step.reduction == model.reduction(step.vector)
    near = solve_subproblem(model, scale, newton.scaled_norm / 1.04, nowhere)
    assert near.is_newton


def test_the_radius_is_found_in_a_few_solves(monkeypatch):
    """Each with a QR: five or so, the Newton step and the last one included."""
    counts = []
    solve = subproblem._DampedSteps.at

    def counted(self, damping):
        counts[-1] += 1
        return solve(self, damping)

    monkeypatch.setattr(subproblem._DampedSteps, "at", counted)
    nowhere = np.full(3, -INF), np.full(3, INF)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        model = build_quadratic(make_normal(rng.normal(size=(6, 3)), rng.normal(size=6)), np.eye(3))
        counts.append(0)
        newton = solve_subproblem(model, model.column_norms, INF, nowhere)
        assert counts.pop() == 1
        for share in (1e-3, 0.1, 0.7):
            counts.append(0)
            solve_subproblem(model, model.column_norms, share * newton.scaled_norm, nowhere)
    assert max(counts) <= 8
    assert np.mean(counts) <= 5


def test_bounds_that_hold_a_step_are_told_and_not_quite_reached():
    model = build_quadratic(make_normal(np.eye(3), np.array([-1.0, 2.0, 0.5])), np.eye(3))
    low, high = np.array([-1.0, -1.0, -1.0]), np.array([0.25, 1.0, 1.0])
    step = solve_subproblem(model, np.ones(3), INF, (low, high))
    np.testing.assert_allclose(step.vector, [0.25 * (1 - 1e-8), -(1 - 1e-8), -0.5], rtol=1e-12)
    assert step.active.tolist() == [True, True, False]
    assert step.is_newton
    assert step.scaled_norm == pytest.approx(np.linalg.norm(step.vector))


def test_a_bound_at_the_point_itself_holds_a_step_there():
    model = build_quadratic(make_normal(np.eye(2), np.array([-1.0, -1.0])), np.eye(2))
    step = solve_subproblem(model, np.ones(2), INF, (np.zeros(2) - 1, np.array([0.0, 2.0])))
    np.testing.assert_allclose(step.vector, [0.0, 1.0], atol=1e-300)
    assert step.active.tolist() == [True, False]


# -- the whole solve in other units, to the bit


def course(units, size, order=(0, 1), **limits):
    """All states of a solve of Rosenbrock's problem, told in other units."""
    order = np.array(order)
    back = np.argsort(order)

    def jacobian(q):
        return size * rosenbrock_jacobian((q / units)[back])[:, order] / units

    def evaluate(q, whitening):
        r = size * rosenbrock((q / units)[back])
        jac = jacobian(q) @ np.linalg.solve(whitening, np.eye(2))
        return Evaluation(params=q, whitening=whitening, normal=make_normal(jac, r))

    start = np.array([-1.0, 1.0])[order] * units
    solver = make_solver(2, **limits)
    whitening = next_whitening(np.linalg.qr(jacobian(start), mode="r"))
    states = [solver.init(evaluate(start, whitening))]

    def after(state):
        states.append(state)
        return state

    minimize(evaluate, solver, states[0], after)
    return states


@pytest.mark.parametrize(
    ("units", "size"), [([2.0**20, 2.0**-30], 1.0), ([1.0, 1.0], 2.0**15), ([0.5, 2.0**40], 0.25)]
)
def test_a_solve_in_other_units_is_the_same_to_the_bit(units, size):
    """Powers of two round nothing, and no rule may have a unit of its own."""
    plain, scaled = course(np.ones(2), 1.0), course(np.array(units), size)
    assert plain[-1].status is scaled[-1].status
    assert plain[-1].status.is_success
    assert len(plain) == len(scaled)
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(other.params, one.params * units)
        np.testing.assert_array_equal(other.trial, one.trial * units)
        assert other.cost == one.cost * size**2
        assert other.radius == one.radius * size
        assert other.distance == one.distance
        assert other.optimality == one.optimality
        assert other.tangent_cosine == one.tangent_cosine
        assert other.condition_number == one.condition_number


def test_a_solve_in_another_order_is_the_same():
    plain, turned = course(np.ones(2), 1.0), course(np.ones(2), 1.0, (1, 0))
    assert plain[-1].status is turned[-1].status
    np.testing.assert_allclose(turned[-1].params, plain[-1].params[::-1], rtol=1e-9)


def test_a_state_says_where_it_is():
    """Cosines, condition, distance, contraction and scale are those of the dense Jacobian."""
    states = course(np.ones(2), 1.0)
    assert any(not state.was_accepted for state in states)
    largest = np.zeros(2)
    for before, state in itertools.pairwise(states):
        jac, r = rosenbrock_jacobian(state.params), rosenbrock(state.params)
        norms = np.linalg.norm(jac, axis=0)
        cosines = jac.T @ r / norms / np.linalg.norm(r)
        np.testing.assert_allclose(state.cosines, cosines, atol=1e-12)
        assert state.optimality == pytest.approx(np.abs(cosines).max(), abs=1e-12)
        assert state.condition_number == pytest.approx(np.linalg.cond(jac / norms), rel=1e-9)
        shown = state.evaluation.whitening.T @ state.secant @ state.evaluation.whitening
        hessian = jac.T @ jac + shown
        newton = -np.linalg.solve(hessian, jac.T @ r)
        np.testing.assert_allclose(state.newton.vector, newton, rtol=1e-6, atol=1e-12)
        length = np.linalg.norm(jac @ newton)
        s = np.linalg.norm(r)  # three rows, two parameters
        assert state.distance == pytest.approx(length / s, rel=1e-5, abs=1e-12)
        assert state.tangent_cosine == pytest.approx(
            length / np.linalg.norm(r), rel=1e-5, abs=1e-12
        )
        assert state.data_cost == state.cost == pytest.approx(0.5 * r @ r)
        promised = 0.5 * newton @ hessian @ newton
        assert state.newton_reduction == pytest.approx(promised, rel=1e-5, abs=1e-14)
        assert state.num_trials == before.num_trials + 1
        assert state.num_accepted == before.num_accepted + state.was_accepted
        largest = np.maximum(largest, np.linalg.norm(rosenbrock_jacobian(before.params), axis=0))
        if state.was_accepted:
            np.testing.assert_allclose(state.scale, np.maximum(largest, norms), rtol=1e-12)
            if before.step.is_newton:
                assert state.contraction == state.distance / before.distance
            else:
                assert state.contraction == before.contraction
        if state.status is Status.RUNNING:
            assert state.step.scaled_norm <= 1.0501 * state.radius


@pytest.mark.parametrize(
    ("initial_radius", "start"),
    [(0.3, [-1.0, 1.0]), (0.3, [0.0, 0.0]), (0.01, [1e-3, 1e-3])],
)
def test_the_first_radius_is_relative_to_the_scaled_start(initial_radius, start):
    start = np.array(start)
    evaluate = evaluate_with(rosenbrock, rosenbrock_jacobian)
    solver = replace(make_solver(2), initial_radius=initial_radius)
    state = solver.init(evaluate(start, np.eye(2)))
    length = np.linalg.norm(np.linalg.norm(rosenbrock_jacobian(start), axis=0) * start)
    assert state.radius == pytest.approx(initial_radius * (length if length > 0 else 1.0))
    assert state.num_trials == state.num_accepted == 0
    assert state.was_accepted
    assert state.was_finite
    assert state.contraction is None


def test_the_first_radius_is_that_of_the_start_unless_told_otherwise():
    evaluate = evaluate_with(rosenbrock, rosenbrock_jacobian)
    solver, start = make_solver(2), np.array([-1.0, 1.0])
    plain = TrustRegion(bounds=solver.bounds, tolerances=solver.tolerances)
    length = np.linalg.norm(np.linalg.norm(rosenbrock_jacobian(start), axis=0) * start)
    assert plain.init(evaluate(start, np.eye(2))).radius == pytest.approx(length)


def test_a_start_that_is_not_finite_is_said():
    evaluate = evaluate_with(lambda p: rosenbrock(p) * np.nan, rosenbrock_jacobian)
    state = make_solver(2).init(evaluate(np.ones(2), np.eye(2)))
    assert state.status is Status.NOT_FINITE
    assert not state.was_accepted
    assert not state.was_finite
    assert state.distance == INF
    assert state.cosines.tolist() == [0.0, 0.0]
    assert state.num_trials == state.num_accepted == 0
    assert state.newton_reduction == 0.0
    assert state.radius == state.step.scaled_norm == state.step.damping == 0.0


def test_a_solve_that_ran_out_goes_on_under_a_wider_limit():
    states = course(np.ones(2), 1.0)
    evaluate = evaluate_with(rosenbrock, rosenbrock_jacobian)
    short = course(np.ones(2), 1.0, max_iterations=3)[-1]
    assert short.status is Status.MAX_ITERATIONS
    assert short.num_trials == 3
    solver = make_solver(2)
    last = minimize(evaluate, solver, solver.resume(short))
    np.testing.assert_array_equal(last.params, states[-1].params)
    assert solver.resume(states[-1]) is states[-1]


def test_a_callback_may_end_a_solve():
    evaluate = evaluate_with(rosenbrock, rosenbrock_jacobian)
    solver = make_solver(2)
    state = solver.init(evaluate(np.array([-1.0, 1.0]), np.eye(2)))
    stopped = minimize(
        evaluate, solver, state, lambda state: replace(state, status=Status.STOPPED_BY_CALLBACK)
    )
    assert stopped.num_trials == 1


def test_penalties_are_no_part_of_the_data():
    evaluate = evaluate_with(rosenbrock, rosenbrock_jacobian)
    evaluation = replace(evaluate(np.array([-1.0, 1.5]), np.eye(2)), penalty_cost=0.75)
    state = make_solver(2).init(evaluation)
    assert state.data_cost == state.cost - 0.75
    plain = make_solver(2).init(replace(evaluation, penalty_cost=0.0))
    share = np.sqrt(plain.cost / state.data_cost)
    assert state.distance == pytest.approx(plain.distance * share)


def test_reduction_is_that_of_the_model():
    model = QuadraticModel(
        cost=1.0,
        factor=np.array([[2.0, 0.0], [0.0, 1.0]]),
        residual=np.array([1.0, -1.0]),
        gauss_newton_factor=np.eye(2),
    )
    assert model.reduction(np.array([-0.5, 1.0])) == 1.0
    assert model.reduction(np.array([1.0, 1.0])) == -(2.0 + 2.0) + (1.0 - 0.5)


def test_an_exact_fit_has_no_scale_and_is_at_its_end():
    """No residual: the distance is 0, not 0 / 0, and no angle to it is an angle."""
    jac = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    evaluate = evaluate_with(lambda p: jac @ p - jac @ [1.0, 0.0], lambda p: jac)
    state = make_solver(2).init(evaluate(np.array([1.0, 0.0]), np.eye(2)))
    assert state.cost == state.distance == state.tangent_cosine == state.optimality == 0.0
    assert state.cosines.tolist() == [0.0, 0.0]


def test_a_column_that_no_row_sees_has_no_angle():
    jac = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    evaluate = evaluate_with(lambda p: jac @ p - 1.0, lambda p: jac)
    state = make_solver(2).init(evaluate(np.zeros(2), np.eye(2)))
    assert state.cosines.tolist() == [pytest.approx(-6 / np.sqrt(14 * 3)), 0.0]


def test_as_many_rows_as_parameters_have_no_standard_error():
    jac = np.diag([2.0, 3.0])
    state = make_solver(2).init(
        evaluate_with(lambda p: jac @ p - 1.0, lambda p: jac)(np.zeros(2), np.eye(2))
    )
    assert state.distance == INF


def test_only_a_solve_that_has_converged_says_what_is_not_identified():
    def bent(p):
        return np.array([p[0] ** 2 - 2.0, p[0] - 1.0, 0.5])

    evaluate = evaluate_with(bent, lambda p: np.array([[2 * p[0], 0.0], [1.0, 0.0], [0.0, 0.0]]))
    states = []

    def after(state):
        states.append(state.status)
        return state

    solver = make_solver(2)
    begun = solver.init(evaluate(np.array([5.0, 1.0]), np.eye(2)))
    assert begun.status is Status.RUNNING
    minimize(evaluate, solver, begun, after)
    assert states == [*[Status.RUNNING] * (len(states) - 1), Status.UNIDENTIFIED]
    assert len(states) > 2


def test_where_bounds_hold_every_parameter_nothing_is_left_to_gain():
    evaluate = evaluate_with(lambda p: np.array([p[0] - 3.0, 1.0]), lambda p: np.eye(2)[:, :1])
    solver = replace(make_solver(1), bounds=(np.zeros(1), np.ones(1)))
    state = minimize(evaluate, solver, solver.init(evaluate(np.array([0.5]), np.eye(1))))
    assert state.active.tolist() == [True]
    assert state.optimality == 0.0


@pytest.mark.parametrize("distance", [0.0, INF])
def test_a_distance_that_is_no_measure_gives_no_contraction(distance):
    evaluate = evaluate_with(rosenbrock, rosenbrock_jacobian)
    solver = make_solver(2)
    state = solver.init(evaluate(np.array([-1.0, 1.0]), np.eye(2)))
    near = evaluate(0.999 * np.ones(2), np.eye(2))
    step = replace(state.step, damping=0.0)
    told = replace(state, distance=distance, contraction=0.5, step=step)
    assert solver.update(told, near).contraction == 0.5
    measured = solver.update(replace(told, distance=4.0), near)
    assert measured.was_accepted
    assert measured.contraction == measured.distance / 4.0


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 7)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_a_triangle_is_solved_and_the_other_half_is_not_looked_at(lower, transposed, shape, order):
    rng = np.random.default_rng(0)
    matrix = np.asarray(rng.normal(size=(5, 5)) + 5 * np.eye(5), order=order)
    triangle = np.tril(matrix) if lower else np.triu(matrix)
    right = np.asarray(rng.normal(size=shape), order=order)
    kept = right.copy()
    solved = solve_triangle(matrix, right, lower=lower, transposed=transposed)
    assert solved.shape == shape
    np.testing.assert_allclose((triangle.T if transposed else triangle) @ solved, right, rtol=1e-13)
    np.testing.assert_array_equal(right, kept)
