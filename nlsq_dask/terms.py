"""What turns a model value into a weighted residual, beside the chunk itself."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from nlsq_dask._typing import Array, Float

__all__ = ["RowTerms"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowTerms:
    """Numbers that are the same for all chunks. They are arguments of the kernels, not constants:
    another `f_scale` or other weights compile nothing."""

    fill: Float[Array, " variables"]  # where rows without weight are evaluated
    f_scale: Float[Array, ""]  # of the loss, in units of the weighted residual
    # Of squared residuals, by the group of a row: the integer in its first variable.
    group_weights: Float[Array, " groups"] | None = None
