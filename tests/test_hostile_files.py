"""Files are data: whatever is in them, loading refuses or returns plain data, in bounds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import hostile
from nlsq_dask import HybridStreamingConfig, fit_dataset
from nlsq_dask.checkpoint.file import read_checkpoint, write_checkpoint
from nlsq_dask.errors import CheckpointError


def fuzz(loader, seconds, record_property, *options):
    """In a process of its own: HDF5 is not written in Python, and could end it."""
    script = Path(hostile.__file__)
    command = [sys.executable, str(script), loader, "--seconds", str(seconds), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tally = json.loads(done.stdout.splitlines()[-1])
    assert tally["files fuzzed"] > 50
    assert tally["files refused"] > 0
    for what, count in tally.items():
        record_property(what, count)


@pytest.mark.parametrize("loader", hostile.LOADERS)
def test_mutations(loader, record_property):
    fuzz(loader, 4, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
@pytest.mark.parametrize("loader", hostile.LOADERS)
def test_more_mutations(loader, seed, record_property):
    fuzz(loader, 120, record_property, "--seed", seed)


@pytest.mark.slow
@pytest.mark.parametrize("loader", hostile.LOADERS)
def test_mutations_guided_by_coverage(loader, record_property):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    fuzz(loader, 120, record_property, "--guided")


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
