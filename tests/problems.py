"""Problems with models in JAX and, independently, values and Jacobians in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import scipy.optimize
import xarray as xr


def decay(t, amplitude, rate, offset):
    return amplitude * jnp.exp(-rate * t) + offset


def decay_numpy(t, p):
    return p[0] * np.exp(-p[1] * t) + p[2]


def decay_jacobian(t, p):
    e = np.exp(-p[1] * t)
    return np.stack([e, -p[0] * t * e, np.ones_like(t)], axis=-1)


P0 = {"amplitude": 1.0, "rate": 1.0, "offset": 0.0}
TRUTH = np.array([2.0, 0.5, 0.1])


@dataclass(frozen=True)
class Oracle:
    popt: np.ndarray
    pcov: np.ndarray

    def distance(self, popt: np.ndarray) -> float:
        """In standard errors, the worst parameter."""
        errors = np.sqrt(np.diag(self.pcov))
        return float(np.max(np.abs(popt - self.popt)[errors > 0] / errors[errors > 0]))


def scipy_decay(t, y, sigma=None, absolute_sigma=False, bounds=(-np.inf, np.inf)) -> Oracle:
    """`least_squares` with the Jacobian by hand, and the covariance of its QR."""
    t, y = np.asarray(t, np.float64), np.asarray(y, np.float64)
    weight = np.ones_like(y) if sigma is None else 1 / np.asarray(sigma, np.float64)
    fit = scipy.optimize.least_squares(
        lambda p: (decay_numpy(t, p) - y) * weight,
        [1.9, 0.55, 0.25] if np.ndim(bounds[0]) else [1.0, 1.0, 0.0],
        jac=lambda p: decay_jacobian(t, p) * weight[:, None],
        bounds=bounds,
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        x_scale="jac",
        max_nfev=1000,
    )
    r = np.linalg.qr(fit.jac, mode="r")
    inverse = np.linalg.inv(r)
    variance = 1.0 if absolute_sigma else 2 * fit.cost / (len(y) - len(fit.x))
    return Oracle(popt=fit.x, pcov=inverse @ inverse.T * variance)


def make_decay(num_rows, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    t = np.linspace(0.0, 10.0, num_rows)
    y = decay_numpy(t, TRUTH) + noise * rng.normal(size=num_rows)
    return t, y


def dataset(t, y) -> xr.Dataset:
    """Rows with `t` as a coordinate."""
    return xr.Dataset({"y": ("row", y)}, coords={"t": ("row", t)})


def solve_in_longdouble(matrix: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Linear least squares by Gram-Schmidt, twice, in extended precision.

    float64 would not do: LAPACK's own error is 4e-6 where the tests ask for 1e-6.
    """
    q, k = matrix.astype(np.longdouble), matrix.shape[1]
    r = np.zeros((k, k), np.longdouble)
    for j in range(k):
        for _ in range(2):
            overlap = q[:, :j].T @ q[:, j]
            q[:, j] -= q[:, :j] @ overlap
            r[:j, j] += overlap
        r[j, j] = np.sqrt(q[:, j] @ q[:, j])
        q[:, j] /= r[j, j]
    solution = q.T @ y.astype(np.longdouble)
    for j in reversed(range(k)):
        solution[j] = (solution[j] - r[j, j + 1 :] @ solution[j + 1 :]) / r[j, j]
    return solution.astype(np.float64)
