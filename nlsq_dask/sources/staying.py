"""Coroutines that stay in the thread that wants their result.

Zarr runs all coroutines of a process on one thread, hands what blocks (files, codecs) to others,
and copies each decoded chunk on the first: with chunks of 4 MB that takes as long as LZ4 does,
and a second reader gains little. A store on a disk waits for nobody, so it can be read where
the rows are wanted.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, TypeVar, TypeVarTuple, Unpack

__all__ = ["can_stay", "run_here"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_MOST_IDLE = 16  # each has three file descriptors
_IDLE: list[asyncio.Runner] = []


def can_stay() -> bool:
    """Whether this thread may run an event loop: it has none running, as a notebook's has."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def run_here(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result; what it hands to other threads is done by this one too."""
    try:  # another thread may be faster
        runner = _IDLE.pop()
    except IndexError:
        runner = asyncio.Runner(loop_factory=_StayingLoop)
    with ExitStack() as unless_used_again:
        unless_used_again.callback(runner.close)  # with what a failed coroutine left undone
        result = runner.run(coroutine, context=contextvars.copy_context())
        if len(_IDLE) < _MOST_IDLE:
            unless_used_again.pop_all()
            _IDLE.append(runner)
    return result


class _StayingLoop(asyncio.SelectorEventLoop):
    """Calls what is meant for another thread in its own, in turn."""

    def run_in_executor(
        self, executor: Any, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        async def call() -> T:
            return func(*args)

        return self.create_task(call())


@atexit.register
def _close_idle() -> None:
    while _IDLE:
        _IDLE.pop().close()
