"""Chunks read in one coroutine: to the bits that Zarr reads, Blosc's in their place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs import blosc
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.registry import register_codec
from zarr.storage import LocalStore

from nlsq_dask.errors import StoreDamagedError
from nlsq_dask.sources import straight as module
from nlsq_dask.sources import watched
from nlsq_dask.sources.buffers import aligned_empty, lending
from nlsq_dask.sources.columns import LazyColumn
from nlsq_dask.sources.retrying import UNDECODABLE, reading_log
from nlsq_dask.sources.straight import StraightPipeline, checked, straight
from nlsq_dask.sources.xarray import column_of

VALUES = np.round(np.random.default_rng(0).normal(size=(60, 40)), 2)
LZ4 = BloscCodec(cname="lz4")
OLD_LZ4 = numcodecs.Blosc(cname="lz4")

# How an array is written; and whether its chunks are Blosc's frames of numbers as they lie.
FORMATS: dict[str, tuple[dict[str, Any], bool]] = {
    "raw": ({"compressors": None}, False),
    "zstd": ({"compressors": ZstdCodec()}, False),
    "several": ({"compressors": [GzipCodec(), Crc32cCodec()]}, False),
    "blosc": ({"compressors": LZ4}, True),
    "blosc of zstd": ({"compressors": BloscCodec(cname="zstd", shuffle="bitshuffle")}, True),
    "blosc of float32": ({"compressors": LZ4, "dtype": "f4"}, True),
    "blosc of int16": ({"compressors": LZ4, "dtype": "i2"}, True),
    "blosc of bytes": ({"compressors": LZ4, "dtype": "i1"}, False),
    "blosc, and a checksum": ({"compressors": [LZ4, Crc32cCodec()]}, False),
    "blosc twice": ({"compressors": [LZ4, LZ4]}, False),
    "blosc, the other byte order": (
        {"compressors": LZ4, "serializer": BytesCodec(endian="big")},
        False,
    ),
    "blosc, transposed": ({"compressors": LZ4, "filters": TransposeCodec(order=(1, 0))}, False),
    "shards of blosc": ({"compressors": LZ4, "shards": (14, 40)}, False),
    "format 2": ({"compressors": OLD_LZ4, "zarr_format": 2}, True),
    "format 2, raw": ({"compressors": None, "zarr_format": 2}, False),
    "format 2, zstd": ({"compressors": numcodecs.Zstd(), "zarr_format": 2}, False),
    "format 2, by columns": ({"compressors": OLD_LZ4, "zarr_format": 2, "order": "F"}, False),
    "format 2, the other byte order": (
        {"compressors": OLD_LZ4, "zarr_format": 2, "dtype": ">f8"},
        False,
    ),
    "format 2, filtered": (
        {"compressors": OLD_LZ4, "zarr_format": 2, "filters": numcodecs.Delta(dtype="f8")},
        False,
    ),
}
RECTANGLES = {
    "one chunk": (slice(7, 14), slice(0, 40)),
    "whole chunks": (slice(0, 21), slice(0, 40)),
    "to the end": (slice(49, 60), slice(0, 40)),
    "across chunks": (slice(5, 23), slice(0, 40)),
    "some columns": (slice(0, 21), slice(2, 38)),
    "every third": (slice(0, 60, 3), slice(0, 40)),
    "nothing": (slice(8, 8), slice(0, 40)),
}


def write(path: Path, name: str, chunks=(7, 40), **more) -> zarr.Array:
    options = {**FORMATS[name][0], **more}
    dtype = options.pop("dtype", "f8")
    if options.get("zarr_format") != 2:
        options["dimension_names"] = ["row", "column"]
    array = zarr.create_array(
        path, name="y", shape=VALUES.shape, dtype=dtype, chunks=chunks, **options
    )
    array[:] = (100 * VALUES).astype(dtype)
    if options.get("zarr_format") == 2:
        array.attrs["_ARRAY_DIMENSIONS"] = ["row", "column"]
    return array


def column(path: Path) -> LazyColumn:
    ds = xr.open_zarr(path, chunks=None, consolidated=False, mask_and_scale=False)
    found = column_of("y", ds["y"].variable)
    assert isinstance(found, LazyColumn)
    return found


@pytest.fixture
def in_place(monkeypatch) -> list[np.ndarray]:
    """Where frames were unpacked to without being asked for by a codec."""
    places: list[np.ndarray] = []

    class Noting:
        Blosc = blosc.Blosc

        @staticmethod
        def decompress(frame, dest):
            places.append(dest)
            return blosc.decompress(frame, dest)

    monkeypatch.setattr(module, "blosc", Noting)
    return places


@pytest.mark.parametrize("lends", [True, False])
@pytest.mark.parametrize("rectangle", RECTANGLES)
@pytest.mark.parametrize("name", FORMATS)
def test_rectangles_are_read_as_zarr_reads_them(tmp_path, name, rectangle, lends, in_place):
    array = write(tmp_path / "a.zarr", name)
    index = RECTANGLES[rectangle]
    with lending(aligned_empty if lends else None):
        read = column(tmp_path / "a.zarr").read(index)
    np.testing.assert_array_equal(read, array[index])
    is_in_place, num_whole = FORMATS[name][1], {"one chunk": 1, "whole chunks": 3}
    num_whole |= {"to the end": 1, "across chunks": 2}  # the last chunk is ragged
    assert len(in_place) == (num_whole.get(rectangle, 0) if is_in_place else 0)
    assert all(np.shares_memory(place, read) for place in in_place)


def test_of_a_shard_only_what_is_wanted_is_read(tmp_path, monkeypatch):
    write(tmp_path / "a.zarr", "shards of blosc")
    stored, get, ranges = column(tmp_path / "a.zarr"), LocalStore.get, []

    async def noted(self, key, prototype, byte_range=None):
        ranges.append(byte_range)
        return await get(self, key, prototype, byte_range)

    monkeypatch.setattr(LocalStore, "get", noted)
    stored.read((slice(7, 14), slice(0, 40)))
    assert ranges
    assert None not in ranges


def test_chunks_that_do_not_lie_in_one_piece_are_copied_to_where_they_belong(tmp_path, in_place):
    array = write(tmp_path / "a.zarr", "blosc", chunks=(20, 20))
    read = column(tmp_path / "a.zarr").read((slice(0, 40), slice(0, 40)))
    np.testing.assert_array_equal(read, array[:40])
    assert not in_place
    read = column(tmp_path / "a.zarr").read((slice(20, 40), slice(20, 40)))
    np.testing.assert_array_equal(read, array[20:40, 20:40])
    assert len(in_place) == 1


@pytest.mark.parametrize("num_rows", [3, 11])
def test_a_frame_of_another_size_is_refused_as_zarr_refuses_it(tmp_path, num_rows, in_place):
    """Never is more written than there is room for, nor less."""
    array = write(tmp_path / "a.zarr", "blosc")
    frame = OLD_LZ4.encode(np.ones((num_rows, 40)))
    (tmp_path / "a.zarr" / "y" / "c" / "1" / "0").write_bytes(frame)
    with pytest.raises(ValueError, match="reshape"):
        array[7:14]
    with pytest.raises(UNDECODABLE), reading_log(may_retry=False):
        column(tmp_path / "a.zarr").read((slice(7, 14), slice(0, 40)))
    assert not in_place


@pytest.mark.parametrize("harm", [b"", bytes(2240)], ids=["empty", "zeros"])
def test_what_is_no_frame_is_refused(tmp_path, harm):
    write(tmp_path / "a.zarr", "blosc")
    (tmp_path / "a.zarr" / "y" / "c" / "1" / "0").write_bytes(harm)
    with pytest.raises(UNDECODABLE), reading_log(may_retry=False):
        column(tmp_path / "a.zarr").read((slice(7, 14), slice(0, 40)))


FRAMES = {
    "format 3": {"compressors": LZ4},
    "big-endian": {"compressors": LZ4, "serializer": BytesCodec(endian="big")},
    "transposed": {"compressors": LZ4, "filters": [TransposeCodec(order=(1, 0))]},
    "format 2": {"compressors": OLD_LZ4, "zarr_format": 2},
    "format 2 in Fortran's order": {"compressors": OLD_LZ4, "zarr_format": 2, "order": "F"},
    "format 2, filtered": {
        "compressors": OLD_LZ4,
        "zarr_format": 2,
        "filters": [numcodecs.Delta("<f8")],
    },
}


@pytest.mark.parametrize("num_bytes", [1, 15, 16, 100, -1])
@pytest.mark.parametrize("rectangle", ["one chunk", "across chunks"])
@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("comes_at_once", [True, False])
def test_a_frame_that_is_cut_short_is_not_read_beyond_its_end(
    tmp_path, num_bytes, rectangle, frames, comes_at_once, monkeypatch
):
    """Blosc would: it is not told how long a frame is."""
    monkeypatch.setattr(watched, "comes_at_once", lambda transport: comes_at_once)
    monkeypatch.setitem(FORMATS, frames, (FRAMES[frames], True))
    write(tmp_path / "a.zarr", frames)
    name = "1.0" if frames.startswith("format 2") else "c/1/0"
    path = tmp_path / "a.zarr" / "y" / name
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(StoreDamagedError, match=r"cut short: \S+ bytes of a frame of Blosc's"):
        column(tmp_path / "a.zarr").read(RECTANGLES[rectangle])


@pytest.mark.parametrize("name", ["blosc", "zstd", "format 2"])
def test_missing_chunks_are_filled_and_noted(tmp_path, name):
    array = write(tmp_path / "a.zarr", name, fill_value=-5)
    (key,) = (k for k in ("y/c/1/0", "y/1.0") if (tmp_path / "a.zarr" / k).exists())
    (tmp_path / "a.zarr" / key).unlink()
    with reading_log() as log, lending(lambda shape, dtype: np.full(shape, 77, dtype)):
        read = column(tmp_path / "a.zarr").read((slice(0, 21), slice(0, 40)))
    np.testing.assert_array_equal(read[7:14], -5)
    np.testing.assert_array_equal(read, array[:21])
    assert log.missing == {key}


@dataclass(frozen=True)
class Flip(BytesBytesCodec):
    """Decodes many at a time, as Zarr asks for it, and none alone."""

    is_fixed_size = True

    @classmethod
    def from_dict(cls, data):
        return cls()

    def to_dict(self):
        return {"name": "flip", "configuration": {}}

    def compute_encoded_size(self, input_byte_length, _chunk_spec):
        return input_byte_length

    async def decode(self, chunks_and_specs):
        return [
            None
            if chunk is None
            else spec.prototype.buffer.from_array_like(~chunk.as_numpy_array())
            for chunk, spec in chunks_and_specs
        ]

    encode = decode


def test_a_codec_may_decode_in_a_way_of_its_own(tmp_path):
    register_codec("flip", Flip)
    array = write(tmp_path / "a.zarr", "raw", compressors=[Flip()])
    read = column(tmp_path / "a.zarr").read((slice(5, 23), slice(0, 40)))
    np.testing.assert_array_equal(read, array[5:23])


def test_only_the_pipeline_that_zarr_comes_with_is_replaced(tmp_path):
    array = write(tmp_path / "a.zarr", "blosc").async_array
    assert straight(array) is array
    again = straight(checked(array))
    assert type(again.codec_pipeline) is StraightPipeline
    assert type(array.codec_pipeline) is BatchedCodecPipeline
    assert (again.store_path, again.metadata) == (array.store_path, array.metadata)
    assert straight(again) is again
