"""A fit that was killed and resumed has the same bits; no other file is taken for its own."""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint_run
import config_rows_checkpoint
import config_rows_many
import problems
from nlsq_dask import (
    AdaptiveHybridStreamingOptimizer,
    HybridStreamingConfig,
    curve_fit,
    fit_dataset,
)
from nlsq_dask.checkpoint import file as checkpoint_file
from nlsq_dask.checkpoint.file import read_checkpoint, write_checkpoint
from nlsq_dask.errors import CheckpointError
from nlsq_dask.evaluate.local import LocalEvaluator
from nlsq_dask.status import Status
from nlsq_dask.telemetry import IterationRecord

NUM_ROWS = 120_000
PACKAGE = Path(__file__).parents[1] / "nlsq_dask"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    t, y = problems.make_decay(NUM_ROWS)
    y[::50] += 4.0
    path = tmp_path_factory.mktemp("checkpoint") / "a.zarr"
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})
    ds.chunk(row=20_000).to_zarr(path, consolidated=False)
    return path


@pytest.fixture(scope="module")
def expected(store):
    return {kind: checkpoint_run.fit(store, kind) for kind in checkpoint_run.KINDS}


def assert_same_bits(actual, expected, is_cached=False):
    np.testing.assert_array_equal(actual.popt, expected.popt)
    np.testing.assert_array_equal(actual.pcov, expected.pcov)
    assert actual.cost == expected.cost
    assert actual.status is expected.status
    assert actual.num_passes == expected.num_passes
    assert actual.f_scale == expected.f_scale
    for one, other in zip(actual.history, expected.history, strict=True):
        for field in fields(IterationRecord):
            # What a new process has not cached is read again.
            if field.name not in ("seconds", "bytes_read"):
                np.testing.assert_array_equal(vars(one)[field.name], vars(other)[field.name])
    for name in ("optima", "switched_at_gate", "chunks", "checks", "warmup", "precision", "notes"):
        assert repr(actual.diagnostics[name]) == repr(expected.diagnostics[name])


def stop_after(num_passes):
    def callback(record):
        if record.phase == 2 and record.num_passes >= num_passes:
            raise StopIteration

    return callback


def run(*arguments: object) -> None:
    """The fit in a process of its own, which has to die of SIGKILL."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, checkpoint_run.__file__, *map(str, arguments)],
        env=environment,
        timeout=200,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


# -- killed and resumed

# The kind of fit, where it is killed, and how many passes are written by then.
KILLS = {
    "in the warmup": ("linear", "warmup", 12, 0),
    "after a pass": ("linear", "callback", 2, 2),
    "in the first pass": ("linear", "pass", 1, 0),
    "in the middle of a pass": ("robust", "pass", 3, 2),
    "before the covariance": ("robust", "callback", 3, 3),
}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("how", KILLS)
def test_same_bits_after_sigkill(how, store, expected, tmp_path):
    kind, where, at, num_written = KILLS[how]
    path = tmp_path / "run.h5"
    run(store, path, where, at, kind, "")
    sections = read_checkpoint(path)
    written = sections.get("passes", {}).get("history.num_passes", np.zeros(0))
    assert len(written) == num_written
    passes = Counted()
    actual = passes.fit(store, kind, resume_from_checkpoint=path)
    assert_same_bits(actual, expected[kind])
    assert passes.count == expected[kind].num_passes - num_written > 0


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_same_bits_after_sigkill_in_the_middle_of_a_write(store, expected, tmp_path):
    path = tmp_path / "run.h5"
    num_before = 5
    run(store, path, "write", num_before, "linear", "")
    left = [entry.name for entry in tmp_path.iterdir()]
    assert len(left) == 2  # the one before, and the one that never got its name
    assert_same_bits(checkpoint_run.fit(store, resume_from_checkpoint=path), expected["linear"])


@pytest.mark.cluster
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_same_bits_after_sigkill_on_a_cluster(
    store, expected, cluster, client, tmp_path, record_property
):
    path = tmp_path / "run.h5"
    run(store, path, "callback", 2, "robust", cluster.scheduler_address)
    for where in (client, None):
        actual = checkpoint_run.fit(store, "robust", resume_from_checkpoint=path, client=where)
        assert_same_bits(actual, expected["robust"])
        break_off = stop_after(2)
        checkpoint_run.fit(store, "robust", checkpoint=path, client=where, callback=break_off)
    record_property("faults of a cluster tried", 1)
    record_property("faults of a cluster ended with the same bits", 1)


class Counted:
    """Counts the passes of fits in this process."""

    def __init__(self) -> None:
        self.count = 0

    def fit(self, *arguments: Any, **options: Any) -> Any:
        evaluate = LocalEvaluator.evaluate

        def counting(evaluator, request):
            self.count += 1
            return evaluate(evaluator, request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalEvaluator, "evaluate", counting)
            return checkpoint_run.fit(*arguments, **options)


# -- broken off and resumed, after each pass


def two_bumps(t, height, place, width):
    return height * jnp.exp(-(((t - place) / width) ** 2))


def far_decay(t, level, rate):
    return jnp.exp(level - rate * t)


def make_fit(what: str) -> tuple[xr.Dataset, Any, dict[str, Any], dict[str, Any]]:
    """Data, model, arguments and options of fits that take different ways."""
    t, y = problems.make_decay(NUM_ROWS, seed=3)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y), "s": ("row", 0.1 + 0 * t)})
    start = {**problems.P0, "rate": 3.0}
    options: dict[str, Any] = {"max_warmup_iterations": 0}
    if what == "mixed precision":
        # The level at time zero is hard to tell from the rate.
        shifted = ds.assign(t=ds.t + 2_000.0)
        start = {"p0": {"level": 1_001.0, "rate": 0.5}}
        return shifted, far_decay, start, {**options, "precision": "mixed"}
    if what == "priors, ties, groups":

        def tied(t, c, rate, twice):
            return c[0] * jnp.exp(-rate * t) + 0.1 * c[1] + 0.05 * twice

        arguments = {
            "p0": {"c": np.ones(2), "rate": 3.0},
            "ties": {"twice": lambda rate: 2 * rate},
            "priors": {"rate": (0.6, 0.1)},
            "sigma": "s",
            "absolute_sigma": True,
        }
        groups = {
            "enable_group_variance_regularization": True,
            "group_variance_indices": [(0, 2)],
        }
        return ds, tied, arguments, {**options, **groups}
    if what == "multistart":
        arguments = {"p0": start, "bounds": dict.fromkeys(start, (-1, 9))}
        return ds, problems.decay, arguments, {"enable_multistart": True, "n_starts": 6}
    return ds, problems.decay, {"p0": start, "covariance": "HC0"}, options


@pytest.mark.parametrize(
    "what",
    [
        "sandwich",
        pytest.param("mixed precision", marks=pytest.mark.slow),
        pytest.param("priors, ties, groups", marks=pytest.mark.slow),
        pytest.param("multistart", marks=pytest.mark.slow),
    ],
)
def test_same_bits_from_any_pass(what, tmp_path):
    ds, model, arguments, options = make_fit(what)
    path = tmp_path / "run.h5"

    def fit(callback=None, checkpoint=None, **more):
        config = HybridStreamingConfig(**options, **more)
        return fit_dataset(
            ds, model, y="y", config=config, callback=callback, checkpoint=checkpoint, **arguments
        )

    whole = fit()
    assert len(whole.history) > 1
    assert bool(whole.diagnostics["precision"]["reason"]) is (what == "mixed precision")
    for at in range(1, len(whole.history) + 1):
        fit(stop_after(at), path)
        assert_same_bits(fit(resume_from_checkpoint=path), whole)


@pytest.mark.slow
def test_same_bits_where_another_optimum_wins_the_first_pass(tmp_path, monkeypatch):
    """The costs of the rivals are known before it is decided, and the file is written between."""
    from nlsq_dask import phases

    monkeypatch.setattr(phases, "equal_cost", lambda cost, *_: -0.5 * cost)
    rng = np.random.default_rng(0)
    t = np.linspace(-10.0, 10.0, NUM_ROWS)
    y = np.exp(-((t - 5) ** 2)) + 0.9 * np.exp(-((t + 5) ** 2)) + 0.1 * rng.normal(size=t.size)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})
    path = tmp_path / "run.h5"

    def fit(callback=None, checkpoint=None, **more):
        return fit_dataset(
            ds,
            two_bumps,
            y="y",
            p0=[1.0, 0.5, 2.0],
            callback=callback,
            checkpoint=checkpoint,
            config=HybridStreamingConfig(**more),
        )

    whole = fit()
    assert whole.diagnostics["switched_at_gate"]
    for at in range(1, len(whole.history) + 1):
        fit(stop_after(at), path)
        assert_same_bits(fit(resume_from_checkpoint=path), whole)


@pytest.mark.parametrize("bounds", [pytest.param(None, marks=pytest.mark.slow), {"c": (-0.1, 0.1)}])
def test_same_bits_with_many_parameters(bounds, tmp_path):
    """At trials and amid conjugate gradients."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 197, 80_000)
    y = np.sin(x / 20) + 0.3 * rng.normal(size=x.size)
    ds = xr.Dataset({"y": ("row", y)}, coords={"x": ("row", x)})
    path = tmp_path / "run.h5"

    def fit(callback=None, checkpoint=None, **more):
        config = HybridStreamingConfig(cg_param_threshold=200, precision="mixed", **more)
        return fit_dataset(
            ds,
            config_rows_many.cubic,
            p0={"c": np.zeros(200)},
            bounds=bounds,
            config=config,
            callback=callback,
            checkpoint=checkpoint,
        )

    whole = fit()
    kinds = [record.is_product for record in whole.history]
    assert {True, False} == set(kinds)
    for at in {1, 2, 3, len(kinds) - 1, len(kinds)}:
        fit(stop_after(at), path)
        again = fit(resume_from_checkpoint=path)
        np.testing.assert_array_equal(again.popt, whole.popt)
        assert again.cost == whole.cost
        assert again.status is whole.status
        assert again.num_passes == whole.num_passes
        assert repr(again.diagnostics["chunks"]) == repr(whole.diagnostics["chunks"])
        assert repr(again.diagnostics["sample"]) == repr(whole.diagnostics["sample"])


# -- limits


LIMITS = {
    "max_passes": ({"max_passes": 2}, {}, Status.MAX_PASSES),
    "more passes": ({"max_passes": 1}, {"max_passes": 50}, Status.MAX_PASSES),
    "max_seconds": ({"max_seconds": 1e-9}, {}, Status.MAX_SECONDS),
    "iterations": ({"gauss_newton_max_iterations": 1}, {}, Status.MAX_ITERATIONS),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_fit_that_met_a_limit_goes_on_under_a_wider_one(limit, store, expected, tmp_path):
    narrow, wide, status = LIMITS[limit]
    path = tmp_path / "run.h5"
    first = checkpoint_run.fit(store, checkpoint=path, **narrow)
    assert first.status is status
    again = checkpoint_run.fit(store, resume_from_checkpoint=path, **narrow)
    assert again.status is status
    if limit != "max_seconds":  # which counts anew
        assert again.num_passes == first.num_passes
        np.testing.assert_array_equal(again.popt, first.popt)
    whole = checkpoint_run.fit(store, resume_from_checkpoint=path, **wide)
    assert_same_bits(whole, expected["linear"])


@pytest.mark.parametrize("kind", checkpoint_run.KINDS)
def test_a_finished_fit_is_resumed_without_a_pass(kind, store, expected, tmp_path):
    path = tmp_path / "run.h5"
    checkpoint_run.fit(store, kind, checkpoint=path)
    passes = Counted()
    again = passes.fit(store, kind, resume_from_checkpoint=path)
    assert passes.count == 0
    assert_same_bits(again, expected[kind])
    assert again.bytes_read == expected[kind].bytes_read


def test_a_fit_that_failed_is_resumed_as_failed(tmp_path):
    t, y = problems.make_decay(1_000)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})

    def fit(**options):
        checkpoint = options.pop("checkpoint", None)
        return fit_dataset(
            ds,
            lambda t, a: jnp.log(-jnp.abs(a)) * t,
            y="y",
            checkpoint=checkpoint,
            config=HybridStreamingConfig(**options),
        )

    first = fit(checkpoint=tmp_path / "run.h5")
    again = fit(resume_from_checkpoint=tmp_path / "run.h5")
    assert first.status is again.status is Status.NOT_FINITE
    assert first.message == again.message


# -- where it is written


def small(**options):
    t, y = problems.make_decay(2_000)
    arguments = {
        name: options.pop(name)
        for name in ("checkpoint", "model", "p0", "bounds", "loss", "f_scale", "sigma")
        if name in options
    }
    data = options.pop("data", xr.Dataset({"t": ("row", t), "y": ("row", y)}))
    model = arguments.pop("model", problems.decay)
    arguments.setdefault("p0", problems.P0)
    config = HybridStreamingConfig(max_warmup_iterations=0, **options)
    return fit_dataset(data, model, y="y", config=config, **arguments)


def test_only_resume_from_checkpoint_resumes(tmp_path):
    path = tmp_path / "run.h5"
    first = small(checkpoint=path)
    assert first.diagnostics["checkpoint"] == {"path": str(path), "resumed_from": None}
    again = small(checkpoint=str(path))
    assert again.diagnostics["checkpoint"]["resumed_from"] is None
    resumed = small(resume_from_checkpoint=path)
    assert resumed.diagnostics["checkpoint"] == {"path": str(path), "resumed_from": str(path)}


def test_another_file_can_be_written_than_was_resumed(tmp_path):
    small(checkpoint=tmp_path / "one.h5", max_passes=1)
    before = (tmp_path / "one.h5").read_bytes()
    small(checkpoint=tmp_path / "two.h5", resume_from_checkpoint=tmp_path / "one.h5")
    assert (tmp_path / "one.h5").read_bytes() == before
    assert "passes" in read_checkpoint(tmp_path / "two.h5")


def test_a_folder_gets_a_file_for_each_fit(tmp_path):
    folder = tmp_path / "new" / "folder"
    config = HybridStreamingConfig(checkpoint_dir=folder)
    t, y = problems.make_decay(500)
    optimizer = AdaptiveHybridStreamingOptimizer(config)
    result = optimizer.fit((t, y), problems.decay, [1.0, 1.0, 0.0])
    curve_fit(problems.decay, t, y, [1.0, 1.0, 0.0], config=config)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2
    assert all(name.startswith("decay-") and name.endswith(".h5") for name in names)
    assert Path(result.diagnostics["checkpoint"]["path"]).name in names


def test_nothing_is_written_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = small()
    assert result.diagnostics["checkpoint"] == {"path": None, "resumed_from": None}
    small(checkpoint_dir=tmp_path / "none", enable_checkpoints=False)
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "link.h5").symlink_to(tmp_path / "real.h5")
    small(checkpoint=tmp_path / "link.h5")
    assert (tmp_path / "link.h5").is_symlink()
    assert read_checkpoint(tmp_path / "real.h5")


PLACES = {
    "a URL": ("s3://bucket/run.h5", "local path"),
    "no folder": ("{}/nowhere/run.h5", "folder that can be written to"),
    "a folder": ("{}", "would be overwritten"),
    "data": ("{}/data.nc", "would be overwritten"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_will_not_do_is_refused_before_any_pass(place, tmp_path):
    (tmp_path / "data.nc").write_bytes(b"precious")
    path, message = PLACES[place]
    with pytest.raises(CheckpointError, match=message):
        refused(checkpoint=path.format(tmp_path))
    assert (tmp_path / "data.nc").read_bytes() == b"precious"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_before_any_pass(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="folder that can be written to"):
        refused(checkpoint=tmp_path / "run.h5")
    tmp_path.chmod(0o700)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="`checkpoint_dir` must be a folder"):
        refused(checkpoint_dir=tmp_path / "file")


def test_contradictions_and_wrong_types_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="enable_checkpoints=False"):
        refused(checkpoint=tmp_path / "run.h5", enable_checkpoints=False)
    with pytest.raises(TypeError, match="`checkpoint` must be a path"):
        refused(checkpoint=3)
    with pytest.raises(CheckpointError, match="must be a local path"):
        refused(resume_from_checkpoint="https://example.org/run.h5")
    with pytest.raises(CheckpointError, match="must name a checkpoint"):
        refused(resume_from_checkpoint=tmp_path / "none.h5")


def refused(**options):
    """A fit that must not come as far as a pass."""

    def no_pass(evaluator, request):
        raise AssertionError("a pass was made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEvaluator, "evaluate", no_pass)
        return small(**options)


# -- written whole or not at all


FAILURES = ["fsync", "replace"]


@pytest.mark.parametrize("call", FAILURES)
def test_an_old_checkpoint_survives_a_failed_write(call, tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    small(checkpoint=path)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_file.os, call, full)
    with pytest.raises(OSError, match="No space left") as error:
        small(checkpoint=path)
    assert "could not be written" in error.value.__notes__[0]
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.h5"]


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be opened")
def test_file_and_folder_reach_the_disk_in_order(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor):
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        calls.append("folder" if is_folder else "file")
        fsync(descriptor)

    def noting_replace(source, target):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(checkpoint_file.os, "fsync", noting_fsync)
    monkeypatch.setattr(checkpoint_file.os, "replace", noting_replace)
    write_checkpoint(tmp_path / "run.h5", {"about": {"text": "x"}})
    assert calls == ["file", "replace", "folder"]


# -- other fits


def doubled(t, amplitude, rate, offset):
    return amplitude * jnp.exp(-rate * t) + 2 * offset


def renamed(t, amplitude, speed, offset):
    return amplitude * jnp.exp(-speed * t) + offset


def make_data(num_rows=2_000, seed=0, dtype=np.float64, sigma=False, last=0.0):
    t, y = problems.make_decay(num_rows, seed=seed)
    y[-1] += last
    data = {"t": ("row", t), "y": ("row", y.astype(dtype))}
    if sigma:
        data["s"] = ("row", np.ones(num_rows))
    return xr.Dataset(data)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": doubled}, "the model computes something else"),
    "names": (
        {"model": renamed, "p0": [1.0, 1.0, 0.0]},
        r"the parameters: .*\"rate\".* in the checkpoint, .*\"speed\"",
    ),
    "start": (
        {"p0": {**problems.P0, "rate": 1.5}},
        "`p0` of 'rate': 1.0 in the checkpoint, 1.5 now",
    ),
    "bounds": (
        {"bounds": {"rate": (0, 5)}},
        "the lower bound of 'rate': -inf in the checkpoint, 0.0 now",
    ),
    "loss": ({"loss": "huber"}, "`loss`: linear in the checkpoint, huber now"),
    "seed": ({"seed": 1}, "`seed` of the configuration: 0 in the checkpoint, 1 now"),
    "tolerance": ({"distance_tol": 1e-3}, "`distance_tol` of the configuration"),
    "precision": ({"precision": "mixed"}, "`precision` of the configuration"),
    "rows": ({"data": make_data(1_999)}, "of the columns: "),
    "type": ({"data": make_data(dtype=np.float32)}, "of the columns: "),
    "sigma": ({"data": make_data(sigma=True), "sigma": "s"}, "of the columns: "),
    "values": ({"data": make_data(seed=1)}, "the data have changed"),
    "one value": ({"data": make_data(last=1e-12)}, "the data have changed"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "run.h5"
    small(checkpoint=path)
    return path


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_fit_is_refused_by_what_differs(what, kept):
    changed, message = OTHERS[what]
    before = kept.read_bytes()
    with pytest.raises(CheckpointError, match=message) as error:
        refused(resume_from_checkpoint=kept, **changed)
    assert str(kept) in str(error.value)
    assert isinstance(error.value, ValueError)
    assert kept.read_bytes() == before


def test_a_change_that_the_sample_does_not_see_is_refused_by_the_next_pass(store, tmp_path):
    path, other = tmp_path / "run.h5", tmp_path / "b.zarr"
    checkpoint_run.fit(store, checkpoint=path, callback=stop_after(2))
    before = path.read_bytes()
    ds = xr.open_zarr(store, consolidated=False).load()
    sampled = sampled_rows(store)
    unseen = int(np.setdiff1d(np.arange(NUM_ROWS), sampled)[0])
    ds.y[unseen] += 1.0
    ds.chunk(row=20_000).to_zarr(other, consolidated=False)
    with pytest.raises(CheckpointError, match="other data: over all rows"):
        checkpoint_run.fit(other, resume_from_checkpoint=path)
    assert path.read_bytes() == before


def sampled_rows(store) -> np.ndarray:
    """Which rows the sample holds; their `t` says it."""
    from nlsq_dask import phases

    seen = []
    draw = phases.draw_sample

    def noting(*arguments, **options):
        sample = draw(*arguments, **options)
        seen.append(sample.source.x[0].read((slice(None),)))
        return sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "draw_sample", noting)
        checkpoint_run.fit(store, max_passes=1)
    return np.round(seen[0] / 10.0 * (NUM_ROWS - 1)).astype(int)


def test_options_that_change_no_bit_may_differ(kept):
    result = small(
        resume_from_checkpoint=kept,
        enable_checkpoints=False,
        max_passes=7,
        cache_bytes=0,
        prefetch=False,
        verbose=0,
        callback_frequency=3,
    )
    assert result.success


def test_a_model_that_cannot_be_recognised_has_no_checkpoints(tmp_path):
    import jax

    def hosted(t, amplitude, rate, offset):
        jax.debug.callback(lambda: None)
        return problems.decay(t, amplitude, rate, offset)

    with pytest.raises(CheckpointError, match="hosted calls back to Python"):
        refused(model=hosted, checkpoint=tmp_path / "run.h5")


# -- other files


def seal(image: bytes) -> bytes:
    """With the digest of what it holds, as someone might who means ill."""
    header = b"nlsq_dask checkpoint\n" + hashlib.sha256(image[512:]).hexdigest().encode()
    return header.ljust(512, b"\n") + image[512:]


def rewritten(kept, path, change):
    """A copy with something changed, and the right digest."""
    path.write_bytes(kept.read_bytes())
    with h5py.File(path, "r+") as file:
        change(file)
    path.write_bytes(seal(path.read_bytes()))
    return path


def put(name, value):
    def change(file):
        del file[name]
        file[name] = value

    return change


def object_array(file):
    del file["passes/bins"]
    file.create_dataset("passes/bins", data=["text"], dtype=h5py.string_dtype())


def virtual(file):
    del file["passes/bins"]
    layout = h5py.VirtualLayout((4,), np.float64)
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    file.create_virtual_dataset("passes/bins", layout)


def external(file):
    del file["passes/bins"]
    file.create_dataset("passes/bins", (4,), np.float64, external=[("/etc/passwd", 0, 32)])


def compressed(file):
    del file["passes/bins"]
    file.create_dataset("passes/bins", data=np.zeros((10**6, 4)), compression="gzip")


def unallocated(file):
    del file["passes/bins"]
    file.create_dataset("passes/bins", (10**12, 4), np.float64)


CHANGES: dict[str, tuple[Any, str]] = {
    "later version": (
        lambda file: file.attrs.modify("format_version", np.bytes_("4.1")),
        "format 4.1, and this version of the package reads 4.0",
    ),
    "other format": (lambda file: file.attrs.modify("format", np.bytes_("x")), "not a checkpoint"),
    "long attribute": (
        lambda file: file.attrs.modify("format", np.bytes_("x" * 5_000)),
        "not a checkpoint",
    ),
    "soft link": (put("passes/bins", h5py.SoftLink("/passes/history.cost")), "is a link"),
    "external link": (put("passes", h5py.ExternalLink("other.h5", "/passes")), "is a link"),
    "group": (lambda file: (file.pop("passes/bins"), file.create_group("passes/bins")), "dataset"),
    "dataset": (lambda file: (file.pop("passes"), put("passes", 1.0)), "missing|malformed|"),
    "objects": (object_array, "not stored in one piece|not of numbers"),
    "virtual": (virtual, "not stored in one piece"),
    "external storage": (external, "not stored in one piece"),
    "compressed": (compressed, "not stored in one piece"),
    "unallocated": (unallocated, "not stored in one piece"),
    "single precision": (put("passes/bins", np.zeros((1, 4), "f4")), "not of numbers or text"),
    "complex": (put("passes/bins", np.zeros((1, 4), complex)), "not of numbers or text"),
    "missing": (lambda file: file.pop("passes/state.radius"), "'state.radius'"),
    "missing identity": (lambda file: file.pop("identity"), "does not say"),
    "text for a number": (put("passes/state.radius", np.bytes_("1")), "'state.radius'"),
    "array for a number": (put("passes/state.radius", np.ones(2)), "'state.radius'"),
    "integer for a number": (put("passes/state.radius", 1), "'state.radius'"),
    "other length": (put("passes/state.params", np.ones(4)), "'state.params'"),
    "not square": (put("passes/state.model.factor", np.ones((3, 2))), "'state.model.factor'"),
    "unknown status": (put("passes/state.status", np.bytes_("FINE")), "none of a Status"),
    "unknown precision": (put("passes/precision", np.bytes_("half")), "must be one of"),
    "bytes that are no text": (put("passes/precision", np.bytes_(b"\xff")), "malformed"),
    "history": (put("passes/history.cost", np.ones(99)), "'history.cost'"),
    "rivals": (put("passes/rival_costs", np.ones(9)), "optima and their costs"),
    "descents": (put("warmup/finished.ending", np.array([99])), "warmup is malformed"),
}


@pytest.mark.parametrize("what", [name for name in CHANGES if name != "dataset"])
def test_what_is_not_as_it_should_be_is_refused(what, kept, tmp_path):
    change, message = CHANGES[what]
    path = rewritten(kept, tmp_path / "run.h5", change)
    with pytest.raises(CheckpointError, match=message) as error:
        refused(resume_from_checkpoint=path)
    assert str(path) in str(error.value)


def test_parts_that_overlap_are_not_read(tmp_path):
    path = tmp_path / "run.h5"
    write_checkpoint(path, {"about": {"a": np.ones(10_000)}})

    def link(file):
        for i in range(50):
            file[f"about/{i}"] = file["about/a"]

    path.write_bytes(rewritten(path, tmp_path / "other.h5", link).read_bytes())
    with pytest.raises(CheckpointError, match="larger than the file"):
        read_checkpoint(path)


FOREIGN = {
    "nothing": lambda kept: b"",
    "text": lambda kept: b"hello\n" * 1_000,
    "its header alone": lambda kept: kept[:512],
    "half of it": lambda kept: kept[: len(kept) // 2],
    "more than it": lambda kept: kept + b"more",
    "without its header": lambda kept: kept[512:],
    "another header": lambda kept: b"x" + kept[1:],
    "a header and no HDF5": lambda kept: seal(bytes(512) + b"hello" * 1_000),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_checkpoint_is_refused(what, kept, tmp_path):
    path = tmp_path / "run.h5"
    path.write_bytes(FOREIGN[what](kept.read_bytes()))
    with pytest.raises(CheckpointError):
        refused(resume_from_checkpoint=path)


def test_any_damage_is_found(kept, tmp_path):
    image = kept.read_bytes()

    @settings(max_examples=200, deadline=None)
    @given(place=st.integers(0, len(image) - 1), bits=st.integers(1, 255), cut=st.booleans())
    def check(place, bits, cut):
        damaged = bytearray(image)
        damaged[place] ^= bits
        path = tmp_path / "run.h5"
        path.write_bytes(damaged[:place] if cut else damaged)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)

    check()


def test_damage_that_has_the_right_digest_is_refused_or_read(kept, tmp_path):
    """Someone who means ill can compute a digest; that must not take the process down."""
    image = kept.read_bytes()

    @settings(max_examples=50, deadline=None)
    @given(place=st.integers(512, len(image) - 1), value=st.sampled_from([0, 1, 127, 255]))
    def check(place, value):
        damaged = bytearray(image)
        damaged[place] = value
        path = tmp_path / "run.h5"
        path.write_bytes(seal(bytes(damaged)))
        with contextlib.suppress(CheckpointError):
            read_checkpoint(path)

    check()


@pytest.mark.parametrize("row", config_rows_checkpoint.ROWS, ids=lambda row: row[0])
def test_every_option_changes_something(row):
    assert row[1]()


def test_it_is_an_hdf5_file_of_plain_numbers_and_text(kept):
    kinds = set()
    with h5py.File(kept) as file:
        assert file.attrs["format_version"].decode() == "4.0"
        file.visititems(
            lambda name, part: (
                kinds.add(part.dtype.kind) if isinstance(part, h5py.Dataset) else None
            )
        )
        assert file["about/phase"][()].decode() == "finished"
    assert kinds <= {"f", "i", "b", "S"}


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "checkpoint").glob("*.py")), ids=lambda p: p.stem
)
def test_nothing_that_could_run_code_is_imported(path):
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Name):
            names.add(node.id)
    banned = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "eval", "exec"}
    assert not names & banned
