"""Leaves of NumPy arrays, handed over where they lie.

JAX takes an array without a copy where it begins at a multiple of 64 bytes, and a large one of
NumPy's begins 16 bytes after one. So a leaf is handed over from the last such place before it
on, with the number of rows there that are not its own. Kernels cut the same tiles of it as of a
leaf that was copied, to the same bits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from nlsq_dask._typing import Array, Int
from nlsq_dask.sources.base import Chunk, Source, pad_chunk
from nlsq_dask.sources.buffers import ALIGNMENT, BufferPool
from nlsq_dask.sources.columns import MemoryColumn
from nlsq_dask.sources.grid import GridSource

__all__ = ["MARGIN", "Window", "Windows", "windows_of"]

_ITEM_BYTES = 8
MARGIN = ALIGNMENT // _ITEM_BYTES  # values of a window beside those of its leaf
_FEWEST_LEAVES = 4  # the first and the last are copied


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Window(Chunk):
    """A chunk of one axis in arrays that are `MARGIN` longer, `before` of it before the rows."""

    before: Int[Array, ""]


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """The leaves of float64 arrays of one axis that all lie alike, as windows of one shape."""

    source: GridSource
    _pool: BufferPool = field(default_factory=BufferPool)

    def stream(self, leaves: Sequence[int]) -> Generator[tuple[int, Chunk]]:
        """The leaves in order, each with its number."""
        for index in leaves:
            yield index, self.leaf(index)

    def nbytes(self, leaves: Sequence[int]) -> int:
        """Of the rows of some leaves."""
        (length,), (num_rows,) = self.source.leaf_shape, self.source.shape
        rows = sum(min(length, num_rows - index * length) for index in leaves)
        return rows * _ITEM_BYTES * len(self.source.columns)

    def leaf(self, index: int) -> Window:
        """One leaf: a view, or at both ends of the arrays a copy of the same shape."""
        source = self.source
        (length,), (num_rows,) = source.leaf_shape, source.shape
        start = index * length
        place = source.y.read((slice(start, None),)).ctypes.data
        before = place % ALIGNMENT // _ITEM_BYTES
        part = slice(start - before, start - before + length + MARGIN)
        if part.start < 0 or part.stop > num_rows:
            before, chunk = 0, pad_chunk(source.read(index), (length + MARGIN,), self._pool.empty)
        else:
            views = {role: column.read((part,)) for role, column in source.columns.items()}
            extent = np.array([length], np.int64)
            chunk = replace(source.assemble(index, views), extent=extent)
        return Window(**vars(chunk), before=np.array(before, np.int64))


def windows_of(source: Source) -> Windows | None:
    """Windows of a source that has something to gain by them; None of any other."""
    if not isinstance(source, GridSource) or source.num_chunks < _FEWEST_LEAVES:
        return None
    places = set()
    for column in source.columns.values():
        if not isinstance(column, MemoryColumn) or not _is_plain(column.values):
            return None
        places.add(column.values.ctypes.data % ALIGNMENT)
    is_at_hand = places == {0} and source.leaf_shape[0] % MARGIN == 0
    if len(places) > 1 or is_at_hand:
        return None
    return Windows(source=source)


def _is_plain(values: np.ndarray) -> bool:
    return (
        values.ndim == 1
        and values.dtype == np.float64
        and values.dtype.isnative
        and values.flags.c_contiguous
        and values.flags.aligned
    )
