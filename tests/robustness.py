"""Random starts, and which of them a solver brings to the certified fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np
import scipy.optimize

import nist
from nlsq_dask import curve_fit
from nlsq_dask.errors import ConvergenceError

DECADES = (0.1, 10.0)


def model_of(problem: nist.NistProblem) -> Callable[..., object]:
    """The model as `curve_fit` calls it: Nelson's two variables are rows of one argument."""
    if problem.x.ndim == 1:
        return problem.model
    return lambda x, *params: problem.model(*x, *params)


def random_starts(problem: nist.NistProblem, count: int) -> Iterator[np.ndarray]:
    """Every certified value times a factor between 0.1 and 10, uniform in its logarithm."""
    rng = np.random.default_rng([20, *problem.name.encode()])
    low, high = np.log(DECADES)
    for _ in range(count):
        yield problem.values * np.exp(rng.uniform(low, high, len(problem.values)))


def is_certified(problem: nist.NistProblem, params: np.ndarray) -> bool:
    """Four digits of every parameter, or its twin by a symmetry: the same sum of squares."""
    if not np.isfinite(params).all():
        return False
    if nist.digits(params, problem.values) >= 4:
        return True
    with jax.enable_x64(True):
        residuals = np.asarray(model_of(problem)(problem.x, *params)) - problem.y
    rounding = (10 * np.finfo(np.float64).eps) ** 2 * np.sum(problem.y**2)
    limit = problem.residual_sum_of_squares * (1 + 1e-6) + rounding
    return bool(np.sum(residuals**2) <= limit)


def fit_by_curve_fit(problem: nist.NistProblem) -> Callable[[np.ndarray], np.ndarray]:
    model = model_of(problem)

    def fit(start: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.optimize.OptimizeWarning)
            try:
                return curve_fit(model, problem.x, problem.y, start)[0]
            except ConvergenceError:
                return np.full(len(start), np.nan)

    return fit


def fit_by_scipy(problem: nist.NistProblem) -> Callable[[np.ndarray], np.ndarray]:
    """`least_squares` by TRF, scaled by the Jacobian, with all the evaluations it wants."""
    model = model_of(problem)

    def residual(params):
        return model(problem.x, *params) - problem.y

    with jax.enable_x64(True):
        compiled, jacobian = jax.jit(residual), jax.jit(jax.jacfwd(residual))

    def fit(start: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True), np.errstate(all="ignore"):
            try:
                return scipy.optimize.least_squares(
                    lambda p: np.asarray(compiled(p)),
                    start,
                    jac=lambda p: np.asarray(jacobian(p)),
                    method="trf",
                    x_scale="jac",
                    ftol=1e-14,
                    xtol=1e-14,
                    gtol=1e-14,
                    max_nfev=5000,
                ).x
            except (ValueError, np.linalg.LinAlgError):  # not finite, at the start or on the way
                return np.full(len(start), np.nan)

    return fit


def successes(
    problem: nist.NistProblem, fit: Callable[[np.ndarray], np.ndarray], count: int
) -> np.ndarray:
    return np.array([is_certified(problem, fit(start)) for start in random_starts(problem, count)])
