r"""Covariance of the estimates, and what the data determine.

Classical: ``s² H⁻¹`` with ``H = JᵀJ`` (and the penalties' Hessian), right where residuals are
independent and of one variance. Sandwich (White 1980; Huber 1967 for robust losses):

    B⁻¹ M B⁻¹,    B = Σ (ρ' + 2 z ρ'') Jᵢ Jᵢᵀ,    M = Σ gᵢ gᵢᵀ,    gᵢ = ρ' rᵢ Jᵢ,

right for any variances; summed over clusters first, ``M = Σ_c (Σ_{i∈c} gᵢ)(…)ᵀ``, also where
rows of a cluster depend on each other (Liang & Zeger 1986).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.normal_equations import ScoreSums
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.solvers.quadratic import Spectrum, rank_tolerance, spectrum_of
from nlsq_dask.solvers.triangle import solve_triangle

__all__ = ["Covariance", "estimate_covariance", "no_covariance", "sandwich", "small_sample_factor"]

_IN_NULL_SPACE = 1e-6  # of a unit vector
# Of the largest eigenvalue: below it the Hessian without its clamp is no Hessian of a minimum.
_MIN_BREAD = 1e-8


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """Covariance over all parameters, with zero rows for fixed ones; None where none is formed.

    A parameter with a part in a direction that the data do not determine has infinite variance
    and undefined covariances (NaN).
    """

    matrix: Float[np.ndarray, "n n"] | None
    rank: float  # a whole number; NaN where it is not known
    rank_tolerance: float  # relative to the largest singular value
    condition_number: float  # of J with columns of unit length


def no_covariance() -> Covariance:
    """Of a fit that forms no matrix."""
    return Covariance(matrix=None, rank=np.nan, rank_tolerance=np.nan, condition_number=np.nan)


def estimate_covariance(
    factor: Float[np.ndarray, "k k"],
    variance: float,
    space: ParameterSpace,
    params: Vector,
    robust: Float[np.ndarray, "k k"] | None = None,
) -> Covariance:
    """Invert ``JᵀJ`` through the singular values of its factor.

    Parameters
    ----------
    factor : (k, k)
        R factor of the Jacobian by the free parameters.
    variance : float
        ``s²``: 1 for absolute sigma, else the residual variance; ``inf`` where there are not
        more rows than parameters.
    space : ParameterSpace
    params : (k,)
        The free parameters, at which tied ones are linearised.
    robust : (k, k), optional
        A sandwich to report in the place of ``s² (JᵀJ)⁻¹``.
    """
    k = space.num_free
    norms = np.linalg.norm(factor, axis=0)
    scale = np.where(norms > 0, norms, 1.0)
    spectrum = spectrum_of(factor, scale)
    free = robust if robust is not None else _classical(spectrum, scale, variance)
    undetermined = np.any(np.abs(spectrum.right[~spectrum.is_identified]) > _IN_NULL_SPACE, axis=0)
    # A variance beyond all numbers would make those beside it NaN in products with zeros.
    undetermined |= ~np.isfinite(np.diag(free))
    matrix = _over_all(space, params, free, undetermined)
    if not np.isfinite(variance):
        varies = space.is_free | space.is_tied
        matrix[np.ix_(varies, varies)] = np.inf
    return Covariance(
        matrix=matrix,
        rank=spectrum.rank,
        rank_tolerance=rank_tolerance(k),
        condition_number=spectrum.condition_number,
    )


def _classical(spectrum: Spectrum, scale: Vector, variance: float) -> Float[np.ndarray, "k k"]:
    kept = spectrum.is_identified
    # On a plateau a variance may be beyond all numbers: infinite is what it is then.
    with np.errstate(over="ignore", invalid="ignore"):
        half = spectrum.right[kept] / spectrum.values[kept, None] / scale
        return np.asarray(half.T @ half * (variance if np.isfinite(variance) else 1.0))


def _over_all(
    space: ParameterSpace,
    params: Vector,
    free: Float[np.ndarray, "k k"],
    undetermined: Bool[np.ndarray, " k"],
) -> Float[np.ndarray, "n n"]:
    """From the free parameters to all: fixed ones do not vary, tied ones follow."""
    tangents = space.tangents(params, np.eye(space.num_free))
    matrix: Float[np.ndarray, "n n"] = (
        tangents @ np.where(undetermined | undetermined[:, None], 0.0, free) @ tangents.T
    )
    unknown = (np.abs(tangents) @ undetermined) > 0
    matrix[unknown, :] = matrix[:, unknown] = np.nan
    matrix[unknown, unknown] = np.inf
    matrix[~(space.is_free | space.is_tied)] = 0.0
    matrix[:, ~(space.is_free | space.is_tied)] = 0.0
    return matrix


def sandwich(
    scores: ScoreSums,
    whitening: Float[np.ndarray, "k k"],
    penalty_gram: Float[np.ndarray, "k k"],
    gram: Float[np.ndarray, "k k"],
    factor: float,
) -> tuple[Float[np.ndarray, "k k"], bool]:
    """``B⁻¹ M B⁻¹`` over the free parameters, and whether B had to keep its clamp.

    Parameters
    ----------
    scores : ScoreSums
        Along the columns of ``R⁻¹``.
    whitening : (k, k)
        `R`.
    penalty_gram, gram : (k, k)
        Hessian of the penalties, and the whole clamped one, along the same columns.
    factor : float
        The correction for a small sample.
    """
    bread = np.asarray(scores.bread) + penalty_gram
    values = scipy.linalg.eigvalsh(bread)
    is_clamped = not values[0] > _MIN_BREAD * values[-1]
    if is_clamped:
        bread = gram
    meat = np.asarray(scores.meat)
    if scores.clusters is not None:
        sums = np.asarray(scores.clusters)
        meat = sums.T @ sums
    # Along R⁻¹ the bread is near the identity, so that inverting it loses nothing.
    inverse = scipy.linalg.pinvh(bread)
    half = solve_triangle(whitening, inverse)
    return np.asarray(factor * half @ meat @ half.T), is_clamped


def small_sample_factor(kind: str, num_rows: int, num_free: int, num_clusters: int) -> float:
    """1 for HC0; ``m / (m - k)`` for HC1; times ``(m - 1) / m · G / (G - 1)`` for G clusters."""
    if kind == "HC0" or num_rows <= num_free:
        return 1.0
    if kind == "clustered" and num_clusters > 1:
        return (num_rows - 1) / (num_rows - num_free) * num_clusters / (num_clusters - 1)
    return num_rows / (num_rows - num_free)
