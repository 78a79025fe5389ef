"""Chunks are read in order, a few ahead, by as few threads as serve."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from nlsq_dask.evaluate.ahead import read_ahead


class Reads:
    """What was asked for, by whom, and how far ahead of what was taken."""

    def __init__(self, seconds=lambda index: 0.0, failing: dict | None = None) -> None:
        self.indices: list[int] = []
        self.threads: set[str] = set()
        self.most_ahead = 0
        self.num_taken = 0
        self._seconds = seconds
        self._failing = failing or {}
        self._lock = threading.Lock()

    def __call__(self, index: int) -> str:
        with self._lock:
            self.indices.append(index)
            self.threads.add(threading.current_thread().name)
            self.most_ahead = max(self.most_ahead, len(self.indices) - self.num_taken)
        time.sleep(self._seconds(index))
        if index in self._failing:
            raise self._failing[index]
        return f"chunk {index}"

    def take(self, indices, *, caller_seconds: float = 0.0, **options) -> list[str]:
        taken = []
        for chunk in read_ahead(self, indices, **options):
            self.num_taken += 1
            taken.append(chunk)
            time.sleep(caller_seconds)
        return taken


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("nlsq-read")]


@pytest.mark.parametrize("num_ahead", [1, 2, 5])
@pytest.mark.parametrize("is_far", [False, True])
@pytest.mark.parametrize("indices", [[], [7], range(3, 40, 4)], ids=str)
def test_chunks_come_in_order_and_no_more_are_read_than_asked_for(indices, num_ahead, is_far):
    reads = Reads()
    taken = reads.take(indices, num_ahead=num_ahead, is_far=is_far)
    assert taken == [f"chunk {index}" for index in indices]
    assert sorted(reads.indices) == list(indices)
    # A ticket is given out before the chunk that is handed over counts as taken.
    assert reads.most_ahead <= num_ahead + 1
    assert not readers()


def test_late_ones_are_waited_for():
    """The first of each five takes longest."""
    reads = Reads(seconds=lambda index: 0.02 + 0.02 * (index % 5 == 0))
    assert reads.take(range(20), num_ahead=5, is_far=True) == [f"chunk {i}" for i in range(20)]
    assert reads.threads == {f"nlsq-read-{i}" for i in range(5)}


def test_there_are_no_more_threads_than_chunks():
    reads = Reads(seconds=lambda _: 0.01)
    reads.take(range(3), num_ahead=16, is_far=True)
    assert len(reads.threads) <= 3


def test_one_thread_reads_where_the_caller_takes_as_long():
    reads = Reads()
    reads.take(range(30), num_ahead=2, is_far=False, caller_seconds=0.01)
    assert reads.threads == {"nlsq-read-0"}
    assert reads.indices == list(range(30))


@pytest.mark.parametrize("num_ahead", [1, 2, 3])
def test_a_second_one_helps_where_the_caller_waits(num_ahead):
    reads = Reads(seconds=lambda _: 0.01)
    assert len(reads.take(range(30), num_ahead=num_ahead, is_far=False)) == 30
    assert len(reads.threads) == min(num_ahead, 2)


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("is_far", [False, True])
def test_an_error_is_raised_at_its_turn_and_ends_the_reading(error, is_far):
    reads = Reads(failing={4: error})
    chunks = read_ahead(reads, range(30), num_ahead=3, is_far=is_far)
    assert [next(chunks) for _ in range(4)] == [f"chunk {index}" for index in range(4)]
    with pytest.raises(type(error)) as raised:
        next(chunks)
    assert raised.value is error
    assert len(reads.indices) <= 7
    assert not readers()
    assert list(chunks) == []


def test_who_stops_early_waits_for_what_is_being_read_and_for_no_more():
    reads = Reads(seconds=lambda _: 0.02)
    chunks = read_ahead(reads, range(30), num_ahead=3, is_far=False)
    next(chunks)
    chunks.close()
    assert not readers()
    assert len(reads.indices) <= 2


def test_python_ends_where_nobody_closed_the_generator():
    code = (
        "from nlsq_dask.evaluate.ahead import read_ahead\n"
        "import builtins\n"
        "builtins.kept = read_ahead(str, range(9), num_ahead=2, is_far=False)\n"
        "print(next(builtins.kept))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "0\n", "")
