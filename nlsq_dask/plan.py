"""How the rows are cut, and what that costs in memory, before the first pass.

Leaves and tiles depend on shapes, the store's grid, the number of parameters and the
configuration alone: never on workers or memory, because the bits of the answer follow them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nlsq_dask._typing import Shape
from nlsq_dask.errors import MemoryProjectionError
from nlsq_dask.kernels.products import Way
from nlsq_dask.kernels.tiles import choose_tile_shape
from nlsq_dask.sources.base import Source
from nlsq_dask.sources.grid import GridSource

__all__ = [
    "MemoryProjection",
    "Plan",
    "Strategy",
    "choose_leaf_shape",
    "choose_strategy",
    "choose_tile_rows",
    "plan_chunks",
    "plan_leaves",
    "slab_axis",
    "slab_shape",
]

_MIN_LEAF_ROWS = 2**16
_MAX_LEAF_ROWS = 2**20
_TILE_BYTES = 2**19  # of Jacobian, which stays in the second-level cache, up to 63 parameters
_MAX_TILE_ROWS = 2**13
_LANE_BLOCK = 2**10  # rows that sums in lanes take at a time
_MOST_IN_A_SWEEP = 8
_ACCELERATOR_TILE_ROWS = 2**17
_MOST_IN_LANES = 16  # parameters; beyond, a matrix product is as fast
_REVERSE_TILE_BYTES = 2**23  # of the model's largest array
_MIN_REVERSE_TILE_ROWS = 64
# Measured: what the first compilation of a kernel leaves behind in a process.
_COMPILATION_BYTES = 320 * 2**20


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How kernels go over the rows of a leaf."""

    tile_rows: int
    products: Way = "lanes"
    is_matrix_free: bool = False  # no array of k x k elements, from many parameters on
    num_shards: int = 1  # slabs of a leaf, for the devices of a process to share


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cut of the rows into leaves, slabs and tiles. The same plan gives the same bits."""

    num_rows: int
    num_leaves: int
    leaf_shape: Shape
    tile_shape: Shape
    leaf_bytes: int
    strategy: Strategy

    @property
    def is_matrix_free(self) -> bool:
        return self.strategy.is_matrix_free

    @property
    def num_shards(self) -> int:
        return self.strategy.num_shards


@dataclass(frozen=True, kw_only=True)
class MemoryProjection:
    """Bytes that one process is expected to need at most."""

    base_bytes: int
    leaf_bytes: int  # of the one that is computed
    reading_bytes: int  # of those to come
    kernel_bytes: int  # for all slabs of a leaf
    num_threads: int
    held_bytes: int  # of chunks of the store that are longer than a leaf, for all threads
    cache_bytes: int

    @property
    def task_bytes(self) -> int:
        return self.leaf_bytes + self.reading_bytes + self.kernel_bytes

    @property
    def total_bytes(self) -> int:
        tasks = self.num_threads * self.task_bytes
        return self._apart_from_tasks + tasks

    @property
    def _apart_from_tasks(self) -> int:
        return self.base_bytes + _COMPILATION_BYTES + self.held_bytes + self.cache_bytes

    def require_within(self, limit_bytes: int | None, leaf_rows: int) -> None:
        """Refuse a plan that does not fit.

        Raises
        ------
        MemoryProjectionError
            With the number of rows at a time that would.
        """
        if limit_bytes is None or self.total_bytes <= limit_bytes:
            return
        room = limit_bytes - self._apart_from_tasks
        # A kernel needs it by tiles, which are no smaller in a smaller leaf.
        room = room // self.num_threads - self.kernel_bytes
        rows = int(leaf_rows * max(room, 0) / (self.leaf_bytes + self.reading_bytes))
        remedy = (
            f"use `chunk_size` <= {rows:,}"
            if rows >= 1
            else "give the workers more memory, or fewer threads each"
        )
        if self.held_bytes > self.num_threads * self.task_bytes:
            held = f"{self.held_bytes / 2**20:,.0f} MiB"
            remedy += f"; {held} of it are whole chunks of the store, of which a leaf is a part"
        raise MemoryProjectionError(
            f"a worker needs {self.total_bytes / 2**20:,.0f} MiB for {self.num_threads} thread(s) "
            f"of {leaf_rows:,} rows at a time, but is limited to {limit_bytes / 2**20:,.0f} MiB; "
            f"{remedy}"
        )


def choose_leaf_shape(shape: Shape, unit: Shape | None, chunk_size: int | None) -> Shape:
    """A multiple of the store's own blocks, of about a million rows, or of `chunk_size` at most.

    Trailing dimensions are filled first, so that a leaf is read in long runs. A block larger
    than `chunk_size` is divided, and its parts are read one after the other.
    """
    rows = math.prod(shape)
    limit = min(max(rows // 64, _MIN_LEAF_ROWS), _MAX_LEAF_ROWS)
    limit = limit if chunk_size is None else min(limit, chunk_size)
    leaf = [1] * len(shape) if unit is None else [min(p) for p in zip(unit, shape, strict=True)]
    leaf = _divide(leaf, limit if unit is None or chunk_size is not None else math.prod(leaf))
    for axis in reversed(range(len(shape))):
        factor = limit // math.prod(leaf)
        if factor > 1:
            leaf[axis] = min(leaf[axis] * factor, shape[axis])
        if leaf[axis] < shape[axis]:
            break
    return tuple(leaf)


def _divide(leaf: list[int], limit: int) -> list[int]:
    """Shrink leading axes, by whole divisors of the block where there is one."""
    leaf = list(leaf)
    for axis, length in enumerate(leaf):
        excess = math.ceil(math.prod(leaf) / limit)
        if excess <= 1:
            break
        parts = next((d for d in range(excess, length + 1) if length % d == 0), length)
        leaf[axis] = length // parts
    return leaf


def choose_tile_rows(num_free: int) -> int:
    """Rows for which the Jacobian of a tile stays in cache; at least as many as lanes take."""
    fitting = _TILE_BYTES // (8 * (num_free + 1))
    fitting -= fitting % _LANE_BLOCK
    return max(_LANE_BLOCK, min(_MAX_TILE_ROWS, fitting))


def choose_strategy(
    num_free: int,
    elements_per_row: int | None = None,
    *,
    num_shards: int = 1,
    platform: str = "cpu",
) -> Strategy:
    """Tiles that stay in cache: the Jacobian of one, or what reverse mode keeps of one.

    Parameters
    ----------
    num_free : int
    elements_per_row : int, optional
        Of the model's largest array; given where no Jacobian is to be formed.
    num_shards : int
    platform : str
        What JAX calls the devices that compute on the rows. On a GPU, tiles of a Jacobian are
        for memory, not for cache: a whole leaf where none is kept.
    """
    if elements_per_row is None and platform != "cpu":
        is_few = num_free <= _MOST_IN_A_SWEEP
        return Strategy(
            tile_rows=_MAX_LEAF_ROWS if is_few else _ACCELERATOR_TILE_ROWS,
            products="sweep" if is_few else "dot",
            num_shards=num_shards,
        )
    if elements_per_row is None:
        return Strategy(
            tile_rows=choose_tile_rows(num_free),
            products="lanes" if num_free <= _MOST_IN_LANES else "dot",
            num_shards=num_shards,
        )
    fitting = _REVERSE_TILE_BYTES // (8 * elements_per_row)
    return Strategy(
        tile_rows=max(_MIN_REVERSE_TILE_ROWS, min(_MAX_TILE_ROWS, fitting)),
        is_matrix_free=True,
        num_shards=num_shards,
    )


def slab_axis(shape: Shape, num_shards: int) -> int:
    """The axis along which a leaf is cut into slabs: the first that is long enough."""
    longest = max(range(len(shape)), key=lambda axis: shape[axis], default=0)
    return next((axis for axis, length in enumerate(shape) if length >= num_shards), longest)


def slab_shape(shape: Shape, num_shards: int) -> Shape:
    """The part of a leaf that one device computes on."""
    if num_shards == 1:
        return shape
    cut = slab_axis(shape, num_shards)
    return tuple(
        math.ceil(length / num_shards) if axis == cut else length
        for axis, length in enumerate(shape)
    )


def plan_leaves(
    source: GridSource, strategy: Strategy, chunk_size: int | None
) -> tuple[Plan, GridSource]:
    """Cut a dataset into leaves of the store's grid, and those into slabs and tiles."""
    unit = source.y.chunks
    if unit is None:
        unit = next(
            (c.chunks for c in source.columns.values() if c.dims == source.dims and c.chunks), None
        )
    leaf_shape = choose_leaf_shape(source.shape, unit, chunk_size)
    cut = replace(source, leaf_shape=leaf_shape)
    chunk_shape = cut.chunk_shape
    lengths = dict(zip(cut.dims, chunk_shape, strict=True))
    leaf_bytes = sum(
        math.prod(lengths[dim] for dim in column.dims) * _held_bytes(role, column.dtype.itemsize)
        for role, column in cut.columns.items()
    )
    plan = Plan(
        num_rows=cut.num_rows,
        num_leaves=cut.num_chunks,
        leaf_shape=chunk_shape,
        tile_shape=_tile_shape(chunk_shape, strategy),
        leaf_bytes=leaf_bytes,
        strategy=strategy,
    )
    return plan, cut


def plan_chunks(source: Source, strategy: Strategy) -> Plan:
    """Take a source's own chunks as leaves."""
    shape = tuple(source.chunk_shape)
    return Plan(
        num_rows=source.num_rows,
        num_leaves=source.num_chunks,
        leaf_shape=shape,
        tile_shape=_tile_shape(shape, strategy),
        leaf_bytes=8 * math.prod(shape) * (len(source.variables) + 2),
        strategy=strategy,
    )


def _tile_shape(leaf_shape: Shape, strategy: Strategy) -> Shape:
    return choose_tile_shape(slab_shape(leaf_shape, strategy.num_shards), strategy.tile_rows)


def _held_bytes(role: str, itemsize: int) -> int:
    return 1 if role == "where" else max(itemsize, 4)
