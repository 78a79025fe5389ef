"""Rows of a tile, counted by what becomes of them."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from nlsq_dask._typing import Array, Bool, Float, Int
from nlsq_dask.kernels.products import LANES
from nlsq_dask.kernels.tiles import Tile
from nlsq_dask.normal_equations import RowStatistics
from nlsq_dask.sources.base import Chunk
from nlsq_dask.terms import RowTerms

__all__ = [
    "Counted",
    "ResidualSums",
    "count_rows",
    "counted_rows",
    "num_lanes",
    "row_statistics",
    "sum_residuals",
]

Counted: TypeAlias = Literal["rows", "bad_sigma", "wanted", "stray"]

_LANES = 1024  # at least; and whole lines of what products are summed in
_BAD = 2**7  # that a row adds beside its 1, in 16 bits, where its sigma is refused


def counted_rows(chunk: Chunk, terms: RowTerms) -> tuple[Counted, ...]:
    """What has to be counted row by row; what else is asked for can be told from that."""
    has_groups = terms.group_weights is not None
    counted: list[Counted] = ["rows"]
    if chunk.sigma is not None:
        counted.append("bad_sigma")
    if chunk.where is not None or has_groups:
        counted.append("wanted")
    if has_groups:
        counted.append("stray")
    return tuple(counted)


def num_lanes(num_rows: int) -> int:
    """Lanes for a tile: so many that the rows of one add up to less than `_BAD`."""
    least = -(-num_rows // (_BAD - 1))
    return max(_LANES, -(-least // LANES) * LANES)


def count_rows(tile: Tile) -> Float[Array, "counted lanes"]:
    """Counts of one tile, in lanes: as float64, to be added up with all that is."""
    is_row = tile.scale != 0
    code = is_row.astype(jnp.int16)
    if tile.sigma is not None:
        is_bad = (tile.scale < 0) | jnp.isinf(tile.scale)  # sigma is negative, or zero
        code = jnp.where(is_bad, 1 + _BAD, code)
    each = _in_lanes(code)
    lines = [each] if tile.sigma is None else [each % _BAD, each // _BAD]
    masks = (mask for mask in (tile.is_wanted, tile.is_stray) if mask is not None)
    lines.extend(map(_in_lanes, masks))
    return jnp.stack(lines).astype(jnp.float64)


def row_statistics(
    counted: tuple[Counted, ...],
    counts: Float[Array, " counted"],
    num_real: Int[Array, ""] | int,
    residual_sum: Float[Array, ""],
    residual_square: Float[Array, ""],
) -> RowStatistics:
    """Of a chunk with so many rows, from the counts of all its tiles."""
    by_name: dict[str, Any] = dict(zip(counted, counts.astype("int64"), strict=True))
    num_rows = by_name["rows"]
    return RowStatistics(
        num_masked=num_real - num_rows,
        num_invalid=by_name.get("wanted", num_real) - num_rows,
        num_bad_sigma=by_name.get("bad_sigma", 0 * num_rows),
        num_stray=by_name.get("stray", 0 * num_rows),
        residual_sum=residual_sum,
        residual_square=residual_square,
    )


class ResidualSums(NamedTuple):
    """Counts of rows, and moments of their residuals. Additive."""

    counts: Float[Array, " counted"]
    first: Float[Array, ""]
    second: Float[Array, ""]

    def statistics(self, chunk: Chunk, terms: RowTerms) -> RowStatistics:
        """Of a chunk over all of whose tiles this is the sum."""
        num_real: Any = math.prod(chunk.y.shape)
        if chunk.extent is not None:
            num_real = jnp.prod(jnp.asarray(chunk.extent))
        return row_statistics(
            counted_rows(chunk, terms),
            self.counts,
            num_real,
            self.first,
            self.second,
        )


def sum_residuals(tile: Tile, residual: Float[Array, ...]) -> ResidualSums:
    """Those of one tile."""
    counts = jnp.sum(count_rows(tile), axis=-1)
    first, second = jnp.sum(residual), jnp.sum(residual**2)
    return ResidualSums(counts, first.astype(jnp.float64), second.astype(jnp.float64))


def _in_lanes(of: Int[Array, ...] | Bool[Array, ...]) -> Int[Array, " lanes"]:
    """XLA adds lanes as vectors: the sum of a flat array is one addition after another."""
    flat = of.astype(jnp.int16).ravel()
    lanes = num_lanes(len(flat))
    padded = jnp.pad(flat, (0, -len(flat) % lanes))
    return jnp.sum(padded.reshape(-1, lanes), axis=0, dtype=jnp.int16)
