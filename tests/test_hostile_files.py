"""Files are data: whatever is in them, loading refuses or returns plain data, in bounds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import hostile
from nlsq_dask import FitResult, HybridStreamingConfig, fit_dataset
from nlsq_dask.checkpoint.file import read_checkpoint, write_checkpoint
from nlsq_dask.errors import CheckpointError, ResultFileError


def fuzz(loader, seconds, record_property, *options):
    """In a process of its own: HDF5 is not written in Python, and could end it."""
    command = [sys.executable, hostile.__file__, loader, "--seconds", str(seconds), *options]
    if importlib.util.find_spec("atheris"):  # see pyproject.toml for where
        command.append("--guided")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=2 * seconds + 120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tally = json.loads(done.stdout.splitlines()[-1])
    assert tally["files fuzzed"] > 50
    assert tally["files refused"] > 0
    for what, count in tally.items():
        record_property(what, count)


@pytest.mark.parametrize("loader", hostile.LOADERS)
def test_mutations(loader, record_property):
    fuzz(loader, 2, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
@pytest.mark.parametrize("loader", hostile.LOADERS)
def test_more_mutations(loader, seed, record_property):
    fuzz(loader, 120, record_property, "--seed", seed)


# -- files that are small, and mean much


def forged(path, change):
    hostile.write_small_checkpoint(path)
    with h5py.File(path, "r+") as file:
        change(file)
    path.write_bytes(hostile.seal_checkpoint(path.read_bytes()))
    return path


def bomb(file):
    file.create_dataset("passes/bomb", (2**40,), np.int8, chunks=(2**20,), compression="gzip")


def filled(file):
    """No byte of it is stored: all are the fill value."""
    file.create_dataset("passes/bomb", (2**50,), np.float64, fillvalue=1.0)


def wide_text(file):
    file.create_dataset("passes/bomb", (), "S2000000000")


def nested_type(file):
    dtype = np.dtype(np.float64)
    for _ in range(20):
        dtype = np.dtype((dtype, (2,)))
    file.create_dataset("passes/bomb", data=np.zeros((1,), [("a", dtype)]))


def deep(file):
    group = file["passes"]
    for _ in range(2_000):
        group = group.create_group("g")


def many(file):
    for i in range(10_001):
        file[f"passes/{i}"] = file["passes/rows"]


def looped(file):
    file["passes/again"] = file["passes"]


def reference(file):
    file.create_dataset("passes/r", data=np.array([file["passes"].ref], h5py.ref_dtype))


def several(file):
    file.attrs.create("format", np.zeros(2**10), dtype="f8")


FORGED = {
    "bomb": (bomb, "one piece"),
    "fill values": (filled, "one piece"),
    "text of two gigabytes": (wide_text, "one piece"),
    "compound type": (nested_type, "not of numbers or text"),
    "deep groups": (deep, "not a dataset"),
    "many links": (many, "parts"),
    "a circle": (looped, "not a dataset"),
    "references": (reference, "not of numbers|one piece"),
    "another format": (several, "not a checkpoint"),
    "path out of the folder": (
        lambda file: file.__setitem__("passes/x", h5py.ExternalLink("../../etc/passwd", "/")),
        "is a link",
    ),
    "a link to nothing": (
        lambda file: file.__setitem__("passes/x", h5py.SoftLink("/nowhere")),
        "is a link",
    ),
    "variable length": (
        lambda file: file.create_dataset("passes/v", (2,), h5py.vlen_dtype(np.float64)),
        "one piece|not of numbers",
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_checkpoints(what, tmp_path, record_property):
    change, message = FORGED[what]
    path = forged(tmp_path / "file.h5", change)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)
    assert time.perf_counter() - start < 10
    record_property("files forged", 1)
    record_property("forged files refused", 1)


# -- results


@pytest.fixture(scope="module", params=[".nc", ".zarr"])
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / f"result{request.param}"
    hostile.write_result(path)
    return path


@pytest.fixture
def result_file(saved, tmp_path):
    """A copy, to be spoilt."""
    path = tmp_path / saved.name
    if saved.is_dir():
        shutil.copytree(saved, path)
    else:
        shutil.copy(saved, path)
    return path


def refuse_result(path, message, record_property):
    """Refused for that reason, soon, in little memory."""
    record_property("files forged", 1)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(ResultFileError, match=message) as raised:
            FitResult.load(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.name in str(raised.value)
    assert time.perf_counter() - start < 10
    assert peak_bytes < 2**24
    record_property("forged files refused", 1)


def instead(name, change):
    """Another dataset under the name of one that is there."""

    def forge(file):
        del file[name]
        change(file, name)

    return forge


def huge_attribute(file):
    """Where all of them could be the same one."""
    texts = np.array(["x" * 1_000] * 1_000, h5py.string_dtype())
    file.attrs.create("details", texts)


def many_texts(file, name):
    file.create_dataset(name, (2**20,), h5py.string_dtype())


HDF5 = {
    "bomb": (
        instead(
            "params",
            lambda f, n: f.create_dataset(n, (2**37,), "f8", chunks=(2**20,), compression="gzip"),
        ),
        "'/params' is not stored in one piece",
    ),
    "fill values": (
        instead("params", lambda f, n: f.create_dataset(n, (2**40,), "f8", fillvalue=1.0)),
        "'/params' is not stored in one piece",
    ),
    "a file elsewhere": (
        instead(
            "params",
            lambda f, n: f.create_dataset(n, (3,), "f8", external=[("/etc/passwd", 0, 24)]),
        ),
        "'/params' is not stored in one piece",
    ),
    "an external link": (
        instead("params", lambda f, n: f.__setitem__(n, h5py.ExternalLink("../x.nc", "/params"))),
        "'params' is a link",
    ),
    "a soft link": (
        instead("params", lambda f, n: f.__setitem__(n, h5py.SoftLink("/p0"))),
        "'params' is a link",
    ),
    "a group": (instead("params", lambda f, n: f.create_group(n)), "is not a dataset"),
    "a virtual dataset": (
        instead(
            "params",
            lambda f, n: f.create_virtual_dataset(n, h5py.VirtualLayout((3,), "f8")),
        ),
        "not stored in one piece",
    ),
    "many texts": (instead("params", many_texts), "not stored in one piece|is of"),
    "integers for numbers": (
        instead("params", lambda f, n: f.create_dataset(n, data=np.arange(3))),
        "'popt' is not of float64 numbers",
    ),
    "bytes that are no booleans": (
        instead("is_free", lambda f, n: f.create_dataset(n, data=np.full(3, 7, np.int8))),
        "neither true nor false",
    ),
    "another length": (
        instead("params", lambda f, n: f.create_dataset(n, data=np.zeros(10_000))),
        "wrong shape",
    ),
    "an attribute of many texts": (huge_attribute, "'details' is not one text"),
    "an attribute of a number": (lambda f: f.attrs.create("details", 3.0), "is not one text"),
    "another format": (lambda f: f.attrs.__setitem__("format", "nlsq"), "says that it is none"),
}


@pytest.mark.parametrize("saved", [".nc"], indirect=True)
@pytest.mark.parametrize("what", HDF5)
def test_forged_netcdf(what, result_file, record_property):
    change, message = HDF5[what]
    with h5py.File(result_file, "r+") as file:
        change(file)
    refuse_result(result_file, message, record_property)


def described(folder, **changes):
    path = folder / "params" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def array_of_pieces(folder):
    described(folder, chunks=[1])
    for i in range(3):
        (folder / "params" / str(i)).write_bytes(bytes(8))


def lead(to):
    def forge(folder, name):
        path = folder / name
        elsewhere = folder.parent / "elsewhere"
        path.rename(elsewhere)
        os.symlink(elsewhere if to == "the same" else to, path)

    return forge


def link(name, to="the same"):
    return lambda folder: lead(to)(folder, name)


def with_holes(folder):
    """A terabyte that is not on the disk."""
    described(folder, shape=[2**37], chunks=[2**37])
    os.truncate(folder / "params" / "0", 2**40)


ZARR = {
    "bomb": (
        lambda d: described(d, compressor={"id": "zlib", "level": 9}, shape=[2**40]),
        "'params' has codecs.*zlib",
    ),
    "pickles": (lambda d: described(d, filters=[{"id": "pickle"}]), "has codecs.*pickle"),
    "fill values": (
        lambda d: described(d, shape=[2**24], chunks=[2**24]),
        "must have 134,217,728 bytes, got 24",
    ),
    "endless": (lambda d: described(d, shape=[2**62], chunks=[2**62]), "bytes, and .* are free"),
    "holes": (with_holes, "arrays have 1,099,511,62.* bytes, and .* are free"),
    "negative": (lambda d: described(d, shape=[-3], chunks=[-3]), "not stored in one piece"),
    "in pieces": (array_of_pieces, "not stored in one piece"),
    "text for a shape": (lambda d: described(d, shape="3"), "not stored in one piece"),
    "objects": (lambda d: described(d, dtype="|O"), r"is of '\|O'"),
    "nested dtype": (lambda d: described(d, dtype=[["a", "<f8"]]), "is of "),
    "format 3": (lambda d: (d / ".zgroup").unlink(), "must be a Zarr group of format 2"),
    "a chunk missing": (lambda d: (d / "params" / "0").unlink(), "No such file"),
    "a chunk too short": (
        lambda d: (d / "params" / "0").write_bytes(b"1234567"),
        "must have 24 bytes, got 7",
    ),
    "a chunk too long": (
        lambda d: (d / "params" / "0").write_bytes(bytes(10_000_000)),
        "has 10,000,000 bytes, of at most 24",
    ),
    "a chunk that is a link": (link("params/0"), "'params/0' is a link"),
    "a chunk that is a device": (link("params/0", "/dev/zero"), "'params/0' is a link"),
    "an array that is a link": (link("params"), "'params' is a link"),
    "attributes that are a link": (link(".zattrs"), "'.zattrs' is a link"),
    "a description that is a link": (link("params/.zarray"), "'params/.zarray' is a link"),
    "no array": (lambda d: shutil.rmtree(d / "params"), "'popt'"),
    "attributes that are no object": (
        lambda d: (d / ".zattrs").write_text("[]"),
        "is not an object of JSON",
    ),
    "deep attributes": (
        lambda d: (d / ".zattrs").write_text("[" * 100_000),
        "nested too deeply",
    ),
    "attributes that are no text": (
        lambda d: (d / ".zattrs").write_text(json.dumps({"format": [1]})),
        r"its attributes \['format'\] are not text",
    ),
    "large attributes": (
        lambda d: os.truncate(d / ".zattrs", 2**40),
        r"'.zattrs' has 1,099,511,627,776 bytes",
    ),
    "a pipe": (
        lambda d: ((d / "params" / "0").unlink(), os.mkfifo(d / "params" / "0")),
        "'params/0' is a link, or not a file",
    ),
}


@pytest.mark.parametrize("saved", [".zarr"], indirect=True)
@pytest.mark.parametrize("what", ZARR)
def test_forged_zarr(what, result_file, record_property):
    change, message = ZARR[what]
    change(result_file)
    refuse_result(result_file, message, record_property)


def test_names_in_a_result_are_not_paths(result_file, record_property):
    """Arrays are looked for by the package's own names alone; parameters' names are text."""
    name = "../../../tmp/x"
    if result_file.is_dir():
        text = (result_file / ".zattrs").read_text()
        record = json.loads(json.loads(text)["record"])
        record["shapes"] = {name: {"!": "tuple", "items": [3]}}
        attributes = {**json.loads(text), "record": json.dumps(record)}
        (result_file / ".zattrs").write_text(json.dumps(attributes))
    else:
        with h5py.File(result_file, "r+") as file:
            record = json.loads(file.attrs["record"])
            record["shapes"] = {name: {"!": "tuple", "items": [3]}}
            file.attrs["record"] = json.dumps(record)
    result = FitResult.load(result_file)
    assert result.param_names == tuple(f"{name}[{i}]" for i in range(3))
    record_property("files forged", 1)


# -- a checkpoint that is well-formed, of numbers that no fit writes


def curved(t, a, b):
    return a * jnp.exp(-b * t)


T = np.linspace(0, 1, 50)
DS = xr.Dataset({"y": ("t", 2 * T + 1)}, coords={"t": T})
RUNS = {
    "passes": {"max_passes": 1},
    "newton": {"max_passes": 1, "cg_param_threshold": 1},
    "tournament": {"max_passes": 1, "enable_multistart": True},
}


def instead_of(leaf):
    """What else a leaf might hold."""
    if isinstance(leaf, str):
        yield from ("", "x" * 1_000)
    elif leaf.dtype.kind == "f":
        yield from (np.full_like(leaf, number) for number in (np.nan, np.inf, -1.0, 0.0, 1e308))
        yield np.stack([leaf, leaf], axis=-1)
        yield np.zeros(0)
    elif leaf.dtype.kind == "i":
        yield from (np.full_like(leaf, number) for number in (-1, 0, 2**63 - 1))
    else:
        yield ~leaf


# Numbers that are as large as they come overflow; the status says what came of it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::scipy.optimize.OptimizeWarning")
@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_fit_ends_or_refuses(kind, tmp_path, record_property):
    """Also what is well-formed cannot make it hang, fail otherwise, or leave the bounds."""
    options = {**RUNS[kind]}
    passes = options.pop("max_passes")
    path = tmp_path / "run.h5"
    first = fit_dataset(
        DS,
        curved,
        y="y",
        p0=[1.0, 5.0],
        bounds=([-50, -50], [50, 50]),
        checkpoint=path,
        config=HybridStreamingConfig(max_passes=passes, **options),
    )
    assert first.num_passes == passes
    sections = read_checkpoint(path)
    config = HybridStreamingConfig(
        resume_from_checkpoint=path, enable_checkpoints=False, max_passes=20, **options
    )
    changes = [
        (section, name, value)
        for section in sections
        if section not in ("identity", "about")
        for name, leaf in sections[section].items()
        for value in instead_of(leaf)
    ]
    rng = np.random.default_rng(0)
    for index in rng.choice(len(changes), 60, replace=False):
        section, name, value = changes[index]
        altered = {**sections, section: {**sections[section], name: value}}
        write_checkpoint(path, altered)
        record_property("checkpoints altered", 1)
        try:
            result = fit_dataset(
                DS, curved, y="y", p0=[1.0, 5.0], bounds=([-50, -50], [50, 50]), config=config
            )
        except CheckpointError:
            record_property("altered checkpoints refused", 1)
            continue
        record_property("fits that ended from altered checkpoints", 1)
        assert np.isfinite(result.popt).all()
        assert (np.abs(result.popt) <= 50).all()


def test_parameters_are_those_that_were_evaluated(tmp_path):
    path = tmp_path / "run.h5"
    fit_dataset(DS, curved, y="y", p0=[1.0, 5.0], checkpoint=path)
    sections = read_checkpoint(path)
    sections["passes"]["state.params"] = np.array([3.0, 4.0])
    write_checkpoint(path, sections)
    with pytest.raises(CheckpointError, match="not those that were evaluated"):
        fit_dataset(
            DS,
            curved,
            y="y",
            p0=[1.0, 5.0],
            config=HybridStreamingConfig(resume_from_checkpoint=path),
        )
