"""Talking to the scheduler, and what is told where nothing is heard from it any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import CancelledError

import distributed

from nlsq_dask.errors import WorkerError

__all__ = ["in_touch", "is_in_touch"]


_CLOSED = ("closing", "closed")
# What a client raises of itself while it gives up and closes what others are still using.
_OF_CLOSED_CLIENTS: tuple[type[Exception], ...] = (
    RuntimeError,
    AttributeError,
    *(kind for name, kind in vars(distributed.client).items() if name == "ClosedClientError"),
)  # the last not in all versions


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
    if client.status in _CLOSED:
        raise WorkerError(
            f"`client` must be connected to a scheduler, got one that is {client.status}"
        )
    address = client.scheduler.address
    try:
        yield
    except WorkerError:
        raise
    except (OSError, CancelledError) as error:
        raise _lost(address, error) from error
    except _OF_CLOSED_CLIENTS as error:
        if client.status not in _CLOSED:
            raise
        raise _lost(address, error) from error


def _lost(address: str, error: Exception) -> WorkerError:
    reason = str(error).split("\n")[0] or type(error).__name__
    return WorkerError(
        f"the scheduler at {address} must be there until the fit ends, and the connection "
        f"to it was lost, with the work under way: {reason}; start it again, and connect to it"
    )
