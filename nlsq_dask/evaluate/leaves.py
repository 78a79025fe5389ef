"""The leaf loop: read, compute, add. The same in a thread of this process and in a task."""

from __future__ import annotations

import functools
import operator
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

from nlsq_dask._typing import Array, abstract
from nlsq_dask.config import Precision
from nlsq_dask.evaluate.base import RangeReport, Request
from nlsq_dask.evaluate.marks import add_marks
from nlsq_dask.evaluate.packed import Layout, PackedSums
from nlsq_dask.evaluate.reading import (
    Blocks,
    ChunkReader,
    Meter,
    accelerator,
    count_ahead,
    device_room,
)
from nlsq_dask.evaluate.shards import cut_slabs
from nlsq_dask.evaluate.tree import bin_level, sum_range
from nlsq_dask.kernels.build import Kernels, build_kernels
from nlsq_dask.kernels.handed import HandedSums
from nlsq_dask.kernels.reverse import ReverseKernels, build_reverse_kernels
from nlsq_dask.normal_equations import CostSum, RowStatistics, RowSummary, ScoreSums, Sums
from nlsq_dask.plan import slab_shape
from nlsq_dask.problem import Problem
from nlsq_dask.sources.base import Chunk
from nlsq_dask.sources.windows import Windows, windows_of

__all__ = ["ProblemHome", "peak_memory_bytes", "shapes_of"]

# Starting a leaf and waiting for it count where leaves are small. A second large one would only
# have the caches to share with the first.
_GROUP_BYTES = 2**22
_MAX_GROUP = 32
_MOST_VECTORS = 6  # in one pass: both parts of a direction, and four that calibrate


@dataclass(kw_only=True, eq=False)
class ProblemHome:
    """What a process keeps of a problem between passes: kernels and chunks. All can be rebuilt."""

    problem: Problem
    cache_bytes: int
    prefetch: bool
    keeps_on_device: bool = False  # what fits there, beside `cache_bytes` on the host
    may_retry: bool = True
    kernels: Kernels = field(init=False)
    reverse: ReverseKernels = field(init=False)
    reader: ChunkReader = field(init=False)
    windows: Windows | None = field(init=False)  # in passes, in the place of the reader
    is_stopped: threading.Event = field(init=False, default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.kernels = build_kernels(self.problem.kernel_spec)
        self.reverse = build_reverse_kernels(self.problem.kernel_spec)
        plan, is_whole = self.problem.plan, self.problem.plan.num_shards == 1
        # Slabs are moved to the devices that share a leaf when it is cut.
        device = accelerator() if is_whole else None
        # Reverse kernels draw numbers beside the rows of a chunk, by its shape.
        is_direct = is_whole and device is None and not plan.is_matrix_free
        self.windows = windows_of(self.problem.source) if is_direct else None
        self.reader = ChunkReader(
            self.problem.source,
            cache_bytes=self.cache_bytes,
            prefetch=self.prefetch,
            num_ahead=count_ahead(self.problem.source, self.problem.plan.leaf_bytes),
            device=device,
            device_bytes=0 if device is None or not self.keeps_on_device else device_room(device),
            may_retry=self.may_retry,
        )

    def leaf(self, index: int) -> Chunk:
        """A leaf as passes take it."""
        return self.reader.fetch(index) if self.windows is None else self.windows.leaf(index)

    def host_leaf(self, index: int) -> Chunk:
        """A leaf as NumPy arrays: where they are at hand, as they lie."""
        source = self.problem.source
        return self.reader.fetch_host(index) if self.windows is None else source.read(index)

    def prepare(self, precision: Precision, chunk: Chunk | None = None) -> int:
        """Compile what the first pass computes; the bytes that XLA needs for it on one leaf.

        Those are beside the arguments, for all slabs together. A chunk's dtypes are part of what
        is compiled: without one they are taken to be float64, and only the number is of use.
        """
        num_shards = self.problem.plan.num_shards
        if chunk is None or num_shards > 1:
            chunk = _abstract_slab(self.problem)
        compiled = self.kernels.temporary_bytes

        def compile_one(needed: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> int:
            kernel, arguments, options = needed
            shapes = (kernel, shapes_of(arguments), *options.values())
            if shapes not in compiled:
                with jax.enable_x64(True):  # of each thread its own
                    lowered = kernel.lower(*arguments, **options)
                    compiled[shapes] = _temporary_bytes(lowered.compile())
            return compiled[shapes]

        needed = list(self._first_kernels(chunk, precision))
        pool = ThreadPoolExecutor(len(needed), thread_name_prefix="nlsq-compile")
        with self.kernels.compiling, pool as threads:
            most = max(threads.map(compile_one, needed))
        copied = self.problem.plan.leaf_bytes if num_shards > 1 else 0
        return num_shards * most + copied

    def _first_kernels(
        self, chunk: Chunk, precision: Precision
    ) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """Kernels of the first pass with their arguments. JAX finds by them what is compiled."""
        problem, space = self.problem, self.problem.space
        terms = problem.terms(np.zeros(len(problem.source.variables)))
        options = {"precision": precision}
        if problem.plan.is_matrix_free:
            vectors = abstract((_MOST_VECTORS, space.size))
            yield self.reverse.gradient, (space.p0, terms, chunk), options
            yield self.reverse.products, (space.p0, vectors, terms, chunk), options
            return
        directions = problem.directions(np.eye(space.num_free))
        yield self.kernels.normal_equations, (space.p0, directions, terms, chunk), options
        yield self.kernels.summary, (np.zeros(()), terms, chunk), {}

    def reduce(
        self,
        leaves: range,
        request: Request,
        *,
        may_cache: bool = True,
        blocks: Blocks | None = None,
        on_leaf: Callable[[int], object] = lambda _: None,
    ) -> RangeReport:
        """Sum the leaves of a range, into nodes of the tree.

        Raises
        ------
        CancelledError
            If `is_stopped` was set meanwhile.
        """
        start = time.perf_counter()
        meter = Meter()
        offending: list[int] = []
        if self.windows is None:
            chunks = self.reader.stream(leaves, meter, may_cache=may_cache, blocks=blocks)
        else:
            chunks = self.windows.stream(leaves)
            meter.bytes_read = self.windows.nbytes(leaves)

        def each() -> Iterator[tuple[int, PackedSums]]:
            for index, sums in self._evaluate(chunks, request, meter):
                if request.names_leaves and sums.is_offending:
                    offending.append(index)
                yield index, sums
                on_leaf(1)

        with closing(chunks):
            level = bin_level(self.problem.source.num_chunks)
            nodes, bins = sum_range(each(), level, PackedSums.bin)
        return RangeReport(
            nodes={node: sums.unpack() for node, sums in nodes.items()},
            bins=bins,
            bytes_read=meter.bytes_read,
            read_seconds=meter.read_seconds,
            busy_seconds=time.perf_counter() - start,
            num_compilations=meter.num_compilations,
            peak_memory_bytes=peak_memory_bytes(),
            process=str(os.getpid()),
            offending_leaves=tuple(offending[:16]),
            marks=add_marks(meter.marks, self.problem.source.num_chunks),
            missing=meter.some_missing,
            num_retries=meter.num_retries,
        )

    def _evaluate(
        self, chunks: Iterator[tuple[int, Chunk]], request: Request, meter: Meter
    ) -> Iterator[tuple[int, PackedSums]]:
        """The sums of each leaf, in order.

        Small leaves are waited for a group at a time, while the next one is being computed.
        """
        request = _on_device(request)
        started: list[tuple[int, list[_Started]]] = []
        layout: Layout | None = None
        ready: set[Hashable] = set()
        group_size: int | None = None
        num_beside = 0  # leaves that are computed while the sums of a group are added up
        for index, chunk in chunks:
            if self.is_stopped.is_set():
                raise CancelledError(f"stopped before leaf {index}")
            started.append((index, self._start(chunk, request, meter, ready)))
            if self.reader.device is not None:
                for array in jax.tree.leaves(started[-1][1]):
                    array.copy_to_host_async()
            if group_size is None:
                arrays = jax.tree.leaves(started[0][1])
                nbytes = chunk.nbytes + sum(array.nbytes for array in arrays)
                group_size, num_beside = _group_size(nbytes), int(nbytes <= _GROUP_BYTES)
            if len(started) == group_size + num_beside:
                layout = yield from _fetch(started[:group_size], layout)
                del started[:group_size]
        yield from _fetch(started, layout)

    def _start(
        self, chunk: Chunk, request: Request, meter: Meter, ready: set[Hashable]
    ) -> list[_Started]:
        """Start the sums of a leaf: its slabs are computed beside each other."""
        slabs = cut_slabs(chunk, self.problem.plan.num_shards)
        kind = _kind_of(slabs[0])
        # Other processes never saw the client's setting, and the setting is the thread's own.
        with jax.enable_x64(True):
            if kind not in ready:
                with self._compiling_once(slabs[0], request, meter):
                    started = self._start_slabs(slabs, request)
                ready.add(kind)
                return started
            return self._start_slabs(slabs, request)

    def _start_slabs(self, slabs: Sequence[Chunk], request: Request) -> list[_Started]:
        if len(slabs) == 1:
            return [self._dispatch(slabs[0], request)]
        devices = jax.local_devices()
        return [
            self._dispatch(jax.device_put(slab, devices[i % len(devices)]), request)
            for i, slab in enumerate(slabs)
        ]

    def _dispatch(self, chunk: Chunk, request: Request) -> _Started:
        """Start what is asked for, on the device that holds the chunk, without waiting for it."""
        params, terms, kernels = request.params, request.terms, self.kernels
        normal = self._normal(chunk, request)
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
        return _Started(normal, rivals, summary, scores)

    def _normal(self, chunk: Chunk, request: Request) -> HandedSums | tuple[CostSum, RowStatistics]:
        params, terms, precision = request.params, request.terms, request.precision
        if request.directions is not None:
            return self.kernels.normal_equations(
                params, request.directions, terms, chunk, precision=precision
            )
        if request.vectors is not None:
            return self.reverse.products(params, request.vectors, terms, chunk, precision=precision)
        return self.reverse.gradient(params, terms, chunk, precision=precision)

    @contextmanager
    def _compiling_once(self, chunk: Chunk, request: Request, meter: Meter) -> Iterator[None]:
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


class _Started(NamedTuple):
    """The sums of a slab, as its kernels hand them over; some may still be being computed."""

    normal: HandedSums | tuple[CostSum, RowStatistics]
    rival_costs: Array | None
    summary: RowSummary | None
    scores: ScoreSums | None

    def finish(self) -> Sums:
        handed = self.normal
        normal, rows = handed.finish() if isinstance(handed, HandedSums) else handed
        return Sums(
            normal=normal,
            rows=rows,
            rival_costs=self.rival_costs,
            summary=self.summary,
            scores=self.scores,
        )


def shapes_of(arguments: Any) -> Hashable:
    """What decides whether a kernel has been compiled for these arguments."""
    leaves = jax.tree.leaves(arguments)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
    return jax.tree.structure(arguments), shapes


def _kind_of(chunk: Chunk) -> Hashable:
    """Shapes and dtypes of a chunk: less than `shapes_of`, and looked at for every leaf."""
    parts = (*chunk.x, chunk.y, chunk.sigma, chunk.where, chunk.cluster)
    return tuple(None if part is None else (part.shape, part.dtype) for part in parts)


def _group_size(leaf_bytes: int) -> int:
    """How many leaves are started before their sums are waited for."""
    return max(1, min(_MAX_GROUP, _GROUP_BYTES // leaf_bytes))


def _on_device(request: Request) -> Request:
    """The same request, its arrays moved once for all leaves."""
    with jax.enable_x64(True):
        params, directions, vectors, rivals, terms = jax.device_put(
            (request.params, request.directions, request.vectors, request.rivals, request.terms)
        )
    return replace(
        request, params=params, directions=directions, vectors=vectors, rivals=rivals, terms=terms
    )


def _fetch(
    started: Sequence[tuple[int, list[_Started]]], layout: Layout | None
) -> Generator[tuple[int, PackedSums], None, Layout | None]:
    """Wait for the sums of some leaves; those of slabs are added in order.

    The layout of the first is that of all: it is returned for those to come.
    """
    for index, slabs in started:
        finished = [slab.finish() for slab in slabs]
        layout = layout or Layout(finished[0])
        yield index, functools.reduce(operator.add, map(layout.pack, finished))
    return layout


def _abstract_slab(problem: Problem) -> Chunk:
    """Shapes of what one device computes on, in float64."""
    shape = slab_shape(tuple(problem.source.chunk_shape), problem.plan.num_shards)
    return Chunk(
        x=tuple(abstract(shape) for _ in problem.source.variables),
        y=abstract(shape),
        extent=abstract((len(shape),), np.int64),
    )


def _temporary_bytes(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    if analysis is None:  # a backend that does not say
        return 0
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def peak_memory_bytes() -> int:
    """The largest resident size this process has had."""
    if sys.platform == "win32":
        peak: int = psutil.Process().memory_info().peak_wset
        return peak
    import resource  # POSIX only

    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024
