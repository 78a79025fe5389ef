"""What came of a fit, put together: parameters, covariance, and how it went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from nlsq_dask._typing import Array, Float
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.evaluate.base import Account, Evaluator
from nlsq_dask.normal_equations import ScoreSums
from nlsq_dask.objective.dense import Passes
from nlsq_dask.objective.matrix_free import SampleFit
from nlsq_dask.objective.penalised import penalty_gram
from nlsq_dask.problem import Problem
from nlsq_dask.results.covariance import (
    Covariance,
    estimate_covariance,
    no_covariance,
    sandwich,
    small_sample_factor,
)
from nlsq_dask.results.diagnostics import check_fit, describe_bins
from nlsq_dask.results.provenance import package_versions, trace_provenance
from nlsq_dask.results.result import FitResult
from nlsq_dask.results.session import Session
from nlsq_dask.sample import Sample
from nlsq_dask.solvers.truncated_newton import NewtonState
from nlsq_dask.solvers.trust_region import State
from nlsq_dask.sources.base import Source
from nlsq_dask.sources.columns import transports_of
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.sources.origin import Origin
from nlsq_dask.status import Status
from nlsq_dask.telemetry import IterationRecord
from nlsq_dask.warmup.search import Warmup

__all__ = ["Course", "Gate", "ScoresPass", "build_result", "with_origin"]

_MAX_NAMED = 16
_ROUNDING = 10.0  # eps of y, that a model errs by


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What the first pass over all data decided between."""

    costs: tuple[float, ...]  # of the warmup's optima, on all rows
    switched: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoresPass:
    """The parts of a sandwich covariance, from one pass at the parameters found."""

    sums: ScoreSums
    gram: Float[Array, "k k"]
    account: Account


@dataclass(frozen=True, kw_only=True)
class Course:
    """All that happened in a fit."""

    problem: Problem
    config: HybridStreamingConfig
    evaluator: Evaluator
    full: Passes
    sample: Sample
    warmup: Warmup | None
    sample_fit: SampleFit | None  # in its place, where there are many parameters
    gate: Gate
    memory: Mapping[str, Any]
    history: tuple[IterationRecord, ...]
    seconds: Mapping[str, float]
    scores: ScoresPass | None  # of a sandwich covariance
    left_precision: str  # why a lower precision was left, if it was
    offending_leaves: tuple[int, ...]  # of the last pass
    checkpoint: Mapping[str, str | None]
    start_cost: float  # at `p0`, on the sample
    end_cost: float  # at the parameters found, on the sample
    runs: Float[np.ndarray, "runs 4"]  # of the sample's residuals, where it is all rows

    @property
    def bytes_read(self) -> int:
        for_sample = 0 if self.evaluator.keeps_rows else self.sample.bytes_read
        return for_sample + sum(done.bytes_read for done in self.full.accounts)


def build_result(course: Course, state: State | NewtonState, session: Session) -> FitResult:
    """The result at the best point, with the covariance of the normal equations there.

    Where the solve has landed they are those of the last pass, less than 1e-2 standard errors away.
    """
    problem, space = course.problem, course.problem.space
    num_rows = int(state.evaluation.normal.num_rows)
    covariance, warned = _covariance(course, state, num_rows)
    summary = course.full.summary
    active = np.zeros(space.size, bool)
    active[space.is_free] = state.active
    checks, worries = _checks(course, state, covariance)
    texts = [*_warnings(course, state, covariance.rank), *warned]
    return FitResult(
        popt=space.expand(state.params),
        p0=space.p0,
        lower=space.lower,
        upper=space.upper,
        pcov=covariance.matrix,
        param_names=space.labels,
        shapes=dict(zip(space.names, space.shapes, strict=True)),
        is_free=space.is_free,
        is_tied=space.is_tied,
        status=state.status,
        details=_details(course, state),
        cost=state.cost,
        penalty_cost=state.evaluation.penalty_cost,
        num_rows=num_rows,
        num_masked=problem.source.num_rows - num_rows,
        total_sum_of_squares=0.0 if summary is None else summary.total_sum_of_squares,
        num_passes=course.full.num_passes,
        bytes_read=course.bytes_read,
        optimality=state.optimality,
        distance=float(state.remaining_distance),
        condition_number=covariance.condition_number,
        rank=float(covariance.rank),
        active=active,
        absolute_sigma=problem.absolute_sigma,
        loss=problem.loss,
        f_scale=1.0 if problem.f_scale is None else problem.f_scale,
        covariance_kind=problem.covariance,
        num_clusters=_num_clusters(problem),
        history=course.history,
        diagnostics={
            **_diagnostics(course, state, covariance),
            "checks": checks,
            "warnings": texts,
            "notes": worries,
        },
        session=session,
    )


def with_origin(
    result: FitResult, problem: Problem, origin: Origin, nan_policy: str, started: datetime
) -> FitResult:
    """The result with its provenance, and a session that has the data as they were given."""
    record = origin.record
    result.diagnostics["time_axes"] = {
        variable.name: variable.time_units
        for variable in record.x
        if variable.time_units is not None
    }
    session = result.session
    return replace(
        result,
        model=problem.model,
        provenance=trace_provenance(problem, record, nan_policy=nan_policy, started=started),
        session=None if session is None else replace(session, origin=origin),
    )


def _covariance(
    course: Course, state: State | NewtonState, num_rows: int
) -> tuple[Covariance, list[str]]:
    if isinstance(state, NewtonState):
        return no_covariance(), []
    problem, space = course.problem, course.problem.space
    dof = num_rows - space.num_free
    variance = 2 * state.data_cost / dof if dof > 0 else np.inf
    if problem.absolute_sigma:
        variance = 1.0
    if state.status is Status.NOT_FINITE:
        variance = np.inf
    robust, texts = None, []
    if course.scores is not None:
        rows = problem.penalties.rows(num_rows)
        penalty = penalty_gram(problem, rows, state.params, state.whitening)
        robust, is_clamped = sandwich(
            course.scores.sums,
            state.whitening,
            penalty,
            np.asarray(course.scores.gram) + penalty,
            small_sample_factor(problem.covariance, num_rows, space.num_free, problem.num_clusters),
        )
        if is_clamped:
            texts.append(
                "the loss is concave along a direction at the parameters found, so that the "
                "sandwich covariance uses the clamped Hessian and may be too small"
            )
    factor = state.model.gauss_newton_factor
    return estimate_covariance(factor, variance, space, state.params, robust), texts


def _num_clusters(problem: Problem) -> int:
    """That the covariance is of; 0 for any other covariance."""
    return problem.num_clusters if problem.covariance == "clustered" else 0


def _checks(
    course: Course, state: State | NewtonState, covariance: Covariance
) -> tuple[dict[str, Any], list[str]]:
    space = course.problem.space
    free_names = tuple(np.array(space.labels)[space.is_free].tolist())
    free = np.ix_(space.is_free, space.is_free)
    checks, texts = check_fit(
        start_cost=course.start_cost,
        end_cost=course.end_cost,
        cosines=dict(zip(free_names, map(float, state.cosines), strict=True)),
        condition_number=covariance.condition_number,
        rank=covariance.rank,
        covariance=None if covariance.matrix is None else covariance.matrix[free],
        names=free_names,
        bins=course.full.bins_at(state.params),
        runs=course.runs,
        is_linear_loss=course.problem.loss == "linear",
        is_rounding=_is_rounding(course, state),
        num_clusters=_num_clusters(course.problem),
    )
    if not np.isfinite(course.start_cost):
        texts.insert(0, "the model is not finite at `p0`, and was fitted from points around it")
    if covariance.matrix is None:
        texts.append(
            f"with {space.num_free:,} free parameters no covariance is formed, so that standard "
            "errors, rank and condition number are not known"
        )
    if course.full.missing:
        first = min(course.full.missing)
        texts.append(
            f"{len(course.full.missing):,} chunk(s), {first!r} for one, are not in the store, and "
            "Zarr takes its fill value for their rows"
        )
    return checks.as_dict(), [] if state.status is Status.NOT_FINITE else texts


def _diagnostics(
    course: Course, state: State | NewtonState, covariance: Covariance
) -> dict[str, Any]:
    problem = course.problem
    return {
        "evaluator": course.evaluator.description,
        "transports": _transports(problem.source),
        "plan": asdict(problem.plan),
        "memory": dict(course.memory),
        "sample": _describe_sample(course),
        "warmup": _describe_warmup(course),
        "defense": course.warmup.defense.describe() if course.warmup is not None else {},
        "multistart": _describe_tournament(course),
        "optima": _describe_optima(course),
        "switched_at_gate": course.gate.switched,
        "rank_tolerance": covariance.rank_tolerance,
        "chunks": describe_bins(course.full.bins_at(state.params), problem.source.num_chunks),
        "precision": {
            "requested": course.config.precision,
            "used": course.full.precision,
            "reason": course.left_precision,
        },
        "seconds": dict(course.seconds),
        "checkpoint": dict(course.checkpoint),
        "store": _describe_store(course.full),
        "passes": _describe_passes(course),
        "config": course.config.as_dict(),
        "versions": dict(package_versions()),
    }


def _transports(source: Source) -> list[str]:
    return transports_of(source.columns.values()) if isinstance(source, GridSource) else []


def _is_rounding(course: Course, state: State | NewtonState) -> bool:
    """Whether the residuals are what computing them in float64 errs by."""
    if state.status is not Status.CONVERGED_TO_ROUNDING:
        return False
    share = course.problem.source.num_rows / max(course.sample.num_rows, 1)
    least = (_ROUNDING * np.finfo(np.float64).eps) ** 2 * share * course.sample.data_square
    return bool(2 * state.data_cost <= least)


def _details(course: Course, state: State | NewtonState) -> str:
    """The numbers to the status."""
    if state.status is Status.NOT_FINITE:
        leaves = list(course.offending_leaves)
        return f"Not finite in chunks {leaves}." if leaves else ""
    if _is_rounding(course, state):
        return "The residuals are of rounding size, and with them the standard errors."
    text = (
        f"Distance to the minimum: {state.remaining_distance:.1e} standard errors "
        f"(limit {course.config.distance_tol:.1e})."
    )
    if isinstance(state, State) and state.has_landed:
        text += " A pass at the end of the last step would only have confirmed it, and was saved."
    return text


def _warnings(course: Course, state: State | NewtonState, rank: float) -> list[str]:
    """Sentences that a user should read even if the fit converged."""
    if state.status is Status.NOT_FINITE:
        return []
    texts = []
    free = course.problem.space.num_free
    if rank < free:
        texts.append(
            f"the data determine {rank} of {free} free parameters' directions; parameters "
            "with an infinite standard error are arbitrary"
        )
    if isinstance(state, NewtonState) and state.is_idle.any():
        idle = np.array(course.problem.space.labels)[course.problem.space.is_free][state.is_idle]
        texts.append(
            f"no row depends on {len(idle):,} of {free:,} free parameters, {idle[0]} for one: they "
            "are as they were at the start"
        )
    few = int(state.evaluation.normal.num_rows) <= free
    if few and not course.problem.absolute_sigma:
        texts.append(
            "there are not more rows than free parameters, so that the covariance could not "
            "be estimated"
        )
    return texts


def _describe_sample(course: Course) -> dict[str, Any]:
    sample, warmup, fit = course.sample, course.warmup, course.sample_fit
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
        }
    if fit is not None:
        described |= {
            "num_starts": 1,
            "num_evaluations": 1 + fit.num_trials,
            "num_products": fit.num_products,
        }
    return described


def _describe_warmup(course: Course) -> dict[str, Any]:
    """How each descent went, and the space it went through."""
    warmup, space = course.warmup, course.problem.space
    if warmup is None:
        return {}
    descents, normalizer = warmup.descents, warmup.normalizer
    return {
        "criteria": [descent.criterion for descent in descents],
        "iterations": [descent.num_iterations for descent in descents],
        "start_losses": [descent.start_loss for descent in descents],
        "losses": [descent.loss for descent in descents],
        "starts": [space.expand(descent.start) for descent in descents],
        "ends": [space.expand(descent.end) for descent in descents],
        "steps_clipped": [descent.num_clipped for descent in descents],
        "line_search_failures": [descent.num_line_search_failures for descent in descents],
        "history_fill": [
            min(descent.num_pairs, course.config.lbfgs_history_size) for descent in descents
        ],
        "normalization": {
            "strategy": normalizer.strategy,
            "offset": normalizer.offset,
            "scale": normalizer.scale,
            "lower": normalizer.lower,
            "upper": normalizer.upper,
        },
        "was_stopped": warmup.was_stopped,
    }


def _describe_tournament(course: Course) -> dict[str, Any]:
    """Candidates and rounds; nothing where there was no tournament."""
    if course.warmup is None or course.warmup.tournament is None:
        return {}
    tournament, space = course.warmup.tournament, course.problem.space
    return {
        "candidates": [space.expand(candidate) for candidate in tournament.candidates],
        "rounds": [
            {
                "num_rows": held.num_rows,
                "costs": held.costs,
                "survives": np.flatnonzero(held.survives).tolist(),
            }
            for held in tournament.rounds
        ],
        "survivors": [space.expand(survivor) for survivor in tournament.survivors],
    }


def _describe_optima(course: Course) -> list[dict[str, Any]]:
    """What competed in the first pass."""
    if course.warmup is None:
        return []
    optima = course.warmup.optima
    costs = course.gate.costs or (np.nan,) * len(optima)  # of a fit interrupted before they met
    return [
        {
            "params": course.problem.space.expand(optimum.params),
            "sample_cost": optimum.cost,
            "cost": cost,
        }
        for optimum, cost in zip(optima, costs, strict=True)
    ]


def _describe_store(full: Passes) -> dict[str, Any]:
    """What the passes of this process met in reading."""
    return {
        "missing_chunks": len(full.missing),
        "first_missing": sorted(full.missing)[:_MAX_NAMED],
        "retries": full.num_retries,
    }


def _describe_passes(course: Course) -> dict[str, Any]:
    accounts = course.full.accounts
    return {
        "seconds": [account.seconds for account in accounts],
        "bytes_read": [account.bytes_read for account in accounts],
        "tasks": [account.num_tasks for account in accounts],
        "compilations_by_process": dict(course.full.compilations),
        "peak_memory_bytes_by_process": dict(course.full.peak_bytes),
        "read_seconds": math.fsum(account.read_seconds for account in accounts),
    }
