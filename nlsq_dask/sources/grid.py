"""Columns put together into rows: one index space, cut into leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nlsq_dask._typing import Index, Shape
from nlsq_dask.sources.base import Chunk, Column, Source, plain_block

__all__ = ["GridSource", "RemoteColumn", "is_in_memory"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RemoteColumn:
    """What is left of a column whose blocks arrive with each task instead of being read."""

    dims: tuple[str, ...]
    shape: Shape
    dtype: np.dtype
    is_in_memory: bool = False
    chunks: Shape | None = None

    def read(self, index: Index) -> np.ndarray:
        raise RuntimeError("the blocks of a remote column come with the task")


@dataclass(frozen=True, kw_only=True, eq=False)
class GridSource:
    """Rows over the dimensions of `y`; every other column broadcasts by dimension name.

    A leaf is a rectangle of `leaf_shape`, the last along each dimension possibly smaller.
    Only a column's own part of the rectangle is read, and nothing is expanded.
    """

    variables: tuple[str, ...]
    x: tuple[Column, ...]
    y: Column
    sigma: Column | None = None
    where: Column | None = None
    cluster: Column | None = None
    leaf_shape: Shape = ()

    @property
    def dims(self) -> tuple[str, ...]:
        return self.y.dims

    @property
    def shape(self) -> Shape:
        return self.y.shape

    @property
    def columns(self) -> dict[str, Column]:
        """Every column under the name of its role."""
        named: dict[str, Column | None] = {f"x{i}": column for i, column in enumerate(self.x)}
        named |= {"y": self.y, "sigma": self.sigma, "where": self.where, "cluster": self.cluster}
        return {role: column for role, column in named.items() if column is not None}

    @property
    def grid(self) -> Shape:
        """Leaves along each dimension."""
        return tuple(
            math.ceil(length / leaf)
            for length, leaf in zip(self.shape, self.leaf_shape, strict=True)
        )

    @property
    def num_chunks(self) -> int:
        return math.prod(self.grid)

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape)

    @property
    def chunk_shape(self) -> Shape:
        return tuple(min(pair) for pair in zip(self.leaf_shape, self.shape, strict=True))

    def region(self, index: int) -> dict[str, slice]:
        """The rectangle of a leaf, by dimension."""
        position = np.unravel_index(index, self.grid)
        return {
            dim: slice(int(i) * leaf, min((int(i) + 1) * leaf, length))
            for dim, i, leaf, length in zip(
                self.dims, position, self.leaf_shape, self.shape, strict=True
            )
        }

    def read(self, index: int) -> Chunk:
        return self.assemble(index, {})

    def assemble(self, index: int, blocks: Mapping[str, np.ndarray]) -> Chunk:
        """The leaf, of `blocks` that are already here, by role, and of columns read now."""
        region = self.region(index)
        parts = {
            role: self._align(
                column,
                plain_block(blocks[role], column.dtype)
                if role in blocks
                else column.read(tuple(region[dim] for dim in column.dims)),
            )
            for role, column in self.columns.items()
        }
        where = parts.get("where")
        return Chunk(
            x=tuple(as_floating(parts[f"x{i}"]) for i in range(len(self.x))),
            y=as_floating(parts["y"]),
            sigma=as_floating(parts["sigma"]) if "sigma" in parts else None,
            where=None if where is None else where.astype(bool),
            cluster=parts["cluster"].astype(np.int32) if "cluster" in parts else None,
        )

    def _align(self, column: Column, block: np.ndarray) -> np.ndarray:
        """Transpose to the order of `y`, with a length of one for each missing dimension."""
        order = sorted(range(block.ndim), key=lambda axis: self.dims.index(column.dims[axis]))
        lengths = dict(zip(column.dims, block.shape, strict=True))
        shape = tuple(lengths.get(dim, 1) for dim in self.dims)
        return np.ascontiguousarray(np.transpose(block, order).reshape(shape))

    def with_columns(self, columns: Mapping[str, Column]) -> GridSource:
        """The same rows with some columns replaced, by role."""
        return replace(
            self,
            x=tuple(columns.get(f"x{i}", column) for i, column in enumerate(self.x)),
            y=columns.get("y", self.y),
            sigma=columns.get("sigma", self.sigma),
            where=columns.get("where", self.where),
            cluster=columns.get("cluster", self.cluster),
        )


def is_in_memory(source: Source) -> bool:
    """Whether all columns are arrays of this process."""
    return isinstance(source, GridSource) and all(
        column.is_in_memory for column in source.columns.values()
    )


def as_floating(values: np.ndarray) -> np.ndarray:
    """float32 and float64 as they are, everything else as float64."""
    kept = values.dtype in (np.dtype(np.float32), np.dtype(np.float64))
    if kept and values.dtype.isnative:
        return values
    with np.errstate(over="ignore"):  # of longer floats, to infinity, which is left out
        return values.astype(np.float64)
