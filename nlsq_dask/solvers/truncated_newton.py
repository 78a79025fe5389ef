r"""Truncated Newton in a trust region, for many parameters: no k x k matrix anywhere.

Each question is either about a trial, its cost and gradient, or about products of the
Gauss-Newton Hessian at the best point so far, with which conjugate gradients (``conjugate.py``)
choose the next trial. A rejected trial is retried from what is known, nearer on the same way.

Newton's step is known only as well as conjugate gradients have converged, and before they
began not at all. The distance to the minimum, in standard errors, is then estimated from the
preconditioner M ≈ H: ``√(gᵀM⁻¹g / λ) / s`` is no shorter than ``√(gᵀH⁻¹g) / s`` where λ is the
smallest eigenvalue of M⁻¹H, for which the last solve's smallest Ritz value is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.normal_equations import CostGradient
from nlsq_dask.solvers.acceptance import (
    Progress,
    Tolerances,
    ending_of,
    judge,
    residual_scale,
    with_trial,
)
from nlsq_dask.solvers.conjugate import Conjugate, Limits, advance, begin
from nlsq_dask.solvers.subproblem import TO_THE_BOUND, Step
from nlsq_dask.status import Status

__all__ = ["NewtonState", "Preconditioner", "Products", "Slope", "TruncatedNewton"]

_BELOW_TOLERANCE = 0.1  # of `distance_tol`: no product is spent on digits below it
_WITHIN_REACH = 100  # times `distance_tol`: nearer than that, the solve goes on to its end


class Preconditioner(Protocol):
    """Solves with M ≈ H, the Hessian at one point."""

    @property
    def scale(self) -> Float[np.ndarray, " k"]:
        """Square roots of the Hessian's diagonal."""

    @property
    def is_seen(self) -> Bool[np.ndarray, " k"]:
        """Parameters on which some row that M knows, or a penalty, depends."""

    def __call__(self, residual: Vector, low: Vector, high: Vector, /) -> Vector: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Slope:
    """What one pass says about a trial."""

    params: Float[np.ndarray, " k"]
    normal: CostGradient  # by the free parameters, penalties included
    precondition: Preconditioner
    penalty_cost: float = 0.0  # the part of the cost that comes from no row


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """What one pass says about a few vectors."""

    products: Float[np.ndarray, "v k"]


@dataclass(frozen=True, kw_only=True)
class NewtonState(Progress):
    """Where the solve stands: at a trial, or amid conjugate gradients."""

    evaluation: Slope
    conjugate: Conjugate | None
    smallest_ratio: float  # λ
    residual_scale: float  # s

    @property
    def is_multiplying(self) -> bool:
        """Whether products come next."""
        return self.conjugate is not None and not self.conjugate.is_done

    @property
    def question(self) -> tuple[Vector, Float[np.ndarray, "v k"] | None]:
        """The point, and the vectors to multiply there; None for its cost and gradient."""
        if self.conjugate is not None and not self.conjugate.is_done:
            return self.params, self.conjugate.vectors
        return self.trial, None

    @property
    def here(self) -> tuple[Vector, None]:
        """The question that is asked of the best point."""
        return self.params, None

    @property
    def cost(self) -> float:
        return float(self.evaluation.normal.cost)

    @property
    def data_cost(self) -> float:
        """The cost without the penalties."""
        return self.cost - self.evaluation.penalty_cost

    @property
    def newton_reduction(self) -> float:
        if not np.isfinite(self.distance):
            return np.inf
        return 0.5 * (self.distance * self.residual_scale) ** 2

    @property
    def tangent_cosine(self) -> float:
        if not np.isfinite(self.distance):
            return np.inf
        length = self.distance * self.residual_scale
        return length / np.sqrt(2 * self.cost) if self.cost > 0 else 0.0

    @property
    def cosines(self) -> Float[np.ndarray, " k"]:
        """Cosines between the residuals and the columns of the Jacobian."""
        size = self.evaluation.precondition.scale * np.sqrt(2 * self.cost)
        grad = np.asarray(self.evaluation.normal.grad)
        return np.asarray(np.divide(grad, size, out=np.zeros_like(grad), where=size > 0))

    @property
    def active(self) -> Bool[np.ndarray, " k"]:
        """The bounds that hold the minimum."""
        return self.step.active

    @property
    def is_idle(self) -> Bool[np.ndarray, " k"]:
        """Parameters on which nothing depends, as far as can be seen without a matrix."""
        has_force = np.asarray(self.evaluation.normal.grad) != 0
        return np.asarray(~(has_force | self.evaluation.precondition.is_seen))

    @property
    def optimality(self) -> float:
        return float(np.max(np.abs(self.cosines[~self.active]), initial=0.0))

    @property
    def condition_number(self) -> float:
        """Not known without a matrix."""
        return np.nan


@dataclass(frozen=True, kw_only=True)
class TruncatedNewton:
    """``init`` and ``update`` take what was asked for and return states.

    `max_products`, `relative_tolerance` and `absolute_tolerance` limit the conjugate gradients
    of each trial; the last in standard errors.
    """

    bounds: tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]
    tolerances: Tolerances
    max_products: int
    relative_tolerance: float
    absolute_tolerance: float
    initial_radius: float = 1.0

    def init(self, evaluation: Slope) -> NewtonState:
        """The state at a start, with the first question chosen."""
        params, scale = evaluation.params, evaluation.precondition.scale
        is_finite = evaluation.normal.is_finite
        radius = self.initial_radius * float(np.linalg.norm(scale * params))
        k = len(params)
        nowhere = Step(
            vector=np.zeros(k),
            reduction=0.0,
            scaled_norm=0.0,
            damping=0.0,
            active=np.zeros(k, bool),
        )
        state = NewtonState(
            params=params,
            trial=params,
            evaluation=evaluation,
            conjugate=None,
            smallest_ratio=1.0,
            residual_scale=self._residual_scale(evaluation),
            scale=scale,
            radius=radius if radius > 0 else self.initial_radius,
            step=nowhere,
            distance=np.inf,
            contraction=None,
            num_trials=0,
            num_accepted=0,
            was_accepted=is_finite,
            was_finite=is_finite,
            gain=np.nan,
            status=Status.RUNNING if is_finite else Status.NOT_FINITE,
        )
        return self._next_question(self._at(state, evaluation)) if is_finite else state

    def update(self, state: NewtonState, answer: Slope | Products) -> NewtonState:
        """The state after a product or a trial."""
        if isinstance(answer, Products):
            return self._after_products(state, answer.products)
        tried = replace(
            state,
            num_trials=state.num_trials + 1,
            was_accepted=False,
            was_finite=answer.normal.is_finite,
            gain=np.nan,
        )
        candidate = self._accept(tried, answer) if tried.was_finite else None
        return self._next_question(judge(self.tolerances, tried, candidate))

    def _accept(self, state: NewtonState, evaluation: Slope) -> NewtonState:
        accepted = self._at(
            replace(
                state,
                scale=np.maximum(state.scale, evaluation.precondition.scale),
                num_accepted=state.num_accepted + 1,
                was_accepted=True,
            ),
            evaluation,
        )
        if not (state.step.is_newton and 0 < state.distance < np.inf):
            return accepted
        return replace(accepted, contraction=accepted.distance / state.distance)

    def _at(self, state: NewtonState, evaluation: Slope) -> NewtonState:
        """At a new point, with the first direction of conjugate gradients there."""
        params = evaluation.params
        conjugate = begin(
            np.asarray(evaluation.normal.grad),
            self._box(params),
            state.scale,
            evaluation.precondition,
        )
        scale = self._residual_scale(evaluation)
        length = conjugate.length / np.sqrt(state.smallest_ratio)
        return replace(
            state,
            params=params,
            evaluation=evaluation,
            conjugate=conjugate,
            step=replace(state.step, active=conjugate.is_snapping),
            residual_scale=scale,
            distance=_in_standard_errors(length, scale),
        )

    def _next_question(self, state: NewtonState) -> NewtonState:
        """Test for convergence; then the same way less far, or the products of a new one."""
        if state.status is Status.RUNNING:
            state = replace(state, status=ending_of(self.tolerances, state))
        if state.status is Status.RUNNING and not state.was_accepted:
            return self._settled(with_trial(state, _shortened(state), self.bounds))
        return self._settled(state)

    def _after_products(
        self, state: NewtonState, products: Float[np.ndarray, "v k"]
    ) -> NewtonState:
        """A step of conjugate gradients; after the last, the trial."""
        assert state.conjugate is not None
        precondition = state.evaluation.precondition
        conjugate = advance(state.conjugate, products, precondition, self._limits(state))
        going = replace(state, conjugate=conjugate)
        if not conjugate.is_done:
            return going
        if not np.any(conjugate.step):
            return replace(going, status=Status.STALLED)
        ratio = conjugate.smallest_ratio
        if conjugate.is_cut:
            chosen = replace(going, smallest_ratio=ratio)
        else:
            left = conjugate.length / np.sqrt(ratio)
            length = float(np.hypot(conjugate.seen_length, left))
            distance = _in_standard_errors(length, state.residual_scale)
            chosen = replace(going, smallest_ratio=ratio, distance=distance)
        step = Step(
            vector=conjugate.step,
            reduction=conjugate.reduction,
            scaled_norm=float(np.linalg.norm(state.scale * conjugate.step)),
            damping=np.nan if conjugate.is_cut else 0.0,
            active=conjugate.active,
        )
        chosen = replace(chosen, status=ending_of(self.tolerances, chosen))
        if chosen.status is Status.RUNNING:
            chosen = with_trial(chosen, step, self.bounds)
        return self._settled(chosen)

    def _limits(self, state: NewtonState) -> Limits:
        assert state.conjugate is not None
        end = self.tolerances.distance_tol * state.residual_scale
        goal = self.relative_tolerance * state.conjugate.first_length
        # Another trial takes more passes than the last digits of this one.
        goal = _BELOW_TOLERANCE * end if goal <= _WITHIN_REACH * end else goal
        return Limits(
            max_products=self.max_products,
            tolerance=max(goal, self.absolute_tolerance * state.residual_scale),
            radius=state.radius,
        )

    def _settled(self, state: NewtonState) -> NewtonState:
        """Converged, unless there is a parameter on which nothing depends."""
        if state.status.is_success and state.is_idle.any():
            return replace(state, status=Status.UNIDENTIFIED)
        return state

    def _box(self, params: Vector) -> tuple[Vector, Vector]:
        lower, upper = self.bounds
        return (
            TO_THE_BOUND * np.minimum(lower - params, 0.0),
            TO_THE_BOUND * np.maximum(upper - params, 0.0),
        )

    def _residual_scale(self, evaluation: Slope) -> float:
        normal = evaluation.normal
        dof = int(normal.num_rows) - len(evaluation.params)
        return residual_scale(self.tolerances, float(normal.cost) - evaluation.penalty_cost, dof)


def _in_standard_errors(length: float, scale: float) -> float:
    if length == 0.0:
        return 0.0
    return length / scale if scale > 0 else np.inf


def _shortened(state: NewtonState) -> Step:
    """The step that was rejected, cut to the radius: its image is known, so no pass is spent."""
    assert state.conjugate is not None
    step, image = state.step, state.conjugate.image
    full = float(np.linalg.norm(state.scale * state.conjugate.step))
    share = state.radius / full
    vector = share * state.conjugate.step
    reduction = float(-vector @ (state.conjugate.grad + 0.5 * share * image))
    return replace(
        step, vector=vector, reduction=reduction, scaled_norm=state.radius, damping=np.nan
    )
