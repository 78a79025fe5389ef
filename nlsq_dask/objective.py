"""The cost in the free parameters: on a sample here, or on all rows through an evaluator."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from nlsq_dask._typing import Array, Float, Vector
from nlsq_dask.evaluate.base import Evaluator, Pass, Request
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.kernels.build import build_curvature, build_jacobian
from nlsq_dask.kernels.rows import residual_function
from nlsq_dask.kernels.tiles import Tile
from nlsq_dask.normal_equations import Sums
from nlsq_dask.plan import plan_chunks
from nlsq_dask.problem import Problem
from nlsq_dask.sample import Sample
from nlsq_dask.solvers.quadratic import next_whitening
from nlsq_dask.solvers.trust_region import Evaluation
from nlsq_dask.sources.base import Chunk, selected_rows

__all__ = ["FullObjective", "SampleObjective"]


class SampleObjective:
    """The cost on a sample, in this process. Any range of its blocks can be evaluated."""

    def __init__(self, problem: Problem, sample: Sample) -> None:
        plan = plan_chunks(sample.source, problem.space.num_free)
        self.sample = sample
        self.problem = replace(problem, source=sample.source, plan=plan)
        self._home = ProblemHome(problem=self.problem, cache_bytes=2**62, prefetch=False)
        self._jacobian = build_jacobian(problem.model, problem.space)
        self._curvature = build_curvature(problem.model, problem.space, plan.tile_shape)

    def on(self, blocks: range) -> _SampleEvaluate:
        """``(params, whitening) -> Evaluation`` over some of the blocks."""
        return _SampleEvaluate(self, blocks)

    def block(self, index: int) -> Chunk:
        """A block of the sample, padded to the common shape."""
        return self._home.fetch(index)

    def sums(self, request: Request, blocks: range) -> Sums:
        report = self._home.reduce(blocks, request)
        return functools.reduce(operator.add, report.nodes.values())

    def whitening(self, params: Vector, blocks: range) -> Float[np.ndarray, "k k"] | None:
        """R of the QR of the Jacobian on the blocks; None where that is not finite."""
        space = self.problem.space
        k = space.num_free
        factor = np.zeros((0, k))
        directions = space.embed(np.eye(k))
        with jax.enable_x64(True):
            for index in blocks:
                chunk = self.block(index)
                jac = np.asarray(self._jacobian(space.expand(params), directions, chunk))[:, :-1]
                if not np.isfinite(jac).all():
                    return None
                factor = scipy.linalg.qr(np.vstack([factor, jac]), mode="r")[0][:k]
        return next_whitening(factor)

    def traced_cost(self, block: int) -> tuple[Callable[..., Array], tuple[Array, ...]]:
        """``(params, *data) -> cost`` of one block, for JAX to trace; and that block's data.

        `params` are all `n` parameters.
        """
        chunk = self.block(block)
        model, space = self.problem.model, self.problem.space
        is_row = selected_rows(chunk)

        def cost(params: Array, y: Array, sigma: Array | None, *x: Array) -> Array:
            tile = Tile(x=x, y=y, sigma=sigma, is_row=jnp.asarray(is_row), is_wanted=is_row)
            return 0.5 * jnp.sum(residual_function(model, space, tile)(params) ** 2)

        return cost, (chunk.y, chunk.sigma, *chunk.x)

    def costs(self, candidates: Float[np.ndarray, "c k"], blocks: range) -> Vector:
        """The cost at each candidate, without derivatives."""
        space = self.problem.space
        rivals = np.stack([space.expand(candidate) for candidate in candidates])
        with jax.enable_x64(True):
            each = [
                np.asarray(self._home.kernels.costs(rivals, self.sample.fill, chunk))
                for chunk in map(self.block, blocks)
            ]
        return np.asarray(np.sum(each, axis=0))

    def curvature(self, params: Vector, whitening: Float[np.ndarray, "k k"]) -> np.ndarray:
        """``Σ r ∇²r`` along the columns of ``R⁻¹``, for all rows, shrunk by its uncertainty.

        A sample's own noise enters it √(m / m_s) times stronger than that of all rows would.
        The two halves tell structure from noise: what they do not agree on is left out, by
        James and Stein's factor.
        """
        space = self.problem.space
        directions = self.problem.directions(whitening)
        halves = []
        with jax.enable_x64(True):
            for blocks in self.sample.halves:
                parts = [
                    np.asarray(
                        self._curvature(
                            space.expand(params),
                            directions,
                            self.sample.fill,
                            self.block(i),
                        )
                    )
                    for i in blocks
                ]
                halves.append(sum(parts))
        if self.sample.halves[0] == self.sample.halves[1]:
            return np.asarray(halves[0])
        total, difference = halves[0] + halves[1], halves[0] - halves[1]
        signal, noise = float(np.sum(total**2)), float(np.sum(difference**2))
        return np.asarray(max(0.0, 1.0 - noise / signal) * total if signal > 0 else total)


@dataclass(frozen=True)
class _SampleEvaluate:
    objective: SampleObjective
    blocks: range

    def __call__(self, params: Vector, whitening: Float[np.ndarray, "k k"]) -> Evaluation:
        problem = self.objective.problem
        request = Request(
            params=problem.space.expand(params),
            directions=problem.directions(whitening),
            fill=self.objective.sample.fill,
        )
        sums = self.objective.sums(request, self.blocks)
        return Evaluation(params=params, whitening=whitening, normal=sums.normal)


@dataclass
class FullObjective:
    """The cost on all rows: each call is one pass."""

    problem: Problem
    evaluator: Evaluator
    sample: SampleObjective
    passes: list[Pass] = field(default_factory=list)

    def __call__(
        self,
        params: Vector,
        whitening: Float[np.ndarray, "k k"],
        rivals: Sequence[Vector] = (),
        center: float | None = None,
    ) -> Evaluation:
        """One pass; in the first, `rivals` compete by cost and `y` is summarised."""
        space = self.problem.space
        request = Request(
            params=space.expand(params),
            directions=self.problem.directions(whitening),
            fill=self.sample.sample.fill,
            rivals=np.stack([space.expand(rival) for rival in rivals]) if len(rivals) else None,
            center=center,
        )
        done = self.evaluator.evaluate(request)
        self.passes.append(done)
        normal = done.sums.normal
        curvature = self.sample.curvature(params, whitening)
        rows = self.sample.sample.num_rows
        return Evaluation(
            params=params,
            whitening=whitening,
            normal=normal,
            curvature=curvature * (float(normal.num_rows) / rows),
        )
