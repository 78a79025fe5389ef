"""A tournament between starts, on ever more rows of the sample.

Starts that fill a box evenly (`scipy.stats.qmc`) and `p0` are compared by their cost. Each round
sends the worst home and looks at twice as many rows. `p0` stays to the end: it was the user's
choice, and the cost of a start says little about the optimum that it leads to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.objective.on_sample import SampleObjective
from nlsq_dask.parameters.space import strictly_inside

__all__ = ["Round", "Tournament", "draw_candidates", "hold_tournament"]

_BATCH_ROWS = 256
_CANDIDATES_AT_ONCE = 16  # one shape, so that rounds of any size compile once


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """Costs on the same rows; NaN for candidates that were out before."""

    num_rows: int
    costs: Float[np.ndarray, " c"]
    survives: Bool[np.ndarray, " c"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tournament:
    """All candidates, `p0` the first, and what became of them."""

    candidates: Float[np.ndarray, "c k"]
    rounds: tuple[Round, ...]

    @property
    def survivors(self) -> Float[np.ndarray, "s k"]:
        """`p0`, then the others, the best first."""
        if not self.rounds:
            return self.candidates
        last = self.rounds[-1]
        left = np.flatnonzero(last.survives)
        others = left[left != 0]
        order = others[np.argsort(_comparable(last.costs[others]), kind="stable")]
        return self.candidates[[0, *order]]


def hold_tournament(objective: SampleObjective, config: HybridStreamingConfig) -> Tournament:
    """Eliminate candidates round by round.

    A round looks at whole blocks of the sample, as many as hold `batches_per_round` batches of
    256 rows, and twice as many in each round that follows. A candidate at which the model is not
    finite goes first, and at least one stays beside `p0`.
    """
    space = objective.problem.space
    candidates = draw_candidates(config, space.p0[space.is_free], space.free_bounds)
    blocks = objective.sample.blocks
    block_rows = max(objective.sample.num_rows // len(blocks), 1)
    survives = np.ones(len(candidates), bool)
    rounds = []
    for number in range(config.elimination_rounds):
        if survives.sum() <= 2:
            break
        wanted = config.batches_per_round * _BATCH_ROWS * 2**number
        used = blocks[: math.ceil(wanted / block_rows)]
        costs = np.full(len(candidates), np.nan)
        costs[survives] = _costs(objective, candidates[survives], used)
        survives = _eliminate(costs, survives, config.elimination_fraction)
        num_rows = min(len(used) * block_rows, objective.sample.num_rows)
        rounds.append(Round(num_rows=num_rows, costs=costs, survives=survives))
    return Tournament(candidates=candidates, rounds=tuple(rounds))


def draw_candidates(
    config: HybridStreamingConfig, p0: Float[np.ndarray, " k"], bounds: tuple[Vector, Vector]
) -> Float[np.ndarray, "c k"]:
    """`p0`, and `n_starts` points that fill a box within the bounds.

    The box is as wide as the bounds where both are finite, else ``2 |p0|`` (2 where `p0` is
    zero), times `scale_factor`. Its centre is `p0`, or with `center_on_p0=False` the middle of
    finite bounds.
    """
    lower, upper = bounds
    with np.errstate(over="ignore", invalid="ignore"):
        width, middle = upper - lower, 0.5 * (lower + upper)
    is_bounded = np.isfinite(width)
    center = np.where(is_bounded & (not config.center_on_p0), middle, p0)
    reach = np.where(is_bounded, 0.5 * width, np.where(p0 != 0, np.abs(p0), 1.0))
    reach = config.scale_factor * reach
    low, high = np.maximum(center - reach, lower), np.minimum(center + reach, upper)
    points = low + (high - low) * _unit_points(config, len(p0))
    return np.vstack([p0, strictly_inside(points, lower, upper)])


def _unit_points(config: HybridStreamingConfig, num_dims: int) -> Float[np.ndarray, "c k"]:
    qmc = scipy.stats.qmc
    rng = np.random.default_rng([config.seed, 4])
    samplers: Mapping[str, Callable[..., scipy.stats.qmc.QMCEngine]] = {
        "lhs": qmc.LatinHypercube,
        "sobol": qmc.Sobol,
        "halton": qmc.Halton,
    }
    engine = samplers[config.multistart_sampler](num_dims, rng=rng)
    # Sobol points are balanced only in powers of two, and warn otherwise: draw that many.
    is_sobol = config.multistart_sampler == "sobol"
    num_drawn = 1 << (config.n_starts - 1).bit_length() if is_sobol else config.n_starts
    return np.asarray(engine.random(num_drawn))[: config.n_starts]


def _costs(
    objective: SampleObjective, candidates: Float[np.ndarray, "c k"], blocks: range
) -> Vector:
    """Costs in groups of one size, the last filled up with its own last candidate."""
    num_groups = math.ceil(len(candidates) / _CANDIDATES_AT_ONCE)
    missing = num_groups * _CANDIDATES_AT_ONCE - len(candidates)
    padded = np.vstack([candidates, np.repeat(candidates[-1:], missing, axis=0)])
    costs = [objective.costs(group, blocks) for group in np.split(padded, num_groups)]
    return np.concatenate(costs)[: len(candidates)]


def _eliminate(costs: Vector, survives: Bool[np.ndarray, " c"], fraction: float) -> np.ndarray:
    """Without `fraction` of those that are left, the worst, but never without `p0`."""
    others = np.flatnonzero(survives)[1:]
    order = others[np.argsort(_comparable(costs[others]), kind="stable")]
    num_kept = max(math.ceil((1 - fraction) * survives.sum()) - 1, 1)
    kept = np.zeros_like(survives)
    kept[[0, *order[:num_kept]]] = True
    return kept


def _comparable(costs: Vector) -> Vector:
    return np.where(np.isfinite(costs), costs, np.inf)
