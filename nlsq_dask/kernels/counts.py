"""Rows of a tile, counted by what becomes of them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from nlsq_dask._typing import Array, Float, Int
from nlsq_dask.kernels.tiles import Tile
from nlsq_dask.normal_equations import RowStatistics

__all__ = ["RowCounts", "count_rows", "row_statistics"]


class RowCounts(NamedTuple):
    """What the statistics of rows are made of. Additive."""

    num_rows: Int[Array, ""]
    num_real: Int[Array, ""]
    num_wanted: Int[Array, ""]
    num_bad_sigma: Int[Array, ""]
    num_stray: Int[Array, ""]

    def statistics(
        self, residual_sum: Float[Array, ""], residual_square: Float[Array, ""]
    ) -> RowStatistics:
        return RowStatistics(
            num_masked=self.num_real - self.num_rows,
            num_invalid=self.num_wanted - self.num_rows,
            num_bad_sigma=self.num_bad_sigma,
            num_stray=self.num_stray,
            residual_sum=residual_sum.astype(jnp.float64),
            residual_square=residual_square.astype(jnp.float64),
        )


def count_rows(tile: Tile) -> RowCounts:
    """Only what has to be counted row by row is."""

    def count(of: Array) -> Array:
        return jnp.sum(of, dtype=jnp.int32).astype(jnp.int64)

    zero = jnp.zeros((), jnp.int64)
    return RowCounts(
        num_rows=count(tile.is_row),
        num_real=tile.num_real,
        num_wanted=tile.num_real if tile.is_wanted is None else count(tile.is_wanted),
        num_bad_sigma=zero if tile.sigma is None else count(tile.is_row & (tile.sigma <= 0)),
        num_stray=zero if tile.is_stray is None else count(tile.is_stray),
    )


def row_statistics(tile: Tile, residual: Float[Array, ...]) -> RowStatistics:
    """Counts of a tile's rows, and moments of their residuals."""
    return count_rows(tile).statistics(jnp.sum(residual), jnp.sum(residual**2))
