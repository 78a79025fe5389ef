"""What it takes to ask more of the data of a fit: residuals, profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.evaluate.base import Evaluator, Request
from nlsq_dask.objective.penalised import evaluation_of
from nlsq_dask.problem import Problem
from nlsq_dask.solvers.trust_region import Evaluation
from nlsq_dask.sources.origin import Origin
from nlsq_dask.terms import RowTerms

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
    terms: RowTerms
    origin: Origin | None = None  # the data as they were given

    @contextmanager
    def evaluator(self) -> Iterator[Evaluator]:
        """A fresh evaluator, closed at the end."""
        opened = self.open_evaluator()
        try:
            yield opened
        finally:
            opened.close()

    def evaluate(
        self,
        evaluator: Evaluator,
        params: Float[np.ndarray, " k"],
        whitening: Float[np.ndarray, "k k"],
    ) -> Evaluation:
        """Normal equations at a point of the free parameters: one pass, in float64."""
        request = Request(
            params=self.problem.space.expand(params),
            directions=self.problem.directions(whitening),
            terms=self.terms,
        )
        normal = evaluator.evaluate(request).sums.equations
        penalty = self.problem.penalties.rows(float(normal.num_rows))
        return evaluation_of(self.problem, penalty, params, whitening, normal)
