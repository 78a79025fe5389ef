"""Sums over the data, and the penalties added to them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from nlsq_dask._typing import Float, Vector
from nlsq_dask.normal_equations import CostGradient, NormalEquations
from nlsq_dask.parameters.penalties import PenaltyRows
from nlsq_dask.problem import Problem
from nlsq_dask.solvers.trust_region import Evaluation

__all__ = ["build_penalty_products", "evaluation_of", "penalised_slope", "penalty_gram"]


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


def penalised_slope(
    problem: Problem, penalty: PenaltyRows, params: Vector, slope: CostGradient
) -> tuple[CostGradient, float]:
    """The gradient by the free parameters, penalties included; and their part of the cost."""
    space = problem.space
    grad, cost = np.asarray(slope.grad)[space.is_free], 0.0
    if not problem.penalties.is_empty:
        residual = penalty.residual(space.expand(params))
        cost = 0.5 * float(residual @ residual)
        grad = grad + space.linearise(params).pull(penalty.pull(residual, space.size)[None])[0]
    return CostGradient(cost=slope.cost + cost, num_rows=slope.num_rows, grad=grad), cost


def build_penalty_products(
    problem: Problem, penalty: PenaltyRows, params: Vector
) -> Callable[[Float[np.ndarray, "v k"]], Float[np.ndarray, "v k"]]:
    """Products with the penalties' Hessian, which is never formed."""
    space = problem.space
    if problem.penalties.is_empty:
        return np.zeros_like
    at = space.linearise(params)

    def products(vectors: Float[np.ndarray, "v k"]) -> Float[np.ndarray, "v k"]:
        rows = penalty.push(at.push(vectors).T)
        return at.pull(np.stack([penalty.pull(column, space.size) for column in rows.T]))

    return products
