"""Leaves of NumPy arrays, handed over where they lie.

JAX takes an array without a copy where it begins at a multiple of 64 bytes, and a large one of
NumPy's begins 16 bytes after one. So a leaf is handed over from the last such place before it
on, with the number of rows there that are not its own. Kernels cut the same tiles of it as of a
leaf that was copied, to the same bits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

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
    columns: dict[str, np.ndarray]  # by role
    _pool: BufferPool = field(default_factory=BufferPool)

    def stream(self, leaves: Sequence[int]) -> Generator[tuple[int, Chunk]]:
        """The leaves in order, each with its number."""
        for index in leaves:
            yield index, self.leaf(index)

    def nbytes(self, leaves: Sequence[int]) -> int:
        """Of the rows of some leaves."""
        (length,), (num_rows,) = self.source.leaf_shape, self.source.shape
        rows = sum(min(length, num_rows - index * length) for index in leaves)
        return rows * _ITEM_BYTES * len(self.columns)

    def leaf(self, index: int) -> Window:
        """One leaf: a view, or at both ends of the arrays a copy of the same shape."""
        (length,), (num_rows,) = self.source.leaf_shape, self.source.shape
        start = index * length
        before = _before(self.columns["y"], start)
        first, end = start - before, start - before + length + MARGIN
        if first < 0 or end > num_rows:
            chunk = pad_chunk(self.source.read(index), (length + MARGIN,), self._pool.empty)
            return Window(**_parts(chunk), before=np.zeros((), np.int64))
        view = Chunk(
            x=tuple(self.columns[f"x{i}"][first:end] for i in range(len(self.source.x))),
            y=self.columns["y"][first:end],
            sigma=self.columns["sigma"][first:end] if "sigma" in self.columns else None,
            extent=np.array([length], np.int64),
        )
        return Window(**_parts(view), before=np.array(before, np.int64))


def windows_of(source: Source) -> Windows | None:
    """Windows of a source that has something to gain by them; None of any other."""
    if not isinstance(source, GridSource) or source.num_chunks < _FEWEST_LEAVES:
        return None
    columns = {}
    for role, column in source.columns.items():
        if not isinstance(column, MemoryColumn) or not _is_plain(column.values):
            return None
        columns[role] = column.values
    places = {values.ctypes.data % ALIGNMENT for values in columns.values()}
    is_at_hand = places == {0} and source.leaf_shape[0] % MARGIN == 0
    if len(places) > 1 or is_at_hand:
        return None
    return Windows(source=source, columns=columns)


def _is_plain(values: np.ndarray) -> bool:
    return (
        values.ndim == 1
        and values.dtype == np.float64
        and values.dtype.isnative
        and values.flags.c_contiguous
        and values.flags.aligned
    )


def _before(values: np.ndarray, start: int) -> int:
    """Values between the last aligned place and this one."""
    place: int = values.ctypes.data + _ITEM_BYTES * start
    return place % ALIGNMENT // _ITEM_BYTES


def _parts(chunk: Chunk) -> dict[str, Any]:
    return {part.name: getattr(chunk, part.name) for part in fields(chunk)}
