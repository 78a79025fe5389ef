"""Passes on a Dask cluster: a few coarse tasks for each worker, summed by leaf index.

Sources that are stores are read where they are computed on, without a graph in between. Blocks
of Dask arrays are kept in the workers' memory where they fit and arrive as dependencies;
where they do not fit, each is loaded and reduced by one task, and let go.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import cloudpickle
import dask
import dask.array as da
import distributed
import numpy as np
import psutil

from nlsq_dask.by_value import pickled_by_value
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import WorkerError
from nlsq_dask.evaluate.base import Pass, RangeReport, Request, fold_reports
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.evaluate.local import CACHE_SHARE, kernel_bytes
from nlsq_dask.evaluate.ownership import Ownership
from nlsq_dask.evaluate.tree import bin_level, split_leaves
from nlsq_dask.evaluate.worker import (
    JAXLIB_VERSION,
    BlockTask,
    HomeSpec,
    ProcessSettings,
    compile_ahead,
    forget_home,
    map_chunk,
    merge_reports,
    platform_of_worker,
    probe_worker,
    reduce_range,
    same_spec,
)
from nlsq_dask.plan import MemoryProjection
from nlsq_dask.problem import Problem
from nlsq_dask.sources.base import Chunk
from nlsq_dask.sources.dask import DaskColumn
from nlsq_dask.sources.grid import GridSource, RemoteColumn

__all__ = ["ClusterEvaluator", "platform_of", "workers_of"]

_Value = TypeVar("_Value")

_ROWS_PER_TASK = 2**23  # a quarter of a second of work or more
_TASKS_PER_THREAD = 4
_MAX_SHIPPED_BYTES = 2**16  # larger arrays travel as blocks, not inside each task
_PERSIST_SHARE = 0.4  # of the workers' memory
_WORKER_WAIT_SECONDS = 60.0


class ClusterEvaluator:
    """Passes on the workers of a `distributed.Client`."""

    def __init__(
        self, problem: Problem, config: HybridStreamingConfig, client: distributed.Client
    ) -> None:
        self._client = client
        self._config = config
        self._problem = problem
        self._token = uuid.uuid4().hex[:12]
        self._num_passes = 0
        self._prepared: list[Any] = []
        self._retries = config.max_retries_per_batch if config.enable_fault_tolerance else 0
        workers = workers_of(client)
        self._memory_limit = min((w["memory_limit"] or 0 for w in workers.values()), default=0)
        self._num_threads = max(w["nthreads"] for w in workers.values())
        num_slots = sum(w["nthreads"] for w in workers.values())
        # As many for every thread: one more than that, and a pass waits for its second round.
        rounds = problem.source.num_rows // (_ROWS_PER_TASK * num_slots)
        num_tasks = num_slots * min(max(rounds, 1), _TASKS_PER_THREAD)
        self._ownership = Ownership(split_leaves(problem.source.num_chunks, num_tasks))
        self._blocks = _remote_arrays(problem.source)
        room = sum(w["memory_limit"] or psutil.virtual_memory().total for w in workers.values())
        self._fits = self._blocks_bytes <= _PERSIST_SHARE * room
        self._is_persisted = False
        self._cache_bytes = self._choose_cache_bytes(len(workers))
        with contextlib.ExitStack() as undo:
            client.register_plugin(ProcessSettings(self._token), name=self._plugin_name)
            self._send_problem()
            undo.callback(self.close)
            self._probes = self._probe_workers()
            if self._blocks and self._fits:
                self._persist()
            undo.pop_all()

    @property
    def _plugin_name(self) -> str:
        return f"nlsq-settings-{self._token}"

    @property
    def description(self) -> str:
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        how = "store read by the workers"
        if self._blocks:
            how = "Dask blocks kept by the workers"
            if self._reads_columns:
                how = "store read by the workers, beside Dask blocks that they keep"
            if not self._is_persisted:
                how = "Dask blocks computed in every pass: they exceed the workers' memory"
        return f"cluster of {len(workers)} worker(s), {how}"

    @property
    def keeps_rows(self) -> bool:
        return self._is_persisted and not self._reads_columns

    def _send_problem(self) -> None:
        """Ship the problem once to each worker, as a task: a lost copy is made again."""
        problem = self._problem
        if self._blocks:
            assert isinstance(problem.source, GridSource)
            columns = problem.source.columns
            remote = {
                role: RemoteColumn(
                    dims=columns[role].dims, shape=columns[role].shape, dtype=columns[role].dtype
                )
                for role in self._blocks
            }
            problem = replace(problem, source=problem.source.with_columns(remote))
        with contextlib.ExitStack() as by_value:
            for own in (problem.model.function, problem.model.jac, type(problem.source)):
                by_value.enter_context(pickled_by_value(own))
            home = HomeSpec(
                token=self._token,
                payload=cloudpickle.dumps(problem),
                cache_bytes=self._cache_bytes,
                prefetch=self._config.prefetch,
                precision=self._config.precision,
                compilation_cache_dir=self._config.compilation_cache_dir,
            )
        self._spec = home
        self._home = self._client.submit(
            same_spec, home, key=f"nlsq-problem-{home.token}", pure=False, retries=2
        )

    def _choose_cache_bytes(self, num_workers: int) -> int:
        """Of decoded chunks, in each worker: what the blocks that Dask holds there leave."""
        if not self._fits or (self._blocks and not self._reads_columns):
            return 0
        if self._config.cache_bytes is not None:
            return self._config.cache_bytes
        kept = self._blocks_bytes // num_workers
        return max(int(CACHE_SHARE * self._memory_limit) - kept, 0)

    @property
    def _reads_columns(self) -> bool:
        """Whether the workers read anything beside the blocks that come with their tasks."""
        source = self._problem.source
        return not isinstance(source, GridSource) or any(
            role not in self._blocks and not column.is_in_memory
            for role, column in source.columns.items()
        )

    # -- checks before the first pass

    def _probe_workers(self) -> dict[str, dict[str, Any]]:
        """See that every worker can do the work, before any is asked of it."""
        try:
            probes: dict[str, dict[str, Any]] = _run(self._client, probe_worker, self._spec)
        except OSError as error:
            raise WorkerError(
                f"`ds` must be readable from every worker, but one could not: "
                f"{type(error).__name__}: {error}"
            ) from error
        for address, probe in probes.items():
            if probe["jaxlib"] != JAXLIB_VERSION:
                raise WorkerError(
                    f"the workers must have the client's jaxlib, {JAXLIB_VERSION}, "
                    f"but {address} has {probe['jaxlib']}"
                )
        return probes

    def memory(self) -> dict[str, Any]:
        """Projected bytes of a worker process; refused if they exceed its limit.

        While the kernel is compiled here to be measured, the workers compile theirs.
        """
        if not self._blocks:
            self._prepared = [
                self._client.submit(
                    compile_ahead,
                    self._home,
                    key=f"nlsq-compile-{self._token}-{number}",
                    pure=False,
                    workers=[address],
                )
                for number, address in enumerate(workers_of(self._client))
            ]
        source = self._problem.source
        local = ProblemHome(problem=self._problem, cache_bytes=0, prefetch=False)
        kept = self._blocks_bytes if self._is_persisted else 0
        projection = MemoryProjection(
            base_bytes=max(probe["base_bytes"] for probe in self._probes.values()),
            leaf_bytes=self._problem.plan.leaf_bytes,
            kernel_bytes=kernel_bytes(local),
            num_threads=self._num_threads,
            cache_bytes=self._cache_bytes + kept // len(self._probes),
        )
        limit = self._memory_limit or None
        projection.require_within(limit, int(np.prod(source.chunk_shape)))
        return {"projected_bytes": projection.total_bytes, "limit_bytes": limit}

    # -- passes

    def evaluate(self, request: Request) -> Pass:
        """One pass over all rows, as ordinary tasks: Dask repeats what a lost worker held."""
        start = time.perf_counter()
        self._num_passes += 1
        futures = self._submit(request)
        try:
            reports: list[RangeReport] = self._gather(futures)
        finally:
            for future in futures:
                future.release()
        sums, bins = fold_reports(reports, self._problem.source.num_chunks)
        return Pass(
            sums=sums,
            bins=bins,
            bytes_read=self._bytes_read(reports),
            seconds=time.perf_counter() - start,
            reports=tuple(reports),
        )

    def _bytes_read(self, reports: Sequence[RangeReport]) -> int:
        if not self._is_persisted or self._reads_columns:
            return sum(report.bytes_read for report in reports)
        return self._blocks_bytes if self._num_passes == 1 else 0

    def _submit(self, request: Request) -> list[Any]:
        if self._blocks and not self._is_persisted:
            return self._submit_by_block(request)
        owners = self._owners()
        futures = []
        for leaves, owner in owners.items():
            futures.append(
                self._client.submit(
                    reduce_range,
                    self._home,
                    leaves,
                    request,
                    owner,
                    [other for other, its in owners.items() if its == owner],
                    self._futures_of(leaves) if self._blocks else None,
                    key=f"nlsq-pass-{self._num_passes}-{leaves.start}:{leaves.stop}-{self._token}",
                    pure=False,
                    retries=self._retries,
                    workers=[owner],
                    allow_other_workers=True,
                )
            )
        return futures

    def _owners(self) -> dict[range, str]:
        """Who owns which leaves now: workers come and go between passes."""
        workers = workers_of(self._client)
        return self._ownership.assign({address: w["nthreads"] for address, w in workers.items()})

    def _gather(self, futures: list[Any]) -> list[Any]:
        try:
            gathered: list[Any] = self._client.gather(futures)
        except distributed.KilledWorker as error:
            raise WorkerError(
                f"a task of the fit kept killing its worker: {error.task}; its leaves may be "
                "unreadable, or need more memory than a worker has"
            ) from error
        return gathered

    def map_chunks(
        self, function: Callable[[int, Chunk], _Value], indices: Sequence[int]
    ) -> list[_Value]:
        """``[function(i, chunk_i), …]``, computed by the workers."""
        label = f"nlsq-sample-{uuid.uuid4().hex[:8]}"
        if self._blocks:
            calls = [
                dask.delayed(map_chunk, pure=False)(
                    self._home, function, i, None, self._delayed_of(i), dask_key_name=f"{label}-{i}"
                )
                for i in indices
            ]
            return self._gather(self._client.compute(calls, retries=self._retries))
        owners = self._owners()
        futures = []
        for i in indices:
            owner = next(owner for leaves, owner in owners.items() if i in leaves)
            futures.append(
                self._client.submit(
                    map_chunk,
                    self._home,
                    function,
                    i,
                    owner,
                    None,
                    key=f"{label}-{i}",
                    pure=False,
                    retries=self._retries,
                    workers=[owner],
                    allow_other_workers=True,
                )
            )
        return self._gather(futures)

    def close(self) -> None:
        """Leave nothing behind: neither tasks nor chunks nor the plugin."""
        for future in (*self._prepared, self._home):
            future.release()
        with contextlib.suppress(OSError):
            self._client.run(forget_home, self._token)
        self._blocks = {}
        with contextlib.suppress(OSError, ValueError):
            self._client.unregister_worker_plugin(self._plugin_name)

    # -- blocks of Dask arrays

    @property
    def _blocks_bytes(self) -> int:
        return sum(int(array.nbytes) for array in self._blocks.values())

    def _persist(self) -> None:
        # Arrays of the client's own travel in the graph, where the scheduler can make a lost
        # block again; scattered ones could not be.
        quiet = dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"})
        with quiet, self._client.as_current():
            kept = self._client.persist(list(self._blocks.values()))
            distributed.wait(kept)
        self._blocks = dict(zip(self._blocks, kept, strict=True))
        self._futures = {future.key: future for future in distributed.futures_of(kept)}
        self._is_persisted = True

    def _block_keys(self, leaf: int) -> dict[str, tuple[Any, ...]]:
        source = self._problem.source
        assert isinstance(source, GridSource)
        position = dict(zip(source.dims, np.unravel_index(leaf, source.grid), strict=True))
        return {
            role: (array.name, *(int(position[dim]) for dim in source.columns[role].dims))
            for role, array in self._blocks.items()
        }

    def _futures_of(self, leaves: range) -> dict[int, dict[str, Any]]:
        return {
            leaf: {role: self._futures[key] for role, key in self._block_keys(leaf).items()}
            for leaf in leaves
        }

    def _delayed_of(self, leaf: int) -> dict[str, Any]:
        return {
            role: self._blocks[role].blocks[tuple(key[1:])].to_delayed().ravel()[0]
            for role, key in self._block_keys(leaf).items()
        }

    def _submit_by_block(self, request: Request) -> list[Any]:
        """One kernel task for each leaf, fused with the loading of its blocks."""
        source = self._problem.source
        assert isinstance(source, GridSource)
        number = da.from_array(
            np.arange(source.num_chunks).reshape(source.grid), chunks=1, name=False
        )
        pairs: list[Any] = [number, source.dims]
        for role, array in self._blocks.items():
            pairs += [array, source.columns[role].dims]
        reduced = da.blockwise(
            BlockTask(spec=self._spec, roles=tuple(self._blocks), request=request),
            source.dims,
            *pairs,
            align_arrays=False,
            adjust_chunks=dict.fromkeys(source.dims, 1),
            dtype=object,
            meta=np.empty((0,) * len(source.dims), object),
            name=f"nlsq-pass-{self._num_passes}-{uuid.uuid4().hex[:8]}",
        )
        reports = reduced.to_delayed().ravel()
        merged = [
            dask.delayed(merge_reports, pure=False)(
                [reports[leaf] for leaf in leaves], bin_level(source.num_chunks)
            )
            for leaves in self._ownership.ranges
        ]
        futures: list[Any] = self._client.compute(merged, retries=self._retries)
        return futures


def platform_of(client: distributed.Client) -> str:
    """The kind of device that the workers compute on: what they sum follows it to the bit.

    Raises
    ------
    WorkerError
        If they differ.
    """
    workers_of(client)
    platforms: dict[str, str] = _run(client, platform_of_worker)
    kinds = sorted(set(platforms.values()))
    if len(kinds) > 1:
        raise WorkerError(
            f"the workers must compute on one kind of device, but {platforms} are of {kinds}"
        )
    return kinds[0]


def _run(client: distributed.Client, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function once on every worker."""
    try:
        return client.run(function, *arguments)
    except ModuleNotFoundError as error:
        raise WorkerError(
            f"every worker must be able to import this package and what the model uses, "
            f"but one could not: {error}"
        ) from error


def workers_of(client: distributed.Client) -> dict[str, Any]:
    """The workers now, waiting a while for one where a nanny may be restarting it."""
    workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    if not workers:
        try:
            client.wait_for_workers(1, timeout=_WORKER_WAIT_SECONDS)
        except TimeoutError:
            raise WorkerError(
                f"`client` must have at least one worker, and had none for "
                f"{_WORKER_WAIT_SECONDS:.0f} seconds"
            ) from None
        workers = client.scheduler_info(n_workers=-1)["workers"]
    return workers


def _remote_arrays(source: Any) -> dict[str, Any]:
    """Columns that travel as blocks, cut like the leaves; by role. None for a store."""
    if not isinstance(source, GridSource):
        return {}
    columns = source.columns
    leaf = dict(zip(source.dims, source.leaf_shape, strict=True))
    remote = {}
    for role, column in columns.items():
        chunks = tuple(leaf[dim] for dim in column.dims)
        if isinstance(column, DaskColumn):
            array = column.array
        elif column.is_in_memory and _nbytes(column) > _MAX_SHIPPED_BYTES:
            array = da.from_array(column.read((slice(None),) * len(column.shape)), chunks=chunks)
        else:
            continue
        remote[role] = array.rechunk(chunks)
    return remote


def _nbytes(column: Any) -> int:
    return int(np.prod(column.shape)) * int(column.dtype.itemsize)
