"""Predictions: lazy, labelled, and computed where the blocks are."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import cftime
import dask
import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import xarray as xr
from distributed import Client

import problems
from nlsq_dask import curve_fit, fit_dataset
from nlsq_dask.optimizer import AdaptiveHybridStreamingOptimizer
from nlsq_dask.results import rows

TIME = np.datetime64("2001-03-01", "ns") + np.arange(50) * np.timedelta64(12, "h")
DEPTH = np.linspace(0.0, 5.0, 6)
TRUTH = {"amplitude": 2.0, "rate": 0.05, "slope": 0.3}


def cooling(time, depth, amplitude, rate, slope):
    return amplitude * jnp.exp(-rate * time) + slope * depth


def cooling_numpy(days, depth, p):
    return p["amplitude"] * np.exp(-p["rate"] * days) + p["slope"] * depth


def make_archive(num_stations=4):
    rng = np.random.default_rng(3)
    days = np.arange(50) / 2
    value = cooling_numpy(days[:, None, None], DEPTH[:, None], TRUTH) + np.zeros(num_stations)
    value = value + 0.05 * rng.normal(size=value.shape)
    return xr.Dataset(
        {"temperature": (("time", "depth", "station"), value, {"units": "K"})},
        coords={
            "time": TIME,
            "depth": ("depth", DEPTH, {"units": "m"}),
            "name": ("station", [f"s{i}" for i in range(num_stations)]),
        },
    )


@pytest.fixture(scope="module")
def archive():
    return make_archive()


@pytest.fixture(scope="module")
def result(archive):
    return fit_dataset(archive, cooling, y="temperature", p0={"rate": 0.1})


def expected(result, archive):
    days = (archive.time.values - TIME[0]) / np.timedelta64(1, "D")
    value = cooling_numpy(days[:, None], archive.depth.values, result)
    return xr.DataArray(value, dims=("time", "depth")).broadcast_like(
        archive.temperature.drop_vars(list(archive.coords))
    )


# -- what it is


def test_a_prediction_is_lazy_and_has_the_labels_of_the_data(archive, result):
    predicted = result.predict()
    assert isinstance(predicted.data, da.Array)
    assert predicted.dtype == np.float64
    assert predicted.attrs == {"units": "K"}
    assert predicted.dims == archive.temperature.dims
    xr.testing.assert_identical(predicted.coords.to_dataset(), archive.coords.to_dataset())
    np.testing.assert_allclose(predicted, expected(result, archive), rtol=1e-14)
    xr.testing.assert_identical(result.predict(archive).compute(), predicted.compute())


def test_its_blocks_are_those_of_the_data(archive, result):
    chunked = archive.chunk(time=17, depth=4, station=1)
    predicted = result.predict(chunked)
    assert predicted.chunks == chunked.temperature.chunks
    np.testing.assert_allclose(predicted, result.predict(), rtol=1e-15)  # vector units differ


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_a_store_is_opened_lazily_in_its_own_blocks(archive, result, tmp_path, suffix):
    path = tmp_path / f"archive.{suffix}"
    shape = (20, 6, 3)
    if suffix == "zarr":
        archive.to_zarr(path, zarr_format=2, encoding={"temperature": {"chunks": shape}})
    else:
        encoding = {"temperature": {"chunksizes": shape}}
        archive.to_netcdf(path, engine="h5netcdf", encoding=encoding)
    for predicted in (
        fit_dataset(path, cooling, y="temperature", p0={"rate": 0.1}).predict(),
        result.predict(path),
        result.predict(str(path)),
    ):
        assert predicted.chunks == ((20, 20, 10), (6,), (3, 1))
        np.testing.assert_allclose(predicted, expected(result, archive), rtol=1e-6)
        assert predicted.sel(time="2001-03-02").sizes["time"] == 2
    np.testing.assert_array_equal(
        result.residuals(path), archive.temperature - result.predict(path)
    )


def test_what_does_not_depend_on_a_dimension_is_computed_once(archive):
    fit = fit_dataset(
        archive, lambda time, a, r: a * jnp.exp(-r * time), y="temperature", p0={"r": 0.1}
    )
    predicted = fit.predict(archive.chunk(time=10, depth=2, station=1))
    assert predicted.shape == (50, 6, 4)
    kernels = [key for key in dict(predicted.data.dask) if "nlsq-prediction" in str(key)]
    assert len(kernels) == 5  # blocks of time, not those of the result, of which there are 60
    strides = predicted.data.map_blocks(lambda block: np.full((1, 1, 1), max(block.strides[1:])))
    assert not strides.compute().any()  # looked at from there, not expanded


def test_new_coordinates_have_dimensions_of_their_own(result):
    later = xr.Dataset(coords={"time": TIME[:3] + np.timedelta64(400, "D"), "depth": [10.0, 20.0]})
    predicted = result.predict(later)
    days = 400 + np.arange(3) / 2  # since the first value of the fit, not of these
    value = cooling_numpy(days[:, None], np.array([10.0, 20.0]), result)
    assert predicted.dims == ("time", "depth")
    assert isinstance(predicted.data, da.Array)
    np.testing.assert_allclose(predicted, value, rtol=1e-14)
    np.testing.assert_allclose(result.predict(later.isel(depth=0)), value[:, 0], rtol=1e-14)
    everything = xr.Dataset({"depth": ("time", [1.0, 2.0, 3.0])}, coords={"time": TIME[:3]})
    along = result.predict(everything)
    assert along.dims == ("time",)
    np.testing.assert_allclose(
        along, cooling_numpy(np.arange(3) / 2, np.array([1.0, 2.0, 3.0]), result), rtol=1e-14
    )


def test_calendars_are_those_of_the_fit():
    t, y = problems.make_decay(60)
    times = cftime.num2date(t, "days since 2000-02-28", calendar="360_day")
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": times})
    fit = fit_dataset(ds, problems.decay, y="y", p0=problems.P0)
    part = ds.isel(t=slice(40, None))
    np.testing.assert_allclose(
        fit.predict(part.drop_vars("y")), problems.decay_numpy(t[40:], fit.popt), rtol=1e-12
    )
    with pytest.raises(ValueError, match="times of cftime in 't'"):
        fit.predict(xr.Dataset(coords={"t": np.arange(3.0)}))


def test_dimensions_without_coordinates_are_counted():
    ds = xr.Dataset({"y": ("i", 3.0 + 2.0 * np.arange(30))})
    fit = fit_dataset(ds, lambda i, a, b: a + b * i, y="y")
    np.testing.assert_allclose(fit.predict(xr.Dataset({"z": ("i", np.zeros(3))})), [3, 5, 7])


def test_a_model_without_variables_is_constant():
    ds = xr.Dataset({"y": ("i", np.array([1.0, 2.0, 6.0]))})
    fit = fit_dataset(ds, lambda level: level, x=[], y="y")
    np.testing.assert_allclose(fit.predict(), [3.0, 3.0, 3.0])
    assert float(fit.prediction_band().standard_error[0]) == pytest.approx(fit.perr[0])


# -- residuals


def test_residuals_are_y_less_the_model(archive, result):
    residuals = result.residuals()
    assert residuals.name == "residuals"
    assert isinstance(residuals.data, da.Array)
    np.testing.assert_allclose(residuals, result.fun, atol=1e-14)
    np.testing.assert_array_equal(residuals, archive.temperature - result.predict())
    other = archive.isel(time=slice(5, 9))
    xr.testing.assert_identical(
        result.residuals(other).compute(), residuals.isel(time=slice(5, 9)).compute()
    )
    with pytest.raises(ValueError, match="'temperature', which was fitted"):
        result.residuals(archive[["time", "depth"]])


def test_what_was_fitted_may_be_no_part_of_the_dataset(archive, result):
    ds = archive.drop_vars("temperature")
    fit = fit_dataset(ds, cooling, y=archive.temperature, p0={"rate": 0.1})
    np.testing.assert_array_equal(fit.residuals(), result.residuals())
    assert fit.predict().shape == archive.temperature.shape


def test_rows_that_were_left_out_are_predicted_too(archive):
    holed = archive.copy(deep=True)
    holed.temperature[3, 2, 1] = np.nan
    fit = fit_dataset(holed, cooling, y="temperature", p0={"rate": 0.1})
    assert np.isfinite(fit.predict()).all()
    assert int(np.isnan(fit.residuals()).sum()) == 1


# -- arrays


def test_after_a_fit_of_arrays_x_is_given_as_it_was_there():
    t, y = problems.make_decay(300)
    start = list(problems.P0.values())
    *_, information, _, _ = curve_fit(problems.decay, t, y, start, full_output=True)
    fit = information["result"]
    value = problems.decay_numpy(t, fit.popt)
    np.testing.assert_allclose(fit.predict(), value, rtol=1e-14)
    np.testing.assert_array_equal(fit.predict(t[5:9]), fit.predict()[5:9])
    lazy = fit.predict(da.from_array(t, chunks=100))
    assert lazy.chunks == ((100, 100, 100),)
    np.testing.assert_array_equal(lazy, fit.predict())
    np.testing.assert_allclose(fit.residuals(), y - value, atol=1e-15)
    with pytest.raises(ValueError, match=r"shape \(m,\)"):
        fit.predict(np.zeros((2, 3)))


@pytest.mark.parametrize("layout", ["scipy", "nlsq"])
def test_stacked_variables_keep_their_layout(layout):
    rng = np.random.default_rng(0)
    x = rng.random((2, 200))
    y = 2 * x[0] + 3 * x[1]
    if layout == "scipy":
        *_, information, _, _ = curve_fit(
            lambda x, a, b: a * x[0] + b * x[1], x, y, [1, 1], full_output=True
        )
        fit = information["result"]
    else:
        x = x.T
        optimizer = AdaptiveHybridStreamingOptimizer()
        fit = optimizer.fit((x, y), lambda x, a, b: a * x[:, 0] + b * x[:, 1], p0=[1, 1])
    np.testing.assert_allclose(fit.predict(x), y, rtol=1e-9)
    np.testing.assert_allclose(fit.predict(), y, rtol=1e-9)
    with pytest.raises(ValueError, match="as in the fit, got shape"):
        fit.predict(x.T)


# -- the band


def band_by_hand(fit, jacobian, level):
    error = np.sqrt(np.einsum("...i,ij,...j", jacobian, fit.pcov, jacobian))
    return error, scipy.stats.t.ppf(0.5 + level / 2, fit.dof) * error


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_band_is_that_of_the_delta_method(level):
    t, y = problems.make_decay(300)
    ds = xr.Dataset({"y": ("t", y, {"units": "V"})}, coords={"t": t})
    fit = fit_dataset(ds, problems.decay, y="y", p0=problems.P0)
    band = fit.prediction_band(level=level)
    assert all(isinstance(array.data, da.Array) for array in band.data_vars.values())
    error, reach = band_by_hand(fit, problems.decay_jacobian(t, fit.popt), level)
    value = problems.decay_numpy(t, fit.popt)
    np.testing.assert_allclose(band.standard_error, error, rtol=1e-9)
    np.testing.assert_allclose(band.prediction, value, rtol=1e-14)
    np.testing.assert_allclose(band.lower, value - reach, rtol=1e-10)
    np.testing.assert_allclose(band.upper, value + reach, rtol=1e-10)
    assert band.lower.attrs == {"units": "V"}
    assert band.attrs == {"level": level}
    with pytest.raises(ValueError, match="`level`"):
        fit.prediction_band(level=95)


def test_held_and_tied_parameters_move_as_they_may():
    t, y = problems.make_decay(300)
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": t})
    fit = fit_dataset(
        ds,
        problems.decay,
        y="y",
        p0={"rate": 0.5},
        fixed=["rate"],
        ties={"offset": lambda amplitude: 0.05 * amplitude},
    )
    gradient = np.exp(-0.5 * t) + 0.05
    np.testing.assert_allclose(
        fit.prediction_band().standard_error, gradient * fit.perr[0], rtol=1e-9
    )


def test_what_the_data_do_not_determine_has_no_band():
    x = np.linspace(0.0, 1.0, 50)
    ds = xr.Dataset(
        {"y": ("t", np.full(50, 2.0) + 0.1 * np.random.default_rng(0).normal(size=50))},
        coords={"t": x, "z": ("t", np.zeros(50))},
    )
    with pytest.warns(match="infinite standard error"):
        fit = fit_dataset(ds, lambda t, z, a, b, c: a + b * t + c * z, y="y")
    at = xr.Dataset({"t": ("t", [0.5, 0.5]), "z": ("t", [0.0, 1.0])})
    error = fit.prediction_band(at).standard_error
    assert np.isfinite(error[0])
    assert np.isposinf(error[1])


# -- what cannot be


def test_data_that_do_not_match_the_model_are_refused(archive, result):
    with pytest.raises(ValueError, match="the model's variable 'depth'"):
        result.predict(xr.Dataset(coords={"time": TIME}))
    with pytest.raises(ValueError, match="times of numpy in 'time'"):
        result.predict(archive.assign_coords(time=np.arange(50.0)))
    with pytest.raises(ValueError, match="numbers in 'depth'"):
        result.predict(archive.assign_coords(depth=TIME[:6]))
    with pytest.raises(TypeError, match="`ds` must be an xarray"):
        result.predict(np.zeros(3))
    with pytest.raises(FileNotFoundError):
        result.predict("nowhere.zarr")


def test_the_users_precision_is_left_alone(result):
    assert not jax.config.jax_enable_x64
    with dask.config.set(scheduler="synchronous"):
        assert result.predict().compute().dtype == np.float64
    assert not jax.config.jax_enable_x64


# -- the cluster


def kernels_of_worker():
    return {
        key: (len(kernel.compiled), kernel.function._cache_size())
        for key, kernel in rows._COMPILED._values.items()
    }


@pytest.mark.cluster
def test_each_worker_compiles_once_whatever_the_blocks(archive, cluster):
    number = float(np.random.default_rng().random())  # a model that no test before compiled

    def model(time, depth, amplitude, rate, slope):
        return amplitude * jnp.exp(-rate * time) + slope * depth + 0.0 * number

    with Client(cluster) as client:
        before = client.run(kernels_of_worker)
        fit = fit_dataset(archive, model, y="temperature", p0={"rate": 0.1})
        ragged = archive.chunk(time=(3, 16, 31), depth=(5, 1), station=(1, 3))
        predicted = fit.predict(ragged).compute()
        band = fit.prediction_band(ragged).compute()
        again = fit.predict(ragged.isel(time=slice(None, None, -1))).compute()
        after = client.run(kernels_of_worker)
    np.testing.assert_allclose(predicted, expected(fit, archive), rtol=1e-13)
    np.testing.assert_array_equal(band.prediction, predicted)
    np.testing.assert_array_equal(again[::-1], predicted)
    for worker, kernels in after.items():
        new = {key: count for key, count in kernels.items() if key not in before[worker]}
        assert sorted(key[0] for key in new) == ["prediction", "standard_error"]
        assert set(new.values()) == {(1, 1)}


CLIENT = """
import re, sys
from pathlib import Path
import jax.numpy as jnp
from distributed import Client
from nlsq_dask import FitResult

def model(v, t, a, b):
    return a * v + b * t

def peak():
    # `getrusage` would start from the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

address, result, data, out = sys.argv[1:]
with Client(address) as client:
    fit = FitResult.load(result, model=model)
    fit.predict(data).isel(t=slice(1)).compute()  # what is loaded and started once
    before = peak()
    fit.prediction_band(data)[["prediction", "upper"]].to_zarr(out, zarr_format=2)
    print(peak() - before)
    kept = fit.predict(data).compute()
    print(peak() - before)
"""


@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux has it")
def test_the_rows_do_not_pass_through_the_client(cluster, tmp_path):
    """The client's memory grows by a small part of what it grows by where they do."""
    data, out, saved = (str(tmp_path / name) for name in ("data.zarr", "out.zarr", "fit.nc"))
    shape, chunks = (300, 500, 100), (10, 500, 100)
    with Client(cluster):
        values = da.random.default_rng(0).random(shape, chunks=chunks)
        xr.Dataset({"v": (("t", "y", "x"), values)}, coords={"t": np.arange(300.0)}).to_zarr(
            data, zarr_format=2
        )
    num_bytes = 8 * np.prod(shape)
    few = xr.open_zarr(data).isel(t=slice(0, 20), y=slice(0, 5)).load()
    few["z"] = 2 * few.v + 3 * few.t + 0.1 * np.random.default_rng(1).normal(size=few.v.shape)
    fit = fit_dataset(few, lambda v, t, a, b: a * v + b * t, y="z")
    fit.save(saved)
    code = [sys.executable, "-c", textwrap.dedent(CLIENT)]
    grown = subprocess.run(
        [*code, cluster.scheduler_address, saved, data, out],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    written_there, computed_here = map(int, grown.stdout.split())
    assert written_there < 0.2 * num_bytes
    assert computed_here > 0.6 * num_bytes  # or the other would prove nothing
    written = xr.open_zarr(out)
    assert written.prediction.encoding["chunks"] == chunks
    part = {"t": slice(290, 300), "y": slice(0, 3)}
    expected = 2 * xr.open_zarr(data).v.isel(part) + 3 * written.t.isel(t=part["t"])
    np.testing.assert_allclose(written.prediction.isel(part), expected, rtol=1e-2)
