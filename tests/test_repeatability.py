"""The answer does not depend on where it was computed."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from distributed import Client

import problems
from conftest import start_cluster
from nlsq_dask import Chunk, HybridStreamingConfig, fit_dataset
from nlsq_dask.evaluate.cluster import ClusterEvaluator
from nlsq_dask.evaluate.local import LocalEvaluator

NUM_ROWS = 300_000


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    t, y = problems.make_decay(NUM_ROWS)
    path = tmp_path_factory.mktemp("repeat") / "a.zarr"
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})
    ds.chunk(row=10_000).to_zarr(path, consolidated=False)
    return path


def fit(ds, **options):
    return fit_dataset(ds, problems.decay, y="y", p0=problems.P0, **options)


@pytest.fixture(scope="module")
def expected(store):
    return fit(store)


def assert_same_bits(actual, expected):
    assert actual.success
    np.testing.assert_array_equal(actual.popt, expected.popt)
    np.testing.assert_array_equal(actual.pcov, expected.pcov)
    assert actual.cost == expected.cost
    assert actual.num_passes == expected.num_passes


OPTIONS = {
    "cached": {},
    "not cached": {"cache_bytes": 0},
    "cache half full": {"cache_bytes": NUM_ROWS * 8},
    "not prefetching": {"prefetch": False, "cache_bytes": 0},
}


@pytest.mark.parametrize("how", OPTIONS)
def test_same_bits_with_threads(how, store, expected):
    config = HybridStreamingConfig(**OPTIONS[how])
    assert_same_bits(fit(store, config=config), expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_same_bits_for_any_number_of_threads(num_threads, store, expected, monkeypatch):
    from nlsq_dask import places

    def local(problem, config, progress):
        return LocalEvaluator(problem, config, num_threads=num_threads, progress=progress)

    monkeypatch.setattr(places, "LocalEvaluator", local)
    assert_same_bits(fit(store), expected)


@pytest.mark.cluster
@pytest.mark.parametrize("how", OPTIONS)
def test_same_bits_on_processes(how, store, expected, client):
    config = HybridStreamingConfig(**OPTIONS[how])
    assert_same_bits(fit(store, config=config, client=client), expected)


@pytest.mark.cluster
@pytest.mark.parametrize(("num_workers", "threads"), [(1, 2), (3, 1)])
def test_same_bits_for_any_number_of_workers(num_workers, threads, store, expected):
    with start_cluster(num_workers, threads) as cluster, Client(cluster) as client:
        assert_same_bits(fit(store, client=client), expected)


@pytest.mark.cluster
@pytest.mark.cluster
# Python's filters of warnings are those of all threads: what one ignores another may show.
@pytest.mark.filterwarnings("ignore:Failed to open Zarr store")
def test_same_bits_from_fits_beside_each_other(store, expected, client, tmp_path, monkeypatch):
    """From threads of one process on one cluster, of a model that travels by value."""
    (tmp_path / "models_beside.py").write_text(
        "import jax.numpy as jnp\n\n"
        "def decay(t, amplitude, rate, offset):\n"
        "    return amplitude * jnp.exp(-rate * t) + offset\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    decay = importlib.import_module("models_beside").decay

    def fit_once(_):
        return fit_dataset(store, decay, y="y", p0=problems.P0, client=client)

    with ThreadPoolExecutor(6) as threads:
        for result in threads.map(fit_once, range(12)):
            assert_same_bits(result, expected)


def test_same_bits_on_worker_threads_of_this_process(store, expected):
    with start_cluster(2, processes=False) as cluster, Client(cluster) as client:
        assert_same_bits(fit(store, client=client), expected)


@pytest.mark.cluster
@pytest.mark.parametrize("persist", [True, False])
def test_same_bits_from_dask_blocks(persist, store, expected, client, monkeypatch):
    """The store's chunks as Dask blocks: kept by the workers, or computed in every pass."""
    from nlsq_dask.evaluate import cluster

    if not persist:
        monkeypatch.setattr(cluster, "_PERSIST_SHARE", 0.0)
    ds = xr.open_zarr(store, consolidated=False) + 0.0
    result = fit(ds, client=client)
    assert_same_bits(result, expected)
    assert ("kept by the workers" in result.diagnostics["evaluator"]) is persist


@pytest.mark.parametrize("rows", [999, 7_000, 150_000])
def test_other_chunkings_agree_within_a_thousandth(rows, store, expected):
    ds = xr.open_zarr(store, consolidated=False).load().chunk(row=rows)
    actual = fit(ds, config=HybridStreamingConfig(chunk_size=rows))
    assert np.max(np.abs(actual.popt - expected.popt) / expected.perr) < 1e-3
    np.testing.assert_allclose(actual.perr, expected.perr, rtol=1e-3)


@dataclass
class Treacherous:
    """A source that kills the process that reads one of its chunks, once, when armed."""

    path: Path
    folder: Path
    chunk_rows: int = 10_000
    poison: int = 17

    variables = ("t",)
    num_chunks = NUM_ROWS // 10_000
    num_rows = NUM_ROWS
    chunk_shape = (10_000,)

    def read(self, index: int) -> Chunk:
        armed = self.folder / "armed"
        if index == self.poison and armed.exists():
            (self.folder / "killed").write_text(str(os.getpid()))
            armed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        ds = xr.open_dataset(self.path, engine="zarr", consolidated=False, chunks=None)
        part = ds.isel(row=slice(index * self.chunk_rows, (index + 1) * self.chunk_rows))
        return Chunk(x=(part.t.values,), y=part.y.values)


@pytest.mark.cluster
def test_same_bits_when_a_worker_is_killed_in_the_middle_of_a_pass(
    store, tmp_path, record_property
):
    source = Treacherous(store, tmp_path)
    config = HybridStreamingConfig(cache_bytes=0)
    undisturbed = fit_source(source, None, config)

    def arm(record) -> None:
        if record.num_passes == 1:
            (tmp_path / "armed").touch()

    with start_cluster(2) as cluster, Client(cluster) as client:
        before = client.run(os.getpid)
        actual = fit_source(source, client, config, arm)
        killed = int((tmp_path / "killed").read_text())
        assert killed in before.values()
    assert_same_bits(actual, undisturbed)
    record_property("faults of a cluster tried", 1)
    record_property("faults of a cluster ended with the same bits", 1)


def fit_source(source, client, config, callback: Callable[..., None] | None = None):
    return fit_dataset(
        source, problems.decay, p0=problems.P0, client=client, config=config, callback=callback
    )


@pytest.mark.cluster
def test_kernel_compiles_once_per_worker_and_results_are_float64(store):
    """The last chunk is ragged, several tasks share a worker, and no one enabled 64 bits."""
    with start_cluster(2) as cluster, Client(cluster) as client:
        client.run(_count_compilations)
        t, y = problems.make_decay(95_001)
        ragged = xr.Dataset({"t": ("row", t), "y": ("row", y)})
        path = store.parent / "ragged.zarr"
        ragged.chunk(row=10_000).to_zarr(path, consolidated=False, mode="w")
        result = fit(path, client=client, config=HybridStreamingConfig(chunk_size=10_000))
        compiled = client.run(_compiled)
    oracle = problems.scipy_decay(t, y)
    assert oracle.distance(result.popt) < 1e-5
    for names in compiled.values():
        assert names.count("jit(normal_equations)") == 1
        assert names.count("jit(summary)") == 1
    reported = result.diagnostics["passes"]["compilations_by_process"]
    assert all(count == 2 for count in reported.values())


_COMPILED: list[str] = []


def _count_compilations() -> None:
    import jax

    import test_repeatability

    def listen(event: str, duration: float, **about: str) -> None:
        if event.endswith("backend_compile_duration"):
            test_repeatability._COMPILED.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)


def _compiled() -> list[str]:
    import test_repeatability

    return list(test_repeatability._COMPILED)


def test_evaluators_are_interchangeable():
    assert {name for name in vars(LocalEvaluator) if not name.startswith("_")} >= {
        "evaluate",
        "map_chunks",
        "memory",
        "close",
    }
    assert {name for name in vars(ClusterEvaluator) if not name.startswith("_")} >= {
        "evaluate",
        "map_chunks",
        "memory",
        "close",
    }
