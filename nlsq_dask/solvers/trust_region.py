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

Near the end a Newton step leaves a share of the gradient that can be told before the step is
evaluated: the step before left about as much, and a sample shows what the model leaves out. Where
a pass takes long, `land` takes such a step and saves the pass.

The rounding error of the cost is some 100 eps of it. Below that a gain ratio is noise: a step is
then accepted if it shortens the way to the minimum, and if not, the solve has converged to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.normal_equations import NormalEquations
from nlsq_dask.solvers.acceptance import (
    Progress,
    Tolerances,
    ending_of,
    judge,
    residual_scale,
    with_trial,
)
from nlsq_dask.solvers.bending import along, carried, is_slow, learned, relative_size
from nlsq_dask.solvers.quadratic import (
    QuadraticModel,
    build_quadratic,
    next_whitening,
    spectrum_of,
)
from nlsq_dask.solvers.subproblem import Step, solve_subproblem
from nlsq_dask.status import Status

__all__ = ["Evaluation", "State", "Tolerances", "TrustRegion"]


_LEAST_KEPT = 0.99  # of what a step promises, when it is bent: by a tenth of its length
_LANDING_DISTANCE = 1e-2  # standard errors: no further is the covariance that of the end
_ROOM_SEEN = 10.0  # times the share that the step before left


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass says about a point of the free parameters."""

    params: Float[np.ndarray, " k"]
    whitening: Float[np.ndarray, "k k"]
    normal: NormalEquations
    curvature: Float[np.ndarray, "k k"] | None = None
    penalty_cost: float = 0.0  # the part of the cost that comes from no row

    def curvature_with(self, secant: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
        """All that is known of the Hessian beside the gram, `secant` having been learned."""
        return secant if self.curvature is None else self.curvature + secant


@dataclass(frozen=True, kw_only=True)
class State(Progress):
    """Where the solve stands, with the quadratic model at its best point."""

    evaluation: Evaluation
    model: QuadraticModel
    newton: Step  # within the bounds, from `params`
    secant: Float[np.ndarray, "k k"]  # along the evaluation's R⁻¹, what steps have shown
    way: Float[np.ndarray, " k"]  # the Newton step that `contraction` is of; zero if forgotten
    turn: Float[np.ndarray, " k"]  # of z, on the way to the trial
    has_landed: bool = False  # `params` are at the end of a step that was not evaluated

    @property
    def question(self) -> tuple[Vector, Vector]:
        """What the next evaluation is asked: the trial, and the `R` to evaluate it with."""
        return self.trial, self.whitening

    @property
    def here(self) -> tuple[Vector, Vector]:
        """The same for the best point, to be evaluated again."""
        return self.params, self.whitening

    @property
    def wants_curvature(self) -> bool:
        """Whether the next evaluation should come with second derivatives."""
        return self.evaluation.curvature is not None or is_slow(self.bending)

    @property
    def bending(self) -> float:
        """How much Gauss-Newton leaves out, relative to it: as steps have shown, or the last did.

        At the end of a solve that learns, the last ratio may be that of rounding errors.
        """
        size = relative_size(self.secant, np.asarray(self.evaluation.normal.gram))
        is_at_end = self.status is not Status.RUNNING and self.secant.any()
        return size if is_at_end else max(size, self.contraction or 0.0)

    @property
    def cost(self) -> float:
        return self.model.cost

    @property
    def newton_reduction(self) -> float:
        return self.newton.reduction

    @property
    def whitening(self) -> Float[np.ndarray, "k k"]:
        """The `R` for the next pass: the R factor of the last Jacobian accepted."""
        return next_whitening(self.model.gauss_newton_factor)

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
        norms = self.model.column_norms
        if not np.isfinite(self.cost):
            return np.zeros_like(norms)
        scale = norms * np.sqrt(2 * self.cost)
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
            secant=np.zeros((len(params), len(params))),
            way=np.zeros(len(params)),
            turn=np.zeros(len(params)),
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
        candidate = self._accept(tried, evaluation) if is_finite else None
        return self._next_trial(judge(self.tolerances, tried, candidate))

    @np.errstate(over="ignore", invalid="ignore")  # of steps on a plateau
    def bend(self, state: State, remainder: Vector) -> State:
        """The state with a trial where the gradient, not only its linear model, vanishes.

        Along the columns of the next evaluation's ``R⁻¹``, `remainder` is what the step p leaves
        of the gradient, ``½ Jᵀ D²r[p, p]``. Transtrum & Sethna (2012, sec. 2) correct steps by the
        same derivative, and call it geodesic acceleration.
        """
        step = state.step
        if not np.isfinite(remainder).all():
            return state
        model = state.model
        turn = scipy.linalg.lstsq(model.factor.T, state.whitening.T @ remainder)[0]
        bent = replace(model, residual=model.residual + turn)
        found = solve_subproblem(bent, state.scale, np.inf, self._to_bounds(state.params))
        found = replace(found, reduction=model.reduction(found.vector))
        if not found.reduction >= _LEAST_KEPT * step.reduction:
            return state
        return with_trial(replace(state, turn=turn), found, self.bounds)

    def land(self, state: State, foresee: Callable[[State], float]) -> State:
        """The end of a step that needs no evaluation; the state itself where there is no such.

        What is left of the gradient there is, for the part along the step before, the share that
        this left, tenfold, as it was the end of that step which taught the model; and what is
        foreseen of the rest.
        """
        may_land = (
            state.status is Status.RUNNING
            and state.was_accepted
            and state.distance <= _LANDING_DISTANCE
            and state.step.is_newton
            and not (state.step.active | state.newton.active).any()
            and state.evaluation.penalty_cost == 0.0  # what is foreseen is of rows alone
        )
        if not may_land or state.contraction is None:
            return state
        normal = state.evaluation.normal
        left = _ROOM_SEEN * state.contraction + foresee(state)
        if not np.isfinite(left):
            return state
        end = replace(normal, grad=left * normal.grad, cost=normal.cost - state.step.reduction)
        there = replace(state.evaluation, params=state.trial, normal=end)
        landed = replace(self._at(state, there, state.secant), has_landed=True)
        if ending_of(self.tolerances, landed) is not Status.CONVERGED:
            return state
        return replace(landed, status=Status.CONVERGED) if _is_identified(landed.model) else state

    def resume(self, state: State) -> State:
        """A state of an earlier solve; where that had used up its iterations, perhaps not yet."""
        if state.status is not Status.MAX_ITERATIONS:
            return state
        return self._next_trial(replace(state, status=Status.RUNNING))

    def _accept(self, state: State, evaluation: Evaluation) -> State:
        accepted = self._at(state, evaluation, self._learned(state, evaluation))
        contraction, way = state.contraction, state.way
        if state.step.is_newton and 0 < state.distance < np.inf:
            contraction = accepted.distance / state.distance
            way = evaluation.params - state.params
        if state.secant.any() and not accepted.secant.any():
            way = np.zeros_like(way)
        return replace(
            accepted,
            contraction=contraction,
            way=way,
            num_accepted=state.num_accepted + 1,
            was_accepted=True,
        )

    def _at(self, state: State, evaluation: Evaluation, secant: Float[np.ndarray, "k k"]) -> State:
        """The state with another best point."""
        curvature = evaluation.curvature_with(secant)
        model = build_quadratic(evaluation.normal, evaluation.whitening, curvature)
        scale = np.maximum(state.scale, model.column_norms)
        newton = solve_subproblem(model, scale, np.inf, self._to_bounds(evaluation.params))
        return replace(
            state,
            params=evaluation.params,
            evaluation=evaluation,
            model=model,
            scale=scale,
            newton=newton,
            secant=secant,
            distance=self._distance(model, newton, evaluation),
        )

    @np.errstate(over="ignore", invalid="ignore")  # of steps on a plateau
    def _learned(self, state: State, evaluation: Evaluation) -> Float[np.ndarray, "k k"]:
        """What the way to an evaluation has shown beside what earlier ones had."""
        whitening, model = evaluation.whitening, state.model
        secant = carried(state.secant, state.evaluation.whitening, whitening)
        if (state.evaluation.curvature is None) != (evaluation.curvature is None):
            return np.zeros_like(secant)  # that is known from elsewhere now
        if not state.step.is_newton:
            return secant
        step = evaluation.params - state.params
        end = model.residual + state.turn + model.factor @ step
        foreseen = along(model.factor, whitening).T @ end
        left = np.asarray(evaluation.normal.grad) - foreseen
        return learned(secant, np.asarray(evaluation.normal.gram), whitening @ step, left)

    def _next_trial(self, state: State) -> State:
        """Test for convergence, then choose the next point."""
        if state.status is Status.RUNNING:
            state = replace(state, status=ending_of(self.tolerances, state))
        if state.status is Status.RUNNING:
            step = state.newton
            if step.scaled_norm > state.radius:
                step = solve_subproblem(
                    state.model, state.scale, state.radius, self._to_bounds(state.params)
                )
            state = replace(state, turn=np.zeros(len(step.vector)))
            state = with_trial(state, step, self.bounds)
        if state.status.is_success and not _is_identified(state.model):
            return replace(state, status=Status.UNIDENTIFIED)
        return state

    def _to_bounds(self, params: Vector) -> tuple[Vector, Vector]:
        lower, upper = self.bounds
        return np.minimum(lower - params, 0.0), np.maximum(upper - params, 0.0)

    def _distance(self, model: QuadraticModel, newton: Step, evaluation: Evaluation) -> float:
        """``‖S p‖ / s``: the longest way to the minimum, in standard errors."""
        dof = int(evaluation.normal.num_rows) - len(newton.vector)
        scale = residual_scale(self.tolerances, model.cost - evaluation.penalty_cost, dof)
        length = float(np.linalg.norm(model.gauss_newton_factor @ newton.vector))
        if length == 0.0:
            return 0.0
        return length / scale if scale > 0 else np.inf


def _is_identified(model: QuadraticModel) -> bool:
    """Whether the data determine every direction."""
    spectrum = spectrum_of(model.gauss_newton_factor, _positive(model.column_norms))
    return spectrum.rank == len(model.residual)


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
        secant=np.zeros((k, k)),
        way=np.zeros(k),
        turn=np.zeros(k),
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
