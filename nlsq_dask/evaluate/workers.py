"""Which workers there are, and what all of them have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import distributed

from nlsq_dask.errors import WorkerError
from nlsq_dask.evaluate.worker import platform_of_worker

__all__ = ["platform_of", "run_on_all", "workers_of"]

_WORKER_WAIT_SECONDS = 60.0


def platform_of(client: distributed.Client) -> str:
    """The kind of device that the workers compute on: what they sum follows it to the bit.

    Raises
    ------
    WorkerError
        If they differ.
    """
    workers_of(client)
    platforms: dict[str, str] = run_on_all(client, platform_of_worker)
    kinds = sorted(set(platforms.values()))
    if len(kinds) > 1:
        raise WorkerError(
            f"the workers must compute on one kind of device, but {platforms} are of {kinds}"
        )
    return kinds[0]


def run_on_all(client: distributed.Client, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function once on every worker."""
    try:
        return client.run(function, *arguments)
    except ModuleNotFoundError as error:
        raise WorkerError(
            f"every worker must be able to import this package and what the model uses, "
            f"but one could not: {error}"
        ) from error


def workers_of(client: distributed.Client) -> dict[str, Any]:
    """The workers now, waiting a while for one where a nanny may be restarting it."""
    workers: dict[str, Any] | None = client.scheduler_info(n_workers=-1).get("workers")
    if workers is None:
        raise WorkerError(
            f"`client` must be connected to a scheduler, got one that is {client.status}"
        )
    if not workers:
        try:
            client.wait_for_workers(1, timeout=_WORKER_WAIT_SECONDS)
        except TimeoutError:
            raise WorkerError(
                f"`client` must have at least one worker, and had none for "
                f"{_WORKER_WAIT_SECONDS:.0f} seconds"
            ) from None
        workers = client.scheduler_info(n_workers=-1)["workers"]
    return workers
