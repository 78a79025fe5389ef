"""What every set of rows is reduced to."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from nlsq_dask._typing import Array, Float, Int

__all__ = [
    "CostGradient",
    "CostSum",
    "CurvatureProducts",
    "NormalEquations",
    "RowStatistics",
    "RowSummary",
    "ScoreSums",
    "Sums",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CostSum:
    """The cost of some set of rows. Additive."""

    cost: Float[Array, ""]  # ½ Σ s² ρ((r / s)²)
    num_rows: Int[Array, ""]  # rows with a weight

    @property
    def is_finite(self) -> bool:
        """Whether the model, and what was asked of its derivative, was finite in every row."""
        return all(bool(np.all(np.isfinite(part))) for part in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CostGradient(CostSum):
    """The cost and its gradient by all `n` parameters. Additive."""

    grad: Float[Array, " n"]  # Jᵀ ρ' r


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CurvatureProducts(CostSum):
    """Gauss-Newton's Hessian times a few vectors, without ever being formed. Additive."""

    products: Float[Array, "v n"]  # Jᵀ(c ⊙ (J v)), with c the curvature of the loss, clamped


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NormalEquations(CostSum):
    """Quadratic model of the cost, summed over some set of rows. Additive.

    The Jacobian is taken along `k` directions in parameter space, the columns of ``E R⁻¹``,
    where `E` selects the free parameters and `R` whitens them (see ``solvers/quadratic.py``):
    with near-orthonormal columns the gram keeps the digits that ``JᵀJ`` loses.
    """

    gram: Float[Array, "k k"]  # (J R⁻¹)ᵀ (J R⁻¹)
    grad: Float[Array, " k"]  # (J R⁻¹)ᵀ r


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """Counts of rows, and moments of the weighted residuals. Additive."""

    num_masked: Int[Array, ""]  # rows without a weight, for whatever reason
    num_invalid: Int[Array, ""]  # rows wanted, but with a value that is not finite
    num_bad_sigma: Int[Array, ""]  # rows with sigma <= 0
    num_stray: Int[Array, ""]  # rows whose group has no weight
    residual_sum: Float[Array, ""]  # Σ r
    residual_square: Float[Array, ""]  # Σ r²


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """Weighted moments of ``y`` about a fixed centre. Additive; they never change in a fit."""

    weight: Float[Array, ""]  # Σ w
    first: Float[Array, ""]  # Σ w (y - c)
    second: Float[Array, ""]  # Σ w (y - c)²

    @property
    def total_sum_of_squares(self) -> float:
        """``Σ w (y - ȳ)²`` about the weighted mean."""
        with np.errstate(over="ignore", invalid="ignore"):
            return float(self.second - self.first**2 / self.weight) if self.weight > 0 else 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ScoreSums:
    """The parts of a sandwich covariance, along the same directions as the gram. Additive."""

    meat: Float[Array, "k k"]  # Σ gᵢ gᵢᵀ, with the scores gᵢ = ρ' rᵢ Jᵢ
    bread: Float[Array, "k k"]  # Σ (ρ' + 2 z ρ'') Jᵢ Jᵢᵀ
    clusters: Float[Array, "clusters k"] | None = None  # Σ gᵢ over each cluster


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sums:
    """All that one pass returns. Additive, leaf by leaf of the tree."""

    normal: CostSum  # of the kind that was asked for
    rows: RowStatistics
    rival_costs: Float[Array, " rivals"] | None = None
    summary: RowSummary | None = None
    scores: ScoreSums | None = None

    @property
    def equations(self) -> NormalEquations:
        """Normal equations, where directions were given."""
        assert isinstance(self.normal, NormalEquations)
        return self.normal

    @property
    def slope(self) -> CostGradient:
        """The gradient, where neither directions nor vectors were given."""
        assert isinstance(self.normal, CostGradient)
        return self.normal

    @property
    def products(self) -> CurvatureProducts:
        """Products with the vectors that were given."""
        assert isinstance(self.normal, CurvatureProducts)
        return self.normal

    def __add__(self, other: Sums) -> Sums:
        # A wild trial may overflow: its sums are then not finite, and it is refused.
        with np.errstate(over="ignore", invalid="ignore"):
            summed: Sums = jax.tree.map(np.add, self, other)
        return summed
