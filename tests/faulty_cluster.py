"""Clusters to be mistreated, and a source of rows that does it at the moment it is told.

Processes are killed, stopped and continued by their own number.
"""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import dask
import numpy as np
import xarray as xr
from distributed import Client

import problems
from conftest import start_cluster
from nlsq_dask import Chunk, FitResult, HybridStreamingConfig, IterationRecord, fit_dataset

NUM_ROWS, CHUNK_ROWS = 120_000, 4_000
WATCHDOG_SECONDS = 240.0  # machines are busy; a hang is for ever
_Value = TypeVar("_Value")

# -- rows that bring faults


@dataclass(frozen=True)
class Rows:
    """A decay in a Zarr store. Orders lie in a folder, and whoever reads a chunk carries one out.

    An order is a file named ``<moment>-<chunk>-<deed>``; it is done once, or each time if the
    deed ends in ``always``. Moments are the functions that a worker runs.
    """

    store: Path
    folder: Path
    variables: tuple[str, ...] = ("t",)
    num_chunks: int = NUM_ROWS // CHUNK_ROWS
    num_rows: int = NUM_ROWS
    chunk_shape: tuple[int, ...] = (CHUNK_ROWS,)

    def read(self, index: int) -> Chunk:
        self._obey(index)
        ds = xr.open_dataset(self.store, engine="zarr", consolidated=False, chunks=None)
        part = ds.isel(row=slice(index * CHUNK_ROWS, (index + 1) * CHUNK_ROWS))
        return Chunk(x=(part.t.values,), y=part.y.values)

    def order(self, moment: str, chunk: int, deed: str) -> None:
        (self.folder / f"{moment}-{chunk}-{deed}").touch()

    def obeyed(self) -> list[int]:
        """The processes that carried out an order."""
        return [int(line) for line in _lines(self.folder / "obeyed")]

    def readers(self) -> set[int]:
        """The processes that read chunks of a pass."""
        return {int(path.name.removeprefix("reader-")) for path in self.folder.glob("reader-*")}

    def _obey(self, index: int) -> None:
        callers = {frame.function for frame in inspect.stack(context=0)}
        if "reduce_range" in callers:
            (self.folder / f"reader-{os.getpid()}").touch()
        for path in self.folder.glob(f"*-{index}-*"):
            moment, _, deed = path.name.split("-")
            if moment in callers and self._take(path, deed):
                _DEEDS[deed.removesuffix("always")]()

    def _take(self, path: Path, deed: str) -> bool:
        """Whether the order is this process's to carry out."""
        if not deed.endswith("always"):
            try:
                path.rename(self.folder / "taken")
            except FileNotFoundError:
                return False
        with (self.folder / "obeyed").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return True


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise() -> None:
    raise OSError(5, "Input/output error of a disk that fails")


def _hoard() -> None:
    """Take memory until somebody objects."""
    hoard = []
    while True:
        hoard.append(np.ones(2**22))
        time.sleep(0.02)


def _dawdle() -> None:
    """Long enough for something to happen meanwhile."""
    time.sleep(4.0)


_DEEDS = {"kill": _kill, "stop": _stop, "raise": _raise, "hoard": _hoard, "dawdle": _dawdle}


def _lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def write_store(path: Path) -> None:
    t, y = problems.make_decay(NUM_ROWS)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})
    ds.chunk(row=CHUNK_ROWS).to_zarr(path, consolidated=False)


# -- fits


def fit(source: Any, client: Client | None = None, **options: Any) -> FitResult:
    """Some passes: the tolerance is far beyond what is asked for as a rule."""
    chosen = {name: options.pop(name) for name in ("checkpoint", "callback") if name in options}
    config = HybridStreamingConfig(
        **{
            "cache_bytes": 0,
            "prefetch": False,
            "max_sample_fraction": 0.02,
            "distance_tol": 1e-9,
            **options,
        }
    )
    y = "y" if isinstance(source, Path) else None
    return fit_dataset(
        source, problems.decay, y=y, p0=problems.P0, client=client, config=config, **chosen
    )


def after_pass(number: int, act: Callable[[], object]) -> Callable[[IterationRecord], None]:
    """A callback that acts between two passes."""

    def callback(record: IterationRecord) -> None:
        if record.phase == 2 and record.num_passes == number:
            act()

    return callback


def within(seconds: float, work: Callable[[], _Value]) -> _Value:
    """What `work` returns or raises; it must not take for ever."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:  # noqa: BLE001 - handed on
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True, name="watched")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        faulthandler.dump_traceback(all_threads=True)
        raise AssertionError(f"the fit hangs: it did not end within {seconds} seconds")
    if "error" in outcome:
        raise outcome["error"]
    value: _Value = outcome["value"]
    return value


def assert_same_bits(actual: FitResult, expected: FitResult) -> None:
    assert actual.success
    assert actual.popt.tobytes() == expected.popt.tobytes()
    assert actual.pcov.tobytes() == expected.pcov.tobytes()
    assert actual.cost == expected.cost
    assert actual.num_passes == expected.num_passes


# -- clusters


@dataclass(eq=False)
class Processes:
    """A scheduler and workers on this machine, each started by Dask's command line."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    port: int = 0
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        """On the same port as before, if there was one."""
        contact = self.folder / "scheduler.json"
        contact.unlink(missing_ok=True)
        scheduler = self._start(
            "scheduler", "--port", str(self.port), "--no-dashboard", "--scheduler-file", contact
        )
        until(contact.exists, 60)
        until(lambda: contact.read_text().endswith("}"), 10)
        self.port = int(self.address.rpartition(":")[2])
        return scheduler

    def start_worker(self, *options: str) -> subprocess.Popen[bytes]:
        """Without a nanny, of one thread."""
        return self._start(
            "worker", self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard", *options
        )

    @property
    def address(self) -> str:
        contact = (self.folder / "scheduler.json").read_text()
        return contact.partition('"address": "')[2].partition('"')[0]

    def _start(self, what: str, *options: Any) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{what}-{len(self.running)}.log").open("wb")
        command = [sys.executable, "-m", "dask", what, "--host", "127.0.0.1", *map(str, options)]
        places = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if what == "worker":
            command += ["--local-directory", str(self.folder)]
        with log:
            started = subprocess.Popen(
                command,
                env={**os.environ, **places, **self.settings},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )
        self.running.append(started)
        return started

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self.running):
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """At once, and wait until it is gone."""
    process.kill()
    process.wait(30)


@contextlib.contextmanager
def processes(folder: Path, num_workers: int, **settings: str) -> Iterator[tuple[Any, ...]]:
    """The cluster, its scheduler, its workers and a client."""
    folder.mkdir()
    with Processes(folder, settings) as cluster:
        scheduler = cluster.start_scheduler()
        workers = [cluster.start_worker() for _ in range(num_workers)]
        with Client(cluster.address, set_as_default=False, timeout=30) as client:
            client.wait_for_workers(num_workers, timeout=60)
            yield cluster, scheduler, workers, client


@contextlib.contextmanager
def nannies(num_workers: int, memory_limit: str | None = None, **settings: Any) -> Iterator[Client]:
    """A client of a `LocalCluster` whose workers come back when they die."""
    # Dask gives up a worker that it misses after 15 seconds: one that was killed twice, too.
    settings = {"distributed.deploy.lost-worker-timeout": "1 hour", **settings}
    with (
        dask.config.set(settings),
        start_cluster(num_workers, memory_limit=memory_limit) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def pids(client: Client) -> list[int]:
    return list(client.run(os.getpid, on_error="ignore").values())


def kill_all(numbers: list[int]) -> None:
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def until(is_so: Callable[[], bool], seconds: float) -> None:
    """Wait for something that has to happen soon."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not within {seconds} seconds: {inspect.getsource(is_so)}"
        time.sleep(0.05)


# -- what must not be left


def assert_nothing_left(client: Client) -> None:
    """Neither on the scheduler nor on its workers nor here. What is on its way may arrive."""
    until(lambda: not left_on_scheduler(client), 20)
    until(lambda: not any(client.run(left_on_worker, on_error="ignore").values()), 20)
    assert not client.futures
    assert not [t.name for t in threading.enumerate() if t.name.startswith("nlsq")]


def left_on_scheduler(client: Client) -> list[str]:
    left: list[str] = client.run_on_scheduler(
        lambda dask_scheduler: [
            *map(str, dask_scheduler.tasks),
            *(name for name in dask_scheduler.plugins if name.startswith("nlsq")),
            *(name for name in dask_scheduler.worker_plugins if name.startswith("nlsq")),
        ]
    )
    return left


def left_on_worker(dask_worker: Any) -> list[str]:
    from nlsq_dask.evaluate import heap, worker

    return [
        *map(str, dask_worker.data),
        *map(str, dask_worker.state.tasks),
        *(name for name in dask_worker.plugins if name.startswith("nlsq")),
        *worker._HOMES,
        *heap._USERS,
    ]
