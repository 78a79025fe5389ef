r"""What Gauss-Newton's model leaves out of the Hessian, as far as steps have shown it.

A Newton step p from φ leads to where the model has its gradient vanish, but for what bounds hold.
What the next pass finds there beyond that, v, the model left out: ``B p = v``, with B symmetric.
The least change that makes it so is of rank one (SR1, Nocedal & Wright 2006, sec. 6.2),

    B ← B + v vᵀ / (vᵀ p).

Dennis, Gay & Welsch (1981, NL2SOL) learn the same matrix ``Σ r ∇²r`` from differences of J at one
residual, which would ask for two Jacobians in one pass.

All of it is along the columns of ``R⁻¹``, in which the gram is near the unit matrix.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from nlsq_dask._typing import Float, Vector
from nlsq_dask.solvers.triangle import solve_triangle

__all__ = ["along", "carried", "is_slow", "learned", "relative_size"]

_SLOW = 0.01  # contraction, or size relative to the gram
_LARGEST = 0.5  # of the gram: what was learned is no correction any more
_LEAST_COSINE = 0.1  # between v and p
_FARTHEST = 0.25  # contraction: the model was not near enough to be corrected


def is_slow(contraction: float) -> bool:
    """Whether second derivatives are worth their while."""
    return contraction > _SLOW


def along(factor: Float[np.ndarray, "j k"], whitening: Float[np.ndarray, "k k"]) -> np.ndarray:
    """``factor R⁻¹``."""
    return solve_triangle(whitening, factor.T, transposed=True).T


def carried(
    secant: Float[np.ndarray, "k k"],
    before: Float[np.ndarray, "k k"],
    whitening: Float[np.ndarray, "k k"],
) -> Float[np.ndarray, "k k"]:
    """What was learned along the columns of one ``R⁻¹``, along those of another."""
    back = along(before, whitening)
    return np.asarray(back.T @ secant @ back)


def learned(
    secant: Float[np.ndarray, "k k"],
    gram: Float[np.ndarray, "k k"],
    step: Vector,
    left: Vector,
) -> Float[np.ndarray, "k k"]:
    """B after a step that left the gradient `left`; zero where it would be no small correction."""
    inner = float(left @ step)
    length = float(np.linalg.norm(left) * np.linalg.norm(step))
    is_near = np.linalg.norm(left) <= _FARTHEST * np.linalg.norm(gram @ step)
    if is_near and abs(inner) > _LEAST_COSINE * length:
        secant = secant + np.outer(left, left) / inner
    return secant if relative_size(secant, gram) <= _LARGEST else np.zeros_like(secant)


def relative_size(secant: Float[np.ndarray, "k k"], gram: Float[np.ndarray, "k k"]) -> float:
    """The largest share of the gram along any direction; inf where the gram is singular."""
    if not secant.any():
        return 0.0
    if not np.isfinite(secant).all():
        return np.inf
    try:
        shares = scipy.linalg.eigh(secant, gram, eigvals_only=True)
    except np.linalg.LinAlgError:
        return np.inf
    return float(np.max(np.abs(shares)))
