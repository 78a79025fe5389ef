"""Residuals of a tile, and their derivative along given directions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nlsq_dask._typing import Array, Float
from nlsq_dask.kernels.tiles import Tile
from nlsq_dask.model import Model
from nlsq_dask.parameters import ParameterSpace

__all__ = ["residual_function", "residuals_and_jacobian"]


def residual_function(
    model: Model, space: ParameterSpace, tile: Tile
) -> Callable[[Float[Array, " n"]], Float[Array, ...]]:
    """``params -> (model - y) / sigma`` in the tile's rows, and 0 where there is no weight."""

    def residual(params: Float[Array, " n"]) -> Float[Array, ...]:
        value = jnp.broadcast_to(model(tile.x, space.unflatten(params)), tile.y.shape)
        difference = value - tile.y
        if tile.sigma is not None:
            difference = difference / tile.sigma
        return jnp.where(tile.is_row, difference, 0.0)

    return residual


def residuals_and_jacobian(
    model: Model,
    space: ParameterSpace,
    tile: Tile,
    params: Float[Array, " n"],
    directions: Float[Array, "n k"],
) -> Float[Array, "rows k+1"]:
    """The Jacobian along `directions`, with the residual as its last column.

    Forward mode, one tangent for each direction (k is far below the number of rows). The
    columns of ``R⁻¹`` go through the derivative itself: multiplying a finished Jacobian by
    ``R⁻¹`` would lose the digits that whitening is there to keep.
    """
    r, push = jax.linearize(residual_function(model, space, tile), params)
    jac = jax.vmap(push, in_axes=1, out_axes=-1)(directions)
    return jnp.concatenate([jac, r[..., None]], axis=-1).reshape(-1, directions.shape[1] + 1)
