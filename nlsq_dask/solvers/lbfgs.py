r"""L-BFGS within bounds, one iteration at a time.

The loss and its gradient are compiled, once, and the driver is arithmetic on vectors of `k`
numbers. As one compiled loop, by optax, it took 1.5 s and more to compile for each fit; here all
descents of a small fit take 0.2 s. All that one iteration hands to the next is in
a `Carry`: where a descent was interrupted leaves no trace in its bits.

The line search goes along the path ``clip(x + a d)``, so that the loss is never evaluated
outside the bounds, and the value and gradient it ends with are those *at* the clipped point.
Components of the gradient that a bound holds back are left out. It brackets a step by the weak
or strong Wolfe conditions, interpolating, or halves until Armijo's alone is met (Nocedal &
Wright 2006, chapter 3). Where it finds no decrease, the whole step is taken in spite of that, as
in the watchdog technique (Chamberlain et al. 1982): a kink may be in the way. The best point is
remembered, and the guard ends what goes too far up.

Pairs without positive curvature are left out of the history (ibid., chapter 7): a step that was
shortened need not meet the curvature condition.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from nlsq_dask._typing import Bool, Float, Vector

__all__ = ["Carry", "DescentOptions", "Ending", "begin", "iterate"]

Evaluate: TypeAlias = Callable[[Vector], tuple[float, Vector]]
Box: TypeAlias = tuple[Vector, Vector]

_SUFFICIENT = 1e-4  # of the decrease that the slope promises
_CURVATURE = 0.9  # of the slope may be left: loose, as the direction is nearly Newton's
_MAX_TRIALS = 16
_FLAT_ITERATIONS = 3  # on a plateau: one short step says nothing
_FAILED_SEARCHES = 3
_TINY = float(np.finfo(np.float64).tiny)
_STATIONARY = 1e-8  # relative fall of the loss: what is left is for Levenberg-Marquardt


class Ending(enum.IntEnum):
    """What ended a descent."""

    RUNNING = 0
    PLATEAU = 1
    GRADIENT = 2
    MAX_ITER = 3
    LIMIT = 4  # the same, where "max_iter" is not among the criteria
    COST_GUARD = 5
    STATIONARY = 6  # the loss no longer moves, whatever the criteria
    LINE_SEARCH = 7
    NOT_FINITE = 8
    WARM_START = 9  # it never began
    CALLBACK = 10


@dataclass(frozen=True, kw_only=True)
class DescentOptions:
    """Options of a descent. The loss should be of order one; infinity turns a limit off."""

    line_search: str
    history_size: int
    warmup_iterations: int
    max_iterations: int
    plateau: float | None
    gradient_norm: float | None
    max_iter_is_criterion: bool
    cost_increase: float
    max_step: float
    gradient_clip: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Carry:
    """Where a descent stands: the point, the loss and its gradient there, and the history."""

    point: Float[np.ndarray, " k"]
    value: float
    grad: Float[np.ndarray, " k"]
    start_value: float
    best: Float[np.ndarray, " k"]
    best_value: float
    ways: Float[np.ndarray, "h k"]  # steps, the latest last
    turns: Float[np.ndarray, "h k"]  # and what they did to the gradient
    count: int  # iterations
    num_evaluations: int
    num_flat: int  # successive iterations on a plateau
    num_still: int  # successive iterations without progress
    num_failing: int  # successive line searches without sufficient decrease
    num_failures: int
    num_clipped: int
    num_pairs: int  # ever stored in the history
    ending: Ending


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A point of the path, and the slope of the loss along it."""

    length: float
    point: Vector
    value: float
    grad: Vector
    slope: float

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.value) and np.isfinite(self.grad).all())


@np.errstate(over="ignore", invalid="ignore")
def begin(evaluate: Evaluate, start: Float[np.ndarray, " k"], options: DescentOptions) -> Carry:
    """The carry at the start."""
    value, grad = evaluate(start)
    nothing = np.zeros((0, len(start)))
    carry = Carry(
        point=start,
        value=value,
        grad=grad,
        start_value=value,
        best=start,
        best_value=value,
        ways=nothing,
        turns=nothing,
        count=0,
        num_evaluations=1,
        num_flat=0,
        num_still=0,
        num_failing=0,
        num_failures=0,
        num_clipped=0,
        num_pairs=0,
        ending=Ending.RUNNING,
    )
    if not np.isfinite([value, float(np.linalg.norm(grad))]).all():
        return replace(carry, ending=Ending.NOT_FINITE)
    return replace(carry, ending=Ending.LIMIT) if options.max_iterations == 0 else carry


@np.errstate(over="ignore", invalid="ignore")
def iterate(
    evaluate: Evaluate, carry: Carry, first_step: float, bounds: Box, options: DescentOptions
) -> Carry:
    """One step, its line search, and whether that ends the descent.

    Parameters
    ----------
    evaluate : callable
        ``point -> (loss, gradient)``, which may overflow: a trial has to be finite.
    first_step : float
        Length of the first step relative to the gradient's.
    bounds : (lower, upper)
        Of the point.
    """
    free = _free_gradient(carry.point, carry.grad, bounds)
    norm = float(np.linalg.norm(free))
    if norm == 0.0:
        return replace(carry, ending=Ending.STATIONARY)
    downhill = -min(1.0, options.gradient_clip / norm) * free
    direction = first_step * downhill if carry.count == 0 else _precondition(carry, downhill)
    direction = np.where(free != 0, direction, 0.0)
    length = float(np.linalg.norm(direction))
    is_too_long = length > options.max_step
    if is_too_long:
        direction, length = direction * (options.max_step / length), options.max_step
    room = options.max_step / max(length, _TINY)
    path = _Path(evaluate, carry, free, direction, bounds)
    trial, has_failed = path.search(options.line_search, room)
    stepped = replace(
        carry,
        count=carry.count + 1,
        num_evaluations=carry.num_evaluations + path.num_evaluations,
        num_failing=carry.num_failing + 1 if has_failed else 0,
        num_failures=carry.num_failures + has_failed,
        num_clipped=carry.num_clipped + is_too_long,
    )
    moved = _move(_remember(stepped, trial, options.history_size), trial, options)
    return replace(moved, ending=_ending(moved, bounds, options))


def _free_gradient(point: Vector, grad: Vector, bounds: Box) -> Vector:
    """Without the components that point out of the box, at a bound."""
    lower, upper = bounds
    is_held: Bool[np.ndarray, " k"] = ((point <= lower) & (grad > 0)) | (
        (point >= upper) & (grad < 0)
    )
    return np.where(is_held, 0.0, grad)


def _precondition(carry: Carry, downhill: Vector) -> Vector:
    """The two-loop recursion (Nocedal & Wright, algorithm 7.4), for a descent direction."""
    direction = downhill.copy()
    pairs = list(zip(carry.ways, carry.turns, strict=True))
    shares = []
    for way, turn in reversed(pairs):
        share = float(way @ direction) / float(way @ turn)
        direction -= share * turn
        shares.append(share)
    if pairs:
        way, turn = pairs[-1]
        direction *= float(way @ turn) / float(turn @ turn)
    for (way, turn), share in zip(pairs, reversed(shares), strict=True):
        direction += (share - float(turn @ direction) / float(way @ turn)) * way
    return direction


def _remember(carry: Carry, trial: _Trial, history_size: int) -> Carry:
    """The history with the step taken in, where the loss curves upward along it."""
    way, turn = trial.point - carry.point, trial.grad - carry.grad
    curvature = float(way @ turn)
    if not np.isfinite(curvature) or curvature <= 1e-12 * float(turn @ turn):
        return carry
    return replace(
        carry,
        ways=np.vstack([carry.ways, way])[-history_size:],
        turns=np.vstack([carry.turns, turn])[-history_size:],
        num_pairs=carry.num_pairs + 1,
    )


def _move(carry: Carry, trial: _Trial, options: DescentOptions) -> Carry:
    fall = carry.value - trial.value
    is_still = abs(fall) <= _STATIONARY * abs(trial.value)
    is_flat = options.plateau is not None and fall <= options.plateau * abs(trial.value)
    is_better = trial.is_finite and trial.value < carry.best_value
    return replace(
        carry,
        point=trial.point,
        value=trial.value,
        grad=trial.grad,
        best=trial.point if is_better else carry.best,
        best_value=trial.value if is_better else carry.best_value,
        num_still=carry.num_still + 1 if is_still else 0,
        num_flat=carry.num_flat + 1 if is_flat else 0,
    )


def _ending(carry: Carry, bounds: Box, options: DescentOptions) -> Ending:
    """The first of these that is met."""
    norm = float(np.linalg.norm(_free_gradient(carry.point, carry.grad, bounds)))
    if not np.isfinite([carry.value, norm]).all():
        return Ending.NOT_FINITE
    if carry.value > carry.start_value * (1 + options.cost_increase):
        return Ending.COST_GUARD
    if carry.count >= options.warmup_iterations:
        if options.gradient_norm is not None and norm <= options.gradient_norm:
            return Ending.GRADIENT
        if carry.num_flat >= _FLAT_ITERATIONS:
            return Ending.PLATEAU
    if carry.num_still >= _FLAT_ITERATIONS:
        return Ending.STATIONARY
    if carry.num_failing >= _FAILED_SEARCHES:
        return Ending.LINE_SEARCH
    if carry.count >= options.max_iterations:
        return Ending.MAX_ITER if options.max_iter_is_criterion else Ending.LIMIT
    return Ending.RUNNING


class _Path:
    """``clip(x + a d)``, and the search along it."""

    def __init__(
        self, evaluate: Evaluate, carry: Carry, free: Vector, direction: Vector, bounds: Box
    ) -> None:
        self._evaluate = evaluate
        self._bounds = bounds
        self._direction = direction
        self._start = _Trial(
            length=0.0,
            point=carry.point,
            value=carry.value,
            grad=carry.grad,
            slope=float(free @ direction),
        )
        self.num_evaluations = 0

    def _try(self, length: float) -> _Trial:
        beyond = self._start.point + length * self._direction
        point = np.clip(beyond, *self._bounds)
        value, grad = self._evaluate(point)
        self.num_evaluations += 1
        slope = float(np.where(point == beyond, grad, 0.0) @ self._direction)
        return _Trial(length=length, point=point, value=value, grad=grad, slope=slope)

    def search(self, kind: str, room: float) -> tuple[_Trial, bool]:
        """A step of length 1, if that will do, or up to `room`; and whether none was found.

        ``low`` falls enough but is too short, ``high`` goes too far.
        """
        start, low, high = self._start, self._start, None
        whole = trial = self._try(1.0)
        for _ in range(_MAX_TRIALS):
            promised = start.value + _SUFFICIENT * trial.length * start.slope
            if not (trial.is_finite and trial.value <= promised):
                high = trial
            elif kind == "backtracking":
                return trial, False
            elif kind == "strong_wolfe" and trial.slope > -_CURVATURE * start.slope:
                high = trial
            elif trial.slope >= _CURVATURE * start.slope or trial.length >= room:
                return trial, False
            else:
                low = trial
            if high is None:
                length = min(2 * trial.length, room)
            elif kind == "backtracking":
                length = 0.5 * high.length
            else:
                length = _between(low, high)
            trial = self._try(length)
        if low.length > 0:
            return low, False
        return (whole if whole.is_finite else trial), True


def _between(low: _Trial, high: _Trial) -> float:
    """Where the parabola through both is lowest, but well inside."""
    width = high.length - low.length
    bend = high.value - low.value - low.slope * width
    share = -0.5 * low.slope * width / bend if np.isfinite(bend) and bend > 0 else 0.5
    return low.length + width * min(max(share, 0.1), 0.9)
