"""The client of a cluster, if there is one, without loading Dask where there is none."""

from __future__ import annotations

import sys
from typing import Any

from nlsq_dask.errors import WorkerError
from nlsq_dask.require import shown

__all__ = ["active_client", "require_client"]


def active_client() -> Any:
    """The client that this thread would use; None if there is none."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.get_client()
    except ValueError:
        return None


def require_client(client: Any) -> None:
    """Refuse what is not a client, an address for instance, or is closed.

    Raises
    ------
    TypeError
    WorkerError
        If it is closed.
    """
    if client is None:
        return
    distributed = sys.modules.get("distributed")
    if distributed is not None and isinstance(client, distributed.Client):
        if client.status in ("closing", "closed"):
            raise WorkerError("`client` must be connected to a scheduler, got one that is closed")
        return
    raise TypeError(
        f"`client` must be a distributed.Client, got {shown(client)}; "
        "connect first: `client = distributed.Client(address)`"
    )
