"""Profile-likelihood confidence intervals: end points by passes over all data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from nlsq_dask._typing import Float
from nlsq_dask.errors import DataError
from nlsq_dask.results.session import Session
from nlsq_dask.solvers.end_point import EndPointSearch, EndStatus, Trace
from nlsq_dask.solvers.minimize import Evaluate
from nlsq_dask.solvers.quadratic import QuadraticModel, build_quadratic, next_whitening
from nlsq_dask.solvers.subproblem import solve_subproblem
from nlsq_dask.solvers.trust_region import Evaluation, Tolerances

__all__ = ["EndPoint", "Minimum", "profile_ends"]

_SAME_COST = 1e-3  # of the threshold's rise


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """What a fit found, for its free parameters."""

    params: Float[np.ndarray, " k"]
    covariance: Float[np.ndarray, "k k"]
    variance: float  # s², of a residual
    cost: float
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class EndPoint:
    """One end of an interval."""

    value: float
    status: EndStatus
    num_passes: int
    params: Float[np.ndarray, " k"]  # the last point evaluated


def profile_ends(
    session: Session, minimum: Minimum, indices: Sequence[int], width: float
) -> list[tuple[EndPoint, EndPoint]]:
    """The lower and upper ends for some of the free parameters.

    Parameters
    ----------
    session : Session
    minimum : Minimum
    indices : sequence of int
        Among the free parameters.
    width : float
        Quantile t: an end is where the cost, minimised over all other parameters, is ``t² s²/2``
        above the minimum.

    Raises
    ------
    DataError
        If the data are not those that were fitted.

    Notes
    -----
    One pass at the minimum, then some two to four for each end.
    """
    with session.evaluator() as evaluator:
        evaluate = functools.partial(session.evaluate, evaluator)
        evaluation = evaluate(minimum.params, _whitening(minimum))
        rise = 0.5 * width**2 * minimum.variance
        _require_same_data(minimum, evaluation, rise)
        model = build_quadratic(evaluation.normal, evaluation.whitening)
        bounds = session.problem.space.free_bounds
        lowest = model.cost - _still_to_fall(model, minimum, bounds)
        ends = []
        for index in indices:
            searches = [
                EndPointSearch(
                    index=index,
                    side=side,
                    minimum=minimum.params,
                    threshold=lowest + rise,
                    rise=rise,
                    standard_error=float(np.sqrt(minimum.covariance[index, index])),
                    scale=float(np.sqrt(minimum.variance)),
                    bounds=bounds,
                )
                for side in (-1, 1)
            ]
            lower, upper = (_run(search, search.init(model), evaluate) for search in searches)
            ends.append((lower, upper))
        return ends


def _run(search: EndPointSearch, trace: Trace, evaluate: Evaluate) -> EndPoint:
    while trace.status is EndStatus.RUNNING:
        trace = search.update(trace, evaluate(trace.trial, trace.whitening))
    return EndPoint(
        value=trace.end,
        status=trace.status,
        num_passes=trace.num_trials,
        params=trace.params,
    )


def _whitening(minimum: Minimum) -> Float[np.ndarray, "k k"]:
    """R of the Jacobian, nearly, from ``s² (JᵀJ)⁻¹``."""
    errors = np.sqrt(np.diag(minimum.covariance))
    values, vectors = scipy.linalg.eigh(minimum.covariance / np.outer(errors, errors))
    values = np.maximum(values, np.finfo(np.float64).eps * values[-1])
    return next_whitening(vectors.T / np.sqrt(values)[:, None] / errors)


def _still_to_fall(
    model: QuadraticModel,
    minimum: Minimum,
    bounds: tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]],
) -> float:
    lower, upper = bounds
    to_bounds = (
        np.minimum(lower - minimum.params, 0.0),
        np.maximum(upper - minimum.params, 0.0),
    )
    return solve_subproblem(model, model.column_norms, np.inf, to_bounds).reduction


def _require_same_data(minimum: Minimum, evaluation: Evaluation, rise: float) -> None:
    normal = evaluation.normal
    noise = Tolerances(distance_tol=0.0, max_iterations=0).cost_noise(minimum.cost)
    change = abs(float(normal.cost) - minimum.cost)
    if int(normal.num_rows) != minimum.num_rows or not change <= noise + _SAME_COST * rise:
        raise DataError(
            f"the data must be those that were fitted, {minimum.num_rows:,} rows with a cost of "
            f"{minimum.cost:.9g}, got {int(normal.num_rows):,} rows with a cost of "
            f"{float(normal.cost):.9g}; fit again"
        )
