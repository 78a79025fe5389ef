"""A scheduler and workers in processes of their own, which may be replaced while a client works."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from distributed import Client

__all__ = ["Processes"]

_START_SECONDS = 120
_STOP_SECONDS = 30


class Processes:
    """``dask scheduler`` and ``dask worker``, on this machine's own address.

    Their files are in `folder`, what they say is in ``dask.log`` there.
    """

    def __init__(self, folder: Path, num_workers: int) -> None:
        self._folder = folder
        self._num_workers = num_workers
        self._workers: deque[subprocess.Popen[bytes]] = deque()

    def __enter__(self) -> Self:
        self._log = open(self._folder / "dask.log", "wb")
        file = self._folder / "scheduler.json"
        options = "--host 127.0.0.1 --port 0 --no-dashboard --scheduler-file"
        self.scheduler = self._start("scheduler", *options.split(), str(file))
        self.client = Client(scheduler_file=str(file), timeout=_START_SECONDS)
        self.add(self._num_workers)
        self.await_workers()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.close()
        for process in (*self._workers, self.scheduler):
            _stop(process)
        self._log.close()

    def add(self, num_workers: int) -> None:
        """Start workers, without waiting for them."""
        options = "--host 127.0.0.1 --nthreads 1 --no-dashboard --no-nanny --memory-limit 4GiB"
        for _ in range(num_workers):
            address, place = self.client.scheduler.address, str(self._folder / "workers")
            self._workers.append(
                self._start("worker", address, *options.split(), "--local-directory", place)
            )

    def kill_oldest(self) -> None:
        """Without a chance to say so, as machines go."""
        process = self._workers.popleft()
        process.kill()
        process.wait(_STOP_SECONDS)

    def await_workers(self) -> None:
        """Until those that were started are there."""
        self.client.wait_for_workers(len(self._workers), timeout=_START_SECONDS)

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distributed.cli.dask_" + kind, *options]
        return subprocess.Popen(command, stdout=self._log, stderr=self._log)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_STOP_SECONDS)
