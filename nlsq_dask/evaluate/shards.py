"""A leaf cut into slabs, one for each device of a process.

How many is part of the plan, so that the sums have the same bits on one device as on many.
"""

from __future__ import annotations

import math

import numpy as np

from nlsq_dask._typing import Array, Int
from nlsq_dask.plan import slab_axis
from nlsq_dask.sources.base import Chunk

__all__ = ["cut_slabs"]


def cut_slabs(chunk: Chunk, num_shards: int) -> list[Chunk]:
    """Slabs of one shape: the last ones may be padded, or all padding."""
    if num_shards == 1:
        return [chunk]
    shape = chunk.y.shape
    axis = slab_axis(shape, num_shards)
    length = math.ceil(shape[axis] / num_shards)
    extent = np.asarray(shape if chunk.extent is None else chunk.extent, np.int64)
    starts = range(0, num_shards * length, length)
    return [_slab(chunk, axis, start, length, extent) for start in starts]


def _slab(
    chunk: Chunk, axis: int, start: int, length: int, extent: Int[np.ndarray, " axes"]
) -> Chunk:
    whole = chunk.y.shape[axis]
    rows = np.minimum(np.arange(start, start + length), whole - 1)
    is_inside = start + length <= whole

    def cut(array: Array) -> Array:
        if array.shape[axis] != whole:  # broadcast along it
            return array
        index = slice(start, start + length) if is_inside else rows
        return array[(slice(None),) * axis + (index,)]

    inside = extent.copy()
    inside[axis] = np.clip(extent[axis] - start, 0, length)
    return Chunk(
        x=tuple(cut(column) for column in chunk.x),
        y=cut(chunk.y),
        sigma=None if chunk.sigma is None else cut(chunk.sigma),
        where=None if chunk.where is None else cut(chunk.where),
        cluster=None if chunk.cluster is None else cut(chunk.cluster),
        extent=inside,
    )
