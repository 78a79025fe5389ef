"""The phases of a fit, in order: sample, warmup, gate, trust region on all data, covariance."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask.checkpoint.journal import Journal, Places, open_journal
from nlsq_dask.checkpoint.ledger import Ledger
from nlsq_dask.compilation import compile_seconds
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import FitInterrupted
from nlsq_dask.evaluate.base import Evaluator
from nlsq_dask.objective.dense import FullObjective, Passes
from nlsq_dask.objective.matrix_free import FullProducts, SampleFit, SampleProducts, fit_sample
from nlsq_dask.objective.on_sample import SampleObjective
from nlsq_dask.problem import Problem
from nlsq_dask.results.diagnostics import runs_of
from nlsq_dask.results.report import Course, Gate, ScoresPass, build_result
from nlsq_dask.results.result import FitResult
from nlsq_dask.results.session import Session
from nlsq_dask.sample import Sample, draw_sample
from nlsq_dask.screening import NanPolicy, screen_model, screen_rows, screen_sample
from nlsq_dask.solvers.minimize import minimize
from nlsq_dask.solvers.quadratic import next_whitening
from nlsq_dask.solvers.truncated_newton import NewtonState
from nlsq_dask.solvers.trust_region import State, Tolerances
from nlsq_dask.solving import lacks_digits, solver_for, tolerances_for
from nlsq_dask.status import Status
from nlsq_dask.telemetry import Callback, IterationRecord
from nlsq_dask.warmup.scale import estimate_f_scale
from nlsq_dask.warmup.search import Warmup, equal_cost, warm_up

__all__ = ["fit_problem"]

_LOGGER = logging.getLogger("nlsq_dask")
_LIMITED = (Status.STOPPED_BY_CALLBACK, Status.MAX_PASSES, Status.MAX_SECONDS)


def fit_problem(
    problem: Problem,
    open_evaluator: Callable[[], Evaluator],
    config: HybridStreamingConfig,
    nan_policy: NanPolicy = "omit",
    callback: Callback | None = None,
    places: Places | None = None,
) -> FitResult:
    """Fit a problem that was checked at the edge.

    `open_evaluator` is called once here, and again where more is asked of the result.

    Raises
    ------
    CheckpointError
        If checkpoints cannot be written, or the one to resume is not of this fit.
    DataError
        If no row is valid, a sigma is not positive, or `nan_policy` refuses a value.
    ModelError
        If the model mixes rows.
    MemoryProjectionError
        If the plan does not fit the workers.
    WorkerError
        If a cluster cannot run the fit, or not go on with it: with the checkpoint, if there is one.
    FitInterrupted
        In the place of a KeyboardInterrupt, with what the fit has come to.
    """
    journal = open_journal(problem, config, nan_policy, Places() if places is None else places)
    try:
        with journal.named_in_errors(), contextlib.closing(open_evaluator()) as evaluator:
            course, state = _Fit(problem, evaluator, config, nan_policy, callback, journal).run()
            session = Session(
                problem=course.problem,
                config=config,
                open_evaluator=open_evaluator,
                terms=course.full.sample.terms,
            )
            result = build_result(course, state, session)
    except KeyboardInterrupt:
        raise FitInterrupted(None, journal.written) from None
    if state.status is Status.INTERRUPTED:
        raise FitInterrupted(result, journal.written)
    return result


_AnyState = TypeVar("_AnyState", State, NewtonState)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a way to fit comes back with."""

    full: Passes
    state: State | NewtonState
    sample_fit: SampleFit | None = None
    scores: ScoresPass | None = None


class _Fit:
    def __init__(
        self,
        problem: Problem,
        evaluator: Evaluator,
        config: HybridStreamingConfig,
        nan_policy: NanPolicy,
        callback: Callback | None,
        journal: Journal,
    ) -> None:
        self._problem = problem
        self._evaluator = evaluator
        self._config = config
        self._nan_policy = nan_policy
        self._callback = callback
        self._data_square = 0.0
        self._started = time.perf_counter()
        self._compiled_before = compile_seconds()
        self._seconds: dict[str, float] = {}
        self._was_stopped = False  # in the warmup: the fit ends with its first pass
        self._reached: _Found | None = None  # by the last pass
        self._journal = journal
        self._ledger = Ledger(journal)

    def run(self) -> tuple[Course, State | NewtonState]:
        sample = self._timed("sample", self._draw)
        with ThreadPoolExecutor(2, thread_name_prefix="nlsq-plan") as beside:  # the warmup
            self._planned = beside.submit(self._evaluator.memory)
            self._screened = beside.submit(screen_model, self._problem, sample, self._config.seed)
            try:
                return self._run(sample)
            finally:
                self._screened.result()  # of a model that mixes rows, anything may have come

    def _run(self, sample: Sample) -> tuple[Course, State | NewtonState]:
        self._journal.meet_sample(sample)
        is_matrix_free = self._problem.plan.is_matrix_free
        sample = sample.in_one_block() if is_matrix_free else sample
        on_sample = SampleObjective(self._problem, sample)
        self._data_square = sample.data_square
        on_sample = self._timed("scale", lambda: self._with_scale(on_sample))
        try:
            found = self._fit_many(on_sample) if is_matrix_free else self._fit_few(on_sample)
        except KeyboardInterrupt:
            if self._reached is None:
                raise
            found = self._reached
            # A sandwich would take the pass that nobody waits for now.
            self._problem = replace(self._problem, covariance="classical")
        state = found.state
        free0 = self._problem.space.p0[self._problem.space.is_free]
        start_cost, end_cost = on_sample.costs(np.stack([free0, state.params]), sample.blocks)
        self._seconds["total"] = time.perf_counter() - self._started
        self._seconds["compiling"] = compile_seconds() - self._compiled_before
        if self._config.verbose:
            _LOGGER.info("%s", state.status.value)
        ledger = self._ledger
        course = Course(
            problem=self._problem,
            config=self._config,
            evaluator=self._evaluator,
            full=found.full,
            sample=sample,
            warmup=ledger.warmup,
            sample_fit=found.sample_fit,
            gate=ledger.gate,
            memory=self._planned.result(),
            history=ledger.history,
            seconds=self._seconds,
            scores=found.scores,
            left_precision=ledger.left_precision,
            offending_leaves=ledger.offending_leaves,
            checkpoint=ledger.checkpoint,
            start_cost=start_cost,
            end_cost=end_cost,
            runs=self._runs(on_sample, state.params, state.status),
        )
        return course, state

    def _fit_few(self, on_sample: SampleObjective) -> _Found:
        """The optima of the sample, and from the best a trust region with normal equations."""
        self._ledger.enter_warmup(self._timed("warmup", lambda: self._warm_up(on_sample)))
        self._timed("plan", lambda: self._await_plan(on_sample))
        full = self._open_objective(on_sample)
        start = time.perf_counter()
        state = self._descend(full, self._pass_gate(full, self._begin(full)))
        self._seconds["passes"] = time.perf_counter() - start
        scores = self._timed("covariance", lambda: self._scores(full, state))
        self._ledger.enter_end(full, state, scores)
        return _Found(full=full, state=state, scores=scores)

    def _await_plan(self, on_sample: SampleObjective) -> None:
        """What the first pass asks of the sample, while its own kernel is still compiled."""
        warmup = self._ledger.warmup
        is_first = self._ledger.standing is None
        if is_first and warmup is not None and warmup.optima[0].bends:
            on_sample.curvature(warmup.optima[0].params, warmup.whitening)
        self._await_compiled()

    def _await_compiled(self) -> None:
        self._screened.result()
        self._planned.result()

    def _fit_many(self, on_sample: SampleObjective) -> _Found:
        """The sample's optimum near `p0`, and from there truncated Newton: no k x k matrix."""
        sample, ledger = SampleProducts(on_sample), self._ledger
        if ledger.newton is None:
            tolerances = self._sample_tolerances
            ledger.sample_fit = self._timed(
                "warmup", lambda: fit_sample(sample, self._config, tolerances)
            )
        full = FullProducts(
            problem=self._problem,
            evaluator=self._evaluator,
            sample=on_sample,
            precision=self._config.precision,
            names_leaves=self._config.validate_numerics,
            products_of_sample=sample,
            regularization=self._config.regularization_factor,
        )
        self._timed("plan", self._await_compiled)
        full = ledger.open_products(full)
        start = time.perf_counter()
        state = self._descend(full, self._begin_many(full))
        self._seconds["passes"] = time.perf_counter() - start
        return _Found(full=full, state=state, sample_fit=ledger.sample_fit)

    def _begin_many(self, full: FullProducts) -> NewtonState:
        """Where an earlier process stood, or the first pass, at the sample's optimum."""
        newton, fit, space = self._ledger.newton, self._ledger.sample_fit, self._problem.space
        if newton is not None:
            return self._within_limits(full, newton.state(full))
        params = space.p0[space.is_free] if fit is None else fit.params
        slope = full(params, center=full.sample.sample.center)
        self._screen(full)
        state: NewtonState = self._solver(full).init(slope)
        return self._after_pass(full, state)

    def _with_scale(self, on_sample: SampleObjective) -> SampleObjective:
        """The scale of the loss, as given or from the sample; frozen from here on."""
        if self._problem.f_scale is not None:
            self._ledger.f_scale = self._problem.f_scale
            return on_sample
        if self._ledger.is_resumed:
            scale = self._ledger.f_scale
        else:
            scale = estimate_f_scale(on_sample, self._optimum_of)
        self._ledger.f_scale = scale
        self._problem = replace(self._problem, f_scale=scale)
        return on_sample.with_f_scale(scale)

    def _optimum_of(self, objective: SampleObjective) -> Vector | None:
        """The sample's best optimum; None where the model is not finite at any start."""
        tolerances = self._sample_tolerances
        if self._problem.plan.is_matrix_free:
            found = fit_sample(SampleProducts(objective), self._config, tolerances)
            return None if found is None else found.params
        warmup = warm_up(objective, self._config, tolerances)
        return None if warmup is None else warmup.optima[0].params

    def _scores(self, full: FullObjective, state: State) -> ScoresPass | None:
        """The extra pass of a sandwich covariance, at the parameters that are returned."""
        is_usable = state.status is not Status.NOT_FINITE
        if self._problem.covariance == "classical" or not is_usable:
            return None
        before = self._ledger.standing
        if before is not None and before.scores is not None:
            full.accounts.append(before.scores.account)
            return before.scores
        sums = full.scores(state.params, state.whitening)
        assert sums.scores is not None
        return ScoresPass(sums=sums.scores, gram=sums.equations.gram, account=full.accounts[-1])

    def _runs(
        self, on_sample: SampleObjective, params: Vector, status: Status
    ) -> Float[np.ndarray, "runs 4"]:
        """Residuals in runs, where there are too few chunks to judge them by."""
        sample = on_sample.sample
        if not sample.is_everything or status is Status.NOT_FINITE:
            return runs_of(np.zeros(0))
        return runs_of(on_sample.residuals(params))

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        done = work()
        self._seconds[phase] = time.perf_counter() - start
        return done

    def _solver(self, full: Passes) -> Any:
        """The trust region over all rows, at the precision of the passes."""
        share = self._problem.source.num_rows / full.sample.sample.num_rows
        data_square = self._data_square * share
        tolerances = tolerances_for(self._problem, self._config, data_square, full.precision)
        return solver_for(self._problem, self._config, tolerances)

    @property
    def _sample_tolerances(self) -> Tolerances:
        return tolerances_for(self._problem, self._config, self._data_square)

    # -- sample

    def _warm_up(self, on_sample: SampleObjective) -> Warmup | None:
        ledger = self._ledger
        if ledger.is_warm:
            return ledger.warmup
        is_watched = self._callback is not None or self._config.verbose > 1
        warmup = warm_up(
            on_sample,
            self._config,
            self._sample_tolerances,
            on_iteration=self._tell if is_watched else None,
            on_state=ledger.save_warmup if self._journal.path is not None else None,
            resume=ledger.warmup_state,
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
        screen_sample(sample, self._nan_policy)
        return sample

    # -- passes over all data

    def _open_objective(self, on_sample: SampleObjective) -> FullObjective:
        """The cost on all rows, with what an earlier process found out about it."""
        full = FullObjective(
            problem=self._problem,
            evaluator=self._evaluator,
            sample=on_sample,
            precision=self._config.precision,
            names_leaves=self._config.validate_numerics,
        )
        return self._ledger.open_objective(full)

    def _begin(self, full: FullObjective) -> State:
        """Where an earlier process stood, or the first pass.

        That is linearised at the sample's best optimum; the others compete by cost alone.
        """
        space, solver = self._problem.space, self._solver(full)
        standing, warmup = self._ledger.standing, self._ledger.warmup
        if standing is not None:
            resumed: State = solver.resume(standing.state)
            if resumed is not standing.state:
                resumed = full.bent(solver, resumed)
            return self._within_limits(full, resumed)
        center = full.sample.sample.center
        if warmup is None:
            params = space.p0[space.is_free]
            evaluation = full(params, np.eye(space.num_free), center=center)
        else:
            best, *rivals = warmup.optima
            full.with_curvature = best.bends
            rival_params = [rival.params for rival in rivals]
            evaluation = full(best.params, warmup.whitening, rival_params, center)
        self._screen(full)
        state: State = solver.init(evaluation)
        return self._after_pass(full, state)

    def _pass_gate(self, full: FullObjective, state: State) -> State:
        """Go on from another optimum of the sample, where the first pass says that it is better."""
        ledger = self._ledger
        warmup, solver = ledger.warmup, self._solver(full)
        if ledger.has_gate or warmup is None:
            return state
        normal = state.evaluation.normal
        costs = (float(normal.cost), *full.rival_costs)
        comparable = np.where(np.isfinite(costs), costs, np.inf)
        if np.isfinite(costs[0]):
            comparable[0] -= equal_cost(costs[0], int(normal.num_rows), solver.tolerances)
        winner = int(np.argmin(comparable))
        may_switch = state.status in (Status.RUNNING, Status.NOT_FINITE) or state.status.is_success
        switched = winner != 0 and may_switch and bool(np.isfinite(comparable[winner]))
        ledger.enter_gate(Gate(costs=costs, switched=switched))
        if not switched:
            return state
        chosen = warmup.optima[winner]
        full.with_curvature = chosen.bends
        state = solver.init(full(chosen.params, next_whitening(chosen.factor)))
        return self._after_pass(full, state)

    def _descend(self, full: Any, state: _AnyState) -> _AnyState:
        """The passes to the minimum; in float64 in the end, where fewer digits do not do."""

        def settle(state: _AnyState) -> _AnyState:
            is_running = state.status is Status.RUNNING and state.num_trials > 0
            if is_running and lacks_digits(full.precision, state):
                return replace(state, status=Status.STALLED)
            return state

        def after(state: _AnyState) -> _AnyState:
            return settle(self._after_pass(full, state))

        state = minimize(full, self._solver(full), settle(state), after)
        reason = lacks_digits(full.precision, state)
        if not reason or state.status in _LIMITED:
            return state
        _LOGGER.info("Moving to float64: %s.", reason)
        self._ledger.left_precision, full.precision = reason, "float64"
        solver = self._solver(full)
        start = self._after_pass(full, solver.init(full(*state.here)))
        end: _AnyState = minimize(full, solver, start, after)
        return end

    def _screen(self, full: Passes) -> None:
        assert full.last is not None
        screen_rows(self._problem, full.last, self._nan_policy)

    def _after_pass(self, full: Passes, state: _AnyState) -> _AnyState:
        """Record the pass, tell the caller, and see whether the budget allows another."""
        state = full.bent(self._solver(full), state)
        record = self._ledger.enter_pass(full, state)
        self._reached = _Found(
            full=full,
            state=replace(state, status=Status.INTERRUPTED),
            sample_fit=self._ledger.sample_fit,
        )
        try:
            self._tell(record)
        except StopIteration:
            self._was_stopped = True
        return self._within_limits(full, state)

    def _within_limits(self, full: Passes, state: _AnyState) -> _AnyState:
        """Whether another pass is needed, and the callback, passes and time allow it."""
        state = full.landed(self._solver(full), state)
        if state.status is not Status.RUNNING:
            return state
        if self._was_stopped:
            return replace(state, status=Status.STOPPED_BY_CALLBACK)
        config = self._config
        if config.max_passes is not None and full.num_passes >= config.max_passes:
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
        if record.phase == 2:
            self._evaluator.log_event(record.as_event())
        if self._callback is not None:
            self._callback(record)
