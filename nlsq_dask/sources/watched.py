"""Zarr's arrays as they are read here: their stores watched, and into memory that is at hand.

What fails for a moment is tried again. Zarr takes a chunk that does not exist for one that was
never written, and fills it; that is the format's rule, and who reads sees nothing of it: its key
goes to the reader's log. Decoded into memory that JAX takes as it is, rows are not copied again.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import math
import time
from collections.abc import Iterator
from typing import Any, Self

import xarray as xr
import zarr
from zarr import AsyncArray
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype, NDBuffer, default_buffer_prototype
from zarr.storage import StorePath, WrapperStore

from nlsq_dask.errors import StoreNotFoundError
from nlsq_dask.sources.buffers import lender
from nlsq_dask.sources.retrying import current_log, pauses
from nlsq_dask.sources.staying import can_stay, run_here
from nlsq_dask.sources.straight import checked, straight
from nlsq_dask.sources.transport import (
    comes_at_once,
    is_transient,
    reason_of,
    redacted,
    transport_errors,
    transport_of_store,
)

__all__ = ["WatchedStore", "watched"]

_LOGGER = logging.getLogger("nlsq_dask")

_SIGHT_SECONDS = 1.0  # for which an array that was seen from afar is not looked for again


class WatchedStore(WrapperStore[ZarrStore]):
    """Tries again what the store's own library does not, and logs the keys that are missing.

    Missing they are only where the array is there: of a disk that this machine does not have, or
    of a folder that was moved, nothing is, and all would be fill values.
    """

    def __init__(self, store: ZarrStore, path: str) -> None:
        super().__init__(store)
        self._path = path  # of the array that is read
        self._seen_at = -math.inf

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_seen_at": -math.inf}  # another machine has another clock

    def _with_store(self, store: ZarrStore) -> Self:
        return type(self)(store, self._path)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes of a key, or of a part; None where there is no such key."""
        found = await self._ask(key, prototype, byte_range)
        if found is None:
            await self._require_sight(key, prototype)
            current_log().missing.add(key)
        return found

    async def _ask(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        waits = pauses()
        while True:
            try:
                return await self._store.get(key, prototype, byte_range)
            except transport_errors() as error:
                transport = transport_of_store(self._store)
                wait = next(waits, None) if is_transient(error, transport) else None
                if wait is None:
                    raise
                reason = f"{type(error).__name__}: {reason_of(error)}"
                _LOGGER.info("Reading %r failed (%s); trying again.", key, reason)
            await asyncio.sleep(wait)

    async def _require_sight(self, missing: str, prototype: BufferPrototype) -> None:
        is_far = not comes_at_once(transport_of_store(self._store))
        if is_far and time.monotonic() - self._seen_at < _SIGHT_SECONDS:
            return
        for name, part in _descriptions(self._path):
            found = await self._ask(name, prototype)
            if found is not None and part in found.to_bytes():
                self._seen_at = time.monotonic()
                return
        raise StoreNotFoundError(
            f"`ds` must be there while it is read, and of {self._path!r} of "
            f"{redacted(self._store)} neither {missing!r} is nor what describes the array; see "
            "that every worker has that disk, by the same path, and that nobody moved it"
        )


def _descriptions(path: str) -> Iterator[tuple[str, bytes]]:
    """Keys of what describes an array, and what is in it: its own, or of a group around it."""
    yield from ((f"{path}/{name}".lstrip("/"), b"") for name in ("zarr.json", ".zarray"))
    while path:
        path = path.rpartition("/")[0]
        for name, part in ((".zmetadata", b""), ("zarr.json", b'"consolidated_metadata"')):
            yield f"{path}/{name}".lstrip("/"), part


class LentArray(zarr.Array[Any]):
    """Decodes rectangles into memory of the reader's, where it lends any; near ones by itself."""

    def __getitem__(self, selection: Any) -> Any:
        if not _is_rectangle(selection, self.ndim):
            return super().__getitem__(selection)
        prototype = default_buffer_prototype()
        buffer = self._lent(selection, prototype)
        if comes_at_once(transport_of_store(self.store)) and can_stay():
            # Of slices an orthogonal selection is the basic one, which has no `out` in coroutines.
            read = self._straight.get_orthogonal_selection
            return run_here(read(selection, out=buffer, prototype=prototype))
        return self.get_basic_selection(selection, out=buffer, prototype=prototype)

    @functools.cached_property
    def _straight(self) -> AsyncArray[Any]:
        return straight(self.async_array)

    def _lent(self, selection: tuple[slice, ...], prototype: BufferPrototype) -> NDBuffer | None:
        empty = lender()
        if empty is None or self.dtype.kind not in "iuf":
            return None
        parts = zip(selection, self.shape, strict=True)
        shape = tuple(len(range(*part.indices(length))) for part, length in parts)
        return prototype.nd_buffer.from_numpy_array(empty(shape, self.dtype))


def _is_rectangle(selection: Any, ndim: int) -> bool:
    return (
        isinstance(selection, tuple)
        and len(selection) == ndim > 0
        and all(isinstance(part, slice) for part in selection)
    )


def watched(variable: xr.Variable) -> xr.Variable:
    """The same variable, its store watched where it is one of Zarr's. Nothing is read."""
    watching = _watching(variable._data)
    if watching is None:
        return variable
    return xr.Variable(variable.dims, watching, variable.attrs, variable.encoding)


def _watching(given: Any) -> Any:
    """A copy of xarray's layers around a Zarr array, down to its store; None of other arrays."""
    if hasattr(given, "array"):
        inner = _watching(given.array)
        if inner is None:
            return None
        layer = copy.copy(given)
        layer.array = inner
        return layer
    if not hasattr(given, "_array") or not isinstance(given._array, zarr.Array):
        return None
    array = given._array._async_array
    if isinstance(array.store_path.store, WatchedStore):
        return given
    watching = copy.copy(checked(array))
    path = array.store_path.path
    store = StorePath(WatchedStore(array.store_path.store, path), path)
    object.__setattr__(watching, "store_path", store)  # frozen, as are arrays of Zarr's
    backend = copy.copy(given)
    backend._array = LentArray(watching)
    return backend
