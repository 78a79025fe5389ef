"""The phases of a fit, in order: sample, warmup, gate, trust region on all data, covariance."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask.config import HybridStreamingConfig, Precision
from nlsq_dask.diagnostics import runs_of
from nlsq_dask.errors import DataError
from nlsq_dask.evaluate.base import Evaluator
from nlsq_dask.matrix_free import FullProducts, SampleFit, SampleProducts, fit_sample
from nlsq_dask.model import check_elementwise
from nlsq_dask.normal_equations import CurvatureProducts, ScoreSums
from nlsq_dask.objective import FullObjective, Passes, SampleObjective
from nlsq_dask.problem import Problem
from nlsq_dask.report import Course, Gate, build_result
from nlsq_dask.result import FitResult
from nlsq_dask.sample import Sample, draw_sample
from nlsq_dask.scale import estimate_f_scale
from nlsq_dask.session import Session
from nlsq_dask.solvers.minimize import minimize
from nlsq_dask.solvers.quadratic import next_whitening
from nlsq_dask.solvers.truncated_newton import NewtonState, TruncatedNewton
from nlsq_dask.solvers.trust_region import State, Tolerances, TrustRegion
from nlsq_dask.status import Status
from nlsq_dask.telemetry import Callback, IterationRecord
from nlsq_dask.warmup import Warmup, equal_cost, warm_up

__all__ = ["NanPolicy", "fit_problem"]

NanPolicy = Literal["omit", "raise"]
_LOGGER = logging.getLogger("nlsq_dask")
# Above it, derivatives in float32 bias the answer (2.5e-3 standard errors at 4e5).
_MIXED_CONDITION = 1e3


def fit_problem(
    problem: Problem,
    open_evaluator: Callable[[], Evaluator],
    config: HybridStreamingConfig,
    nan_policy: NanPolicy = "omit",
    callback: Callback | None = None,
) -> FitResult:
    """Fit a problem that was checked at the edge.

    `open_evaluator` is called once here, and again where more is asked of the result.

    Raises
    ------
    DataError
        If no row is valid, a sigma is not positive, or `nan_policy` refuses a value.
    ModelError
        If the model mixes rows.
    MemoryProjectionError
        If the plan does not fit the workers.
    """
    with contextlib.closing(open_evaluator()) as evaluator:
        course, state = _Fit(problem, evaluator, config, nan_policy, callback).run()
        session = Session(
            problem=course.problem,
            config=config,
            open_evaluator=open_evaluator,
            terms=course.full.sample.terms,
        )
        return build_result(course, state, session)


_AnyState = TypeVar("_AnyState", State, NewtonState)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a way to fit comes back with."""

    full: Passes
    state: State | NewtonState
    gate: Gate
    warmup: Warmup | None = None
    sample_fit: SampleFit | None = None
    scores: ScoreSums | None = None
    left_precision: str = ""  # why a lower precision was left, if it was


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
        self._data_square = 0.0
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._history: list[IterationRecord] = []
        self._was_stopped = False  # in the warmup: the fit ends with its first pass

    def run(self) -> tuple[Course, State | NewtonState]:
        memory = self._timed("plan", self._evaluator.memory)
        sample = self._timed("sample", self._draw)
        self._check_model(sample)
        is_matrix_free = self._problem.plan.is_matrix_free
        sample = sample.in_one_block() if is_matrix_free else sample
        on_sample = SampleObjective(self._problem, sample)
        self._data_square = _data_square(sample)
        on_sample = self._timed("scale", lambda: self._with_scale(on_sample))
        found = self._fit_many(on_sample) if is_matrix_free else self._fit_few(on_sample)
        state = found.state
        free0 = self._problem.space.p0[self._problem.space.is_free]
        start_cost, end_cost = on_sample.costs(np.stack([free0, state.params]), sample.blocks)
        self._seconds["total"] = time.perf_counter() - self._started
        if self._config.verbose:
            _LOGGER.info("%s", state.status.value)
        course = Course(
            problem=self._problem,
            config=self._config,
            evaluator=self._evaluator,
            full=found.full,
            sample=sample,
            warmup=found.warmup,
            sample_fit=found.sample_fit,
            gate=found.gate,
            memory=memory,
            history=tuple(self._history),
            seconds=self._seconds,
            scores=found.scores,
            left_precision=found.left_precision,
            start_cost=start_cost,
            end_cost=end_cost,
            runs=self._runs(on_sample, state.params, state.status),
        )
        return course, state

    def _fit_few(self, on_sample: SampleObjective) -> _Found:
        """The optima of the sample, and from the best a trust region with normal equations."""
        tolerances = self._tolerances(self._data_square)
        warmup = self._timed("warmup", lambda: self._warm_up(on_sample, tolerances))
        full = FullObjective(
            problem=self._problem,
            evaluator=self._evaluator,
            sample=on_sample,
            precision=self._config.precision,
            names_leaves=self._config.validate_numerics,
        )
        start = time.perf_counter()
        state, gate = self._gate(full, warmup, on_sample.sample.center)
        state, lowered = self._descend(full, state)
        self._seconds["passes"] = time.perf_counter() - start
        return _Found(
            full=full,
            state=state,
            gate=gate,
            warmup=warmup,
            scores=self._timed("scores", lambda: self._scores(full, state)),
            left_precision=lowered,
        )

    def _fit_many(self, on_sample: SampleObjective) -> _Found:
        """The sample's optimum near `p0`, and from there truncated Newton: no k x k matrix."""
        tolerances = self._tolerances(self._data_square)
        sample = SampleProducts(on_sample)
        fit = self._timed("warmup", lambda: fit_sample(sample, self._config, tolerances))
        full = FullProducts(
            problem=self._problem,
            evaluator=self._evaluator,
            sample=on_sample,
            precision=self._config.precision,
            products_of_sample=sample,
            regularization=self._config.regularization_factor,
        )
        space = self._problem.space
        params = space.p0[space.is_free] if fit is None else fit.params
        start = time.perf_counter()
        slope = full(params, center=on_sample.sample.center)
        self._check_rows(full)
        state = self._after_pass(full, self._solver(full).init(slope))
        state, lowered = self._descend(full, state)
        self._seconds["passes"] = time.perf_counter() - start
        return _Found(
            full=full,
            state=state,
            gate=Gate(optima=[], switched=False),
            sample_fit=fit,
            left_precision=lowered,
        )

    def _with_scale(self, on_sample: SampleObjective) -> SampleObjective:
        """The scale of the loss, as given or from the sample; frozen from here on."""
        if self._problem.f_scale is not None:
            return on_sample
        tolerances = self._tolerances(self._data_square)

        def fit(objective: SampleObjective) -> Vector | None:
            if self._problem.plan.is_matrix_free:
                found = fit_sample(SampleProducts(objective), self._config, tolerances)
                return None if found is None else found.params
            warmup = warm_up(objective, self._config, tolerances)
            return None if warmup is None else warmup.optima[0].params

        scale = estimate_f_scale(on_sample, fit)
        self._problem = replace(self._problem, f_scale=scale)
        return on_sample.with_f_scale(scale)

    def _scores(self, full: FullObjective, state: State) -> ScoreSums | None:
        """The extra pass of a sandwich covariance, at the parameters that are returned."""
        is_usable = state.status is not Status.NOT_FINITE
        if self._problem.covariance == "classical" or not is_usable:
            return None
        return full.scores(state.params, state.whitening)

    def _runs(
        self, on_sample: SampleObjective, params: Vector, status: Status
    ) -> Float[np.ndarray, "runs 4"]:
        """Residuals in runs, where there are too few chunks to judge them by."""
        sample = on_sample.sample
        if not sample.is_everything or status is Status.NOT_FINITE:
            return runs_of(np.zeros(0))
        return runs_of(on_sample.residuals(params))

    def _check_model(self, sample: Sample) -> None:
        """See that the model is elementwise, at `p0` and beside it.

        At a start of zero a term that mixes rows may be invisible.
        """
        space = self._problem.space
        x = [column.read((slice(0, 4096),)) for column in sample.source.x]
        for params in (space.p0, space.beside(space.p0, self._config.seed)):
            parts = [np.asarray(part) for part in space.unflatten(params)]
            check_elementwise(self._problem.model, x, parts, self._problem.fingerprint)

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        done = work()
        self._seconds[phase] = time.perf_counter() - start
        return done

    def _solver(self, full: Passes) -> Any:
        """The trust region over all rows, at the precision of the passes."""
        share = self._problem.source.num_rows / full.sample.sample.num_rows
        tolerances = self._tolerances(self._data_square * share)
        if full.precision == "float32":
            tolerances = replace(tolerances, eps=float(np.finfo(np.float32).eps))
        config = self._config
        if self._problem.plan.is_matrix_free:
            return TruncatedNewton(
                bounds=self._problem.space.free_bounds,
                tolerances=tolerances,
                max_products=config.cg_max_iterations,
                relative_tolerance=config.cg_relative_tolerance,
                absolute_tolerance=config.cg_absolute_tolerance,
                initial_radius=config.trust_region_initial,
            )
        return TrustRegion(
            bounds=self._problem.space.free_bounds,
            tolerances=tolerances,
            initial_radius=config.trust_region_initial,
        )

    def _tolerances(self, data_square: float) -> Tolerances:
        config = self._config
        return Tolerances(
            distance_tol=config.distance_tol,
            tangent_tol=config.gauss_newton_tol,
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
            num_free=self._problem.space.num_free if self._problem.plan.is_matrix_free else 0,
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
        self, full: FullObjective, warmup: Warmup | None, center: float
    ) -> tuple[State, Gate]:
        """The first pass: linearised at the sample's best optimum, the others by cost alone."""
        space, solver = self._problem.space, self._solver(full)
        if warmup is None:
            params = space.p0[space.is_free]
            state = solver.init(full(params, np.eye(space.num_free), center=center))
            self._check_rows(full)
            return self._after_pass(full, state), Gate(optima=[], switched=False)
        best, *rivals = warmup.optima
        evaluation = full(best.params, warmup.whitening, [r.params for r in rivals], center)
        self._check_rows(full)
        state = solver.init(evaluation)
        costs = [float(evaluation.normal.cost), *full.rival_costs]
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

    def _descend(self, full: Any, state: _AnyState) -> tuple[_AnyState, str]:
        """The passes to the minimum; in float64 in the end, where fewer digits do not do.

        Returns also why a lower precision was left, if it was.
        """

        def after(state: _AnyState) -> _AnyState:
            after_pass = self._after_pass(full, state)
            is_running = after_pass.status is Status.RUNNING
            if is_running and lacks_digits(full.precision, after_pass):
                return replace(after_pass, status=Status.STALLED)
            return after_pass

        state = minimize(full, self._solver(full), state, after)
        reason = lacks_digits(full.precision, state)
        if not reason:
            return state, ""
        _LOGGER.info("Moving to float64: %s.", reason)
        full.precision = "float64"
        solver = self._solver(full)
        start = self._after_pass(full, solver.init(full(*state.here)))
        return minimize(full, solver, start, after), reason

    def _check_rows(self, full: Passes) -> None:
        """What only a full pass can see in the data."""
        first = full.passes[0]
        rows, chunks = first.sums.rows, list(first.offending_leaves)
        if int(rows.num_bad_sigma):
            raise DataError(
                f"`sigma` must be positive in every row, got {int(rows.num_bad_sigma):,} rows "
                f"where it is not, in chunks {chunks}"
            )
        if int(rows.num_stray):
            variable = self._problem.model.variables[0]
            raise DataError(
                f"{variable!r} must hold the number of a group in `residual_weights`, whole and "
                f"from 0 to {len(self._problem.group_weights or ()) - 1}, got "
                f"{int(rows.num_stray):,} rows where it does not, in chunks {chunks}"
            )
        self._refuse_invalid(int(rows.num_invalid), "all of")

    def _after_pass(self, full: Passes, state: _AnyState) -> _AnyState:
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

    def _record(self, full: Passes, state: State | NewtonState) -> IterationRecord:
        last = full.passes[-1]
        rows = int(last.sums.normal.num_rows)
        cost = float(last.sums.normal.cost)
        before = self._history[-1].cost if self._history else np.nan
        is_product = isinstance(last.sums.normal, CurvatureProducts)
        return IterationRecord(
            phase=2,
            iteration=len(full.passes),
            num_passes=len(full.passes),
            params=self._problem.space.expand(state.params),
            cost=state.cost,
            loss=2 * state.cost / rows if rows else np.nan,
            trial_cost=cost,
            relative_change=(cost - before) / before if before else np.nan,
            accepted=state.was_accepted and not is_product,
            gain=np.nan if is_product else state.gain,
            distance=float(state.remaining_distance),
            damping=state.step.damping,
            radius=state.radius,
            optimality=state.optimality,
            num_active=int(state.active.sum()),
            num_rows=rows,
            bytes_read=last.bytes_read,
            seconds=last.seconds,
            is_product=is_product,
        )


def lacks_digits(precision: Precision, state: State | NewtonState) -> str:
    """Why a fit in fewer digits has to go on in float64; nothing where it need not."""
    if precision == "float64":
        return ""
    if state.status is Status.NOT_FINITE or not state.was_finite:
        return f"a pass in {precision} precision was not finite"
    if state.status is Status.STALLED:
        return f"no step lowered the cost in {precision} precision"
    condition = state.condition_number
    if precision == "mixed" and condition > _MIXED_CONDITION:
        return f"the condition number is {condition:.1e}, above {_MIXED_CONDITION:.0e}"
    return ""


def _data_square(sample: Sample) -> float:
    """``Σ w y²`` over the sample."""
    every = (slice(None),)
    y: Vector = sample.source.y.read(every)
    sigma = 1.0 if sample.source.sigma is None else sample.source.sigma.read(every)
    return float(np.sum((y / sigma) ** 2))
