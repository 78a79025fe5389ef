"""The cost in the free parameters on all rows, through an evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask.config import Precision
from nlsq_dask.errors import CheckpointError, DataChangedError
from nlsq_dask.evaluate.base import Account, Evaluator, Pass, Request
from nlsq_dask.evaluate.marks import Marks, differing_leaves, leaves_that_differ
from nlsq_dask.evaluate.reading import describe_places
from nlsq_dask.evaluate.tree import Bins
from nlsq_dask.normal_equations import RowSummary, Sums
from nlsq_dask.objective.on_sample import SampleObjective
from nlsq_dask.objective.penalised import evaluation_of
from nlsq_dask.problem import Problem
from nlsq_dask.solvers.trust_region import Evaluation, State, TrustRegion
from nlsq_dask.status import Status

__all__ = ["FullObjective", "Passes"]

_MANY_ROWS = 10**6  # of which a pass takes long


@dataclass
class Passes:
    """The passes over all rows, one after the other."""

    problem: Problem
    evaluator: Evaluator
    sample: SampleObjective
    precision: Precision = "float64"
    names_leaves: bool = True
    rival_costs: tuple[float, ...] = ()  # of the first pass's rivals
    summary: RowSummary | None = None  # of the first pass
    accounts: list[Account] = field(default_factory=list)  # of each pass
    bins: list[tuple[Vector, Bins]] = field(default_factory=list)  # by all parameters
    last: Pass | None = None  # in this process
    compilations: dict[str, int] = field(default_factory=dict)  # by process
    peak_bytes: dict[str, int] = field(default_factory=dict)
    # Of the data of an earlier process: the next pass holds them to it.
    remembered: RowSummary | None = None
    marks: Marks | None = None  # of the first pass's rows
    missing: set[str] = field(default_factory=set)  # chunks that the store does not have
    num_retries: int = 0  # of the passes' reading

    @property
    def num_passes(self) -> int:
        return len(self.accounts)

    def bins_at(self, params: Vector) -> Bins:
        """Statistics by chunk from the last pass at these parameters."""
        everything = self.problem.space.expand(params)
        found: Bins = self.bins[-1][1]
        for point, bins in self.bins:
            if np.array_equal(point, everything):
                found = bins
        return found

    def evaluate(self, request: Request) -> Pass:
        """One pass."""
        if self.remembered is not None:
            request = replace(request, center=self.sample.sample.center)
        done = self.evaluator.evaluate(request)
        self._compare_rows(done)
        self.accounts.append(done.account)
        self.bins.append((np.asarray(request.params), done.bins))
        self.last = done
        if self.summary is None:
            self.summary = done.sums.summary
        for report in done.reports:
            name = report.process
            self.compilations[name] = self.compilations.get(name, 0) + report.num_compilations
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), report.peak_memory_bytes)
            self.missing |= report.missing
            self.num_retries += report.num_retries
        return done

    def bent(self, _solver: Any, state: Any) -> Any:
        """The state with its next trial corrected, by what the sample knows."""
        return state

    def landed(self, _solver: Any, state: Any) -> Any:
        """The state where the next pass would only confirm what is known, if it would."""
        return state

    def _compare_rows(self, done: Pass) -> None:
        """Every pass, the first of a resumed fit too, sees whether all rows are what they were."""
        self._compare_summaries(done)
        before, now = self.marks, done.marks
        is_resumed, self.remembered = self.remembered is not None, None
        num_leaves = self.problem.source.num_chunks
        if now is None:
            return
        if before is None:
            self.marks = now
            named = leaves_that_differ(self.sample.sample.marks, now, num_leaves)
            leaves = ", ".join(map(str, named))
        else:
            leaves = differing_leaves(before, now, num_leaves)
        if not leaves:
            return
        if is_resumed:
            raise CheckpointError(
                f"The checkpoint is of other data: chunks {leaves} have other values than they had"
            )
        raise DataChangedError(
            f"`ds` must not change while it is fitted, and chunks {leaves} of "
            f"{describe_places(self.problem.source)} were read with other values than before; "
            "fit again when nothing writes to it"
        )

    def _compare_summaries(self, done: Pass) -> None:
        before, now = self.remembered, done.sums.summary
        if before is None or now is None:
            return
        if not all(np.array_equal(vars(before)[name], value) for name, value in vars(now).items()):
            raise CheckpointError(
                "The checkpoint is of other data: over all rows, the sums of `y` and of the "
                "weights are not what they were"
            )


@dataclass
class FullObjective(Passes):
    """The cost on all rows: each call is one pass."""

    with_curvature: bool = True  # the second-order term, from the sample

    def __call__(
        self,
        params: Vector,
        whitening: Float[np.ndarray, "k k"],
        rivals: Sequence[Vector] = (),
        center: float | None = None,
    ) -> Evaluation:
        """One pass; in the first, `rivals` compete by cost and `y` is summarised."""
        space = self.problem.space
        everything = [space.expand(rival) for rival in rivals]
        done = self.evaluate(
            self._request(
                params,
                whitening,
                rivals=np.stack(everything) if everything else None,
                center=center,
            )
        )
        normal = done.sums.equations
        penalty = self.problem.penalties.rows(float(normal.num_rows))
        if done.sums.rival_costs is not None:
            self.rival_costs = tuple(
                float(cost) + float(penalty.cost(rival))
                for cost, rival in zip(done.sums.rival_costs, everything, strict=True)
            )
        evaluation = evaluation_of(self.problem, penalty, params, whitening, normal)
        if not self.with_curvature:
            return evaluation
        share = float(normal.num_rows) / max(self.sample.num_rows, 1)
        return replace(evaluation, curvature=share * self.sample.curvature(params, whitening))

    def landed(self, solver: TrustRegion, state: State) -> State:
        """The state at the end of a step that another pass would only confirm, where one is long.

        In fewer digits a gradient is not as sure as that.
        """
        if self.problem.source.num_rows < _MANY_ROWS or self.precision != "float64":
            return state
        return solver.land(state, self._foresee)

    def _foresee(self, state: State) -> float:
        """What the step leaves of the gradient, relative to it, as the sample shows.

        That is what the model does not know of, and as much as could hide in the sample's noise;
        of the step across the way to here alone, as the model knows what there was along it.
        """
        evaluation, rows = state.evaluation, self.sample.num_rows
        num_rows, whitening = float(evaluation.normal.num_rows), evaluation.whitening
        across = _across(state.step.vector, state.way, whitening)
        share = np.linalg.norm(whitening @ across) / np.linalg.norm(whitening @ state.step.vector)
        if share == 0:
            return 0.0
        reach = np.sqrt(num_rows / max(rows, 1)) / (share * state.distance)
        mean, square = self.sample.left_out(state.params, across, whitening, reach)
        known = evaluation.curvature_with(state.secant)
        mean = mean - known @ (whitening @ across) / num_rows
        left = num_rows * (np.linalg.norm(mean) + np.sqrt(square / max(rows, 1)))
        return float(left / np.linalg.norm(evaluation.normal.grad))

    def bent(self, solver: TrustRegion, state: State) -> State:
        """The state with a Newton step that ends where the sample shows the gradient to end."""
        self.with_curvature = state.wants_curvature
        if state.status is not Status.RUNNING or not state.step.is_newton:
            return state
        remainder = self.sample.remainder(state.params, state.step.vector, state.whitening)
        return solver.bend(state, float(state.evaluation.normal.num_rows) * remainder)

    def scores(self, params: Vector, whitening: Float[np.ndarray, "k k"]) -> Sums:
        """The parts of a sandwich covariance: one pass, always in float64."""
        request = replace(self._request(params, whitening), with_scores=True, precision="float64")
        return self.evaluate(request).sums

    def _request(
        self,
        params: Vector,
        whitening: Float[np.ndarray, "k k"],
        rivals: Float[np.ndarray, "rivals n"] | None = None,
        center: float | None = None,
    ) -> Request:
        return Request(
            params=self.problem.space.expand(params),
            directions=self.problem.directions(whitening),
            terms=self.sample.terms,
            rivals=rivals,
            center=center,
            precision=self.precision,
            names_leaves=self.names_leaves,
        )


def _across(step: Vector, way: Vector, whitening: Float[np.ndarray, "k k"]) -> Vector:
    """The part of a step that is not along a way, where ``R`` makes the axes alike."""
    along = whitening @ way
    square = float(along @ along)
    return step - float(along @ (whitening @ step)) / square * way if square > 0 else step
