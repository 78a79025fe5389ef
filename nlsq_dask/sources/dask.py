"""Dask arrays as columns."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from nlsq_dask._typing import Index, Shape
from nlsq_dask.sources.base import plain_block

__all__ = ["DaskColumn", "is_dask_array", "require_plain_blocks"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DaskColumn:
    """A Dask array: an arbitrary graph, computed block by block where the rows are needed."""

    array: Any  # dask.array.Array
    dims: tuple[str, ...]
    is_in_memory: bool = False

    @property
    def shape(self) -> Shape:
        shape: Shape = self.array.shape
        return shape

    @property
    def dtype(self) -> np.dtype:
        dtype: np.dtype = self.array.dtype
        return dtype

    @property
    def chunks(self) -> Shape | None:
        return tuple(max(sizes) for sizes in self.array.chunks)

    @functools.cached_property
    def _is_persisted(self) -> bool:
        """Whether blocks are in the memory of a cluster, of which this process has promises."""
        import distributed  # loaded where it is needed: it takes its time

        return bool(distributed.futures_of(self.array))

    def read(self, index: Index) -> np.ndarray:
        """Compute a rectangle here, in the calling thread; or where its blocks are."""
        part = self.array[index]
        if self._is_persisted:
            import distributed

            client = distributed.futures_of(part)[0].client
            return plain_block(client.compute(part).result(), self.dtype)
        return plain_block(part.compute(scheduler="synchronous"), self.dtype)


def is_dask_array(value: object) -> TypeGuard[Any]:
    dask_array = sys.modules.get("dask.array")  # without which there are none
    return dask_array is not None and isinstance(value, dask_array.Array)


def require_plain_blocks(name: str, array: Any) -> None:
    """Refuse an array whose length Dask does not know, or whose blocks are not NumPy's.

    Raises
    ------
    ValueError
        With the call that helps.
    """
    block = array._meta
    if type(block) is not np.ndarray:
        remedy = "fill them by `dask.array.ma.filled` with NaN, which is left out"
        if not isinstance(block, np.ma.MaskedArray):
            remedy = f"convert them: `{name}.map_blocks(numpy.asarray)`"
        raise ValueError(
            f"`{name}` must have blocks that are plain arrays of NumPy, got "
            f"{type(block).__module__}.{type(block).__name__}; {remedy}"
        )
    if any(np.isnan(size) for size in array.shape):
        raise ValueError(
            f"`{name}` must have known chunk sizes, got shape {array.shape}; "
            f"call `{name}.compute_chunk_sizes()` first"
        )
