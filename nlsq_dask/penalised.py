"""Sums over the data, and the penalties added to them once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask.normal_equations import NormalEquations
from nlsq_dask.penalties import PenaltyRows
from nlsq_dask.problem import Problem
from nlsq_dask.solvers.trust_region import Evaluation

__all__ = ["evaluation_of", "penalty_gram"]


def penalty_rows(
    problem: Problem, penalty: PenaltyRows, params: Vector, whitening: Float[np.ndarray, "k k"]
) -> Float[np.ndarray, "q k"]:
    """The penalty's rows along the columns of ``R⁻¹``."""
    inverse = np.linalg.solve(whitening, np.eye(len(whitening)))
    return penalty.push(problem.space.tangents(params, inverse))


def penalty_gram(
    problem: Problem, penalty: PenaltyRows, params: Vector, whitening: Float[np.ndarray, "k k"]
) -> Float[np.ndarray, "k k"]:
    """Their part of the gram."""
    rows = penalty_rows(problem, penalty, params, whitening)
    return np.asarray(rows.T @ rows)


def evaluation_of(
    problem: Problem,
    penalty: PenaltyRows,
    params: Vector,
    whitening: Float[np.ndarray, "k k"],
    normal: NormalEquations,
) -> Evaluation:
    """What a pass says about a point, with the penalty's rows beside those of the data."""
    cost = 0.0
    if not problem.penalties.is_empty:
        rows = penalty_rows(problem, penalty, params, whitening)
        residual = penalty.residual(problem.space.expand(params))
        cost = 0.5 * float(residual @ residual)
        normal = replace(
            normal,
            gram=normal.gram + rows.T @ rows,
            grad=normal.grad + rows.T @ residual,
            cost=normal.cost + cost,
        )
    return Evaluation(params=params, whitening=whitening, normal=normal, penalty_cost=cost)
