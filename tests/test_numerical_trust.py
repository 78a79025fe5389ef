"""Random models, rows, weights, masks, losses, bounds and precisions against independent oracles;
and what must not change a fit.

Each property is tried on a few examples by default and on many more by ``-m slow``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest
import scipy.optimize
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nlsq_dask import HybridStreamingConfig, fit_dataset
from nlsq_dask.kernels.build import KernelSpec, build_kernels
from nlsq_dask.kernels.reverse import build_reverse_kernels
from nlsq_dask.kernels.tiles import choose_tile_shape
from nlsq_dask.losses import LOSSES
from nlsq_dask.model import Model
from nlsq_dask.parameters.given import build_parameter_space
from nlsq_dask.sources.base import Chunk, pad_chunk
from nlsq_dask.terms import RowTerms
from oracles import FAMILIES, LONG, Family, inverse, robust_rows

SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=3, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=20, suppress_health_check=list(HealthCheck))


# -- kernels: the sums of a chunk


@dataclass(frozen=True)
class ChunkCase:
    """A chunk of one of two shapes, with what the rows of it are, and where it is evaluated."""

    family: Family
    loss: str
    way: str
    chunk: Chunk  # x: a group number, and x
    weights: np.ndarray | None  # by group
    params: np.ndarray
    whitening: np.ndarray
    f_scale: float
    tile_rows: int
    padding: int

    @property
    def spec(self) -> KernelSpec:
        model = Model(
            function=lambda group, x, p: self.family.model(x, p),
            variables=("group", "x"),
            parameters=("p",),
        )
        shape = self.padded.y.shape
        return KernelSpec(
            model=model,
            space=build_parameter_space(("p",), {}, {"p": self.params}),
            loss=self.loss,
            tile_shape=choose_tile_shape(shape, self.tile_rows),
            products=self.way,
        )

    @property
    def padded(self) -> Chunk:
        return pad_chunk(self.chunk, tuple(n + self.padding for n in self.chunk.y.shape))

    @property
    def terms(self) -> RowTerms:
        return RowTerms(
            fill=np.array([0.0, np.mean(self.family.domain)]),
            f_scale=np.float64(self.f_scale),
            group_weights=self.weights,
        )


@st.composite
def chunk_cases(draw):
    rng = np.random.default_rng(draw(SEEDS))
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    shape, x_shape = draw(st.sampled_from([((150,), (150,)), ((6, 25), (1, 25))]))
    params = np.array(family.truth) * rng.uniform(0.8, 1.2, len(family.truth))
    x = rng.uniform(*family.domain, x_shape)
    f_scale = rng.uniform(0.2, 2.0)
    y = np.asarray(family.value(x, params), float) + rng.standard_t(2, shape) * f_scale
    group = rng.integers(0, 3, shape).astype(float)
    weights = rng.uniform(0.2, 3.0, 3) if draw(st.booleans()) else None
    if weights is not None:
        weights[rng.integers(3)] *= rng.integers(2)
        group[rng.uniform(size=shape) < 0.03] = rng.choice([3.0, -1.0, 0.5])
    group[rng.uniform(size=shape) < 0.05] = np.nan
    y[rng.uniform(size=shape) < 0.1] = rng.choice([np.nan, np.inf])
    sigma = rng.uniform(0.3, 3.0, shape) if draw(st.booleans()) else None
    if sigma is not None:
        sigma[rng.uniform(size=shape) < 0.1] = np.nan
        sigma[rng.uniform(size=shape) < 0.05] *= -1
    k = len(params)
    return ChunkCase(
        family=family,
        loss=draw(st.sampled_from(sorted(LOSSES))),
        way=draw(st.sampled_from(["lanes", "dot", "sweep"])),
        chunk=Chunk(
            x=(group, x),
            y=y,
            sigma=sigma,
            where=rng.uniform(size=shape) < 0.8 if draw(st.booleans()) else None,
            cluster=rng.integers(0, 4, shape),
        ),
        weights=weights,
        params=params,
        whitening=np.triu(rng.normal(size=(k, k)), 1) + np.diag(rng.uniform(0.5, 3.0, k)),
        f_scale=f_scale,
        tile_rows=draw(st.sampled_from([16, 64, 10_000])),
        padding=draw(st.integers(0, 2)),
    )


@dataclass(frozen=True)
class DenseRows:
    """The rows that count, gathered, in extended precision; and how many do not, by reason."""

    r: np.ndarray
    jac: np.ndarray  # by the parameters
    scale: np.ndarray
    x: np.ndarray
    y: np.ndarray
    cluster: np.ndarray
    num_masked: int
    num_invalid: int
    num_bad_sigma: int
    num_stray: int


def gather(case: ChunkCase) -> DenseRows:
    chunk = case.chunk
    shape = chunk.y.shape
    group, x = (np.broadcast_to(part, shape).ravel() for part in chunk.x)
    y, cluster = chunk.y.ravel(), chunk.cluster.ravel()
    sigma = np.ones(y.size) if chunk.sigma is None else chunk.sigma.ravel()
    wanted = np.ones(y.size, bool) if chunk.where is None else chunk.where.ravel().copy()
    weight, num_stray = np.ones(y.size), 0
    if case.weights is not None:
        known = np.isin(group, [0.0, 1.0, 2.0])
        stray = wanted & ~known & np.isfinite(group)
        num_stray = int(stray.sum())
        weight[known] = case.weights[group[known].astype(int)]
        wanted &= ~stray & (weight > 0)
    rows = wanted & np.isfinite(group) & np.isfinite(x) & np.isfinite(y) & np.isfinite(sigma)
    scale = np.sqrt(weight[rows].astype(LONG)) / sigma[rows]
    return DenseRows(
        r=(case.family.value(x[rows], case.params) - y[rows]) * scale,
        jac=case.family.jacobian(x[rows], case.params) * scale[:, None],
        scale=scale,
        x=x[rows],
        y=y[rows],
        cluster=cluster[rows],
        num_masked=int(y.size - rows.sum()),
        num_invalid=int(wanted.sum() - rows.sum()),
        num_bad_sigma=int((sigma[rows] <= 0).sum()),
        num_stray=num_stray,
    )


def assert_sums(actual, expected, size, eps=2.0**-52):
    """Equal to 100 eps of the sum of the absolute values of what was added."""
    error = np.abs(np.asarray(actual, LONG) - expected)
    assert np.all(error <= 100 * eps * np.asarray(size, LONG) + 1e-300), (actual, expected)


def check_kernels(case: ChunkCase):
    rows = gather(case)
    loss = robust_rows(case.loss, rows.r, case.f_scale)
    back = np.linalg.inv(case.whitening)
    jac = rows.jac @ back.astype(LONG)
    kernels = build_kernels(case.spec)
    with jax.enable_x64(True):
        normal, counts = kernels.normal_equations(
            case.params, back, case.terms, case.padded, precision="float64"
        ).finish()
        scores = kernels.scores(case.params, back, case.terms, case.padded, num_clusters=4)
        curvature = kernels.curvature(case.params, back, case.terms, case.padded)
        rivals = np.stack([case.params, 1.1 * case.params])
        costs = kernels.costs(rivals, case.terms, case.padded)
        summary = kernels.summary(np.asarray(0.25), case.terms, case.padded)
    for rival, cost in zip(rivals, costs, strict=True):
        r = (case.family.value(rows.x, rival) - rows.y) * rows.scale
        expected = robust_rows(case.loss, r, case.f_scale).cost.sum()
        assert_sums(cost, expected, expected)
    weight, deviation = rows.scale**2, rows.y - LONG(0.25)
    assert_sums(summary.weight, weight.sum(), weight.sum())
    assert_sums(summary.first, weight @ deviation, weight @ np.abs(deviation))
    assert_sums(summary.second, weight @ deviation**2, weight @ deviation**2)
    size = np.abs(rows.jac) @ np.abs(back)
    squares = size.T @ size
    assert_sums(normal.gram, (jac.T * loss.clamped) @ jac, squares)
    assert_sums(normal.grad, jac.T @ loss.score, size.T @ np.abs(rows.r))
    assert_sums(normal.cost, loss.cost.sum(), loss.cost.sum())
    assert_sums(scores.meat, (jac.T * loss.score**2) @ jac, (size.T * rows.r**2) @ size)
    assert_sums(scores.bread, (jac.T * loss.curvature) @ jac, squares)
    summed = np.stack([(jac.T * loss.score)[:, rows.cluster == c].sum(axis=1) for c in range(4)])
    assert_sums(scores.clusters, summed, size.T @ np.abs(rows.r))
    hessians = case.family.hessians(rows.x, case.params) * rows.scale[:, None, None]
    left_out = np.einsum("i,ijk->jk", loss.score, hessians)
    left_out = back.T @ left_out @ back + (jac.T * (loss.curvature - loss.clamped)) @ jac
    bends = np.abs(back.T) @ np.einsum("i,ijk->jk", np.abs(rows.r), np.abs(hessians)) @ np.abs(back)
    assert_sums(curvature, left_out, bends + squares, eps=1e-13)  # the oracle's own error
    assert int(normal.num_rows) == len(rows.r)
    assert_sums(counts.residual_sum, rows.r.sum(), np.abs(rows.r).sum())
    assert_sums(counts.residual_square, rows.r @ rows.r, rows.r @ rows.r)
    for name in ("num_masked", "num_invalid", "num_bad_sigma", "num_stray"):
        assert int(getattr(counts, name)) == getattr(rows, name), name


test_kernels_are_the_sums_of_the_dense_rows = FEW(given(chunk_cases())(check_kernels))
test_kernels_on_many_chunks = pytest.mark.slow(MANY(given(chunk_cases())(check_kernels)))


def check_reverse_kernels(case: ChunkCase):
    rows = gather(case)
    loss = robust_rows(case.loss, rows.r, case.f_scale)
    vectors = case.whitening[:2]
    kernels = build_reverse_kernels(case.spec)
    padded = case.padded
    with jax.enable_x64(True):
        slope, counts = kernels.gradient(case.params, case.terms, padded, precision="float64")
        products, _ = kernels.products(
            case.params, vectors, case.terms, padded, precision="float64"
        )
    size = np.abs(rows.jac)
    assert_sums(slope.grad, rows.jac.T @ loss.score, size.T @ np.abs(rows.r))
    hessian = (rows.jac.T * loss.clamped) @ rows.jac
    assert_sums(products.products, vectors @ hessian, np.abs(vectors) @ (size.T @ size))
    for sums in (slope, products):
        assert_sums(sums.cost, loss.cost.sum(), loss.cost.sum())
        assert int(sums.num_rows) == len(rows.r)
    assert int(counts.num_invalid) == rows.num_invalid
    if padded.y.ndim == 1:  # one row a tile: no random sign is left in the squares
        with jax.enable_x64(True):
            diagonal = kernels.diagonal(case.params, case.terms, padded)
        assert_sums(diagonal, np.diag(hessian), np.sum(size**2, axis=0))


test_reverse_kernels_are_the_same_sums = FEW(given(chunk_cases())(check_reverse_kernels))
test_reverse_kernels_on_many_chunks = pytest.mark.slow(
    MANY(given(chunk_cases())(check_reverse_kernels))
)


def check_low_precision(case: ChunkCase, precision: str):
    """float32 where it is said; the gradient of "mixed" loses only the derivative's digits."""
    case = replace(case, loss="linear")
    rows = gather(case)
    back = np.linalg.inv(case.whitening)
    jac = rows.jac @ back.astype(LONG)
    with jax.enable_x64(True):
        normal, _ = (
            build_kernels(case.spec)
            .normal_equations(case.params, back, case.terms, case.padded, precision=precision)
            .finish()
        )
    size = np.abs(rows.jac) @ np.abs(back)
    # Of the values that the residuals are differences of.
    values = np.abs(rows.r) + np.abs(rows.y * rows.scale)
    eps = 2.0**-23
    assert normal.gram.dtype == normal.grad.dtype == normal.cost.dtype == np.float64
    assert_sums(normal.gram, jac.T @ jac, size.T @ size, eps)
    if precision == "mixed":
        assert_sums(normal.cost, 0.5 * rows.r @ rows.r, rows.r @ rows.r)
        assert_sums(normal.grad, jac.T @ rows.r, size.T @ np.abs(rows.r), eps)
    else:
        assert_sums(normal.cost, 0.5 * rows.r @ rows.r, np.abs(rows.r) @ values, eps)
        assert_sums(normal.grad, jac.T @ rows.r, size.T @ values, eps)


PRECISIONS = st.sampled_from(["mixed", "float32"])
test_low_precisions_lose_what_they_say = FEW(given(chunk_cases(), PRECISIONS)(check_low_precision))
test_low_precisions_on_many_chunks = pytest.mark.slow(
    MANY(given(chunk_cases(), PRECISIONS)(check_low_precision))
)


# -- whole fits against SciPy on the rows gathered


@dataclass(frozen=True)
class FitCase:
    """Rows of one family, and how they are fitted."""

    family: Family
    x: np.ndarray
    y: np.ndarray
    sigma: np.ndarray
    good: np.ndarray
    p0: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    loss: str = "linear"
    f_scale: float = 1.0
    chunk: int | None = None
    precision: str = "float64"
    absolute_sigma: bool = False
    max_warmup_iterations: int = 0

    @property
    def rows(self) -> np.ndarray:
        finite = np.isfinite(self.x) & np.isfinite(self.y) & np.isfinite(self.sigma)
        return finite & self.good

    def dataset(self) -> xr.Dataset:
        columns = {"x": self.x, "y": self.y, "sigma": self.sigma, "good": self.good}
        ds = xr.Dataset({name: ("row", values) for name, values in columns.items()})
        return ds if self.chunk is None else ds.chunk(row=self.chunk)

    def fit(self, **options: Any):
        config = HybridStreamingConfig(
            max_warmup_iterations=self.max_warmup_iterations,
            precision=self.precision,
            chunk_size=self.chunk,
        )
        given_here = {
            "y": "y",
            "x": "x",
            "sigma": "sigma",
            "where": "good",
            "p0": {"p": self.p0},
            "bounds": {"p": (self.lower, self.upper)},
            "loss": self.loss,
            "f_scale": self.f_scale,
            "absolute_sigma": self.absolute_sigma,
            "config": config,
        }
        return fit_dataset(self.dataset(), self.family.model, **(given_here | options))

    def residual(self, p):
        rows = self.rows
        value = self.family.value(self.x[rows], p)
        return np.asarray((value - self.y[rows]) / self.sigma[rows], float)

    def jacobian(self, p):
        rows = self.rows
        jac = self.family.jacobian(self.x[rows], p) / self.sigma[rows][:, None]
        return np.asarray(jac, float)

    def covariance(self, p):
        """As the loss asks: s²(JᵀJ)⁻¹, or HC1's sandwich; in extended precision."""
        r, jac = self.residual(p).astype(LONG), self.jacobian(p).astype(LONG)
        m, k = jac.shape
        if self.loss == "linear":
            variance = 1.0 if self.absolute_sigma else r @ r / (m - k)
            return inverse(jac.T @ jac) * variance
        rows = robust_rows(self.loss, r, self.f_scale)
        half = inverse((jac.T * rows.curvature) @ jac)
        return half @ (jac.T * rows.score**2) @ jac @ half * m / (m - k)


@st.composite
def fit_cases(draw):
    rng = np.random.default_rng(draw(SEEDS))
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    num_rows = draw(st.sampled_from([200, 1501, 60_000]))
    truth = np.array(family.truth)
    x = rng.uniform(*family.domain, num_rows)
    sigma = rng.uniform(0.05, 0.15, num_rows)
    y = np.asarray(family.value(x, truth), float) + sigma * rng.normal(size=num_rows)
    loss = draw(st.sampled_from(["linear", "linear", "soft_l1", "huber", "cauchy", "arctan"]))
    if loss != "linear":
        y[rng.uniform(size=num_rows) < 0.05] += 1.0
    y[rng.uniform(size=num_rows) < 0.05] = np.nan
    p0 = truth * rng.uniform(0.93, 1.07, len(truth))
    lower, upper = np.full(len(truth), -np.inf), np.full(len(truth), np.inf)
    box = draw(st.sampled_from(["none", "inactive", "active"]))
    if box != "none":
        lower, upper = truth - 1.5 * np.abs(truth), truth + 1.5 * np.abs(truth)
    if box == "active" and loss == "linear":
        lower[0] = truth[0] + 0.1 * abs(truth[0])
        p0[0] = lower[0] + 0.1
    return FitCase(
        family=family,
        x=x,
        y=y,
        sigma=sigma,
        good=rng.uniform(size=num_rows) < 0.9,
        p0=p0,
        lower=lower,
        upper=upper,
        loss=loss,
        f_scale=rng.uniform(1.5, 3.0),
        chunk=draw(st.sampled_from([None, 83, 640])) if num_rows < 5_000 else 9_000,
        precision=draw(st.sampled_from(["float64", "float64", "mixed", "float32"])),
        absolute_sigma=draw(st.booleans()),
        max_warmup_iterations=draw(st.sampled_from([0, 50])),
    )


STANDARD_ERRORS = {"float64": 1e-4, "mixed": 1e-3, "float32": 0.05}


def check_fit(case: FitCase):
    rows = case.rows
    oracle = scipy.optimize.least_squares(
        case.residual,
        case.p0,
        jac=case.jacobian,
        bounds=(case.lower, case.upper),
        loss=case.loss,
        f_scale=case.f_scale,
        x_scale="jac",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        max_nfev=2000,
    )
    result = case.fit()
    assert result.success, result.message
    assert result.num_rows == rows.sum()
    assert result.num_masked == (~rows).sum()
    error = np.sqrt(np.diag(case.covariance(oracle.x)).astype(float))
    assert np.max(np.abs(result.popt - oracle.x) / error) < STANDARD_ERRORS[case.precision]
    np.testing.assert_array_equal(result.active, oracle.active_mask != 0)
    assert result.cost == pytest.approx(oracle.cost, rel=1e-3 if "32" in case.precision else 1e-7)
    expected = case.covariance(result.popt)
    size = np.sqrt(np.diag(expected))
    tolerance = 1e-6 if case.precision == "float64" else 1e-3
    np.testing.assert_allclose(
        (result.pcov / np.outer(size, size)).astype(float),
        (expected / np.outer(size, size)).astype(float),
        atol=tolerance,
    )


test_fits_are_scipys = settings(FEW, max_examples=2)(given(fit_cases())(check_fit))
test_many_fits_are_scipys = pytest.mark.slow(MANY(given(fit_cases())(check_fit)))
