r"""Levenberg-Marquardt in a trust region, with or without bounds, one evaluation for each trial.

Each trial is evaluated together with its derivative, so an accepted step is already linearised
and a rejected one is retried from what is known. The step is exact (``subproblem.py``), the
scaling Moré's (1978): the largest column norms of the Jacobian seen so far.

A solve converges when the estimated distance to the minimum, in standard errors, is at most
`distance_tol`. In every direction v, ``|vᵀp| <= se(v) ‖S p‖ / s``, so ``d = ‖S p‖ / s`` with the
Newton step p (within the bounds) bounds the distance that the model sees; with the contraction ρ
observed from one Newton step to the next, the steps still to come add up to ``d / (1 - ρ)``. The
usual tests are not scale-free: a relative reduction of 1e-8 of the cost is 1e-8 m standard
errors squared, and large where m is 1e10.

The rounding error of the cost is some 100 eps of it. Below that a gain ratio is noise: a step is
then accepted if it shortens the way to the minimum, and if not, the solve has converged to
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.normal_equations import NormalEquations
from nlsq_dask.solvers.quadratic import (
    QuadraticModel,
    build_quadratic,
    next_whitening,
    spectrum_of,
)
from nlsq_dask.solvers.subproblem import Step, solve_subproblem
from nlsq_dask.status import Status

__all__ = ["Evaluation", "State", "Tolerances", "TrustRegion"]

_EPS = float(np.finfo(np.float64).eps)
_ACCEPT_GAIN = 1e-4


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass says about a point of the free parameters."""

    params: Float[np.ndarray, " k"]
    whitening: Float[np.ndarray, "k k"]
    normal: NormalEquations
    curvature: Float[np.ndarray, "k k"] | None = None
    penalty_cost: float = 0.0  # the part of the cost that comes from no row


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
class State:
    """Where the solve stands. `params` is the best point evaluated, `trial` the next one."""

    params: Float[np.ndarray, " k"]
    trial: Float[np.ndarray, " k"]
    evaluation: Evaluation
    model: QuadraticModel
    scale: Float[np.ndarray, " k"]
    radius: float
    newton: Step  # within the bounds, from `params`
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
        return self.model.cost

    @property
    def whitening(self) -> Float[np.ndarray, "k k"]:
        """The `R` for the next pass: the R factor of the last Jacobian accepted."""
        return next_whitening(self.model.gauss_newton_factor)

    @property
    def remaining_distance(self) -> float:
        """The estimated distance to the minimum in standard errors, steps to come included."""
        if self.contraction is None:
            return self.distance
        return self.distance / (1 - self.contraction) if self.contraction < 1 else np.inf

    @property
    def data_cost(self) -> float:
        """The cost without the penalties."""
        return self.cost - self.evaluation.penalty_cost

    @property
    def condition_number(self) -> float:
        """Of the Jacobian with columns of unit length."""
        norms = _positive(self.model.column_norms)
        return spectrum_of(self.model.gauss_newton_factor, norms).condition_number

    @property
    def tangent_cosine(self) -> float:
        """Cosine between the residuals and the tangent plane, within the bounds."""
        length = float(np.linalg.norm(self.model.gauss_newton_factor @ self.newton.vector))
        return length / np.sqrt(2 * self.cost) if self.cost > 0 else 0.0

    @property
    def cosines(self) -> Float[np.ndarray, " k"]:
        """Cosines between the residuals and the columns of the Jacobian."""
        scale = self.model.column_norms * np.sqrt(2 * self.cost)
        cosines = np.divide(self.model.grad, scale, out=np.zeros_like(scale), where=scale > 0)
        return np.asarray(cosines)

    @property
    def optimality(self) -> float:
        """The largest cosine of a parameter that no bound holds."""
        return float(np.max(np.abs(self.cosines[~self.newton.active]), initial=0.0))

    @property
    def active(self) -> Bool[np.ndarray, " k"]:
        """The bounds that hold the minimum."""
        return self.newton.active


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """``init`` and ``update`` take evaluations and return states; nothing else happens."""

    bounds: tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]
    tolerances: Tolerances
    initial_radius: float = 1.0

    def init(self, evaluation: Evaluation) -> State:
        """The state at a start, with the first trial chosen."""
        params = evaluation.params
        if not evaluation.normal.is_finite:
            return _unusable(evaluation)
        model = build_quadratic(evaluation.normal, evaluation.whitening, evaluation.curvature)
        norms = model.column_norms
        scale = np.where(norms > 0, norms, 1.0)
        radius = self.initial_radius * float(np.linalg.norm(scale * params))
        newton = solve_subproblem(model, scale, np.inf, self._to_bounds(params))
        state = State(
            params=params,
            trial=params,
            evaluation=evaluation,
            model=model,
            scale=scale,
            radius=radius if radius > 0 else self.initial_radius,
            newton=newton,
            step=newton,
            distance=self._distance(model, newton, evaluation),
            contraction=None,
            num_trials=0,
            num_accepted=0,
            was_accepted=True,
            was_finite=True,
            gain=np.nan,
            status=Status.RUNNING,
        )
        return self._next_trial(state)

    def update(self, state: State, evaluation: Evaluation) -> State:
        """The state after a trial: accepted or not, with the next trial chosen."""
        is_finite = evaluation.normal.is_finite
        tried = replace(
            state,
            num_trials=state.num_trials + 1,
            was_accepted=False,
            was_finite=is_finite,
            gain=np.nan,
        )
        shorter = 0.25 * state.step.scaled_norm
        if not is_finite:
            return self._next_trial(replace(tried, radius=shorter))
        candidate = self._accept(tried, evaluation)
        actual = state.cost - candidate.cost
        promised = state.step.reduction
        noise = self.tolerances.cost_noise(state.cost)
        if state.newton.reduction <= noise:
            if candidate.distance >= state.distance:
                return replace(tried, status=self._converged(Status.CONVERGED_TO_ROUNDING, tried))
            return self._next_trial(candidate)
        if promised <= noise:  # not by being near the minimum: the radius has collapsed
            return replace(tried, status=Status.STALLED)
        gain = actual / promised
        radius = self._next_radius(state, gain)
        if gain <= _ACCEPT_GAIN:
            return self._next_trial(replace(tried, radius=shorter, gain=gain))
        accepted = replace(candidate, radius=radius, gain=gain)
        return self._next_trial(self._minpack_tests(state, accepted, actual))

    def resume(self, state: State) -> State:
        """A state of an earlier solve; where that had used up its iterations, perhaps not yet."""
        if state.status is not Status.MAX_ITERATIONS:
            return state
        return self._next_trial(replace(state, status=Status.RUNNING))

    def _accept(self, state: State, evaluation: Evaluation) -> State:
        model = build_quadratic(evaluation.normal, evaluation.whitening, evaluation.curvature)
        scale = np.maximum(state.scale, model.column_norms)
        newton = solve_subproblem(model, scale, np.inf, self._to_bounds(evaluation.params))
        distance = self._distance(model, newton, evaluation)
        contraction = state.contraction
        if state.step.is_newton and 0 < state.distance < np.inf:
            contraction = distance / state.distance
        return replace(
            state,
            params=evaluation.params,
            evaluation=evaluation,
            model=model,
            scale=scale,
            newton=newton,
            distance=distance,
            contraction=contraction,
            num_accepted=state.num_accepted + 1,
            was_accepted=True,
        )

    def _next_trial(self, state: State) -> State:
        """Test for convergence, then choose the next point."""
        if state.status is not Status.RUNNING:
            return state
        is_near = state.remaining_distance <= self.tolerances.distance_tol
        if is_near and state.tangent_cosine <= self.tolerances.tangent_tol:
            return replace(state, status=self._converged(Status.CONVERGED, state))
        scaled_length = float(np.linalg.norm(state.scale * state.params))
        if state.radius <= _EPS * scaled_length or state.radius < np.finfo(np.float64).tiny:
            return replace(state, status=Status.STALLED)
        if not state.was_accepted and state.step.scaled_norm == 0.0:
            return replace(state, status=Status.STALLED)
        if state.num_trials >= self.tolerances.max_iterations:
            return replace(state, status=Status.MAX_ITERATIONS)
        step = state.newton
        if step.scaled_norm > state.radius:
            step = solve_subproblem(
                state.model, state.scale, state.radius, self._to_bounds(state.params)
            )
        lower, upper = self.bounds
        inside = np.nextafter(lower, upper), np.nextafter(upper, lower)
        trial = np.clip(state.params + step.vector, *inside)
        if np.array_equal(trial, state.params):
            return replace(state, status=self._converged(Status.CONVERGED_TO_ROUNDING, state))
        return replace(state, step=step, trial=trial)

    def _converged(self, status: Status, state: State) -> Status:
        """Converged, unless there is a direction that the data do not determine."""
        rank = spectrum_of(
            state.model.gauss_newton_factor, _positive(state.model.column_norms)
        ).rank
        return status if rank == len(state.params) else Status.UNIDENTIFIED

    def _minpack_tests(self, before: State, after: State, actual: float) -> State:
        """MINPACK's tests of an accepted step (Moré, Garbow & Hillstrom 1980)."""
        limits = self.tolerances
        moved = float(np.linalg.norm(after.scale * before.step.vector))
        length = float(np.linalg.norm(after.scale * after.params))
        promised = before.step.reduction
        if limits.ftol is not None and max(actual, promised) <= limits.ftol * before.cost:
            return replace(after, status=self._converged(Status.CONVERGED_FTOL, after))
        if limits.xtol is not None and moved <= limits.xtol * (limits.xtol + length):
            return replace(after, status=self._converged(Status.CONVERGED_XTOL, after))
        if limits.gtol is not None and after.optimality <= limits.gtol:
            return replace(after, status=self._converged(Status.CONVERGED_GTOL, after))
        return after

    @staticmethod
    def _next_radius(state: State, gain: float) -> float:
        if gain < 0.25:
            return 0.25 * state.step.scaled_norm
        if gain > 0.75:
            return max(state.radius, 2 * state.step.scaled_norm)
        return state.radius

    def _to_bounds(self, params: Vector) -> tuple[Vector, Vector]:
        lower, upper = self.bounds
        return np.minimum(lower - params, 0.0), np.maximum(upper - params, 0.0)

    def _distance(self, model: QuadraticModel, newton: Step, evaluation: Evaluation) -> float:
        """``‖S p‖ / s``: the longest way to the minimum, in standard errors."""
        dof = int(evaluation.normal.num_rows) - len(newton.vector)
        variance = 2 * (model.cost - evaluation.penalty_cost) / dof if dof > 0 else 0.0
        if self.tolerances.absolute_sigma:
            variance = min(variance, 1.0) if dof > 0 else 1.0
        length = float(np.linalg.norm(model.gauss_newton_factor @ newton.vector))
        if length == 0.0:
            return 0.0
        return length / np.sqrt(variance) if variance > 0 else np.inf


def _positive(norms: Vector) -> Vector:
    return np.where(norms > 0, norms, 1.0)


def _unusable(evaluation: Evaluation) -> State:
    k = len(evaluation.params)
    nothing = Step(
        vector=np.zeros(k), reduction=0.0, scaled_norm=0.0, damping=0.0, active=np.zeros(k, bool)
    )
    model = QuadraticModel(
        cost=float(evaluation.normal.cost),
        factor=np.zeros((k, k)),
        residual=np.zeros(k),
        gauss_newton_factor=np.zeros((k, k)),
    )
    return State(
        params=evaluation.params,
        trial=evaluation.params,
        evaluation=evaluation,
        model=model,
        scale=np.ones(k),
        radius=0.0,
        newton=nothing,
        step=nothing,
        distance=np.inf,
        contraction=None,
        num_trials=0,
        num_accepted=0,
        was_accepted=False,
        was_finite=False,
        gain=np.nan,
        status=Status.NOT_FINITE,
    )
