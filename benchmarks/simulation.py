"""A cluster of simulated workers: a real scheduler and real workers, whose tasks sleep.

Client, scheduler, workers and what they say to each other are Dask's and this package's own.
Only the body of a task of a pass is replaced: it sleeps as long as its rows would take, and
returns sums of the size that they would have. Many workers share a process, one thread each.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
import psutil

from nlsq_dask.evaluate import worker as tasks
from nlsq_dask.evaluate.base import RangeReport, Request
from nlsq_dask.evaluate.tree import bin_level, bin_of, sum_range
from nlsq_dask.normal_equations import NormalEquations, RowStatistics, Sums

__all__ = ["Effort", "SimulatedCluster", "Speed", "make_report"]

_SPAWN = multiprocessing.get_context("spawn")
_STARTED_AT_ONCE = 25
_WAIT_SECONDS = 300.0
# What a worker does for itself every few milliseconds: a thousand would do it on this machine.
_QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.interval": "60s",
    "distributed.admin.tick.interval": "10s",
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.memory.monitor-interval": "60s",
}


class Speed:
    """How long a leaf takes, shared by all processes: zero while the cluster warms up."""

    def __init__(self) -> None:
        self._value = _SPAWN.Value("d", 0.0, lock=False)

    @property
    def seconds_per_leaf(self) -> float:
        return float(self._value.value)

    @seconds_per_leaf.setter
    def seconds_per_leaf(self, seconds: float) -> None:
        self._value.value = seconds


@functools.lru_cache(maxsize=65536)
def make_report(leaves: range, num_leaves: int, n: int) -> RangeReport:
    """What a task returns for these leaves, in size and shape; made once."""
    sums = Sums(
        normal=NormalEquations(
            gram=np.eye(n), grad=np.ones(n), cost=np.float64(1.0), num_rows=np.int64(1)
        ),
        rows=RowStatistics(
            num_masked=np.int64(0),
            num_invalid=np.int64(0),
            num_bad_sigma=np.int64(0),
            num_stray=np.int64(0),
            residual_sum=np.float64(0.0),
            residual_square=np.float64(1.0),
        ),
    )
    nodes, bins = sum_range(((leaf, sums) for leaf in leaves), bin_level(num_leaves), bin_of)
    return RangeReport(
        nodes=nodes,
        bins=bins,
        bytes_read=0,
        read_seconds=0.0,
        busy_seconds=0.0,
        num_compilations=0,
        peak_memory_bytes=0,
        process=str(os.getpid()),
    )


def sleeping_range(
    speed: Speed, spec: tasks.HomeSpec, leaves: range, request: Request, *_: Any, **__: Any
) -> RangeReport:
    """In place of `reduce_range`."""
    end = time.perf_counter() + speed.seconds_per_leaf * len(leaves)
    num_leaves = tasks.home_of(spec).problem.source.num_chunks
    report = make_report(leaves, num_leaves, len(request.params))
    time.sleep(max(0.0, end - time.perf_counter()))
    return report


def count_messages(counts: Any) -> None:
    """Count what this process writes to others: messages and bytes."""
    from distributed.comm.tcp import TCP

    write = TCP.write

    async def counted(self: Any, *arguments: Any, **options: Any) -> int:
        num_bytes: int = await write(self, *arguments, **options)
        counts[0] += 1
        counts[1] += num_bytes
        return num_bytes

    TCP.write = counted


def raise_file_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run_scheduler(counts: Any, address: Any) -> None:
    from distributed import Scheduler

    async def serve() -> None:
        async with Scheduler(
            host="127.0.0.1", port=0, dashboard=False, dashboard_address="127.0.0.1:0"
        ) as scheduler:
            address.put(scheduler.address)
            await scheduler.finished()

    raise_file_limit()
    count_messages(counts)
    logging.disable(logging.CRITICAL)
    asyncio.run(serve())


def run_workers(counts: Any, address: str, num_workers: int, speed: Speed) -> None:
    from distributed import Worker

    async def serve(folder: str) -> None:
        started: list[Worker] = []
        for first in range(0, num_workers, _STARTED_AT_ONCE):
            batch = [
                Worker(
                    address,
                    nthreads=1,
                    memory_limit=0,
                    host="127.0.0.1",
                    dashboard=False,
                    dashboard_address="127.0.0.1:0",
                    local_directory=folder,
                )
                for _ in range(first, min(first + _STARTED_AT_ONCE, num_workers))
            ]
            started += await asyncio.gather(*batch)
        await asyncio.gather(*(worker.finished() for worker in started))

    raise_file_limit()
    count_messages(counts)
    logging.disable(logging.CRITICAL)
    tasks.reduce_range = functools.partial(sleeping_range, speed)
    with dask.config.set(_QUIET), tempfile.TemporaryDirectory() as folder:
        asyncio.run(serve(folder))


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What the processes of the cluster have used so far."""

    client_seconds: float
    scheduler_seconds: float
    workers_seconds: float
    scheduler_messages: int
    scheduler_bytes: int
    workers_messages: int
    workers_bytes: int
    client_messages: int
    client_bytes: int

    def since(self, before: Effort) -> Effort:
        return Effort(**{k: v - vars(before)[k] for k, v in vars(self).items()})


class SimulatedCluster:
    """A scheduler in a process, and workers in a few. All are gone when the block ends."""

    def __init__(self, num_workers: int, workers_per_process: int, client_counts: Any) -> None:
        self.num_workers = num_workers
        self.speed = Speed()
        self._per_process = workers_per_process
        self._client_counts = client_counts
        self._processes: list[Any] = []
        self._counts: list[Any] = []

    def __enter__(self) -> SimulatedCluster:
        addresses = _SPAWN.Queue()
        self._start(run_scheduler, addresses)
        try:
            self.address: str = addresses.get(timeout=_WAIT_SECONDS)
            for first in range(0, self.num_workers, self._per_process):
                size = min(self._per_process, self.num_workers - first)
                self._start(run_workers, self.address, size, self.speed)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, role: Any, *arguments: Any) -> None:
        counts = _SPAWN.Array("q", 2, lock=False)
        process = _SPAWN.Process(target=role, args=(counts, *arguments), daemon=True)
        process.start()
        self._counts.append(counts)
        self._processes.append(process)

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._processes):
            process.kill()
        for process in self._processes:
            process.join()

    @property
    def effort(self) -> Effort:
        used = [cpu_seconds(process.pid) for process in self._processes]
        return Effort(
            client_seconds=time.process_time(),
            scheduler_seconds=used[0],
            workers_seconds=sum(used[1:]),
            scheduler_messages=self._counts[0][0],
            scheduler_bytes=self._counts[0][1],
            workers_messages=total(self._counts[1:], 0),
            workers_bytes=total(self._counts[1:], 1),
            client_messages=self._client_counts[0],
            client_bytes=self._client_counts[1],
        )


def total(counts: Sequence[Any], which: int) -> int:
    return sum(count[which] for count in counts)


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
