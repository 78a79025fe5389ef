"""Chunks longer than what is read of them are decoded once for those who read the next part."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import xarray as xr

from nlsq_dask import HybridStreamingConfig, fit_dataset
from nlsq_dask.evaluate.reading import ChunkReader, held_bytes
from nlsq_dask.sources import held
from nlsq_dask.sources.buffers import BufferPool, lending
from nlsq_dask.sources.columns import LazyColumn
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.sources.held import HeldBlocks, Holder, holding
from nlsq_dask.sources.retrying import reading_log
from nlsq_dask.sources.stores import open_store
from nlsq_dask.sources.xarray import column_of
from problems import decay, scipy_decay


class Decoded:
    """Counts what is decoded, by key."""

    def __init__(self) -> None:
        self.keys: list[object] = []

    def of(self, held_blocks: HeldBlocks, key, size: int = 10) -> np.ndarray:
        def decode() -> np.ndarray:
            self.keys.append(key)
            return np.full(size, float(len(self.keys)))

        return held_blocks.get(key, decode)


def test_a_block_is_decoded_once():
    blocks, decoded = HeldBlocks(), Decoded()
    for key in ("a", "b", "a", "b"):
        decoded.of(blocks, key)
    assert decoded.keys == ["a", "b"]


def test_the_oldest_are_let_go_and_the_last_stays_however_large(monkeypatch):
    monkeypatch.setattr(held, "_MOST_BYTES", 160)
    blocks, decoded = HeldBlocks(), Decoded()
    for key in ("a", "b", "c", "a", "b"):  # two of 80 bytes beside the last
        decoded.of(blocks, key)
    assert decoded.keys == ["a", "b", "c"]
    decoded.of(blocks, "large", 1000)
    assert list(blocks._blocks) == ["a", "b", "large"]
    decoded.of(blocks, "a")
    assert list(blocks._blocks) == ["a"]


def test_what_is_read_once_more_is_decoded_once_more():
    blocks, decoded = HeldBlocks(), Decoded()
    with reading_log() as log:
        assert decoded.of(blocks, "a")[0] == 1
        log.is_again = True
        assert decoded.of(blocks, "a")[0] == 2
    assert decoded.of(blocks, "a")[0] == 2


def test_who_asks_meanwhile_waits():
    blocks, begun, go_on = HeldBlocks(), threading.Event(), threading.Event()
    times = []

    def decode() -> np.ndarray:
        times.append(1)
        begun.set()
        assert go_on.wait(60)
        return np.ones(3)

    with ThreadPoolExecutor(2) as threads:
        each = [threads.submit(blocks.get, "a", decode) for _ in range(2)]
        assert begun.wait(60)
        go_on.set()
        assert [future.result().sum() for future in each] == [3, 3]
    assert len(times) == 1


def test_after_an_error_the_next_one_tries_again():
    blocks, decoded = HeldBlocks(), Decoded()

    def gone() -> np.ndarray:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        blocks.get("a", gone)
    assert decoded.of(blocks, "a")[0] == 1


# -- columns


NUM_ROWS = 1_000


def write(path: Path, chunks: dict[str, int]) -> Path:
    t = np.linspace(0.0, 10.0, NUM_ROWS)
    y = 2 * np.exp(-0.5 * t) + 0.1 + 0.1 * np.random.default_rng(5).normal(size=t.size)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})
    encoding = {name: {"chunks": (length,)} for name, length in chunks.items()}
    ds.to_zarr(path, encoding=encoding, consolidated=False)
    return path


@pytest.fixture
def rectangles(monkeypatch) -> list[slice]:
    """What of `t` was decoded."""
    seen: list[slice] = []
    values = LazyColumn._values

    def noted(self, index):
        if "'t'" in self.place:
            seen.append(*index)
        return values(self, index)

    monkeypatch.setattr(LazyColumn, "_values", noted)
    return seen


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (100, [slice(i, i + 100) for i in range(0, 1000, 100)]),
        (200, [slice(i, i + 100) for i in range(0, 1000, 100)]),  # twice as much: not held
        (300, [slice(0, 300), slice(300, 600), slice(600, 900), slice(900, 1000)]),
        (1000, [slice(0, 1000)]),
    ],
)
def test_a_column_is_decoded_by_chunks_much_longer_than_leaves(
    tmp_path, chunk, expected, rectangles
):
    ds = open_store(write(tmp_path / "a.zarr", {"t": chunk, "y": 100}))
    column, pool = column_of("t", ds["t"].variable), BufferPool()
    lent = []

    def empty(shape, dtype):
        lent.append(pool.empty(shape, dtype))
        return lent[-1]

    with lending(empty), holding(Holder()):
        read = [column.read((slice(i, i + 100),)) for i in range(0, 1000, 100)]
    np.testing.assert_array_equal(np.concatenate(read), ds["t"].values)
    assert rectangles == expected
    assert all(map(np.shares_memory, read, lent))


def test_columns_do_not_take_the_room_of_others(tmp_path, monkeypatch, rectangles):
    monkeypatch.setattr(held, "_MOST_BYTES", 0)
    ds = open_store(write(tmp_path / "a.zarr", {"t": 1000, "y": 1000}))
    columns = [column_of(name, ds[name].variable) for name in ("t", "y")]
    with holding(Holder()):
        for start in (0, 100, 200):
            for column in columns:
                column.read((slice(start, start + 100),))
    assert rectangles == [slice(0, 1000)]


def test_nothing_is_kept_where_nobody_holds(tmp_path, rectangles):
    ds = open_store(write(tmp_path / "a.zarr", {"t": 1000, "y": 100}))
    column = column_of("t", ds["t"].variable)
    np.testing.assert_array_equal(column.read((slice(3, 5),)), ds["t"].values[3:5])
    assert rectangles == [slice(3, 5)]


def test_what_is_handed_out_is_not_what_is_held(tmp_path):
    ds = open_store(write(tmp_path / "a.zarr", {"t": 1000, "y": 100}))
    column = column_of("t", ds["t"].variable)
    with holding(Holder()):
        first, second = (column.read((slice(3, 5),)) for _ in range(2))
    assert not np.shares_memory(first, second)


def test_missing_keys_are_noted_for_each_part(tmp_path):
    write(tmp_path / "a.zarr", {"t": 1000, "y": 100})
    (tmp_path / "a.zarr" / "t" / "c" / "0").unlink()
    column = column_of("t", open_store(tmp_path / "a.zarr")["t"].variable)
    kept = Holder()
    for start in (0, 100):
        with reading_log() as log, holding(kept):
            column.read((slice(start, start + 100),))
        assert log.missing == {"t/c/0"}


def test_a_leaf_that_came_out_otherwise_is_not_taken_from_what_is_held(tmp_path, monkeypatch):
    """The second reading is garbled, and held; the third is as the first."""
    ds = open_store(write(tmp_path / "a.zarr", {"t": 1000, "y": 100}))
    t, y = (column_of(name, ds[name].variable) for name in ("t", "y"))
    source = GridSource(variables=("t",), x=(t,), y=y, leaf_shape=(100,))
    reader = ChunkReader(source, cache_bytes=0, prefetch=False)
    expected = reader.fetch(0).x[0].copy()
    times, values = [], LazyColumn._values

    def garbled(self, index):
        read = values(self, index)
        if self is t:
            times.append(1)
            return read + (len(times) == 1)
        return read

    monkeypatch.setattr(LazyColumn, "_values", garbled)
    reader._holder.blocks_of(t)._blocks.clear()
    np.testing.assert_array_equal(reader.fetch(0).x[0], expected)
    assert len(times) == 2


def test_a_fit_decodes_a_coordinate_in_one_chunk_once(tmp_path, rectangles):
    path = write(tmp_path / "a.zarr", {"t": 1000, "y": 50})
    config = HybridStreamingConfig(chunk_size=50, cache_bytes=0)
    result = fit_dataset(path, decay, y="y", config=config)
    ds = open_store(path)
    assert scipy_decay(ds["t"].values, ds["y"].values).distance(result.popt) < 1e-3
    assert rectangles == [slice(0, 1000)]


@pytest.mark.parametrize(("chunk", "num_chunks"), [(200_000, 0), (400_000, 3), (2_000_000, 2)])
def test_what_is_held_is_projected(chunk, num_chunks, tmp_path):
    """Of a time in long chunks, where those of `y` are leaves: decoded, and as they are stored."""
    num_rows = 2_000_000
    ds = xr.Dataset({"t": ("row", np.linspace(0, 10, num_rows)), "y": ("row", np.zeros(num_rows))})
    encoding = {"t": {"chunks": (chunk,)}, "y": {"chunks": (100_000,)}}
    ds.to_zarr(tmp_path / "rows.zarr", encoding=encoding, consolidated=False)
    y, t = (column_of(name, open_store(tmp_path / "rows.zarr")[name].variable) for name in "yt")
    source = GridSource(variables=("t",), x=(t,), y=y, leaf_shape=(100_000,))
    # All is less than what may be kept beside the last: the array, and a chunk as it is stored.
    expected = 8 * (num_rows + chunk) if num_chunks else 0
    assert held_bytes(source, num_threads=1) == expected
    with mock.patch.object(held, "_MOST_BYTES", 0):
        assert held_bytes(source, num_threads=1) == 8 * num_chunks * chunk
