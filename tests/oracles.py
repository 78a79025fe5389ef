"""Models, losses and normal equations in NumPy's extended precision, derivatives by complex steps.

A formula is given an array module: JAX's for the package, NumPy's for what is expected of it, in
``longdouble`` (Squire & Trapp 1998 for the complex step). Nothing here uses the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

LONG = np.longdouble
_IMAGINARY = LONG(1e-40)
_STEP = LONG(1e-4)  # of central differences, Richardson's: their error is its fourth power


@dataclass(frozen=True)
class Family:
    """``formula(xp, x, p)``, with parameters that make sense for x in `domain`."""

    formula: Callable[[Any, Any, Any], Any]
    truth: tuple[float, ...]
    domain: tuple[float, float]

    def model(self, x, p):
        """For JAX: an array parameter."""
        return self.formula(jnp, x, p)

    def value(self, x, p):
        """``(m,)``, in extended precision."""
        return self.formula(np, np.asarray(x, LONG), np.asarray(p, LONG))

    def jacobian(self, x, p):
        """``(m, n)``, without cancellation."""
        columns = []
        for j in range(len(p)):
            moved = np.asarray(p, np.clongdouble)
            moved[j] += 1j * _IMAGINARY
            columns.append(self.formula(np, np.asarray(x, LONG), moved).imag / _IMAGINARY)
        return np.stack(np.broadcast_arrays(*columns, np.asarray(x, LONG))[:-1], axis=-1)

    def hessians(self, x, p):
        """``(m, n, n)``: differences of the Jacobian, to 1e-12."""
        p = np.asarray(p, LONG)
        slices = []
        for j in range(len(p)):
            way = np.zeros(len(p), LONG)
            way[j] = _STEP

            def change(share, way=way):
                plus, minus = (self.jacobian(x, p + side * share * way) for side in (1, -1))
                return (plus - minus) / (2 * share * _STEP)

            slices.append((4 * change(LONG(1)) - change(LONG(2))) / 3)
        return np.stack(slices, axis=-1)


FAMILIES = {
    "decay": Family(lambda xp, x, p: p[0] * xp.exp(-p[1] * x) + p[2], (2.0, 0.5, 0.1), (0.0, 8.0)),
    "peak": Family(
        lambda xp, x, p: p[0] * xp.exp(-(((x - p[1]) / p[2]) ** 2)) + p[3],
        (3.0, 2.0, 0.8, 0.5),
        (-1.0, 5.0),
    ),
    "wave": Family(
        lambda xp, x, p: p[0] * xp.sin(p[1] * x) + p[2] * xp.cos(p[1] * x),
        (1.0, 1.3, -0.7),
        (0.0, 6.0),
    ),
    "saturation": Family(lambda xp, x, p: p[0] * x / (p[1] + x), (4.0, 1.5), (0.1, 9.0)),
    "logistic": Family(
        lambda xp, x, p: p[0] / (1 + xp.exp((p[1] - x) / p[2])), (2.5, 1.0, 0.7), (-3.0, 5.0)
    ),
    "parabola": Family(
        lambda xp, x, p: p[0] + p[1] * x + p[2] * x * x, (0.5, -1.0, 0.25), (-2.0, 3.0)
    ),
}


@dataclass(frozen=True)
class RobustRows:
    """Cost, slope and curvature of each row by its residual, by hand."""

    cost: np.ndarray
    score: np.ndarray
    curvature: np.ndarray

    @property
    def clamped(self):
        return np.maximum(self.curvature, LONG(1e-12))


def robust_rows(loss, r, s=1.0) -> RobustRows:
    r, s = np.asarray(r, LONG), LONG(s)
    z = (r / s) ** 2
    if loss == "linear":
        return RobustRows(r**2 / 2, r, np.ones_like(r))
    if loss == "soft_l1":
        root = np.sqrt(1 + z)
        # 1 - √(1 + z) without cancellation
        return RobustRows(s**2 * z / (root + 1), r / root, root**-3)
    if loss == "huber":
        near = np.abs(r) <= s
        cost = np.where(near, r**2 / 2, s * np.abs(r) - s**2 / 2)
        return RobustRows(cost, np.clip(r, -s, s), near.astype(LONG))
    if loss == "cauchy":
        return RobustRows(s**2 * np.log1p(z) / 2, r / (1 + z), (1 - z) / (1 + z) ** 2)
    assert loss == "arctan"
    return RobustRows(s**2 * np.arctan(z) / 2, r / (1 + z**2), (1 - 3 * z**2) / (1 + z**2) ** 2)


def inverse(matrix):
    """By Gauss and Jordan, with pivots, in extended precision."""
    k = len(matrix)
    work = np.concatenate([np.asarray(matrix, LONG), np.eye(k, dtype=LONG)], axis=1)
    for column in range(k):
        pivot = column + int(np.argmax(np.abs(work[column:, column])))
        work[[column, pivot]] = work[[pivot, column]]
        work[column] /= work[column, column]
        others = np.arange(k) != column
        work[others] -= np.outer(work[others, column], work[column])
    return work[:, k:]
