"""L-BFGS by itself, on functions with known minima."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from nlsq_dask.solvers.lbfgs import DescentOptions, Ending, begin, iterate

SEARCHES = ("wolfe", "strong_wolfe", "backtracking")
FREE = np.full(2, -np.inf), np.full(2, np.inf)
OPTIONS = DescentOptions(
    line_search="wolfe",
    history_size=10,
    warmup_iterations=10**6,
    max_iterations=1000,
    plateau=None,
    gradient_norm=None,
    max_iter_is_criterion=True,
    cost_increase=np.inf,
    max_step=np.inf,
    gradient_clip=np.inf,
)


def rosenbrock(point):
    return float(scipy.optimize.rosen(point)), scipy.optimize.rosen_der(point)


def square(point):
    return float(point @ point), 2 * point


def descend(evaluate, start, options=OPTIONS, bounds=FREE, first_step=0.1):
    """All carries, the first at the start."""
    carries = [begin(evaluate, np.asarray(start, float), options)]
    while carries[-1].ending is Ending.RUNNING:
        carries.append(iterate(evaluate, carries[-1], first_step, bounds, options))
    return carries


def vary(**changes):
    return dataclasses.replace(OPTIONS, **changes)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("max_step", [np.inf, 0.1])
@pytest.mark.parametrize("history_size", [1, 5])
def test_the_minimum_is_found(search, max_step, history_size):
    options = vary(line_search=search, max_step=max_step, history_size=history_size)
    *_, last = descend(rosenbrock, [-1.2, 1.0], options)
    assert last.ending is Ending.STATIONARY
    np.testing.assert_allclose(last.best, [1, 1], atol=1e-3)
    assert last.ways.shape[0] <= history_size


def test_as_many_evaluations_as_scipy_needs_give_or_take():
    *_, last = descend(rosenbrock, [-1.2, 1.0], first_step=1.0)
    scipy_fit = scipy.optimize.minimize(
        rosenbrock, [-1.2, 1.0], jac=True, method="L-BFGS-B", options={"ftol": 1e-9}
    )
    assert last.num_evaluations < 2 * scipy_fit.nfev


@pytest.mark.parametrize("search", SEARCHES)
def test_a_bound_is_kept_to_and_left_again(search):
    """The way to the minimum within the box leads along a face of it."""
    seen = []

    def watched(point):
        seen.append(point)
        return rosenbrock(point)

    bounds = np.array([-2.0, -0.5]), np.array([0.8, 0.3])
    *_, last = descend(watched, [-1.2, 0.3], vary(line_search=search), bounds)
    assert np.all((np.array(seen) >= bounds[0]) & (np.array(seen) <= bounds[1]))
    oracle = scipy.optimize.minimize(
        rosenbrock, [0.1, 0.1], jac=True, bounds=list(zip(*bounds, strict=True))
    )
    np.testing.assert_allclose(last.best, oracle.x, atol=1e-3)


def test_value_and_gradient_of_a_carry_are_those_at_its_point():
    bounds = np.array([-2.0, -0.5]), np.array([0.8, 0.3])
    for carry in descend(rosenbrock, [-1.2, 0.3], OPTIONS, bounds):
        value, grad = rosenbrock(carry.point)
        assert carry.value == value
        np.testing.assert_array_equal(carry.grad, grad)
        assert carry.best_value == rosenbrock(carry.best)[0]


@given(
    start=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    search=st.sampled_from(SEARCHES),
    max_step=st.sampled_from([0.03, 0.3]),
    first_step=st.sampled_from([1e-6, 0.1, 1e3]),
)
def test_no_step_is_longer_than_allowed_and_the_best_only_improves(
    start, search, max_step, first_step
):
    options = vary(line_search=search, max_step=max_step, max_iterations=30)
    carries = descend(rosenbrock, start, options, first_step=first_step)
    for before, after in itertools.pairwise(carries):
        assert np.linalg.norm(after.point - before.point) <= max_step * (1 + 1e-12)
        assert after.best_value <= before.best_value
        assert after.num_clipped - before.num_clipped in (0, 1)


@pytest.mark.parametrize("length", [0.01, 0.1, 0.4])
def test_the_first_step_is_relative_to_the_gradient(length):
    options = vary(line_search="backtracking", max_iterations=1)
    *_, last = descend(square, [3.0, 4.0], options, first_step=length)
    np.testing.assert_allclose(last.point, (1 - 2 * length) * np.array([3.0, 4.0]))


def test_a_clipped_gradient_gives_a_shorter_first_step():
    options = vary(line_search="backtracking", max_iterations=1, gradient_clip=0.5)
    *_, last = descend(square, [3.0, 4.0], options, first_step=1.0)
    np.testing.assert_allclose(last.point, 0.9 * np.array([3.0, 4.0]))


@pytest.mark.parametrize(
    ("changes", "ending", "count"),
    [
        ({"max_iterations": 4}, Ending.MAX_ITER, 4),
        ({"max_iterations": 4, "max_iter_is_criterion": False}, Ending.LIMIT, 4),
        ({"max_iterations": 0}, Ending.LIMIT, 0),
        ({"warmup_iterations": 6, "plateau": 0.999999}, Ending.PLATEAU, 6),
        ({"warmup_iterations": 6, "gradient_norm": 1e9}, Ending.GRADIENT, 6),
        ({"warmup_iterations": 0, "gradient_norm": 1e9}, Ending.GRADIENT, 1),
    ],
)
def test_what_ends_a_descent_and_when(changes, ending, count):
    *_, last = descend(rosenbrock, [-1.2, 1.0], vary(**changes))
    assert last.ending is ending
    assert last.count == count


def uphill(point):
    """A gradient of the wrong sign."""
    value, grad = square(point)
    return value, -grad


def test_searches_that_fail_are_counted_and_end_the_descent():
    *_, last = descend(uphill, [1.0, 0.0])
    assert last.ending is Ending.LINE_SEARCH
    assert last.num_failures == last.num_failing == last.count == 3
    assert last.best_value == 1.0
    np.testing.assert_array_equal(last.best, [1, 0])


def test_the_guard_ends_what_goes_up_and_the_best_point_is_kept():
    *_, last = descend(uphill, [1.0, 0.0], vary(cost_increase=0.05))
    assert last.ending is Ending.COST_GUARD
    assert last.value > 1.05
    assert last.best_value == 1.0


def test_points_where_the_function_is_not_finite_are_avoided():
    def logarithm(point):
        with np.errstate(all="ignore"):
            return float(np.sum(point - np.log(point))), 1 - 1 / point

    *_, last = descend(logarithm, [5.0, 0.01], first_step=100.0)
    np.testing.assert_allclose(last.best, [1, 1], atol=1e-3)
    *_, hopeless = descend(logarithm, [-1.0, 1.0])
    assert hopeless.ending is Ending.NOT_FINITE
    assert hopeless.count == 0


def test_a_start_without_slope_is_stationary():
    *_, last = descend(square, [0.0, 0.0])
    assert last.ending is Ending.STATIONARY
    assert last.count == 0


# -- the line search, trial by trial


def slope_of(value, slope):
    """A function of one number, by its value and its derivative."""
    return lambda point: (float(value(point[0])), np.array([float(slope(point[0]))]))


def trials(function, start, **options):
    """The points that one iteration tries, and the carry after it."""
    seen = []

    def watched(point):
        seen.append(float(point[0]))
        return function(point)

    begun = begin(watched, np.array([start]), OPTIONS)
    first_step = options.pop("first_step", 1.0)
    box = np.array([-np.inf]), np.array([np.inf])
    carry = iterate(watched, begun, first_step, box, vary(**options))
    assert carry.num_evaluations == len(seen)
    return seen[1:], carry


@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_a_step_too_far_is_halved_or_goes_to_the_lowest_point_of_the_parabola(size):
    parabola = slope_of(lambda x: size * x**2, lambda x: 2 * size * x)
    far = 4.0 / size  # times the slope of 2 size, from 1 to -7
    halved, _ = trials(parabola, 1.0, line_search="backtracking", first_step=far)
    np.testing.assert_allclose(halved, [-7.0, -3.0, -1.0, 0.0], atol=1e-12)
    straight, _ = trials(parabola, 1.0, line_search="wolfe", first_step=far)
    # An eighth of the way: not below a tenth of it, so the parabola is followed.
    np.testing.assert_allclose(straight, [-7.0, 0.0], atol=1e-12)


def test_what_ends_far_below_its_slope_is_bisected():
    """The parabola through it has no lowest point."""
    cliff = slope_of(lambda x: -x - 0.25 * x**3, lambda x: -1.0 if x < 1 else 2.0)
    tried, _ = trials(cliff, 0.0, line_search="strong_wolfe")
    assert tried[:2] == [1.0, 0.5]


def test_the_next_trial_stays_within_nine_tenths_of_the_bracket():
    """Down nearly all the way, and up at the end: the parabola's lowest point is beyond."""
    ramp = slope_of(lambda x: -min(x, 1.9 - x), lambda x: -1.0 if x < 0.95 else 1.0)
    tried, _ = trials(ramp, 0.0, line_search="strong_wolfe")
    assert tried[0] == 1.0
    assert tried[1] == pytest.approx(0.9)


@pytest.mark.parametrize("first_step", [0.4, 4.0])
def test_a_kink_that_meets_no_condition_still_gives_the_step_before_it(first_step):
    """Where the slope leaps from -1 to 1 no strong Wolfe point is; what falls is taken."""
    kink = slope_of(lambda x: abs(x), lambda x: -1.0 if x < 0 else 1.0)
    tried, carry = trials(kink, -1.0, line_search="strong_wolfe", first_step=first_step)
    assert len(tried) == 17
    assert carry.num_failures == carry.num_failing == 0
    assert -0.01 < carry.point[0] <= 0.0


# -- bounds, plateaus, and what is saved


@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("steepness", [0.5, 2.0])
def test_a_bound_holds_what_pushes_against_it_however_gently(side, steepness):
    box = np.array([-1.0]), np.array([1.0])
    outward = slope_of(lambda x: -side * steepness * x, lambda x: -side * steepness)
    held = iterate(outward, begin(outward, np.array([side]), OPTIONS), 1.0, box, OPTIONS)
    assert held.ending is Ending.STATIONARY
    assert held.count == 0
    inward = slope_of(lambda x: side * steepness * x, lambda x: side * steepness)
    freed = iterate(inward, begin(inward, np.array([side]), OPTIONS), 0.1, box, OPTIONS)
    assert freed.count == 1
    assert side * freed.point[0] < 1.0


@pytest.mark.parametrize(("offset", "is_flat"), [(1e3, True), (1.0, False)])
def test_a_plateau_is_relative_to_the_loss(offset, is_flat):
    """Steps of 0.1 fall by 0.1 each, ten thousandths of 1000."""
    slide = slope_of(lambda x: offset - x, lambda x: -1.0)
    options = vary(warmup_iterations=0, plateau=1e-3, max_step=0.1, max_iterations=5)
    carry = begin(slide, np.zeros(1), options)
    while carry.ending is Ending.RUNNING:
        carry = iterate(slide, carry, 0.1, (np.full(1, -np.inf), np.full(1, np.inf)), options)
    assert carry.ending is (Ending.PLATEAU if is_flat else Ending.MAX_ITER)


def test_endings_keep_the_numbers_that_checkpoints_hold():
    names = "running plateau gradient max_iter limit cost_guard stationary line_search not_finite"
    expected = [*names.upper().split(), "WARM_START", "CALLBACK"]
    assert [Ending(number).name for number in range(len(Ending))] == expected


# -- what is counted, and when the counts end a descent


def along(values, max_step=0.1, **changes):
    """A descent whose steps of 0.1 go from each of the values to the next, down a slope of -1."""
    grid = max_step * np.arange(len(values))
    slide = slope_of(lambda x: np.interp(x, grid, values), lambda x: -1.0)
    options = vary(max_step=max_step, max_iterations=len(values) - 1, **changes)
    return descend(slide, [0.0], options, LINE, first_step=1.0)


LINE = np.full(1, -np.inf), np.full(1, np.inf)
FALL, CREEP = 5.0, 2e-5


def falling(start, *falls):
    return start - np.cumsum([0.0, *falls])


def test_nothing_is_counted_before_the_first_step():
    begun = begin(square, np.array([3.0, 4.0]), OPTIONS)
    assert begun.num_evaluations == 1
    counts = (
        begun.count,
        begun.num_flat,
        begun.num_still,
        begun.num_failing,
        begun.num_failures,
        begun.num_clipped,
        begun.num_pairs,
    )
    assert counts == (0,) * len(counts)


@pytest.mark.parametrize(
    ("falls", "count"),
    [
        ([0.1, 0.1, 0.1, 0.1], 3),
        ([FALL, 0.1, 0.1, 0.1, 0.1], 4),
        ([0.1, 0.1, FALL, 0.1, 0.1, 0.1, 0.1], 6),
    ],
)
def test_three_flat_iterations_in_a_row_are_a_plateau(falls, count):
    *_, last = along(falling(1e3, *falls), warmup_iterations=0, plateau=1e-3)
    assert last.ending is Ending.PLATEAU
    assert last.count == count


@pytest.mark.parametrize(
    ("falls", "count"),
    [
        ([CREEP] * 4, 3),
        ([FALL, CREEP, CREEP, CREEP, CREEP], 4),
        ([CREEP, CREEP, FALL, CREEP, CREEP, CREEP, CREEP], 6),
    ],
)
def test_three_iterations_in_a_row_without_progress_end_every_descent(falls, count):
    *_, last = along(falling(1e4, *falls))
    assert last.ending is Ending.STATIONARY
    assert last.count == count


def test_a_loss_that_stays_where_it_is_is_no_rise_and_no_better():
    """Without a fall the search fails, but what ends the descent is that nothing moves."""
    carries = along([0.0] * 6, cost_increase=0.0)
    assert carries[-1].ending is Ending.STATIONARY
    assert [carry.count for carry in carries] == [0, 1, 2, 3]
    assert carries[-1].best.tolist() == [0.0]
    assert carries[-1].point[0] > 0.0


def test_the_guard_allows_a_share_of_the_first_loss_and_no_more():
    carries = along([1.0, 1.2, 1.3, 2.5], cost_increase=0.25)
    assert [carry.ending for carry in carries] == [Ending.RUNNING] * 2 + [Ending.COST_GUARD]


@pytest.mark.parametrize(("max_step", "num_clipped"), [(0.5, 1), (1.0, 0), (2.0, 0)])
def test_steps_that_are_cut_are_counted(max_step, num_clipped):
    """The first step is 1 long, if it may be."""
    _, carry = trials(slope_of(lambda x: -x, lambda x: -1.0), 0.0, max_step=max_step)
    assert carry.num_clipped == num_clipped


def quartic(point):
    """Convex, and of another curvature along each axis and at each point."""
    sizes = np.arange(1.0, len(point) + 1)
    return float(sizes @ (point**2 + 0.1 * point**4)), sizes * (2 * point + 0.4 * point**3)


def inverse_hessian(ways, turns):
    """By BFGS's formula for matrices (Nocedal & Wright, 6.17 and 7.20), from the oldest pair."""
    k = ways.shape[1]
    inverse = (ways[-1] @ turns[-1]) / (turns[-1] @ turns[-1]) * np.eye(k)
    for way, turn in zip(ways, turns, strict=True):
        curvature = way @ turn
        tilt = np.eye(k) - np.outer(turn, way) / curvature
        inverse = tilt.T @ inverse @ tilt + np.outer(way, way) / curvature
    return inverse


@pytest.mark.parametrize("history_size", [1, 3])
def test_steps_go_the_way_of_the_inverse_hessian_of_the_pairs_that_are_kept(history_size):
    options = vary(history_size=history_size, max_iterations=8)
    box = np.full(4, -np.inf), np.full(4, np.inf)
    carries = descend(quartic, [1.0, -2.0, 0.5, 1.5], options, box)
    for before, after in itertools.pairwise(carries):
        assert after.num_pairs == after.count  # convex: every step is worth keeping
        assert len(after.ways) == min(after.count, history_size)
        np.testing.assert_array_equal(after.ways[-1], after.point - before.point)
        np.testing.assert_array_equal(after.turns[-1], after.grad - before.grad)
        if before.count:
            way = -inverse_hessian(before.ways, before.turns) @ before.grad
            np.testing.assert_allclose(
                after.ways[-1] / np.linalg.norm(after.ways[-1]),
                way / np.linalg.norm(way),
                atol=1e-9,
            )


# -- the line search, once more


def bend_at_two(x):
    """Down at a slope of -1 as far as 2, from there a parabola with its lowest point at 2.5."""
    return -x if x <= 2 else -2 - (x - 2) + (x - 2) ** 2


@pytest.mark.parametrize("search", ["wolfe", "strong_wolfe"])
def test_steps_are_doubled_and_a_wide_bracket_is_interpolated(search):
    bent = slope_of(bend_at_two, lambda x: -1.0 if x <= 2 else 2 * x - 5)
    tried, carry = trials(bent, 0.0, line_search=search)
    np.testing.assert_allclose(tried, [1.0, 2.0, 4.0, 2.5])
    assert carry.num_failures == 0


@pytest.mark.parametrize("search", ["wolfe", "strong_wolfe"])
def test_steps_are_doubled_no_further_than_allowed(search):
    slide = slope_of(lambda x: -x, lambda x: -1.0)
    tried, carry = trials(slide, 0.0, line_search=search, first_step=0.5, max_step=3.0)
    assert tried == [0.5, 1.0, 2.0, 3.0]
    assert carry.num_clipped == carry.num_failures == 0


def test_the_next_trial_is_no_nearer_than_a_tenth_of_the_bracket():
    """The lowest point of the parabola is at a fortieth of it."""
    parabola = slope_of(lambda x: x**2, lambda x: 2 * x)
    tried, _ = trials(parabola, 1.0, first_step=20.0)
    np.testing.assert_allclose(tried[:2], [-39.0, -3.0])


@pytest.mark.parametrize("search", SEARCHES)
def test_a_step_that_vanishes_in_rounding_is_neither_searched_nor_a_failure(search):
    slide = slope_of(lambda x: 1e-100 * x, lambda x: 1e-100)
    tried, carry = trials(slide, 1.0, line_search=search, first_step=1e-300, max_step=0.1)
    assert tried == [1.0]
    assert carry.num_failures == 0
    assert carry.num_still == 1


@pytest.mark.parametrize(("steepness", "is_steep_enough"), [(1.0, True), (0.2, False)])
def test_what_a_bound_stops_adds_nothing_to_the_slope(steepness, is_steep_enough):
    """Of the slope along both axes, the second's share is lost at once: is enough of it lost?"""
    seen = []

    def plane(point):
        seen.append(point)
        return float(-point[0] - steepness * point[1]), np.array([-1.0, -steepness])

    box = np.full(2, -np.inf), np.array([np.inf, 0.01])
    options = vary(max_step=4.0)
    carry = iterate(plane, begin(plane, np.zeros(2), options), 1.0, box, options)
    np.testing.assert_allclose(seen[1], [1.0, 0.01])
    assert (len(seen) == 2) is is_steep_enough
    assert carry.point[0] == (1.0 if is_steep_enough else pytest.approx(4 / np.hypot(1, 0.2)))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_point_without_a_gradient_is_avoided_however_low(search):
    """The root has a value at zero, and no slope there."""

    def root(point):
        with np.errstate(divide="ignore"):
            return float(point[0] - np.sqrt(point[0])), 1 - 0.5 / np.sqrt(point)

    box = np.zeros(1), np.full(1, np.inf)
    *_, last = descend(root, [4.0], vary(line_search=search), box, first_step=10.0)
    assert last.ending is Ending.STATIONARY
    np.testing.assert_allclose(last.best, [0.25], atol=1e-3)
