"""The phases of a fit, in order: sample, warmup, gate, trust region on all data, covariance."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask._version import __version__
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.covariance import estimate_covariance
from nlsq_dask.errors import DataError
from nlsq_dask.evaluate.base import Evaluator
from nlsq_dask.model import check_elementwise
from nlsq_dask.objective import FullObjective, SampleObjective
from nlsq_dask.problem import Problem
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


@dataclass(frozen=True, kw_only=True)
class _Gate:
    """What the first pass over all data decided between."""

    optima: list[dict[str, Any]]
    switched: bool


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

    def run(self) -> FitResult:
        memory = self._timed("plan", self._evaluator.memory)
        sample = self._timed("sample", self._draw)
        space = self._problem.space
        rows = sample.source
        everything = tuple(column.read((slice(None),)) for column in rows.x)
        # At a zero start a term may be invisible: look from beside it, too.
        for params in (space.p0, space.beside(space.p0, self._config.seed)):
            check_elementwise(
                self._problem.model,
                [column[:4096] for column in everything],
                [np.asarray(part) for part in space.unflatten(params)],
            )
        on_sample = SampleObjective(self._problem, sample)
        square = _data_square(sample)
        tolerances = self._tolerances(square)
        warmup = self._timed("warmup", lambda: warm_up(on_sample, self._config, tolerances))
        full = FullObjective(problem=self._problem, evaluator=self._evaluator, sample=on_sample)
        tolerances = self._tolerances(square * self._problem.source.num_rows / sample.num_rows)
        solver = TrustRegion(
            bounds=space.free_bounds,
            tolerances=tolerances,
            initial_radius=self._config.trust_region_initial,
        )
        center = float(np.mean(rows.y.read((slice(None),))))
        start = time.perf_counter()
        state, gate = self._gate(full, solver, warmup, center)
        state = minimize(full, solver, state, lambda state: self._after_pass(full, state))
        self._seconds["passes"] = time.perf_counter() - start
        _LOGGER.info("%s", state.status.value)
        return self._result(full, state, sample, warmup, gate, memory)

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
    ) -> tuple[State, _Gate]:
        """The first pass: linearised at the sample's best optimum, the others by cost alone."""
        space = self._problem.space
        if warmup is None:
            params = space.p0[space.is_free]
            state = solver.init(full(params, np.eye(space.num_free), center=center))
            return self._after_pass(full, state), _Gate(optima=[], switched=False)
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
                "from_p0": optimum.from_p0,
            }
            for optimum, cost in zip(warmup.optima, costs, strict=True)
        ]
        state = self._after_pass(full, state)
        comparable = np.where(np.isfinite(costs), costs, np.inf)
        comparable[0] -= equal_cost(costs[0], int(evaluation.normal.num_rows), solver.tolerances)
        winner = int(np.argmin(comparable))
        may_switch = state.status in (Status.RUNNING, Status.NOT_FINITE) or state.status.is_success
        if winner == 0 or not may_switch or not np.isfinite(comparable[winner]):
            return state, _Gate(optima=optima, switched=False)
        chosen = warmup.optima[winner]
        state = solver.init(full(chosen.params, next_whitening(chosen.factor)))
        return self._after_pass(full, state), _Gate(optima=optima, switched=True)

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
        _LOGGER.info("%s", record)
        if self._callback is not None:
            try:
                self._callback(record)
            except StopIteration:
                if state.status is Status.RUNNING:
                    return replace(state, status=Status.STOPPED_BY_CALLBACK)
        if state.status is not Status.RUNNING:
            return state
        config = self._config
        if config.max_passes is not None and len(full.passes) >= config.max_passes:
            return replace(state, status=Status.MAX_PASSES)
        elapsed = time.perf_counter() - self._started
        if config.max_seconds is not None and elapsed >= config.max_seconds:
            return replace(state, status=Status.MAX_SECONDS)
        return state

    def _record(self, full: FullObjective, state: State) -> IterationRecord:
        last = full.passes[-1]
        rows = int(last.sums.normal.num_rows)
        cost = float(last.sums.normal.cost)
        before = self._history[-1].cost if self._history else np.nan
        return IterationRecord(
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

    # -- what came of it

    def _result(
        self,
        full: FullObjective,
        state: State,
        sample: Sample,
        warmup: Warmup | None,
        gate: _Gate,
        memory: dict[str, Any],
    ) -> FitResult:
        problem = self._problem
        space = problem.space
        normal = state.evaluation.normal
        num_rows = int(normal.num_rows)
        dof = num_rows - space.num_free
        variance = 2 * state.cost / dof if dof > 0 else np.inf
        covariance = estimate_covariance(
            state.model.gauss_newton_factor, 1.0 if problem.absolute_sigma else variance, space
        )
        summary = full.passes[0].sums.summary
        active = np.zeros(space.size, bool)
        active[space.is_free] = state.active
        is_usable = state.status is not Status.NOT_FINITE
        return FitResult(
            popt=space.expand(state.params),
            pcov=covariance.matrix if is_usable else _no_covariance(space.is_free),
            param_names=space.labels,
            shapes=dict(zip(space.names, space.shapes, strict=True)),
            is_free=space.is_free,
            status=state.status,
            details=self._details(full, state),
            cost=state.cost,
            num_rows=num_rows,
            num_masked=problem.source.num_rows - num_rows,
            total_sum_of_squares=0.0 if summary is None else summary.total_sum_of_squares,
            num_passes=len(full.passes),
            bytes_read=self._bytes_read(full, sample),
            optimality=state.optimality,
            distance=state.remaining_distance,
            condition_number=covariance.condition_number,
            rank=covariance.rank,
            active=active,
            absolute_sigma=problem.absolute_sigma,
            history=tuple(self._history),
            diagnostics={
                "evaluator": self._evaluator.description,
                "plan": asdict(problem.plan),
                "memory": memory,
                "sample": _describe_sample(sample, warmup),
                "optima": gate.optima,
                "switched_at_gate": gate.switched,
                "rank_tolerance": covariance.rank_tolerance,
                "seconds": {**self._seconds, "total": time.perf_counter() - self._started},
                "passes": _describe_passes(full),
                "config": self._config.as_dict(),
                "versions": {
                    "nlsq_dask": __version__,
                    "jaxlib": importlib.metadata.version("jaxlib"),
                },
                "warnings": self._warnings(covariance.rank, dof, warmup) if is_usable else [],
            },
        )

    def _bytes_read(self, full: FullObjective, sample: Sample) -> int:
        for_sample = 0 if self._evaluator.keeps_rows else sample.bytes_read
        return for_sample + sum(done.bytes_read for done in full.passes)

    def _details(self, full: FullObjective, state: State) -> str:
        if state.status is Status.NOT_FINITE:
            leaves = list(full.passes[-1].offending_leaves)
            return f"Not finite in chunks {leaves}." if leaves else ""
        return (
            f"Distance to the minimum: {state.remaining_distance:.1e} standard errors "
            f"(limit {self._config.distance_tol:.1e})."
        )

    def _warnings(self, rank: int, dof: int, warmup: Warmup | None) -> list[str]:
        texts = []
        free = self._problem.space.num_free
        if rank < free:
            texts.append(
                f"the data determine {rank} of {free} free parameters' directions; parameters "
                "with an infinite standard error are arbitrary"
            )
        if dof <= 0 and not self._problem.absolute_sigma:
            texts.append(
                "there are not more rows than free parameters, so that the covariance could not "
                "be estimated"
            )
        if warmup is not None and not warmup.halves_agree:
            texts.append(
                "two halves of the sample had different optima; the better on all data was kept"
            )
        return texts


def _no_covariance(is_free: np.ndarray) -> Float[np.ndarray, "n n"]:
    matrix = np.zeros((len(is_free), len(is_free)))
    matrix[np.ix_(is_free, is_free)] = np.inf
    return matrix


def _data_square(sample: Sample) -> float:
    """``Σ w y²`` over the sample."""
    every = (slice(None),)
    y: Vector = sample.source.y.read(every)
    sigma = 1.0 if sample.source.sigma is None else sample.source.sigma.read(every)
    return float(np.sum((y / sigma) ** 2))


def _describe_sample(sample: Sample, warmup: Warmup | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "num_rows": sample.num_rows,
        "num_chunks_read": sample.num_chunks_read,
        "is_everything": sample.is_everything,
    }
    if warmup is not None:
        described |= {
            "num_starts": warmup.num_starts,
            "num_evaluations": warmup.num_evaluations,
            "halves_agree": warmup.halves_agree,
            "lbfgs_loss": warmup.lbfgs_loss,
        }
    return described


def _describe_passes(full: FullObjective) -> dict[str, Any]:
    reports = [report for done in full.passes for report in done.reports]
    compilations: dict[str, int] = {}
    peak: dict[str, int] = {}
    for report in reports:
        name = report.process
        compilations[name] = compilations.get(name, 0) + report.num_compilations
        peak[name] = max(peak.get(name, 0), report.peak_memory_bytes)
    return {
        "seconds": [done.seconds for done in full.passes],
        "bytes_read": [done.bytes_read for done in full.passes],
        "tasks": [len(done.reports) for done in full.passes],
        "compilations_by_process": compilations,
        "peak_memory_bytes_by_process": peak,
        "read_seconds": math.fsum(report.read_seconds for report in reports),
    }
