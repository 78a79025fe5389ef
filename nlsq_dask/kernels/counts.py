"""Rows of a tile, counted by what becomes of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from nlsq_dask._typing import Array, Float, Int
from nlsq_dask.kernels.tiles import Tile
from nlsq_dask.normal_equations import RowStatistics
from nlsq_dask.sources.base import Chunk

__all__ = ["ResidualSums", "RowCounts", "count_rows", "sum_residuals"]


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
    """Those of one tile."""

    def count(of: Array) -> Array:
        return jnp.sum(of, dtype=jnp.int32).astype(jnp.int64)

    return RowCounts(
        num_rows=count(tile.is_row),
        num_wanted=None if tile.is_wanted is None else count(tile.is_wanted),
        num_bad_sigma=None if tile.sigma is None else count(tile.is_row & (tile.sigma <= 0)),
        num_stray=None if tile.is_stray is None else count(tile.is_stray),
    )


def _num_real(chunk: Chunk) -> Int[Array, ""]:
    """Rows that a chunk has, without its padding."""
    if chunk.extent is None:
        return jnp.asarray(math.prod(chunk.y.shape), jnp.int64)
    return jnp.prod(jnp.asarray(chunk.extent))
