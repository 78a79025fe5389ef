"""Fits without end in one client process, good, cut short and failing: nothing may grow.

    python benchmarks/soak.py --minutes 30     # the short form is --minutes 1

A scheduler and two workers are processes of their own. In each round this process fits arrays, a
store, Dask arrays and checkpoints, here and on the cluster, by the same function and by one that
is defined anew; is interrupted (SIGINT) in the middle of a pass, here and there; fits what cannot
be fitted, and what fails to be read; saves and loads a result; and in every second round a worker
is killed in the middle of a fit after another has joined. Counted after each round: memory, file
descriptors, threads, temporary files and compilations of this process; tasks, plugins and memory
of the scheduler; problems that workers keep.

Memory is what is in use: what glibc keeps of freed memory for later is given back before it is
counted. Dask's scheduler keeps a record of each half second for an hour, and thousands of events:
here, tens. Of every batch of tasks that comes when it has no other it keeps a "span" for ever,
seven for each fit; what one takes is measured first, by tasks that do nothing, and is not counted.

The rounds after the first ones, which load and compile, are judged by Theil and Sen's slope, the
median of the slopes of all pairs, with its 95 % range (Sen 1968, Journal of the American
Statistical Association 63, 1379). Exits non-zero if what is counted in ones grows at all, or
memory by 10 kB for each of the twenty fits of a round. (SciPy's LAPACK wrappers alone keep 0.1 kB
for each.) Caches of JAX and Dask fill for some fifteen rounds, by 1 to 2 MiB in each at first: a
run of less than thirty is held to 200 kB for each fit, a fifth of the rows that one has.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dask
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import scipy.stats
import xarray as xr
from dask_processes import Processes
from distributed import Client

from nlsq_dask import (
    Chunk,
    FitInterrupted,
    FitResult,
    HybridStreamingConfig,
    fit_dataset,
    reset_defense_telemetry,
)
from nlsq_dask.errors import DataError, UntraceableModelError

NUM_ROWS = 60_000
CHUNK_ROWS = 5_000
P0 = {"amplitude": 1.0, "rate": 1.0, "offset": 0.0}
UNCACHED = HybridStreamingConfig(cache_bytes=0, chunk_size=CHUNK_ROWS)
ALLOWED_MIB = 20 * 10_000 / 2**20
SETTLED_ROUNDS = 30
SHORT_FACTOR = 20  # what a shorter run may grow by, over ALLOWED_MIB
KEPT_RECORDS = 20  # of Dask's messages, events and measurements
SPANS_MEASURED = 500
WARMUP_SHARE = 0.25
WARMUP_ROUNDS = 3


def decay(t, amplitude=1.0, rate=1.0, offset=0.0):
    return amplitude * jnp.exp(-rate * t) + offset


def untraceable(t, amplitude=1.0):
    return amplitude * float(t[0])


def defined_anew() -> Callable[..., jax.Array]:
    two = 2.0

    def twice(t, amplitude=1.0, rate=1.0):
        return two * amplitude * jnp.exp(-rate * t)

    return twice


@dataclass(frozen=True)
class Moody:
    """The rows of a store; slow to read, or failing, while a file of that name is beside it."""

    path: Path

    variables = ("t",)
    num_chunks = NUM_ROWS // CHUNK_ROWS
    num_rows = NUM_ROWS
    chunk_shape = (CHUNK_ROWS,)

    def read(self, index: int) -> Chunk:
        if self.mood("slow").exists():
            time.sleep(0.1)
        if self.mood("failing").exists() and index == 7:
            raise ValueError("chunk 7 is not what it was")
        with xr.open_dataset(self.path, engine="zarr", consolidated=False, chunks=None) as ds:
            part = ds.isel(row=slice(index * CHUNK_ROWS, (index + 1) * CHUNK_ROWS)).load()
        return Chunk(x=(part.t.values,), y=part.y.values)

    def mood(self, name: str) -> Path:
        return self.path.parent / name


# -- what is done in a round


@dataclass(frozen=True)
class Round:
    """Each method is a job, named as it is in the table; `run` does all of them."""

    folder: Path
    cluster: Processes

    @property
    def client(self) -> Client:
        return self.cluster.client

    @property
    def store(self) -> Path:
        return self.folder / "rows.zarr"

    def run(self, with_churn: bool) -> None:
        for client in (None, self.client):
            self.fit(client)
            self.fit_blocks(client)
            self.interrupt(client)
            self.fail(client)
            self.resume(client)
        self.fit_arrays()
        self.save()
        if with_churn:
            self.churn()

    def fit(self, client: Client | None) -> None:
        for model, p0 in ((decay, P0), (defined_anew(), None)):
            require(fit_dataset(self.store, model, y="y", p0=p0, client=client))

    def fit_blocks(self, client: Client | None) -> None:
        ds = xr.open_zarr(self.store, consolidated=False) + 0.0
        require(fit_dataset(ds, decay, y="y", p0=P0, client=client))

    def fit_arrays(self) -> None:
        with xr.open_dataset(self.store, engine="zarr", consolidated=False, chunks=None) as ds:
            require(fit_dataset(ds.load(), decay, y="y", p0=P0))

    def interrupt(self, client: Client | None) -> None:
        """By the signal of the keyboard, while the second pass waits for its rows."""
        source = Moody(self.store)
        timers = []

        def press(record) -> None:
            if record.phase == 2 and not timers:
                source.mood("slow").touch()
                timers.append(threading.Timer(0.2, press_control_c))
                timers[0].start()

        try:
            fit_dataset(source, decay, p0=P0, client=client, config=UNCACHED, callback=press)
        except FitInterrupted as interruption:
            if interruption.result is None:
                raise AssertionError("interrupted before the first pass") from None
        else:
            raise AssertionError("the fit was not interrupted")
        finally:
            source.mood("slow").unlink()
            timers[0].join()

    def fail(self, client: Client | None) -> None:
        source, nothing = Moody(self.store), xr.Dataset({"y": ("t", np.full(9, np.nan))})
        expect(UntraceableModelError, lambda: fit_dataset(self.store, untraceable, client=client))
        expect(DataError, lambda: fit_dataset(nothing, decay, client=client))

        def spoil(record) -> None:
            source.mood("failing").touch()

        def fit_failing() -> FitResult:
            return fit_dataset(source, decay, p0=P0, client=client, config=UNCACHED, callback=spoil)

        expect(ValueError, fit_failing)
        source.mood("failing").unlink()

    def resume(self, client: Client | None) -> None:
        path = self.folder / "run.h5"
        cut = HybridStreamingConfig(max_passes=1)
        fit_dataset(self.store, decay, y="y", p0=P0, client=client, config=cut, checkpoint=path)
        config = HybridStreamingConfig(resume_from_checkpoint=path)
        require(fit_dataset(self.store, decay, y="y", p0=P0, client=client, config=config))
        path.unlink()

    def save(self) -> None:
        result = fit_dataset(self.store, decay, y="y", p0=P0)
        for suffix in (".nc", ".zarr"):
            result.save(self.folder / f"result{suffix}")
            require(FitResult.load(self.folder / f"result{suffix}", model=decay))
        result.predict(xr.Dataset({"t": ("row", [1.0])})).compute(scheduler="threads")
        result.summary()

    def churn(self) -> None:
        """A worker joins, and the oldest goes in the middle of a fit."""
        self.cluster.add(1)
        self.cluster.await_workers()
        killed = []

        def kill(record) -> None:
            if record.phase == 2 and not killed:
                killed.append(record)
                self.cluster.kill_oldest()

        source = Moody(self.store)
        require(
            fit_dataset(source, decay, p0=P0, client=self.client, config=UNCACHED, callback=kill)
        )


def require(result: FitResult) -> None:
    if not result.success:
        raise AssertionError(f"a fit did not converge: {result.message}")


def expect(kind: type[Exception], job: Callable[[], object]) -> None:
    try:
        job()
    except kind:
        return
    raise AssertionError(f"a fit that should have raised {kind.__name__} did not")


def press_control_c() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def write_rows(path: Path) -> None:
    t = np.linspace(0.0, 10.0, NUM_ROWS)
    y = 2 * np.exp(-0.5 * t) + 0.1 * np.random.default_rng(0).normal(size=t.size)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)}).chunk(row=CHUNK_ROWS)
    ds.to_zarr(path, consolidated=False)


# -- what is counted


@dataclass(frozen=True)
class Kind:
    """Of what is counted: how it is shown, and from which growth in a round on it is too much."""

    title: str
    scale: float = 1.0
    allowed: float = 0.0


KINDS = {
    "memory": Kind("memory in use, MiB", 2**-20, ALLOWED_MIB),
    "descriptors": Kind("file descriptors"),
    "threads": Kind("threads"),
    "files": Kind("temporary files"),
    "compilations": Kind("compilations in the round"),
    "tasks": Kind("scheduler: tasks"),
    "plugins": Kind("scheduler: plugins"),
    "scheduler": Kind("scheduler: memory in use", 2**-20, ALLOWED_MIB),
    "homes": Kind("workers: problems kept"),
}


class Census:
    """What there is in this process, the scheduler and the workers."""

    def __init__(self, cluster: Processes, temporary: Path) -> None:
        self._client = cluster.client
        self._temporary = temporary
        self._processes = psutil.Process(), psutil.Process(cluster.scheduler.pid)
        self._num_compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        self._span_bytes = self._measure_span()

    def _measure_span(self) -> float:
        """Bytes of the scheduler's memory that a batch of one task leaves behind."""
        sizes, counts = [], []
        for _ in range(3):  # the first of which fills what is filled once
            for _ in range(SPANS_MEASURED):
                self._client.submit(int, pure=False).result()
            *_, spans = self._client.run_on_scheduler(count_on_scheduler)
            sizes.append(self._processes[1].memory_info().rss)
            counts.append(spans)
        return max(0.0, (sizes[-1] - sizes[-2]) / (counts[-1] - counts[-2]))

    def _on_event(self, event: str, duration: float, **about: object) -> None:
        self._num_compilations += event.endswith("backend_compile_duration")

    def take(self) -> dict[str, float]:
        homes = self._client.run(count_homes)
        reset_defense_telemetry()  # of the last thousand events
        tasks, plugins, spans = self._client.run_on_scheduler(count_on_scheduler)
        give_back_freed_memory()
        here, scheduler = self._processes
        compilations, self._num_compilations = self._num_compilations, 0
        return {
            "memory": here.memory_info().rss,
            "descriptors": here.num_fds(),
            "threads": here.num_threads(),
            "files": len(os.listdir(self._temporary)),
            "compilations": compilations,
            "tasks": tasks,
            "plugins": plugins,
            "scheduler": scheduler.memory_info().rss - spans * self._span_bytes,
            "homes": sum(homes.values()),
        }


def count_homes() -> int:
    from nlsq_dask.evaluate import worker

    return len(worker._HOMES)


def give_back_freed_memory() -> None:
    """To the system, where malloc is glibc's, so that what is left is in use."""
    for _ in range(2):  # what the first finds may have had finalizers
        gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def count_on_scheduler(dask_scheduler) -> tuple[int, int, int]:
    give_back_freed_memory()
    spans = dask_scheduler.extensions["spans"].spans
    return len(dask_scheduler.tasks), len(dask_scheduler.worker_plugins), len(spans)


# -- and judged


def judge(censuses: list[dict[str, float]]) -> bool:
    """Print the table; whether all is flat."""
    first = max(WARMUP_ROUNDS, round(WARMUP_SHARE * len(censuses)))
    judged = censuses[first:]
    print(f"\n{len(censuses)} rounds, of which the last {len(judged)} are judged")
    print(f"{'':<27}{'first':>9}{'from':>9}{'to':>9}{'slope a round, and its 95 % range':>40}")
    factor = 1 if len(censuses) >= SETTLED_ROUNDS else SHORT_FACTOR
    is_flat = True
    for name, kind in KINDS.items():
        values = np.array([census[name] for census in judged]) * kind.scale
        slope, _, low, high = scipy.stats.theilslopes(values, alpha=0.95)
        grows = bool(low > factor * kind.allowed)
        is_flat &= not grows
        print(
            f"{kind.title:<27}{censuses[0][name] * kind.scale:>9.1f}{values[0]:>9.1f}"
            f"{values[-1]:>9.1f}{slope:>16.4f} ({low:+.4f} to {high:+.4f}){'  GROWS' * grows}"
        )
    recompiled = sum(census["compilations"] for census in judged)
    print(f"{recompiled:.0f} compilations in the rounds that are judged")
    return is_flat and recompiled == 0


def soak(minutes: float, folder: Path) -> bool:
    temporary = folder / "temporary"
    temporary.mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    write_rows(folder / "rows.zarr")
    # Workers that join would compile for longer than all the rest takes.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for name in ("log-length", "low-level-log-length", "system-monitor.log-length"):
        dask.config.set({f"distributed.admin.{name}": KEPT_RECORDS})
        variable = name.upper().replace(".", "__").replace("-", "_")
        os.environ[f"DASK_DISTRIBUTED__ADMIN__{variable}"] = str(KEPT_RECORDS)
    censuses: list[dict[str, float]] = []
    end = time.monotonic() + 60 * minutes
    with Processes(folder, num_workers=2) as cluster:
        census = Census(cluster, temporary)
        while time.monotonic() < end or len(censuses) < 2 * WARMUP_ROUNDS:
            start = time.monotonic()
            Round(folder, cluster).run(with_churn=len(censuses) % 2 == 0)
            censuses.append(census.take())
            shown = ", ".join(
                f"{name} {censuses[-1][name] * kind.scale:.0f}" for name, kind in KINDS.items()
            )
            print(f"round {len(censuses)}, {time.monotonic() - start:.1f} s: {shown}", flush=True)
    return judge(censuses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    # Shells start what is to run in the background deaf to the keyboard.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="nlsq-dask-soak-") as folder:
        return 0 if soak(options.minutes, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
