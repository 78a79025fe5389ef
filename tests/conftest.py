"""One real cluster of worker processes for all tests that need one."""

from __future__ import annotations

import atexit
import collections
import os
import shutil
import tempfile
from collections.abc import Iterator

# Most of a small fit is compilation, and the tests fit the same few models: kernels compiled by
# one test are read back by the next, in worker processes too. Set before JAX is imported.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="nlsq-dask-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import hypothesis
import pytest
from distributed import Client, LocalCluster

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def start_cluster(
    num_workers: int, threads: int = 1, processes: bool = True, memory_limit: str | None = None
) -> LocalCluster:
    return LocalCluster(
        n_workers=num_workers,
        threads_per_worker=threads,
        processes=processes,
        host="127.0.0.1" if processes else None,
        dashboard_address="127.0.0.1:0",
        memory_limit="auto" if memory_limit is None else memory_limit,
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was tried with faults, bad input and hostile files, as their tests counted it."""
    tally: collections.Counter[str] = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for what, count in report.user_properties:
                    tally[what] += count
    if tally:
        terminalreporter.section("faults, bad input, hostile files and mutants")
        for what, count in tally.items():
            terminalreporter.write_line(f"{count:>9,}  {what}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    with start_cluster(2) as running:
        yield running


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster, set_as_default=False) as connected:
        yield connected
