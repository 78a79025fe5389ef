"""The phases of a fit, in order: sample, warmup, gate, trust region on all data, covariance."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from nlsq_dask._typing import Vector
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import DataError
from nlsq_dask.evaluate.base import Evaluator
from nlsq_dask.model import check_elementwise
from nlsq_dask.objective import FullObjective, SampleObjective
from nlsq_dask.problem import Problem
from nlsq_dask.report import Course, Gate, build_result
from nlsq_dask.result import FitResult
from nlsq_dask.sample import Sample, draw_sample
from nlsq_dask.solvers.minimize import minimize
from nlsq_dask.solvers.quadratic import next_whitening
from nlsq_dask.solvers.trust_region import State, Tolerances, TrustRegion
from nlsq_dask.status import Status
from nlsq_dask.telemetry import Callback, IterationRecord
from nlsq_dask.warmup import Warmup, equal_cost, warm_up

__all__ = ["NanPolicy", "fit_problem"]

NanPolicy = Literal["omit", "raise"]
_LOGGER = logging.getLogger("nlsq_dask")


def fit_problem(
    problem: Problem,
    evaluator: Evaluator,
    config: HybridStreamingConfig,
    nan_policy: NanPolicy = "omit",
    callback: Callback | None = None,
) -> FitResult:
    """Fit a problem that was checked at the edge.

    Raises
    ------
    DataError
        If no row is valid, a sigma is not positive, or `nan_policy` refuses a value.
    ModelError
        If the model mixes rows.
    MemoryProjectionError
        If the plan does not fit the workers.
    """
    return _Fit(problem, evaluator, config, nan_policy, callback).run()


class _Fit:
    def __init__(
        self,
        problem: Problem,
        evaluator: Evaluator,
        config: HybridStreamingConfig,
        nan_policy: NanPolicy,
        callback: Callback | None,
    ) -> None:
        self._problem = problem
        self._evaluator = evaluator
        self._config = config
        self._nan_policy = nan_policy
        self._callback = callback
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._history: list[IterationRecord] = []
        self._was_stopped = False  # in the warmup: the fit ends with its first pass

    def run(self) -> FitResult:
        memory = self._timed("plan", self._evaluator.memory)
        sample = self._timed("sample", self._draw)
        self._check_model(sample)
        on_sample = SampleObjective(self._problem, sample)
        square = _data_square(sample)
        tolerances = self._tolerances(square)
        warmup = self._timed("warmup", lambda: self._warm_up(on_sample, tolerances))
        full = FullObjective(problem=self._problem, evaluator=self._evaluator, sample=on_sample)
        solver = TrustRegion(
            bounds=self._problem.space.free_bounds,
            tolerances=self._tolerances(square * self._problem.source.num_rows / sample.num_rows),
            initial_radius=self._config.trust_region_initial,
        )
        start = time.perf_counter()
        state, gate = self._gate(full, solver, warmup, sample.center)
        state = minimize(full, solver, state, lambda state: self._after_pass(full, state))
        self._seconds["passes"] = time.perf_counter() - start
        self._seconds["total"] = time.perf_counter() - self._started
        if self._config.verbose:
            _LOGGER.info("%s", state.status.value)
        course = Course(
            problem=self._problem,
            config=self._config,
            evaluator=self._evaluator,
            full=full,
            sample=sample,
            warmup=warmup,
            gate=gate,
            memory=memory,
            history=tuple(self._history),
            seconds=self._seconds,
        )
        return build_result(course, state)

    def _check_model(self, sample: Sample) -> None:
        """See that the model is elementwise, at `p0` and beside it.

        At a start of zero a term that mixes rows may be invisible.
        """
        space = self._problem.space
        x = [column.read((slice(0, 4096),)) for column in sample.source.x]
        for params in (space.p0, space.beside(space.p0, self._config.seed)):
            parts = [np.asarray(part) for part in space.unflatten(params)]
            check_elementwise(self._problem.model, x, parts)

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        done = work()
        self._seconds[phase] = time.perf_counter() - start
        return done

    def _tolerances(self, data_square: float) -> Tolerances:
        config = self._config
        return Tolerances(
            distance_tol=config.distance_tol,
            max_iterations=config.gauss_newton_max_iterations,
            ftol=config.ftol,
            xtol=config.xtol,
            gtol=config.gtol,
            absolute_sigma=self._problem.absolute_sigma,
            data_square=data_square,
        )

    # -- sample

    def _warm_up(self, on_sample: SampleObjective, tolerances: Tolerances) -> Warmup | None:
        is_watched = self._callback is not None or self._config.verbose > 1
        warmup = warm_up(
            on_sample,
            self._config,
            tolerances,
            on_iteration=self._tell if is_watched else None,
        )
        self._was_stopped = warmup is not None and warmup.was_stopped
        return warmup

    def _draw(self) -> Sample:
        source = self._problem.source
        sample = draw_sample(
            self._evaluator.map_chunks,
            source.num_chunks,
            source.num_rows,
            source.variables,
            max_fraction=self._config.max_sample_fraction,
            seed=self._config.seed,
        )
        if sample.smallest_sigma <= 0:
            raise DataError(f"`sigma` must be positive in every row, got {sample.smallest_sigma!r}")
        self._refuse_invalid(sample.num_invalid, "a sample of")
        return sample

    def _refuse_invalid(self, num_invalid: int, where: str) -> None:
        if num_invalid and self._nan_policy == "raise":
            raise DataError(
                f"`ds` must be finite with nan_policy='raise', got {num_invalid:,} rows with "
                f"NaN or infinity in {where} the data; nan_policy='omit' leaves them out"
            )

    # -- passes over all data

    def _gate(
        self, full: FullObjective, solver: TrustRegion, warmup: Warmup | None, center: float
    ) -> tuple[State, Gate]:
        """The first pass: linearised at the sample's best optimum, the others by cost alone."""
        space = self._problem.space
        if warmup is None:
            params = space.p0[space.is_free]
            state = solver.init(full(params, np.eye(space.num_free), center=center))
            self._check_rows(full)
            return self._after_pass(full, state), Gate(optima=[], switched=False)
        best, *rivals = warmup.optima
        evaluation = full(best.params, warmup.whitening, [r.params for r in rivals], center)
        self._check_rows(full)
        state = solver.init(evaluation)
        costs = [float(evaluation.normal.cost), *self._rival_costs(full)]
        optima = [
            {
                "params": space.expand(optimum.params),
                "sample_cost": optimum.cost,
                "cost": cost,
            }
            for optimum, cost in zip(warmup.optima, costs, strict=True)
        ]
        state = self._after_pass(full, state)
        comparable = np.where(np.isfinite(costs), costs, np.inf)
        comparable[0] -= equal_cost(costs[0], int(evaluation.normal.num_rows), solver.tolerances)
        winner = int(np.argmin(comparable))
        may_switch = state.status in (Status.RUNNING, Status.NOT_FINITE) or state.status.is_success
        if winner == 0 or not may_switch or not np.isfinite(comparable[winner]):
            return state, Gate(optima=optima, switched=False)
        chosen = warmup.optima[winner]
        state = solver.init(full(chosen.params, next_whitening(chosen.factor)))
        return self._after_pass(full, state), Gate(optima=optima, switched=True)

    @staticmethod
    def _rival_costs(full: FullObjective) -> Sequence[float]:
        costs = full.passes[-1].sums.rival_costs
        return [] if costs is None else [float(cost) for cost in costs]

    def _check_rows(self, full: FullObjective) -> None:
        """What only a full pass can see in the data."""
        first = full.passes[0]
        normal = first.sums.normal
        if int(normal.num_bad_sigma):
            raise DataError(
                f"`sigma` must be positive in every row, got {int(normal.num_bad_sigma):,} rows "
                f"where it is not, in chunks {list(first.offending_leaves)}"
            )
        self._refuse_invalid(int(normal.num_invalid), "all of")

    def _after_pass(self, full: FullObjective, state: State) -> State:
        """Record the pass, tell the caller, and see whether the budget allows another."""
        record = self._record(full, state)
        self._history.append(record)
        try:
            self._tell(record)
        except StopIteration:
            self._was_stopped = True
        if state.status is not Status.RUNNING:
            return state
        if self._was_stopped:
            return replace(state, status=Status.STOPPED_BY_CALLBACK)
        config = self._config
        if config.max_passes is not None and len(full.passes) >= config.max_passes:
            return replace(state, status=Status.MAX_PASSES)
        elapsed = time.perf_counter() - self._started
        if config.max_seconds is not None and elapsed >= config.max_seconds:
            return replace(state, status=Status.MAX_SECONDS)
        return state

    def _tell(self, record: IterationRecord) -> None:
        """Log and call back; StopIteration goes through."""
        config = self._config
        wanted = config.verbose > 1 if record.phase == 1 else config.verbose > 0
        if wanted and (record.phase == 1 or record.iteration % config.log_frequency == 0):
            _LOGGER.info("%s", record)
        if self._callback is not None:
            self._callback(record)

    def _record(self, full: FullObjective, state: State) -> IterationRecord:
        last = full.passes[-1]
        rows = int(last.sums.normal.num_rows)
        cost = float(last.sums.normal.cost)
        before = self._history[-1].cost if self._history else np.nan
        return IterationRecord(
            phase=2,
            iteration=len(full.passes),
            num_passes=len(full.passes),
            params=self._problem.space.expand(state.params),
            cost=state.cost,
            loss=2 * state.cost / rows if rows else np.nan,
            trial_cost=cost,
            relative_change=(cost - before) / before if before else np.nan,
            accepted=state.was_accepted,
            gain=state.gain,
            distance=float(state.remaining_distance),
            damping=state.step.damping,
            radius=state.radius,
            optimality=state.optimality,
            num_active=int(state.active.sum()),
            num_rows=rows,
            bytes_read=last.bytes_read,
            seconds=last.seconds,
        )


def _data_square(sample: Sample) -> float:
    """``Σ w y²`` over the sample."""
    every = (slice(None),)
    y: Vector = sample.source.y.read(every)
    sigma = 1.0 if sample.source.sigma is None else sample.source.sigma.read(every)
    return float(np.sum((y / sigma) ** 2))
