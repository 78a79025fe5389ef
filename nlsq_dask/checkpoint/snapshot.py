"""Where a fit stands between two passes, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from nlsq_dask._typing import Float, Shape, Vector
from nlsq_dask.checkpoint.file import Sections
from nlsq_dask.checkpoint.flat import Leaf, flatten, unflatten
from nlsq_dask.checkpoint.newton_standing import AfterPass, NewtonStanding
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import CheckpointError
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.problem import Problem
from nlsq_dask.results.report import Gate, ScoresPass
from nlsq_dask.solvers.trust_region import State
from nlsq_dask.warmup.defense import DefenseLayerTelemetry
from nlsq_dask.warmup.descents import Progress, defense_record
from nlsq_dask.warmup.normalization import ParameterNormalizer
from nlsq_dask.warmup.search import Optimum, Warmup
from nlsq_dask.warmup.state import WarmupState

__all__ = ["Snapshot", "Standing", "from_sections", "to_sections"]

_CARRIED_NUMBERS = (
    *("value", "start_value", "best_value", "count", "num_evaluations", "num_flat", "num_still"),
    *("num_failing", "num_failures", "num_clipped", "num_pairs"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Standing(AfterPass):
    """Of the trust region with normal equations."""

    state: State
    gate: Gate | None  # None until the first pass has been judged
    rival_costs: tuple[float, ...]  # in the first pass
    scores: ScoresPass | None = None  # at the end, for a sandwich covariance


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """All that has been found out so far. The sample is drawn again, from its seed."""

    f_scale: float
    warmup_state: WarmupState | None = None  # while phase 1 is under way
    is_warm: bool = False
    warmup: Warmup | None = None  # None also where the model was finite at no start
    standing: Standing | None = None
    newton: NewtonStanding | None = None  # in its place, where there are many parameters


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scale:
    f_scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcome:
    """Of a warmup: what `Descent` and `Tournament` do not hold."""

    f_scale: float
    optima: tuple[Optimum, ...]
    whitening: Float[np.ndarray, "k k"] | None  # None where there is no optimum
    halves_agree: bool
    num_starts: int
    num_evaluations: int
    normalizer: ParameterNormalizer | None
    was_stopped: bool


# -- out


def to_sections(snapshot: Snapshot) -> Sections:
    """The snapshot's sections of a checkpoint."""
    if snapshot.warmup_state is not None:
        arrays: dict[str, Leaf] = dict(snapshot.warmup_state.to_arrays())
        under_way = flatten(_Scale(f_scale=snapshot.f_scale)) | _dotted(arrays)
        return {"warmup_state": under_way}
    sections: Sections = {"warmup": _warmup_leaves(snapshot)}
    if snapshot.standing is not None:
        sections["passes"] = flatten(snapshot.standing)
    if snapshot.newton is not None:
        sections["newton"] = flatten(snapshot.newton)
    return sections


def _dotted(arrays: dict[str, Leaf]) -> dict[str, Leaf]:
    """A path is no name for a dataset: it would make groups."""
    return {name.replace("/", "."): leaf for name, leaf in arrays.items()}


def _warmup_leaves(snapshot: Snapshot) -> dict[str, Leaf]:
    warmup = snapshot.warmup
    if warmup is None:
        return flatten(_outcome(snapshot.f_scale))
    known: dict[str, Any] = {
        field.name: vars(warmup).get(field.name, snapshot.f_scale) for field in fields(_Outcome)
    }
    history = WarmupState(
        starts=np.empty((0, len(warmup.whitening))),
        start_costs=np.empty(0),
        progress=Progress(finished=warmup.descents),
        tournament=warmup.tournament,
    )
    return flatten(_Outcome(**known)) | _dotted(dict(history.to_arrays()))


def _outcome(f_scale: float) -> _Outcome:
    """Of a warmup without a finite start."""
    return _Outcome(
        f_scale=f_scale,
        optima=(),
        whitening=None,
        halves_agree=False,
        num_starts=0,
        num_evaluations=0,
        normalizer=None,
        was_stopped=False,
    )


# -- in


def from_sections(
    sections: Sections, problem: Problem, config: HybridStreamingConfig
) -> Snapshot | None:
    """The snapshot in a checkpoint's sections; None where it holds none yet.

    Raises
    ------
    CheckpointError
        If a part is missing or not as this problem has it.
    """
    lengths = {
        "k": problem.space.num_free,
        "n": problem.space.size,
        "clusters": problem.num_clusters,
        "two": 2,
        "four": 4,
    }
    if "warmup_state" in sections:
        leaves = sections["warmup_state"]
        return Snapshot(
            f_scale=unflatten(_Scale, leaves, lengths).f_scale,
            warmup_state=_read_warmup_state(leaves, lengths["k"]),
        )
    if "warmup" not in sections:
        return None
    outcome = unflatten(_Outcome, sections["warmup"], lengths)
    standing = newton = None
    if "passes" in sections:
        standing = unflatten(Standing, sections["passes"], lengths)
        _check_history(standing)
        _check_point(problem.space, standing.state.evaluation.params, standing.state)
        model, scores = standing.state.model, standing.scores
        _require_squares("model", model.factor, model.residual, model.gauss_newton_factor)
        _require_squares("state", standing.state.secant, standing.state.turn)
        if scores is not None:
            _require_squares("scores", scores.sums.meat, scores.sums.bread, scores.gram)
        if len(standing.rival_costs) != max(len(outcome.optima) - 1, 0):
            raise CheckpointError("its optima and their costs do not match")
    if "newton" in sections:
        newton = unflatten(NewtonStanding, sections["newton"], lengths)
        _check_history(newton)
        _check_point(problem.space, newton.slope.params, newton.progress)
    if (standing if problem.plan.is_matrix_free else newton) is not None:
        raise CheckpointError("it is of another way to fit than this problem's")
    return Snapshot(
        f_scale=outcome.f_scale,
        is_warm=True,
        warmup=_read_warmup(outcome, sections["warmup"], lengths["k"], config),
        standing=standing,
        newton=newton,
    )


def _check_point(space: ParameterSpace, evaluated: Vector, state: Any) -> None:
    """The best point is the one that was evaluated, and lies where this problem's may."""
    _require_finite("state", state.params, state.trial, state.scale)
    lower, upper = space.free_bounds
    if not np.array_equal(evaluated, state.params):
        raise CheckpointError("its parameters are not those that were evaluated")
    if ((state.params < lower) | (state.params > upper)).any():
        raise CheckpointError("its parameters are not within the bounds")


def _require_finite(what: str, *arrays: Any) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise CheckpointError(f"its {what} must be finite")


@np.errstate(over="ignore", invalid="ignore")
def _require_squares(what: str, *arrays: Any) -> None:
    """What is finite may be beyond any square all the same, and decompositions want one."""
    _require_finite(what, *(np.vdot(array, array) for array in arrays))


def _check_history(standing: AfterPass) -> None:
    if not standing.history or len(standing.history) != len(standing.accounts):
        raise CheckpointError("its passes and their history do not match")


def _read_warmup_state(leaves: dict[str, Leaf], k: int) -> WarmupState:
    arrays = {name.replace(".", "/"): leaf for name, leaf in leaves.items()}
    try:
        state = WarmupState.from_arrays(arrays)
        _check_warmup(state, k)
    except CheckpointError:
        raise
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"its warmup is malformed: {error}") from error
    return state


def _check_warmup(state: WarmupState, k: int) -> None:
    if not all(_is_of(array, shape) for array, shape in _warmup_shapes(state, k)):
        raise CheckpointError(f"its warmup is not of {k} free parameters")


def _is_of(array: object, shape: Shape) -> bool:
    """Whether an array is of floats, or of booleans, in this shape."""
    if not isinstance(array, np.ndarray):
        return False
    return array.dtype in (np.float64, np.bool_) and array.shape == shape


def _warmup_shapes(state: WarmupState, k: int) -> Iterator[tuple[object, Shape]]:
    """The arrays of a warmup, and what their shapes have to be."""
    yield state.starts, (len(state.starts), k)
    yield state.start_costs, (len(state.starts),)
    for descent in state.progress.finished:
        yield from ((point, (k,)) for point in (descent.start, descent.end))
    carry, tournament = state.progress.carry, state.tournament
    if carry is not None:
        yield from ((point, (k,)) for point in (carry.point, carry.grad, carry.best))
        yield from ((pairs, (len(carry.ways), k)) for pairs in (carry.ways, carry.turns))
        yield from ((np.asarray(vars(carry)[name], float), ()) for name in _CARRIED_NUMBERS)
    if tournament is not None:
        count = max(len(tournament.candidates), 1)
        yield tournament.candidates, (count, k)
        for held in tournament.rounds:
            yield from ((column, (count,)) for column in (held.costs, held.survives))


def _read_warmup(
    outcome: _Outcome, leaves: dict[str, Leaf], k: int, config: HybridStreamingConfig
) -> Warmup | None:
    if outcome.whitening is None or outcome.normalizer is None or not outcome.optima:
        return None
    state = _read_warmup_state(leaves, k)
    known: dict[str, Any] = {
        name: value for name, value in vars(outcome).items() if name != "f_scale"
    }
    finished = state.progress.finished
    return Warmup(
        **known,
        descents=finished,
        defense=DefenseLayerTelemetry([defense_record(config, done) for done in finished]),
        tournament=state.tournament,
    )
