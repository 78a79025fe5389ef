"""Walking a chunk in tiles small enough for their intermediates to stay in cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from nlsq_dask._typing import Array, Bool, Float, Int, Shape
from nlsq_dask.sources.base import Chunk
from nlsq_dask.sources.windows import MARGIN, Window
from nlsq_dask.terms import RowTerms

__all__ = ["Tile", "choose_tile_shape", "fold_tiles", "sum_tiles", "whole_tile"]

_Total = TypeVar("_Total")
_Carry = TypeVar("_Carry")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Part of a chunk, in float64, with what decides whether a row counts."""

    x: tuple[Float[Array, ...], ...]
    y: Float[Array, ...]
    sigma: Float[Array, ...] | None
    scale: Float[Array, ...]  # √weight / sigma, and zero where no row counts
    cluster: Int[Array, ...] | None
    is_row: Bool[Array, ...]  # weight above zero
    is_wanted: Bool[Array, ...] | None  # real and selected, finite or not; None for all real ones
    is_stray: Bool[Array, ...] | None  # wanted, but of no known group


def choose_tile_shape(shape: Shape, num_rows: int) -> Shape:
    """Split `shape` into nearly equal tiles of about `num_rows` rows, whole trailing axes first.

    The tile is part of the plan: the bits of a sum depend on it.
    """
    tile: list[int] = []
    room = max(num_rows, 1)
    for length in reversed(shape):
        count = math.ceil(length / min(room, length))
        size = math.ceil(length / count)
        if not tile:
            size = min(length, -(-size // 8) * 8)  # whole vector registers
        tile.insert(0, size)
        room = max(room // size, 1)
    return tuple(tile)


def sum_tiles(
    chunk: Chunk,
    tile_shape: Shape,
    terms: RowTerms,
    reduce: Callable[[Tile], _Total],
) -> _Total:
    """``Σ reduce(tile)``, tile after tile in one fixed order."""

    template = jax.eval_shape(lambda: reduce(_first_tile(chunk, tile_shape, terms)))
    zero: _Total = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), template)

    def add(total: _Total, tile: Tile) -> _Total:
        summed: _Total = jax.tree.map(jnp.add, total, reduce(tile))
        return summed

    return fold_tiles(chunk, tile_shape, terms, zero, add)


def fold_tiles(
    chunk: Chunk,
    tile_shape: Shape,
    terms: RowTerms,
    start: _Carry,
    add: Callable[[_Carry, Tile], _Carry],
) -> _Carry:
    """``add(… add(start, tile 0) …, tile n)``.

    The last tile along an axis is moved back to end with the chunk; the rows that it shares with
    the one before have weight zero in it.
    """
    shape = rows_shape(chunk)
    counts = [math.ceil(length / size) for length, size in zip(shape, tile_shape, strict=True)]

    def at(number: Array) -> Tile:
        index = [number] if len(counts) == 1 else jnp.unravel_index(number, counts)
        wanted = [i * size for i, size in zip(index, tile_shape, strict=True)]
        starts = [
            jnp.minimum(start, length - size)
            for start, length, size in zip(wanted, shape, tile_shape, strict=True)
        ]
        return _cut(chunk, starts, wanted, tile_shape, terms)

    def step(number: Array, carry: _Carry) -> _Carry:
        return add(carry, at(number))

    folded: _Carry = lax.fori_loop(0, math.prod(counts), step, start)
    return folded


def _first_tile(chunk: Chunk, tile_shape: Shape, terms: RowTerms) -> Tile:
    zeros = [jnp.zeros((), jnp.int64)] * len(tile_shape)
    return _cut(chunk, zeros, zeros, tile_shape, terms)


def _cut(
    chunk: Chunk,
    starts: Sequence[Array],
    wanted: Sequence[Array],
    tile_shape: Shape,
    terms: RowTerms,
) -> Tile:
    before = chunk.before if isinstance(chunk, Window) else 0

    def cut(array: Array) -> Array:
        sizes = [min(size, have) for size, have in zip(tile_shape, array.shape, strict=True)]
        begin = [
            start + before if have > 1 else jnp.zeros_like(start)
            for start, have in zip(starts, array.shape, strict=True)
        ]
        return lax.dynamic_slice(array, begin, sizes)

    is_real = jnp.ones(tile_shape, bool)
    for axis, (start, first) in enumerate(zip(starts, wanted, strict=True)):
        end = start + tile_shape[axis]
        if chunk.extent is not None:
            end = jnp.minimum(end, chunk.extent[axis])
        row = lax.broadcasted_iota(jnp.int32, tile_shape, axis)
        is_real &= (row >= (first - start).astype(jnp.int32)) & (
            row < (end - start).astype(jnp.int32)
        )
    parts = Chunk(
        x=tuple(cut(column) for column in chunk.x),
        y=cut(chunk.y),
        sigma=None if chunk.sigma is None else cut(chunk.sigma),
        where=None if chunk.where is None else cut(chunk.where),
        cluster=None if chunk.cluster is None else cut(chunk.cluster),
    )
    return build_tile(parts, is_real, terms)


def rows_shape(chunk: Chunk) -> Shape:
    """The lengths of a chunk, its padding included."""
    shape: Shape = chunk.y.shape
    return (shape[0] - MARGIN,) if isinstance(chunk, Window) else shape


def whole_tile(chunk: Chunk, terms: RowTerms) -> Tile:
    """A chunk as one tile."""
    return _first_tile(chunk, chunk.y.shape, terms)


def build_tile(chunk: Chunk, is_real: Bool[Array, ...], terms: RowTerms) -> Tile:
    """Rows with what decides whether, and how much, each counts."""
    is_wanted: Any = is_real
    if chunk.where is not None:
        is_wanted &= chunk.where
    x = tuple(column.astype(jnp.float64) for column in chunk.x)
    y = chunk.y.astype(jnp.float64)
    sigma = None if chunk.sigma is None else chunk.sigma.astype(jnp.float64)
    root: Array = jnp.ones(())
    is_stray = None
    if terms.group_weights is not None:
        weight, is_known = _group_weight(x[0], terms.group_weights)
        root = jnp.sqrt(weight)
        is_stray = is_wanted & ~is_known & jnp.isfinite(x[0])
        is_wanted &= (weight > 0) | ~is_known
        is_wanted &= ~is_stray
    is_row: Array = is_wanted & jnp.isfinite(y)
    for column in (*x, *([] if sigma is None else [sigma])):
        is_row = is_row & jnp.isfinite(column)
    # Infinitely uncertain where no row is. The division comes last, as XLA computes it once for
    # a tile: a mask of its own would have to be widened again for each direction.
    deviation = jnp.where(is_row, 1.0 if sigma is None else sigma, jnp.inf)
    scale = root / deviation
    # A row without weight gets values at which the model is defined: NaN times zero is NaN, and
    # in reverse mode it would be in every parameter's gradient.
    x = tuple(
        jnp.where(_is_used(column, scale != 0), column, value)
        for column, value in zip(x, terms.fill, strict=True)
    )
    return Tile(
        x=x,
        y=y,
        sigma=sigma,
        scale=scale,
        cluster=chunk.cluster,
        is_row=is_row,
        is_wanted=None if chunk.where is None and terms.group_weights is None else is_wanted,
        is_stray=is_stray,
    )


def _is_used(column: Float[Array, ...], is_row: Bool[Array, ...]) -> Bool[Array, ...]:
    """Where a value belongs to a row that counts; a broadcast one may belong to many."""
    axes = [i for i, length in enumerate(column.shape) if length != is_row.shape[i]]
    return jnp.any(is_row, axis=tuple(axes), keepdims=True)


def _group_weight(
    group: Float[Array, ...], weights: Float[Array, " groups"]
) -> tuple[Float[Array, ...], Bool[Array, ...]]:
    """The weight of each group number, and whether it is one."""
    number = jnp.clip(jnp.nan_to_num(group), 0, len(weights) - 1).astype(jnp.int32)
    return jnp.asarray(weights)[number], number == group
