"""The cost in the free parameters: on a sample here, or on all rows through an evaluator."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import scipy.linalg

from nlsq_dask._typing import Float, Vector
from nlsq_dask.config import Precision
from nlsq_dask.errors import CheckpointError, DataChangedError
from nlsq_dask.evaluate.base import Account, Evaluator, Pass, Request
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.evaluate.marks import Marks, differing_leaves, leaves_that_differ
from nlsq_dask.evaluate.reading import describe_places
from nlsq_dask.evaluate.tree import Bins
from nlsq_dask.kernels.reverse import ReverseKernels
from nlsq_dask.normal_equations import CostGradient, RowSummary, Sums
from nlsq_dask.objective.penalised import evaluation_of, penalised_slope
from nlsq_dask.parameters.penalties import PenaltyRows
from nlsq_dask.plan import plan_chunks
from nlsq_dask.problem import Problem
from nlsq_dask.sample import Sample
from nlsq_dask.solvers.quadratic import next_whitening
from nlsq_dask.solvers.trust_region import Evaluation
from nlsq_dask.sources.base import Chunk

__all__ = ["FullObjective", "Passes", "SampleObjective"]

_MOST_PUSHED = 8  # free parameters whose gradient comes with the normal equations


class SampleObjective:
    """The cost on a sample, in this process. Any range of its blocks can be evaluated.

    Its scale is the sample's: penalties weigh as much against the rows at hand as they will
    against all of them.
    """

    def __init__(self, problem: Problem, sample: Sample) -> None:
        # Matrix products compile sooner than sums in lanes, and a sample is small.
        strategy = replace(problem.plan.strategy, num_shards=1, products="dot")
        plan = plan_chunks(sample.source, strategy)
        self.sample = sample
        self.problem = replace(problem, source=sample.source, plan=plan)
        self.terms = problem.terms(sample.fill)
        self.num_rows = _num_counting(sample, problem.group_weights)
        counting = self.num_rows / max(sample.num_rows, 1)
        self._all_rows = problem.source.num_rows * sample.valid_share * counting
        self._home = ProblemHome(problem=self.problem, cache_bytes=2**62, prefetch=False)

    def with_f_scale(self, f_scale: float) -> SampleObjective:
        """The same sample under another scale of the loss; nothing is compiled again."""
        changed = object.__new__(SampleObjective)
        vars(changed).update(vars(self))
        changed.problem = replace(self.problem, f_scale=f_scale)
        changed.terms = changed.problem.terms(self.sample.fill)
        return changed

    def on(self, blocks: range) -> _SampleEvaluate:
        """``(params, whitening) -> Evaluation`` over some of the blocks."""
        return _SampleEvaluate(self, blocks)

    @property
    def reverse(self) -> ReverseKernels:
        """Kernels by reverse mode, jitted for blocks of this sample."""
        return self._home.reverse

    def block(self, index: int) -> Chunk:
        """A block of the sample, padded to the common shape."""
        return self._home.reader.fetch(index)

    def penalty(self, blocks: range) -> PenaltyRows:
        """The penalty at its weight beside these blocks."""
        rows = self.num_rows * len(blocks) / len(self.sample.blocks)
        return self.problem.penalties.rows(rows, share=rows / self._all_rows)

    def sums(self, request: Request, blocks: range) -> Sums:
        report = self._home.reduce(blocks, request)
        return functools.reduce(operator.add, report.nodes.values())

    def whitening(self, params: Vector, blocks: range) -> Float[np.ndarray, "k k"] | None:
        """R of the QR of the Jacobian on the blocks; None where that is not finite."""
        space = self.problem.space
        k = space.num_free
        identity = np.eye(k)
        factor = self.penalty(blocks).push(space.tangents(params, identity))
        with jax.enable_x64(True):
            for index in blocks:
                jac = np.asarray(
                    self._home.kernels.linearisation(
                        space.expand(params), space.embed(identity), self.terms, self.block(index)
                    )
                )
                if not np.isfinite(jac).all():
                    return None
                factor = scipy.linalg.qr(np.vstack([factor, jac]), mode="r")[0][:k]
        return next_whitening(factor)

    def slope(self, params: Vector, block: int) -> tuple[float, Vector]:
        """The cost on one block, and its gradient by the free parameters."""
        penalty = self.penalty(range(block, block + 1))
        slope, _ = penalised_slope(
            self.problem, penalty, params, self._slope_of_rows(params, block)
        )
        return float(slope.cost), np.asarray(slope.grad)

    def costs(self, candidates: Float[np.ndarray, "c k"], blocks: range) -> Vector:
        """The cost at each candidate."""
        expand, penalty = self.problem.space.expand, self.penalty(blocks)
        costs = [
            sum(float(self._slope_of_rows(candidate, block).cost) for block in blocks)
            + float(penalty.cost(expand(candidate)))
            for candidate in candidates
        ]
        return np.array(costs)

    def _slope_of_rows(self, params: Vector, block: int) -> CostGradient:
        """Cost and gradient by all parameters, by a kernel that the sample needs in any case.

        A kernel of its own would be faster, by less than what compiling it takes.
        """
        space = self.problem.space
        everything, chunk = space.expand(params), self.block(block)
        with jax.enable_x64(True):
            if space.num_free > _MOST_PUSHED:
                slope, _ = self.reverse.gradient(everything, self.terms, chunk, precision="float64")
                fetched: CostGradient = jax.device_get(slope)
                return fetched
            along = space.embed(np.eye(space.num_free))
            normal, _ = self._home.kernels.normal_equations(
                everything, along, self.terms, chunk, precision="float64"
            )
        normal = jax.device_get(normal)
        grad = np.zeros(space.size)
        grad[space.is_free] = normal.grad
        return CostGradient(cost=normal.cost, num_rows=normal.num_rows, grad=grad)

    def residuals(self, params: Vector) -> Vector:
        """Weighted residuals of the sample's rows."""
        everything = self.problem.space.expand(params)
        with jax.enable_x64(True):
            parts = [
                self._home.kernels.residuals(everything, self.terms, self.block(index))
                for index in self.sample.blocks
            ]
        return np.concatenate([np.asarray(r)[np.asarray(is_row)] for r, is_row in parts])

    def curvature(self, params: Vector, whitening: Float[np.ndarray, "k k"]) -> np.ndarray:
        """What Gauss-Newton leaves out of the Hessian, along the columns of ``R⁻¹``.

        A sample's own noise enters it √(m / m_s) times stronger than that of all rows would.
        The two halves tell structure from noise: what they do not agree on is left out, by
        James and Stein's factor.
        """
        everything = self.problem.space.expand(params)
        directions = self.problem.directions(whitening)
        kernel = self._home.kernels.curvature
        halves = []
        with jax.enable_x64(True):
            for blocks in self.sample.halves:
                parts = [
                    np.asarray(kernel(everything, directions, self.terms, self.block(i)))
                    for i in blocks
                ]
                halves.append(sum(parts))
        if self.sample.halves[0] == self.sample.halves[1]:
            return np.asarray(halves[0])
        total, difference = halves[0] + halves[1], halves[0] - halves[1]
        signal, noise = float(np.sum(total**2)), float(np.sum(difference**2))
        return np.asarray(max(0.0, 1.0 - noise / signal) * total if signal > 0 else total)


def _num_counting(sample: Sample, group_weights: Sequence[float] | None) -> int:
    """Rows of the sample whose group has a weight above zero."""
    if group_weights is None:
        return sample.num_rows
    group = sample.source.x[0].read((slice(None),))
    known = np.flatnonzero(group_weights)
    return int(np.isin(group, known).sum())


@dataclass(frozen=True)
class _SampleEvaluate:
    objective: SampleObjective
    blocks: range

    def __call__(self, params: Vector, whitening: Float[np.ndarray, "k k"]) -> Evaluation:
        problem = self.objective.problem
        request = Request(
            params=problem.space.expand(params),
            directions=problem.directions(whitening),
            terms=self.objective.terms,
        )
        sums = self.objective.sums(request, self.blocks)
        penalty = self.objective.penalty(self.blocks)
        return evaluation_of(problem, penalty, params, whitening, sums.equations)


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
        share = float(normal.num_rows) / max(self.sample.num_rows, 1)
        return replace(evaluation, curvature=share * self.sample.curvature(params, whitening))

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
