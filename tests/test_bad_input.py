"""Mistakes are refused by name, before any work where they can be seen; and what only looks
like a mistake works.
"""

from __future__ import annotations

import functools
import os
import re
import resource
import warnings

import cftime
import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import psutil
import pytest
import scipy.optimize
import xarray as xr
from click.testing import CliRunner
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bad_input
from bad_input import ROWS, T, Y, line, of_x
from conftest import start_cluster
from nlsq_dask import (
    FitResult,
    HybridStreamingConfig,
    Status,
    compat,
    curve_fit,
    fit_dataset,
    optimizer,
)
from nlsq_dask.cli import main
from nlsq_dask.errors import WorkerError
from nlsq_dask.evaluate import workers

NAMES = [row[0] for row in (*bad_input.BEFORE_WORK, *bad_input.IN_THE_DATA)]


def matcher(message: str) -> str:
    return ".*".join(re.escape(part.strip()) for part in message.split("…"))


def refuse(row, record_property):
    name, call, kind, message = row
    record_property("bad inputs tried", 1)
    with pytest.raises(kind) as raised:
        call()
    text = str(raised.value)
    assert re.search(matcher(message), text, re.DOTALL), f"{name}: {text}"
    assert len(text) < 600, text
    assert "np.float64(" not in text
    record_property("bad inputs refused clearly", 1)


def test_there_are_many_and_no_two_are_the_same():
    assert len(NAMES) >= 150
    assert len({(*row[:1], row[3]) for row in bad_input.BEFORE_WORK}) == len(bad_input.BEFORE_WORK)


@pytest.fixture
def no_work(monkeypatch):
    """Where rows would be computed on is not even set up."""

    def work(*_: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(optimizer, "open_evaluator_at", work)
    monkeypatch.setattr(optimizer, "platform_at", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("row", bad_input.BEFORE_WORK, ids=lambda row: row[0])
def test_refused_before_any_work(row, record_property):
    refuse(row, record_property)


@pytest.mark.parametrize("row", bad_input.IN_THE_DATA, ids=lambda row: row[0])
def test_refused_when_read(row, record_property):
    refuse(row, record_property)


# -- places for checkpoints and for what is compiled

PLACES = {
    "a number": (3, TypeError, "`checkpoint` must be a path, got 3"),
    "bytes": (b"x.h5", TypeError, "`checkpoint` must be a path, got b'x.h5'"),
    "a list": (["x.h5"], TypeError, "`checkpoint` must be a path, got ['x.h5']"),
    "empty": ("", ValueError, "`checkpoint` must be a path … got ''"),
    "zero byte": ("a\0b", ValueError, "`checkpoint` must be a path … got 'a"),
    "too long": ("x" * 300, ValueError, "`checkpoint` must be in a folder … got … too long"),
    "too deep": ("x/" * 3000, ValueError, "`checkpoint` must be in a folder … got … too long"),
    "just too long": ("x" * 250, ValueError, "`checkpoint` must be in a folder … got … too long"),
    "a folder": (".", ValueError, "`checkpoint` must name a new file … got"),
    "no folder": ("none/x.h5", ValueError, "`checkpoint` must be in a folder … got … x.h5"),
    "another file": ("notes.txt", ValueError, "`checkpoint` must name a new file … notes.txt"),
    "a pipe": ("pipe", ValueError, "`checkpoint` must name a new file … pipe"),
    "a device": ("/dev/null", ValueError, "`checkpoint` must name a new file … /dev/null"),
    "a URL": ("s3://bucket/x.h5", ValueError, "`checkpoint` must be a local path, got … s3://"),
}
RESUMED = {
    "nothing": ("none.h5", "`resume_from_checkpoint` must name a checkpoint, got … none.h5"),
    "too long": ("x" * 300, "`resume_from_checkpoint` must name a checkpoint, got … too long"),
    "a folder": (".", "`resume_from_checkpoint` must name a checkpoint, got … not a file"),
    "a pipe": ("pipe", "`resume_from_checkpoint` must name a checkpoint, got … not a file"),
    "a device": ("/dev/zero", "`resume_from_checkpoint` must name … /dev/zero … not a file"),
    "another file": ("notes.txt", "notes.txt … is not a checkpoint"),
    "a URL": ("http://host/x", "`resume_from_checkpoint` must be a local path, got … http"),
}
FOLDERS = {
    "checkpoint_dir": "`checkpoint_dir` must be a folder … got … notes.txt",
    "compilation_cache_dir": "`compilation_cache_dir` must be a folder … got … notes.txt",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    yield
    assert (tmp_path / "notes.txt").read_text() == "precious"


@pytest.mark.usefixtures("no_work", "folder")
@pytest.mark.parametrize("what", PLACES)
def test_places_to_write(what, record_property):
    path, kind, message = PLACES[what]
    refuse((what, bad_input.fit(checkpoint=path), kind, message), record_property)


@pytest.mark.usefixtures("no_work", "folder")
@pytest.mark.parametrize("what", RESUMED)
def test_places_to_resume_from(what, record_property):
    path, message = RESUMED[what]
    config = HybridStreamingConfig(resume_from_checkpoint=path)
    refuse((what, bad_input.fit(config=config), ValueError, message), record_property)


@pytest.mark.usefixtures("no_work", "folder")
@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, record_property):
    config = HybridStreamingConfig(**{name: "notes.txt"})
    refuse((name, bad_input.fit(config=config), ValueError, FOLDERS[name]), record_property)


@pytest.mark.usefixtures("no_work", "folder")
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_a_long_name(name, record_property):
    message = f"`{name}` must be a folder … got … too long"
    config = HybridStreamingConfig(**{name: "x" * 300})
    refuse((name, bad_input.fit(config=config), ValueError, message), record_property)


@pytest.fixture(scope="module")
def result():
    return fit_dataset(xr.Dataset({"y": ("t", Y)}, coords={"t": T}), line)


SAVED = {
    "too long": ("x" * 300 + ".nc", ValueError, "`path` must be in a folder … got … too long"),
    "just too long": ("x" * 250 + ".nc", ValueError, "`path` must be in a folder … too long"),
    "too deep": ("x/" * 3000 + "x.zarr", ValueError, "`path` must be in a folder … too long"),
    "no folder": ("none/x.nc", ValueError, "`path` must be in a folder … got … none/x.nc"),
    "zero byte": ("a\0b.nc", ValueError, "`path` must be a path … got 'a"),
    "a number": (3, TypeError, "`path` must be a path, got 3"),
    "bytes": (b"x.nc", TypeError, "`path` must be a path, got b'x.nc'"),
    "another suffix": ("x.txt", ValueError, "`path` must be local and end in … got 'x.txt'"),
}
LOADED = {
    "too long": ("x" * 300 + ".nc", FileNotFoundError, "`path` must name a saved … too long"),
    "too deep": ("x/" * 3000 + "x.zarr", FileNotFoundError, "`path` must name … too long"),
    "nothing": ("none.nc", FileNotFoundError, "`path` must name a saved result, got … not there"),
    "a pipe": ("pipe.nc", ValueError, "pipe.nc … is not a file"),
    "a device": ("zero.nc", ValueError, "/dev/zero … is not a file"),
    "an empty folder": ("empty.zarr", ValueError, "empty.zarr … must be a Zarr group of format 2"),
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("what", SAVED)
def test_places_to_save(what, result, record_property):
    path, kind, message = SAVED[what]
    refuse((what, lambda: result.save(path), kind, message), record_property)
    assert sorted(os.listdir()) == ["notes.txt", "pipe"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("what", LOADED)
def test_places_to_load(what, record_property):
    os.mkfifo("pipe.nc")
    os.symlink("/dev/zero", "zero.nc")
    os.mkdir("empty.zarr")
    path, kind, message = LOADED[what]
    refuse((what, lambda: FitResult.load(path), kind, message), record_property)


# -- clusters that are not there


@pytest.fixture
def lone():
    """A scheduler without workers, and its client."""
    with (
        start_cluster(0, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield cluster, client


DOORS = {
    "fit_dataset": lambda client: bad_input.fit(client=client),
    "curve_fit": lambda client: bad_input.arrays(client=client),
    "batches": lambda client: bad_input.batches((T, Y), client=client),
    "compat": lambda client: functools.partial(compat.curve_fit, of_x, T, Y, client=client),
}


@pytest.mark.cluster
@pytest.mark.parametrize("door", DOORS)
def test_a_closed_client(door, lone, record_property):
    cluster, _ = lone
    with Client(cluster, set_as_default=False) as client:
        pass
    message = "`client` must be connected to a scheduler, got one that is closed"
    refuse((door, DOORS[door](client), WorkerError, message), record_property)


@pytest.mark.cluster
@pytest.mark.parametrize("door", DOORS)
def test_a_client_without_workers(door, lone, record_property, monkeypatch):
    monkeypatch.setattr(workers, "_WORKER_WAIT_SECONDS", 0.5)
    message = "`client` must have at least one worker, and had none"
    refuse((door, DOORS[door](lone[1]), WorkerError, message), record_property)


# -- the command line

COMMANDS = {
    "no such store": (["none.zarr"], "`ds` must name a store that exists, got 'none.zarr'"),
    "start without a name": (["--p0", "=1"], "'--p0': must be NAME=NUMBER, got '=1'"),
    "start of text": (["--p0", "a=x"], "'--p0': must be NAME=NUMBER, got 'a=x'"),
    "start twice": (["--p0", "a=1", "--p0", "a=2"], "'--p0': must give 'a' once, got 'a=2'"),
    "infinite start": (["--p0", "a=inf"], "`p0['a']` must be finite … got inf"),
    "bounds without a colon": (["--bounds", "a=1"], "'--bounds': must be … got 'a=1'"),
    "bounds the wrong way": (["--bounds", "a=2:1"], "`bounds` must have … got (2.0, 1.0)"),
    "unknown fixed": (["--fixed", "q"], "`fixed` must name … got ['q']"),
    "unknown y": (["--y", "q"], "`y` must name … got 'q'"),
    "unknown loss": (["--loss", "l1"], "'--loss': 'l1' is not one of 'linear'"),
    "scale of text": (["--f-scale", "x"], "'--f-scale': must be a number or mad, got 'x'"),
    "negative scale": (["--f-scale", "-1"], "`f_scale` must be … got -1.0"),
    "negative workers": (["--workers", "-1"], "'--workers': -1 is not in the range"),
    "option without a value": (["--storage-option", "a"], "must be KEY=VALUE, got 'a'"),
    "option of broken JSON": (["--storage-option", "a={"], "must be KEY=VALUE, got 'a={'"),
    "options for a path": (
        ["--storage-option", "a=1"],
        "`storage_options` must go with a URL, got",
    ),
    "units of nothing": (["--time-units", "weeks"], "`time_units` must … got 'weeks'"),
    "no function": (["--model", "model.py:none"], "'--model': … has no function 'none'"),
    "no file": (["--model", "none.py:line"], "'--model': cannot load 'none.py'"),
    "no colon": (["--model", "model.py"], "'--model': must be FILE.py:FUNCTION … got 'model.py'"),
    "file that exits": (["--model", "exits.py:line"], "'--model': cannot load 'exits.py'"),
    "unknown option": (["--config", "unknown.toml"], "`sead` is not an option … `seed`"),
    "wrong type": (["--config", "type.json"], "`seed` must be an integer … got '1'"),
    "list": (["--config", "list.json"], "`options` must be a mapping … got [1]"),
    "deep": (["--config", "deep.json"], "deep.json … nested"),
    "deep TOML": (["--config", "deep.toml"], "deep.toml … nested"),
    "long number": (["--config", "number.json"], "number.json"),
    "NaN": (["--config", "nan.json"], "`ftol` must be a positive finite number, got nan"),
    "twice": (["--config", "twice.toml"], "twice.toml"),
    "twice in JSON": (["--config", "twice.json"], "must give 'seed' once, got it twice"),
    "bytes": (["--config", "bytes.toml"], "bytes.toml"),
    "too large": (["--config", "large.toml"], "large.toml … at most"),
    "endless": (["--config", "/dev/zero"], "/dev/zero … must be a file, got … device"),
}
CONFIGS = {
    "unknown.toml": "sead = 1",
    "type.json": '{"seed": "1"}',
    "list.json": "[1]",
    "deep.json": "[" * 100_000,
    "deep.toml": "a = " + "[" * 100_000,
    "number.json": '{"seed": ' + "1" * 10_000 + "}",
    "nan.json": '{"ftol": NaN}',
    "twice.toml": "seed = 1\nseed = 2",
    "twice.json": '{"seed": 1, "seed": 2}',
    "large.toml": "#" * 2_000_000,
    "model.py": "def line(t, a=1.0, b=1.0): return a * t + b",
    "exits.py": "raise SystemExit(0)",
}


@pytest.mark.parametrize("what", COMMANDS)
def test_command_line(what, tmp_path, monkeypatch, record_property):
    record_property("bad inputs tried", 1)
    options, message = COMMANDS[what]
    monkeypatch.chdir(tmp_path)
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    xr.Dataset({"y": ("t", Y)}, coords={"t": T}).to_zarr("data.zarr", consolidated=False)
    store = [] if options[0] == "none.zarr" else ["data.zarr"]
    model = [] if "--model" in options else ["--model", "model.py:line"]
    result = CliRunner().invoke(main, ["fit", *store, *options, *model])
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    text = " ".join(result.output.replace("│", " ").split())
    assert re.search(matcher(message), text), text
    assert "Traceback" not in text
    record_property("bad inputs refused clearly", 1)


# -- what looks odd and is right


def dataset(t=T, y=Y):
    return xr.Dataset({"y": ("row", y)}, coords={"t": ("row", t)})


def indexed(order):
    return xr.Dataset({"y": ("t", Y[order])}, coords={"t": T[order]})


class Line:
    def __call__(self, t, a, b):
        return a * t + b

    def method(self, t, a, b):
        return a * t + b

    @staticmethod
    def static(t, a, b):
        return a * t + b

    @classmethod
    def of_class(cls, t, a, b):
        return a * t + b


def positional(t, a, b, /):
    return a * t + b


def with_rest(t, a, b, *, power=1, **rest):
    return a * t**power + b


SHUFFLED = np.random.default_rng(0).permutation(ROWS)
NATIVE = [("f8", 1e-12), ("f4", 1e-5), ("f2", 2e-2), ("g", 1e-12)]
FIT = functools.partial(fit_dataset, y="y")
FINE = {
    "unsorted index": lambda: FIT(indexed(SHUFFLED), line),
    "descending index": lambda: FIT(indexed(np.arange(ROWS)[::-1]), line),
    "read-only": lambda: FIT(dataset(np.broadcast_to(T, (ROWS,))), line),
    "strided": lambda: FIT(dataset(np.repeat(T, 2)[::2], np.repeat(Y, 3)[::3]), line),
    "backwards": lambda: FIT(dataset(T[::-1], Y[::-1]), line),
    "byte-swapped": lambda: FIT(dataset(T.astype(">f8"), Y.astype(">f8")), line),
    "longer floats": lambda: FIT(dataset(T.astype("g"), Y.astype("g")), line),
    "of JAX": lambda: FIT(dataset(y=jnp.asarray(Y)), line),
    "Fortran order": lambda: FIT(
        xr.Dataset(
            {
                "y": (("u", "v"), np.asfortranarray(Y.reshape(5, 10))),
                "t": (("u", "v"), np.asfortranarray(T.reshape(5, 10))),
            }
        ),
        line,
    ),
    "index of two levels": lambda: FIT(
        dataset()
        .assign_coords(u=("row", SHUFFLED // 10), v=("row", SHUFFLED % 10))
        .set_index(row=["u", "v"]),
        line,
    ),
    "masked, none of it": lambda: curve_fit(of_x, np.ma.array(T), Y, full_output=True)[2]["result"],
    "lists": lambda: curve_fit(of_x, list(T), list(Y), full_output=True)[2]["result"],
    "series": lambda: curve_fit(of_x, pd.Series(T), pd.Series(Y), full_output=True)[2]["result"],
    "dask": lambda: curve_fit(of_x, da.from_array(T, 7), da.from_array(Y, 9), full_output=True)[2][
        "result"
    ],
    "callable": lambda: FIT(dataset(), Line()),
    "method": lambda: FIT(dataset(), Line().method),
    "static method": lambda: FIT(dataset(), Line.static),
    "class method": lambda: FIT(dataset(), Line.of_class),
    "partial": lambda: FIT(dataset(), functools.partial(lambda s, t, a, b: a * t + b, 2.0)),
    "lambda": lambda: FIT(dataset(), lambda t, a, b: a * t + b),
    "jitted": lambda: FIT(dataset(), jax.jit(line)),
    "positional only": lambda: FIT(dataset(), positional),
    "keywords with defaults": lambda: FIT(dataset(), with_rest),
    "starts beyond int64": lambda: FIT(dataset(), line, p0=[10**20, -(10**20)], bounds=None),
    "starts by name, in another order": lambda: FIT(
        dataset(), line, p0=pd.Series({"b": 1.0, "a": 2.0}), fixed=()
    ),
    "bounds at the largest floats": lambda: FIT(dataset(), line, bounds={"a": (-1.7e308, 1.7e308)}),
}


@pytest.mark.parametrize("what", FINE)
def test_what_looks_odd_and_is_right(what):
    result = FINE[what]()
    assert result.success
    a, b = np.polyfit(T, Y, 1)
    np.testing.assert_allclose(result.popt, [a, b], rtol=1e-7)


def test_duplicate_labels_are_rows_like_others():
    labels = np.repeat(T[::2], 2)
    sigma = xr.DataArray(np.ones(ROWS), dims="t", coords={"t": labels})
    ds = xr.Dataset({"y": ("t", Y)}, coords={"t": labels})
    result = fit_dataset(ds, line, sigma=sigma)
    np.testing.assert_allclose(result.popt, np.polyfit(labels, Y, 1), rtol=1e-7)


def test_fixed_may_come_once():
    result = fit_dataset(dataset(), line, p0={"a": 3.0}, fixed=(name for name in ["a"]))
    assert result.popt[0] == 3.0


@pytest.mark.parametrize("units", ["m", "", None, "km"])
def test_other_units_of_sigma_are_warned_of(units):
    ds = dataset(y=Y)
    ds.y.attrs["units"] = "m"
    ds["error"] = ds.y * 0 + 0.1
    ds.error.attrs = {} if units is None else {"units": units}
    # What was computed keeps the attributes of what it was computed from: they say nothing.
    for sigma, is_named in (("error", True), (ds.error, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            FIT(ds, line, y="y", sigma=sigma)
        said = [str(w.message) for w in caught if "`sigma` should have the units" in str(w.message)]
        assert len(said) == (units == "km" and is_named)
        assert all(w.filename == __file__ for w in caught)


def xarray_fills_masked_blocks():
    """Later ones do. Of earlier ones the blocks are refused, with the call that fills them."""
    masked = xr.Variable("t", da.from_array(np.ma.array([1.0])))
    return not isinstance(masked.data._meta, np.ma.MaskedArray)


@pytest.mark.parametrize(
    "is_dask",
    [False, pytest.param(True, marks=pytest.mark.skipif("not xarray_fills_masked_blocks()"))],
)
def test_a_masked_cell_of_a_dataset_is_left_out(is_dask):
    y = np.ma.array(np.where(T > 0.5, 1e6, Y), mask=T > 0.5)
    result = FIT(dataset(y=da.from_array(y, chunks=7) if is_dask else y), line)
    expected = np.polyfit(T[T <= 0.5], Y[T <= 0.5], 1)
    np.testing.assert_allclose(result.popt, expected, rtol=1e-6)
    assert result.num_masked == int((T > 0.5).sum())


def test_calendars_of_any_kind():
    times = xr.date_range("2000-02-27", periods=ROWS, calendar="noleap", use_cftime=True)
    assert isinstance(times[0], cftime.DatetimeNoLeap)
    result = FIT(dataset(np.asarray(times)), line)
    np.testing.assert_allclose(result.popt, np.polyfit(np.arange(ROWS), Y, 1), rtol=1e-7)


# -- honest ends


@pytest.mark.parametrize("size", [1e-160, 1e16, 1e30, 1e60, 1e100, 1e140, 1e200, 1e300])
def test_a_fit_never_claims_an_answer_it_does_not_have(size):
    """From a start that many decades away, steps within the trust region are below rounding."""
    result = FIT(dataset(y=Y * size), line)
    if result.success:
        np.testing.assert_allclose(result.popt / size, np.polyfit(T, Y, 1), rtol=1e-6)
    else:
        assert result.status in (Status.STALLED, Status.NOT_FINITE, Status.MAX_ITERATIONS)


@pytest.mark.parametrize("start", [1e200, 1e308, -1e308])
def test_starts_at_the_largest_numbers(start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.optimize.OptimizeWarning)
        result = FIT(dataset(), line, p0=[start, start])
    assert not result.success or np.allclose(result.popt, np.polyfit(T, Y, 1))


def raising(record):
    raise LookupError("of the callback's own")


def test_an_error_of_the_callback_goes_through():
    with pytest.raises(LookupError, match="own"):
        FIT(dataset(), line, callback=raising)


# -- anything at all

SOMETHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63, 0, -1]),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=2)), max_size=4),
    st.dictionaries(st.one_of(st.text(max_size=2), st.integers()), st.floats(), max_size=3),
    st.sets(st.integers(), max_size=3),
    hnp.arrays(st.sampled_from([np.float64, np.int32, bool, "U2", object, "M8[D]"]), (2,)),
    st.sampled_from(
        [
            bad_input.Opaque(),
            len,
            dict,
            np.float32(np.nan),
            np.array(1.0),
            np.ma.masked,
            range(2),
            pd.Series([1.0, 2.0]),
            pd.NaT,
            xr.DataArray([1.0, 2.0]),
            Ellipsis,
            NotImplemented,
        ]
    ),
)


class AcceptedError(Exception):
    """All was checked, and work would begin."""


def is_real(value):
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def are_numbers(value, allowed=np.isfinite):
    """Two numbers, finite or otherwise `allowed`, or what an array makes of them."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    is_text = any(isinstance(part, str | bytes | bool) for part in np.asarray(value, object).flat)
    return array.shape == (2,) and bool(np.all(allowed(array))) and not is_text


def is_rising(bounds):
    return np.diff(bounds) > 0


def is_among(value, names):
    """Names, and none but these; or nothing."""
    if isinstance(value, str):
        return value == "" or value in names
    return isinstance(value, list | set | range | np.ndarray) and set(value) <= names


def are_starts(value):
    """Finite numbers by name, or arrays of one element for each parameter."""
    if isinstance(value, dict):
        return set(value) <= {"a", "b"} and bool(np.isfinite(list(value.values())).all())
    is_nested = isinstance(value, np.ndarray) and value.dtype == object and len(value) == 2
    return is_nested and all(isinstance(v, tuple) and are_numbers(2 * v) for v in value)


ACCEPTABLE = {
    "loss": lambda v: isinstance(v, str) and v in ("linear", "huber", "cauchy", "arctan"),
    "f_scale": lambda v: v == "mad" if isinstance(v, str) else is_real(v) and 0 < v < 1e154,
    "absolute_sigma": lambda v: isinstance(v, bool),
    "nan_policy": lambda v: v == "omit",
    "covariance": lambda v: v == "auto",
    "progress": lambda v: v is None or isinstance(v, bool),
    "callback": lambda v: v is None or callable(v),
    "config": lambda v: v is None,
    "client": lambda v: v is None,
    "checkpoint": lambda v: v is None or isinstance(v, str),
    "storage_options": lambda v: v is None,
    "y": lambda v: v is None or v in ("y", "t"),
    "x": lambda v: v is None or is_among(v, {"t"}),
    "sigma": lambda v: (
        v is None or v == "t" or (is_real(v) and 0 < v < 1e154 and float(v) ** 2 > 0)
    ),
    "where": lambda v: v is None,
    "cluster": lambda v: v is None or v == "t",
    "time_units": lambda v: v is None,
    "jac": lambda v: v is None,
    "ties": lambda v: v is None or (isinstance(v, dict) and not v),
    "priors": lambda v: v is None or (isinstance(v, dict) and not v),
    "fixed": lambda v: is_among(v, {"a"}) or is_among(v, {"b"}),
    "bounds": lambda v: v is None or (isinstance(v, dict) and not v) or are_numbers(v, is_rising),
    "p0": lambda v: v is None or are_starts(v) or are_numbers(v),
}


@pytest.fixture
def limited_memory():
    """What takes too much of it is then a MemoryError, and hypothesis says of what value."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("limited_memory")
@pytest.mark.parametrize("argument", ACCEPTABLE)
def test_anything_at_all_is_refused_by_name_or_rightly_accepted(
    argument, tmp_path, monkeypatch, record_property
):
    monkeypatch.chdir(tmp_path)
    tally = {"tried": 0, "refused": 0}

    def begin(*_: object) -> None:
        raise AcceptedError

    monkeypatch.setattr(optimizer, "open_evaluator_at", begin)

    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(value=SOMETHING)
    def check(value):
        tally["tried"] += 1
        with pytest.raises((AcceptedError, TypeError, ValueError)) as raised:
            fit_dataset(bad_input.unreadable(), line, **{argument: value})
        if raised.type is AcceptedError:
            assert ACCEPTABLE[argument](value)
        else:
            tally["refused"] += 1
            assert f"`{argument}" in str(raised.value)
            assert len(str(raised.value)) < 800

    check()
    record_property("drawn inputs tried", tally["tried"])
    record_property("drawn inputs refused clearly", tally["refused"])
    record_property("drawn inputs rightly accepted", tally["tried"] - tally["refused"])
