"""Coroutines that stay in the thread that wants their result.

Zarr runs all coroutines of a process on one thread, hands what blocks (files, codecs) to others,
and copies each decoded chunk on the first: with chunks of 4 MB that takes as long as LZ4 does,
and a second reader gains little. A store on a disk waits for nobody, so it can be read where
the rows are wanted, and mostly without a turn of a loop.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import types
from asyncio import events
from collections.abc import Callable, Coroutine, Generator
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
    """The coroutine's result; what it hands to other threads is done by this one too.

    As long as it waits for nothing, no loop has to turn.
    """
    try:  # another thread may be faster
        runner = _IDLE.pop()
    except IndexError:
        runner = asyncio.Runner(loop_factory=_StayingLoop)
    context = contextvars.copy_context()
    with ExitStack() as unless_used_again:
        unless_used_again.callback(runner.close)  # with what a failed coroutine left undone
        unless_used_again.callback(events._set_running_loop, None)  # before that
        events._set_running_loop(runner.get_loop())
        try:
            awaited = context.run(coroutine.send, None)
        except StopIteration as done:
            result: T = done.value
        else:  # it does wait
            events._set_running_loop(None)
            result = runner.run(_go_on(coroutine, awaited), context=context)
        events._set_running_loop(None)
        if len(_IDLE) < _MOST_IDLE:
            unless_used_again.pop_all()
            _IDLE.append(runner)
    return result


async def _go_on(coroutine: Coroutine[Any, Any, T], awaited: Any) -> T:
    @types.coroutine
    def rest() -> Generator[Any, Any, T]:
        result: T = yield from _Steps(coroutine, awaited)
        return result

    return await rest()


class _Steps(Generator[Any, Any, Any]):
    """Those of a coroutine that has begun, from where it waits for `awaited`."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], awaited: Any) -> None:
        self._coroutine = coroutine
        self._first = [awaited]

    def send(self, value: Any) -> Any:
        return self._first.pop() if self._first else self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)


class _StayingLoop(asyncio.SelectorEventLoop):
    """Calls what is meant for another thread in its own, and at once."""

    def run_in_executor(
        self, executor: Any, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        called: asyncio.Future[T] = self.create_future()
        called.set_result(func(*args))
        return called


@atexit.register
def _close_idle() -> None:
    while _IDLE:
        _IDLE.pop().close()
