"""One core for what is measured, archives to measure on, and the ratios at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# XLA's threads would make a ratio depend on what else runs. Set before JAX is imported.
os.environ.setdefault("PJRT_NPROC", "1")

import cases
import pytest

_RATIOS = pytest.StashKey[list[str]]()
_MIN_SECONDS = 0.3  # of measuring for each of the things compared


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=int, default=4_000_000, help="of the archives that are fitted")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RATIOS] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[_RATIOS]:
        terminalreporter.section("ratios, each measured in one run")
    for line in config.stash[_RATIOS]:
        terminalreporter.write_line(line)


@pytest.fixture(params=list(cases.PROBLEMS))
def case(request: pytest.FixtureRequest) -> cases.Problem:
    return cases.PROBLEMS[request.param]


@pytest.fixture
def one_core() -> Iterator[None]:
    """Everything that this thread starts stays on one processor."""
    if not hasattr(os, "sched_setaffinity"):  # not on macOS
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture
def archive(case: cases.Problem, tmp_path: Path, pytestconfig: pytest.Config) -> cases.Data:
    data = cases.write_data(case, pytestconfig.getoption("rows"), tmp_path)
    cases.write_archive(case, data, 500_000)
    return data


class Compare:
    """Times functions in turn, and keeps the least time of each.

    Turns are taken because a shared machine is slower in one second than in the next.
    """

    def __init__(self, benchmark: Any) -> None:
        self._benchmark = benchmark

    def __call__(self, **functions: Callable[[], Any]) -> dict[str, float]:
        """The first of them is given to pytest-benchmark too."""
        seconds = self.least_seconds(**functions)
        self._benchmark.pedantic(next(iter(functions.values())), rounds=3)
        return seconds

    def least_seconds(self, **functions: Callable[[], Any]) -> dict[str, float]:
        for function in functions.values():
            function()  # compiles, and opens what stays open
        seconds = dict.fromkeys(functions, float("inf"))
        spent, rounds = 0.0, 0
        while spent < _MIN_SECONDS * len(functions) or rounds < 3:
            for name, function in functions.items():
                function()  # finds caches as it leaves them, not as the one before does
                start = time.perf_counter()
                function()
                elapsed = time.perf_counter() - start
                seconds[name] = min(seconds[name], elapsed)
                spent += elapsed
            rounds += 1
            if self._benchmark.disabled:
                break
        return seconds


@pytest.fixture
def compare(benchmark: Any) -> Compare:
    return Compare(benchmark)


@pytest.fixture
def report(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep figures with the benchmark, and say them at the end of the run."""

    def write(text: str, **figures: float) -> None:
        benchmark.extra_info.update(figures)
        request.config.stash[_RATIOS].append(f"{request.node.name}: {text}")

    return write
