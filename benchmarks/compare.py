"""The same fits by SciPy, lmfit, xarray, NLSQ and this package: time, memory and accuracy.

    pip install '.[benchmark]'
    python benchmarks/compare.py --rows 100000 1000000 10000000 --out comparison
    python benchmarks/compare.py --rows 100000000 --problems decay --out comparison-1e8

Each fit runs in a process of its own, started afresh, on the same rows: arrays in memory for
all packages, and for this one also a Zarr archive, read in process and by two worker processes.
The time of a fit includes compilation, and leaves out imports, which are listed beside it, a
garbage collection after them, loading arrays and starting workers. Memory is the resident size of
the process and all its children, their shared pages counted once for each, sampled while the fit
runs; `own peak` is what the system recorded for the process itself. Accuracy is the distance from
the minimum, found by Gauss-Newton in NumPy, in standard errors. A fit that exceeds the time or the
memory it was given, or fails, is in the table as such. NLSQ needs Python 3.12.

Writes `OUT.json`, `OUT.md` and `OUT.png`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from cases import PROBLEMS, Data, Minimum, Problem, find_minimum, write_archive, write_data
from peers import PEERS, Peer
from report import markdown, plot

_SAMPLE_SECONDS = 0.02
_CHILDREN_SECONDS = 0.5
_PACKAGES = ("numpy", "scipy", "jax", "jaxlib", "nlsq", "lmfit", "xarray", "dask", "zarr")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of one fit."""

    problem: str
    rows: int
    peer: str
    family: str
    status: str = "done"
    seconds: float | None = None
    import_seconds: float | None = None
    base_bytes: int | None = None  # before the fit, data loaded
    peak_bytes: int | None = None  # of all processes together, during the fit
    own_peak_bytes: int | None = None
    from_minimum: float | None = None  # in standard errors
    from_truth: float | None = None
    num_passes: int | None = None
    pass_seconds: tuple[float, ...] = ()


class TreeWatch:
    """Resident bytes of a process and its children, now and at most."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._members = [self._root]
        self._seen = 0.0
        self.now = self.peak = 0

    def look(self) -> None:
        if time.monotonic() - self._seen > _CHILDREN_SECONDS:
            self._seen = time.monotonic()
            try:
                self._members = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
        self.now = sum(resident_bytes(member) for member in self._members)
        self.peak = max(self.peak, self.now)


def resident_bytes(process: psutil.Process) -> int:
    try:
        size: int = process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
    return size


class Child:
    """A running peer: its messages as they come, and a way to end it and all it started."""

    def __init__(self, peer: Peer, data: Data, errors: Any) -> None:
        names = {"--peer": peer.name, "--problem": data.problem, "--rows": str(data.num_rows)}
        names["--folder"] = str(data.folder)
        options = [part for pair in names.items() for part in pair]
        # Kernels compiled by an earlier run would not be part of the time.
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "peers.py", *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.messages: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.messages.append(json.loads(line))

    def message(self, event: str) -> dict[str, Any] | None:
        return next((m for m in self.messages if m["event"] == event), None)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()


@dataclass(frozen=True, kw_only=True)
class Limits:
    seconds: float
    memory_bytes: int


def run_peer(peer: Peer, data: Data, limits: Limits) -> tuple[Run, list[float]]:
    """One fit, watched from outside, and the parameters it came to."""
    run = Run(problem=data.problem, rows=data.num_rows, peer=peer.name, family=peer.family)
    missing = [m for m in peer.modules if importlib.util.find_spec(m.partition(".")[0]) is None]
    if missing:
        return replace(run, status=f"not installed: {', '.join(missing)}"), []
    with tempfile.TemporaryFile("w+") as errors:
        child = Child(peer, data, errors)
        try:
            status, base, peak = watch(child, limits)
        finally:
            child.end()
        if status == "done" and child.message("done") is None:
            errors.seek(0)
            status = "failed: " + last_line(errors.read())
    ready, fitted = child.message("ready"), child.message("fitted")
    done = child.message("done") or {}
    run = replace(
        run,
        status=status,
        seconds=fitted["seconds"] if fitted else None,
        import_seconds=ready["import_seconds"] if ready else None,
        base_bytes=base or None,
        peak_bytes=peak or None,
        own_peak_bytes=done.get("resident_bytes"),
        num_passes=done.get("num_passes"),
        pass_seconds=tuple(done.get("pass_seconds", ())),
    )
    return run, done.get("params", [])


def watch(child: Child, limits: Limits) -> tuple[str, int, int]:
    """Wait for a fit to end, or end it. Returns how, and resident bytes before and at most."""
    tree = TreeWatch(child.process.pid)
    base, began = 0, math.inf
    while child.process.poll() is None:
        tree.look()
        if began == math.inf and child.message("ready"):
            base, began = tree.now, time.monotonic()
            tree.peak = tree.now
        if tree.now > limits.memory_bytes:
            limit = limits.memory_bytes / 2**30
            return f"exceeded memory: more than {limit:.2g} GiB", base, tree.peak
        if time.monotonic() - began > limits.seconds and not child.message("fitted"):
            return f"exceeded time: more than {limits.seconds:g} s", base, tree.peak
        time.sleep(_SAMPLE_SECONDS)
    return "done", base, tree.peak


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "ended without a word"


def compare(
    problem: Problem, num_rows: int, peers: Sequence[Peer], limits: Limits, options: Any
) -> Iterator[Run]:
    """All peers on the same rows, one after the other."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        chunk_rows = options.chunk_rows if any(peer.reads_archive for peer in peers) else None
        # Elsewhere: a process that is started begins with the largest size its parent has had.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
            prepared = apart.submit(prepare, problem.name, num_rows, Path(folder), chunk_rows)
            data, minimum = prepared.result()
        for peer in peers:
            yield run_repeatedly(peer, data, limits, minimum, options.repeats)


def prepare(name: str, num_rows: int, folder: Path, chunk_rows: int | None) -> tuple[Data, Minimum]:
    """Write the rows, and find where their fit should end."""
    data = write_data(PROBLEMS[name], num_rows, folder)
    if chunk_rows is not None:
        write_archive(PROBLEMS[name], data, min(chunk_rows, num_rows))
    return data, find_minimum(PROBLEMS[name], num_rows)


def run_repeatedly(peer: Peer, data: Data, limits: Limits, minimum: Minimum, repeats: int) -> Run:
    """The run of median time; one that did not end well ends the series."""
    runs = []
    for _ in range(repeats):
        run, params = run_peer(peer, data, limits)
        if params:
            truth = replace(minimum, popt=np.array(PROBLEMS[data.problem].truth))
            run = replace(
                run, from_minimum=minimum.distance(params), from_truth=truth.distance(params)
            )
        report_progress(run)
        runs.append(run)
        if run.status != "done":
            return run
    return sorted(runs, key=lambda run: run.seconds or 0.0)[len(runs) // 2]


def report_progress(run: Run) -> None:
    if run.status != "done" or run.seconds is None or run.peak_bytes is None:
        print(f"{run.problem}, {run.rows:,} rows, {run.peer}: {run.status}", flush=True)
        return
    print(
        f"{run.problem}, {run.rows:,} rows, {run.peer}: {run.seconds:.2f} s, "
        f"{run.peak_bytes / 2**20:,.0f} MiB, {run.from_minimum:.1e} standard errors off",
        flush=True,
    )


def machine() -> dict[str, Any]:
    """Where the figures are from."""
    versions = {}
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=1, help="the median time is reported")
    parser.add_argument("--chunk-rows", type=int, default=500_000, help="of the archive")
    parser.add_argument("--limit-seconds", type=float, default=1800.0, help="for each fit")
    parser.add_argument(
        "--limit-gib",
        type=float,
        default=0.85 * psutil.virtual_memory().available / 2**30,
        help="for each fit, all its processes together",
    )
    parser.add_argument("--scratch", help="where the rows are written for the time being")
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    return parser.parse_args()


def main() -> int:
    options = parse()
    limits = Limits(seconds=options.limit_seconds, memory_bytes=int(options.limit_gib * 2**30))
    peers = [PEERS[name] for name in options.peers]
    results: dict[str, Any] = {"machine": machine(), "runs": []}
    for name in options.problems:
        for num_rows in sorted(options.rows):
            for run in compare(PROBLEMS[name], num_rows, peers, limits, options):
                results["runs"].append(asdict(run))
                # After every fit: what took an hour is not lost with the next one.
                options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    options.out.with_suffix(".md").write_text(text)
    print(f"\n{text}")
    plot(results, options.out.with_suffix(".png"))
    own = [run for run in results["runs"] if run["family"] == "nlsq_dask"]
    return 0 if all(run["status"] == "done" and run["from_minimum"] < 1e-2 for run in own) else 1


if __name__ == "__main__":
    sys.exit(main())
