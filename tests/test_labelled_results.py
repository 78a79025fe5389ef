"""A result as labelled data, and where it says that it came from."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import cftime
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import HybridStreamingConfig, curve_fit, fit_dataset
from nlsq_dask.errors import CovarianceError
from nlsq_dask.sources.columns import TimeAxis
from nlsq_dask.sources.origin import describe_store

RATE = 0.05  # per day


def cooling(time, depth, amplitude, rate, profile):
    return amplitude * jnp.exp(-rate * time) + profile[0] * depth + profile[1]


def make_archive():
    rng = np.random.default_rng(3)
    time = np.datetime64("2001-03-01", "ns") + np.arange(60) * np.timedelta64(12, "h")
    depth = np.linspace(0.0, 5.0, 6)
    days = np.arange(60) / 2
    value = 2.0 * np.exp(-RATE * days)[:, None] + 0.3 * depth + 10.0
    value += 0.01 * rng.normal(size=value.shape)
    return xr.Dataset(
        {
            "temperature": (("time", "depth"), value, {"units": "K"}),
            "good": (("time", "depth"), rng.random(value.shape) > 0.1),
        },
        coords={"time": time, "depth": ("depth", depth, {"units": "m"})},
    )


@pytest.fixture(scope="module")
def archive():
    return make_archive()


@pytest.fixture(scope="module")
def result(archive):
    return fit_dataset(
        archive,
        cooling,
        y="temperature",
        p0={"profile": [1.0, 9.0], "rate": 0.1},
        bounds={"rate": (0, 1)},
        where="good",
        config=HybridStreamingConfig(seed=11),
    )


def test_parameters_are_labelled_along_one_dimension(result):
    ds = result.to_dataset()
    assert ds.param.values.tolist() == ["amplitude", "rate", "profile[0]", "profile[1]"]
    rate = ds.sel(param="rate")
    assert float(rate.params) == result["rate"]
    assert float(rate.standard_errors) == result.perr[1]
    assert (float(rate.p0), float(rate.lower), float(rate.upper)) == (0.1, 0.0, 1.0)
    assert (bool(rate.is_free), bool(rate.is_tied), bool(rate.active)) == (True, False, False)
    xr.testing.assert_identical(ds.covariance.drop_attrs(), result.covariance.rename("covariance"))
    np.testing.assert_array_equal(ds.correlation, result.correlation)


def test_statistics_are_scalars_and_the_history_a_series(result):
    ds = result.to_dataset()
    for name in ("cost", "chi2", "reduced_chi2", "r_squared", "aic", "bic", "dof", "num_rows"):
        assert ds[name].item() == getattr(result, name)
        assert ds[name].attrs["long_name"]
    assert ds.num_masked.item() > 0
    assert ds.sizes["trial"] == len(result.history)
    for i, record in enumerate(result.history):
        assert ds.history_cost[i].item() == record.cost
        np.testing.assert_array_equal(ds.history_params[i], record.params)


def test_units_follow_from_the_variables_and_the_unit_of_time(archive, result):
    units = result.to_dataset().units
    assert units.sel(param="amplitude").item() == "K"
    assert units.sel(param="rate").item() == "day-1"
    assert units.sel(param="profile[0]").item() == ""  # K m-1 and K in one array
    split = fit_dataset(
        archive,
        lambda time, depth, amplitude, rate, slope, base: (
            amplitude * jnp.exp(-rate * time) + slope * depth + base
        ),
        y="temperature",
        p0={"base": 9.0, "rate": 0.1},
        time_units="hours since 2001-01-01",
    )
    assert split.provenance.units == {
        "amplitude": "K",
        "rate": "hour-1",
        "slope": "K m-1",
        "base": "K",
    }


def test_it_says_what_was_fitted_when_and_by_what(archive, result, tmp_path):
    before = datetime.now(UTC) - timedelta(seconds=1)
    path = tmp_path / "archive.zarr"
    archive.to_zarr(path, zarr_format=2)
    stored = fit_dataset(
        path, cooling, y="temperature", p0={"profile": [1.0, 9.0]}, fixed=["rate"], where="good"
    )
    said = stored.to_dataset().attrs
    assert said["data"] == str(path)
    assert said["model"].endswith("test_labelled_results.cooling")
    assert "amplitude * jnp.exp(-rate * time)" in said["model_source"]
    assert (said["y"], said["where"], said["fixed"]) == ("temperature", "good", "rate")
    assert said["x_units"] == "days since 2001-03-01T00:00:00, m"
    started, ended = (datetime.fromisoformat(said[name]) for name in ("started", "ended"))
    assert before <= started <= ended <= datetime.now(UTC)
    assert json.loads(said["versions"])["jax"]
    assert json.loads(said["plan"])["num_rows"] == 360
    assert json.loads(result.to_dataset().attrs["config"])["seed"] == 11
    assert result.to_dataset().attrs["seed"] == 11
    assert "xarray.Dataset (time: 60, depth: 6)" in result.to_dataset().attrs["data"]


def test_ties_and_priors_are_recorded():
    t, y = problems.make_decay(200)
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": t})
    fit = fit_dataset(
        ds.assign(s=("t", np.full(200, 0.1))),
        problems.decay,
        y="y",
        sigma="s",
        absolute_sigma=True,
        ties={"offset": lambda amplitude: amplitude / 20},
        priors={"rate": (0.5, 0.2)},
    )
    said = fit.to_dataset().attrs
    assert "amplitude / 20" in json.loads(said["ties"])["offset"]
    assert json.loads(said["priors"]) == {"rate": [0.5, 0.2]}
    assert fit.to_dataset().is_tied.values.tolist() == [False, False, True]


def test_a_fit_of_arrays_has_labels_too():
    t, y = problems.make_decay(300)
    *_, information, _, _ = curve_fit(
        problems.decay, t, y, list(problems.P0.values()), full_output=True
    )
    ds = information["result"].to_dataset()
    assert ds.attrs["data"] == "arrays of 300 rows"
    assert ds.param.values.tolist() == ["amplitude", "rate", "offset"]
    assert not ds.units.values.astype(bool).any()


def test_without_a_covariance_there_is_none():
    t, y = problems.make_decay(300)
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": t})
    fit = fit_dataset(ds, problems.decay, config=HybridStreamingConfig(cg_param_threshold=1))
    labelled = fit.to_dataset()
    assert not {"covariance", "correlation", "standard_errors", "cov_i"} & set(labelled.variables)
    with pytest.raises(CovarianceError):
        fit.prediction_band()


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("https://me:pa@ss@example.org/a.zarr?X-Amz-Signature=1#k", "https://example.org/a.zarr"),
        ("simplecache::s3://key:secret@bucket/a/b.nc", "simplecache::s3://bucket/a/b.nc"),
        ("folder/with@sign?.zarr", "folder/with@sign?.zarr"),
    ],
)
def test_credentials_are_not_recorded(store, said):
    assert describe_store(store) == said


@pytest.mark.parametrize(
    ("units", "calendar"),
    [
        ("days since 2001-03-10T06:30:00.25", None),
        ("hours since 2000-02-30", "360_day"),
        ("seconds", None),
    ],
)
def test_a_time_axis_is_read_back_from_its_units(units, calendar):
    axis = TimeAxis.from_units(units, calendar)
    assert TimeAxis.from_units(axis.units, axis.calendar) == axis
    if calendar is not None:
        times = np.array([cftime.datetime(2001, 2, 30, 12, calendar=calendar)], object)
        np.testing.assert_array_equal(axis.to_numbers(times), [360 * 24 + 12])
