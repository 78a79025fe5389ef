"""Fits without a matrix, against sparse and dense solutions of the same problems."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp
import scipy.sparse.linalg
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import problems
from config_rows_many import ROWS, cubic, hat
from nlsq_dask import HybridStreamingConfig, fit_dataset
from nlsq_dask.errors import CovarianceError
from nlsq_dask.evaluate.base import Request
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.evaluate.shards import cut_slabs
from nlsq_dask.kernels.width import elements_per_row
from nlsq_dask.model import Model
from nlsq_dask.solvers.conjugate import Limits, begin, minimize_quadratic
from nlsq_dask.sources.base import Chunk
from nlsq_dask.status import Status

K = 5000
NOISE = 0.3
MATRIX_FREE = HybridStreamingConfig(cg_param_threshold=1)


# -- conjugate gradients, without data


def solve_box(hessian, grad, box, approximate, radius=np.inf, tolerance=1e-12):
    """And how many products that took."""
    diagonal = np.diag(approximate)

    def by_diagonal(residual, low, high):
        return np.clip(residual / diagonal, low, high)

    def precondition(residual, low, high):
        inner = begin(-residual, (low, high), np.sqrt(diagonal), by_diagonal)
        limits = Limits(max_products=500, tolerance=1e-6 * inner.first_length)
        return minimize_quadratic(lambda v: v @ approximate, inner, by_diagonal, limits).step

    start = begin(grad, box, np.sqrt(diagonal), precondition)
    limits = Limits(max_products=200, tolerance=tolerance * start.first_length, radius=radius)
    return minimize_quadratic(lambda v: v @ hessian, start, precondition, limits)


def random_quadratic(rng, k):
    jac = rng.normal(size=(2 * k + 3, k))
    noise = 0.3 * rng.normal(size=jac.shape)
    return jac.T @ jac, jac.T @ rng.normal(size=len(jac)), (jac + noise).T @ (jac + noise)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 40))
def test_minimum_in_a_box_is_that_of_a_dense_solver(seed, k):
    rng = np.random.default_rng(seed)
    hessian, grad, approximate = random_quadratic(rng, k)
    box = -rng.exponential(0.1, k), rng.exponential(0.1, k)
    solved = solve_box(hessian, grad, box, approximate)
    factor = np.linalg.cholesky(hessian)
    expected = scipy.optimize.lsq_linear(
        factor.T, -np.linalg.solve(factor, grad), bounds=box, method="bvls", tol=1e-15
    )
    np.testing.assert_allclose(solved.step, expected.x, atol=1e-8)
    np.testing.assert_allclose(solved.image, hessian @ solved.step, atol=1e-8)
    assert np.all((solved.step >= box[0]) & (solved.step <= box[1]))
    assert solved.num_products < 10 + k


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 20), radius=st.floats(1e-3, 1.0))
def test_trust_region_holds_and_the_quadratic_falls(seed, k, radius):
    rng = np.random.default_rng(seed)
    hessian, grad, approximate = random_quadratic(rng, k)
    box = np.full(k, -np.inf), np.full(k, np.inf)
    solved = solve_box(hessian, grad, box, approximate, radius=radius)
    scale = np.sqrt(np.diag(approximate))
    length = np.linalg.norm(scale * solved.step)
    assert length <= radius * (1 + 1e-9)
    assert solved.is_cut == (length > radius * (1 - 1e-9))
    # Cauchy's point along the scaled gradient, cut at the radius, is no lower by far.
    down = -grad / scale**2
    along = min(radius / np.linalg.norm(scale * down), (down @ -grad) / (down @ hessian @ down))
    cauchy = -along * (down @ grad) - 0.5 * along**2 * (down @ hessian @ down)
    assert solved.reduction >= 0.2 * cauchy
    step = solved.step
    assert solved.reduction == pytest.approx(-step @ (grad + 0.5 * hessian @ step))


def test_directions_without_curvature_end_the_solve():
    hessian = np.diag([1.0, 0.0])
    box = np.full(2, -np.inf), np.full(2, np.inf)
    solved = solve_box(hessian, np.array([1.0, 0.0]), box, np.eye(2))
    np.testing.assert_allclose(solved.step, [-1.0, 0.0])


# -- 5,000 coefficients


def hat_matrix(x, k):
    i = np.clip(np.floor(x).astype(int), 0, k - 2)
    rows, share = np.tile(np.arange(len(x)), 2), x - i
    return sp.csr_matrix(
        (np.concatenate([1 - share, share]), (rows, np.concatenate([i, i + 1]))), (len(x), k)
    )


@pytest.fixture(scope="module")
def hats():
    """Rows, and the normal equations by SciPy's sparse matrices."""
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, K - 1, 200_000))
    matrix = hat_matrix(x, K)
    y = matrix @ np.sin(np.arange(K) / 50) + NOISE * rng.normal(size=len(x))
    ds = xr.Dataset({"y": ("row", y)}, coords={"x": ("row", x)})
    return ds, (matrix.T @ matrix).tocsc(), matrix.T @ y


def in_standard_errors(way, gram):
    """The largest over all directions."""
    return float(np.sqrt(way @ (gram @ way))) / NOISE


def test_linear_model_of_5000_parameters_is_the_sparse_solution(hats, tmp_path):
    ds, gram, moment = hats
    expected = scipy.sparse.linalg.spsolve(gram, moment)
    ds.chunk(row=50_000).to_zarr(tmp_path / "a.zarr", consolidated=False)
    for data in (ds, str(tmp_path / "a.zarr")):
        result = fit_dataset(data, hat, p0={"c": np.zeros(K)})
        assert result.success
        assert in_standard_errors(result.popt - expected, gram) < 2e-6
        assert result.num_passes <= 18
        assert result.num_passes == len(result.history)
        kinds = [record.is_product for record in result.history]
        assert kinds[:2] == [False, True]
        assert result.r_squared > 0.5
    assert "4,900 more" in result.summary()
    assert len(repr(result)) < 1000


def test_bounds_that_hold_a_thousand_parameters(hats):
    """And no array of k x k elements on the way."""
    ds, gram, moment = hats
    lower, upper = 0.0, 0.7
    tracemalloc.start()
    result = fit_dataset(ds, hat, p0={"c": np.full(K, 0.5)}, bounds={"c": (lower, upper)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.success
    assert np.all((result.popt > lower) & (result.popt < upper))
    gradient = gram @ result.popt - moment
    at_lower, at_upper = result.popt < lower + 1e-6, result.popt > upper - 1e-6
    held = at_lower | at_upper
    assert at_lower.sum() > 1000
    assert at_upper.sum() > 500
    np.testing.assert_array_equal(result.active, held)
    assert np.all(gradient[at_lower] > 0)
    assert np.all(gradient[at_upper] < 0)
    way = np.zeros(K)
    way[~held] = scipy.sparse.linalg.spsolve(gram[~held][:, ~held], gradient[~held])
    assert in_standard_errors(way, gram) < 1e-3
    assert result.num_passes <= 25
    assert peak < 8 * K**2 / 4  # NumPy's arrays
    home = ProblemHome(problem=result.session.problem, cache_bytes=0, prefetch=False)
    assert home.prepare("float64") < 8 * K**2 / 4  # XLA's


def test_what_needs_a_covariance_says_that_there_is_none():
    ds = xr.Dataset({"y": ("row", Y), "t": ("row", T)})
    result = fit_dataset(ds, problems.decay, y="y", x="t", p0=problems.P0, config=MATRIX_FREE)
    assert result.pcov is None
    assert result.perr is None
    assert result["perr"] is None
    assert np.isnan(result.rank)
    assert np.isnan(result.condition_number)
    assert any("no covariance" in text for text in result.diagnostics["notes"])
    assert "rate" in result.summary()
    for ask in (
        lambda: result.covariance,
        lambda: result.correlation,
        result.confidence_interval,
        lambda: result.confidence_interval(method="profile"),
    ):
        with pytest.raises(CovarianceError, match="cg_param_threshold"):
            ask()


@pytest.mark.slow
def test_the_sample_takes_fewer_passes_than_the_diagonal():
    """Cubic B-splines: what neighbours share is more than a diagonal can say."""
    rng = np.random.default_rng(2)
    x = rng.uniform(0, 1997, 100_000)
    ds = xr.Dataset({"y": ("row", np.sin(x / 50))}, coords={"x": ("row", x)})
    ds["y"] += NOISE * rng.normal(size=len(x))

    def passes(regularization):
        config = HybridStreamingConfig(distance_tol=1e-3, regularization_factor=regularization)
        result = fit_dataset(ds, cubic, p0={"c": np.zeros(2000)}, config=config)
        assert result.success
        return result.num_passes

    # With so much of it, nothing but the diagonal counts.
    assert 2 * passes(1e-10) < passes(1e6)


# -- every kind of problem, against the dense path

T, Y = problems.make_decay(60_000)
OUTLIERS = Y + np.where(np.arange(len(Y)) % 20 == 0, 5.0, 0.0)
MASKED = np.where(np.arange(len(Y)) % 7 == 0, np.nan, Y)
SIGMA = np.where(T > 5, 0.2, np.where(np.arange(len(T)) % 11 == 0, np.nan, 0.1))
GROUPS = {
    "enable_group_variance_regularization": True,
    "group_variance_indices": ((0, 2),),
    "group_variance_lambda": 1e-5,
}
TIED = {
    "ties": {"offset": lambda amplitude: 0.05 * amplitude},
    "p0": {"amplitude": 1.0, "rate": 1.0},
}
CASES = {
    "far": {"p0": {"amplitude": 8.0, "rate": 2.0, "offset": -1.0}},
    "masked": {"y": MASKED, "sigma": "sigma"},
    "robust": {"y": OUTLIERS, "loss": "cauchy", "f_scale": 0.2},
    "held": {"bounds": {"rate": (0.55, 5), "amplitude": (None, 5)}},
    "tied": {**TIED, "priors": {"offset": (0.11, 1e-3)}, "absolute_sigma": True},
    "fixed": {"fixed": ("offset",), "config": {**GROUPS, "precision": "mixed"}},
}


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("robust", "tied") else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
def test_small_problems_come_out_as_with_normal_equations(case):
    given_here = {"p0": problems.P0, **CASES[case]}
    y, options = given_here.pop("y", Y), {"max_warmup_iterations": 0}
    options |= given_here.pop("config", {})
    ds = xr.Dataset({"y": ("row", y), "t": ("row", T), "sigma": ("row", SIGMA)})
    dense = fit_dataset(
        ds, problems.decay, y="y", x="t", config=HybridStreamingConfig(**options), **given_here
    )
    config = HybridStreamingConfig(cg_param_threshold=1, **options)
    result = fit_dataset(ds, problems.decay, y="y", x="t", config=config, **given_here)
    assert dense.success
    assert result.success
    assert problems.Oracle(dense.popt, dense.pcov).distance(result.popt) < 1e-3
    assert result.cost == pytest.approx(dense.cost, rel=1e-9)
    assert result.num_rows == dense.num_rows
    np.testing.assert_array_equal(result.active, dense.active)


def test_scale_from_the_sample():
    y = OUTLIERS[::30]
    ds = xr.Dataset({"y": ("row", y), "t": ("row", T[::30])})
    result = fit_dataset(
        ds,
        problems.decay,
        p0=problems.P0,
        loss="huber",
        f_scale="mad",
        config=HybridStreamingConfig(cg_param_threshold=1, max_passes=1),
    )
    residuals = y - problems.decay_numpy(T[::30], problems.TRUTH)
    assert result.f_scale == pytest.approx(1.4826 * np.median(np.abs(residuals)), rel=0.05)


# -- kernels


def separable(t, z, c, slope):
    return c[jnp.clip(t.astype(jnp.int32), 0, 4)] * jnp.log(z) + slope * jnp.sqrt(t * z)


def test_products_are_those_of_the_matrix_and_masked_rows_give_no_nan():
    """`log` and `sqrt` are undefined where rows are masked: by `where`, by y and by sigma."""
    rng = np.random.default_rng(3)
    t, z = np.linspace(0.1, 4.9, 40), np.linspace(-1, 2, 30)
    y, sigma = rng.normal(size=(40, 30)), rng.uniform(0.5, 2, size=(40, 30))
    y[::3, 20], sigma[5, 25] = np.nan, np.nan
    is_wanted = np.broadcast_to(z > 0, y.shape)
    dims = ("t", "z")
    ds = xr.Dataset(
        {"y": (dims, y), "sigma": (dims, sigma), "ok": (dims, is_wanted)},
        coords={"t": t, "z": z},
    )
    result = fit_dataset(
        ds,
        separable,
        y="y",
        sigma="sigma",
        where="ok",
        p0={"c": np.zeros(5), "slope": 0.1},
        loss="cauchy",
        config=MATRIX_FREE,
    )
    assert result.success
    session = result.session
    home = ProblemHome(problem=session.problem, cache_bytes=0, prefetch=False)
    params, vectors = rng.normal(size=6), rng.normal(size=(2, 6))
    leaves = range(session.problem.source.num_chunks)
    summed = {}
    for kind, given_vectors in (("slope", None), ("products", vectors)):
        request = Request(params=params, terms=session.terms, vectors=given_vectors)
        nodes = home.reduce(leaves, request).nodes.values()
        summed[kind] = sum(list(nodes)[1:], start=next(iter(nodes)))
    kept = is_wanted & np.isfinite(y) & np.isfinite(sigma)
    rows, columns = np.nonzero(kept)
    tt, zz, s = t[rows], z[columns], sigma[kept]
    jac = np.zeros((len(tt), 6))
    jac[np.arange(len(tt)), tt.astype(int)] = np.log(zz)
    jac[:, 5] = np.sqrt(tt * zz)
    residual = (jac @ params - y[kept]) / s
    jac /= s[:, None]
    u = residual**2
    clamped = np.maximum(1 / (1 + u) - 2 * u / (1 + u) ** 2, 1e-12)
    slope, products = summed["slope"].slope, summed["products"].products
    assert slope.cost == pytest.approx(0.5 * np.sum(np.log1p(u)))
    np.testing.assert_allclose(slope.grad, jac.T @ (residual / (1 + u)))
    np.testing.assert_allclose(products.products, vectors @ (jac.T * clamped) @ jac)
    assert slope.num_rows == products.num_rows == kept.sum()


def test_tiles_follow_the_width_of_the_model():
    def wide(x, c):
        return jnp.sum(c * jnp.cos(x[..., None] * jnp.arange(c.shape[0])), axis=-1)

    def looped(x, c):
        return jax.lax.map(lambda row: wide(row[None], c)[0], x)

    for function, width in ((wide, 300), (hat, 1)):
        model = Model(function=function, variables=("x",), parameters=("c",))
        assert elements_per_row(model, [(1000,)], [np.zeros(300)]) == width
    model = Model(function=looped, variables=("x",), parameters=("c",))
    assert elements_per_row(model, [(1000,)], [np.zeros(300)]) == 1


# -- the course of a fit


def test_parameters_that_no_row_depends_on_are_reported():
    ds = xr.Dataset({"y": ("row", np.sin(T) + 0.1 * (Y - Y.mean())), "x": ("row", T)})
    with pytest.warns(scipy.optimize.OptimizeWarning, match=r"no row depends on 9 of 20.*c\[11\]"):
        result = fit_dataset(ds, hat, y="y", x="x", p0={"c": np.ones(20)}, config=MATRIX_FREE)
    assert result.status is Status.UNIDENTIFIED
    assert not result.success
    np.testing.assert_array_equal(result.popt[11:], 1.0)
    matrix = hat_matrix(T, 11)
    expected = np.linalg.lstsq(matrix.toarray(), ds["y"].values, rcond=None)[0]
    np.testing.assert_allclose(result.popt[:11], expected, rtol=1e-7)


def test_every_product_counts_as_a_pass(hats):
    ds, _, _ = hats
    seen = []
    result = fit_dataset(
        ds,
        hat,
        p0={"c": np.zeros(K)},
        config=HybridStreamingConfig(max_passes=4),
        callback=seen.append,
    )
    assert result.status is Status.MAX_PASSES
    assert [record.is_product for record in seen] == [False, True, True, True]
    assert [record.num_passes for record in seen] == [1, 2, 3, 4]
    assert "conjugate gradients" in str(seen[1])


def test_the_same_bits_on_a_cluster(tmp_path, client):
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 29, 200_000)
    y = np.cos(x) + 0.1 * rng.normal(size=len(x))
    ds = xr.Dataset({"y": ("row", y), "x": ("row", x)})
    ds.chunk(row=20_000).to_zarr(tmp_path / "a.zarr", consolidated=False)
    options = {"y": "y", "x": "x", "p0": {"c": np.zeros(30)}, "config": MATRIX_FREE}
    here = fit_dataset(str(tmp_path / "a.zarr"), hat, **options)
    there = fit_dataset(str(tmp_path / "a.zarr"), hat, client=client, **options)
    assert "cluster" in there.diagnostics["evaluator"]
    np.testing.assert_array_equal(here.popt, there.popt)
    assert here.num_passes == there.num_passes


def test_a_covariance_that_cannot_be_is_refused():
    ds = xr.Dataset({"y": ("row", Y), "t": ("row", T)})
    with pytest.raises(ValueError, match="`covariance` and `cluster` must be left out"):
        fit_dataset(ds, problems.decay, y="y", x="t", covariance="HC1", config=MATRIX_FREE)


# -- devices that share a leaf

SHARED = """
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from nlsq_dask import HybridStreamingConfig, fit_dataset
from nlsq_dask.evaluate.base import Request
from nlsq_dask.evaluate.leaves import ProblemHome


class Watched(ProblemHome):
    def _dispatch(self, chunk, request):
        sums = super()._dispatch(chunk, request)
        used.append(sums.normal.cost.devices())
        return sums


def model(t, z, a, b):
    return a * jnp.sin(t) + b * z


def reduced():
    home = Watched(problem=problem, cache_bytes=0, prefetch=False)
    n = problem.space.size
    params, vectors = np.linspace(1, 2, n), np.ones((1, n))
    kinds = {"directions": np.eye(n)}, {}, {"vectors": vectors}
    parts = []
    for kind in kinds:
        request = Request(params=params, terms=result.session.terms, center=0.0, **kind)
        nodes = home.reduce(range(problem.source.num_chunks), request).nodes
        parts += jax.tree.leaves(nodes[max(nodes)])
    return np.concatenate([np.ravel(part) for part in parts])


rng = np.random.default_rng(0)
t, z = np.linspace(0, 3, 1001), np.linspace(0, 1, 97)
y = np.sin(t)[:, None] + 0.5 * z + 0.1 * rng.normal(size=(1001, 97))
y[17] = np.nan
ds = xr.Dataset({"y": (("t", "z"), y)}, coords={"t": t, "z": z})
fits = {}
for shared in (True, False):
    config = HybridStreamingConfig(enable_multi_device=shared, cg_param_threshold=1)
    result = fits[shared] = fit_dataset(ds, model, config=config)
    problem, used = result.session.problem, []
    if shared:
        two = jax.local_devices()
        assert len(two) == 2
        assert problem.plan.num_shards == 2
        on_two = reduced()
        assert used == [{two[0]}, {two[1]}] * (len(used) // 2), used
        jax.local_devices, used = lambda: two[:1], []
        on_one = reduced()
        assert {device for devices in used for device in devices} == {two[0]}
        np.testing.assert_array_equal(on_two, on_one)
        jax.local_devices = lambda: two
    else:
        np.testing.assert_allclose(reduced(), on_two, rtol=1e-10)
np.testing.assert_allclose(fits[True].popt, fits[False].popt, rtol=1e-10)
assert fits[True].num_rows == 1000 * 97
"""


@pytest.mark.slow
def test_two_devices_of_a_process_share_each_leaf():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARED],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(10,), (7,), (1,), (2, 5), (1, 6)])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_slabs_hold_each_row_once(shape, num_shards):
    y = np.arange(np.prod(shape), dtype=float).reshape(shape)
    x = np.arange(shape[-1], dtype=float).reshape((1,) * (len(shape) - 1) + shape[-1:])
    extent = np.array(shape) - (np.array(shape) > 1)
    slabs = cut_slabs(Chunk(x=(x,), y=y, extent=extent), num_shards)
    assert len(slabs) == num_shards
    rows = [
        np.stack(np.broadcast_arrays(slab.y, *slab.x))[:, *map(slice, slab.extent)].reshape(2, -1)
        for slab in slabs
    ]
    found = np.concatenate(rows, axis=1)
    expected = np.stack(np.broadcast_arrays(y, x))[:, *map(slice, extent)].reshape(2, -1)
    np.testing.assert_array_equal(found[:, np.argsort(found[0])], expected)


@pytest.mark.parametrize(("field", "shows"), ROWS)
def test_options_change_what_they_say(field, shows):
    assert shows(), field
