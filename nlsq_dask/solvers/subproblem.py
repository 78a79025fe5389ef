r"""The step: the exact minimiser of a quadratic model in a trust region and a box.

    minimise ‖S p + z‖²   subject to   ‖D p‖ ≤ Δ,   l ≤ p ≤ u.

The solution is p(λ), the minimiser of ‖S p + z‖² + λ‖D p‖² in the box, for the smallest λ ≥ 0
at which it is within the radius (Moré 1978 without the box; with it the same holds, since the
problem is convex). Where the unbounded p(λ) is in the box it is the answer; otherwise a
bounded-variable least-squares problem is solved to the end (Stark & Parker 1995, through
`scipy.optimize.lsq_linear`).

SciPy's TRF, after Branch, Coleman & Li (1999), rescales the box away instead and comes to an
active bound in several steps. There a step costs little; here each is a pass over an archive,
and the exact step finds the active set in one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
import scipy.linalg

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.solvers.quadratic import QuadraticModel, spectrum_of
from nlsq_dask.solvers.triangle import solve_triangle

__all__ = ["TO_THE_BOUND", "Step", "solve_subproblem"]

# A step goes this far towards a bound at most, so that every iterate is strictly feasible and
# models that are undefined on the bound itself stay defined.
TO_THE_BOUND = 1 - 1e-8
_RADIUS_TOLERANCE = 0.05
_MAX_SECANTS = 100


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step, what the model promises for it, and what held it back."""

    vector: Float[np.ndarray, " k"]
    reduction: float
    scaled_norm: float  # ‖D p‖
    damping: float  # λ
    active: Bool[np.ndarray, " k"]  # bounds that hold it

    @property
    def is_newton(self) -> bool:
        """Whether only the bounds held it back, not the trust region."""
        return self.damping == 0.0


def solve_subproblem(
    model: QuadraticModel,
    scale: Vector,
    radius: float,
    to_bounds: tuple[Vector, Vector],
) -> Step:
    """Solve for the step.

    Parameters
    ----------
    model : QuadraticModel
    scale : (k,)
        `D`.
    radius : float
        `Δ`; ``inf`` for the Newton step within the bounds.
    to_bounds : ((k,), (k,))
        `l` and `u`: the way to the lower and upper bounds, ``l <= 0 <= u``.
    """
    low, high = (TO_THE_BOUND * side for side in to_bounds)
    steps = _DampedSteps(model, scale, low, high)
    damping = 0.0
    vector, active = steps.at(damping)
    length = steps.length(vector)
    if length > radius * (1 + _RADIUS_TOLERANCE):
        damping = steps.find(radius, length)
        vector, active = steps.at(damping)
    return Step(
        vector=vector,
        reduction=model.reduction(vector),
        scaled_norm=steps.length(vector),
        damping=damping,
        active=active,
    )


class _DampedSteps:
    """``λ -> p(λ)``, in variables scaled by the norms of the factor's columns.

    The trust region's own scale remembers larger columns. By it a direction may look smaller than
    rounding, and an SVD of ``S D⁻¹`` would lose it: a step would not move along it, and a fit
    far from the minimum would look converged. So what the data determine is judged by the
    Jacobian as it is here, and D enters as rows below.
    """

    def __init__(self, model: QuadraticModel, scale: Vector, low: Vector, high: Vector) -> None:
        norms = np.linalg.norm(model.factor, axis=0)
        self._norms = np.where(norms > 0, norms, 1.0)
        spectrum = spectrum_of(model.factor, self._norms)
        identified = spectrum.is_identified
        largest = spectrum.values[0] if spectrum.values[0] > 0 else 1.0
        # A direction that the data do not determine is not moved along: it gets the largest
        # singular value and no gradient, so that what follows has full rank.
        self._values = np.where(identified, spectrum.values, largest)
        self._right = spectrum.right
        self._rows = self._values[:, None] * spectrum.right
        self._target = np.where(identified, spectrum.left.T @ model.residual, 0.0)
        self._scale = scale
        self._low, self._high = low, high

    def at(self, damping: float) -> tuple[Vector, Bool[np.ndarray, " k"]]:
        """The minimiser in the box of ``‖S p + z‖² + λ ‖D p‖²``, and the bounds that hold it."""
        if damping == 0.0:
            free = -(self._right.T @ (self._target / self._values)) / self._norms
            return self._within(free, self._rows, self._target, self._norms)
        below = np.sqrt(damping) * self._scale / self._norms
        length = np.hypot(1.0, below)
        rows = np.vstack([self._rows, np.diag(below)]) / length
        target = np.concatenate([self._target, np.zeros(len(below))])
        both = scipy.linalg.qr(np.column_stack([rows, target]), mode="r")[0]
        k = len(below)
        scaled = solve_triangle(both[:k, :k], -both[:k, k])
        scale = length * self._norms
        return self._within(scaled / scale, rows, target, scale)

    def _within(
        self, free: Vector, rows: Float[np.ndarray, "j k"], residual: Vector, scale: Vector
    ) -> tuple[Vector, Bool[np.ndarray, " k"]]:
        """``min ‖rows (scale p) + residual‖`` in the box, whose solution without is `free`."""
        if np.all((free >= self._low) & (free <= self._high)):
            return free, np.zeros(len(free), bool)
        tiny = np.finfo(np.float64).tiny
        length = max(float(np.linalg.norm(residual)), tiny)
        unit = float(np.max(np.abs(rows)))
        shrink = unit / length * scale
        solution = scipy.optimize.lsq_linear(
            rows / unit,
            -residual / length,
            bounds=(np.minimum(self._low * shrink, -tiny), np.maximum(self._high * shrink, tiny)),
            method="bvls",
            tol=1e-14,
            max_iter=10 * len(free) + 50,
        )
        step = np.clip(solution.x / shrink, self._low, self._high)
        return step, np.asarray(solution.active_mask != 0)

    def length(self, vector: Vector) -> float:
        """``‖D p‖``, which a Newton step on a plateau may take beyond the largest number."""
        with np.errstate(over="ignore"):
            return float(scipy.linalg.norm(self._scale * vector, check_finite=False))

    # A secant on a plateau may be beyond the largest number: it is outside of the bounds then.
    @np.errstate(over="ignore", invalid="ignore")
    def find(self, radius: float, newton_length: float) -> float:
        """The damping at which ``‖D p‖`` is the radius, within 5 %.

        Its reciprocal is nearly linear in the damping (Hebden 1973), so that secants find it,
        kept within bounds as Moré (1978) has it.
        """
        grad = self._rows.T @ self._target * (self._norms / self._scale)
        # ‖D p(λ)‖ is at most ‖D⁻¹Sᵀz‖ / λ, and at most ‖z‖ / (2 √λ).
        tiny = np.finfo(np.float64).tiny
        low = 0.0
        high = min(
            float(np.linalg.norm(grad)) / radius,
            (float(np.linalg.norm(self._target)) / (2 * radius)) ** 2,
        )
        before, ratio_before = 0.0, radius / newton_length
        damping = 1e-3 * high
        for count in range(_MAX_SECANTS):
            length = self.length(self.at(damping)[0])
            if abs(length - radius) <= _RADIUS_TOLERANCE * radius or damping == before:
                break
            low, high = (damping, high) if length > radius else (low, damping)
            ratio = radius / max(length, tiny)
            rises = ratio - ratio_before
            secant = damping + (1 - ratio) * (damping - before) / rises if rises > 0 else 0.0
            before, ratio_before, damping = damping, ratio, secant
            if not low < damping < high or count % 4 == 3:
                damping = max(1e-3 * high, math.sqrt(low * high))
        return damping
