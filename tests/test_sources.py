"""Sources, and the suite that holds other people's to the contract."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import Chunk, HybridStreamingConfig, curve_fit, fit_dataset
from nlsq_dask.evaluate.local import LocalEvaluator
from nlsq_dask.plan import choose_leaf_shape, choose_strategy, plan_leaves
from nlsq_dask.sources.buffers import aligned_empty
from nlsq_dask.sources.columns import LazyColumn
from nlsq_dask.sources.dask import DaskColumn
from nlsq_dask.sources.stores import open_store
from nlsq_dask.sources.xarray import DatasetRoles, build_dataset_source
from nlsq_dask.testing import check_source


@dataclass(frozen=True)
class Lines:
    """Ten chunks of a line."""

    num_rows: int = 95
    fault: str = ""

    variables = ("x",)
    num_chunks = 10
    chunk_shape = (10,)

    def read(self, index: int) -> Chunk:
        x = np.arange(index * 10.0, min(index * 10 + 10, 95))
        if self.fault == "integers":
            x = x.astype(int)
        if self.fault == "drifts":
            x = x + np.random.default_rng().normal()
        marks = {
            "extent": {"extent": np.array([len(x) - 2])},
            "where": {"where": np.ones(len(x), int)},
            "cluster": {"cluster": np.ones(len(x))},
        }
        return Chunk(x=(x,), y=np.where(x == 7, np.nan, x), **marks.get(self.fault, {}))


def test_a_good_source_passes():
    check_source(Lines())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Lines(fault="integers"), "float"),
        (Lines(fault="drifts"), "same at every reading"),
        (Lines(num_rows=100), "num_rows"),
    ],
)
def test_a_bad_source_is_told_why(source, message):
    with pytest.raises(AssertionError, match=message):
        check_source(source)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("extent", ValueError, r"rows that are real, .* got `extent` \[8\]"),
        ("where", TypeError, "`where` of booleans, got int64"),
        ("cluster", TypeError, "`cluster` of whole numbers, got float64"),
    ],
)
def test_what_would_be_taken_otherwise_than_it_is_meant_is_refused(fault, kind, message):
    for use in (check_source, lambda source: fit_dataset(source, lambda x, a=1.0: a * x)):
        with pytest.raises(kind, match=f"`ds` must read chunk . as it describes it: {message}"):
            use(Lines(fault=fault))


@pytest.mark.parametrize("store", ["zarr", "nc"])
def test_stores_keep_to_the_contract(store, tmp_path):
    rng = np.random.default_rng(0)
    ds = xr.Dataset(
        {"y": (("time", "z"), rng.normal(size=(50, 7))), "s": ("z", rng.uniform(1, 2, 7))},
        coords={"time": np.arange(50).astype("datetime64[D]")},
    )
    path = tmp_path / f"a.{store}"
    if store == "zarr":
        ds.chunk(time=8, z=4).to_zarr(path, consolidated=False)
    else:
        ds.to_netcdf(path, engine="h5netcdf", encoding={"y": {"chunksizes": (8, 4)}})
    roles = DatasetRoles(x=("time", "s"), y="y", sigma="s")
    source, axes, _ = build_dataset_source(open_store(path), roles)
    plan, source = plan_leaves(source, choose_strategy(2), chunk_size=16)
    assert all(c % leaf == 0 for c, leaf in zip((8, 4), plan.leaf_shape, strict=True))
    assert axes["time"].units.startswith("days since 1970-01-01")
    check_source(source)
    check_source(replace(source, leaf_shape=(9, 3)))


@pytest.mark.parametrize(
    ("shape", "unit", "chunk_size", "leaf"),
    [
        ((10**8,), (500_000,), None, (1_000_000,)),
        ((10**8,), (10**7,), None, (10**7,)),
        ((10**8,), (10**7,), 10**6, (10**6,)),
        ((10**8,), None, None, (2**20,)),
        ((100_000,), None, None, (2**16,)),
        ((54, 18, 432), (1, 18, 432), None, (8, 18, 432)),
        ((1000, 1000, 1000), (100, 10, 10), None, (100, 10, 1000)),
    ],
)
def test_leaves_are_multiples_of_chunks_or_their_divisors(shape, unit, chunk_size, leaf):
    assert choose_leaf_shape(shape, unit, chunk_size) == leaf


@pytest.mark.parametrize(
    ("encoding", "chunks"),
    [
        ({}, None),
        ({"chunks": (3, 4)}, (3, 4)),
        ({"chunks": ((1, 3, 2), 4)}, (3, 4)),  # as Zarr's rectilinear grids come
        ({"shards": (6, 4), "chunks": (3, 2)}, (6, 4)),
        ({"shards": ((4, 2), 2**21), "chunks": ((4, 2), 2)}, (4, 2)),  # too large to be read whole
        ({"chunksizes": (2, 2)}, (2, 2)),
        ({"chunks": (3,)}, None),  # of another array, from before it was selected from
    ],
    ids=str,
)
def test_a_stored_array_is_best_read_in_its_longest_chunks(encoding, chunks):
    variable = xr.Variable(("t", "s"), np.zeros((6, 4)), encoding=encoding)
    assert LazyColumn(variable=variable).chunks == chunks


def test_blocks_that_a_cluster_keeps_can_be_read_here(client):
    """A small fit is computed in this process, even if its data were persisted on a cluster."""
    values = np.arange(100.0)
    kept = client.persist(da.from_array(values, chunks=30))
    column = DaskColumn(array=kept, dims=("row",))
    np.testing.assert_array_equal(column.read((slice(20, 70),)), values[20:70])
    there = DaskColumn(array=kept + 1, dims=("row",))
    np.testing.assert_array_equal(there.read((slice(None),)), values + 1)


class Chunks:
    """A decay that is another in each chunk."""

    variables = ("t",)
    num_chunks = 40
    chunk_shape = (5120,)
    num_rows = 40 * 5120

    def read(self, index: int) -> Chunk:
        t, y = self.memory()
        t[:] = np.random.default_rng(index).uniform(0, 10, len(t))
        y[:] = 2 * np.exp(-(0.5 + 0.01 * index) * t) + 0.1
        return Chunk(x=(t,), y=y)

    def memory(self):
        return np.empty((2, *self.chunk_shape))


class Reusing(Chunks):
    """The same, always in the same memory of each thread, of a kind that JAX would take."""

    local = threading.local()

    def memory(self):
        if not hasattr(self.local, "both"):
            self.local.both = aligned_empty((2, *self.chunk_shape), np.dtype(float))
        return self.local.both


def test_a_source_may_read_into_memory_of_its_own():
    one, other = (fit_dataset(s, problems.decay, p0=problems.P0) for s in (Chunks(), Reusing()))
    np.testing.assert_array_equal(one.popt, other.popt)


class WithAnEmptyChunk(Chunks):
    num_rows = 39 * 5120

    def read(self, index: int) -> Chunk:
        chunk = super().read(index)
        return Chunk(x=(chunk.x[0][:0],), y=chunk.y[:0]) if index == 17 else chunk


def test_a_chunk_may_have_no_rows():
    check_source(WithAnEmptyChunk())
    result = fit_dataset(WithAnEmptyChunk(), problems.decay, p0=problems.P0)
    assert result.success
    assert result.num_rows == 39 * 5120


class Failing(Chunks):
    """Slow, and one of its chunks cannot be read a second time."""

    num_chunks = 200
    num_rows = 200 * 5120

    def __init__(self):
        self.is_armed, self.failed, self.num_later = False, None, 0

    def read(self, index: int) -> Chunk:
        if self.is_armed:
            time.sleep(0.02)
            self.num_later += self.failed is not None
            if index == 150:
                self.failed = time.monotonic()
                raise OSError("disk broke")
        return super().read(index)


def test_an_error_in_one_range_ends_the_pass_of_all(monkeypatch):
    source, evaluate = Failing(), LocalEvaluator.evaluate

    def arm_and_evaluate(self, request):
        source.is_armed = True
        return evaluate(self, request)

    monkeypatch.setattr(LocalEvaluator, "evaluate", arm_and_evaluate)
    monkeypatch.setattr("nlsq_dask.evaluate.local.num_cpus", lambda: 2)
    with pytest.raises(OSError, match="disk broke"):
        fit_dataset(
            source, problems.decay, p0=problems.P0, config=HybridStreamingConfig(cache_bytes=0)
        )
    assert source.num_later <= 10  # of some 50 that the first range has left


def test_reading_dask_arrays_leaves_dasks_settings_alone():
    """Threads that nest a setting of the whole process put back each other's."""
    t = da.linspace(0, 10, 400_000, chunks=20_000)
    y = 2 * da.exp(-0.5 * t) + 0.1
    with dask.config.set(scheduler="threads"), ThreadPoolExecutor(2) as threads:
        fits = [threads.submit(curve_fit, problems.decay, t, y, [1.0, 1.0, 0.0]) for _ in range(2)]
        for fit in fits:
            np.testing.assert_allclose(fit.result()[0], [2, 0.5, 0.1], rtol=1e-6)
        assert dask.config.get("scheduler") == "threads"
    assert dask.config.get("scheduler", None) is None


def test_times_that_a_cluster_keeps_are_fitted_there(client):
    days = np.linspace(0, 10, 20_000)
    time = np.datetime64("2001-01-01", "ns") + (days * 86_400e9).astype("timedelta64[ns]")
    y = 2 * np.exp(-0.5 * days) + 0.1
    ds = xr.Dataset({"time": ("row", time), "y": ("row", y)}).chunk(row=2_000)

    def decay(time, amplitude=1.0, rate=1.0, offset=0.0):
        return amplitude * jnp.exp(-rate * time) + offset

    lazy = fit_dataset(ds, decay, y="y", client=client)
    with client.as_current():
        kept = ds.persist()
    held = fit_dataset(kept, decay, y="y", client=client)
    np.testing.assert_array_equal(held.popt, lazy.popt)
    np.testing.assert_allclose(held.popt, [2, 0.5, 0.1], rtol=1e-6)


@pytest.mark.parametrize("chunks", [None, 1000])
def test_a_stacked_dataset_is_fitted_and_predicted(chunks):
    t, lat = np.linspace(0, 5, 60), np.linspace(-60, 60, 80)
    y = 2 * np.exp(-0.5 * t)[:, None] + 0.01 * lat
    ds = xr.Dataset({"y": (("t", "lat"), y)}, coords={"t": t, "lat": lat})
    stacked = ds.stack(place=("t", "lat"))
    if chunks is not None:
        stacked = stacked.chunk(place=chunks)

    def model(t, lat, a=1.0, r=1.0, b=0.0):
        return a * jnp.exp(-r * t) + b * lat

    result = fit_dataset(stacked, model, y="y")
    np.testing.assert_allclose(result.popt, [2, 0.5, 0.01], rtol=1e-6)
    np.testing.assert_allclose(result.predict(stacked), stacked.y, rtol=1e-6)
    np.testing.assert_allclose(fit_dataset(ds, model, y="y").predict(stacked), stacked.y, rtol=1e-6)
