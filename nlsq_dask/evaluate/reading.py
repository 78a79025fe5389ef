"""Chunks as kernels take them: padded, aligned, read ahead of the computing, and kept.

A chunk that is read again has to be what it was: see ``sources/marks.py``.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from nlsq_dask.errors import DataChangedError
from nlsq_dask.evaluate.ahead import read_ahead
from nlsq_dask.plan import MemoryProjection
from nlsq_dask.problem import Problem
from nlsq_dask.sources.base import Chunk, Source, check_chunk, pad_chunk
from nlsq_dask.sources.buffers import BufferPool, lending
from nlsq_dask.sources.columns import places_of, stored_among, transports_of
from nlsq_dask.sources.grid import GridSource, is_in_memory
from nlsq_dask.sources.held import Holder, holding
from nlsq_dask.sources.marks import mark_of
from nlsq_dask.sources.retrying import pauses, reading_log
from nlsq_dask.sources.transport import at_chunk, comes_late

__all__ = [
    "Blocks",
    "ChunkReader",
    "Meter",
    "accelerator",
    "count_ahead",
    "describe_places",
    "device_room",
    "held_bytes",
    "projected_memory",
    "reading_bytes",
]

Blocks = Mapping[int, Mapping[str, np.ndarray]]  # by leaf, by role of the column

# Leaves that are being read or ready before they are needed.
_NUM_AHEAD = 2
# Of a store that answers late, as many are asked for at once as come to this.
_AHEAD_BYTES = 2**26
_MOST_AHEAD = 16
# Of a leaf that is being read: as it comes, decoded, aligned.
_COPIES_READING = 3
_DEVICE_SHARE = 0.5  # of an accelerator's free memory, for chunks
_MOST_MISSING = 1000  # keys that are kept of a leaf, and sent of a range


@dataclass(kw_only=True)
class Meter:
    """What a range of leaves took."""

    bytes_read: int = 0
    read_seconds: float = 0.0  # in the reading threads, beside the computing
    num_compilations: int = 0
    num_retries: int = 0
    marks: dict[int, int] = field(default_factory=dict)  # by leaf
    missing: set[str] = field(default_factory=set)

    @property
    def some_missing(self) -> frozenset[str]:
        """Keys of chunks that the store does not have, so many at most as are sent."""
        return frozenset(sorted(self.missing)[:_MOST_MISSING])


def count_ahead(source: Source, leaf_bytes: int) -> int:
    """How many leaves are read ahead at most, by as many threads; many from afar.

    A thread has one request under way for a leaf that is one chunk of the store, and waits for
    most of the time: at 50 ms for an answer, 16 MB/s for chunks of 800 kB.
    """
    if not _is_far(source):
        return _NUM_AHEAD
    return max(_NUM_AHEAD, min(_MOST_AHEAD, _AHEAD_BYTES // max(leaf_bytes, 1)))


def _is_far(source: Source) -> bool:
    return isinstance(source, GridSource) and any(
        map(comes_late, transports_of(source.columns.values()))
    )


def reading_bytes(source: Source, leaf_bytes: int) -> int:
    """Of leaves that are being read or are ready, beside the one that is computed."""
    return count_ahead(source, leaf_bytes) * _COPIES_READING * leaf_bytes


def held_bytes(source: Source, num_threads: int) -> int:
    """Of stored chunks that are much longer than a leaf: decoded, for the leaves to come."""
    if not isinstance(source, GridSource) or is_in_memory(source):
        return 0
    region = source.region(0)
    return sum(
        column.held_bytes(tuple(region[dim] for dim in column.dims), num_threads)
        for column in stored_among(source.columns.values())
    )


def projected_memory(
    problem: Problem,
    limit_bytes: int | None,
    *,
    base_bytes: int,
    kernel_bytes: int,
    num_threads: int,
    cache_bytes: int,
) -> dict[str, Any]:
    """Bytes that a process is expected to need at most, and its limit, as diagnostics have them.

    Raises
    ------
    MemoryProjectionError
        If it has a limit, and needs more.
    """
    source, plan = problem.source, problem.plan
    projection = MemoryProjection(
        base_bytes=base_bytes,
        leaf_bytes=plan.leaf_bytes,
        reading_bytes=reading_bytes(source, plan.leaf_bytes),
        kernel_bytes=kernel_bytes,
        num_threads=num_threads,
        held_bytes=held_bytes(source, num_threads),
        cache_bytes=cache_bytes,
    )
    projection.require_within(limit_bytes, math.prod(plan.leaf_shape))
    return {"projected_bytes": projection.total_bytes, "limit_bytes": limit_bytes}


class ChunkReader:
    """Reads the chunks of a source, and keeps those that fit.

    All of it can be rebuilt. Chunks are admitted until `cache_bytes` are full and dropped when
    the process no longer owns them; on a cyclic scan, dropping the least recently used one
    would drop each just before it is needed. With a `device`, chunks are moved there by the
    thread that reads them, and `device_bytes` of them stay, in place of the host.
    """

    def __init__(
        self,
        source: Source,
        *,
        cache_bytes: int,
        prefetch: bool,
        num_ahead: int = _NUM_AHEAD,
        device: jax.Device | None = None,
        device_bytes: int = 0,
        may_retry: bool = True,
    ) -> None:
        self._source = source
        self._may_retry = may_retry
        self._is_far = _is_far(source)
        self._prefetch = prefetch
        self.num_ahead = num_ahead
        self.device = device
        self._room = cache_bytes
        self._device_room = device_bytes
        self._cache: dict[int, Chunk] = {}
        self._pool = BufferPool()
        self._holder = Holder()
        self._lock = threading.Lock()
        self._is_ours = isinstance(source, GridSource)  # what it reads is written once
        self._is_marking = not is_in_memory(source)  # what is not read cannot have changed
        self._marks = np.zeros(source.num_chunks, np.int64)  # 0: not read yet
        self._missing: dict[int, frozenset[str]] = {}

    def retain(self, owned: Sequence[range]) -> None:
        """Drop the chunks that another process owns now."""
        with self._lock:
            for index in [i for i in self._cache if not any(i in leaves for leaves in owned)]:
                chunk = self._cache.pop(index)
                if _is_on_device(chunk):
                    self._device_room += chunk.nbytes
                else:
                    self._room += chunk.nbytes

    def fetch(self, index: int, *, may_cache: bool = True, blocks: Blocks | None = None) -> Chunk:
        """One chunk; from the cache if it is there."""
        return self._chunk(index, Meter(), may_cache, blocks)

    def fetch_host(
        self, index: int, *, may_cache: bool = True, blocks: Blocks | None = None
    ) -> Chunk:
        """One chunk, as NumPy arrays."""
        chunk: Chunk = jax.device_get(self.fetch(index, may_cache=may_cache, blocks=blocks))
        return chunk

    def stream(
        self,
        leaves: Sequence[int],
        meter: Meter,
        *,
        may_cache: bool = True,
        blocks: Blocks | None = None,
    ) -> Generator[tuple[int, Chunk]]:
        """Chunks in order, the next ones read while the caller computes on this one."""
        with self._lock:
            kept = {i: self._cache[i] for i in leaves if self._is_in_place(i)}
        missing = [i for i in leaves if i not in kept]
        read = functools.partial(self._chunk, meter=meter, may_cache=may_cache, blocks=blocks)
        with closing(self._arriving(missing, read)) as arriving:
            for index in leaves:
                if index in kept:
                    self._note(index, meter)
                yield index, kept[index] if index in kept else next(arriving)

    def _arriving(self, missing: Sequence[int], read: Callable[[int], Chunk]) -> Generator[Chunk]:
        if self._prefetch and len(missing) > 1:
            return read_ahead(read, missing, num_ahead=self.num_ahead, is_far=self._is_far)
        return (read(index) for index in missing)

    def _is_in_place(self, index: int) -> bool:
        """Whether a chunk is kept where it is computed on."""
        chunk = self._cache.get(index)
        return chunk is not None and (self.device is None or _is_on_device(chunk))

    def _chunk(self, index: int, meter: Meter, may_cache: bool, blocks: Blocks | None) -> Chunk:
        kept = self._cache.get(index)
        if kept is not None:
            self._note(index, meter)
            return self._place(kept)
        start = time.perf_counter()
        chunk = self._read_alike(index, blocks, meter)
        placed = self._place(chunk)
        with self._lock:
            meter.read_seconds += time.perf_counter() - start
            meter.bytes_read += chunk.nbytes
        self._note(index, meter)
        if may_cache:
            self._admit(index, chunk, placed)
        return placed

    def _note(self, index: int, meter: Meter) -> None:
        """Of a chunk that is handed out: its mark, and what was missing when it was read."""
        if self._marks[index]:
            meter.marks[index] = int(self._marks[index])
        meter.missing |= self._missing.get(index, frozenset())

    def _read_alike(self, index: int, blocks: Blocks | None, meter: Meter) -> Chunk:
        """A chunk as it was read before: otherwise once more, it may have been garbled."""
        with reading_log(may_retry=self._may_retry) as log:
            waits = pauses(is_far=self._is_far)
            while True:
                read = self._read(index, blocks)
                chunk = pad_chunk(
                    read, self._source.chunk_shape, self._pool.empty, is_ours=self._is_ours
                )
                if not self._is_marking or self._is_alike(index, chunk):
                    break
                wait = next(waits, None) if blocks is None else None  # those stay as they are
                if wait is None:
                    raise DataChangedError(
                        f"`ds` must not change while it is fitted, and chunk {index} of "
                        f"{describe_places(self._source)} was read with other values than before; "
                        "if nothing writes to it, bytes were garbled on the way: a checksum in "
                        "its codecs (crc32c) would tell at once"
                    )
                time.sleep(wait)
                log.is_again = True
        with self._lock:
            meter.num_retries += log.num_retries
        if log.missing:
            self._missing[index] = frozenset(sorted(log.missing)[:_MOST_MISSING])
        return chunk

    def _is_alike(self, index: int, chunk: Chunk) -> bool:
        """Whether it has the values of the first reading; the first reading itself has."""
        mark = mark_of(chunk, index)
        with self._lock:
            if not self._marks[index]:
                self._marks[index] = mark
            return int(self._marks[index]) == mark

    def _read(self, index: int, blocks: Blocks | None) -> Chunk:
        source = self._source
        with at_chunk(index), lending(self._pool.empty), holding(self._holder):
            if blocks is None:
                return check_chunk(source.read(index), source, index)
            assert isinstance(source, GridSource)
            return source.assemble(index, blocks[index])

    def _place(self, chunk: Chunk) -> Chunk:
        """Where it is computed on: on the device, in 64 bits there too, or as it is."""
        if self.device is None or _is_on_device(chunk):
            return chunk
        with jax.enable_x64(True):
            placed: Chunk = jax.device_put(chunk, self.device)
        return placed

    def _admit(self, index: int, chunk: Chunk, placed: Chunk) -> None:
        with self._lock:
            if index in self._cache:
                return
            if _is_on_device(placed) and chunk.nbytes <= self._device_room:
                self._device_room -= chunk.nbytes
                self._cache[index] = placed
            elif chunk.nbytes <= self._room:
                self._room -= chunk.nbytes
                self._cache[index] = chunk


def describe_places(source: Source) -> str:
    """The stored arrays of a source, in words."""
    places = places_of(source.columns.values()) if isinstance(source, GridSource) else []
    return ", ".join(places) or "its source"


def _is_on_device(chunk: Chunk) -> bool:
    return isinstance(chunk.y, jax.Array)


def accelerator() -> jax.Device | None:
    """The device that chunks are moved to; None where kernels run in the host's memory."""
    first = jax.local_devices()[0]
    return None if first.platform == "cpu" else first


def device_room(device: jax.Device) -> int:
    """Bytes that chunks may take of a device's memory; none where it does not say."""
    memory = device.memory_stats()
    if not memory or "bytes_limit" not in memory:
        return 0
    return int(_DEVICE_SHARE * (memory["bytes_limit"] - memory.get("bytes_in_use", 0)))
