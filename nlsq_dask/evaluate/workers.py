"""Which workers there are, and what all of them have in common."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import distributed
from distributed.comm import CommClosedError
from distributed.diagnostics.plugin import WorkerPlugin

from nlsq_dask.errors import WorkerError
from nlsq_dask.evaluate.touch import in_touch
from nlsq_dask.evaluate.worker import platform_of_worker
from nlsq_dask.machine import total_memory

__all__ = [
    "ask_all",
    "memory_of",
    "platform_of",
    "register_on_all",
    "run_on_all",
    "workers_of",
]

_WORKER_WAIT_SECONDS = 60.0
_MAX_ATTEMPTS = 4  # as often as Dask's schedulers try a task that kills its worker
_PAUSE_SECONDS = 0.5  # in which the scheduler hears that a worker is gone


def platform_of(client: distributed.Client) -> str:
    """The kind of device that the workers compute on: what they sum follows it to the bit.

    Raises
    ------
    WorkerError
        If they differ.
    """
    platforms: dict[str, str] = run_on_all(client, platform_of_worker)
    kinds = sorted(set(platforms.values()))
    if len(kinds) > 1:
        raise WorkerError(
            f"the workers must compute on one kind of device, but {platforms} are of {kinds}"
        )
    return kinds[0]


def memory_of(client: distributed.Client, workers: Mapping[str, Any]) -> list[int]:
    """Bytes that each worker may use: its limit, or its share of its machine where it has none."""
    limits = [worker["memory_limit"] for worker in workers.values()]
    if all(limits):
        return limits
    machines = run_on_all(client, total_memory)
    num_beside = Counter(worker["host"] for worker in workers.values())
    shares = [
        machines.get(address, 0) // num_beside[worker["host"]]  # none of one that has just died
        for address, worker in workers.items()
    ]
    return [limit or share for limit, share in zip(limits, shares, strict=True)]


def run_on_all(client: distributed.Client, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function once on every worker.

    Raises
    ------
    WorkerError
        If one cannot import what it needs, or workers keep dying of it.
    Exception
        What the function raised on one of them.
    """
    answers = ask_all(client, function, *arguments)
    for answer in answers.values():
        if isinstance(answer, Exception):
            raise answer
    return answers


def ask_all(
    client: distributed.Client, function: Callable[..., Any], *arguments: Any
) -> dict[str, Any]:
    """By address what a function returned, or the exception that it raised, on every worker.

    A worker that died meanwhile is left out, and one that came in its place is asked.

    Raises
    ------
    WorkerError
        If one cannot import what it needs, or workers keep dying of it.
    """
    answers: dict[str, Any] = {}
    for _ in range(_MAX_ATTEMPTS):
        asked = [address for address in workers_of(client) if address not in answers]
        with in_touch(client):
            heard = client.run(function, *arguments, workers=asked, on_error="return")
        lost = {address for address, said in heard.items() if isinstance(said, CommClosedError)}
        if any(isinstance(said, OSError) for said in heard.values()):  # or it is the function's own
            lost |= heard.keys() - workers_of(client).keys()
        answers |= {address: said for address, said in heard.items() if address not in lost}
        if answers and not lost:
            _require_imports(answers)
            return answers
        time.sleep(_PAUSE_SECONDS)
    raise WorkerError(
        f"the workers must live until they are asked, but {_MAX_ATTEMPTS} times one died, or did "
        f"not answer, at {function.__name__!r}; see the workers' logs"
    )


def _require_imports(answers: Mapping[str, Any]) -> None:
    for address, said in answers.items():
        if isinstance(said, ModuleNotFoundError):
            raise WorkerError(
                f"every worker must be able to import this package and what the model uses, "
                f"but {address} could not: {said}"
            ) from said


def register_on_all(client: distributed.Client, plugin: WorkerPlugin, name: str) -> None:
    """Register a plugin, again where a worker died meanwhile.

    Raises
    ------
    WorkerError
        If there is no worker, or workers keep dying.
    """
    for _ in range(_MAX_ATTEMPTS - 1):
        workers_of(client)
        with contextlib.suppress(OSError):
            client.register_plugin(plugin, name=name)
            return
        time.sleep(_PAUSE_SECONDS)
    with in_touch(client):
        client.register_plugin(plugin, name=name)


def workers_of(client: distributed.Client) -> dict[str, Any]:
    """The workers now, waiting a while for one where a nanny may be restarting it.

    Raises
    ------
    WorkerError
        If there is none, or no scheduler.
    """
    with in_touch(client):
        workers: dict[str, Any] | None = client.scheduler_info(n_workers=-1).get("workers")
        if workers:
            return workers
        try:
            client.wait_for_workers(1, timeout=_WORKER_WAIT_SECONDS)
        except TimeoutError:
            raise WorkerError(
                f"`client` must have at least one worker, and had none for "
                f"{_WORKER_WAIT_SECONDS:.0f} seconds"
            ) from None
        workers = client.scheduler_info(n_workers=-1)["workers"]
    assert workers is not None
    return workers
