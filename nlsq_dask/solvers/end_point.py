r"""An end point of a profile-likelihood interval, one evaluation for each trial.

The profile of parameter j is ``P(q) = min F(φ) over φ with φ_j = q``, and the interval's end is
where it has risen by Δ above the minimum. Venzon & Moolgavkar (1988) solve for all parameters at
once: at each point the cost is replaced by its quadratic model, whose profile is a parabola,

    P(φ_j + q) ≈ F - ½‖z‖² + ½ (q - q₀)² / c,    q₀ = -eⱼᵀS⁻¹z,    c = ‖S⁻ᵀeⱼ‖²,

and the next point is where that parabola reaches Δ. With Gauss-Newton's model (``quadratic.py``)
a step costs one evaluation. Where other parameters run into their bounds, the profile of the
model is that of a bounded least-squares problem instead, still convex in q.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

import numpy as np
import scipy
import scipy.linalg

from nlsq_dask._typing import Float, Vector
from nlsq_dask.solvers.quadratic import (
    QuadraticModel,
    build_quadratic,
    next_whitening,
    rank_tolerance,
    spectrum_of,
)
from nlsq_dask.solvers.subproblem import solve_subproblem
from nlsq_dask.solvers.trust_region import Evaluation

__all__ = ["EndPointSearch", "EndStatus", "Trace"]

_TOLERANCE = 1e-3  # standard errors that the end point moves
_SETTLED = 0.05  # the same for all parameters together, whose effect on the end is squared
_FAR = 100.0  # standard errors; beyond is nowhere
_GROWTH = 2.0  # of the way from the minimum, by one step
_JUMP = 10.0  # times Δ: the model said Δ at most
_LOWER = 0.01  # of Δ: a cost as much below the minimum is not rounding
_MAX_TRIALS = 30


class EndStatus(enum.Enum):
    """What is at the end of an interval. The value is the message the user reads."""

    RUNNING = "running"
    FOUND = "the profile reaches the threshold"
    AT_BOUND = "the profile is below the threshold up to the parameter's bound"
    NONE = f"the profile is below the threshold for {_FAR:.0f} standard errors"
    NOT_A_MINIMUM = "the cost is lower on the way than at the fit: fit again from there"
    NOT_CONVERGED = f"no end point after {_MAX_TRIALS} passes over the data"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Where a search stands: the last usable point, its model, and the next trial."""

    params: Float[np.ndarray, " k"]
    model: QuadraticModel
    inside: Float[np.ndarray, " k"]  # the outermost point known to be below the threshold
    trial: Float[np.ndarray, " k"]
    end: float
    moved: float  # standard errors, of the end point by the last step; inf before there is one
    num_trials: int
    status: EndStatus

    @property
    def whitening(self) -> Float[np.ndarray, "k k"]:
        return next_whitening(self.model.gauss_newton_factor)


@dataclass(frozen=True, kw_only=True)
class EndPointSearch:
    """``init`` and ``update`` take evaluations and return where the search stands.

    Attributes
    ----------
    index, side : int
        The parameter, and -1 for its lower end or 1 for its upper.
    minimum : (k,)
        Where the search begins.
    threshold : float
        The cost at the end point, Δ above the minimum.
    rise : float
        Δ.
    standard_error : float
        Of the parameter.
    scale : float
        s, the standard deviation of a residual.
    bounds : ((k,), (k,))
    """

    index: int
    side: int
    minimum: Float[np.ndarray, " k"]
    threshold: float
    rise: float
    standard_error: float
    scale: float
    bounds: tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]

    def init(self, model: QuadraticModel) -> Trace:
        """The first trial, from the model at the minimum."""
        trace = Trace(
            params=self.minimum,
            model=model,
            inside=self.minimum,
            trial=self.minimum,
            end=self.minimum[self.index],
            moved=np.inf,
            num_trials=0,
            status=EndStatus.RUNNING,
        )
        if self._bound_distance <= _TOLERANCE * self.standard_error:
            return replace(trace, status=EndStatus.AT_BOUND, end=self._bound)
        return self._next_trial(trace)

    def update(self, trace: Trace, evaluation: Evaluation) -> Trace:
        """After a trial: settled, or with the next trial chosen."""
        tried = replace(trace, num_trials=trace.num_trials + 1)
        cost = float(evaluation.normal.cost)
        is_usable = evaluation.normal.is_finite and cost <= self.threshold + _JUMP * self.rise
        if is_usable and cost < self.threshold - (1 + _LOWER) * self.rise:
            return replace(tried, params=trace.trial, end=np.nan, status=EndStatus.NOT_A_MINIMUM)
        if tried.num_trials >= _MAX_TRIALS:
            return replace(tried, end=np.nan, status=EndStatus.NOT_CONVERGED)
        if not is_usable:
            return replace(tried, trial=0.5 * (trace.params + trace.trial), moved=np.inf)
        is_inside = cost <= self.threshold
        return self._next_trial(
            replace(
                tried,
                params=trace.trial,
                model=build_quadratic(
                    evaluation.normal, evaluation.whitening, evaluation.curvature
                ),
                inside=trace.trial if is_inside else trace.inside,
            )
        )

    # -- along the parameter, outwards

    def _way(self, params: Vector) -> float:
        return float(self.side * (params[self.index] - self.minimum[self.index]))

    @property
    def _bound(self) -> float:
        return float(self.bounds[self.side > 0][self.index])

    @property
    def _bound_distance(self) -> float:
        return abs(self._bound - float(self.minimum[self.index]))

    @property
    def _limit(self) -> float:
        """As far as any point may go: strictly inside of the bound."""
        return min((1 - 1e-8) * self._bound_distance, _FAR * self.standard_error)

    def _is_at_limit(self, params: Vector) -> bool:
        return self._way(params) >= (1 - 1e-6) * self._limit

    def _next_trial(self, trace: Trace) -> Trace:
        way = self._way(trace.params)
        is_inside = trace.model.cost <= self.threshold
        if is_inside and self._is_at_limit(trace.params):
            return self._nowhere(trace)
        step = self._step(trace, way)
        if step is None:
            return replace(trace, trial=0.5 * (trace.inside + trace.params), moved=np.inf)
        moved = abs(step[self.index]) / self.standard_error
        length = float(np.linalg.norm(trace.model.gauss_newton_factor @ step)) / self.scale
        # What is still to come, where steps shrink slowly.
        ratio = moved / trace.moved if trace.moved > 0 else 0.0
        to_come = moved * max(1.0, ratio / (1 - ratio)) if ratio < 1 else np.inf
        trial = trace.params + step
        if length <= _SETTLED and to_come <= _TOLERANCE:
            if self._is_at_limit(trial):
                return self._nowhere(trace)
            return replace(trace, status=EndStatus.FOUND, end=float(trial[self.index]))
        return replace(trace, trial=trial, moved=moved)

    def _nowhere(self, trace: Trace) -> Trace:
        if self._bound_distance <= _FAR * self.standard_error:
            return replace(trace, status=EndStatus.AT_BOUND, end=self._bound)
        return replace(trace, status=EndStatus.NONE, end=self.side * np.inf)

    def _step(self, trace: Trace, way: float) -> Vector | None:
        """To where the model's profile reaches the threshold; None if it is above everywhere."""
        lower, upper = self.bounds
        profile = _ModelProfile(
            trace.model, self.index, (lower - trace.params, upper - trace.params)
        )
        first = math.sqrt(2 * self.rise) * self.standard_error / self.scale
        farthest = min(self._limit, _GROWTH * max(way, first)) - way
        nearest = -0.9 * way
        return profile.reach(self.threshold - trace.model.cost, self.side, nearest, farthest)


class _ModelProfile:
    """The profile of a quadratic model along one parameter, from the model's own point."""

    def __init__(self, model: QuadraticModel, index: int, to_bounds: tuple[Vector, Vector]) -> None:
        self._model = model
        self._index = index
        self._low, self._high = to_bounds
        norms = np.linalg.norm(model.factor, axis=0)
        scale = np.where(norms > 0, norms, 1.0)
        spectrum = spectrum_of(model.factor, scale)
        # Along a direction that the data do not determine here the profile is all but flat.
        floor = rank_tolerance(len(norms)) * spectrum.values[0]
        values = np.maximum(spectrum.values, floor)
        target = np.where(spectrum.is_identified, spectrum.left.T @ model.residual, 0.0)
        self._newton = -(spectrum.right.T @ (target / values)) / scale
        across = spectrum.right[:, index] / (scale[index] * values)  # S⁻ᵀeⱼ
        self._variance = float(across @ across)  # c
        self._direction = spectrum.right.T @ (across / values) / scale / self._variance
        self._others = np.arange(len(norms)) != index

    def reach(self, rise: float, side: int, nearest: float, farthest: float) -> Vector | None:
        """The step, between two ways along the parameter, by which the cost rises so much."""
        lowest = -self._model.reduction(self._newton)
        if rise < lowest:
            return None
        way = side * self._newton[self._index] + math.sqrt(2 * self._variance * (rise - lowest))
        step = self._unbounded(side * float(np.clip(way, nearest, farthest)))
        if self._is_within_bounds(step):
            return step

        def excess(way: float) -> float:
            return -self._model.reduction(self._bounded(side * way)) - rise

        if excess(farthest) <= 0:
            return self._bounded(side * farthest)
        if excess(nearest) >= 0:
            return None
        return self._bounded(side * scipy.optimize.brentq(excess, nearest, farthest, rtol=1e-10))

    def _unbounded(self, along: float) -> Vector:
        step = self._newton + (along - self._newton[self._index]) * self._direction
        step[self._index] = along
        return np.asarray(step)

    def _is_within_bounds(self, step: Vector) -> bool:
        """Whether the other parameters are."""
        return bool(np.all(((step >= self._low) & (step <= self._high))[self._others]))

    def _bounded(self, along: float) -> Vector:
        """The best step of the others within their bounds, for a step of this parameter."""
        step = self._unbounded(along)
        if self._is_within_bounds(step):
            return step
        others = self._others
        residual = self._model.residual + along * self._model.factor[:, self._index]
        q, r = scipy.linalg.qr(self._model.factor[:, others], mode="economic")
        norms = np.linalg.norm(r, axis=0)
        best = solve_subproblem(
            QuadraticModel(cost=0.0, factor=r, residual=q.T @ residual, gauss_newton_factor=r),
            np.where(norms > 0, norms, 1.0),
            np.inf,
            (np.minimum(self._low[others], 0.0), np.maximum(self._high[others], 0.0)),
        )
        step[others] = best.vector
        return step
