"""Chunks read in order, by threads of their own, ahead of the one that computes on them.

All that passes between the threads are two queues. A future for each chunk has locks of its own,
each of them one more wait for the interpreter where both threads want it: half a millisecond a
chunk, in which 80,000 rows could be summed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")

_SLOW_READING = 2.0  # times as long as the caller takes for a chunk
_TOO_FEW = 4  # chunks, to judge by


def read_ahead(
    read: Callable[[int], T], indices: Sequence[int], *, num_ahead: int, is_far: bool
) -> Generator[T]:
    """``read(i)`` of each index, in order.

    Parameters
    ----------
    read : callable
        Called in threads whose names begin with ``nlsq-read``.
    indices : sequence of int
    num_ahead : int
        How many are being read or ready before they are asked for, at most.
    is_far : bool
        Whether each of those has a thread of its own, which waits for most of the time. If not,
        one thread reads them in turn, as more would take the processor from the caller; a second
        one helps where reading takes much longer than what the caller does.

    Raises
    ------
    BaseException
        What `read` raised, at its turn. Nothing is read after that, nor after ``close``.
    """
    readers = _Readers(read)
    to_read = iter(enumerate(indices))
    early: dict[int, _Read[T]] = {}
    reading = computing = 0.0
    try:
        for ticket in itertools.islice(to_read, num_ahead):
            readers.tickets.put(ticket)
        readers.start(min(num_ahead, len(indices)) if is_far else 1)
        for position in range(len(indices)):
            while position not in early:
                next_one = readers.arrived.get()
                early[next_one.position] = next_one
                reading += next_one.seconds
            found = early.pop(position)
            if found.error is not None:
                raise found.error
            for ticket in itertools.islice(to_read, 1):
                readers.tickets.put(ticket)
            if position >= _TOO_FEW and reading > _SLOW_READING * computing:
                readers.start(min(num_ahead, 2))
            handed_over = time.perf_counter()
            assert found.chunk is not None
            yield found.chunk
            computing += time.perf_counter() - handed_over
    finally:
        readers.stop()


@dataclass
class _Read(Generic[T]):
    """A chunk that is being read, or what came of it: an error is for who asked."""

    position: int
    chunk: T | None = None
    error: BaseException | None = None
    seconds: float = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.perf_counter()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self.seconds += time.perf_counter()
        self.error = error
        return True


class _Readers(Generic[T]):
    """Threads that take tickets, each the position and the index of a chunk to be read."""

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read
        self._threads: list[threading.Thread] = []
        self.tickets: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self.arrived: SimpleQueue[_Read[T]] = SimpleQueue()

    def start(self, num_threads: int) -> None:
        """Have so many, if there are fewer."""
        for number in range(len(self._threads), num_threads):
            # At the end of Python, nobody waits for one whose generator was never closed.
            thread = threading.Thread(target=self._work, name=f"nlsq-read-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Take back all tickets, and wait for what is being read."""
        with suppress(Empty):
            while True:
                self.tickets.get_nowait()
        for _ in self._threads:
            self.tickets.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (ticket := self.tickets.get()) is not None:
            position, index = ticket
            found: _Read[T] = _Read(position)
            with found:
                found.chunk = self._read(index)
            self.arrived.put(found)
            del found  # its memory is used again while this thread waits
