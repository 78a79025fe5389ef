"""The jitted kernels of one problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from nlsq_dask._typing import Array, Float, Shape
from nlsq_dask.kernels.rows import residual_function, residuals_and_jacobian
from nlsq_dask.kernels.tiles import Tile, sum_tiles
from nlsq_dask.model import Model
from nlsq_dask.normal_equations import NormalEquations, RowSummary
from nlsq_dask.parameters import ParameterSpace
from nlsq_dask.sources.base import Chunk

__all__ = ["Kernels", "build_curvature", "build_jacobian", "build_kernels"]

NormalKernel = Callable[
    [Float[Array, " n"], Float[Array, "n k"], Float[Array, " variables"], Chunk], NormalEquations
]
CostKernel = Callable[
    [Float[Array, "rivals n"], Float[Array, " variables"], Chunk], Float[Array, " rivals"]
]
SummaryKernel = Callable[[Float[Array, ""], Float[Array, " variables"], Chunk], RowSummary]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What is computed on a chunk. Each is compiled once per process and chunk shape."""

    normal_equations: NormalKernel
    costs: CostKernel
    summary: SummaryKernel


def build_kernels(model: Model, space: ParameterSpace, tile_shape: Shape) -> Kernels:
    """Jit the kernels; call them with 64-bit types enabled and parameters as float64 arrays."""

    def normal_equations(
        params: Float[Array, " n"],
        directions: Float[Array, "n k"],
        fill: Float[Array, " variables"],
        chunk: Chunk,
    ) -> NormalEquations:
        def reduce(tile: Tile) -> NormalEquations:
            a = residuals_and_jacobian(model, space, tile, params, directions)
            product = a.T @ a  # gram, grad and 2·cost in one sweep over the tile
            wanted_without_weight = tile.is_wanted & ~tile.is_row
            bad_sigma = jnp.zeros((), jnp.int64)
            if tile.sigma is not None:
                bad_sigma = jnp.sum(tile.is_row & (tile.sigma <= 0), dtype=jnp.int64)
            return NormalEquations(
                gram=product[:-1, :-1],
                grad=product[:-1, -1],
                cost=0.5 * product[-1, -1],
                num_rows=jnp.sum(tile.is_row, dtype=jnp.int64),
                num_invalid=jnp.sum(wanted_without_weight, dtype=jnp.int64),
                num_bad_sigma=bad_sigma,
            )

        return sum_tiles(chunk, tile_shape, fill, reduce)

    def costs(
        rivals: Float[Array, "rivals n"], fill: Float[Array, " variables"], chunk: Chunk
    ) -> Float[Array, " rivals"]:
        def reduce(tile: Tile) -> Float[Array, " rivals"]:
            residual = residual_function(model, space, tile)
            return jax.vmap(lambda params: 0.5 * jnp.sum(residual(params) ** 2))(rivals)

        return sum_tiles(chunk, tile_shape, fill, reduce)

    def summary(
        center: Float[Array, ""], fill: Float[Array, " variables"], chunk: Chunk
    ) -> RowSummary:
        def reduce(tile: Tile) -> RowSummary:
            inverse = 1.0 if tile.sigma is None else tile.sigma**-2
            weight = jnp.where(tile.is_row, inverse, 0.0)
            deviation = jnp.where(tile.is_row, tile.y - center, 0.0)
            return RowSummary(
                weight=jnp.sum(weight),
                first=jnp.sum(weight * deviation),
                second=jnp.sum(weight * deviation**2),
            )

        return sum_tiles(chunk, tile_shape, fill, reduce)

    return Kernels(
        normal_equations=jax.jit(normal_equations),
        costs=jax.jit(costs),
        summary=jax.jit(summary),
    )


def build_jacobian(
    model: Model, space: ParameterSpace
) -> Callable[[Float[Array, " n"], Float[Array, "n k"], Chunk], Float[Array, "rows k+1"]]:
    """Jacobian and residual of a small chunk, row by row: for the QR of a sample."""

    def jacobian(
        params: Float[Array, " n"], directions: Float[Array, "n k"], chunk: Chunk
    ) -> Float[Array, "rows k+1"]:
        return residuals_and_jacobian(model, space, _whole(chunk), params, directions)

    return jax.jit(jacobian)


def build_curvature(
    model: Model, space: ParameterSpace, tile_shape: Shape
) -> Callable[
    [Float[Array, " n"], Float[Array, "n k"], Float[Array, " variables"], Chunk],
    Float[Array, "k k"],
]:
    """``Σ r ∇²r`` along directions: what Gauss-Newton leaves out of the Hessian of the cost."""

    def curvature(
        params: Float[Array, " n"],
        directions: Float[Array, "n k"],
        fill: Float[Array, " variables"],
        chunk: Chunk,
    ) -> Float[Array, "k k"]:
        def reduce(tile: Tile) -> Float[Array, "k k"]:
            residual = residual_function(model, space, tile)
            held = residual(params)

            def projected(step: Float[Array, " k"]) -> Float[Array, ""]:
                return jnp.sum(held * residual(params + directions @ step))

            hessian: Float[Array, "k k"] = jax.jacfwd(jax.jacfwd(projected))(
                jnp.zeros(directions.shape[1])
            )
            return hessian

        return sum_tiles(chunk, tile_shape, fill, reduce)

    return jax.jit(curvature)


def _whole(chunk: Chunk) -> Tile:
    every = jnp.ones(chunk.y.shape, bool)
    if chunk.extent is not None:
        for axis, length in enumerate(chunk.y.shape):
            every &= jnp.arange(length) < chunk.extent[axis]
    return Tile(
        x=tuple(column.astype(jnp.float64) for column in chunk.x),
        y=chunk.y.astype(jnp.float64),
        sigma=None if chunk.sigma is None else chunk.sigma.astype(jnp.float64),
        is_row=every,
        is_wanted=every,
    )
