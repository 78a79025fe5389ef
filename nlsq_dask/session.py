"""What it takes to ask more of the data of a fit: residuals, profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.evaluate.base import Evaluator, Request
from nlsq_dask.problem import Problem

__all__ = ["Session"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """A problem, and the way back to its rows.

    A result holds one for as long as it lives in the process that fitted it; it is not pickled
    or saved, since it may hold arrays, open stores and a cluster's client.
    """

    problem: Problem
    config: HybridStreamingConfig
    open_evaluator: Callable[[], Evaluator]
    fill: Float[np.ndarray, " variables"]  # where rows without weight are evaluated

    @contextmanager
    def evaluator(self) -> Iterator[Evaluator]:
        """A fresh evaluator, closed at the end."""
        opened = self.open_evaluator()
        try:
            yield opened
        finally:
            opened.close()

    def request(
        self, free: Float[np.ndarray, " k"], whitening: Float[np.ndarray, "k k"]
    ) -> Request:
        """Normal equations at a point of the free parameters."""
        return Request(
            params=self.problem.space.expand(free),
            directions=self.problem.directions(whitening),
            fill=self.fill,
        )
