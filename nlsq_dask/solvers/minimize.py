"""The loop: one evaluation for each question that a solver has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask.solvers.trust_region import Evaluation
from nlsq_dask.status import Status

__all__ = ["Evaluate", "minimize"]

Evaluate: TypeAlias = Callable[[Vector, Float[np.ndarray, "k k"]], Evaluation]


class Asking(Protocol):
    """A state that says what it wants to know next."""

    @property
    def status(self) -> Status: ...

    @property
    def question(self) -> tuple[Any, ...]: ...


_State = TypeVar("_State", bound=Asking)
_Answer_contra = TypeVar("_Answer_contra", contravariant=True)
_Answer = TypeVar("_Answer")


class Solver(Protocol[_State, _Answer_contra]):
    def update(self, state: _State, evaluation: _Answer_contra, /) -> _State: ...


def minimize(
    evaluate: Callable[..., _Answer],
    solver: Solver[_State, _Answer],
    state: _State,
    after_trial: Callable[[_State], _State] = lambda state: state,
) -> _State:
    """Evaluate until the solver's status is no longer RUNNING.

    `after_trial` sees every state, and may return one with another status to stop.
    """
    while state.status is Status.RUNNING:
        state = after_trial(solver.update(state, evaluate(*state.question)))
    return state
