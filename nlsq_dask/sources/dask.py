"""Dask arrays as columns. Beside the cluster evaluator, the only place that knows Dask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import dask
import dask.array as da
import numpy as np

from nlsq_dask._typing import Index, Shape

__all__ = ["DaskColumn", "is_dask_array"]


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

    def read(self, index: Index) -> np.ndarray:
        """Compute a rectangle here, in the calling thread."""
        with dask.config.set(scheduler="synchronous"):
            return np.asarray(self.array[index].compute())


def is_dask_array(value: object) -> TypeGuard[Any]:
    return isinstance(value, da.Array)


def require_known_chunks(name: str, array: Any) -> None:
    """Refuse an array whose length Dask does not know.

    Raises
    ------
    ValueError
        With the call that computes the sizes.
    """
    if any(np.isnan(size) for size in array.shape):
        raise ValueError(
            f"`{name}` must have known chunk sizes, got shape {array.shape}; "
            f"call `{name}.compute_chunk_sizes()` first"
        )
