"""Which solver goes over all rows, when it stops, and in how many digits it works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nlsq_dask.config import HybridStreamingConfig, Precision
from nlsq_dask.problem import Problem
from nlsq_dask.solvers.truncated_newton import NewtonState, TruncatedNewton
from nlsq_dask.solvers.trust_region import State, Tolerances, TrustRegion
from nlsq_dask.status import Status

__all__ = ["lacks_digits", "solver_for", "tolerances_for"]

# Above it, derivatives in float32 bias the answer (2.5e-3 standard errors at 4e5).
_MIXED_CONDITION = 1e3


def tolerances_for(
    problem: Problem,
    config: HybridStreamingConfig,
    data_square: float,
    precision: Precision = "float64",
) -> Tolerances:
    """When to stop, for rows with this ``Σ w y²``."""
    tolerances = Tolerances(
        distance_tol=config.distance_tol,
        tangent_tol=config.gauss_newton_tol,
        max_iterations=config.gauss_newton_max_iterations,
        ftol=config.ftol,
        xtol=config.xtol,
        gtol=config.gtol,
        absolute_sigma=problem.absolute_sigma,
        data_square=data_square,
    )
    if precision == "float32":
        tolerances = replace(tolerances, eps=float(np.finfo(np.float32).eps))
    return tolerances


def solver_for(problem: Problem, config: HybridStreamingConfig, tolerances: Tolerances) -> Any:
    """The trust region over all rows: dense, or without any matrix for many parameters."""
    if problem.plan.is_matrix_free:
        return TruncatedNewton(
            bounds=problem.space.free_bounds,
            tolerances=tolerances,
            max_products=config.cg_max_iterations,
            relative_tolerance=config.cg_relative_tolerance,
            absolute_tolerance=config.cg_absolute_tolerance,
            initial_radius=config.trust_region_initial,
        )
    return TrustRegion(
        bounds=problem.space.free_bounds,
        tolerances=tolerances,
        initial_radius=config.trust_region_initial,
    )


def lacks_digits(precision: Precision, state: State | NewtonState) -> str:
    """Why a fit in fewer digits has to go on in float64; nothing where it need not."""
    if precision == "float64":
        return ""
    if state.status is Status.NOT_FINITE or not state.was_finite:
        return f"a pass in {precision} precision was not finite"
    condition = state.condition_number
    if precision == "mixed" and condition > _MIXED_CONDITION:
        return f"the condition number is {condition:.1e}, above {_MIXED_CONDITION:.0e}"
    if state.status is Status.STALLED:
        return f"no step lowered the cost in {precision} precision"
    return ""
