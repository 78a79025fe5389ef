"""The sample first: from the start to every optimum worth a look, at no pass over the data.

Starts scattered around `p0`, or the survivors of a tournament, are descended from by L-BFGS in
normalized space. Levenberg-Marquardt finishes from where that ends and from `p0` itself, which
L-BFGS may have led out of its basin. Distinct optima are kept apart: on a sample the cost per
row of a wrong basin can pass for noise (4.72 against 4.74 for a sine fitted to 4,000 rows), so
they compete on all data in the first pass.

What was found up to some iteration is a `WarmupState`; from any that was handed out, a warmup
goes on to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.objective.on_sample import SampleObjective
from nlsq_dask.solvers.bending import is_slow
from nlsq_dask.solvers.lbfgs import Ending
from nlsq_dask.solvers.minimize import minimize
from nlsq_dask.solvers.quadratic import next_whitening
from nlsq_dask.solvers.trust_region import State, Tolerances, TrustRegion
from nlsq_dask.status import Status
from nlsq_dask.warmup.defense import DefenseLayerTelemetry, get_defense_telemetry
from nlsq_dask.warmup.descents import (
    Descent,
    Descents,
    OnIteration,
    Progress,
    data_spread,
    defense_record,
)
from nlsq_dask.warmup.multistart import Tournament, hold_tournament
from nlsq_dask.warmup.normalization import ParameterNormalizer, build_normalizer
from nlsq_dask.warmup.state import WarmupState

__all__ = ["OnState", "Optimum", "Warmup", "equal_cost", "warm_up"]

_NUM_SCATTERED = 64  # around p0
_NUM_DESCENTS = 4  # of the scattered starts, beside p0
_MAX_OPTIMA = 4  # that compete on all data
_MAX_SAMPLE_ITERATIONS = 300  # from each start
_MAX_BEST_ITERATIONS = 5000  # from there on for the best: narrow valleys take thousands
_SAMPLE_DISTANCE_TOL = 1e-7  # in the sample: equivalent optima must have equal cost on all data
_DISTINCT_DISTANCE = 3.0  # standard errors of the sample
_ALIKE = 1e-3  # of a block's: less than tells optima of the whole sample apart
_EQUAL_COST = 1e-3  # of a row's: less says nothing, and p0 was the user's choice


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """A local minimum of the sample's cost."""

    params: Float[np.ndarray, " k"]
    cost: float
    factor: Float[np.ndarray, "k k"]
    bends: bool  # the first step from here needs second derivatives too


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """What the sample says: optima, the best first, and R of the Jacobian at the best."""

    optima: tuple[Optimum, ...]
    whitening: Float[np.ndarray, "k k"]
    halves_agree: bool
    num_starts: int
    num_evaluations: int
    normalizer: ParameterNormalizer
    descents: tuple[Descent, ...]
    defense: DefenseLayerTelemetry  # of this warmup alone
    tournament: Tournament | None
    was_stopped: bool  # by StopIteration


OnState: TypeAlias = Callable[[WarmupState], object]


def warm_up(
    objective: SampleObjective,
    config: HybridStreamingConfig,
    tolerances: Tolerances,
    *,
    on_iteration: OnIteration | None = None,
    on_state: OnState | None = None,
    resume: WarmupState | None = None,
) -> Warmup | None:
    """Find the optima of the sample; None where the model is not finite at any start.

    Parameters
    ----------
    on_iteration : callable, optional
        Given an `IterationRecord` every `callback_frequency` L-BFGS iterations, counted over all
        descents. StopIteration ends L-BFGS; the sample's optima near what it has are still
        found.
    on_state : callable, optional
        Given a `WarmupState` every `checkpoint_frequency` iterations and when all descents have
        ended.
    resume : WarmupState, optional
        To go on from, for the same sample, problem and configuration: the result has the same
        bits as without the interruption.

    Raises
    ------
    ValueError
        If `resume` is of a problem with another number of free parameters.
    """
    search = _Search(objective, config, tolerances)
    return search.run(on_iteration, on_state, resume)


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

    def run(
        self,
        on_iteration: OnIteration | None,
        on_state: OnState | None,
        resume: WarmupState | None,
    ) -> Warmup | None:
        begun = self._begin() if resume is None else self._checked(resume)
        if not len(begun.starts):
            return None
        normalizer = self._normalizer()
        descents = self._descend(begun, normalizer, on_iteration, on_state)
        points = self._merged(self._points(begun, descents))
        states = [self._fit(point, self._everything) for point in points]
        finite = [state for state in states if state is not None]
        if not finite:
            return None
        finite.sort(key=lambda state: state.cost)
        optima = self._distinct([self._finish(finite[0]), *finite[1:]])
        agree, rivals = self._compare_halves(optima[0])
        kept = (*optima, *rivals)[:_MAX_OPTIMA]
        return Warmup(
            optima=kept,
            whitening=next_whitening(kept[0].factor),
            halves_agree=agree,
            num_starts=len(begun.starts),
            num_evaluations=self._num_evaluations,
            normalizer=normalizer,
            descents=descents,
            defense=self._count(descents),
            tournament=begun.tournament,
            was_stopped=bool(descents) and descents[-1].ending is Ending.CALLBACK,
        )

    def _count(self, descents: Sequence[Descent]) -> DefenseLayerTelemetry:
        records = [defense_record(self._config, descent) for descent in descents]
        for record in records:
            get_defense_telemetry().record(record)
        return DefenseLayerTelemetry(records)

    @property
    def _size(self) -> Vector:
        """How far is far, for each parameter: as far as `p0` is from zero, or its bounds apart."""
        lower, upper = self._bounds
        size = np.where(self._p0 != 0, np.abs(self._p0), 1.0)
        with np.errstate(over="ignore"):
            return np.minimum(size, upper - lower)

    # -- starts

    def _begin(self) -> WarmupState:
        """`p0` and the best of the other starts, where the model is finite."""
        config, tournament = self._config, None
        if config.enable_multistart:
            tournament = hold_tournament(self._objective, config)
            candidates = tournament.survivors
        else:
            candidates = np.stack([self._p0, *self._scatter()])
        costs = self._objective.costs(candidates, self._explored)
        order = np.arange(len(candidates))
        if tournament is None:
            order = np.array([0, *(1 + np.argsort(costs[1:], kind="stable")[:_NUM_DESCENTS])])
        order = order[np.isfinite(costs[order])]
        return WarmupState(
            starts=candidates[order],
            start_costs=costs[order],
            progress=Progress(),
            tournament=tournament,
        )

    def _checked(self, resume: WarmupState) -> WarmupState:
        if resume.starts.shape[1:] != self._p0.shape:
            raise ValueError(
                f"`resume` must be of a problem with {len(self._p0)} free parameters, got starts "
                f"of shape {resume.starts.shape}"
            )
        return resume

    # From the largest numbers, starts may come to lie beyond them: the model is not finite there.
    @np.errstate(over="ignore", invalid="ignore")
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

    def _normalizer(self) -> ParameterNormalizer:
        config = self._config
        strategy = config.normalization_strategy if config.normalize else "none"
        norms = self._column_norms() if strategy == "jacobian" else None
        return build_normalizer(strategy, self._p0, self._bounds, norms)

    def _column_norms(self) -> Vector | None:
        """Of the Jacobian at `p0`, relative to the spread of the data; None if not finite."""
        evaluate = self._objective.on(self._explored)
        normal = evaluate(self._p0, np.eye(len(self._p0))).normal
        spread = data_spread(self._objective, self._explored[0])
        norms = np.sqrt(np.diag(np.asarray(normal.gram)) / spread)
        return norms if np.isfinite(norms).all() else None

    def _descend(
        self,
        begun: WarmupState,
        normalizer: ParameterNormalizer,
        on_iteration: OnIteration | None,
        on_state: OnState | None,
    ) -> tuple[Descent, ...]:
        if self._config.max_warmup_iterations == 0:
            return ()

        def tell(progress: Progress) -> None:
            if on_state is not None:
                on_state(begun.after(progress))

        descents = Descents(self._objective, self._config, normalizer, self._explored[0])
        finished = descents.run(
            list(begun.starts),
            begun.start_costs.tolist(),
            begun.progress,
            on_iteration,
            None if on_state is None else tell,
        )
        tell(Progress(finished=finished))
        return finished

    @staticmethod
    def _points(begun: WarmupState, descents: Sequence[Descent]) -> list[Vector]:
        """Where to finish from: the first start as it is, and what the descents led to."""
        first, *others = begun.starts
        ends = [descent.end for descent in descents] if descents else others
        return [first, *(end for end in ends if not np.array_equal(end, first))]

    def _merged(self, points: Sequence[Vector]) -> Sequence[Vector]:
        """Where Levenberg-Marquardt leads on one block of many, points that end alike but once.

        Most starts lead to one optimum, and only the last of the way there takes all blocks.
        """
        if self._explored == self._everything:
            return points
        ends: list[State] = []
        for point in points:
            end = self._fit(point, self._explored)
            if end is not None and not any(self._ends_alike(other, end) for other in ends):
                ends.append(end)
        return [end.params for end in ends]

    def _ends_alike(self, one: State, other: State) -> bool:
        """Whether two solves on one block came to the same point, up to their tolerance."""
        if not (one.status.is_success and other.status.is_success):
            return False
        way = one.model.gauss_newton_factor @ (one.params - other.params)
        rows = int(one.evaluation.normal.num_rows)
        return bool(np.linalg.norm(way) <= _ALIKE * np.sqrt(2 * one.cost / max(rows, 1)))

    def _fit(self, start: Vector, blocks: range) -> State | None:
        """Levenberg-Marquardt on the blocks; None where it cannot begin."""
        entered = self._enter(start, blocks)
        return None if entered is None else self._solve(entered, blocks)

    def _enter(self, start: Vector, blocks: range) -> State | None:
        """A solve on the blocks before its first step; None where it cannot begin."""
        whitening = self._objective.whitening(start, self._explored)
        if whitening is None:
            return None
        self._num_evaluations += 1
        state = self._solver.init(self._objective.on(blocks)(start, whitening))
        return None if state.status is Status.NOT_FINITE else state

    def _solve(self, state: State, blocks: range, solver: TrustRegion | None = None) -> State:
        before = state.num_trials
        state = minimize(self._objective.on(blocks), solver or self._solver, state)
        self._num_evaluations += state.num_trials - before
        return state

    @property
    def _solver(self) -> TrustRegion:
        return TrustRegion(
            bounds=self._bounds,
            tolerances=self._tolerances,
            initial_radius=self._config.trust_region_initial,
        )

    def _finish(self, state: State) -> State:
        """The best state, if all it lacked was iterations."""
        longer = replace(self._tolerances, max_iterations=_MAX_BEST_ITERATIONS)
        solver = replace(self._solver, tolerances=longer)
        return self._solve(solver.resume(state), self._everything, solver)

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
                bends=is_slow(state.bending) and not self._is_the_end(state),
            )
            if not any(self._is_same(other, optimum) for other in kept):
                kept.append(optimum)
        return kept[:_MAX_OPTIMA]

    def _is_the_end(self, state: State) -> bool:
        """Whether there is no step to go from here: that would take other rows."""
        return self._objective.sample.is_everything and state.status is Status.CONVERGED

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
        one, other = self._enter(best.params, first), self._enter(best.params, second)
        if one is None or other is None:
            return False, []
        # Mostly the first step tells already that they have.
        if self._is_one_optimum(one, other, one.newton.vector - other.newton.vector):
            return True, []
        one, other = self._solve(one, first), self._solve(other, second)
        if self._is_one_optimum(one, other, one.params - other.params):
            return True, []
        return False, self._distinct([one, other])

    def _is_one_optimum(self, one: State, other: State, way: Vector) -> bool:
        """Whether the optima of two halves are so far apart by chance."""
        k = len(way)
        rows = self._objective.sample.num_rows / 2
        variance = (one.cost + other.cost) / max(rows - k, 1)
        # θ₁ - θ₂ has twice a half's covariance, so this is a χ² of k degrees of freedom where
        # rows are independent; chunk means that scatter more are the between-chunk variance.
        chi2 = float(np.sum((one.model.gauss_newton_factor @ way) ** 2)) / (2 * variance or 1.0)
        return bool(chi2 <= k + 6 * np.sqrt(2 * k) + 10)
