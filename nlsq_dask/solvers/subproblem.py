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
import scipy.optimize

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.solvers.quadratic import QuadraticModel, Spectrum, spectrum_of

__all__ = ["TO_THE_BOUND", "Step", "solve_subproblem"]

# A step goes this far towards a bound at most, so that every iterate is strictly feasible and
# models that are undefined on the bound itself stay defined.
TO_THE_BOUND = 1 - 1e-8
_RADIUS_TOLERANCE = 0.05


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
    spectrum = spectrum_of(model.factor, scale)
    low, high = (TO_THE_BOUND * side * scale for side in to_bounds)
    damped = _DampedSteps(model, spectrum, low, high)
    damping = 0.0
    scaled, active = damped.at(0.0)
    if np.linalg.norm(scaled) > radius * (1 + _RADIUS_TOLERANCE):
        damping = damped.find(radius)
        scaled, active = damped.at(damping)
    vector = scaled / scale
    return Step(
        vector=vector,
        reduction=model.reduction(vector),
        scaled_norm=float(np.linalg.norm(scaled)),
        damping=damping,
        active=active,
    )


class _DampedSteps:
    """``λ -> D p(λ)``, in variables scaled by `D`."""

    def __init__(
        self, model: QuadraticModel, spectrum: Spectrum, low: Vector, high: Vector
    ) -> None:
        identified = spectrum.is_identified
        largest = spectrum.values[0] if spectrum.values[0] > 0 else 1.0
        # A direction that the data do not determine is not moved along: it gets the largest
        # singular value and no gradient, so that what follows has full rank.
        self._values = np.where(identified, spectrum.values, largest)
        self._right = spectrum.right
        self._target = np.where(identified, spectrum.left.T @ model.residual, 0.0)
        self._low, self._high = low, high

    def at(self, damping: float) -> tuple[Vector, Bool[np.ndarray, " k"]]:
        filtered = self._values * self._target / (self._values**2 + damping)
        free = -self._right.T @ filtered
        if np.all((free >= self._low) & (free <= self._high)):
            return free, np.zeros(len(free), bool)
        return self._bounded(damping)

    def _bounded(self, damping: float) -> tuple[Vector, Bool[np.ndarray, " k"]]:
        k = len(self._values)
        length = max(float(np.linalg.norm(self._target)), np.finfo(np.float64).tiny)
        unit = self._values[0]
        rows = np.vstack(
            [self._values[:, None] * self._right / unit, np.sqrt(damping) / unit * np.eye(k)]
        )
        goal = np.concatenate([-self._target / length, np.zeros(k)])
        shrink = unit / length
        solution = scipy.optimize.lsq_linear(
            rows,
            goal,
            bounds=(
                np.minimum(self._low * shrink, -np.finfo(np.float64).tiny),
                np.maximum(self._high * shrink, np.finfo(np.float64).tiny),
            ),
            method="bvls",
            tol=1e-14,
            max_iter=10 * k + 50,
        )
        step = np.clip(solution.x / shrink, self._low, self._high)
        return step, np.asarray(solution.active_mask != 0)

    def find(self, radius: float) -> float:
        """The damping at which the step is as long as the radius."""

        def excess(log_damping: float) -> float:
            length = float(np.linalg.norm(self.at(float(np.exp(log_damping)))[0]))
            return math.log(max(length, np.finfo(np.float64).tiny) / radius)

        # ‖p(λ)‖ <= ‖z‖ / (2 √λ), so that the upper end is short enough.
        upper = 2 * np.log(max(float(np.linalg.norm(self._target)), 1e-300) / radius)
        lower = min(2 * np.log(self._values[-1]), upper) - 40.0
        if excess(upper) >= 0:
            return float(np.exp(upper))
        if excess(lower) <= 0:
            return float(np.exp(lower))
        root = scipy.optimize.brentq(
            excess, lower, upper, xtol=_RADIUS_TOLERANCE, rtol=1e-8, maxiter=100
        )
        return float(np.exp(root))
