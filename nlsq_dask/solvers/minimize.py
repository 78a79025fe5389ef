"""The loop: one evaluation for each trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask.solvers.trust_region import Evaluation, State, TrustRegion
from nlsq_dask.status import Status

__all__ = ["minimize"]

Evaluate: TypeAlias = Callable[[Vector, Float[np.ndarray, "k k"]], Evaluation]


def minimize(
    evaluate: Evaluate,
    solver: TrustRegion,
    state: State,
    after_trial: Callable[[State], State] = lambda state: state,
) -> State:
    """Evaluate trials until the solver's status is no longer RUNNING.

    `after_trial` sees every state, and may return one with another status to stop.
    """
    while state.status is Status.RUNNING:
        state = after_trial(solver.update(state, evaluate(state.trial, state.whitening)))
    return state
