"""The sample first: from the start to every optimum worth a look, at no pass over the data.

Starts scattered around `p0` are scored on a block of the sample. From `p0` and the best few,
L-BFGS goes down in variables scaled by the Jacobian's columns, and Levenberg-Marquardt finishes
from there and from `p0` itself. Distinct optima are kept apart: on a sample the cost per row of
a wrong basin can pass for noise (4.72 against 4.74 for a sine fitted to 4,000 rows), so they
compete on all data in the first pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nlsq_dask._typing import Array, Float, Vector
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.objective import SampleObjective
from nlsq_dask.parameters import strictly_inside
from nlsq_dask.solvers.lbfgs import LbfgsOptions, build_lbfgs
from nlsq_dask.solvers.minimize import minimize
from nlsq_dask.solvers.quadratic import next_whitening
from nlsq_dask.solvers.trust_region import State, Tolerances, TrustRegion
from nlsq_dask.sources.base import selected_rows
from nlsq_dask.status import Status

__all__ = ["Optimum", "Warmup", "equal_cost", "warm_up"]

_NUM_SCATTERED = 64  # around p0
_NUM_DESCENTS = 4  # of the scattered starts, beside p0
_MAX_OPTIMA = 4  # that compete on all data
_MAX_SAMPLE_ITERATIONS = 1000
_SAMPLE_DISTANCE_TOL = 1e-7  # in the sample: equivalent optima must have equal cost on all data
_DISTINCT_DISTANCE = 3.0  # standard errors of the sample
_EQUAL_COST = 1e-3  # of a row's: less says nothing, and p0 was the user's choice


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """A local minimum of the sample's cost."""

    params: Float[np.ndarray, " k"]
    cost: float
    factor: Float[np.ndarray, "k k"]


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """What the sample says: optima, the best first, and R of the Jacobian at the best."""

    optima: tuple[Optimum, ...]
    whitening: Float[np.ndarray, "k k"]
    halves_agree: bool
    num_starts: int
    num_evaluations: int
    lbfgs_loss: float | None


def warm_up(
    objective: SampleObjective, config: HybridStreamingConfig, tolerances: Tolerances
) -> Warmup | None:
    """Find the optima of the sample; None where the model is not finite at any start."""
    search = _Search(objective, config, tolerances)
    return search.run()


def equal_cost(cost: float, num_rows: int, tolerances: Tolerances) -> float:
    """A difference of costs that says nothing: then the start that the user gave decides."""
    return _EQUAL_COST * cost / max(num_rows, 1) + tolerances.cost_noise(cost)


class _Search:
    def __init__(
        self, objective: SampleObjective, config: HybridStreamingConfig, tolerances: Tolerances
    ) -> None:
        self._objective = objective
        self._config = config
        space = objective.problem.space
        self._bounds = space.free_bounds
        self._p0 = space.p0[space.is_free]
        sample = objective.sample
        first, second = sample.halves
        # One block will do for what is only exploration.
        self._explored = range(first.start, first.start + 1)
        self._everything = sample.blocks
        self._halves = (first, second)
        exact = sample.is_everything
        self._tolerances = Tolerances(
            # Where the sample is all there is, more digits cost no pass.
            distance_tol=1e-4 * tolerances.distance_tol if exact else _SAMPLE_DISTANCE_TOL,
            max_iterations=_MAX_SAMPLE_ITERATIONS,
            absolute_sigma=False,
            data_square=tolerances.data_square,
        )
        self._num_evaluations = 0

    def run(self) -> Warmup | None:
        starts = self._starts()
        if not starts:
            return None
        lbfgs_loss, descended = self._descend(starts)
        fits = [self._fit(start, self._everything) for start in descended]
        states = [state for state in fits if state is not None]
        if not states:
            return None
        optima = self._distinct(states)
        agree, rivals = self._compare_halves(optima[0])
        kept = (*optima, *rivals)[:_MAX_OPTIMA]
        return Warmup(
            optima=kept,
            whitening=next_whitening(kept[0].factor),
            halves_agree=agree,
            num_starts=len(starts),
            num_evaluations=self._num_evaluations,
            lbfgs_loss=lbfgs_loss,
        )

    @property
    def _size(self) -> Vector:
        """How far is far, for each parameter: as far as `p0` is from zero, or its bounds apart."""
        lower, upper = self._bounds
        size = np.where(self._p0 != 0, np.abs(self._p0), 1.0)
        return np.minimum(size, upper - lower)

    # -- starts

    def _starts(self) -> list[Vector]:
        """`p0` and the best of those scattered around it, where the model is finite."""
        candidates = [self._p0, *self._scatter()]
        costs = self._objective.costs(np.stack(candidates), self._explored)
        order = [0, *(1 + np.argsort(costs[1:], kind="stable")[:_NUM_DESCENTS])]
        return [candidates[i] for i in order if np.isfinite(costs[i])]

    def _scatter(self) -> list[Vector]:
        """Seeded starts at distances from 3 % of `p0` to twice of it, in every direction."""
        rng = np.random.default_rng([self._config.seed, 1])
        lower, upper = self._bounds
        size = self._size
        starts = []
        for _ in range(_NUM_SCATTERED):
            radius = np.exp(rng.uniform(np.log(0.03), np.log(2.0)))
            moved = self._p0 + radius * size * rng.normal(size=len(size))
            # Beyond a bound, somewhere between it and p0.
            side = np.where(moved <= lower, lower, np.where(moved >= upper, upper, moved))
            back = np.where(side == moved, 0.0, rng.uniform(size=len(size)))
            moved = side + back * (self._p0 - side)
            starts.append(moved)
        return starts

    # -- descents

    def _descend(self, starts: Sequence[Vector]) -> tuple[float | None, list[Vector]]:
        """L-BFGS from each start, beside the first as it is: L-BFGS may leave its basin."""
        if self._config.max_warmup_iterations == 0:
            return None, list(starts)
        descent = _Descent(self._objective, self._config, self._explored)
        ends = [descent.run(start, self._bounds) for start in starts]
        loss = ends[0][1]
        return loss, [starts[0], *(point for point, _ in ends)]

    def _fit(self, start: Vector, blocks: range) -> State | None:
        """Levenberg-Marquardt on the blocks; None where it cannot begin."""
        whitening = self._objective.whitening(start, self._explored)
        if whitening is None:
            return None
        evaluate = self._objective.on(blocks)
        solver = TrustRegion(
            bounds=self._bounds,
            tolerances=self._tolerances,
            initial_radius=self._config.trust_region_initial,
        )
        state = minimize(evaluate, solver, solver.init(evaluate(start, whitening)))
        self._num_evaluations += state.num_trials + 1
        return None if state.status is Status.NOT_FINITE else state

    # -- optima

    def _distinct(self, states: Sequence[State]) -> list[Optimum]:
        """The best first; of statistically equal ones, that nearest to `p0`.

        Models have symmetries: a phase and a full turn, a width and its sign, two terms of one
        kind. All give the same fit, and the user's start says which is meant.
        """
        best = min(state.cost for state in states)
        equal = best + equal_cost(best, self._objective.sample.num_rows, self._tolerances)
        ordered = sorted(
            states,
            key=lambda state: (max(state.cost, equal), self._from_p0_to(state.params)),
        )
        kept: list[Optimum] = []
        for state in ordered:
            optimum = Optimum(
                params=state.params,
                cost=state.cost,
                factor=state.model.gauss_newton_factor,
            )
            if not any(self._is_same(other, optimum) for other in kept):
                kept.append(optimum)
        return kept[:_MAX_OPTIMA]

    def _from_p0_to(self, params: Vector) -> float:
        return float(np.linalg.norm((params - self._p0) / self._size))

    def _is_same(self, one: Optimum, other: Optimum) -> bool:
        variance = 2 * max(one.cost, other.cost) / max(self._objective.sample.num_rows, 1)
        way = one.params - other.params
        length = min(np.linalg.norm(one.factor @ way), np.linalg.norm(other.factor @ way))
        return bool(length <= _DISTINCT_DISTANCE * np.sqrt(variance))

    def _compare_halves(self, best: Optimum) -> tuple[bool, list[Optimum]]:
        """Whether two disjoint halves have the same optimum within sampling error.

        Where they have not, both optima compete on all data.
        """
        first, second = self._halves
        if first == second:
            return True, []
        one, other = self._fit(best.params, first), self._fit(best.params, second)
        if one is None or other is None:
            return False, []
        k = len(best.params)
        rows = self._objective.sample.num_rows / 2
        variance = (one.cost + other.cost) / max(rows - k, 1)
        # θ₁ - θ₂ has twice a half's covariance, so this is a χ² of k degrees of freedom where
        # rows are independent; chunk means that scatter more are the between-chunk variance.
        way = one.params - other.params
        chi2 = float(np.sum((one.model.gauss_newton_factor @ way) ** 2)) / (2 * variance or 1.0)
        agree = chi2 <= k + 6 * np.sqrt(2 * k) + 10
        if agree:
            return True, []
        return False, self._distinct([one, other])


class _Descent:
    """L-BFGS on a block of the sample: loss over the variance of y, in scaled variables."""

    def __init__(
        self, objective: SampleObjective, config: HybridStreamingConfig, blocks: range
    ) -> None:
        self._objective = objective
        space = objective.problem.space
        self._blocks = blocks
        chunk = objective.block(blocks[0])
        is_row = selected_rows(chunk)
        weighted = (chunk.y if chunk.sigma is None else chunk.y / chunk.sigma)[is_row]
        spread = float(np.sum((weighted - np.mean(weighted)) ** 2))
        self._spread = spread if spread > 0 else 1.0
        free = np.flatnonzero(space.is_free)
        cost, self._data = objective.traced_cost(blocks[0])

        def loss(point: Array, scale: Array, *data: Array) -> Array:
            params = jnp.asarray(space.p0).at[free].set(point / scale)
            return 2 * cost(params, *data) / self._spread

        options = LbfgsOptions(
            max_iterations=config.max_warmup_iterations, history_size=config.lbfgs_history_size
        )
        self._minimize = build_lbfgs(loss, options)

    def run(self, start: Vector, bounds: tuple[Vector, Vector]) -> tuple[Vector, float]:
        """The best point and its loss over the variance of y."""
        whitening = self._objective.whitening(start, self._blocks)
        if whitening is None:
            return start, np.inf
        norms = np.linalg.norm(whitening, axis=0) / np.sqrt(self._spread)
        scale = np.where(norms > 0, norms, 1.0)
        lower, upper = (side * scale for side in bounds)
        with jax.enable_x64(True):
            point, loss = self._minimize(start * scale, lower, upper, scale, *self._data)
        end = np.asarray(point) / scale
        if not np.isfinite(end).all():
            return start, np.inf
        return strictly_inside(end, *bounds), float(loss)
