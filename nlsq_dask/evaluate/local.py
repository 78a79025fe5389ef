"""Passes in this process, one range of leaves for each thread."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
import psutil

from nlsq_dask._typing import abstract
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.evaluate.base import Pass, Request, fold_reports
from nlsq_dask.evaluate.leaves import ProblemHome, shapes_of
from nlsq_dask.evaluate.tree import split_leaves
from nlsq_dask.plan import MemoryProjection, slab_shape
from nlsq_dask.problem import Problem
from nlsq_dask.sources.base import Chunk, Source
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.terms import RowTerms

__all__ = ["CACHE_SHARE", "LocalEvaluator", "is_in_memory", "kernel_bytes"]

_Value = TypeVar("_Value")

_MOST_VECTORS = 6  # in one pass: both parts of a direction, and four that calibrate
CACHE_SHARE = 0.4  # of a process's memory limit, at most


class LocalEvaluator:
    """Passes in this process, by threads. Chunks stay cached where they came from a store."""

    def __init__(
        self,
        problem: Problem,
        config: HybridStreamingConfig | None = None,
        *,
        num_threads: int | None = None,
    ) -> None:
        config = HybridStreamingConfig() if config is None else config
        self._num_threads = num_threads or _num_cpus()
        cache_bytes = config.cache_bytes
        if is_in_memory(problem.source):
            cache_bytes = 0
        elif cache_bytes is None:
            cache_bytes = int(CACHE_SHARE * psutil.virtual_memory().available)
        self._cache_bytes = cache_bytes
        self._home = ProblemHome(problem=problem, cache_bytes=cache_bytes, prefetch=config.prefetch)

    @property
    def problem(self) -> Problem:
        return self._home.problem

    @property
    def description(self) -> str:
        return f"this process, {self._num_threads} thread(s)"

    @property
    def keeps_rows(self) -> bool:
        return False

    def evaluate(self, request: Request) -> Pass:
        """One pass over all rows."""
        start = time.perf_counter()
        num_leaves = self.problem.source.num_chunks
        ranges = split_leaves(num_leaves, self._num_threads)
        if len(ranges) == 1:
            reports = [self._home.reduce(ranges[0], request)]
        else:
            with ThreadPoolExecutor(len(ranges), thread_name_prefix="nlsq-pass") as threads:
                reports = list(
                    threads.map(lambda leaves: self._home.reduce(leaves, request), ranges)
                )
        sums, bins = fold_reports(reports, num_leaves)
        return Pass(
            sums=sums,
            bins=bins,
            bytes_read=sum(report.bytes_read for report in reports),
            seconds=time.perf_counter() - start,
            reports=tuple(reports),
        )

    def map_chunks(
        self, function: Callable[[int, Chunk], _Value], indices: Sequence[int]
    ) -> list[_Value]:
        """``[function(i, chunk_i), …]``."""
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="nlsq-map") as threads:
            return list(
                threads.map(lambda i: function(i, self._home.reader.fetch_host(i)), indices)
            )

    def memory(self) -> dict[str, Any]:
        """Projected and available bytes; none are projected where the data are here already."""
        needed = kernel_bytes(self._home)  # compiled here, the first pass finds the kernel ready
        if is_in_memory(self.problem.source):
            return {}
        projection = MemoryProjection(
            base_bytes=psutil.Process().memory_info().rss,
            leaf_bytes=self.problem.plan.leaf_bytes,
            kernel_bytes=needed,
            num_threads=self._num_threads,
            cache_bytes=self._cache_bytes,
        )
        limit = psutil.virtual_memory().total
        projection.require_within(limit, math.prod(self.problem.plan.leaf_shape))
        return {"projected_bytes": projection.total_bytes, "limit_bytes": limit}

    def close(self) -> None:
        self._home.reader.retain([])


def _num_cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_in_memory(source: Source) -> bool:
    """Whether all columns are arrays of this process."""
    return isinstance(source, GridSource) and all(
        column.is_in_memory for column in source.columns.values()
    )


def kernel_bytes(home: ProblemHome) -> int:
    """What XLA says that the sums of one leaf need beside their arguments, all slabs together."""
    problem, num_shards = home.problem, home.problem.plan.num_shards
    slab = abstract(slab_shape(tuple(problem.source.chunk_shape), num_shards))
    chunk = Chunk(
        x=tuple(slab for _ in problem.source.variables),
        y=slab,
        extent=abstract((len(slab.shape),), np.int64),
    )
    n, k = problem.space.size, problem.space.num_free
    terms = RowTerms(fill=abstract((len(problem.source.variables),)), f_scale=abstract(()))
    params = abstract((n,))
    kernels: list[tuple[Any, tuple[Any, ...]]] = [
        (home.kernels.normal_equations, (params, abstract((n, k)), terms, chunk))
    ]
    if problem.plan.is_matrix_free:
        kernels = [
            (home.reverse.gradient, (params, terms, chunk)),
            (home.reverse.products, (params, abstract((_MOST_VECTORS, n)), terms, chunk)),
        ]
    known = home.kernels.temporary_bytes
    for kernel, arguments in kernels:
        shapes = shapes_of(arguments)
        if shapes not in known:
            known[shapes] = _temporary_bytes(kernel, arguments)
    copied = problem.plan.leaf_bytes if num_shards > 1 else 0
    return num_shards * max(known[shapes_of(arguments)] for _, arguments in kernels) + copied


def _temporary_bytes(kernel: Any, arguments: tuple[Any, ...]) -> int:
    with jax.enable_x64(True):
        analysis = kernel.lower(*arguments, precision="float64").compile().memory_analysis()
    if analysis is None:  # a backend that does not say
        return 0
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
