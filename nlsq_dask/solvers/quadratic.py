r"""The quadratic model of the cost near a point, as a small least-squares problem.

A pass accumulates ``G = (J R⁻¹)ᵀ(J R⁻¹)`` and ``g = (J R⁻¹)ᵀ r`` along the columns of ``R⁻¹``,
where `R` is (nearly) the R factor of `J`. The columns of ``J R⁻¹`` are near-orthonormal, so `G`
keeps the digits that ``JᵀJ``, with the square of the condition number, loses (Yamamoto et al.
2015 show the same for CholeskyQR2). With ``G = L Lᵀ``,

    F(φ + p) ≈ F(φ) - ½‖z‖² + ½‖S p + z‖²,    S = Lᵀ R,    L z = g,

which is all that a trust-region method needs; ``RᵀGR``, where the digits would be lost again,
is never formed. `S` is the R factor of the full data's Jacobian: it whitens the next pass.

Where residuals have structure, ``B = Σ r ∇²r`` belongs to the Hessian as well. It is added as
``L (I + L⁻¹ B L⁻ᵀ) Lᵀ`` where that stays well away from singular.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.normal_equations import NormalEquations
from nlsq_dask.solvers.triangle import solve_triangle

__all__ = ["QuadraticModel", "Spectrum", "build_quadratic", "next_whitening", "rank_tolerance"]

_EPS = float(np.finfo(np.float64).eps)
# Of the equilibrated whitened gram: below this an eigenvalue is rounding. R⁻¹ has entries up to
# 1e8 along directions that the sample does not see, so that J R⁻¹ carries an error of 1e8 eps.
_GRAM_NOISE = 1e-13
# I + L⁻¹BL⁻ᵀ may flatten the model this much, not more: the rest of B is then left out.
_MIN_CURVATURE = 0.1
_WHITENING_FLOOR = 1e-8


@dataclass(frozen=True, kw_only=True)
class QuadraticModel:
    """``cost(φ + p) ≈ cost - ½‖z‖² + ½‖S p + z‖²``."""

    cost: float
    factor: Float[np.ndarray, "k k"]  # S
    residual: Float[np.ndarray, " k"]  # z
    gauss_newton_factor: Float[np.ndarray, "k k"]  # S without second derivatives

    @property
    def grad(self) -> Vector:
        return np.asarray(self.factor.T @ self.residual)

    def reduction(self, step: Vector) -> float:
        """How much the model falls along a step."""
        change = self.factor @ step
        return float(-change @ (self.residual + 0.5 * change))

    @property
    def column_norms(self) -> Vector:
        """‖J eⱼ‖, the natural scale of each parameter (Moré 1978)."""
        return np.asarray(np.linalg.norm(self.gauss_newton_factor, axis=0))


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of the column-scaled factor, and what they say."""

    values: Float[np.ndarray, " k"]
    right: Float[np.ndarray, "k k"]  # rows are right singular vectors
    left: Float[np.ndarray, "k k"]
    is_identified: Bool[np.ndarray, " k"]

    @property
    def rank(self) -> int:
        return int(self.is_identified.sum())

    @property
    def condition_number(self) -> float:
        smallest = self.values[-1]
        return float(self.values[0] / smallest) if smallest > 0 else np.inf


def rank_tolerance(k: int) -> float:
    """Relative to the largest singular value, with columns scaled to unit length."""
    return 4 * k * _EPS


def spectrum_of(factor: Float[np.ndarray, "k k"], scale: Vector) -> Spectrum:
    """Singular values of ``S D⁻¹`` and which directions the data determine."""
    left, values, right = scipy.linalg.svd(factor / scale)
    largest = values[0] if values.size else 0.0
    return Spectrum(
        values=values,
        right=right,
        left=left,
        is_identified=values > rank_tolerance(len(values)) * largest,
    )


def build_quadratic(
    normal: NormalEquations,
    whitening: Float[np.ndarray, "k k"],
    curvature: Float[np.ndarray, "k k"] | None = None,
) -> QuadraticModel:
    """Factor whitened normal equations.

    Parameters
    ----------
    normal : NormalEquations
        Along the columns of ``R⁻¹``.
    whitening : (k, k)
        `R`, upper triangular.
    curvature : (k, k), optional
        ``B`` along the same columns.
    """
    gram, grad = np.asarray(normal.gram), np.asarray(normal.grad)
    diagonal = np.sqrt(np.diag(gram))
    diagonal = np.where(diagonal > 0, diagonal, 1.0)
    scaled = gram / np.outer(diagonal, diagonal)
    values, vectors = scipy.linalg.eigh(scaled)
    is_definite = values[0] > _GRAM_NOISE * values[-1]
    if is_definite:
        lower = scipy.linalg.cholesky(scaled, lower=True)
        inner = lower.T * diagonal
        residual = solve_triangle(lower, grad / diagonal, lower=True)
    else:
        kept = values > _GRAM_NOISE * values[-1]
        roots = np.sqrt(np.where(kept, values, 0.0))
        inner = roots[:, None] * vectors.T * diagonal
        projected = vectors.T @ (grad / diagonal)
        residual = np.divide(projected, roots, out=np.zeros_like(roots), where=kept)
    gauss_newton_factor = inner @ whitening
    factor = gauss_newton_factor
    # Second derivatives may overflow where the first do not.
    if curvature is not None and is_definite and np.isfinite(curvature).all():
        half = solve_triangle(inner.T, curvature, lower=True)
        bent = np.eye(len(half)) + solve_triangle(inner.T, half.T, lower=True)
        bent = 0.5 * (bent + bent.T)
        if np.isfinite(bent).all() and scipy.linalg.eigvalsh(bent)[0] >= _MIN_CURVATURE:
            root = scipy.linalg.cholesky(bent, lower=True)
            factor = root.T @ factor
            residual = solve_triangle(root, residual, lower=True)
    return QuadraticModel(
        cost=float(normal.cost),
        factor=factor,
        residual=residual,
        gauss_newton_factor=gauss_newton_factor,
    )


def next_whitening(factor: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """An invertible `R` from the R factor of a Jacobian, whatever its rank.

    The factor is stacked on 1e-8 times its column scale: directions that the rows at hand do
    not see stay finite, and one more pass resolves them if other rows do.
    """
    norms = np.linalg.norm(factor, axis=0)
    largest = norms.max(initial=0.0)
    norms = np.where(norms > 0, norms, largest if largest > 0 else 1.0)
    stacked = np.vstack([factor, np.diag(_WHITENING_FLOOR * norms)])
    r: Float[np.ndarray, "k k"] = scipy.linalg.qr(stacked, mode="r")[0][: len(norms)]
    return r
