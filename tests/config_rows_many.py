"""For each option of fits of many parameters, and of several devices, what it changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from nlsq_dask import FitResult, HybridStreamingConfig, fit_dataset


def hat(x, c):
    """Piecewise linear, between values at whole numbers."""
    i = jnp.clip(jnp.floor(x).astype(jnp.int32), 0, c.shape[0] - 2)
    return c[i] * (1 - (x - i)) + c[i + 1] * (x - i)


def cubic(x, c):
    """A B-spline between whole knots."""
    i = jnp.clip(jnp.floor(x).astype(jnp.int32), 0, c.shape[0] - 4)
    w = x - i
    return (
        c[i] * (1 - w) ** 3
        + c[i + 1] * (3 * w**3 - 6 * w**2 + 4)
        + c[i + 2] * (-3 * w**3 + 3 * w**2 + 3 * w + 1)
        + c[i + 3] * w**3
    ) / 6


@functools.cache
def _data() -> xr.Dataset:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 197, 60_000)
    y = np.sin(x / 20) + 0.3 * rng.normal(size=len(x))
    return xr.Dataset({"y": ("row", y)}, coords={"x": ("row", x)})


@functools.cache
def fit(**options: Any) -> FitResult:
    """The small fit that the rows vary."""
    config = HybridStreamingConfig(**{"cg_param_threshold": 200, **options})
    return fit_dataset(_data(), cubic, p0={"c": np.zeros(200)}, config=config)


def _products(result: FitResult) -> list[int]:
    """How many went into each trial."""
    trials = "".join("p" if record.is_product else "t" for record in result.history)
    return [len(part) for part in trials.split("t")[1:]]


def threshold_decides_whether_there_is_a_matrix() -> bool:
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 17, 1000)
    ds = xr.Dataset({"y": ("row", np.sin(x))}, coords={"x": ("row", x)})
    ds["y"] += 0.1 * rng.normal(size=len(x))
    limits = (20, 21)
    configs = [HybridStreamingConfig(cg_param_threshold=limit) for limit in limits]
    fits = [fit_dataset(ds, cubic, p0={"c": np.zeros(20)}, config=each) for each in configs]
    return [result.pcov is None for result in fits] == [True, False]


def products_of_a_trial_are_limited() -> bool:
    return max(_products(fit(cg_max_iterations=2))) == 2 < max(_products(fit()))


def a_looser_solve_takes_fewer_products_and_more_trials() -> bool:
    loose, tight = _products(fit(cg_relative_tolerance=0.3)), _products(fit())
    return loose[0] < tight[0] and len(loose) > len(tight)


def nothing_is_solved_below_the_absolute_tolerance() -> bool:
    return _products(fit(cg_absolute_tolerance=10.0))[0] < _products(fit())[0]


def regularization_hides_all_but_the_diagonal() -> bool:
    return fit(regularization_factor=1e6).num_passes > 1.5 * fit().num_passes


def devices_share_a_leaf() -> bool:
    with mock.patch.object(jax, "local_devices", return_value=2 * jax.local_devices()):
        shared = fit(enable_multi_device=True)
    plans = [result.diagnostics["plan"]["strategy"] for result in (shared, fit())]
    return [plan["num_shards"] for plan in plans] == [2, 1]


ROWS: list[tuple[str, Callable[[], bool]]] = [
    ("cg_param_threshold", threshold_decides_whether_there_is_a_matrix),
    ("cg_max_iterations", products_of_a_trial_are_limited),
    ("cg_relative_tolerance", a_looser_solve_takes_fewer_products_and_more_trials),
    ("cg_absolute_tolerance", nothing_is_solved_below_the_absolute_tolerance),
    ("regularization_factor", regularization_hides_all_but_the_diagonal),
    ("enable_multi_device", devices_share_a_leaf),
]
