"""The scale of a robust loss, from the sample."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from nlsq_dask._typing import Vector
from nlsq_dask.errors import DataError
from nlsq_dask.objective.on_sample import SampleObjective

__all__ = ["estimate_f_scale"]

_LOGGER = logging.getLogger("nlsq_dask")
_TO_SIGMA = 1.4826  # of a normal distribution: 1 / Φ⁻¹(3/4)
_TOLERANCE = 0.01
_MAX_ROUNDS = 8


def estimate_f_scale(
    objective: SampleObjective, fit: Callable[[SampleObjective], Vector | None]
) -> float:
    """1.4826 times the median absolute residual at the sample's own optimum.

    The optimum depends on the scale, so the two are found in turns, from the scale of the
    residuals at `p0` on, until the scale changes by less than 1 % (Huber & Ronchetti 2009,
    section 7.8, with the median absolute deviation for the scale step).

    Parameters
    ----------
    objective : SampleObjective
    fit : callable
        Finds the optimum; None where the model is not finite.

    Raises
    ------
    DataError
        If more than half of the residuals are zero at the optimum, or none is finite at `p0`.
    """
    space = objective.problem.space
    scale = _spread_at(objective, space.p0[space.is_free])
    for _ in range(_MAX_ROUNDS):
        optimum = fit(objective.with_f_scale(scale))
        if optimum is None:
            raise DataError("`f_scale` cannot be estimated: the model is not finite near `p0`")
        before, scale = scale, _spread_at(objective, optimum)
        if abs(scale - before) <= _TOLERANCE * before:
            break
    _LOGGER.info("Estimated f_scale: %.6g", scale)
    return scale


def _spread_at(objective: SampleObjective, params: np.ndarray) -> float:
    spread = _TO_SIGMA * float(np.median(np.abs(objective.residuals(params))))
    if not np.isfinite(spread) or spread <= 0:
        raise DataError(
            "`f_scale` cannot be estimated from residuals of which half are zero or not finite, "
            f"got a median absolute residual of {spread / _TO_SIGMA!r}"
        )
    return spread
