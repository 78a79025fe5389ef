"""Covariance of the estimates, and what the data determine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.parameters import ParameterSpace
from nlsq_dask.solvers.quadratic import rank_tolerance, spectrum_of

__all__ = ["Covariance", "estimate_covariance"]

_IN_NULL_SPACE = 1e-6  # of a unit vector


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """``s² (JᵀJ)⁻¹`` over all parameters, with zero rows for fixed ones.

    A parameter with a part in a direction that the data do not determine has infinite variance
    and undefined covariances (NaN).
    """

    matrix: Float[np.ndarray, "n n"]
    rank: int
    rank_tolerance: float  # relative to the largest singular value
    condition_number: float  # of J with columns of unit length


def estimate_covariance(
    factor: Float[np.ndarray, "k k"], variance: float, space: ParameterSpace
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
    """
    k = space.num_free
    norms = np.linalg.norm(factor, axis=0)
    scale = np.where(norms > 0, norms, 1.0)
    spectrum = spectrum_of(factor, scale)
    kept = spectrum.is_identified
    half = spectrum.right[kept] / spectrum.values[kept, None] / scale
    free = half.T @ half
    if not np.isfinite(variance):
        free = np.full((k, k), np.inf)
    else:
        free = free * variance
        undetermined = np.any(np.abs(spectrum.right[~kept]) > _IN_NULL_SPACE, axis=0)
        free[undetermined, :] = free[:, undetermined] = np.nan
        free[undetermined, undetermined] = np.inf
    matrix = np.zeros((space.size, space.size))
    matrix[np.ix_(space.is_free, space.is_free)] = free
    return Covariance(
        matrix=matrix,
        rank=spectrum.rank,
        rank_tolerance=rank_tolerance(k),
        condition_number=spectrum.condition_number,
    )
