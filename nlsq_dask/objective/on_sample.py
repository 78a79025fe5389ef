"""The cost in the free parameters on a sample of the rows, in this process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
import scipy.linalg

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.kernels.build import SampleRows
from nlsq_dask.kernels.reverse import ReverseKernels
from nlsq_dask.normal_equations import CostGradient, NormalEquations
from nlsq_dask.objective.penalised import evaluation_of, penalised_slope
from nlsq_dask.parameters.penalties import PenaltyRows
from nlsq_dask.plan import plan_chunks
from nlsq_dask.problem import Problem
from nlsq_dask.sample import Sample
from nlsq_dask.solvers.quadratic import next_whitening
from nlsq_dask.solvers.trust_region import Evaluation
from nlsq_dask.sources.base import Chunk

__all__ = ["SampleObjective"]

_MOST_PUSHED = 8  # free parameters whose gradient comes from the rows of the Jacobian


class SampleObjective:
    """The cost on a sample. Any range of its blocks can be evaluated.

    Its scale is the sample's: penalties weigh as much against the rows at hand as they will
    against all of them.

    One kernel serves nearly everything: it hands out the rows of the Jacobian, which NumPy
    multiplies. What it would take to compile the products is more than a sample ever takes.
    """

    def __init__(self, problem: Problem, sample: Sample) -> None:
        strategy = replace(problem.plan.strategy, num_shards=1)
        plan = plan_chunks(sample.source, strategy)
        self.sample = sample
        self.problem = replace(problem, source=sample.source, plan=plan)
        self.terms = problem.terms(sample.fill)
        self.num_rows = _num_counting(sample, problem.group_weights)
        counting = self.num_rows / max(sample.num_rows, 1)
        self._all_rows = problem.source.num_rows * sample.valid_share * counting
        self._home = ProblemHome(
            problem=self.problem, cache_bytes=2**62, keeps_on_device=True, prefetch=False
        )
        self._curvature: tuple[object, Float[np.ndarray, "k k"]] = None, np.zeros((0, 0))

    def with_f_scale(self, f_scale: float) -> SampleObjective:
        """The same sample under another scale of the loss; nothing is compiled again."""
        changed = object.__new__(SampleObjective)
        vars(changed).update(vars(self))
        changed.problem = replace(self.problem, f_scale=f_scale)
        changed.terms = changed.problem.terms(self.sample.fill)
        changed._curvature = None, np.zeros((0, 0))
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

    def normal_equations(
        self, params: Vector, directions: Float[np.ndarray, "n k"], blocks: range
    ) -> NormalEquations:
        """Summed over the blocks in their order, without penalties."""
        each = (_products(self._rows(params, directions, block)) for block in blocks)
        with np.errstate(over="ignore", invalid="ignore"):  # of a wild trial, to be refused
            summed: NormalEquations = functools.reduce(
                lambda one, other: jax.tree.map(np.add, one, other), each
            )
        return summed

    def _rows(self, params: Vector, directions: Float[np.ndarray, "n k"], block: int) -> SampleRows:
        everything, kernel = self.problem.space.expand(params), self._home.kernels.linearisation
        with jax.enable_x64(True):
            handed = kernel(everything, directions, self.terms, self.block(block))
            rows: SampleRows = jax.tree.map(np.asarray, handed)
        return rows

    def whitening(self, params: Vector, blocks: range) -> Float[np.ndarray, "k k"] | None:
        """R of the QR of the Jacobian on the blocks; None where that is not finite."""
        space = self.problem.space
        identity = np.eye(space.num_free)
        factor = self.penalty(blocks).push(space.tangents(params, identity))
        for block in blocks:
            jac = self._rows(params, space.embed(identity), block).jac.T
            if not np.isfinite(jac).all():
                return None
            factor = scipy.linalg.qr(np.vstack([factor, jac]), mode="r")[0][: len(identity)]
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
        """Cost and gradient by all parameters."""
        space = self.problem.space
        if space.num_free > _MOST_PUSHED:
            everything, gradient = space.expand(params), self._home.reverse.gradient
            with jax.enable_x64(True):
                slope, _ = gradient(everything, self.terms, self.block(block), precision="float64")
                fetched: CostGradient = jax.device_get(slope)
            return fetched
        along = space.embed(np.eye(space.num_free))
        normal = self.normal_equations(params, along, range(block, block + 1))
        grad = np.zeros(space.size)
        grad[space.is_free] = normal.grad
        return CostGradient(cost=normal.cost, num_rows=normal.num_rows, grad=grad)

    def residuals(self, params: Vector) -> Vector:
        """Weighted residuals of the sample's rows; of all rows there are, as they were read."""
        each = [self._residuals(params, block) for block in self.sample.blocks]
        residual, is_row = (
            np.concatenate(parts)[: self.sample.num_rows] for parts in zip(*each, strict=True)
        )
        if self.sample.places is not None:
            back = np.argsort(self.sample.places)
            residual, is_row = residual[back], is_row[back]
        return np.asarray(residual[is_row])

    def _residuals(self, params: Vector, block: int) -> tuple[Vector, Bool[np.ndarray, " rows"]]:
        """Of a padded block, and which of them are of rows that count."""
        space = self.problem.space
        if self.problem.plan.is_matrix_free:
            everything, kernel = space.expand(params), self._home.kernels.residuals
            with jax.enable_x64(True):
                residual, is_row = kernel(everything, self.terms, self.block(block))
            return np.asarray(residual), np.asarray(is_row)
        rows = self._rows(params, space.embed(np.eye(space.num_free)), block)
        residual = rows.target if rows.robust is None else rows.robust[0]
        return np.asarray(residual), np.asarray(rows.is_row)

    def remainder(
        self, params: Vector, step: Vector, whitening: Float[np.ndarray, "k k"]
    ) -> Vector:
        """``½ Jᵀ D²r[p, p]`` along the columns of ``R⁻¹``, for each row of one block.

        So much of the gradient is left at the end of Gauss-Newton's step p, but for noise. From
        both sides of the point, what is linear in p cancels.
        """
        block = self.sample.halves[0].start
        directions = self.problem.directions(whitening)
        with np.errstate(over="ignore", invalid="ignore"):
            before, here, after = (
                self._rows(params + way * step, directions, block) for way in (-1, 0, 1)
            )
            bent = here.jac @ (before.target - 2 * here.target + after.target)
        return np.asarray(0.5 * bent / max(int(np.sum(here.is_row)), 1))

    def left_out(
        self, params: Vector, step: Vector, whitening: Float[np.ndarray, "k k"], reach: float
    ) -> tuple[Vector, float]:
        """``(H - JᵀJ) p`` along the columns of ``R⁻¹``: what Gauss-Newton leaves out of a step p.

        The mean over the rows, and the mean of its square. H is the Hessian, by gradients at
        `reach` times the step to both sides.
        """
        directions, inside = self.problem.directions(whitening), whitening @ step
        total, square, count = np.zeros(len(step)), 0.0, 0
        with np.errstate(over="ignore", invalid="ignore"):
            for block in self.sample.blocks:
                before, here, after = (
                    self._rows(params + way * reach * step, directions, block) for way in (-1, 0, 1)
                )
                change = (after.jac * after.target - before.jac * before.target) / (2 * reach)
                left = change - here.jac * (inside @ here.jac)
                total += left.sum(axis=1)
                square += float(np.sum(left**2))
                count += int(np.sum(here.is_row))
        return total / max(count, 1), square / max(count, 1)

    def curvature(
        self, params: Vector, whitening: Float[np.ndarray, "k k"]
    ) -> Float[np.ndarray, "k k"]:
        """What Gauss-Newton leaves out of the Hessian, along the columns of ``R⁻¹``.

        A sample's own noise enters it √(m / m_s) times stronger than that of all rows would.
        The two halves tell structure from noise: what they do not agree on is left out, by
        James and Stein's factor. Asked for again at the same point, it is at hand.
        """
        point = params.tobytes(), whitening.tobytes()
        if self._curvature[0] != point:
            self._curvature = point, self._curvature_at(params, whitening)
        return self._curvature[1]

    def _curvature_at(
        self, params: Vector, whitening: Float[np.ndarray, "k k"]
    ) -> Float[np.ndarray, "k k"]:
        everything = self.problem.space.expand(params)
        directions = self.problem.directions(whitening)
        kernel = self._home.kernels.curvature

        def summed(blocks: range) -> Float[np.ndarray, "k k"]:
            with jax.enable_x64(True):
                parts = [kernel(everything, directions, self.terms, self.block(i)) for i in blocks]
                return np.asarray(sum(map(np.asarray, parts)))

        halves = [summed(blocks) for blocks in dict.fromkeys(self.sample.halves)]
        if len(halves) == 1:  # of all rows there are, and no noise beside theirs
            return halves[0]
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
        directions = problem.directions(whitening)
        normal = self.objective.normal_equations(params, directions, self.blocks)
        penalty = self.objective.penalty(self.blocks)
        return evaluation_of(problem, penalty, params, whitening, normal)


def _products(rows: SampleRows) -> NormalEquations:
    """Those of the Jacobian and of the target in one product.

    As many threads as there are share that out by its elements: their number changes no bit,
    as it does in the product of one column alone.
    """
    stacked = np.vstack([rows.jac, rows.target])
    with np.errstate(over="ignore", invalid="ignore"):
        products = stacked @ stacked.T
        cost = 0.5 * products[-1, -1] if rows.robust is None else np.sum(rows.robust[1])
    return NormalEquations(
        gram=products[:-1, :-1],
        grad=products[:-1, -1],
        cost=np.asarray(cost),
        num_rows=np.asarray(np.count_nonzero(rows.is_row)),
    )
