"""What a scheduler does when a client is gone that did not close its fit.

Its tasks the scheduler forgets by itself. The module travels by value: only workers must have
this package.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import cloudpickle
import distributed
from distributed.diagnostics.plugin import SchedulerPlugin

from nlsq_dask.by_value import module_by_value

__all__ = ["end_with_client"]


class _Departure(SchedulerPlugin):
    """Takes the settings of a fit, and with them its problem, from the workers."""

    def __init__(self, client_id: str, name: str) -> None:
        self._client_id = client_id
        self._name = name

    def remove_client(self, scheduler: Any, client: str) -> None:
        if client == self._client_id:
            scheduler.loop.add_callback(self._end, scheduler)

    async def _end(self, scheduler: Any) -> None:
        with contextlib.suppress(ValueError):  # it was closed after all
            scheduler.remove_plugin(self._name)
        with contextlib.suppress(ValueError, OSError):  # or a worker left at the same moment
            await scheduler.unregister_worker_plugin(None, self._name)


class _Sent(SchedulerPlugin):
    """Arrives as what was pickled before: the client's own thread pickles it at some time."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def __reduce__(self) -> tuple[Any, ...]:
        return cloudpickle.loads, (self._payload,)


def end_with_client(client: distributed.Client, name: str) -> None:
    """Have the scheduler unregister the worker plugin `name` when the client is gone.

    Raises
    ------
    OSError
        If the scheduler does not answer.
    """
    with module_by_value(sys.modules[__name__]):
        payload = cloudpickle.dumps(_Departure(client.id, name))
    # A scheduler may be set not to unpickle anything; it keeps the problem, then.
    with contextlib.suppress(ValueError):
        client.register_plugin(_Sent(payload), name=name)
