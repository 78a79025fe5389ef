r"""Robust losses: what a large residual costs.

The cost of a row is ``½ s² ρ(z)``, ``z = (r / s)²`` with ``s = f_scale``, as in
`scipy.optimize.least_squares`. Inliers, ``|r|`` well below s, cost ½ r² under every loss.

==========  ===========================  =====================================================
loss        ρ(z)                         made for
==========  ===========================  =====================================================
linear      z                            Gaussian noise
soft_l1     2 (√(1 + z) - 1)             a few outliers (Charbonnier et al. 1997)
huber       z, or 2 √z - 1 above z = 1   some 5 to 15 % of outliers (Huber 1964)
cauchy      ln(1 + z)                    15 to 25 %; may have several minima
arctan      arctan(z)                    more; an outlier's cost is bounded
==========  ===========================  =====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp

from nlsq_dask._typing import Array, Float

__all__ = ["LOSSES", "Loss", "Rho", "robust_terms"]

# Of ρ' + 2 z ρ'': below it the Hessian of a row would be negative (Triggs et al. 1999).
_MIN_CURVATURE = 1e-12


class Rho(NamedTuple):
    """ρ and its first two derivatives by z, element by element."""

    value: Array
    first: Array
    second: Array


Loss: TypeAlias = Callable[[Array], Rho]


def linear(z: Array) -> Rho:
    return Rho(z, jnp.ones_like(z), jnp.zeros_like(z))


def soft_l1(z: Array) -> Rho:
    t = 1 + z
    return Rho(2 * (jnp.sqrt(t) - 1), t**-0.5, -0.5 * t**-1.5)


def huber(z: Array) -> Rho:
    is_inlier = z <= 1
    t = jnp.where(is_inlier, 1.0, z)
    return Rho(
        jnp.where(is_inlier, z, 2 * jnp.sqrt(t) - 1),
        jnp.where(is_inlier, 1.0, t**-0.5),
        jnp.where(is_inlier, 0.0, -0.5 * t**-1.5),
    )


def cauchy(z: Array) -> Rho:
    t = 1 + z
    return Rho(jnp.log1p(z), 1 / t, -1 / t**2)


def arctan(z: Array) -> Rho:
    t = 1 + z**2
    return Rho(jnp.arctan(z), 1 / t, -2 * z / t**2)


LOSSES: Mapping[str, Loss] = {
    "linear": linear,
    "soft_l1": soft_l1,
    "huber": huber,
    "cauchy": cauchy,
    "arctan": arctan,
}


class RobustTerms(NamedTuple):
    """What a loss makes of residuals."""

    cost: Float[Array, ...]  # ½ s² ρ
    score: Float[Array, ...]  # dcost/dr = ρ' r
    curvature: Float[Array, ...]  # d²cost/dr² = ρ' + 2 z ρ''
    clamped: Float[Array, ...]  # the same, kept positive


def robust_terms(loss: Loss, residual: Array, f_scale: Array) -> RobustTerms:
    """Cost, score and curvature of each row, eqs. 10 and 11 of Triggs et al. (1999)."""
    z = (residual / f_scale) ** 2
    rho = loss(z)
    curvature = rho.first + 2 * z * rho.second
    return RobustTerms(
        cost=0.5 * f_scale**2 * rho.value,
        score=rho.first * residual,
        curvature=curvature,
        clamped=jnp.maximum(curvature, _MIN_CURVATURE),
    )
