"""Profile-likelihood intervals against root finding on SciPy's profile."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import xarray as xr

import nist
import problems
from nlsq_dask import fit_dataset
from nlsq_dask.errors import DataError, SessionError
from nlsq_dask.solvers.end_point import EndPointSearch, EndStatus
from nlsq_dask.solvers.quadratic import build_quadratic
from test_solver import evaluate_with


def peak(x, height, place, width, floor):
    return height * jnp.exp(-0.5 * ((x - place) / width) ** 2) + floor


def peak_numpy(x, p):
    return p[0] * np.exp(-0.5 * ((x - p[1]) / p[2]) ** 2) + p[3]


def decay(x, amplitude, rate, offset):
    return problems.decay(x, amplitude, rate, offset)


def growth(x, b1, b2):
    return b1 * (1 - jnp.exp(-b2 * x))


def growth_numpy(x, p):
    return p[0] * (1 - np.exp(-p[1] * x))


@dataclass(frozen=True)
class Case:
    model: object
    in_numpy: object
    p0: dict
    x: np.ndarray
    y: np.ndarray
    sigma: np.ndarray | None = None
    bounds: tuple = (-np.inf, np.inf)

    @property
    def dataset(self):
        ds = xr.Dataset({"y": ("row", self.y), "x": ("row", self.x)})
        return ds if self.sigma is None else ds.assign(sigma=("row", self.sigma))

    @property
    def limits(self):
        n = len(self.p0)
        return tuple(np.broadcast_to(np.asarray(side, float), n) for side in self.bounds)

    def fit(self, ds, **options):
        if self.sigma is not None:
            options |= {"sigma": "sigma", "absolute_sigma": True}
        return fit_dataset(ds, self.model, y="y", x="x", p0=self.p0, bounds=self.limits, **options)

    def profiled_cost(self, index, value, start):
        """The cost with one parameter held, and where."""
        others = np.arange(len(start)) != index
        weight = 1.0 if self.sigma is None else 1 / self.sigma

        def residual(free):
            params = np.insert(free, index, value)
            return (self.in_numpy(self.x, params) - self.y) * weight

        fit = scipy.optimize.least_squares(
            residual,
            start[others],
            bounds=[side[others] for side in self.limits],
            x_scale="jac",
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
        return fit.cost, np.insert(fit.x, index, value)

    def end(self, result, index, side, level):
        """Where the profile crosses the threshold, by bisection outwards from the minimum."""
        dof = len(self.y) - len(result.popt)
        if self.sigma is None:
            rise = scipy.stats.f.ppf(level, 1, dof) * result.cost / dof
        else:
            rise = 0.5 * scipy.stats.chi2.ppf(level, 1)
        error = result.perr[index]
        center, start = result.popt[index], result.popt

        def excess(way):
            return self.profiled_cost(index, center + side * way * error, start)[0] - (
                result.cost + rise
            )

        far = 1.0
        while excess(far) < 0:
            start = self.profiled_cost(index, center + side * far * error, start)[1]
            far *= 1.3
        return center + side * error * scipy.optimize.brentq(excess, 0.1, far, xtol=1e-7)


def make_cases():
    rng = np.random.default_rng(8)
    t, y = problems.make_decay(40, noise=0.15, seed=2)
    x = np.linspace(0, 10, 60)
    sigma = rng.uniform(0.2, 0.6, x.size)
    growing = nist.load("BoxBOD")
    return {
        "decay": Case(decay, problems.decay_numpy, problems.P0, t, y),
        "peak": Case(
            peak,
            peak_numpy,
            {"height": 1.0, "place": 5.5, "width": 1.0, "floor": 0.0},
            x,
            peak_numpy(x, [2.0, 5.0, 0.7, 0.5]) + sigma * rng.normal(size=x.size),
            sigma,
        ),
        "growth": Case(growth, growth_numpy, {"b1": 100.0, "b2": 0.75}, growing.x, growing.y),
    }


CASES = make_cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["memory", "zarr"])
@pytest.mark.parametrize("level", [0.6, 0.95])
def test_ends_are_where_scipys_profile_crosses(name, kind, level, tmp_path):
    case = CASES[name]
    ds = case.dataset
    if kind == "zarr":
        ds.chunk(row=17).to_zarr(tmp_path / "rows.zarr", consolidated=False)
    result = case.fit(ds if kind == "memory" else tmp_path / "rows.zarr")
    interval = result.confidence_interval(level, method="profile")
    for index, name_of in enumerate(result.param_names):
        for side, sign in (("lower", -1), ("upper", 1)):
            expected = case.end(result, index, sign, level)
            actual = float(interval.sel(param=name_of, side=side))
            assert abs(actual - expected) <= 1e-3 * result.perr[index]
    assert np.all(interval.status == "FOUND")
    assert interval.num_passes <= 1 + 4 * interval.size


def test_other_parameters_stay_within_their_bounds():
    """The profile of a parameter bends where another comes to its bound."""
    t, y = problems.make_decay(40, noise=0.15, seed=2)
    case = Case(
        decay,
        problems.decay_numpy,
        dict(problems.P0, offset=0.2),
        t,
        y,
        bounds=([-np.inf, 0.0, 0.12], [2.1, np.inf, np.inf]),
    )
    result = case.fit(case.dataset)
    interval = result.confidence_interval(0.95, method="profile")
    for index, side, sign in [(0, "lower", -1), (1, "lower", -1), (1, "upper", 1), (2, "upper", 1)]:
        expected = case.end(result, index, sign, 0.95)
        assert abs(float(interval.sel(side=side)[index]) - expected) <= 1e-3 * result.perr[index]
    assert interval.status.sel(param="amplitude", side="upper") == "AT_BOUND"
    assert interval.sel(param="amplitude", side="upper") == 2.1
    assert interval.status.sel(param="offset", side="lower") == "AT_BOUND"
    assert interval.sel(param="offset", side="lower") == 0.12


def test_where_the_model_is_undefined_a_step_is_halved():
    x = np.geomspace(0.05, 3.0, 12)
    rng = np.random.default_rng(4)
    case = Case(
        lambda x, a, b, c: a * jnp.log(x - c) + b,
        lambda x, p: p[0] * np.log(x - p[2]) + p[1],
        {"a": 1.0, "b": 0.5, "c": -0.1},
        x,
        np.log(x) + 0.3 * rng.normal(size=x.size),
    )
    result = case.fit(case.dataset)
    interval = result.confidence_interval(0.95, "profile", "c")
    assert result["c"] + 2.2 * result.perr[2] > x[0]  # so that the first trial is undefined
    rise = 0.5 * scipy.stats.t.ppf(0.975, result.dof) ** 2 * result.reduced_chi2

    def excess(c):  # for a given c the rest is a straight line
        line = np.polynomial.Polynomial.fit(np.log(x - c), case.y, 1)
        return 0.5 * np.sum((line(np.log(x - c)) - case.y) ** 2) - result.cost - rise

    expected = scipy.optimize.brentq(excess, result["c"], np.nextafter(x[0], 0), xtol=1e-12)
    actual = float(interval.sel(param="c", side="upper"))
    assert abs(actual - expected) <= 1e-3 * result.perr[2]


def test_no_end_is_infinite_and_warned_of():
    """A rate so high that the first row is at the plateau fits nearly as well as any."""
    result = CASES["growth"].fit(CASES["growth"].dataset)
    with pytest.warns(scipy.optimize.OptimizeWarning, match="upper end for 'b2'.*100 standard"):
        interval = result.confidence_interval(0.995, method="profile", params=["b2"])
    assert interval.shape == (1, 2)
    assert interval.sel(side="upper") == np.inf
    assert 0 < interval.sel(side="lower") < result["b2"]
    assert interval.status.values.tolist() == [["FOUND", "NONE"]]


def test_an_array_parameter_and_a_fixed_one():
    case = CASES["growth"]

    def model(x, c, floor):
        return c[0] * (1 - jnp.exp(-c[1] * x)) + floor

    result = fit_dataset(
        case.dataset, model, y="y", x="x", p0={"c": [100.0, 0.75], "floor": 0.0}, fixed=["floor"]
    )
    interval = result.confidence_interval(method="profile", params=["floor", "c"])
    assert interval.param.values.tolist() == ["floor", "c[0]", "c[1]"]
    assert interval.sel(param="floor").values.tolist() == [0.0, 0.0]
    expected = case.fit(case.dataset).confidence_interval(method="profile")
    np.testing.assert_allclose(interval.values[1:], expected.values, rtol=1e-6)


def test_what_a_profile_needs_is_said():
    case = CASES["growth"]
    ds = case.dataset
    result = case.fit(ds)
    with pytest.raises(ValueError, match="`method`"):
        result.confidence_interval(method="bootstrap")
    with pytest.raises(ValueError, match=r"`params` must be among \['b1', 'b2'\]"):
        result.confidence_interval(params="b3")
    with pytest.raises(SessionError, match="A profile"):
        pickle.loads(pickle.dumps(result)).confidence_interval(method="profile")
    with pytest.raises(ValueError, match="determined by the data"), pytest.warns():
        fit_dataset(ds, lambda x, a, b: a * b * x, y="y", x="x", p0=[1.0, 1.0]).confidence_interval(
            method="profile"
        )


def test_data_that_changed_are_refused(tmp_path):
    case = CASES["decay"]
    path = tmp_path / "rows.zarr"
    case.dataset.to_zarr(path, consolidated=False)
    result = case.fit(path)
    case.dataset.assign(y=("row", case.y + 1.0)).to_zarr(path, mode="w", consolidated=False)
    with pytest.raises(DataError, match="those that were fitted"):
        result.confidence_interval(method="profile")


def make_search():
    """A straight line's slope: the profile is the parabola that the model says."""
    evaluate = evaluate_with(lambda p: np.array([p[0], 3.0]), lambda p: np.array([[1.0], [0.0]]))
    search = EndPointSearch(
        index=0,
        side=1,
        minimum=np.zeros(1),
        threshold=4.5 + 2.0,
        rise=2.0,
        standard_error=1.0,
        scale=1.0,
        bounds=(np.full(1, -np.inf), np.full(1, np.inf)),
    )
    start = evaluate(np.zeros(1), np.eye(1))
    return search, search.init(build_quadratic(start.normal, start.whitening)), evaluate


def with_cost(evaluation, cost):
    return replace(evaluation, normal=replace(evaluation.normal, cost=np.float64(cost)))


def test_a_parabola_takes_one_evaluation():
    search, trace, evaluate = make_search()
    np.testing.assert_allclose(trace.trial, 2.0)
    trace = search.update(trace, evaluate(trace.trial, trace.whitening))
    assert trace.status is EndStatus.FOUND
    np.testing.assert_allclose(trace.end, 2.0)


@pytest.mark.parametrize("cost", [np.nan, 1e3])
def test_where_the_model_was_wrong_the_step_is_halved(cost):
    search, trace, evaluate = make_search()
    for trial in (2.0, 1.0, 0.5):
        np.testing.assert_allclose(trace.trial, trial)
        trace = search.update(trace, with_cost(evaluate(trace.trial, trace.whitening), cost))
    while trace.status is EndStatus.RUNNING:
        trace = search.update(trace, with_cost(evaluate(trace.trial, trace.whitening), cost))
    assert trace.status is EndStatus.NOT_CONVERGED
    assert np.isnan(trace.end)


def test_a_lower_cost_on_the_way_is_said():
    search, trace, evaluate = make_search()
    trace = search.update(trace, with_cost(evaluate(trace.trial, trace.whitening), 4.0))
    assert trace.status is EndStatus.NOT_A_MINIMUM
    np.testing.assert_allclose(trace.params, 2.0)


def test_a_tied_parameter_has_no_profile_of_its_own():
    t, y = problems.make_decay(2_000)
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": t})
    result = fit_dataset(ds, problems.decay, ties={"offset": lambda amplitude: 0.05 * amplitude})
    interval = result.confidence_interval(method="profile")
    assert interval.sel(param="offset").isnull().all()
    assert interval.status.sel(param="offset", side="lower") == "TIED"
    asymptotic = result.confidence_interval()
    free = ["amplitude", "rate"]
    np.testing.assert_allclose(
        interval.sel(param=free), asymptotic.sel(param=free), atol=0.1 * result.perr.max()
    )


def test_a_robust_loss_has_no_likelihood():
    t, y = problems.make_decay(500)
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": t})
    result = fit_dataset(ds, problems.decay, loss="huber")
    with pytest.raises(ValueError, match="no likelihood"):
        result.confidence_interval(method="profile")


@pytest.mark.parametrize("options", [{"cluster": "station"}, {"covariance": "HC1"}])
def test_a_sandwich_says_that_the_cost_is_no_likelihood(options):
    t, y = problems.make_decay(500)
    ds = xr.Dataset({"y": ("t", y), "station": ("t", np.arange(500) // 10)}, coords={"t": t})
    result = fit_dataset(ds, problems.decay, y="y", **options)
    with pytest.raises(ValueError, match=r"classical covariance: .* got covariance='(clus|HC1)"):
        result.confidence_interval(method="profile")
