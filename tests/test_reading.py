"""Chunks on their way to a kernel: aligned, read ahead, kept within limits, never overwritten."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

import problems
from nlsq_dask import Chunk, HybridStreamingConfig, fit_dataset
from nlsq_dask.evaluate import ahead, heap, leaves
from nlsq_dask.evaluate.base import Request, fold_reports
from nlsq_dask.evaluate.local import LocalEvaluator
from nlsq_dask.evaluate.packed import Layout
from nlsq_dask.evaluate.reading import (
    ChunkReader,
    Meter,
    count_ahead,
    device_room,
    reading_bytes,
)
from nlsq_dask.evaluate.tree import split_leaves
from nlsq_dask.normal_equations import CostGradient, RowStatistics, Sums
from nlsq_dask.sources import transport
from nlsq_dask.sources.base import pad_chunk
from nlsq_dask.sources.buffers import BufferPool, aligned_empty, is_aligned, lending
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.sources.xarray import column_of

ROWS = 20_000


@dataclass
class Numbered:
    """Chunk `i` holds the number `i`; the last is ragged. Records who read what."""

    num_chunks: int = 7
    fails_at: int | None = None
    reads: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    variables = ("x",)
    chunk_shape = (ROWS,)

    @property
    def num_rows(self) -> int:
        return self.num_chunks * ROWS - 1

    def read(self, index: int) -> Chunk:
        if index == self.fails_at:
            raise OSError(f"chunk {index} is gone")
        self.reads.append(index)
        self.threads.add(threading.current_thread().name)
        rows = ROWS - (index == self.num_chunks - 1)
        x = np.full(rows + 1, float(index))[1:]
        return Chunk(x=(x,), y=np.arange(rows, dtype=float) + index)

    @property
    def chunk_bytes(self) -> int:
        return 2 * 8 * ROWS + 8


def reader_of(source, *, cache_bytes=0, prefetch=True, **options) -> ChunkReader:
    return ChunkReader(source, cache_bytes=cache_bytes, prefetch=prefetch, **options)


def stream(reader: ChunkReader, indices: range, meter: Meter | None = None):
    return reader.stream(indices, Meter() if meter is None else meter)


def assert_is_chunk(index: int, chunk: Chunk) -> None:
    rows = int(chunk.extent[0])
    np.testing.assert_array_equal(chunk.x[0], np.full(ROWS, index))
    np.testing.assert_array_equal(chunk.y[:rows], np.arange(rows) + index)


# -- buffers


@pytest.mark.parametrize("dtype", ["f8", "f4", "i4", "?"])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1, 5), (40_000,), (300, 500)])
def test_buffers_are_aligned(shape, dtype):
    pool = BufferPool()
    for empty in (aligned_empty, pool.empty, pool.empty):
        array = empty(shape, np.dtype(dtype))
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert is_aligned(array)
        assert array.flags.writeable


def test_jax_takes_an_aligned_array_without_a_copy():
    with jax.enable_x64(True):
        array = BufferPool().empty((100_000,), np.dtype(float))
        array[:] = 1
        taken = jax.device_put(array)
        assert taken.unsafe_buffer_pointer() == array.ctypes.data


def test_a_buffer_is_used_again_when_the_last_view_of_it_is_gone():
    pool = BufferPool()
    first = pool.empty((50_000,), np.dtype(float))
    address, view = first.ctypes.data, first[10:].reshape(10, -1).T
    del first
    assert pool.empty((50_000,), np.dtype(float)).ctypes.data != address
    del view
    assert pool.empty((50_000,), np.dtype(float)).ctypes.data == address


def test_a_buffer_is_not_used_again_while_jax_computes_on_it():
    """Each result belongs to the array that was dispatched, whatever was written since."""
    pool = BufferPool()
    with jax.enable_x64(True):
        total = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, s: s + x.sum(), 0.0))
        sums = []
        for number in range(30):
            array = pool.empty((100_000,), np.dtype(float))
            array[:] = number
            sums.append(total(array))
            del array
        np.testing.assert_array_equal(np.asarray(sums), np.arange(30) * 20 * 100_000.0)


def test_a_pool_keeps_few_blocks():
    pool = BufferPool()
    arrays = [pool.empty((50_000,), np.dtype(float)) for _ in range(40)]
    arrays.clear()
    assert sum(map(len, pool._free.values())) == 16


@given(
    have=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    more=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    is_broadcast=st.booleans(),
)
def test_padding_repeats_edges(have, more, is_broadcast):
    shape = tuple(a + b for a, b in zip(have, more, strict=False))
    y = np.random.default_rng(0).normal(size=have)
    x = y[:1] if is_broadcast else y + 1
    padded = pad_chunk(Chunk(x=(x,), y=y), shape)
    widths = [(0, want - got) for got, want in zip(have, shape, strict=True)]
    np.testing.assert_array_equal(padded.y, np.pad(y, widths, mode="edge"))
    whole = np.pad(x, [(0, 0) if len(x) != len(y) else widths[0], *widths[1:]], mode="edge")
    np.testing.assert_array_equal(padded.x[0], whole)
    np.testing.assert_array_equal(padded.extent, have)
    assert all(map(is_aligned, (padded.y, *padded.x)))


def test_what_is_aligned_already_is_not_copied():
    y = aligned_empty((10,), np.dtype(float))
    assert pad_chunk(Chunk(x=(), y=y), (10,)).y is y


STORED = {
    "rows": np.arange(3000.0) ** 0.5,
    "singles": np.linspace(0, 1, 3000, dtype="f4"),
    "counts": np.arange(-1500, 1500),
    "cube": np.random.default_rng(0).normal(size=(10, 12, 25)),
}


def stored_column(values, path, **encoding):
    chunks = tuple(min(7, length) for length in values.shape)
    y = xr.Variable(tuple("tab")[: values.ndim], values)
    encoding = {"y": {"chunks": chunks} | encoding}
    xr.Dataset({"y": y}).to_zarr(path, consolidated=False, encoding=encoding)
    return column_of("y", xr.open_zarr(path, chunks=None, consolidated=False).y.variable)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", STORED)
def test_zarr_decodes_into_memory_that_is_lent(kind, zarr_format, tmp_path):
    values = STORED[kind]
    with zarr.config.set(default_zarr_format=zarr_format):
        column = stored_column(values, tmp_path / "y.zarr")
    lent = []

    def empty(shape, dtype):
        lent.append(aligned_empty(shape, dtype))
        return lent[-1]

    rectangles = [slice(None), slice(3, 10), slice(0, 1), slice(5, 5)]
    for part in rectangles:
        index = (part,) * values.ndim
        with lending(empty):
            read = column.read(index)
        assert np.shares_memory(read, lent[-1]) or not read.size
        np.testing.assert_array_equal(read, values[index], strict=True)
        np.testing.assert_array_equal(column.read(index), values[index], strict=True)
    assert len(lent) == len(rectangles)


def test_what_is_missing_is_filled_in_memory_that_is_lent(tmp_path):
    column = stored_column(STORED["rows"], tmp_path / "y.zarr", fill_value=-5.0)
    (tmp_path / "y.zarr" / "y" / "c" / "1").unlink()
    with lending(lambda shape, dtype: np.full(shape, 77.0, dtype)):
        read = column.read((slice(0, 21),))
    np.testing.assert_array_equal(read[7:14], -5.0)
    np.testing.assert_array_equal(read[:7], STORED["rows"][:7])


def test_what_xarray_decodes_is_not_what_was_lent(tmp_path):
    values = np.where(np.arange(40) == 3, np.nan, np.arange(40) / 4)
    packing = {"dtype": "i2", "scale_factor": 0.25, "add_offset": 1.0, "_FillValue": -1000}
    packed = stored_column(values, tmp_path / "packed.zarr", **packing)
    swapped = stored_column(values.astype(">f8"), tmp_path / "swapped.zarr")
    with lending(aligned_empty):
        for column in (packed, swapped):
            np.testing.assert_array_equal(column.read((slice(0, 40),)), values)


def test_a_leaf_of_a_zarr_store_is_decoded_where_jax_takes_it(tmp_path, monkeypatch):
    values = np.arange(60_000.0)
    y = stored_column(values, tmp_path / "y.zarr", chunks=(20_000,))
    x = stored_column(-values, tmp_path / "x.zarr", chunks=(10_000,))
    source = GridSource(variables=("x",), x=(x,), y=y, leaf_shape=(20_000,))
    lent = []
    empty = BufferPool.empty
    monkeypatch.setattr(BufferPool, "empty", lambda *args: lent.append(empty(*args)) or lent[-1])
    chunk = ChunkReader(source, cache_bytes=0, prefetch=False).fetch(1)
    np.testing.assert_array_equal(chunk.x[0], -values[20_000:40_000])
    assert all(map(np.shares_memory, (*chunk.x, chunk.y), lent))
    assert len(lent) == 2


# -- reading


@pytest.fixture
def one_reading_thread(monkeypatch):
    """However slow it is: two threads read in no order."""
    monkeypatch.setattr(ahead, "_SLOW_READING", np.inf)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("cached", [0, 2, 7])
@pytest.mark.usefixtures("one_reading_thread")
def test_chunks_arrive_in_order_and_aligned(prefetch, cached):
    source = Numbered()
    reader = reader_of(source, cache_bytes=cached * source.chunk_bytes, prefetch=prefetch)
    for turn in range(3):
        source.reads.clear()
        meter = Meter()
        for expected, (index, chunk) in enumerate(stream(reader, range(7), meter)):
            assert index == expected
            assert_is_chunk(index, chunk)
            assert all(map(is_aligned, (chunk.y, *chunk.x)))
        assert source.reads == list(range(7))[cached if turn else 0 :]
        assert meter.bytes_read == len(source.reads) * source.chunk_bytes
    assert any(name.startswith("nlsq-read") for name in source.threads) is prefetch


def test_no_chunk_is_overwritten_while_it_is_held():
    """Half of them stay in the cache, some with the caller, as if still computed on."""
    source = Numbered(num_chunks=40)
    reader = reader_of(source, cache_bytes=20 * source.chunk_bytes)
    first = {index: chunk for index, chunk in stream(reader, range(40)) if index % 3 == 0}
    second = {index: chunk for index, chunk in stream(reader, range(40)) if index % 3 == 1}
    held = first | second
    for index, chunk in held.items():
        assert_is_chunk(index, chunk)
    for index in range(40):
        assert_is_chunk(index, reader.fetch(index))


def test_the_cache_drops_what_another_process_owns_and_fills_again():
    source = Numbered()
    reader = reader_of(source, cache_bytes=3 * source.chunk_bytes + 1, num_ahead=1)
    assert [index for index, _ in stream(reader, range(7))] == list(range(7))
    reader.retain([range(2, 7)])
    source.reads.clear()
    assert [index for index, _ in stream(reader, range(2, 7))] == [2, 3, 4, 5, 6]
    assert source.reads == [3, 4, 5, 6]  # 2 was kept; there was room for 3 and 4
    source.reads.clear()
    list(stream(reader, range(2, 7)))
    assert source.reads == [5, 6]


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_error_in_reading_reaches_the_caller_at_its_leaf(prefetch):
    source = Numbered(fails_at=4)
    chunks = stream(reader_of(source, prefetch=prefetch), range(7))
    assert [index for index, _ in itertools.islice(chunks, 4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="chunk 4 is gone"):
        next(chunks)
    assert max(source.reads) <= 5
    assert not [t for t in threading.enumerate() if t.name.startswith("nlsq-read")]


def test_who_stops_early_leaves_no_thread_behind():
    source = Numbered(num_chunks=30)
    chunks = stream(reader_of(source), range(30))
    next(chunks)
    chunks.close()
    assert len(source.reads) <= 4
    assert not [t for t in threading.enumerate() if t.name.startswith("nlsq-read")]


# -- chunks on a device: the CPU stands for one


@pytest.mark.parametrize("room", [0, 3, 7])
@pytest.mark.usefixtures("one_reading_thread")
def test_chunks_are_moved_to_the_device_and_stay_while_there_is_room(room):
    source, device = Numbered(), jax.local_devices()[0]
    reader = reader_of(
        source,
        cache_bytes=5 * source.chunk_bytes,
        device=device,
        device_bytes=room * source.chunk_bytes,
    )
    for _ in range(2):
        source.reads.clear()
        for index, chunk in stream(reader, range(7)):
            assert chunk.y.devices() == {device}
            assert chunk.y.dtype == np.float64
            assert chunk.extent.dtype == np.int64
            assert_is_chunk(index, chunk)
    assert source.reads == list(range(min(room + 5, 7), 7))
    kept = [isinstance(chunk.y, jax.Array) for chunk in reader._cache.values()]
    assert kept == [True] * room + [False] * min(7 - room, 5)
    assert isinstance(reader.fetch_host(0).y, np.ndarray)
    reader.retain([])
    assert (reader._room, reader._device_room) == (
        5 * source.chunk_bytes,
        room * source.chunk_bytes,
    )


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("on_host", "keeps_on_device"), [(2**30, True), (0, True), (0, False)])
def test_same_bits_from_chunks_on_a_device(num_threads, on_host, keeps_on_device, monkeypatch):
    t, y = problems.make_decay(20_000)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})
    result = fit_dataset(
        ds, problems.decay, y="y", p0=problems.P0, config=HybridStreamingConfig(chunk_size=999)
    )
    problem = result.session.problem
    request = Request(
        params=problem.space.p0, terms=result.session.terms, directions=np.eye(3), center=0.5
    )
    expected = LocalEvaluator(problem, num_threads=1).evaluate(request).sums
    monkeypatch.setattr(leaves, "accelerator", lambda: jax.local_devices()[0])
    monkeypatch.setattr(leaves, "device_room", lambda device: 10 * (999 * 16 + 8))
    home = leaves.ProblemHome(
        problem=problem, cache_bytes=on_host, keeps_on_device=keeps_on_device, prefetch=True
    )
    parts = split_leaves(problem.source.num_chunks, num_threads)
    for _ in range(2):
        sums, _ = fold_reports([home.reduce(part, request) for part in parts], 21)
        jax.tree.map(np.testing.assert_array_equal, sums, expected)
    on_device = [isinstance(chunk.y, jax.Array) for chunk in home.reader._cache.values()]
    assert sum(on_device) == (10 if keeps_on_device else 0)
    assert len(on_device) == (21 if on_host else sum(on_device))


def test_room_on_a_device_is_half_of_what_is_free():
    @dataclass
    class Device:
        stats: dict[str, int] | None

        def memory_stats(self) -> dict[str, int] | None:
            return self.stats

    assert device_room(Device({"bytes_limit": 1000, "bytes_in_use": 200})) == 400
    assert device_room(Device({"bytes_limit": 1000})) == 500
    assert device_room(Device(None)) == 0


# -- sums as vectors


def sums_of(seed: int, cost: float | None = None, **counts: int) -> Sums:
    rng = np.random.default_rng(seed)
    return Sums(
        normal=CostGradient(
            cost=np.float64(rng.normal() if cost is None else cost),
            num_rows=np.int64(seed),
            grad=rng.normal(size=3),
        ),
        rows=RowStatistics(
            num_masked=np.int64(5),
            num_invalid=np.int64(counts.get("num_invalid", 0)),
            num_bad_sigma=np.int64(counts.get("num_bad_sigma", 0)),
            num_stray=np.int64(counts.get("num_stray", 0)),
            residual_sum=np.float64(rng.normal()),
            residual_square=np.float64(rng.normal()),
        ),
        rival_costs=np.array([1.0, np.nan]) if cost is None else None,
    )


def test_packed_sums_add_to_the_same_bits():
    a, b = sums_of(1), sums_of(2)
    layout = Layout(a)
    packed = layout.pack(a) + layout.pack(b)
    jax.tree.map(np.testing.assert_array_equal, packed.unpack(), a + b)
    shapes = jax.tree.map(lambda part: (part.shape, part.dtype), packed.unpack())
    assert shapes == jax.tree.map(lambda part: (part.shape, part.dtype), a + b)
    rows = (a + b).rows
    expected = [3, rows.num_masked, rows.residual_sum, rows.residual_square]
    np.testing.assert_array_equal(packed.bin(), expected)


@pytest.mark.parametrize(
    ("sums", "is_offending"),
    [
        (sums_of(1), False),  # a rival's cost may be anything
        (sums_of(1, cost=np.inf), True),
        (sums_of(1, cost=1.0), False),
        (sums_of(1, num_invalid=2), False),  # rows that are left out
        (sums_of(1, num_bad_sigma=1), True),
        (sums_of(1, num_stray=1), True),
    ],
)
def test_leaves_that_offend_are_found_in_the_vectors(sums, is_offending):
    assert Layout(sums).pack(sums).is_offending is is_offending


# -- the heap of a worker


def test_freed_memory_is_kept_while_any_fit_needs_it(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "_set_thresholds", lambda *sizes: calls.append(sizes))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    kept = (2**25, 2**26)
    heap.keep_freed_memory("a")
    heap.keep_freed_memory("b")
    heap.return_freed_memory("a")
    assert calls == [kept, kept]
    heap.return_freed_memory("b")
    assert calls == [kept, kept, (2**17, 65536)]


class SlowStore(zarr.storage.WrapperStore):
    """A folder whose chunks come after 20 ms. Counts the requests that wait at one time."""

    waiting = most = 0

    async def get(self, key, prototype, byte_range=None):
        if "/c/" in key:
            kind = type(self)
            kind.waiting += 1
            kind.most = max(kind.most, kind.waiting)
            await asyncio.sleep(0.02)
            kind.waiting -= 1
        return await super().get(key, prototype, byte_range)


@pytest.mark.parametrize("comes_late", [False, True])
def test_many_leaves_are_asked_for_at_once_where_they_come_late(comes_late, tmp_path, monkeypatch):
    t, y = problems.make_decay(200_000)
    ds = problems.dataset(t, y).chunk(row=4_000)
    ds.to_zarr(tmp_path / "run.zarr", consolidated=False)
    if comes_late:
        monkeypatch.setattr(transport, "_FROM_AFAR", {"SlowStore"})
    monkeypatch.setattr(SlowStore, "most", 0)
    config = HybridStreamingConfig(cache_bytes=0, chunk_size=4_000)  # a leaf is a chunk
    options = {"y": "y", "p0": problems.P0, "config": config}
    expected = fit_dataset(tmp_path / "run.zarr", problems.decay, **options)
    store = SlowStore(zarr.storage.LocalStore(tmp_path / "run.zarr"))
    result = fit_dataset(store, problems.decay, **options)
    assert result.popt.tobytes() == expected.popt.tobytes()
    columns, threads = 2, 2
    assert (SlowStore.most > columns * threads * 2) is comes_late


@pytest.mark.parametrize("is_slow", [True, False])
def test_two_threads_read_where_reading_takes_longer_than_computing(is_slow):
    at_once, most = 0, 0
    lock = threading.Lock()

    class Timed(Numbered):
        def read(self, index: int) -> Chunk:
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            if is_slow:
                time.sleep(0.05)
            chunk = super().read(index)
            with lock:
                at_once -= 1
            return chunk

    reader = ChunkReader(Timed(num_chunks=10), cache_bytes=0, prefetch=True)
    for _ in reader.stream(range(10), Meter()):
        time.sleep(0.0 if is_slow else 0.05)
    assert most == (2 if is_slow else 1)


def test_what_is_under_way_is_counted_in_the_projection(monkeypatch):
    t, y = problems.make_decay(1_000)
    source = fit_dataset(problems.dataset(t, y), problems.decay, y="y", p0=problems.P0).session
    source = source.problem.source
    leaf_bytes = 2**20
    assert (count_ahead(source, leaf_bytes), reading_bytes(source, leaf_bytes)) == (2, 6 * 2**20)
    monkeypatch.setattr("nlsq_dask.evaluate.reading.transports_of", lambda _: ["obstore"])
    assert (count_ahead(source, leaf_bytes), reading_bytes(source, leaf_bytes)) == (16, 48 * 2**20)
    assert count_ahead(source, 2**23) == 8
    assert count_ahead(source, 2**30) == 2
