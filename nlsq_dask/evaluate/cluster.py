"""Passes on a Dask cluster: a few coarse tasks for each worker, summed by leaf index.

Sources that are stores are read where they are computed on, without a graph in between. Blocks
of Dask arrays are kept in the workers' memory where they fit and arrive as dependencies;
where they do not fit, each is loaded and reduced by one task, and let go.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any, TypeVar

import cloudpickle
import dask
import distributed

from nlsq_dask.by_value import pickled_by_value
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import StoreDamagedError, StoreLockedError, WorkerError
from nlsq_dask.evaluate.autopsy import find_deadly, spans_of
from nlsq_dask.evaluate.base import Pass, RangeReport, Request, fold_reports
from nlsq_dask.evaluate.blocks import DaskBlocks, least_sent
from nlsq_dask.evaluate.departure import end_with_client
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.evaluate.local import CACHE_SHARE
from nlsq_dask.evaluate.marks import fold_marks
from nlsq_dask.evaluate.ownership import Ownership
from nlsq_dask.evaluate.reading import projected_memory
from nlsq_dask.evaluate.touch import in_touch, is_in_touch
from nlsq_dask.evaluate.waiting import gather_all, wait_for_all
from nlsq_dask.evaluate.worker import (
    HomeSpec,
    ProcessSettings,
    compile_ahead,
    forget_home,
    map_blocks,
    map_chunks,
    probe_worker,
    reduce_range,
    same_spec,
)
from nlsq_dask.evaluate.workers import ask_all, memory_of, register_on_all, workers_of
from nlsq_dask.problem import Problem
from nlsq_dask.progress import LogProgress, OnLeaves, Progress, over
from nlsq_dask.sources.base import Chunk

__all__ = ["EVENTS_TOPIC", "ClusterEvaluator"]

_Value = TypeVar("_Value")

EVENTS_TOPIC = "nlsq_dask"
_ROWS_PER_TASK = 2**23  # a quarter of a second of work or more
_TASKS_PER_THREAD = 4
_PERSIST_SHARE = 0.4  # of the workers' memory


class ClusterEvaluator:
    """Passes on the workers of a `distributed.Client`."""

    def __init__(
        self,
        problem: Problem,
        config: HybridStreamingConfig,
        client: distributed.Client,
        progress: Progress | None = None,
    ) -> None:
        self._client = client
        self._config = config
        self._problem = problem = replace(problem, source=least_sent(problem.source))
        self._progress = LogProgress() if progress is None else progress
        self._token = uuid.uuid4().hex[:12]
        self._num_passes = 0
        self._retries = config.max_retries_per_batch if config.enable_fault_tolerance else 0
        workers = workers_of(client)
        limits = [w["memory_limit"] for w in workers.values() if w["memory_limit"]]
        self._memory_limit: int | None = min(limits, default=None)
        self._num_threads = max(w["nthreads"] for w in workers.values())
        self._num_workers = len(workers)
        self._ownership = Ownership(problem.source.num_chunks)
        self._blocks = DaskBlocks(problem)
        memory = memory_of(client, workers)
        self._fits = self._blocks.nbytes <= _PERSIST_SHARE * sum(memory)
        self._cache_bytes = self._choose_cache_bytes(memory)
        self._home: Any = None
        self._compiling: list[Any] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            with in_touch(client):
                end_with_client(client, self._plugin_name)
            register_on_all(client, ProcessSettings(self._token), self._plugin_name)
            self._send_problem()
            self._probes = self._probe_workers()
            if self._blocks and self._fits:
                with in_touch(client):
                    self._blocks.persist(client)
            undo.pop_all()

    @property
    def _plugin_name(self) -> str:
        return f"nlsq-settings-{self._token}"

    @property
    def description(self) -> str:
        how = "store read by the workers"
        if self._blocks:
            how = "Dask blocks kept by the workers"
            if not self._blocks.are_all_columns:
                how = "store read by the workers, beside Dask blocks that they keep"
            if not self._blocks.is_persisted:
                how = "Dask blocks computed in every pass: they exceed the workers' memory"
        return f"cluster of {self._num_workers} worker(s), {how}"

    @property
    def keeps_rows(self) -> bool:
        return self._blocks.is_persisted and self._blocks.are_all_columns

    def _send_problem(self) -> None:
        """Ship the problem once to each worker, as a task: a lost copy is made again."""
        problem = self._blocks.cut_from(self._problem)
        with contextlib.ExitStack() as by_value:
            for own in (problem.model.function, problem.model.jac, type(problem.source)):
                by_value.enter_context(pickled_by_value(own))
            payload = cloudpickle.dumps(problem)
        self._spec = HomeSpec(
            token=self._token,
            payload=payload,
            cache_bytes=self._cache_bytes,
            keeps_on_device=self._config.cache_bytes != 0,
            prefetch=self._config.prefetch,
            may_retry=self._config.enable_fault_tolerance,
            precision=self._config.precision,
            compilation_cache_dir=self._config.compilation_cache_dir,
        )
        key = f"nlsq-problem-{self._token}"
        with in_touch(self._client):
            self._home = self._client.submit(same_spec, self._spec, key=key, pure=False, retries=2)

    def _choose_cache_bytes(self, memory: Sequence[int]) -> int:
        """Of decoded chunks, in each worker: what the blocks that Dask holds there leave."""
        if not self._fits or (self._blocks and self._blocks.are_all_columns):
            return 0
        if self._config.cache_bytes is not None:
            return self._config.cache_bytes
        kept = self._blocks.nbytes // len(memory)
        return max(int(CACHE_SHARE * min(memory)) - kept, 0)

    # -- before the first pass

    def _probe_workers(self) -> dict[str, dict[str, Any]]:
        """See that every worker can do the work, before any is asked of it."""
        probes = ask_all(self._client, probe_worker, self._spec)
        for address, probe in probes.items():
            if isinstance(probe, StoreDamagedError | StoreLockedError):  # on whatever machine
                raise probe
            if isinstance(probe, OSError):
                raise WorkerError(
                    f"`ds` must be readable from every worker, but one could not, {address}: "
                    f"{type(probe).__name__}: {probe}"
                ) from probe
            if isinstance(probe, Exception):
                raise probe
        return probes

    def memory(self) -> dict[str, Any]:
        """Projected bytes of a worker process; refused if they exceed its limit."""
        kept = self._blocks.nbytes if self._blocks.is_persisted else 0
        return projected_memory(
            self._problem,
            self._memory_limit,
            base_bytes=max(probe["base_bytes"] for probe in self._probes.values()),
            kernel_bytes=self._compile_ahead(),
            num_threads=self._num_threads,
            cache_bytes=self._cache_bytes + kept // len(self._probes),
        )

    def _compile_ahead(self) -> int:
        """Bytes that XLA needs for a leaf, from the workers, which compile the kernel to say so.

        They have nothing to compile for where a leaf comes in Dask's blocks.
        """
        if self._blocks:
            home = ProblemHome(problem=self._problem, cache_bytes=0, prefetch=False)
            return home.prepare(self._config.precision)
        self._begin_compiling(self._owners())
        futures, self._compiling = self._compiling, []
        needed: list[int] = self._gather(futures, [range(1)] * len(futures))
        return max(needed)

    def _begin_compiling(self, owners: Mapping[range, str]) -> None:
        """On each worker, when it has nothing else to do, with a leaf that it has at hand."""
        if self._blocks or self._compiling:
            return
        at_hand: dict[str, int] = {}
        for leaves, owner in owners.items():
            at_hand.setdefault(owner, leaves.start)
        self._compiling = [
            self._submit(
                compile_ahead,
                self._home,
                at_hand.get(address, 0),
                key=f"nlsq-compile-{i}",
                owner=address,
                priority=-1,
            )
            for i, address in enumerate(workers_of(self._client))
        ]

    # -- passes

    def evaluate(self, request: Request) -> Pass:
        """One pass over all rows, as ordinary tasks: Dask repeats what a lost worker held."""
        start = time.perf_counter()
        self._num_passes += 1
        source = self._problem.source
        title = f"pass {self._num_passes}"
        with over(self._progress, title, source.num_rows, source.num_chunks) as on_leaves:
            owners = self._owners()
            reports: list[RangeReport] = self._gather(
                self._submit_pass(request, owners), list(owners), on_leaves
            )
        sums, bins = fold_reports(reports, source.num_chunks)
        return Pass(
            sums=sums,
            bins=bins,
            bytes_read=self._bytes_read(reports),
            seconds=time.perf_counter() - start,
            reports=tuple(reports),
            marks=fold_marks((report.marks for report in reports), source.num_chunks),
        )

    def _bytes_read(self, reports: Sequence[RangeReport]) -> int:
        if not self.keeps_rows:
            return sum(report.bytes_read for report in reports)
        return self._blocks.nbytes if self._num_passes == 1 else 0

    def _submit_pass(self, request: Request, owners: Mapping[range, str]) -> list[Any]:
        """A future for each range of leaves, in their order."""
        if self._blocks and not self._blocks.is_persisted:
            name = f"nlsq-pass-{self._num_passes}-{uuid.uuid4().hex[:8]}"
            merged = self._blocks.reduction(self._spec, request, list(owners), name)
            return self._compute(merged)
        return [
            self._submit(
                reduce_range,
                self._home,
                leaves,
                request,
                owner,
                [other for other, its in owners.items() if its == owner],
                self._blocks.futures_of(leaves) if self._blocks else None,
                key=f"nlsq-pass-{self._num_passes}-{leaves.start}:{leaves.stop}",
                owner=owner,
            )
            for leaves, owner in owners.items()
        ]

    def _owners(self) -> dict[range, str]:
        """Who owns which leaves now: workers come and go between passes."""
        threads = {address: w["nthreads"] for address, w in workers_of(self._client).items()}
        num_slots, self._num_workers = sum(threads.values()), len(threads)
        # As many for every thread: one more than that, and a pass waits for its second round.
        rounds = self._problem.source.num_rows // (_ROWS_PER_TASK * num_slots)
        self._ownership.refine(num_slots * min(max(rounds, 1), _TASKS_PER_THREAD))
        return self._ownership.assign(threads)

    def map_chunks(
        self, function: Callable[[int, Chunk], _Value], indices: Sequence[int]
    ) -> list[_Value]:
        """``[function(i, chunk_i), …]``, computed by the workers."""
        source = self._problem.source
        num_rows = round(source.num_rows * len(indices) / source.num_chunks)
        owners = self._owners()
        groups = [[i] for i in indices] if self._blocks else _by_owner(indices, owners)
        with over(self._progress, "sample", num_rows, len(indices)) as on_leaves:
            futures = self._submit_map(function, groups, owners)
            self._begin_compiling(owners)  # while this process puts the sample together
            each = self._gather(futures, groups, on_leaves)
        values = {
            index: value
            for group, mapped in zip(groups, each, strict=True)
            for index, value in zip(group, mapped, strict=True)
        }
        return [values[index] for index in indices]

    def _submit_map(
        self,
        function: Callable[[int, Chunk], _Value],
        groups: Sequence[Sequence[int]],
        owners: Mapping[range, str],
    ) -> list[Any]:
        label = f"nlsq-sample-{uuid.uuid4().hex[:8]}"
        if self._blocks:
            calls = [
                dask.delayed(map_blocks, pure=False)(
                    self._home,
                    function,
                    index,
                    self._blocks.delayed_of(index),
                    dask_key_name=f"{label}-{index}",
                )
                for (index,) in groups
            ]
            return self._compute(calls)
        owner_of = {i: owner for leaves, owner in owners.items() for i in leaves}
        return [
            self._submit(
                map_chunks,
                self._home,
                function,
                group,
                owner_of[group[0]],
                key=f"{label}-{group[0]}",
                owner=owner_of[group[0]],
            )
            for group in groups
        ]

    # -- tasks

    def _submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        key: str,
        owner: str,
        priority: int = 0,
    ) -> Any:
        """A task for its owner, or whoever is left when that is gone."""
        with in_touch(self._client):
            return self._client.submit(
                function,
                *arguments,
                key=f"{key}-{self._token}",
                pure=False,
                retries=self._retries,
                workers=[owner],
                allow_other_workers=True,
                priority=priority,
            )

    def _compute(self, graph: Sequence[Any]) -> list[Any]:
        with in_touch(self._client):
            futures: list[Any] = self._client.compute(graph, retries=self._retries)
            return futures

    def _gather(
        self,
        futures: Sequence[Any],
        leaves: Sequence[Sequence[int]],
        on_leaves: OnLeaves = lambda _: None,
    ) -> list[Any]:
        """Their results; as each comes in, `on_leaves` hears how many leaves it was of.

        Whatever ends the wait early, an interrupt too, ends the tasks.

        Raises
        ------
        WorkerError
            If the tasks cannot be done: they kill their workers, or none is left, or the
            scheduler is.
        """
        counts = dict(zip(futures, map(len, leaves), strict=True))
        with contextlib.ExitStack() as at_error:
            at_error.callback(self._stop, futures)
            wait_for_all(self._client, counts, on_leaves)
            try:
                gathered = gather_all(self._client, futures)
            except distributed.KilledWorker as error:
                died = [i for i, future in enumerate(futures) if future.status == "error"]
                raise self._killed(error, futures, [leaves[i] for i in died]) from error
            except CancelledError as error:
                raise WorkerError(
                    f"the tasks of a fit must be left to it, and were cancelled: {error}"
                ) from error
            at_error.pop_all()
        for future in futures:
            future.release()
        return gathered

    def _killed(
        self,
        error: distributed.KilledWorker,
        futures: Sequence[Any],
        leaves: Sequence[Sequence[int]],
    ) -> WorkerError:
        """What to say of tasks that were blamed for dead workers."""
        suspects = sorted({leaf for its in leaves for leaf in its})
        self._stop(futures)  # or the question would wait behind them
        deadly = None if self._blocks else find_deadly(self._client, self._spec, suspects)
        where = f"{spans_of(suspects)} of {self._problem.description}"
        if deadly is not None:
            where = f"chunk {deadly} of {self._problem.description}, which only to read is deadly"
        return WorkerError(
            f"a task of the fit kept killing its worker, at last {error.last_worker.address}, at "
            f"{where}; its leaves may be damaged, or need more memory than a worker has: see the "
            "workers' logs"
        )

    def _stop(self, futures: Sequence[Any]) -> None:
        """Cancel what waits, and have what runs end after its leaf: no thread can be stopped."""
        if not is_in_touch(self._client):
            return
        with contextlib.suppress(WorkerError), in_touch(self._client):
            self._client.cancel(list(futures), force=True)
            self._client.run(forget_home, self._token, on_error="ignore")

    def log_event(self, event: Mapping[str, Any]) -> None:
        """To the scheduler, under the topic ``nlsq_dask``: `Client.get_events` has them."""
        # Of a scheduler that is lost hears the next pass, if there is one.
        with contextlib.suppress(WorkerError), in_touch(self._client):
            self._client.log_event(EVENTS_TOPIC, dict(event))

    def close(self) -> None:
        """Leave nothing behind: neither tasks nor chunks nor plugins."""
        for future in (*self._compiling, *filter(None, [self._home])):
            future.release()
        self._blocks.release()
        if not is_in_touch(self._client):
            return  # to the scheduler, if there is one, the client is gone: it does the same
        client = self._client
        with contextlib.suppress(WorkerError), in_touch(client):
            client.run(forget_home, self._token, on_error="ignore")
            for unregister in (client.unregister_scheduler_plugin, client.unregister_worker_plugin):
                with contextlib.suppress(ValueError):  # it was not registered yet
                    unregister(self._plugin_name)


def _by_owner(indices: Sequence[int], owners: Mapping[range, str]) -> list[list[int]]:
    """In groups of one owner each: within a task, chunks are read ahead."""
    groups = []
    for leaves in owners:
        wanted = [i for i in indices if i in leaves]
        size = max(1, -(-len(wanted) // _TASKS_PER_THREAD))
        groups += [wanted[i : i + size] for i in range(0, len(wanted), size)]
    return groups
