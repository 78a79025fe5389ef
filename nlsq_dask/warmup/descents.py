"""Phase 1: L-BFGS from each start, interrupted where someone wants to look or to save.

One block of the sample will do for what is only exploration. The loss is divided by the variance
of `y`, so that 1 is what the mean alone would leave, and thresholds mean the same for any data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.objective.on_sample import SampleObjective
from nlsq_dask.parameters.space import strictly_inside
from nlsq_dask.solvers.lbfgs import Carry, DescentOptions, Ending, begin, iterate
from nlsq_dask.sources.base import selected_rows
from nlsq_dask.telemetry import IterationRecord
from nlsq_dask.warmup.defense import DefenseRecord
from nlsq_dask.warmup.normalization import ParameterNormalizer

__all__ = ["Descent", "Descents", "OnIteration", "OnProgress", "Progress", "data_spread"]

_GOOD_START = 0.1  # of the variance of y
_FAIR_START = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Descent:
    """How L-BFGS went from one start. Losses are over the variance of `y`, at their point."""

    start: Float[np.ndarray, " k"]
    end: Float[np.ndarray, " k"]
    start_loss: float
    loss: float
    ending: Ending
    num_iterations: int
    num_clipped: int
    num_line_search_failures: int
    num_pairs: int

    @property
    def criterion(self) -> str:
        """What ended it, as the configuration names it."""
        return self.ending.name.lower()


@dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """Descents that ended, and the carry of the one under way, if one is."""

    finished: tuple[Descent, ...] = ()
    carry: Carry | None = None

    @property
    def num_iterations(self) -> int:
        """Of the descents that ended."""
        return sum(descent.num_iterations for descent in self.finished)


OnIteration: TypeAlias = Callable[[IterationRecord], object]
OnProgress: TypeAlias = Callable[[Progress], object]


def data_spread(objective: SampleObjective, block: int) -> float:
    """``Σ w (y - ȳ)²`` in a block of the sample, what the best constant leaves of it."""
    chunk = objective.block(block)
    is_row = selected_rows(chunk)
    y = np.asarray(chunk.y, np.float64)[is_row]
    weight = np.ones_like(y)
    if chunk.sigma is not None:
        weight = np.broadcast_to(np.asarray(chunk.sigma, np.float64), is_row.shape)[is_row] ** -2
    spread = float(np.sum(weight * (y - np.average(y, weights=weight)) ** 2)) if y.size else 0.0
    return spread if spread > 0 else 1.0


class Descents:
    """L-BFGS in normalized space, on one block of the sample."""

    def __init__(
        self,
        objective: SampleObjective,
        config: HybridStreamingConfig,
        normalizer: ParameterNormalizer,
        block: int,
    ) -> None:
        self._config = config
        self._normalizer = normalizer
        self._space = objective.problem.space
        self._spread = data_spread(objective, block)
        self._num_rows = int(selected_rows(objective.block(block)).sum())
        self._options = _options_of(config)
        self._objective, self._block = objective, block
        self._bounds = normalizer.bounds

    def _evaluate(self, point: Vector) -> tuple[float, Vector]:
        """Twice the cost, in units of the data's spread, and its gradient."""
        offset, scale = self._normalizer.offset, self._normalizer.scale
        cost, grad = self._objective.slope(offset + scale * point, self._block)
        return 2 * cost / self._spread, 2 * scale * grad / self._spread

    def run(
        self,
        starts: Sequence[Vector],
        costs: Sequence[float],
        begun: Progress,
        on_iteration: OnIteration | None,
        on_progress: OnProgress | None,
    ) -> tuple[Descent, ...]:
        """Descend from each start, the first being where layer 1 looks for a warm start.

        `costs` are those of the starts on the block. `begun` is where an earlier run stood.
        StopIteration from `on_iteration` ends the descent with what it has, and is the last.
        """
        finished = list(begun.finished)
        carry = begun.carry
        for number in range(len(finished), len(starts)):
            start, loss = starts[number], 2 * costs[number] / self._spread
            watch = _Watch(self, tuple(finished), on_iteration, on_progress)
            if self._is_warm(start, loss):
                descent = _warm_start(start, loss)
            else:
                descent = self._descend(start, loss, carry, watch)
            carry = None
            finished.append(descent)
            if descent.ending is Ending.CALLBACK:
                break
        return tuple(finished)

    def _is_warm(self, start: Vector, loss: float) -> bool:
        config = self._config
        is_p0 = np.array_equal(start, self._space.p0[self._space.is_free])
        is_close = loss < config.warm_start_threshold
        return config.enable_warm_start_detection and is_p0 and is_close

    def _descend(
        self, start: Vector, start_loss: float, carry: Carry | None, watch: _Watch
    ) -> Descent:
        options = self._options
        _, first_step = first_step_of(self._config, start_loss)
        if carry is None:
            carry = begin(self._evaluate, self._normalizer.normalize(start), options)
        while carry.ending is Ending.RUNNING:
            carry = iterate(self._evaluate, carry, first_step, self._bounds, options)
            if not watch.report(carry):
                carry = replace(carry, ending=Ending.CALLBACK)
        return Descent(
            start=start,
            end=self._params(carry) if carry.count else start,
            start_loss=start_loss,
            loss=carry.best_value,
            ending=carry.ending,
            num_iterations=carry.count,
            num_clipped=carry.num_clipped,
            num_line_search_failures=carry.num_failures,
            num_pairs=carry.num_pairs,
        )

    def _params(self, carry: Carry) -> Vector:
        """The best point, in original space and off the bounds."""
        params = self._normalizer.denormalize(carry.best)
        return strictly_inside(params, *self._space.free_bounds)

    def record(self, carry: Carry, iteration: int, seconds: float) -> IterationRecord:
        """The best point of the descent under way, and the loss at it."""
        best = 0.5 * carry.best_value * self._spread
        point = self._normalizer.denormalize(carry.best)
        return IterationRecord(
            phase=1,
            iteration=iteration,
            num_passes=0,
            params=self._space.expand(point),
            cost=best,
            loss=2 * best / max(self._num_rows, 1),
            trial_cost=0.5 * carry.value * self._spread,
            relative_change=np.nan,
            accepted=True,
            gain=np.nan,
            distance=np.nan,
            damping=np.nan,
            radius=np.nan,
            optimality=np.nan,
            num_active=0,
            num_rows=self._num_rows,
            bytes_read=0,
            seconds=seconds,
        )

    @property
    def frequencies(self) -> tuple[int, int]:
        return self._config.callback_frequency, self._config.checkpoint_frequency


class _Watch:
    """Who wants to see a descent, and when: in iterations of the whole warmup."""

    def __init__(
        self,
        descents: Descents,
        finished: tuple[Descent, ...],
        on_iteration: OnIteration | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._descents = descents
        self._finished = finished
        self._before = Progress(finished=finished).num_iterations
        self._on_iteration = on_iteration
        self._on_progress = on_progress
        self._since = time.perf_counter()

    def report(self, carry: Carry) -> bool:
        """Tell who wants to know now; False once they have seen enough."""
        total = self._before + carry.count
        for_callback, for_checkpoint = self._descents.frequencies
        is_running = carry.ending is Ending.RUNNING
        if self._on_progress is not None and is_running and total % for_checkpoint == 0:
            self._on_progress(Progress(finished=self._finished, carry=carry))
        if self._on_iteration is None or total % for_callback != 0:
            return True
        now = time.perf_counter()
        record = self._descents.record(carry, total, now - self._since)
        self._since = now
        try:
            self._on_iteration(record)
        except StopIteration:
            return False
        return True


def first_step_of(config: HybridStreamingConfig, start_loss: float) -> tuple[str | None, float]:
    """Layer 2: how the first step is chosen, and its length relative to the gradient's."""
    if not config.enable_adaptive_warmup_lr:
        return None, config.lbfgs_initial_step_size
    if start_loss < _GOOD_START:
        return "refinement", config.lbfgs_refinement_step_size
    if start_loss < _FAIR_START:
        return "careful", config.lbfgs_initial_step_size
    return "exploration", config.lbfgs_exploration_step_size


def defense_record(config: HybridStreamingConfig, descent: Descent) -> DefenseRecord:
    """What the four layers did in a descent."""
    is_warm = descent.ending is Ending.WARM_START
    return DefenseRecord(
        start_loss=descent.start_loss,
        is_warm_start=is_warm,
        first_step=None if is_warm else first_step_of(config, descent.start_loss)[0],
        guard_ended=descent.ending is Ending.COST_GUARD,
        num_clipped=descent.num_clipped,
        history_filled=descent.num_pairs >= config.lbfgs_history_size,
        num_line_search_failures=descent.num_line_search_failures,
    )


def _warm_start(start: Vector, loss: float) -> Descent:
    return Descent(
        start=start,
        end=start,
        start_loss=loss,
        loss=loss,
        ending=Ending.WARM_START,
        num_iterations=0,
        num_clipped=0,
        num_line_search_failures=0,
        num_pairs=0,
    )


def _options_of(config: HybridStreamingConfig) -> DescentOptions:
    active = config.active_switching_criteria
    clip = config.gradient_clip_value
    return DescentOptions(
        line_search=config.lbfgs_line_search,
        history_size=config.lbfgs_history_size,
        warmup_iterations=config.warmup_iterations,
        max_iterations=config.max_warmup_iterations,
        plateau=config.loss_plateau_threshold if "plateau" in active else None,
        gradient_norm=config.gradient_norm_threshold if "gradient" in active else None,
        max_iter_is_criterion="max_iter" in active,
        cost_increase=config.cost_increase_tolerance if config.enable_cost_guard else np.inf,
        max_step=config.max_warmup_step_size if config.enable_step_clipping else np.inf,
        gradient_clip=np.inf if clip is None else clip,
    )
