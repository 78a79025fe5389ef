"""The leaf loop: read, compute, add. The same in a thread of this process and in a task."""

from __future__ import annotations

import functools
import operator
import os
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import psutil

from nlsq_dask.evaluate.base import RangeReport, Request
from nlsq_dask.evaluate.shards import cut_slabs
from nlsq_dask.evaluate.tree import bin_level, sum_range
from nlsq_dask.kernels.build import Kernels, build_kernels
from nlsq_dask.kernels.reverse import ReverseKernels, build_reverse_kernels
from nlsq_dask.normal_equations import CostSum, RowStatistics, Sums
from nlsq_dask.problem import Problem
from nlsq_dask.sources.base import Chunk, check_chunk, pad_chunk
from nlsq_dask.sources.grid import GridSource

__all__ = ["Blocks", "ProblemHome", "peak_memory_bytes", "shapes_of"]

Blocks = Mapping[int, Mapping[str, np.ndarray]]  # by leaf, by role of the column


@dataclass(kw_only=True, eq=False)
class ProblemHome:
    """What a process keeps of a problem between passes: kernels and chunks.

    All of it can be rebuilt. Chunks are admitted until `cache_bytes` are full and dropped when
    the process no longer owns them; on a cyclic scan, dropping the least recently used one
    would drop each just before it is needed.
    """

    problem: Problem
    cache_bytes: int
    prefetch: bool
    kernels: Kernels = field(init=False)
    reverse: ReverseKernels = field(init=False)
    _cache: dict[int, Chunk] = field(default_factory=dict)
    _cached_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.kernels = build_kernels(self.problem.kernel_spec)
        self.reverse = build_reverse_kernels(self.problem.kernel_spec)

    def retain(self, owned: Sequence[range]) -> None:
        """Drop the chunks that another process owns now."""
        with self._lock:
            for index in [i for i in self._cache if not any(i in leaves for leaves in owned)]:
                self._cached_bytes -= self._cache.pop(index).nbytes

    def reduce(
        self,
        leaves: range,
        request: Request,
        *,
        may_cache: bool = True,
        blocks: Blocks | None = None,
    ) -> RangeReport:
        """Sum the leaves of a range, into nodes of the tree."""
        start = time.perf_counter()
        meter = _Meter()
        offending: list[int] = []

        def each() -> Iterator[tuple[int, Sums]]:
            for index, chunk in self._chunks(leaves, meter, may_cache, blocks):
                sums = self._evaluate(chunk, request, meter)
                if request.names_leaves and _is_offending(sums):
                    offending.append(index)
                yield index, sums

        nodes, bins = sum_range(each(), bin_level(self.problem.source.num_chunks))
        return RangeReport(
            nodes=nodes,
            bins=bins,
            bytes_read=meter.bytes_read,
            read_seconds=meter.read_seconds,
            busy_seconds=time.perf_counter() - start,
            num_compilations=meter.num_compilations,
            peak_memory_bytes=peak_memory_bytes(),
            process=str(os.getpid()),
            offending_leaves=tuple(offending[:16]),
        )

    def _evaluate(self, chunk: Chunk, request: Request, meter: _Meter) -> Sums:
        """The sums of a leaf. Its slabs are computed beside each other, and added in order."""
        slabs = cut_slabs(chunk, self.problem.plan.num_shards)
        # Other processes never saw the client's setting, and the setting is the thread's own.
        with jax.enable_x64(True), self._compiling_once(slabs[0], request, meter):
            if len(slabs) == 1:
                return _fetch(self._dispatch(chunk, request))
            devices = jax.local_devices()
            dispatched = [
                self._dispatch(jax.device_put(slab, devices[i % len(devices)]), request)
                for i, slab in enumerate(slabs)
            ]
            return functools.reduce(operator.add, map(_fetch, dispatched))

    def _dispatch(self, chunk: Chunk, request: Request) -> Sums:
        """Start what is asked for, on the device that holds the chunk, without waiting for it."""
        params, terms, kernels = request.params, request.terms, self.kernels
        normal, rows = self._normal(chunk, request)
        rivals = summary = scores = None
        if request.rivals is not None:
            rivals = kernels.costs(request.rivals, terms, chunk)
        if request.center is not None:
            summary = kernels.summary(np.asarray(request.center, np.float64), terms, chunk)
        if request.with_scores:
            num_clusters = self.problem.num_clusters
            scores = kernels.scores(
                params, request.directions, terms, chunk, num_clusters=num_clusters
            )
        return Sums(normal=normal, rows=rows, rival_costs=rivals, summary=summary, scores=scores)

    def _normal(self, chunk: Chunk, request: Request) -> tuple[CostSum, RowStatistics]:
        params, terms, precision = request.params, request.terms, request.precision
        if request.directions is not None:
            return self.kernels.normal_equations(
                params, request.directions, terms, chunk, precision=precision
            )
        if request.vectors is not None:
            return self.reverse.products(params, request.vectors, terms, chunk, precision=precision)
        return self.reverse.gradient(params, terms, chunk, precision=precision)

    @contextmanager
    def _compiling_once(self, chunk: Chunk, request: Request, meter: _Meter) -> Iterator[None]:
        """Let one thread compile while the others of the process wait for it."""
        shapes = shapes_of(
            (request.params, request.directions, request.vectors, request.terms, chunk)
        )
        needed: set[Hashable] = {(f"{request.kind} in {request.precision}", shapes)}
        if request.rivals is not None:
            needed.add((f"costs of {len(request.rivals)}", shapes))
        if request.center is not None:
            needed.add(("summary", shapes))
        if request.with_scores:
            needed.add((f"scores in {self.problem.num_clusters} clusters", shapes))
        kernels = self.kernels
        if needed <= kernels.compiled:
            yield
            return
        with kernels.compiling:
            meter.num_compilations += len(needed - kernels.compiled)
            yield
            kernels.compiled.update(needed)

    def _chunks(
        self, leaves: range, meter: _Meter, may_cache: bool, blocks: Blocks | None
    ) -> Iterator[tuple[int, Chunk]]:
        """Padded chunks in order, the next one read while the caller computes on this one."""
        if not self.prefetch or len(leaves) == 1:
            for index in leaves:
                yield index, self._chunk(index, meter, may_cache, blocks)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="nlsq-read") as reader:
            pending = reader.submit(self._chunk, leaves[0], meter, may_cache, blocks)
            for index in leaves:
                chunk = pending.result()
                if index + 1 in leaves:
                    pending = reader.submit(self._chunk, index + 1, meter, may_cache, blocks)
                yield index, chunk

    def _chunk(self, index: int, meter: _Meter, may_cache: bool, blocks: Blocks | None) -> Chunk:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        start = time.perf_counter()
        chunk = pad_chunk(self._read(index, blocks), self.problem.source.chunk_shape)
        meter.read_seconds += time.perf_counter() - start
        meter.bytes_read += chunk.nbytes
        if may_cache:
            with self._lock:
                if self._cached_bytes + chunk.nbytes <= self.cache_bytes:
                    self._cache[index] = chunk
                    self._cached_bytes += chunk.nbytes
        return chunk

    def _read(self, index: int, blocks: Blocks | None) -> Chunk:
        source = self.problem.source
        if blocks is None:
            return check_chunk(source.read(index), source, index)
        assert isinstance(source, GridSource)
        return source.assemble(index, blocks[index])

    def fetch(self, index: int, *, may_cache: bool = True, blocks: Blocks | None = None) -> Chunk:
        """A chunk, padded to the common shape; from the cache if it is there."""
        return self._chunk(index, _Meter(), may_cache, blocks)


@dataclass(kw_only=True)
class _Meter:
    bytes_read: int = 0
    read_seconds: float = 0.0
    num_compilations: int = 0


def shapes_of(arguments: Any) -> Hashable:
    """What decides whether a kernel has been compiled for these arguments."""
    leaves = jax.tree.leaves(arguments)
    shapes = tuple((np.shape(leaf), str(np.result_type(leaf))) for leaf in leaves)
    return jax.tree.structure(arguments), shapes


def _fetch(sums: Sums) -> Sums:
    fetched: Sums = jax.device_get(sums)
    return fetched


def _is_offending(sums: Sums) -> bool:
    rows = sums.rows
    refused = rows.num_bad_sigma or rows.num_invalid or rows.num_stray
    return bool(not sums.normal.is_finite or refused)


def peak_memory_bytes() -> int:
    """The largest resident size this process has had."""
    if sys.platform == "win32":
        peak: int = psutil.Process().memory_info().peak_wset
        return peak
    import resource  # POSIX only

    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024
