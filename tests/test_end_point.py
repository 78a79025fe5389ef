"""The search for the end of a profile interval, on problems in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize

from nlsq_dask.solvers.end_point import EndPointSearch, EndStatus
from nlsq_dask.solvers.quadratic import build_quadratic, next_whitening
from nlsq_dask.solvers.trust_region import Evaluation
from test_solver import make_normal

INF = np.inf
X = np.linspace(0.0, 4.0, 25)
Y = 2.0 * np.exp(-0.8 * X) + 0.15 * np.random.default_rng(5).normal(size=25)


def residual(p):
    return p[0] * np.exp(-p[1] * X) - Y


def jacobian(p):
    e = np.exp(-p[1] * X)
    return np.stack([e, -p[0] * X * e], axis=-1)


def evaluate(params, whitening, residual=residual, jacobian=jacobian):
    jac = jacobian(params) @ np.linalg.inv(whitening)
    return Evaluation(params=params, whitening=whitening, normal=make_normal(jac, residual(params)))


FIT = scipy.optimize.least_squares(
    residual, [1.5, 0.5], jac=jacobian, xtol=1e-15, ftol=1e-15, gtol=1e-15
)
S = np.sqrt(2 * FIT.cost / 23)
ERRORS = S * np.sqrt(np.diag(np.linalg.inv(FIT.jac.T @ FIT.jac)))


def make_search(index, side, rise, bounds=None, minimum=FIT.x):
    lower, upper = bounds or ([-INF, -INF], [INF, INF])
    return EndPointSearch(
        index=index,
        side=side,
        minimum=minimum,
        threshold=FIT.cost + rise,
        rise=rise,
        standard_error=float(ERRORS[index]),
        scale=S,
        bounds=(np.array(lower, float), np.array(upper, float)),
    )


def search_end(search, evaluate=evaluate):
    identity = np.eye(len(search.minimum))
    start = evaluate(search.minimum, identity)
    whitening = next_whitening(build_quadratic(start.normal, identity).factor)
    start = evaluate(search.minimum, whitening)
    traces = [search.init(build_quadratic(start.normal, whitening))]
    while traces[-1].status is EndStatus.RUNNING:
        trace = traces[-1]
        traces.append(search.update(trace, evaluate(trace.trial, trace.whitening)))
    return traces


def profile(index, value, limits=(-INF, INF)):
    """The cost, minimised over the other parameter."""
    other = 1 - index
    fit = scipy.optimize.least_squares(
        lambda free: residual(np.insert(free, index, value)),
        np.clip(FIT.x[[other]], limits[0] + 1e-9, limits[1] - 1e-9),
        bounds=limits,
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    return fit.cost


def oracle(index, side, rise, limits=(-INF, INF)):
    def excess(way):
        value = FIT.x[index] + side * way * ERRORS[index]
        return profile(index, value, limits) - FIT.cost - rise

    far = 0.5
    while excess(far) < 0:
        far *= 1.2
    return FIT.x[index] + side * ERRORS[index] * scipy.optimize.brentq(excess, 0.0, far)


@pytest.mark.parametrize("level", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("index", [0, 1])
def test_ends_are_where_the_profile_has_risen(index, side, level):
    rise = level * S**2
    *traces, last = search_end(make_search(index, side, rise))
    expected = oracle(index, side, rise)
    assert last.status is EndStatus.FOUND
    assert abs(last.end - expected) < 2e-3 * ERRORS[index]
    assert last.num_trials == len(traces)
    assert last.num_trials <= 6
    first = traces[0].trial[index] - FIT.x[index]
    assert side * first == pytest.approx(np.sqrt(2 * rise) / S * ERRORS[index], rel=1e-5)
    for before, after in zip(traces, [*traces[1:], last], strict=True):
        assert side * (after.inside[index] - before.inside[index]) >= 0


@pytest.mark.parametrize("side", [-1, 1])
def test_the_other_parameter_stays_within_its_bounds(side):
    """They hold it before the profile ends, so that it rises faster."""
    rise = 4.0 * S**2
    limits = (FIT.x[0] - 0.3 * ERRORS[0], FIT.x[0] + 0.3 * ERRORS[0])
    box = [limits[0], -INF], [limits[1], INF]
    *traces, last = search_end(make_search(1, side, rise, box))
    assert last.status is EndStatus.FOUND
    assert abs(last.end - oracle(1, side, rise, limits)) < 2e-3 * ERRORS[1]
    assert all(limits[0] <= trace.trial[0] <= limits[1] for trace in traces)
    assert last.num_trials <= 6
    free = oracle(1, side, rise)
    assert side * (free - last.end) > 0.05 * ERRORS[1]


@pytest.mark.parametrize("side", [-1, 1])
def test_a_bound_may_come_before_the_end(side):
    rise = 4.0 * S**2
    bound = FIT.x[0] + side * ERRORS[0]
    box = ([bound, -INF], [INF, INF]) if side < 0 else ([-INF, -INF], [bound, INF])
    *traces, last = search_end(make_search(0, side, rise, box))
    assert last.status is EndStatus.AT_BOUND
    assert last.end == bound
    assert all(side * (bound - trace.trial[0]) > 0 for trace in traces)
    beyond = FIT.x[0] + side * 9 * ERRORS[0]
    box = ([beyond, -INF], [INF, INF]) if side < 0 else ([-INF, -INF], [beyond, INF])
    assert search_end(make_search(0, side, rise, box))[-1].status is EndStatus.FOUND


@pytest.mark.parametrize(("distance", "at_once"), [(0.9e-3, True), (1.1e-3, False)])
def test_a_minimum_at_its_bound_ends_there_at_once(distance, at_once):
    bound = FIT.x[0] + distance * ERRORS[0]
    traces = search_end(make_search(0, 1, S**2, ([-INF, -INF], [bound, INF])))
    assert traces[-1].status is EndStatus.AT_BOUND
    assert traces[-1].end == bound
    assert (len(traces) == 1) is at_once


def flat(p):
    return np.array([0.05 * np.tanh(p[0]), 3.0, p[1]])


def flat_jacobian(p):
    return np.array([[0.05 / np.cosh(p[0]) ** 2, 0.0], [0.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("far", "status"),
    [
        (INF, EndStatus.NONE),
        (2.001, EndStatus.NONE),
        (1.999, EndStatus.AT_BOUND),
        (0.5, EndStatus.AT_BOUND),
    ],
)
def test_a_profile_that_never_rises_has_no_end(far, status):
    """The cost rises by 0.00125 at most; a bound within 100 standard errors is an end."""
    search = EndPointSearch(
        index=0,
        side=1,
        minimum=np.zeros(2),
        threshold=4.5 + 0.01,
        rise=0.01,
        standard_error=0.02,
        scale=1e-3,
        bounds=(np.full(2, -INF), np.array([far, INF])),
    )

    def flat_there(params, whitening):
        return evaluate(params, whitening, flat, flat_jacobian)

    last = search_end(search, flat_there)[-1]
    assert last.status is status
    assert last.end == (far if status is EndStatus.AT_BOUND else INF)
    lower = search_end(replace(search, side=-1), flat_there)[-1]
    assert lower.status is EndStatus.NONE
    assert lower.end == -INF


def with_cost(evaluation, cost):
    return replace(evaluation, normal=replace(evaluation.normal, cost=np.float64(cost)))


def first_trial(rise=2.0 * S**2):
    search = make_search(0, 1, rise)
    start = evaluate(FIT.x, np.eye(2))
    return search, search.init(build_quadratic(start.normal, np.eye(2)))


@pytest.mark.parametrize(
    ("share", "status"), [(-1.02, EndStatus.NOT_A_MINIMUM), (-1.005, EndStatus.RUNNING)]
)
def test_a_cost_below_the_minimum_is_no_rounding(share, status):
    """From a hundredth of the rise on."""
    search, trace = first_trial()
    there = evaluate(trace.trial, trace.whitening)
    after = search.update(trace, with_cost(there, search.threshold + share * search.rise))
    assert after.status is status
    if status is EndStatus.NOT_A_MINIMUM:
        np.testing.assert_array_equal(after.params, trace.trial)
        assert np.isnan(after.end)
    assert after.num_trials == 1


@pytest.mark.parametrize(("share", "halved"), [(9.9, False), (10.1, True), (np.nan, True)])
def test_a_cost_far_above_what_the_model_said_halves_the_step(share, halved):
    search, trace = first_trial()
    there = evaluate(trace.trial, trace.whitening)
    after = search.update(trace, with_cost(there, search.threshold + share * search.rise))
    middle = 0.5 * (trace.params + trace.trial)
    assert (after.params is trace.params) is halved
    if not halved:  # the model's profile is above the threshold everywhere
        middle = 0.5 * (FIT.x + trace.trial)
        np.testing.assert_allclose(after.trial, middle, rtol=1e-14)
    else:
        np.testing.assert_allclose(after.trial, middle, rtol=1e-14)
        assert np.isinf(after.moved)
    assert after.status is EndStatus.RUNNING


def test_trials_are_limited_to_thirty():
    search, trace = first_trial()
    count = 0
    while trace.status is EndStatus.RUNNING:
        there = evaluate(trace.trial, trace.whitening)
        trace, count = search.update(trace, with_cost(there, np.nan)), count + 1
    assert trace.status is EndStatus.NOT_CONVERGED
    assert np.isnan(trace.end)
    assert count == trace.num_trials == 30


def test_a_trial_that_is_inside_is_remembered():
    search, trace = first_trial()
    there = evaluate(trace.trial, trace.whitening)
    for share, is_inside in ((-0.5, True), (0.5, False), (0.0, True)):
        after = search.update(trace, with_cost(there, search.threshold + share * search.rise))
        assert (after.inside is trace.trial) is is_inside


def test_a_step_is_at_most_as_long_as_the_way_behind_it():
    """A model that is all but flat promises the end far away: the way from the minimum doubles."""
    search, trace = first_trial(2.0 * S**2)
    way = trace.trial[0] - FIT.x[0]
    there = evaluate(trace.trial, trace.whitening)
    flat_there = replace(
        there,
        normal=replace(
            there.normal,
            gram=1e-6 * there.normal.gram,
            grad=1e-6 * there.normal.grad,
            cost=np.float64(FIT.cost),
        ),
    )
    after = search.update(trace, flat_there)
    assert after.trial[0] - FIT.x[0] == pytest.approx(2 * way, rel=1e-6)


def offset_residual(p):
    return p[0] * np.exp(-p[1] * X) + p[2] - Y


def offset_jacobian(p):
    e = np.exp(-p[1] * X)
    return np.stack([e, -p[0] * X * e, np.ones_like(X)], axis=-1)


@pytest.mark.parametrize("side", [-1, 1])
def test_beside_one_at_its_bound_the_rest_goes_on_to_its_minimum(side):
    fit = scipy.optimize.least_squares(
        offset_residual, [2.0, 0.8, 0.0], jac=offset_jacobian, xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    s2 = 2 * fit.cost / 22
    errors = np.sqrt(s2 * np.diag(np.linalg.inv(fit.jac.T @ fit.jac)))
    rise = 2.0 * s2
    lower, upper = np.full(3, -INF), np.full(3, INF)
    lower[2], upper[2] = fit.x[2] - 0.2 * errors[2], fit.x[2] + 0.2 * errors[2]

    def excess(way):
        value = fit.x[1] + side * way * errors[1]
        held = scipy.optimize.least_squares(
            lambda free: offset_residual(np.array([free[0], value, free[1]])),
            fit.x[[0, 2]],
            bounds=(lower[[0, 2]], upper[[0, 2]]),
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
        )
        return held.cost - fit.cost - rise

    expected = fit.x[1] + side * errors[1] * scipy.optimize.brentq(excess, 0.05, 5.0, xtol=1e-7)
    search = EndPointSearch(
        index=1,
        side=side,
        minimum=fit.x,
        threshold=fit.cost + rise,
        rise=rise,
        standard_error=float(errors[1]),
        scale=float(np.sqrt(s2)),
        bounds=(lower, upper),
    )

    def there(params, whitening):
        return evaluate(params, whitening, offset_residual, offset_jacobian)

    traces = search_end(search, there)
    assert traces[-1].status is EndStatus.FOUND
    assert abs(traces[-1].end - expected) < 2e-3 * errors[1]
    assert traces[-1].num_trials <= 6


@pytest.mark.parametrize("side", [-1, 1])
def test_bounds_of_both_may_come_before_the_end(side):
    rise = 4.0 * S**2
    bound = FIT.x[1] + side * 0.5 * ERRORS[1]
    lower = np.array([FIT.x[0] - 0.1 * ERRORS[0], bound if side < 0 else -INF])
    upper = np.array([FIT.x[0] + 0.1 * ERRORS[0], bound if side > 0 else INF])
    last = search_end(make_search(1, side, rise, (lower, upper)))[-1]
    assert last.status is EndStatus.AT_BOUND
    assert last.end == bound


def parabola(params, whitening):
    """Standard errors of 1, and a threshold that is reached at 2."""
    jac = np.vstack([np.eye(2), np.zeros((1, 2))])
    return evaluate(params, whitening, lambda p: jac @ p + [0.0, 0.0, 3.0], lambda p: jac)


PARABOLA = EndPointSearch(
    index=0,
    side=1,
    minimum=np.zeros(2),
    threshold=4.5 + 2.0,
    rise=2.0,
    standard_error=1.0,
    scale=1.0,
    bounds=(np.full(2, -INF), np.full(2, INF)),
)


@pytest.mark.parametrize(
    ("way", "way_before", "aside", "found"),
    [
        (0.9e-3, INF, 0.0, True),
        (1.1e-3, INF, 0.0, False),
        (0.9e-3, 2e-3, 0.0, True),
        (0.9e-3, 1e-3, 0.0, False),  # 9 times as much is to come
        (0.4e-3, 0.5e-3, 0.0, False),  # 4 times
        (0.2e-3, 0.25e-3, 0.0, True),
        (0.9e-3, 0.8e-3, 0.0, False),  # steps that grow
        (0.9e-3, 0.0, 0.0, True),
        (0.1e-3, INF, 0.04, True),
        (0.1e-3, INF, 0.06, False),  # the other parameter has not settled
    ],
)
def test_a_search_ends_once_little_is_to_come(way, way_before, aside, found):
    start = parabola(np.zeros(2), np.eye(2))
    trace = PARABOLA.init(build_quadratic(start.normal, np.eye(2)))
    np.testing.assert_allclose(trace.trial, [2.0, 0.0], atol=1e-12)
    trace = replace(trace, trial=np.array([2.0 - way, aside]), moved=way_before)
    after = PARABOLA.update(trace, parabola(trace.trial, np.eye(2)))
    np.testing.assert_allclose(after.end if found else after.trial[0], 2.0, rtol=1e-9)
    assert (after.status is EndStatus.FOUND) is found
    if not found:
        assert after.moved == pytest.approx(way, rel=1e-6)


def test_a_direction_that_nothing_depends_on_is_left_alone():
    """At one point of the way; the fit itself had all of them determined."""
    jac = np.diag([1.0, 0.0])
    there = evaluate(np.zeros(2), np.eye(2), lambda p: jac @ p + [0.0, 3.0], lambda p: jac)
    trace = PARABOLA.init(build_quadratic(there.normal, np.eye(2)))
    np.testing.assert_allclose(trace.trial, [2.0, 0.0], atol=1e-12)
