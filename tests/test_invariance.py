"""What must not change a fit, or only as units do: properties of whole fits.

Each case is fitted twice, as it is and told in another way. What is expected of the second fit
is an affine function of what the first one found.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nlsq_dask import HybridStreamingConfig, fit_dataset

CONFIG = HybridStreamingConfig(max_warmup_iterations=0)
ONCE = settings(max_examples=1, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 2**32 - 1)
OFTEN = settings(max_examples=12, suppress_health_check=list(HealthCheck))
TRUTH = np.array([3.0, 2.0, 0.8, 0.5])


def peak(x, p):
    """Height, place, width and floor."""
    return p[0] * jnp.exp(-(((x - p[1]) / p[2]) ** 2)) + p[3]


@dataclass(frozen=True)
class Told:
    """A fit as it is told, and what became of its parameters: ``q = matrix @ p + shift``."""

    ds: xr.Dataset
    p0: np.ndarray
    f_scale: float
    model: Any = peak
    options: dict[str, Any] = field(default_factory=dict)
    matrix: np.ndarray = field(default_factory=lambda: np.eye(4))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(4))
    cost_ratio: float = 1.0
    covariance_ratio: float = 1.0

    def fit(self):
        given_here = {
            "y": "y",
            "x": "x",
            "sigma": "sigma",
            "p0": {"p": self.p0},
            "f_scale": self.f_scale,
            "config": CONFIG,
        }
        return fit_dataset(self.ds, self.model, **(given_here | self.options))

    def with_rows(self, **columns: Any) -> Told:
        ds = xr.Dataset({name: ("row", values) for name, values in columns.items()})
        return replace(self, ds=ds)

    def column(self, name: str) -> np.ndarray:
        return self.ds[name].values

    def mapped(self, matrix, shift=0.0, **changes: Any) -> Told:
        matrix = np.asarray(matrix)
        if matrix.ndim == 1:
            matrix = np.diag(matrix)
        shift = np.broadcast_to(shift, 4)
        return replace(self, matrix=matrix, shift=shift, p0=matrix @ self.p0 + shift, **changes)


# Each takes a case and a random generator and tells the case in another way.


def in_another_order(case: Told, rng) -> Told:
    return replace(case, ds=case.ds.isel(row=rng.permutation(case.ds.sizes["row"])))


def y_in_other_units(case: Told, rng) -> Told:
    unit, zero = 10.0 ** rng.uniform(-6, 6), rng.normal()
    ds = case.ds.assign(
        y=("row", unit * (case.column("y") + zero)), sigma=("row", unit * case.column("sigma"))
    )
    matrix, shift = [unit, 1, 1, unit], [0, 0, 0, unit * zero]
    return case.mapped(matrix, shift, ds=ds)


def residuals_in_other_units(case: Told, rng) -> Told:
    """Only ratios of sigma count, where the scale of the loss goes along."""
    unit = 10.0 ** rng.uniform(-4, 4)
    ds = case.ds.assign(sigma=("row", case.column("sigma") / unit))
    return replace(case, ds=ds, f_scale=unit * case.f_scale, cost_ratio=unit**2)


def x_in_other_units(case: Told, rng) -> Told:
    unit, zero = 10.0 ** rng.uniform(-6, 6), rng.normal()
    ds = case.ds.assign(x=("row", unit * (case.column("x") + zero)))
    return case.mapped([1, unit, unit, 1], [0, unit * zero, 0, 0], ds=ds)


def parameters_in_other_units(case: Told, rng) -> Told:
    units = 10.0 ** rng.uniform(-6, 6, 4)
    return case.mapped(units, model=lambda x, p: peak(x, p / units))


def parameters_in_another_order(case: Told, rng) -> Told:
    order = rng.permutation(4)
    back = np.argsort(order)
    return case.mapped(np.eye(4)[order], model=lambda x, p: peak(x, p[back]))


def parameters_mixed(case: Told, rng) -> Told:
    matrix = rng.normal(size=(4, 4)) + 3 * np.eye(4)
    back = np.linalg.inv(matrix)
    return case.mapped(matrix, model=lambda x, p: peak(x, back @ p))


def every_row_twice(case: Told, rng) -> Told:
    ds = xr.concat([case.ds, case.ds], "row")
    # The sum of the scores' products doubles as the Hessian does.
    return replace(case, ds=ds, cost_ratio=2.0, covariance_ratio=0.5)


def rows_without_weight(case: Told, rng) -> Told:
    """Garbage, among the others: not finite, not wanted, of no weight."""
    m = case.ds.sizes["row"]
    names = ("x", "y", "sigma")
    garbage = {name: np.resize(case.column(name), m // 2) for name in names}
    wanted = rng.uniform(size=m // 2) < 0.5
    for name in names:
        garbage[name][~wanted] = rng.choice([1e300, -1e300, 0.0, np.nan], (~wanted).sum())
    for i in np.flatnonzero(wanted):
        garbage[names[rng.integers(3)]][i] = rng.choice([np.nan, np.inf, -np.inf])
    columns = {name: np.concatenate([case.column(name), garbage[name]]) for name in names}
    columns["good"] = np.concatenate([np.ones(m, bool), wanted])
    order = rng.permutation(len(columns["good"]))
    told = case.with_rows(**{name: values[order] for name, values in columns.items()})
    return replace(told, options=case.options | {"where": "good"})


def in_chunks(case: Told, rng) -> Told:
    rows = int(rng.choice([100, 333, 1024]))
    config = replace(CONFIG, chunk_size=rows)
    return replace(case, ds=case.ds.chunk(row=rows), options=case.options | {"config": config})


def as_a_field(case: Told, rng) -> Told:
    """Rows of two dimensions, in chunks along both."""
    shape = (30, -1)
    ds = xr.Dataset({name: (("a", "b"), case.column(name).reshape(shape)) for name in case.ds})
    return replace(case, ds=ds.chunk(a=int(rng.integers(4, 30)), b=int(rng.integers(10, 40))))


def with_wide_bounds(case: Told, rng) -> Told:
    width = rng.uniform(2.0, 20.0, 4)
    return replace(case, options=case.options | {"bounds": {"p": (TRUTH - width, TRUTH + width)}})


def with_weights_by_group(case: Told, rng) -> Told:
    """A row of weight w is one of sigma divided by √w."""
    m = case.ds.sizes["row"]
    weights = rng.uniform(0.3, 3.0, 3)
    group = rng.integers(0, 3, m)
    ds = case.ds.assign(
        group=("row", group.astype(float)),
        sigma=("row", case.column("sigma") * np.sqrt(weights[group])),
    )
    config = replace(CONFIG, enable_residual_weighting=True, residual_weights=tuple(weights))
    return replace(
        case,
        ds=ds,
        model=lambda group, x, p: peak(x, p) + 0 * group,
        options=case.options | {"x": ("group", "x"), "config": config},
    )


TELLINGS = (
    in_another_order,
    y_in_other_units,
    residuals_in_other_units,
    x_in_other_units,
    parameters_in_other_units,
    parameters_in_another_order,
    parameters_mixed,
    every_row_twice,
    rows_without_weight,
    in_chunks,
    as_a_field,
    with_wide_bounds,
    with_weights_by_group,
)
LOSSES = st.sampled_from(["linear", "linear", "soft_l1", "huber", "cauchy", "arctan"])


def make_case(seed, loss, num_rows=3_000) -> Told:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 5, num_rows)
    sigma = rng.uniform(0.05, 0.2, num_rows)
    y = TRUTH[0] * np.exp(-(((x - TRUTH[1]) / TRUTH[2]) ** 2)) + TRUTH[3]
    y += sigma * rng.normal(size=num_rows)
    if loss != "linear":
        y[rng.uniform(size=num_rows) < 0.1] += 1.0
    ds = xr.Dataset({"x": ("row", x), "y": ("row", y), "sigma": ("row", sigma)})
    # The sandwich without its correction for small samples, which duplicates would change.
    options = {"loss": loss, "covariance": "HC0"}
    return Told(ds=ds, p0=TRUTH * rng.uniform(0.9, 1.1, 4), f_scale=2.0, options=options)


def assert_same_fit(first, told, second):
    assert first.success, first.message
    assert second.success, second.message
    expected = told.matrix @ first.popt + told.shift
    covariance = told.covariance_ratio * told.matrix @ first.pcov @ told.matrix.T
    size = np.sqrt(np.diag(covariance))
    assert np.max(np.abs(second.popt - expected) / size) < 1e-5
    np.testing.assert_allclose(
        second.pcov / np.outer(size, size), covariance / np.outer(size, size), atol=1e-5
    )
    assert second.cost == pytest.approx(told.cost_ratio * first.cost, rel=1e-9)


def check_telling(tell, seed, loss):
    case = make_case(seed, loss)
    told = tell(case, np.random.default_rng([seed, 1]))
    assert_same_fit(case.fit(), told, told.fit())


@pytest.mark.parametrize("tell", TELLINGS, ids=lambda tell: tell.__name__)
@ONCE
@given(seed=SEEDS)
def test_the_fit_is_the_same(tell, seed):
    """With one loss, so that all share what is compiled."""
    check_telling(tell, seed, "cauchy")


@pytest.mark.slow
@pytest.mark.parametrize("tell", TELLINGS, ids=lambda tell: tell.__name__)
@OFTEN
@given(seed=SEEDS, loss=LOSSES)
def test_many_fits_are_the_same(tell, seed, loss):
    check_telling(tell, seed, loss)


def check_split(seed, share):
    """With weights that are known: two rows of half the weight are one, in the covariance too."""
    rng = np.random.default_rng(seed)
    case = replace(make_case(seed, "linear"), options={"absolute_sigma": True})
    m = case.ds.sizes["row"]
    part = np.where(rng.uniform(size=m) < share, rng.uniform(0.1, 0.9, m), 1.0)
    with np.errstate(divide="ignore"):
        columns = {
            "x": np.tile(case.column("x"), 2),
            "y": np.tile(case.column("y"), 2),
            # What was not split is left with a row of infinite sigma: of no weight.
            "sigma": np.tile(case.column("sigma"), 2) / np.sqrt(np.concatenate([part, 1 - part])),
        }
    told = case.with_rows(**columns)
    second = told.fit()
    assert_same_fit(case.fit(), told, second)
    assert second.num_rows == m + np.sum(part < 1)
    assert second.num_masked == np.sum(part == 1)


SHARES = st.sampled_from([0.3, 1.0])
test_a_row_may_be_split_in_two = ONCE(given(SEEDS, SHARES)(check_split))
test_rows_may_be_split_in_two = pytest.mark.slow(OFTEN(given(SEEDS, SHARES)(check_split)))


@ONCE
@given(seed=SEEDS, index=st.integers(0, 3))
def test_a_parameter_fixed_where_it_ended_leaves_the_others_there(seed, index):
    case = replace(make_case(seed, "linear"), options={"absolute_sigma": True})
    names = ["height", "place", "width", "floor"]

    def named(x, height, place, width, floor):
        return peak(x, jnp.stack([height, place, width, floor]))

    p0 = dict(zip(names, case.p0, strict=True))
    first = replace(case, model=named, options=case.options | {"p0": p0}).fit()
    held = {**p0, names[index]: first[names[index]]}
    second = replace(
        case, model=named, options=case.options | {"p0": held, "fixed": [names[index]]}
    ).fit()
    assert second.success
    np.testing.assert_allclose(second.popt, first.popt, atol=1e-5 * first.perr.min())
    # The rest of the covariance is what conditioning on the one that is fixed leaves.
    others = np.arange(4) != index
    column = first.pcov[others, index]
    expected = (
        first.pcov[np.ix_(others, others)] - np.outer(column, column) / (first.pcov[index, index])
    )
    np.testing.assert_allclose(second.pcov[np.ix_(others, others)], expected, rtol=1e-5)
    assert np.all(second.pcov[index] == 0)
