"""Results in files: every bit comes back, and nothing in a file is executed."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import stat
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import h5py
import jax.numpy as jnp
import numcodecs
import numpy as np
import pytest
import xarray as xr
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

import problems
from nlsq_dask import FitResult, HybridStreamingConfig, IterationRecord, fit_dataset
from nlsq_dask.errors import ModelError, ResultFileError, SessionError
from nlsq_dask.results.plain import from_text, to_text

SUFFIXES = (".nc", ".h5", ".zarr")


def bits(value):
    """Nested tuples and bytes that are equal where, and only where, every bit of a value is."""
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return "dict", [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [bits(item) for item in value]
    if isinstance(value, IterationRecord):
        return bits({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, float):
        return bits(np.array(float(value)))
    return value


def assert_same(loaded, saved):
    for field in fields(FitResult):
        if field.name not in ("session", "model"):
            found, given = (bits(getattr(fit, field.name)) for fit in (loaded, saved))
            assert found == given, field.name
    assert loaded.session is None


def make_result(**options):
    t, y = problems.make_decay(400, seed=4)
    y[7] = np.nan
    ds = xr.Dataset({"y": ("row", y, {"units": "K"}), "t": ("row", t)})
    return fit_dataset(ds, problems.decay, y="y", **{"p0": problems.P0, **options})


@pytest.fixture(scope="module")
def result():
    return make_result()


def peaks(t, heights, width):
    grid = jnp.linspace(0.0, 10.0, 3)
    return jnp.sum(heights * jnp.exp(-(((t[..., None] - grid) / width) ** 2)), axis=-1)


RESULTS = {
    "plain": lambda: make_result(),
    "fixed": lambda: make_result(fixed=["offset"], p0={"rate": 0.3}, bounds={"rate": (0, 0.4)}),
    "tied": lambda: make_result(
        p0={"rate": 1.0}, ties={"offset": lambda amplitude: 0.05 * amplitude}
    ),
    "robust": lambda: make_result(loss="huber", f_scale="mad"),
    "multistart": lambda: make_result(
        config=HybridStreamingConfig.with_multistart(4, center_on_p0=True)
    ),
    "no covariance": lambda: make_result(config=HybridStreamingConfig(cg_param_threshold=1)),
    "undetermined": lambda: fit_dataset(
        xr.Dataset({"y": ("t", np.arange(40.0))}, coords={"t": np.arange(40.0)}),
        lambda t, a, b, c: (a + b) * t + c,
    ),
    "array": lambda: fit_dataset(
        xr.Dataset({"y": ("t", np.cos(np.linspace(0, 9, 200)))}, {"t": np.linspace(0, 9, 200)}),
        peaks,
        p0={"heights": np.array([1.0, 2.0, -1.0]), "width": 3.0},
    ),
    "not finite": lambda: fit_dataset(
        xr.Dataset({"y": ("t", np.ones(40))}, coords={"t": np.arange(40.0)}),
        lambda t, a: jnp.log(-jnp.abs(a) - t),
    ),
}


@pytest.fixture(scope="module", params=RESULTS)
def any_result(request):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what could not be determined
        return RESULTS[request.param]()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_loaded_is_what_was_saved_to_the_last_bit(any_result, tmp_path, suffix):
    path = tmp_path / f"result{suffix}"
    any_result.save(path)
    loaded = FitResult.load(path)
    assert_same(loaded, any_result)
    assert loaded.summary() == any_result.summary()
    loaded.save(path)
    assert_same(FitResult.load(path), any_result)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_what_to_dataset_gives(result, tmp_path, suffix):
    path = tmp_path / f"result{suffix}"
    result.save(path)
    engine = {"engine": "h5netcdf"} if suffix == ".h5" else {}
    with xr.open_dataset(path, **engine) as opened:
        xr.testing.assert_identical(opened.load(), result.to_dataset())


def test_a_loaded_result_predicts_with_its_model_and_says_so_without(result, tmp_path):
    path = tmp_path / "result.nc"
    result.save(path)
    later = xr.Dataset({"t": ("row", [20.0, 30.0])})
    again = FitResult.load(path, model=problems.decay)
    np.testing.assert_array_equal(again.predict(later), result.predict(later))
    loaded = FitResult.load(path)
    with pytest.raises(ModelError, match=r"with_model.*problems\.decay"):
        loaded.predict(later)
    with pytest.raises(SessionError, match="`ds` must be given"):
        again.predict()
    with pytest.raises(ModelError, match="'rate'"):
        FitResult.load(path, model=lambda t, amplitude, offset, rate: t)
    copy = pickle.loads(pickle.dumps(result)).with_model(problems.decay)
    np.testing.assert_array_equal(copy.predict(later), result.predict(later))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_a_saved_result_is_replaced(result, tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    data = xr.Dataset({"y": ("t", np.arange(3.0))})
    if suffix == ".zarr":
        data.to_zarr(path, zarr_format=2)
    else:
        data.to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ResultFileError, match="would be overwritten"):
        result.save(path)
    with pytest.raises(ResultFileError, match="must be a saved result"):
        FitResult.load(path)
    (tmp_path / "notes.nc").write_text("not HDF5")
    with pytest.raises(ResultFileError, match="would be overwritten"):
        result.save(tmp_path / "notes.nc")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ResultFileError, match="would be overwritten"):
        result.save(tmp_path / "empty.zarr")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_leaves_what_was_there_and_nothing_else(result, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"result{suffix}"
    result.save(path)

    def fail(*args):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        replace(result, details="another").save(path)
    assert os.listdir(tmp_path) == [path.name]
    assert_same(FitResult.load(path), result)


@pytest.mark.skipif(os.name != "posix", reason="no limits on the length of files")
def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, record_property):
    """In a process of its own: h5py, left to write to a full disk itself, crashes."""
    script = Path(__file__).with_name("full_disk_run.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    ends, left = json.loads(done.stdout)
    assert left == []
    assert [end[0] for end in ends.values()] == [os.strerror(errno.EFBIG)] * 4
    assert "could not be saved as" in ends["netCDF"][1]
    assert "could not be saved as" in ends["Zarr"][1]
    assert "could not be written" in ends["checkpoint"][1]
    record_property("full disks", len(ends))
    record_property("full disks that were named", len(ends))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saving_asks_nothing_of_a_cluster(result, tmp_path, suffix, cluster):
    """Not even for a lock, of the client that Dask takes where none is named."""
    with Client(cluster, set_as_default=True):
        result.save(tmp_path / f"result{suffix}")
    assert_same(FitResult.load(tmp_path / f"result{suffix}"), result)


@pytest.mark.parametrize("path", ["result.pickle", "result", "s3://bucket/result.zarr"])
def test_places_that_cannot_be_written_are_refused(result, path):
    with pytest.raises(ResultFileError, match="`path` must be local and end in"):
        result.save(path)
    with pytest.raises(FileNotFoundError, match="not there"):
        FitResult.load("nowhere.nc")


def edit(path, change):
    """Change a saved netCDF file through HDF5 itself."""
    with h5py.File(path, "r+") as file:
        change(file)


def without(name):
    def change(file):
        del file[name]

    return change


def attribute(name, value):
    def change(file):
        if value is None:
            del file.attrs[name]
        else:
            file.attrs[name] = value

    return change


def edited_record(edit_record):
    def change(file):
        record = json.loads(file.attrs["record"])
        edit_record(record)
        file.attrs["record"] = json.dumps(record)

    return change


DAMAGES = {
    "no params": (without("params"), "'popt'"),
    "no cost": (without("cost"), "'cost'"),
    "no history": (without("history_gain"), "history.gain"),
    "no record": (attribute("record", None), "record"),
    "no JSON": (attribute("record", "{"), "cannot be used"),
    "a later format": (attribute("format_version", "2.0"), r"format 1\.1.*'2\.0'"),
    "no version": (attribute("format_version", None), "format"),
    "something else": (attribute("format", "data"), "must be a saved result"),
    "no such status": (attribute("status", "PERFECT"), "PERFECT"),
    "other shapes": (edited_record(lambda r: r["shapes"].pop("rate")), "shape"),
    "no diagnostics": (edited_record(lambda r: r.pop("diagnostics")), "must be of type"),
    "text for a number": (
        edited_record(lambda r: r["provenance"].update(stack_axis="0")),
        "stack_axis",
    ),
    "an unknown kind": (
        edited_record(lambda r: r["diagnostics"].update(x={"!": "object"})),
        "'object'",
    ),
    "a deep nest": (attribute("record", "[" * 50_000 + "]" * 50_000), "cannot be used"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_not_whole_are_refused(result, tmp_path, damage):
    path = tmp_path / "result.nc"
    result.save(path)
    change, words = DAMAGES[damage]
    edit(path, change)
    with pytest.raises(ResultFileError, match=words):
        FitResult.load(path)


def test_a_file_cut_short_is_refused(result, tmp_path):
    path = tmp_path / "result.nc"
    result.save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ResultFileError, match=r"result\.nc"):
        FitResult.load(path)


def test_links_out_of_a_file_are_not_followed(result, tmp_path):
    path, other = tmp_path / "result.nc", tmp_path / "other.nc"
    result.save(path)
    result.save(other)

    def link(file):
        del file["params"]
        file["params"] = h5py.ExternalLink(str(other), "params")

    edit(path, link)
    with pytest.raises(ResultFileError, match="'params' is a link"):
        FitResult.load(path)


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("place", ["compressor", "filters"])
def test_a_codec_that_executes_what_it_reads_is_refused(result, tmp_path, place, monkeypatch):
    # Recent releases of numcodecs decode no pickles unless they are told to.
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    path, mark = tmp_path / "result.zarr", tmp_path / "mark"
    result.save(path)
    described = json.loads((path / "params" / ".zarray").read_text())
    codec = {"id": "pickle", "protocol": 4}
    described.update(compressor=None, filters=None)
    described[place] = codec if place == "compressor" else [codec]
    (path / "params" / ".zarray").write_text(json.dumps(described))
    trap = pickle.dumps(Trap(str(mark)))
    (path / "params" / "0").write_bytes(trap)
    with pytest.raises(ResultFileError, match="pickle"):
        FitResult.load(path)
    assert not mark.exists()
    numcodecs.get_codec(codec).decode(trap)  # and it is a trap
    assert mark.exists()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False)
    | st.just(math.nan)
    | st.sampled_from([np.zeros(0), np.array([[1, -2]]), np.array([np.nan, -0.0, np.inf]), True]),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text().filter(lambda key: key != "!"), inner)
    ),
    max_leaves=20,
)


@given(value=JSON)
def test_nested_values_come_back_as_they_were(value):
    text = to_text(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert bits(from_text(text)) == bits(value)


@pytest.mark.parametrize("value", [object(), {1: 2}, {"!": 1}, np.array([object()]), 1j])
def test_what_json_has_no_word_for_is_refused(value):
    with pytest.raises(TypeError):
        to_text(value)


def test_another_formula_is_warned_of(tmp_path):
    """It may compute the same: only the text of functions can be compared."""
    result = make_result()
    result.save(tmp_path / "fit.nc")

    def decay(t, amplitude, rate, offset):
        return amplitude * t + rate + offset

    with pytest.warns(UserWarning, match="`model` is written otherwise") as caught:
        FitResult.load(tmp_path / "fit.nc", model=decay)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FitResult.load(tmp_path / "fit.nc", model=problems.decay)
        FitResult.load(tmp_path / "fit.nc", model=lambda t, amplitude, rate, offset: amplitude * t)


@pytest.mark.skipif(os.name != "posix", reason="folders are not synced there")
@pytest.mark.parametrize("how", ["sync", "open"])
def test_folders_that_cannot_be_synced_do_not_matter(how, tmp_path, monkeypatch):
    """Not every file system can, and one may be allowed to write and not to look."""
    opened, sync = os.open, os.fsync

    def open_file(path, *arguments, **options):
        if how == "open" and Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    def sync_file(descriptor):
        if how == "sync" and stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        return sync(descriptor)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", sync_file)
    result = make_result(checkpoint=tmp_path / "run.h5")
    result.save(tmp_path / "fit.nc")
    assert_same(FitResult.load(tmp_path / "fit.nc"), result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.nc", "run.h5"]


def test_an_interrupt_while_a_checkpoint_is_written_leaves_nothing(tmp_path, monkeypatch):
    sync, num_calls = os.fsync, 0

    def interrupted(descriptor):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_result(checkpoint=tmp_path / "run.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]
