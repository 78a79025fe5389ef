"""Talking to the scheduler, and what is told where nothing is heard from it any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import CancelledError

import distributed

from nlsq_dask.errors import WorkerError

__all__ = ["in_touch", "is_in_touch"]


def is_in_touch(client: distributed.Client) -> bool:
    """Whether there is a scheduler to talk to: not after it is lost, nor while it is looked for."""
    return bool(client.status == "running")


@contextlib.contextmanager
def in_touch(client: distributed.Client) -> Iterator[None]:
    """A connection that is closed or lost meanwhile, as this package's error.

    To be put around what raises OSError and CancelledError for no other reason.

    Raises
    ------
    WorkerError
    """
    if client.status in ("closing", "closed"):
        raise WorkerError(
            f"`client` must be connected to a scheduler, got one that is {client.status}"
        )
    address = client.scheduler.address
    try:
        yield
    except (OSError, CancelledError) as error:
        reason = " ".join(str(error).split("\n")[0].split()[:40]) or type(error).__name__
        raise WorkerError(
            f"the scheduler at {address} must be there until the fit ends, and the connection "
            f"to it was lost, with the work under way: {reason}; start it again, and connect to it"
        ) from error
