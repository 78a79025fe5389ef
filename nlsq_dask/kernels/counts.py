"""Rows of a tile, counted by what becomes of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from nlsq_dask._typing import Array, Bool, Float, Int
from nlsq_dask.kernels.tiles import Tile
from nlsq_dask.normal_equations import RowStatistics
from nlsq_dask.sources.base import Chunk

__all__ = ["ResidualSums", "RowCounts", "count_rows", "sum_residuals"]

_LANES = 1024
_BAD = 2**7  # that a row adds beside its 1, in 16 bits, where its sigma is refused


class RowCounts(NamedTuple):
    """What has to be counted row by row, and None of what does not. Additive."""

    num_rows: Int[Array, ""]
    num_wanted: Int[Array, ""] | None  # None: all rows that the chunk has
    num_bad_sigma: Int[Array, ""] | None
    num_stray: Int[Array, ""] | None

    def statistics(
        self, chunk: Chunk, residual_sum: Float[Array, ""], residual_square: Float[Array, ""]
    ) -> RowStatistics:
        """Of a chunk over all of whose tiles this is the sum."""
        real, zero = _num_real(chunk), jnp.zeros((), jnp.int64)
        wanted = real if self.num_wanted is None else self.num_wanted
        return RowStatistics(
            num_masked=real - self.num_rows,
            num_invalid=wanted - self.num_rows,
            num_bad_sigma=zero if self.num_bad_sigma is None else self.num_bad_sigma,
            num_stray=zero if self.num_stray is None else self.num_stray,
            residual_sum=residual_sum.astype(jnp.float64),
            residual_square=residual_square.astype(jnp.float64),
        )


class ResidualSums(NamedTuple):
    """Counts of rows, and moments of their residuals. Additive."""

    counts: RowCounts
    first: Float[Array, ""]
    second: Float[Array, ""]

    def statistics(self, chunk: Chunk) -> RowStatistics:
        """Of a chunk over all of whose tiles this is the sum."""
        return self.counts.statistics(chunk, self.first, self.second)


def sum_residuals(tile: Tile, residual: Float[Array, ...]) -> ResidualSums:
    """Those of one tile."""
    return ResidualSums(count_rows(tile), jnp.sum(residual), jnp.sum(residual**2))


def count_rows(tile: Tile) -> RowCounts:
    """Those of one tile: what is counted by one array comes of one sum."""
    is_row = tile.scale != 0
    code = is_row.astype(jnp.int16)
    if tile.sigma is not None:
        is_bad = (tile.scale < 0) | jnp.isinf(tile.scale)  # sigma is negative, or zero
        code = jnp.where(is_bad, 1 + _BAD, code)
    num_rows, num_bad = _count_codes(code)
    return RowCounts(
        num_rows=num_rows,
        num_wanted=None if tile.is_wanted is None else _count(tile.is_wanted),
        num_bad_sigma=None if tile.sigma is None else num_bad,
        num_stray=None if tile.is_stray is None else _count(tile.is_stray),
    )


def _count(of: Bool[Array, ...]) -> Int[Array, ""]:
    return _count_codes(of.astype(jnp.int16))[0]


def _count_codes(code: Int[Array, ...]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many are not zero, and how many of these are more than 1.

    In lanes, which XLA adds as vectors: the sum of a flat array is one addition after another.
    """
    flat = code.ravel()
    lanes = max(_LANES, -(-len(flat) // (_BAD - 1)))  # rows that add up to less than `_BAD`
    whole = len(flat) - len(flat) % lanes
    sums = jnp.sum(flat[:whole].reshape(-1, lanes), axis=0, dtype=jnp.int16)
    each = jnp.concatenate([sums, flat[whole:]]).astype(jnp.int32)
    return (
        jnp.sum(each % _BAD, dtype=jnp.int32).astype(jnp.int64),
        jnp.sum(each // _BAD, dtype=jnp.int32).astype(jnp.int64),
    )


def _num_real(chunk: Chunk) -> Int[Array, ""]:
    """Rows that a chunk has, without its padding."""
    if chunk.extent is None:
        return jnp.asarray(math.prod(chunk.y.shape), jnp.int64)
    return jnp.prod(jnp.asarray(chunk.extent))
