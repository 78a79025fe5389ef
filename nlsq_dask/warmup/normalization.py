"""Phase 0: parameters of order one for the warmup.

``z = (θ - offset) / scale``, parameter by parameter. L-BFGS knows nothing of units: a step of
0.1 is then a tenth of the way between the bounds, or of the start's distance from zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlsq_dask._typing import Bool, Float, Vector

__all__ = ["ParameterNormalizer", "build_normalizer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterNormalizer:
    """``z = (θ - offset) / scale`` over the free parameters.

    Attributes
    ----------
    strategy : str
        That was asked for.
    offset, scale : (k,)
        In the units of each parameter; `scale` is positive and finite.
    """

    strategy: str
    offset: Float[np.ndarray, " k"]
    scale: Float[np.ndarray, " k"]
    lower: Float[np.ndarray, " k"]
    upper: Float[np.ndarray, " k"]

    def normalize(self, params: Float[np.ndarray, "*more k"]) -> Float[np.ndarray, "*more k"]:
        """From the model's units."""
        return np.asarray((params - self.offset) / self.scale)

    def denormalize(self, point: Float[np.ndarray, "*more k"]) -> Float[np.ndarray, "*more k"]:
        """Into the model's units; within the bounds, where rounding would leave them."""
        params = self.offset + self.scale * point
        return np.asarray(np.clip(params, self.lower, self.upper))

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        """The bounds of `z`; infinite ones stay infinite."""
        return self.normalize(self.lower), self.normalize(self.upper)

    @property
    def jacobian(self) -> Float[np.ndarray, " k"]:
        """The diagonal of ``D = ∂θ/∂z``: the covariance of `θ` is ``D cov(z) Dᵀ``."""
        return self.scale


def build_normalizer(
    strategy: str,
    p0: Float[np.ndarray, " k"],
    bounds: tuple[Vector, Vector],
    column_norms: Float[np.ndarray, " k"] | None = None,
) -> ParameterNormalizer:
    """The normalizer of a strategy, each parameter by itself.

    Parameters
    ----------
    strategy : {"auto", "bounds", "p0", "jacobian", "none"}
        "bounds", and "auto" with it, map two finite bounds to 0 and 1. "jacobian" makes the
        columns of the normalized Jacobian as long as the spread of the data (Moré 1978). "p0"
        divides by ``|p0|``, and is what a parameter gets that these say nothing about: without
        two finite bounds, or with a column that is zero or not finite. The scale of a zero `p0`,
        and of bounds that coincide, is 1.
    p0 : (k,)
    bounds : (lower, upper)
    column_norms : (k,), optional
        Of the Jacobian at `p0`, relative to the spread of the data; read by "jacobian" alone.
        Without them (the model is not differentiable at `p0`) it is "p0".
    """
    lower, upper = bounds
    offset = np.zeros_like(p0)
    scale = np.where(p0 != 0, np.abs(p0), 1.0)
    if strategy == "none":
        scale = np.ones_like(p0)
    elif strategy in ("auto", "bounds"):
        width = _width(lower, upper)
        is_bounded = np.isfinite(width)
        offset = np.where(is_bounded, lower, offset)
        scale = np.where(is_bounded, np.where(width > 0, width, 1.0), scale)
    elif strategy == "jacobian" and column_norms is not None:
        usable = _is_usable(column_norms)
        scale = np.where(usable, 1.0 / np.where(usable, column_norms, 1.0), scale)
    return ParameterNormalizer(
        strategy=strategy, offset=offset, scale=scale, lower=lower, upper=upper
    )


def _width(lower: Vector, upper: Vector) -> Vector:
    """Infinite where a bound is, or where their distance overflows."""
    with np.errstate(over="ignore"):
        return upper - lower


def _is_usable(norms: Vector) -> Bool[np.ndarray, " k"]:
    """Norms whose inverse is positive and finite."""
    tiny = np.finfo(np.float64).tiny
    return np.asarray((norms > tiny) & (norms < 1 / tiny))
