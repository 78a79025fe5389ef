"""What becomes of a trial, and when to stop: the same for every way to choose a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.solvers.subproblem import Step
from nlsq_dask.status import Status

__all__ = ["Progress", "Tolerances", "ending_of", "judge", "residual_scale", "with_trial"]

_EPS = float(np.finfo(np.float64).eps)
_ACCEPT_GAIN = 1e-4


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """When to stop. MINPACK's tests act only where given."""

    distance_tol: float
    max_iterations: int
    ftol: float | None = None
    xtol: float | None = None
    gtol: float | None = None
    tangent_tol: float = np.inf  # beside `distance_tol`
    absolute_sigma: bool = False
    # Σ w y², to tell residuals of rounding size from residuals.
    data_square: float = 0.0
    eps: float = _EPS  # of the arithmetic that residuals are computed in

    def cost_noise(self, cost: float) -> float:
        """Differences of the cost below this are rounding: of its sum, and of the residuals.

        A model errs by a few eps |y|, ten say, in each residual, and the cost then by at most
        ``10 eps ‖r‖ ‖y‖``.
        """
        residual = 10 * self.eps * np.sqrt(2 * cost * self.data_square)
        return 100 * self.eps * cost + float(residual) + 8 * self.eps**2 * self.data_square


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a solve stands. `params` is the best point evaluated, `trial` the next one."""

    params: Float[np.ndarray, " k"]
    trial: Float[np.ndarray, " k"]
    scale: Float[np.ndarray, " k"]  # D
    radius: float
    step: Step  # to `trial`
    distance: float  # d, in standard errors
    contraction: float | None  # ρ of the last Newton step
    num_trials: int
    num_accepted: int
    was_accepted: bool
    was_finite: bool  # the last trial
    gain: float  # of the last trial
    status: Status

    @property
    def cost(self) -> float:
        raise NotImplementedError

    @property
    def newton_reduction(self) -> float:
        """What the model promises for the whole way to its minimum."""
        raise NotImplementedError

    @property
    def tangent_cosine(self) -> float:
        """Cosine between the residuals and the tangent plane, within the bounds."""
        raise NotImplementedError

    @property
    def optimality(self) -> float:
        """The largest cosine of a parameter that no bound holds."""
        raise NotImplementedError

    @property
    def remaining_distance(self) -> float:
        """The estimated distance to the minimum in standard errors, steps to come included."""
        if self.contraction is None:
            return self.distance
        return self.distance / (1 - self.contraction) if self.contraction < 1 else np.inf


_Progress = TypeVar("_Progress", bound=Progress)


def judge(limits: Tolerances, tried: _Progress, candidate: _Progress | None) -> _Progress:
    """After a trial: `candidate`, the state that accepts it, or `tried` with a shorter radius.

    A trial that was not finite has no candidate.
    """
    shorter = 0.25 * tried.step.scaled_norm
    if candidate is None:
        return replace(tried, radius=shorter)
    actual = tried.cost - candidate.cost
    promised = tried.step.reduction
    noise = limits.cost_noise(tried.cost)
    if tried.newton_reduction <= noise:
        if candidate.distance >= tried.distance:
            return replace(tried, status=Status.CONVERGED_TO_ROUNDING)
        return candidate
    if promised <= noise:  # not by being near the minimum: the radius has collapsed
        return replace(tried, status=Status.STALLED)
    gain = actual / promised
    if gain <= _ACCEPT_GAIN:
        return replace(tried, radius=shorter, gain=gain)
    accepted = replace(candidate, radius=_next_radius(tried, gain), gain=gain)
    return replace(accepted, status=_minpack_status(limits, tried, accepted, actual))


def _next_radius(state: Progress, gain: float) -> float:
    if gain < 0.25:
        return 0.25 * state.step.scaled_norm
    if gain > 0.75:
        return max(state.radius, 2 * state.step.scaled_norm)
    return state.radius


def _minpack_status(limits: Tolerances, before: Progress, after: Progress, actual: float) -> Status:
    """MINPACK's tests of an accepted step (Moré, Garbow & Hillstrom 1980)."""
    moved = float(np.linalg.norm(after.scale * before.step.vector))
    length = float(np.linalg.norm(after.scale * after.params))
    promised = before.step.reduction
    if limits.ftol is not None and max(actual, promised) <= limits.ftol * before.cost:
        return Status.CONVERGED_FTOL
    if limits.xtol is not None and moved <= limits.xtol * (limits.xtol + length):
        return Status.CONVERGED_XTOL
    if limits.gtol is not None and after.optimality <= limits.gtol:
        return Status.CONVERGED_GTOL
    return Status.RUNNING


def ending_of(limits: Tolerances, state: Progress) -> Status:
    """Whether another trial is worth it."""
    is_near = state.remaining_distance <= limits.distance_tol
    if is_near and state.tangent_cosine <= limits.tangent_tol:
        return Status.CONVERGED
    scaled_length = float(np.linalg.norm(state.scale * state.params))
    if state.radius <= _EPS * scaled_length or state.radius < np.finfo(np.float64).tiny:
        return Status.STALLED
    if not state.was_accepted and state.step.scaled_norm == 0.0:
        return Status.STALLED
    if state.num_trials >= limits.max_iterations:
        return Status.MAX_ITERATIONS
    return Status.RUNNING


def with_trial(
    state: _Progress,
    step: Step,
    bounds: tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]],
) -> _Progress:
    """The state with its next point, strictly within the bounds."""
    lower, upper = bounds
    inside = np.nextafter(lower, upper), np.nextafter(upper, lower)
    trial = np.clip(state.params + step.vector, *inside)
    if np.array_equal(trial, state.params):
        # A step that the radius cut says nothing of how far the minimum is.
        ended = Status.CONVERGED_TO_ROUNDING if step.is_newton else Status.STALLED
        return replace(state, status=ended)
    return replace(state, step=step, trial=trial)


def residual_scale(limits: Tolerances, data_cost: float, dof: int) -> float:
    """s, the standard deviation of a residual, that standard errors are in proportion to.

    With absolute sigma it is 1, or less where the residuals are smaller than that.
    """
    variance = 2 * data_cost / dof if dof > 0 else 0.0
    if limits.absolute_sigma:
        variance = min(variance, 1.0) if dof > 0 else 1.0
    return float(np.sqrt(variance))
