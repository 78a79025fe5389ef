"""Passes in this process, one range of leaves for each thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any, TypeVar

import psutil

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.evaluate.base import Pass, RangeReport, Request, fold_reports
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.evaluate.marks import fold_marks
from nlsq_dask.evaluate.reading import accelerator, projected_memory
from nlsq_dask.evaluate.tree import split_leaves
from nlsq_dask.machine import available_memory, num_cpus, total_memory
from nlsq_dask.problem import Problem
from nlsq_dask.progress import LogProgress, OnLeaves, Progress, over
from nlsq_dask.sources.base import Chunk
from nlsq_dask.sources.grid import is_in_memory

__all__ = ["CACHE_SHARE", "LocalEvaluator"]

_Value = TypeVar("_Value")

CACHE_SHARE = 0.4  # of a process's memory limit, at most


class LocalEvaluator:
    """Passes in this process, by threads. Chunks stay cached where they came from a store."""

    def __init__(
        self,
        problem: Problem,
        config: HybridStreamingConfig | None = None,
        *,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        config = HybridStreamingConfig() if config is None else config
        self._num_threads = num_threads or num_cpus()
        self._progress = LogProgress() if progress is None else progress
        self._num_passes = 0
        cache_bytes, prefetch = config.cache_bytes, config.prefetch
        if is_in_memory(problem.source):
            cache_bytes = 0
            # Each leaf is at hand: a thread that copied the next would be in the way of those
            # that compute. To an accelerator it has yet to be moved.
            prefetch = prefetch and accelerator() is not None
        elif cache_bytes is None:
            cache_bytes = int(CACHE_SHARE * available_memory())
        self._cache_bytes = cache_bytes
        self._precision = config.precision
        self._home = ProblemHome(
            problem=problem,
            cache_bytes=cache_bytes,
            keeps_on_device=config.cache_bytes != 0,
            prefetch=prefetch,
            may_retry=config.enable_fault_tolerance,
        )

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
        self._num_passes += 1
        num_leaves = self.problem.source.num_chunks
        ranges = split_leaves(num_leaves, self._num_threads)
        title, num_rows = f"pass {self._num_passes}", self.problem.source.num_rows
        with over(self._progress, title, num_rows, num_leaves) as on_leaf:
            reports = self._reduce(ranges, request, on_leaf)
        sums, bins = fold_reports(reports, num_leaves)
        return Pass(
            sums=sums,
            bins=bins,
            bytes_read=sum(report.bytes_read for report in reports),
            seconds=time.perf_counter() - start,
            reports=tuple(reports),
            marks=fold_marks((report.marks for report in reports), num_leaves),
        )

    def _reduce(
        self, ranges: Sequence[range], request: Request, on_leaf: OnLeaves
    ) -> list[RangeReport]:
        if len(ranges) == 1:
            return [self._home.reduce(ranges[0], request, on_leaf=on_leaf)]

        def reduce(leaves: range) -> RangeReport:
            return self._home.reduce(leaves, request, on_leaf=on_leaf)

        with (
            ThreadPoolExecutor(len(ranges), thread_name_prefix="nlsq-pass") as threads,
            ExitStack() as at_error,
        ):
            at_error.callback(self._home.is_stopped.set)  # nobody waits for the other threads
            each = [threads.submit(reduce, leaves) for leaves in ranges]
            ended, _ = wait(each, return_when=FIRST_EXCEPTION)
            reports = [future.result() for future in each if future in ended]
            at_error.pop_all()
        return reports

    def map_chunks(
        self, function: Callable[[int, Chunk], _Value], indices: Sequence[int]
    ) -> list[_Value]:
        """``[function(i, chunk_i), …]``."""
        source = self.problem.source
        num_rows = round(source.num_rows * len(indices) / source.num_chunks)
        with over(self._progress, "sample", num_rows, len(indices)) as on_leaf:

            def apply(index: int) -> _Value:
                value = function(index, self._home.host_leaf(index))
                on_leaf(1)
                return value

            num_threads = max(self._num_threads, self._home.reader.num_ahead)
            threads = ThreadPoolExecutor(num_threads, thread_name_prefix="nlsq-map")
            try:
                return list(threads.map(apply, indices))
            finally:  # after an error or an interrupt, no further chunk is begun
                threads.shutdown(cancel_futures=True)

    def memory(self) -> dict[str, Any]:
        """Projected and available bytes; none are projected where the data are here already."""
        base_bytes = psutil.Process().memory_info().rss  # before it compiles
        # What is compiled here the first pass finds ready.
        needed = self._home.prepare(self._precision, self._home.leaf(0))
        if is_in_memory(self.problem.source):
            return {}
        return projected_memory(
            self.problem,
            total_memory(),
            base_bytes=base_bytes,
            kernel_bytes=needed,
            num_threads=self._num_threads,
            cache_bytes=self._cache_bytes,
        )

    def log_event(self, event: Mapping[str, Any]) -> None:
        """Nobody collects events in this process beside the log."""

    def close(self) -> None:
        self._home.reader.retain([])
