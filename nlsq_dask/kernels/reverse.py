"""Kernels for many parameters, by reverse mode: no array of n x n or k x k elements.

All are by all `n` parameters: which of them are free is the caller's to say, and compiles
nothing again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from nlsq_dask._typing import Array, Float
from nlsq_dask.config import Precision
from nlsq_dask.kernels.build import MAX_KERNELS, KernelSpec, LatestSpec, share
from nlsq_dask.kernels.counts import ResidualSums, sum_residuals
from nlsq_dask.kernels.rows import residual_function, row_costs
from nlsq_dask.kernels.tiles import Tile, sum_tiles
from nlsq_dask.losses import LOSSES, robust_terms
from nlsq_dask.normal_equations import CostGradient, CostSum, CurvatureProducts, RowStatistics
from nlsq_dask.recent import Recent
from nlsq_dask.sources.base import Chunk
from nlsq_dask.terms import RowTerms

__all__ = ["ReverseKernels", "build_reverse_kernels"]

_RECENT = Recent(MAX_KERNELS)
_MIN_DIAGONAL_TILES = 1024
_MAX_DIAGONAL_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class ReverseKernels:
    """What is computed on a chunk. Each is compiled once per process and chunk shape."""

    gradient: Callable[..., tuple[CostGradient, RowStatistics]]
    products: Callable[..., tuple[CurvatureProducts, RowStatistics]]
    diagonal: Callable[..., Float[Array, " n"]]


def build_reverse_kernels(spec: KernelSpec) -> ReverseKernels:
    """The jitted kernels of a problem; those of an equal one before it, where there was one."""
    return share(_RECENT, spec, _build)


def _build(latest: LatestSpec) -> ReverseKernels:
    return ReverseKernels(
        gradient=latest.jit(_gradient, "precision"),
        products=latest.jit(_products, "precision"),
        diagonal=latest.jit(_diagonal),
    )


def _gradient(
    spec: KernelSpec,
    params: Float[Array, " n"],
    terms: RowTerms,
    chunk: Chunk,
    precision: Precision,
) -> tuple[CostGradient, RowStatistics]:
    """Cost and gradient: one evaluation, and one sweep back through it.

    The gradient decides where the fit ends, so mixed precision takes it in float64.
    """
    dtype = jnp.float32 if precision == "float32" else jnp.float64

    def reduce(tile: Tile) -> tuple[CostGradient, ResidualSums]:
        function = residual_function(spec.model, spec.space, tile, dtype)
        residual, pull = jax.vjp(function, params.astype(dtype))
        score = residual
        if spec.loss != "linear":
            scale = terms.f_scale.astype(dtype)
            score = robust_terms(LOSSES[spec.loss], residual, scale).score
        (grad,) = pull(score)
        summed = _cost_sum(spec, tile, residual, terms)
        return (
            CostGradient(cost=summed.cost, num_rows=summed.num_rows, grad=grad.astype(jnp.float64)),
            sum_residuals(tile, residual),
        )

    normal, residuals = sum_tiles(chunk, spec.tile_shape, terms, reduce)
    return normal, residuals.statistics(chunk, terms)


def _products(
    spec: KernelSpec,
    params: Float[Array, " n"],
    vectors: Float[Array, "v n"],
    terms: RowTerms,
    chunk: Chunk,
    precision: Precision,
) -> tuple[CurvatureProducts, RowStatistics]:
    """``Jᵀ(c ⊙ (J v))``: forward along each vector, and back."""
    dtype = jnp.float64 if precision == "float64" else jnp.float32

    def reduce(tile: Tile) -> tuple[CurvatureProducts, ResidualSums]:
        point = params.astype(dtype)
        function = residual_function(spec.model, spec.space, tile, dtype)
        residual, push = jax.linearize(function, point)
        pull = jax.linear_transpose(push, point)
        curvature = _curvature(spec, residual, terms)

        def product(vector: Float[Array, " n"]) -> Float[Array, " n"]:
            (pulled,) = pull(curvature * push(vector))
            return jnp.asarray(pulled, jnp.float64)

        summed = _cost_sum(spec, tile, residual, terms)
        return (
            CurvatureProducts(
                cost=summed.cost,
                num_rows=summed.num_rows,
                products=jax.vmap(product)(vectors.astype(dtype)),
            ),
            sum_residuals(tile, residual),
        )

    normal, residuals = sum_tiles(chunk, spec.tile_shape, terms, reduce)
    return normal, residuals.statistics(chunk, terms)


def _diagonal(
    spec: KernelSpec, params: Float[Array, " n"], terms: RowTerms, chunk: Chunk
) -> Float[Array, " n"]:
    """``Σ c J²``, the diagonal of ``JᵀCJ``, from one gradient for each small tile.

    The square of ``Σ ± √c J`` over a tile's rows, with random signs, is its part of the diagonal
    on average: exactly where no two of its rows depend on the same parameter, and to √(2/1024)
    over all tiles where every row depends on it. Rows are to be flat and in random order. A
    gradient for each row, which would be exact, takes up to 64 times as long.
    """
    rows = max(1, min(_MAX_DIAGONAL_ROWS, chunk.y.size // _MIN_DIAGONAL_TILES))
    # A column of the rows: signs that are the same in each tile would be wrong alike in each,
    # and where all rows depend on a parameter alike, their sum may be zero.
    bits = jax.random.bits(jax.random.key(0), chunk.y.shape, jnp.uint8)
    signed = replace(chunk, x=(*chunk.x, 1 - 2 * (bits & 1).astype(jnp.int8)))
    filled = replace(terms, fill=jnp.append(terms.fill, 1.0))

    def reduce(tile: Tile) -> Float[Array, " n"]:
        *x, sign = tile.x
        function = residual_function(spec.model, spec.space, replace(tile, x=tuple(x)))
        residual, pull = jax.vjp(function, params)
        (grad,) = pull(sign * jnp.sqrt(_curvature(spec, residual, terms)))
        return jnp.asarray(grad**2)

    return sum_tiles(signed, (rows,), filled, reduce)


def _curvature(spec: KernelSpec, residual: Float[Array, ...], terms: RowTerms) -> Float[Array, ...]:
    """Of the loss, clamped; 1 for the linear one."""
    if spec.loss == "linear":
        return jnp.ones((), residual.dtype)
    scale = terms.f_scale.astype(residual.dtype)
    return robust_terms(LOSSES[spec.loss], residual, scale).clamped


def _cost_sum(
    spec: KernelSpec, tile: Tile, residual: Float[Array, ...], terms: RowTerms
) -> CostSum:
    costs = row_costs(spec.loss, residual, terms)
    return CostSum(
        cost=jnp.sum(costs).astype(jnp.float64), num_rows=jnp.sum(tile.is_row, dtype=jnp.int64)
    )
