"""Residuals of a tile, and their derivative along given directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nlsq_dask._typing import Array, Float
from nlsq_dask.config import Precision
from nlsq_dask.kernels.tiles import Tile
from nlsq_dask.losses import LOSSES, robust_terms
from nlsq_dask.model import Model
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.terms import RowTerms

__all__ = ["LinearisedRows", "linearise", "residual_function", "row_costs"]


class LinearisedRows(NamedTuple):
    """Rows of the least-squares problem that Gauss-Newton solves, and what they came from."""

    jac: Float[Array, "k rows"]  # √c J, with c the curvature of the loss, clamped
    target: Float[Array, " rows"]  # ρ' r / √c
    cost: Float[Array, " rows"]
    residual: Float[Array, " rows"]  # r


def residual_function(
    model: Model, space: ParameterSpace, tile: Tile, dtype: type = jnp.float64
) -> Callable[[Float[Array, " n"]], Float[Array, ...]]:
    """``params -> √weight (model - y) / sigma`` in the tile's rows, and 0 where there is none."""
    x: tuple[Array, ...] = tuple(column.astype(dtype) for column in tile.x)

    def residual(params: Float[Array, " n"]) -> Float[Array, ...]:
        value = model(x, space.unflatten(params))
        difference = jnp.broadcast_to(value, tile.y.shape) - tile.y.astype(value.dtype)
        return jnp.where(tile.scale != 0, difference * tile.scale.astype(value.dtype), 0.0)

    return residual


def row_costs(loss: str, residual: Float[Array, ...], terms: RowTerms) -> Float[Array, ...]:
    """``½ s² ρ((r / s)²)``, row by row."""
    if loss == "linear":
        return 0.5 * residual**2
    return robust_terms(LOSSES[loss], residual, terms.f_scale.astype(residual.dtype)).cost


def linearise(
    model: Model,
    space: ParameterSpace,
    loss: str,
    tile: Tile,
    params: Float[Array, " n"],
    directions: Float[Array, "n k"],
    terms: RowTerms,
    precision: Precision = "float64",
) -> LinearisedRows:
    """The Jacobian along `directions`, with the rows scaled as the loss asks.

    Forward mode, one tangent for each direction (k is far below the number of rows). The
    columns of ``R⁻¹`` go through the derivative itself: multiplying a finished Jacobian by
    ``R⁻¹`` would lose the digits that whitening is there to keep.

    In "mixed" precision the derivative is taken in float32, the residual in float64.
    """
    low = jnp.float64 if precision == "float64" else jnp.float32
    function = residual_function(model, space, tile, low)
    r, push = jax.linearize(function, params.astype(low))
    jac = jax.vmap(push, in_axes=1)(directions.astype(low)).reshape(directions.shape[1], -1)
    if precision == "mixed":
        r = residual_function(model, space, tile)(params)
    r = r.ravel()
    if loss == "linear":
        return LinearisedRows(jac=jac, target=r, cost=0.5 * r**2, residual=r)
    robust = robust_terms(LOSSES[loss], r, terms.f_scale.astype(r.dtype))
    root = jnp.sqrt(robust.clamped)
    return LinearisedRows(
        jac=jac * root.astype(jac.dtype),
        target=robust.score / root,
        cost=robust.cost,
        residual=r,
    )
