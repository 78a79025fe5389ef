"""Problems whose rows are made rather than read, and a trial of their parameters."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import cases
import jax.numpy as jnp
import numpy as np

from nlsq_dask.evaluate.base import Request
from nlsq_dask.model import Model
from nlsq_dask.parameters.given import build_parameter_space
from nlsq_dask.plan import choose_strategy, plan_chunks, plan_leaves
from nlsq_dask.problem import Problem
from nlsq_dask.sources.base import Chunk, Source
from nlsq_dask.sources.grid import GridSource

__all__ = ["MadeRows", "build_problem", "build_request"]


@dataclass(frozen=True, kw_only=True)
class MadeRows:
    """Equal chunks of a few rows. `rows_claimed` are those a chunk stands for, where it does."""

    num_chunks: int
    chunk_rows: int = 16
    rows_claimed: int | None = None

    @property
    def variables(self) -> tuple[str, ...]:
        return ("x",)

    @property
    def num_rows(self) -> int:
        return self.num_chunks * (self.rows_claimed or self.chunk_rows)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows,)

    def read(self, index: int) -> Chunk:
        x = np.linspace(0.0, 10.0, self.chunk_rows)
        return Chunk(x=(x,), y=np.cos(x + index))


def build_problem(case: cases.Problem, source: Source) -> Problem:
    """The plan and the kernels that a fit of these rows has."""
    function = case.model(jnp)
    names = tuple(inspect.signature(function).parameters)[1:]
    space = build_parameter_space(names, {}, case.p0)
    strategy = choose_strategy(space.num_free)
    if isinstance(source, GridSource):
        plan, source = plan_leaves(source, strategy, None)
    else:
        plan = plan_chunks(source, strategy)
    model = Model(function=function, variables=("x",), parameters=names)
    return Problem(model=model, space=space, source=source, plan=plan)


def build_request(problem: Problem, whitening: Any = None) -> Request:
    """A trial as the fit makes it: along whitened directions, beside nothing else."""
    n = problem.space.num_free
    if whitening is None:
        whitening = np.eye(n) + 0.1 * np.triu(np.ones((n, n)), 1)
    return Request(
        params=problem.space.p0,
        directions=problem.directions(whitening),
        terms=problem.terms(np.array([0.5])),
    )
