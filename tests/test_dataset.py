"""`fit_dataset` on good input, in every form it documents, against NumPy, SciPy and xarray."""

from __future__ import annotations

from dataclasses import dataclass

import cftime
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import xarray as xr

import problems
from nlsq_dask import Chunk, HybridStreamingConfig, Status, fit_dataset
from nlsq_dask.errors import DataError
from nlsq_dask.sources.xarray import DatasetRoles, build_dataset_source

RNG = np.random.default_rng(5)


def line(t, a, b):
    return a * t + b


def linear_oracle(columns, y, sigma=None, absolute_sigma=False):
    """Parameters and covariance of a linear model, in closed form, of the finite rows."""
    design = np.column_stack([np.broadcast_to(column, y.shape).ravel() for column in columns])
    sigma = np.broadcast_to(1.0 if sigma is None else sigma, y.shape).ravel()
    y = y.ravel()
    kept = np.isfinite(y) & np.isfinite(sigma) & np.isfinite(design).all(axis=1)
    design, y = design[kept] / sigma[kept, None], y[kept] / sigma[kept]
    popt, *_ = np.linalg.lstsq(design, y)
    covariance = np.linalg.inv(design.T @ design)
    if not absolute_sigma:
        covariance *= np.sum((design @ popt - y) ** 2) / (len(y) - len(popt))
    return popt, covariance


def assert_fits(result, oracle, num_rows=None):
    popt, covariance = oracle
    error = np.sqrt(np.diag(covariance))
    assert result.success, result.message
    np.testing.assert_allclose((result.popt - popt) / error, 0, atol=1e-6)
    np.testing.assert_allclose(
        result.pcov / np.outer(error, error), covariance / np.outer(error, error), atol=1e-7
    )
    if num_rows is not None:
        assert result.num_rows == num_rows


def series(y, **variables):
    t = np.linspace(0.0, 1.0, len(y))
    return xr.Dataset({"y": ("t", y), **variables}, coords={"t": t})


T = np.linspace(0.0, 1.0, 300)
NOISY = 2 * T + 1 + 0.1 * RNG.normal(size=T.size)


# -- dimensions

TIME, LAT, LON = np.linspace(0, 4, 21), np.linspace(-1, 1, 9), np.linspace(0, 3, 14)
GRID = (
    1.5 * TIME[:, None, None] * np.cos(LAT)[:, None]
    + 0.7 * LAT[:, None] * np.arange(14)
    + RNG.normal(size=(21, 9, 14))
)
MASK = np.arange(9 * 14).reshape(9, 14) % 5 > 0
SPREAD = 0.5 + 0.1 * TIME


def grid():
    # `lon` has no coordinate: its positions stand in.
    return xr.Dataset(
        {
            "y": (("time", "lat", "lon"), GRID),
            "good": (("lat", "lon"), MASK),
            "spread": ("time", SPREAD),
            "level": ((), 2.0),
        },
        coords={"time": TIME, "lat": LAT},
    )


def surface(lat, lon, time, level, a, b, c):
    return a * time * jnp.cos(lat) + b * lat * lon + c * level


SURFACE = [
    TIME[:, None, None] * np.cos(LAT)[:, None],
    LAT[:, None] * np.arange(14.0),
    2.0,
]


@pytest.mark.parametrize(
    ("order", "chunks", "chunk_size"),
    [
        (("time", "lat", "lon"), None, None),
        (("lon", "time", "lat"), {"time": 5, "lat": 4, "lon": 14}, 100),
        (("lat", "lon", "time"), {"time": 21, "lat": 2, "lon": 5}, None),
    ],
)
def test_variables_broadcast_by_name(order, chunks, chunk_size):
    ds = grid().transpose(*order)
    ds = ds if chunks is None else ds.chunk(chunks)
    config = HybridStreamingConfig(chunk_size=chunk_size)
    result = fit_dataset(
        ds, surface, y="y", where="good", sigma="spread", absolute_sigma=True, config=config
    )
    masked = np.where(MASK, GRID, np.nan)
    oracle = linear_oracle(SURFACE, masked, SPREAD[:, None, None], absolute_sigma=True)
    assert_fits(result, oracle, num_rows=21 * MASK.sum())
    assert result.num_masked == 21 * (~MASK).sum()
    assert not result.diagnostics["sample"]["num_rows"] > result.num_rows


def test_y_and_where_as_arrays_in_another_order_of_dimensions():
    ds = grid()
    y = ds.y.transpose("lon", "lat", "time")
    result = fit_dataset(ds, surface, y=y, where=ds.y.notnull() & ds.good)
    assert_fits(result, linear_oracle(SURFACE, np.where(MASK, GRID, np.nan)))


def test_y_is_the_only_variable_left_over():
    ds = grid().drop_vars(["good"])
    result = fit_dataset(ds, surface, sigma="spread")
    assert_fits(result, linear_oracle(SURFACE, GRID, SPREAD[:, None, None]), num_rows=GRID.size)


def test_what_cluster_names_is_not_left_over_for_y():
    ds = series(NOISY, station=("t", np.arange(NOISY.size) % 7))
    by_name, alone = (fit_dataset(ds, line, cluster="station", **y) for y in ({"y": "y"}, {}))
    assert alone.popt.tobytes() == by_name.popt.tobytes()
    assert alone.pcov.tobytes() == by_name.pcov.tobytes()


# -- time


def read_times(times, time_units=None, dims="r"):
    ds = xr.Dataset({"y": (dims, np.zeros(len(times)))}).assign({"when": (dims, times)})
    roles = DatasetRoles(x=("when",), y="y")
    source, axes, _ = build_dataset_source(ds, roles, time_units)
    return source.read(0).x[0], axes["when"].units


STAMPS = np.datetime64("2001-03-04T05:06:07") + np.arange(6) * np.timedelta64(7, "h")


@pytest.mark.parametrize("resolution", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize(
    "units",
    [
        "hours since 2000-01-01",
        "days since 1970-01-10",
        "seconds since 2000-10-20 10:00:00",
        "minutes since 2000-1-1 12:30",
        "days since 0001-01-01",
        "hours since 2000-01-01T00:00:00Z",
    ],
)
def test_numpy_times_are_xarrays_numbers(resolution, units):
    numbers, said = read_times(STAMPS.astype(f"M8[{resolution}]"), units)
    expected, _, _ = xr.coding.times.encode_cf_datetime(
        STAMPS, units.removesuffix("Z"), "proleptic_gregorian", dtype=np.dtype(np.float64)
    )
    stamps = STAMPS.astype("M8[s]").tolist()
    by_cftime = cftime.date2num(stamps, units.removesuffix("Z"), calendar="proleptic_gregorian")
    np.testing.assert_allclose(numbers, by_cftime, rtol=1e-13)
    if "0001" not in units:
        np.testing.assert_allclose(numbers, expected, rtol=1e-13)
    # What the result says of the axis reads back as the same times.
    back = xr.coding.times.decode_cf_datetime(numbers, said, "proleptic_gregorian")
    assert np.all(np.abs(back - STAMPS) <= np.timedelta64(1, "s"))


@pytest.mark.parametrize("resolution", ["s", "us"])
def test_a_thousand_years_do_not_overflow(resolution):
    times = np.array(["0850-01-01", "1200-02-03", "2100-01-01"], f"M8[{resolution}]")
    days = (times.astype("M8[D]") - np.datetime64("0850-01-01")).astype(float)
    numbers, said = read_times(times)
    np.testing.assert_array_equal(numbers, days)
    assert said.startswith("days since 0850-01-01")
    numbers, _ = read_times(times - times[0])
    np.testing.assert_array_equal(numbers, days)


def test_origin_is_the_first_time_there_is():
    times = STAMPS.astype("M8[ns]")
    times[[0, 3]] = np.datetime64("NaT", "ns")
    numbers, said = read_times(times)
    expected = (times - times[1]) / np.timedelta64(1, "D")
    np.testing.assert_allclose(numbers, expected, rtol=1e-14)
    assert xr.coding.times.decode_cf_datetime([0.0], said, "proleptic_gregorian")[0] == times[1]


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "standard", "julian"])
@pytest.mark.parametrize("units", [None, "hours since 2000-01-01", "days since 1999-12-30 06:00"])
def test_cftime_is_cftimes_numbers(calendar, units):
    times = cftime.num2date(np.arange(5) * 31.25, "days since 2000-02-25", calendar=calendar)
    times[2] = None
    numbers, said = read_times(times, units)
    present = [0, 1, 3, 4]
    expected = cftime.date2num(times[present], units or f"days since {times[0]}", calendar=calendar)
    np.testing.assert_allclose(numbers[present], expected, rtol=1e-13)
    assert np.isnan(numbers[2])
    assert cftime.num2date(0, said, calendar=calendar) is not None


PLAIN = {"consolidated": False}


@pytest.mark.filterwarnings("ignore:Unable to decode time axis")
@pytest.mark.parametrize(
    ("first_year", "is_index", "time_units", "where"),
    [
        (1500, True, None, "here"),
        (1600, False, None, "here"),
        (2200, True, None, "here"),
        (1600, True, "days since 1950-06-01", "here"),
        pytest.param(2200, False, "days since 1950-06-01", "cluster", marks=pytest.mark.cluster),
    ],
)
def test_times_beyond_the_range_of_nanoseconds(
    first_year, is_index, time_units, where, tmp_path, request
):
    """Of them xarray makes datetime64 of one block, and cftime's objects of the next."""
    days = 50 * np.arange(6_000)
    time = xr.Variable(
        "time", days, {"units": f"days since {first_year}-01-01", "calendar": "standard"}
    )
    y = 3 + 1e-5 * days + 0.1 * RNG.normal(size=days.size)
    ds = xr.Dataset({"y": ("time", y)}).assign_coords({"time" if is_index else "when": time})
    ds.to_zarr(
        tmp_path / "a.zarr",
        encoding={name: {"chunks": (1_000,)} for name in ds.variables},
        **PLAIN,
    )
    model = line_of("time" if is_index else "when")
    options = {
        "y": "y",
        "time_units": time_units,
        "config": HybridStreamingConfig(chunk_size=1_000),
    }
    fits = [
        fit_dataset(tmp_path / "a.zarr", model, **options),
        fit_dataset(xr.open_zarr(tmp_path / "a.zarr", **PLAIN), model, **options),
    ]
    numbers = days.astype(float)
    if time_units:
        first = cftime.datetime(first_year, 1, 1, calendar="standard")
        numbers = days + cftime.date2num(first, time_units, calendar="standard")
    for result in fits:
        assert_fits(result, linear_oracle([numbers, 1.0], y), num_rows=days.size)


def line_of(variable):
    return {"time": lambda time, a, b: a * time + b, "when": lambda when, a, b: a * when + b}[
        variable
    ]


def test_times_of_two_calendars_are_refused(tmp_path):
    times = np.array([cftime.DatetimeNoLeap(2000, 1, 1), cftime.Datetime360Day(2000, 1, 2)])
    ds = xr.Dataset({"y": ("r", np.arange(2.0))}, coords={"when": ("r", times)})
    with pytest.raises(DataError, match=r"times of one calendar, .* got \['360_day', 'noleap'\]"):
        fit_dataset(ds, lambda when, a: a * when, y="y", p0=[1.0])


def test_durations_are_in_days_or_the_unit_asked_for():
    durations = np.array([0, 36, -5], "m8[h]").astype("m8[ns]")
    np.testing.assert_allclose(read_times(durations)[0], [0, 1.5, -5 / 24], rtol=1e-14)
    numbers, said = read_times(durations, "minutes")
    np.testing.assert_array_equal(numbers, [0, 2160, -300])
    assert said == "minutes"


def test_fit_over_time_says_its_units_and_leaves_out_rows_without_time():
    when = (STAMPS[0] + np.arange(300) * np.timedelta64(7, "h")).astype("M8[ns]")
    when[10:20] = np.datetime64("NaT", "ns")
    ds = xr.Dataset({"y": ("r", NOISY), "when": ("r", when)})
    result = fit_dataset(
        ds, lambda when, a, b: a * when + b, y="y", time_units="hours since 2001-03-10"
    )
    elapsed = (when - np.datetime64("2001-03-10")) / np.timedelta64(1, "h")
    assert_fits(result, linear_oracle([elapsed, 1.0], NOISY), num_rows=290)
    assert result.num_masked == 10
    said = result.diagnostics["time_axes"]["when"]
    assert said.startswith("hours since 2001-03-10")


# -- stores


@pytest.mark.parametrize("store", ["packed.zarr", "packed.nc"])
def test_packed_integers_are_decoded_as_by_xarray(tmp_path, store):
    y = NOISY.copy()
    y[::11] = np.nan
    encoding = {
        "y": {"dtype": "int16", "scale_factor": 1e-3, "add_offset": 1.0, "_FillValue": -32768},
        "s": {"dtype": "uint8", "scale_factor": 0.01, "_FillValue": 255},
    }
    ds = series(y, s=("t", 0.5 + T))
    path = tmp_path / store
    if store.endswith(".zarr"):
        encoding = {name: {**packing, "chunks": (64,)} for name, packing in encoding.items()}
        ds.to_zarr(path, encoding=encoding, consolidated=False)
    else:
        ds.to_netcdf(path, engine="h5netcdf", encoding=encoding)
    options = {"consolidated": False} if store.endswith(".zarr") else {}
    with xr.open_dataset(path, **options) as opened:
        loaded = opened.load()
    assert loaded.y.isnull().sum() == len(y[::11])
    oracle = linear_oracle([T, 1.0], loaded.y.values.astype(float), loaded.s.values.astype(float))
    result = fit_dataset(path, line, y="y", sigma="s")
    assert_fits(result, oracle, num_rows=300 - len(y[::11]))
    with xr.open_dataset(path, **options) as lazy:
        again = fit_dataset(lazy, line, y="y", sigma="s")
        assert not lazy.y.variable._in_memory
    np.testing.assert_array_equal(again.popt, result.popt)


# -- rows


def test_rows_that_are_not_finite_are_left_out_and_counted():
    y, s = NOISY.copy(), 0.1 + T
    y[::10] = np.nan
    y[5] = -np.inf
    s[7] = np.nan
    ds = series(y, s=("t", s))
    result = fit_dataset(ds, line, y="y", sigma="s")
    assert_fits(result, linear_oracle([T, 1.0], y, s), num_rows=268)
    assert result.num_masked == 32
    residual = (result.popt[0] * T + result.popt[1] - y) / s
    np.testing.assert_allclose(result.chi2, np.sum(residual[np.isfinite(residual)] ** 2))


@pytest.mark.parametrize(
    ("y", "t"),
    [
        ((100 * NOISY).astype(np.int16), T),
        (NOISY.astype(np.float32), T.astype(np.float32)),
        (NOISY.astype(">f8"), T.astype(">f4")),
        (np.repeat(NOISY, 2)[::2], T[::-1]),
        (NOISY, T > 0.4),
    ],
    ids=["integer", "float32", "big-endian", "strided", "boolean variable"],
)
def test_dtypes(y, t):
    ds = xr.Dataset({"y": ("row", y), "t": ("row", t)})
    result = fit_dataset(ds, line, y="y")
    oracle = linear_oracle([t.astype(float), 1.0], y.astype(float))
    assert_fits(result, oracle, num_rows=300)


# -- parameters


def test_array_parameter_by_name():
    ds = series(NOISY)
    result = fit_dataset(
        ds,
        lambda t, c, d: c[0] + c[1] * t + c[2] * t**2 + d * t**3,
        p0={"c": np.zeros(3)},
    )
    assert_fits(result, linear_oracle([T**0, T, T**2, T**3], NOISY))
    assert result.param_names == ("c[0]", "c[1]", "c[2]", "d")
    assert result["c"].shape == (3,)
    assert result["d"].shape == ()


def test_array_parameter_bounds_and_fixed():
    ds = series(NOISY)
    result = fit_dataset(
        ds,
        lambda t, c, d: c[0] * t + c[1] + d * t**2,
        p0={"c": [1.5, 0.5], "d": 0.25},
        bounds={"c": ([-9.0, -5.0], [1.75, 9.0])},
        fixed=["d"],
    )
    assert result.success
    assert result.active.tolist() == [True, False, False]
    assert result.popt[2] == 0.25
    np.testing.assert_allclose(result.popt[0], 1.75, rtol=1e-9)
    np.testing.assert_allclose(result.popt[1], np.mean(NOISY - 1.75 * T - 0.25 * T**2), rtol=1e-8)


def test_defaults_bounds_and_fixed_by_name():
    def model(t, a, b=0.5, c=7.0, *, power=2):
        return a * t + b + c * t**power

    ds = series(NOISY)
    result = fit_dataset(
        ds, model, p0={"a": 3.0}, bounds={"a": (None, 9), "b": (-9, None)}, fixed="c"
    )
    popt, covariance = linear_oracle([T, 1.0], NOISY - 7 * T**2)
    assert result.status.is_success
    np.testing.assert_allclose(result.popt, [*popt, 7.0], rtol=1e-8)
    np.testing.assert_allclose(result.pcov[:2, :2], covariance, rtol=1e-7)
    assert not result.pcov[2].any()
    assert result.dof == 298


def test_nonlinear_fit_within_bounds_equals_scipy():
    y = 3 * np.exp(-4 * T) + 0.2 + 0.05 * RNG.normal(size=T.size)

    def decay(np_, t, a, rate, offset):
        return a * np_.exp(-rate * t) + offset

    result = fit_dataset(
        series(y),
        lambda t, a, rate, offset: decay(jnp, t, a, rate, offset),
        bounds={"rate": (0, 3.5), "a": (0, None)},
    )
    expected = scipy.optimize.least_squares(
        lambda p: decay(np, T, *p) - y,
        [1, 1, 1],
        bounds=([0, 0, -np.inf], [np.inf, 3.5, np.inf]),
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
    )
    np.testing.assert_allclose(result.popt, expected.x, rtol=1e-6)
    np.testing.assert_allclose(result.cost, expected.cost, rtol=1e-10)
    assert result.active.tolist() == [False, True, False]


def halved(t, a, b):
    return (t, 2.0)


def halved_array(t, a, b):
    return jnp.stack([t, 2 * jnp.ones_like(t)], axis=-1)


@pytest.mark.parametrize("jac", [halved, halved_array])
def test_jac_is_really_used(jac):
    """Twice the derivative by `b` is half its standard error; the minimum stays where it is."""
    popt, covariance = linear_oracle([T, 1.0], NOISY)
    result = fit_dataset(series(NOISY), line, jac=jac)
    np.testing.assert_allclose(result.popt, popt, rtol=1e-5)
    np.testing.assert_allclose(np.diag(result.pcov), np.diag(covariance) / [1, 4], rtol=1e-5)


# -- sources of the user's own, and control


@dataclass(frozen=True)
class Squares:
    """Rows computed where they are read: the last chunk is shorter."""

    num_rows: int = 250
    rows: int = 64

    variables = ("t", "u")

    @property
    def num_chunks(self):
        return -(-self.num_rows // self.rows)

    @property
    def chunk_shape(self):
        return (self.rows,)

    def values(self):
        t = np.linspace(0, 1, self.num_rows)
        return t, np.sin(9 * t), 3 * t - 2 * np.sin(9 * t) + np.cos(40 * t)

    def read(self, index):
        part = slice(index * self.rows, (index + 1) * self.rows)
        t, u, y = (column[part] for column in self.values())
        return Chunk(x=(t, u), y=y, sigma=1 + t, where=t < 0.9)


def test_a_source_of_the_users_own():
    source = Squares()
    t, u, y = source.values()
    result = fit_dataset(source, lambda t, u, a, b: a * t + b * u)
    assert_fits(result, linear_oracle([t, u], np.where(t < 0.9, y, np.nan), 1 + t))
    assert result.num_masked == np.sum(t >= 0.9)


def swing(t, a, rate, phase):
    return a * jnp.sin(rate * t + phase)


SWINGING = series(2 * np.sin(6 * T + 0.3) + 0.1 * RNG.normal(size=T.size))


def test_callback_sees_every_pass_and_can_stop():
    records = []
    result = fit_dataset(SWINGING, swing, p0=[1, 5, 0], callback=records.append)
    assert result.success
    records = [record for record in records if record.phase == 2]
    assert len(records) == result.num_passes == len(result.history)
    assert [record.num_passes for record in records] == list(range(1, len(records) + 1))
    assert records[-1].num_rows == 300
    assert records[-1].cost == result.cost
    np.testing.assert_array_equal(records[-1].params, result.popt)
    np.testing.assert_allclose(records[-1].loss, 2 * result.cost / 300)


def hard():
    """So many rows that the sample's optimum is not yet the archive's."""
    t = np.linspace(0, 1, 60_000)
    y = 2 * np.sin(6 * t + 0.3) + RNG.normal(size=t.size)
    return xr.Dataset({"y": ("t", y)}, coords={"t": t})


@pytest.mark.parametrize(
    ("limit", "status"),
    [
        ({"max_passes": 1}, Status.MAX_PASSES),
        ({"max_seconds": 1e-6}, Status.MAX_SECONDS),
        ("callback", Status.STOPPED_BY_CALLBACK),
        ({"gauss_newton_max_iterations": 1}, Status.MAX_ITERATIONS),
    ],
    ids=["passes", "seconds", "callback", "iterations"],
)
def test_limits_end_a_fit_with_what_it_has(limit, status):
    def stop(record):
        raise StopIteration

    options = {"distance_tol": 1e-12, **(limit if isinstance(limit, dict) else {})}
    callback = stop if limit == "callback" else None
    result = fit_dataset(
        hard(), swing, p0=[1, 5, 0], config=HybridStreamingConfig(**options), callback=callback
    )
    assert result.status is status
    assert not result.success
    assert result.message.startswith(status.value)
    assert result.num_passes == len(result.history) <= 2
    np.testing.assert_allclose(result.popt, [2, 6, 0.3], atol=0.2)
    assert np.isfinite(result.perr).all()


def test_sigma_may_be_a_number():
    rng = np.random.default_rng(0)
    t = np.linspace(0, 10, 500)
    y = problems.decay_numpy(t, problems.TRUTH) + 0.05 * rng.normal(size=t.size)
    ds = xr.Dataset({"y": ("t", y), "error": ("t", np.full(t.size, 0.05))}, coords={"t": t})
    options = {"y": "y", "p0": problems.P0, "absolute_sigma": True}
    one = fit_dataset(ds, problems.decay, sigma=0.05, **options)
    each = fit_dataset(ds, problems.decay, sigma="error", **options)
    np.testing.assert_allclose(one.popt, each.popt, rtol=1e-12)
    np.testing.assert_allclose(one.perr, each.perr, rtol=1e-12)
    assert one.provenance.data.sigma == "0.05"
    with pytest.raises(TypeError, match="`sigma` must be the name of a variable"):
        fit_dataset(ds, problems.decay, sigma=True, **options)
    with pytest.raises(ValueError, match="`sigma` must be positive"):
        fit_dataset(ds, problems.decay, sigma=0, **options)
