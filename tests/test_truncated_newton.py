"""Truncated Newton by itself, on problems whose matrices are small enough to look at."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from nlsq_dask.normal_equations import CostGradient
from nlsq_dask.solvers.acceptance import Tolerances
from nlsq_dask.solvers.conjugate import Limits, begin, minimize_quadratic
from nlsq_dask.solvers.minimize import minimize
from nlsq_dask.solvers.truncated_newton import Products, Slope, TruncatedNewton
from nlsq_dask.status import Status

SEEDS = st.integers(0, 2**32 - 1)
INF = np.inf


@dataclass(frozen=True)
class Approximate:
    """M, solved within the box by conjugate gradients of its own."""

    hessian: np.ndarray

    @property
    def scale(self):
        return np.sqrt(np.diag(self.hessian))

    @property
    def is_seen(self):
        return np.diag(self.hessian) > 0

    def __call__(self, residual, low, high):
        diagonal = np.where(self.is_seen, np.diag(self.hessian), 1.0)

        def by_diagonal(residual, low, high):
            return np.clip(residual / diagonal, low, high)

        inner = begin(-residual, (low, high), np.sqrt(diagonal), by_diagonal)
        limits = Limits(max_products=500, tolerance=1e-8 * inner.first_length)
        return minimize_quadratic(lambda v: v @ self.hessian, inner, by_diagonal, limits).step


@dataclass(frozen=True)
class Rows:
    """A least-squares problem: residuals and their Jacobian, and how wrong M is."""

    residual: object
    jacobian: object
    wrong: float = 0.0

    def slope(self, params):
        with np.errstate(all="ignore"):
            r, jac = self.residual(params), self.jacobian(params)
            noise = self.wrong * np.random.default_rng(0).normal(size=jac.shape)
            normal = CostGradient(
                cost=np.float64(0.5 * r @ r), grad=jac.T @ r, num_rows=np.int64(len(r))
            )
            near = jac * (1 + noise)
            finite = np.where(np.isfinite(near), near, 1.0)
        return Slope(params=params, normal=normal, precondition=Approximate(finite.T @ finite))

    def answer(self, params, vectors):
        if vectors is None:
            return self.slope(params)
        jac = self.jacobian(params)
        return Products(products=vectors @ jac.T @ jac)

    def solve(self, start, bounds=None, after=lambda state: state, **limits):
        start = np.asarray(start, float)
        solver = make_solver(len(start), bounds, **limits)
        return minimize(self.answer, solver, solver.init(self.slope(start)), after)


def make_solver(k, bounds=None, **limits):
    lower, upper = bounds or (np.full(k, -INF), np.full(k, INF))
    options = {"max_products": 100, "relative_tolerance": 1e-4, "absolute_tolerance": 1e-10}
    options |= {name: limits.pop(name) for name in list(limits) if name in options}
    radius = limits.pop("initial_radius", 1.0)
    tolerances = {"distance_tol": 1e-9, "max_iterations": 200} | limits
    return TruncatedNewton(
        bounds=(np.asarray(lower, float), np.asarray(upper, float)),
        tolerances=Tolerances(**tolerances),
        initial_radius=radius,
        **options,
    )


def linear(seed, k, wrong=0.0, spread=0.0):
    rng = np.random.default_rng(seed)
    jac = rng.normal(size=(3 * k + 5, k)) * 10 ** rng.uniform(-spread, spread, k)
    truth = rng.normal(size=k) / np.linalg.norm(jac, axis=0)
    y = jac @ truth + 0.1 * rng.normal(size=len(jac))
    return Rows(lambda p: jac @ p - y, lambda p: jac, wrong), jac, y


def rosenbrock(p):
    return np.array([10 * (p[1] - p[0] ** 2), 1 - p[0], 0.1 * (p[0] + p[1])])


def rosenbrock_jacobian(p):
    return np.array([[-20 * p[0], 10.0], [-1.0, 0.0], [0.1, 0.1]])


BENT = Rows(rosenbrock, rosenbrock_jacobian)


@settings(max_examples=30)
@given(
    seed=SEEDS,
    k=st.integers(1, 12),
    wrong=st.sampled_from([0.0, 0.3]),
    spread=st.sampled_from([0.0, 6.0]),
)
def test_a_linear_problem_is_solved_within_the_tolerance(seed, k, wrong, spread):
    """And the distance that the state reports is no less than that to the exact solution."""
    rows, jac, y = linear(seed, k, wrong, spread)
    distance_tol = 1e-6
    state = rows.solve(np.zeros(k), distance_tol=distance_tol)
    norms = np.linalg.norm(jac, axis=0)  # LAPACK cuts off at the largest column's rounding
    exact = np.linalg.lstsq(jac / norms, y)[0] / norms
    s = np.linalg.norm(jac @ exact - y) / np.sqrt(len(y) - k)
    assert state.status.is_success
    assert np.linalg.norm(jac @ (state.params - exact)) / s <= distance_tol * (1 + 1e-6)
    assert state.residual_scale == pytest.approx(s, rel=1e-6)
    assert state.cost == pytest.approx(0.5 * np.sum((jac @ state.params - y) ** 2), rel=1e-12)
    assert state.optimality <= 1e-5
    assert not state.active.any()
    assert not state.is_idle.any()


@settings(max_examples=30)
@given(seed=SEEDS, k=st.integers(1, 10), wrong=st.sampled_from([0.0, 0.3]))
def test_a_linear_problem_in_a_box_is_that_of_a_dense_solver(seed, k, wrong):
    rows, jac, y = linear(seed, k, wrong)
    rng = np.random.default_rng([seed, 1])
    exact = np.linalg.lstsq(jac, y)[0]
    width = np.abs(exact) + 0.01
    lower, upper = exact - width * rng.uniform(-0.3, 1, k), exact + width * rng.uniform(0.4, 1, k)
    start = 0.5 * (lower + upper)
    state = rows.solve(start, (lower, upper))
    expected = scipy.optimize.lsq_linear(jac, y, (lower, upper), method="bvls", tol=1e-14)
    assert state.status.is_success
    assert np.all((state.params > lower) & (state.params < upper))
    np.testing.assert_allclose(state.params, expected.x, atol=1e-6 * width.max())
    np.testing.assert_array_equal(state.active, expected.active_mask != 0)
    free = ~state.active
    r = jac @ state.params - y
    cosines = jac.T @ r / np.linalg.norm(jac, axis=0) / np.linalg.norm(r)
    if wrong == 0:  # as the scale is M's
        np.testing.assert_allclose(state.cosines, cosines, atol=1e-9)
        assert state.optimality == pytest.approx(np.max(np.abs(cosines[free]), initial=0), abs=1e-9)


@pytest.mark.parametrize("box", [None, ([-5, -5], [0.5, 5]), ([-5, -5], [0.5, 0.1])])
@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_nonlinear_minima_are_scipys(box, wrong):
    start = [-1.0, 0.05]
    state = replace(BENT, wrong=wrong).solve(start, box)
    expected = scipy.optimize.least_squares(
        rosenbrock,
        start,
        jac=rosenbrock_jacobian,
        bounds=box or (-INF, INF),
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        max_nfev=2000,
    )
    assert state.status.is_success
    np.testing.assert_allclose(state.params, expected.x, rtol=1e-6, atol=1e-7)
    assert state.cost <= expected.cost * (1 + 1e-9)


def test_each_question_is_a_pass_and_each_trial_falls_as_it_is_told():
    """The course: products until the step is known, then the trial; costs only fall."""
    states = []

    def after(state):
        states.append(state)
        return state

    last = BENT.solve([-1.0, 1.0], after=after)
    assert last.status.is_success
    costs = [state.cost for state in states]
    assert np.all(np.diff(costs) <= 0)
    asked = [state.is_multiplying for state in states]
    assert any(asked)
    for before, state in itertools.pairwise(states):
        assert np.array_equal(
            state.question[0], state.params if state.is_multiplying else state.trial
        )
        assert (state.question[1] is None) is (not state.is_multiplying)
        length = state.distance * state.residual_scale
        cosine = length / np.linalg.norm(rosenbrock(state.params))
        assert state.tangent_cosine == pytest.approx(cosine)
        assert state.newton_reduction == pytest.approx(0.5 * length**2)
        if not before.is_multiplying and before.status is Status.RUNNING:
            assert state.num_trials == before.num_trials + 1
            if state.was_accepted:
                assert state.num_accepted == before.num_accepted + 1
                if before.newton_reduction > 1e-12:  # above rounding
                    fall = before.cost - state.cost
                    assert state.gain == pytest.approx(fall / before.step.reduction, rel=1e-9)
                    assert state.gain > 1e-4
                if before.step.is_newton:
                    assert state.contraction == state.distance / before.distance
                else:
                    assert state.contraction == before.contraction
            else:
                assert state.radius == pytest.approx(0.25 * before.step.scaled_norm)
        else:
            assert state.num_trials == before.num_trials
        if not state.is_multiplying and state.status is Status.RUNNING:
            jac = rosenbrock_jacobian(state.params)
            way, grad = state.step.vector, jac.T @ rosenbrock(state.params)
            promised = -way @ grad - 0.5 * np.sum((jac @ way) ** 2)
            assert state.step.reduction == pytest.approx(promised, rel=1e-9, abs=1e-14)
            np.testing.assert_allclose(state.trial, state.params + way, rtol=1e-12)
            assert state.step.scaled_norm == pytest.approx(np.linalg.norm(state.scale * way))
            assert state.step.scaled_norm <= state.radius * (1 + 1e-12) or state.step.is_newton


@pytest.mark.parametrize("initial_radius", [0.01, 0.3, 1.0])
def test_the_first_step_is_as_long_as_the_radius_allows(initial_radius):
    rows, jac, _ = linear(3, 4)
    start = np.full(4, 5.0)
    solver = make_solver(4, initial_radius=initial_radius)
    state = solver.init(rows.slope(start))
    scaled = np.linalg.norm(np.linalg.norm(jac, axis=0) * start)
    assert state.radius == pytest.approx(initial_radius * scaled)
    while state.is_multiplying:
        state = solver.update(state, rows.answer(*state.question))
    assert state.step.scaled_norm <= state.radius * (1 + 1e-12)
    at_zero = solver.init(rows.slope(np.zeros(4)))
    assert at_zero.num_trials == at_zero.num_accepted == 0
    assert at_zero.step.scaled_norm == at_zero.step.reduction == at_zero.step.damping == 0.0
    assert at_zero.was_accepted
    assert at_zero.was_finite
    assert at_zero.radius == initial_radius


def test_a_rejected_trial_is_retried_on_the_same_way_without_a_product():
    rows, _, _ = linear(1, 3)
    solver = make_solver(3, initial_radius=100.0)
    state = solver.init(rows.slope(np.zeros(3)))
    while state.is_multiplying:
        state = solver.update(state, rows.answer(*state.question))
    first = state
    worse = replace(rows.slope(state.trial).normal, cost=np.float64(1e9))
    for cost in (1e9, np.nan):
        answer = replace(rows.slope(state.trial), normal=replace(worse, cost=np.float64(cost)))
        after = solver.update(state, answer)
        assert not after.was_accepted
        assert after.was_finite is bool(np.isfinite(cost))
        assert not after.is_multiplying
        assert after.params is first.params
        assert after.radius == pytest.approx(0.25 * state.step.scaled_norm)
        share = after.radius / first.step.scaled_norm
        np.testing.assert_allclose(after.step.vector, share * first.step.vector)
        assert not after.step.is_newton
        state = after
    jac, way = rows.jacobian(state.params), state.step.vector
    promised = -way @ jac.T @ rows.residual(state.params) - 0.5 * np.sum((jac @ way) ** 2)
    assert state.step.reduction == pytest.approx(promised)


def test_a_step_that_only_the_bounds_held_is_newtons():
    rows, _, _ = linear(1, 3)
    for radius, is_newton in ((1e6, True), (1e-3, False)):
        solver = make_solver(3, initial_radius=radius)
        state = solver.init(rows.slope(np.full(3, 5.0)))
        while state.is_multiplying:
            state = solver.update(state, rows.answer(*state.question))
        assert state.step.is_newton is is_newton


@pytest.mark.parametrize("distance", [0.0, INF])
def test_a_distance_that_is_no_measure_gives_no_contraction(distance):
    solver = make_solver(2, initial_radius=1e6)
    state = solver.init(BENT.slope(np.array([-1.0, 1.0])))
    while state.is_multiplying:
        state = solver.update(state, BENT.answer(*state.question))
    told = replace(state, distance=distance, contraction=0.5)
    near = BENT.slope(np.full(2, 0.999))
    assert told.step.is_newton
    assert solver.update(told, near).contraction == 0.5
    measured = solver.update(replace(told, distance=4.0), near)
    assert measured.was_accepted
    assert measured.contraction == measured.distance / 4.0


def test_only_failing_trials_is_not_convergence():
    broken = replace(BENT.slope(np.zeros(2)).normal, cost=np.float64(np.nan))
    solver = make_solver(2)
    start = state = solver.init(BENT.slope(np.array([-1.0, 1.0])))
    while state.status is Status.RUNNING:
        answer = BENT.answer(*state.question)
        if isinstance(answer, Slope):
            answer = replace(answer, normal=broken)
        state = solver.update(state, answer)
    assert state.status is Status.STALLED
    assert state.params is start.params


def test_a_start_that_is_not_finite_is_said():
    slope = BENT.slope(np.zeros(2))
    bad = replace(slope, normal=replace(slope.normal, cost=np.float64(np.inf)))
    state = make_solver(2).init(bad)
    assert state.status is Status.NOT_FINITE
    assert not state.was_accepted
    assert state.newton_reduction == np.inf
    assert state.tangent_cosine == np.inf


def test_parameters_on_which_nothing_depends_are_reported():
    jac = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    rows = Rows(lambda p: jac @ p - np.array([1.0, 2.0, 4.0]), lambda p: jac)
    state = rows.solve([0.0, 7.0])
    assert state.status is Status.UNIDENTIFIED
    assert state.is_idle.tolist() == [False, True]
    np.testing.assert_allclose(state.params, [17 / 14, 7.0])


def test_an_exact_fit_has_no_scale_and_ends():
    jac = np.array([[1.0, 1.0], [2.0, 0.0], [3.0, 1.0]])
    rows = Rows(lambda p: jac @ p - jac @ [1.0, 2.0], lambda p: jac)
    state = rows.solve([0.0, 0.0], data_square=float(np.sum((jac @ [1.0, 2.0]) ** 2)))
    assert state.status.is_success
    np.testing.assert_allclose(state.params, [1.0, 2.0], rtol=1e-12)
    there = make_solver(2).init(rows.slope(np.array([1.0, 2.0])))
    assert there.distance == 0.0
    assert there.tangent_cosine == 0.0
    assert there.optimality == 0.0
    assert there.status is Status.CONVERGED


def test_the_conjugate_gradients_end_where_they_are_told():
    """A share of the first residual; standard errors; a number of products."""
    rows, _, _ = linear(5, 30, wrong=1.0)

    def products(**limits):
        solver = make_solver(30, initial_radius=1e6, distance_tol=1e-30, **limits)
        state = solver.init(rows.slope(np.ones(30)))
        count = 0
        while state.is_multiplying:
            state, count = solver.update(state, rows.answer(*state.question)), count + 1
        return count, state

    assert products(max_products=3)[0] == 3
    loose, state = products(relative_tolerance=0.1)
    conjugate = state.conjugate
    assert conjugate.length <= 0.1 * conjugate.first_length
    tight, state = products(relative_tolerance=1e-6)
    assert state.conjugate.length <= 1e-6 * state.conjugate.first_length
    assert loose < tight
    early, state = products(relative_tolerance=1e-30, absolute_tolerance=10.0)
    assert state.conjugate.length <= 10.0 * state.residual_scale
    assert early < products(relative_tolerance=1e-30, absolute_tolerance=1e-3)[0]


def test_near_the_end_the_solve_goes_on_to_it():
    """A tenth of `distance_tol`, where the goal is within a hundred times of that; not below."""
    rows, _, _ = linear(5, 30, wrong=1.0)
    for distance_tol, factor in ((1e-4, None), (1.0, 0.1)):
        solver = make_solver(
            30, initial_radius=1e6, distance_tol=distance_tol, relative_tolerance=1e-2
        )
        state = solver.init(rows.slope(np.ones(30)))
        goal = 1e-2 * state.conjugate.first_length
        end = distance_tol * state.residual_scale
        assert (goal <= 100 * end) is (factor is not None)
        while state.is_multiplying:
            assert state.conjugate.length > (factor * end if factor else goal)
            state = solver.update(state, rows.answer(*state.question))
        assert state.conjugate.length <= (factor * end if factor else goal)


def test_the_first_radius_is_that_of_the_start_unless_told_otherwise():
    solver = make_solver(2)
    plain = TruncatedNewton(
        bounds=solver.bounds,
        tolerances=solver.tolerances,
        max_products=9,
        relative_tolerance=1e-4,
        absolute_tolerance=1e-10,
    )
    start = np.array([-1.0, 1.0])
    length = np.linalg.norm(np.linalg.norm(rosenbrock_jacobian(start), axis=0) * start)
    assert plain.init(BENT.slope(start)).radius == pytest.approx(length)


def test_as_many_rows_as_parameters_have_no_standard_error():
    rows = Rows(lambda p: np.diag([2.0, 3.0]) @ p - 1.0, lambda p: np.diag([2.0, 3.0]))
    state = make_solver(2).init(rows.slope(np.zeros(2)))
    assert state.residual_scale == 0.0
    assert state.distance == INF
    assert state.newton_reduction == INF


def slope_at(params, grad, cost):
    """Of six rows; M is the unit matrix."""
    normal = CostGradient(cost=np.float64(cost), grad=np.array(grad), num_rows=np.int64(6))
    return Slope(params=params, normal=normal, precondition=Approximate(np.eye(2)))


def test_the_distance_is_that_of_the_step_and_of_what_is_left():
    """By hand: of one product with diag(1, 1/4), where M promised the unit matrix.

    The step is -1.6 (1, 1), the residual ±0.6, and the Ritz value 1 / 1.6.
    """
    solver = make_solver(2, max_products=1, initial_radius=1e6)
    state = solver.init(slope_at(np.ones(2), [1.0, 1.0], 8.0))
    assert state.residual_scale == 2.0
    assert state.distance == pytest.approx(np.sqrt(2) / 2)
    hessian = np.diag([1.0, 0.25])
    state = solver.update(state, Products(products=state.question[1] @ hessian))
    np.testing.assert_allclose(state.trial, -0.6 * np.ones(2))
    assert state.distance == pytest.approx(np.sqrt(1.6**2 * 1.25 + 2 * 0.6**2 * 1.6) / 2)
    # At the next point M is trusted no more than it was good for.
    cost = 8.0 - state.step.reduction
    state = solver.update(state, slope_at(state.trial, [0.3, 0.4], cost))
    assert state.was_accepted
    assert state.distance == pytest.approx(np.sqrt(0.5**2 * 1.6) / np.sqrt(cost / 2))


def test_a_step_that_is_cut_says_nothing_of_the_distance():
    solver = make_solver(2, initial_radius=0.01)
    state = solver.init(slope_at(np.ones(2), [1.0, 1.0], 8.0))
    cut = solver.update(state, Products(products=state.question[1]))
    assert not cut.step.is_newton
    assert cut.distance == state.distance


def test_penalties_are_no_part_of_the_data():
    slope = BENT.slope(np.array([-1.0, 1.5]))
    plain = make_solver(2).init(slope)
    state = make_solver(2).init(replace(slope, penalty_cost=0.75))
    assert state.data_cost == state.cost - 0.75
    share = np.sqrt(plain.cost / state.data_cost)
    assert state.distance == pytest.approx(plain.distance * share)


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_no_product_is_spent_below_the_absolute_tolerance(size):
    """Which is in standard errors, whatever their size."""
    rows, jac, y = linear(5, 30, wrong=1.0)
    told = Rows(lambda p: size * (jac @ p - y), lambda p: size * jac, wrong=1.0)
    for one in (rows, told):
        solver = make_solver(
            30, initial_radius=1e6, relative_tolerance=1e-30, absolute_tolerance=1e-3
        )
        state = solver.init(one.slope(np.ones(30)))
        tolerance = 1e-3 * state.residual_scale
        while state.is_multiplying:
            assert state.conjugate.length > tolerance
            state = solver.update(state, one.answer(*state.question))
        assert state.conjugate.length <= tolerance


def test_where_bounds_hold_every_parameter_nothing_is_left_to_gain():
    rows = Rows(lambda p: np.array([p[0] - 3.0, 1.0, p[0]]), lambda p: np.array([[1.0], [0], [1]]))
    state = rows.solve([0.5], ([0.0], [1.0]))
    assert state.active.tolist() == [True]
    assert state.optimality == 0.0
    assert state.status.is_success


# -- conjugate gradients by themselves


def within(size):
    """A box of numbers about zero, and the direction of steepest descent kept within it."""

    def steepest(residual, low, high):
        return np.clip(residual, low, high)

    return (-np.asarray(size), np.asarray(size)), steepest


def test_what_reaches_a_bound_is_multiplied_apart():
    box, steepest = within([INF, 1.0, INF])
    state = begin(np.array([-1.0, -2.0, 3.0]), box, np.ones(3), steepest)
    assert state.is_snapping.tolist() == [False, True, False]
    assert state.vectors.tolist() == [[1.0, 0.0, -3.0], [0.0, 1.0, 0.0]]
    free = begin(np.array([-1.0, -0.5, 3.0]), box, np.ones(3), steepest)
    assert free.vectors.tolist() == [[1.0, 0.5, -3.0]]


def test_no_move_goes_uphill_to_a_bound():
    """The way to it is steep at first, and the minimum a hundredth of it away."""
    box, steepest = within([1.0])
    state = begin(np.array([-1.0]), box, np.ones(1), steepest)
    limits = Limits(max_products=1, tolerance=0.0)
    state = minimize_quadratic(lambda v: 100 * v, state, steepest, limits)
    np.testing.assert_allclose(state.step, [0.01])


def test_bounds_that_hold_a_step_back_are_told():
    box, steepest = within([1.0, 1.0, 1.0])
    state = begin(np.array([-2.0, 2.0, 0.1]), box, np.ones(3), steepest)
    state = minimize_quadratic(
        lambda v: v, state, steepest, Limits(max_products=9, tolerance=1e-12)
    )
    np.testing.assert_allclose(state.step, [1.0, -1.0, -0.1])
    assert state.active.tolist() == [True, True, False]


def test_without_a_force_there_is_nothing_to_solve():
    box, steepest = within([INF, INF])
    assert begin(np.zeros(2), box, np.ones(2), steepest).is_done
    assert not begin(np.array([0.0, 1e-3]), box, np.ones(2), steepest).is_done


def test_the_smallest_ritz_value_of_a_whole_solve_is_the_smallest_eigenvalue():
    box, steepest = within([INF] * 4)
    values = np.array([0.05, 0.3, 0.7, 2.0])
    state = begin(np.ones(4), box, np.ones(4), steepest)
    assert state.smallest_ratio == 1.0
    state = minimize_quadratic(
        lambda v: v * values, state, steepest, Limits(max_products=4, tolerance=0.0)
    )
    assert state.smallest_ratio == pytest.approx(0.05, rel=1e-6)
    np.testing.assert_allclose(state.step, -1 / values, rtol=1e-9)


def course(units, size):
    """All states of a solve of Rosenbrock's problem, told in other units."""
    told = Rows(
        lambda q: size * rosenbrock(q / units),
        lambda q: size * rosenbrock_jacobian(q / units) / units,
    )
    states = []

    def after(state):
        states.append(state)
        return state

    told.solve(np.array([-1.0, 1.0]) * units, after=after)
    return states


@pytest.mark.parametrize(("units", "size"), [([2.0**20, 2.0**-30], 1.0), ([0.5, 8.0], 2.0**-20)])
def test_a_solve_in_other_units_is_the_same_to_the_bit(units, size):
    """Powers of two round nothing, and no rule may have a unit of its own."""
    plain, scaled = course(np.ones(2), 1.0), course(np.array(units), size)
    assert plain[-1].status is scaled[-1].status
    assert plain[-1].status.is_success
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(other.params, one.params * units)
        np.testing.assert_array_equal(other.trial, one.trial * units)
        np.testing.assert_array_equal(other.cosines, one.cosines)
        assert other.cost == one.cost * size**2
        assert other.distance == one.distance
        assert other.tangent_cosine == one.tangent_cosine
        assert other.optimality == one.optimality
