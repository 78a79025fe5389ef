"""Waiting for tasks: not for ever, and with a name for what went wrong."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

import distributed

from nlsq_dask.errors import WorkerError
from nlsq_dask.evaluate.touch import in_touch, is_in_touch
from nlsq_dask.progress import OnLeaves

__all__ = ["gather_all", "wait_for_all"]

_LOGGER = logging.getLogger("nlsq_dask")
_LOOK_SECONDS = 2.0  # how often it is looked whether there are workers
_PATIENCE_SECONDS = 300.0  # without a worker: machines come and go


def wait_for_all(
    client: distributed.Client,
    num_leaves: Mapping[Any, int],
    on_leaves: OnLeaves = lambda _: None,
) -> None:
    """Until all futures are done, or one has failed; as each is, tell how many leaves it was of.

    An interrupt leaves no coroutine behind.

    Raises
    ------
    WorkerError
        If there is no worker for five minutes.
    """
    waiting, lock, is_over = len(num_leaves), threading.Lock(), threading.Event()

    def one_is_done(future: Any) -> None:
        nonlocal waiting
        with lock:
            waiting -= 1
            is_last = waiting == 0
        try:
            on_leaves(num_leaves[future])
        finally:  # the wait ends, whatever becomes of the telling
            if is_last or future.status != "finished":
                is_over.set()

    for future in num_leaves:
        future.add_done_callback(one_is_done)
    if num_leaves:
        _look_after(client, is_over.wait)


def gather_all(client: distributed.Client, futures: Sequence[Any]) -> list[Any]:
    """Results of tasks. Those that were lost since, with their worker, are waited for again.

    Raises
    ------
    WorkerError
        If there is no worker for five minutes, or the scheduler is lost.
    Exception
        What a task raised.
    """
    with in_touch(client), contextlib.ExitStack() as at_end:
        results = client.gather(list(futures), asynchronous=True)
        collecting = asyncio.run_coroutine_threadsafe(results, client.loop.asyncio_loop)
        at_end.callback(collecting.cancel)
        _look_after(client, lambda timeout: bool(concurrent.futures.wait([collecting], timeout)[0]))
        error = collecting.exception()
        if error is not None and _is_of_connection(error, client, futures):
            raise error
    gathered: list[Any] = collecting.result()
    return gathered


def _is_of_connection(
    error: BaseException, client: distributed.Client, futures: Sequence[Any]
) -> bool:
    """Whether the way to the scheduler failed, and not a task."""
    if not isinstance(error, OSError | CancelledError):
        return False
    if not is_in_touch(client):
        return True
    return isinstance(error, OSError) and not any(future.status == "error" for future in futures)


def _look_after(client: distributed.Client, is_done: Callable[[float], bool]) -> None:
    """Wait, as long as there are workers that could do what is waited for."""
    last_seen = time.monotonic()
    is_told = False
    while not is_done(_LOOK_SECONDS):
        # Of a lost scheduler hears whoever waits, by cancelled futures.
        if not is_in_touch(client) or _has_workers(client):
            last_seen, is_told = time.monotonic(), False
            continue
        if time.monotonic() - last_seen > _PATIENCE_SECONDS:
            raise WorkerError(
                f"`client` must have at least one worker until the fit ends, and lost all; "
                f"none came for {_PATIENCE_SECONDS:.0f} seconds"
            )
        if not is_told:
            _LOGGER.warning(
                "No worker is left; waiting up to %.0f seconds for one.", _PATIENCE_SECONDS
            )
            is_told = True


def _has_workers(client: distributed.Client) -> bool:
    """Also where it cannot be told."""
    try:
        return bool(client.nthreads())
    except OSError:
        return True
