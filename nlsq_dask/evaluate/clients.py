"""The client of a cluster, if there is one, without loading Dask where there is none."""

from __future__ import annotations

import sys
from typing import Any

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


def require_client(client: object) -> None:
    """Refuse what is not a client, an address for instance."""
    distributed = sys.modules.get("distributed")
    if client is None or (distributed is not None and isinstance(client, distributed.Client)):
        return
    raise TypeError(
        f"`client` must be a distributed.Client, got {shown(client)}; "
        "connect first: `client = distributed.Client(address)`"
    )
