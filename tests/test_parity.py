"""The same answer as SciPy on the gathered data, for every source, with and without a cluster."""

from __future__ import annotations

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import curve_fit, fit_dataset

NUM_ROWS = 120_000
CHUNK = 25_000


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Weights, masked rows and all, as a dataset and as stores."""
    t, y = problems.make_decay(NUM_ROWS)
    rng = np.random.default_rng(5)
    sigma = rng.uniform(0.5, 2.0, NUM_ROWS)
    good = rng.uniform(size=NUM_ROWS) > 0.1
    y = y * 1.0
    y[rng.integers(0, NUM_ROWS, 500)] = np.nan
    ds = xr.Dataset(
        {"t": ("row", t), "y": ("row", y), "sigma": ("row", sigma), "good": ("row", good)}
    )
    folder = tmp_path_factory.mktemp("stores")
    chunked = ds.chunk(row=CHUNK)
    chunked.to_zarr(folder / "table.zarr", consolidated=False)
    encoding = {name: {"chunksizes": (CHUNK,)} for name in ds.data_vars}
    ds.to_netcdf(folder / "table.nc", engine="h5netcdf", encoding=encoding)
    return ds, folder


def open_as(kind, table):
    ds, folder = table
    return {
        "memory": lambda: ds,
        "dask": lambda: ds.chunk(row=CHUNK),
        "open_zarr": lambda: xr.open_zarr(folder / "table.zarr", consolidated=False),
        "lazy": lambda: xr.open_dataset(folder / "table.nc", engine="h5netcdf"),
        "zarr path": lambda: folder / "table.zarr",
        "netcdf path": lambda: str(folder / "table.nc"),
    }[kind]()


KINDS = ["memory", "dask", "open_zarr", "lazy", "zarr path", "netcdf path"]
BOUNDS = {"inactive": {"rate": (0, 5)}, "active": {"offset": (0.2, 5.0), "rate": (0, 5)}}


@pytest.mark.parametrize(
    "where_computed", ["here", pytest.param("cluster", marks=pytest.mark.cluster)]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_same_as_scipy(kind, bounds, where_computed, table, request):
    client = request.getfixturevalue("client") if where_computed == "cluster" else None
    ds, _ = table
    used = (ds.good & np.isfinite(ds.y)).values
    limits = {
        "inactive": ([-np.inf, 0, -np.inf], [np.inf, 5, np.inf]),
        "active": ([-np.inf, 0, 0.2], [np.inf, 5, 5.0]),
    }[bounds]
    oracle = problems.scipy_decay(
        ds.t.values[used], ds.y.values[used], ds.sigma.values[used], True, bounds=limits
    )
    p0 = dict(problems.P0, offset=0.4)
    result = fit_dataset(
        open_as(kind, table),
        problems.decay,
        y="y",
        p0=p0,
        sigma="sigma",
        absolute_sigma=True,
        where="good",
        bounds=BOUNDS[bounds],
        client=client,
    )
    assert result.success
    assert result.num_rows == used.sum()
    assert result.num_masked == NUM_ROWS - used.sum()
    assert result.active.tolist() == [False, False, bounds == "active"]
    assert oracle.distance(result.popt) < 1e-5
    np.testing.assert_allclose(result.pcov, oracle.pcov, rtol=1e-6)


@pytest.mark.parametrize("kind", ["numpy", "jax", "dask"])
def test_curve_fit_is_scipys(kind):
    t, y = problems.make_decay(5_000)
    oracle = problems.scipy_decay(t, y)
    convert = {
        "numpy": np.asarray,
        "jax": lambda values: jnp.asarray(values),
        "dask": lambda values: da.from_array(values, chunks=777),
    }[kind]
    if kind == "jax":  # float32 outside of 64-bit mode: the oracle must see the same numbers
        oracle = problems.scipy_decay(t.astype(np.float32), y.astype(np.float32))
    popt, pcov = curve_fit(problems.decay, convert(t), convert(y), [1.0, 1.0, 0.0])
    assert oracle.distance(popt) < 1e-5
    np.testing.assert_allclose(pcov, oracle.pcov, rtol=1e-6)


def test_degree_twelve_polynomial(tmp_path):
    """cond(J) of 1e10: JᵀJ alone would not have a digit."""
    check_polynomial(None)


@pytest.mark.cluster
def test_degree_twelve_polynomial_on_a_cluster(client):
    check_polynomial(client)


def check_polynomial(client):
    x = np.linspace(0.0, 4.0, 20_000)
    truth = np.array([(-1.0) ** j / (j + 1) for j in range(13)])
    rng = np.random.default_rng(2)
    vandermonde = np.stack([x.astype(np.longdouble) ** j for j in range(13)], axis=-1)
    y = np.asarray(vandermonde @ truth, np.float64) + 1e-3 * rng.normal(size=x.size)
    assert np.linalg.cond(vandermonde.astype(np.float64)) > 1e10
    expected = problems.solve_in_longdouble(vandermonde, y)

    def polynomial(x, c):
        return sum(c[j] * x**j for j in range(13))

    source = xr.Dataset({"y": ("row", y), "x": ("row", x)}).chunk(row=3_000)
    result = fit_dataset(source, polynomial, y="y", x="x", p0={"c": np.zeros(13)}, client=client)
    assert result.success
    np.testing.assert_allclose(result["c"], expected, rtol=1e-6)
