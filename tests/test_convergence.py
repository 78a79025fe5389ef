"""Passes, from poor starts, over four million rows in time order."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from nlsq_dask import Status, fit_dataset

NUM_ROWS = 4_000_000


def exponential(t, a, b, c):
    return a * jnp.exp(-b * t) + c


def gaussian(t, a, m, s, c, d):
    return a * jnp.exp(-0.5 * ((t - m) / s) ** 2) + c + d * t


def damped_sine(t, a, w, p, g, c):
    return a * jnp.exp(-g * t) * jnp.sin(w * t + p) + c


def wrong(t, a, b):
    return a * jnp.exp(-b * t)


def sine(t, a, w, p):
    return a * jnp.sin(w * t + p)


def data(name):
    t = np.linspace(0, 10, NUM_ROWS)
    noise = np.random.default_rng(3).normal(size=NUM_ROWS)
    y = {
        "exponential": lambda: 2 * np.exp(-0.5 * t) + 0.1 + 0.1 * noise,
        "gaussian": lambda: 3 * np.exp(-0.5 * ((t - 4) / 0.6) ** 2) + 1 + 0.1 * t + 0.3 * noise,
        "damped sine": lambda: 2 * np.exp(-0.2 * t) * np.sin(3 * t + 0.5) + 0.3 + 0.2 * noise,
        "misfit": lambda: 2 * np.exp(-0.5 * t) + 0.8 * np.sin(2 * t) + 0.5 + 0.1 * noise,
        "sine": lambda: 2 * np.sin(3 * t + 0.5) + 0.2 * noise,
    }[name]()
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


CASES = {
    "exponential": (exponential, {"a": 20.0, "b": 5.0, "c": -3.0}),
    "gaussian": (gaussian, {"a": 1.0, "m": 6.0, "s": 2.0, "c": 0.0, "d": 0.0}),
    "damped sine": (damped_sine, {"a": 1.0, "w": 3.4, "p": 0.0, "g": 0.5, "c": 0.0}),
    "misfit": (wrong, {"a": 10.0, "b": 3.0}),
}


def standard_errors_apart(params, result):
    """In the direction that is determined best: the Mahalanobis distance of the free ones."""
    free = result.perr > 0
    way = (params - result.popt)[free]
    inverse = np.linalg.inv(result.correlation.values[np.ix_(free, free)])
    scaled = way / result.perr[free]
    return float(np.sqrt(max(scaled @ inverse @ scaled, 0.0)))


def check_passes(result, max_passes):
    store_bytes = 16 * NUM_ROWS
    assert result.success
    assert result.diagnostics["sample"]["num_rows"] <= 0.01 * NUM_ROWS
    assert result.bytes_read <= 6 * store_bytes
    assert len(result.history) == result.num_passes
    distances = [standard_errors_apart(record.params, result) for record in result.history]
    assert next(i for i, d in enumerate(distances, 1) if d < 0.01) <= max_passes


@pytest.mark.parametrize("name", CASES)
def test_four_passes_to_a_hundredth_of_a_standard_error(name):
    model, p0 = CASES[name]
    result = fit_dataset(data(name), model, y="y", x="t", p0=p0)
    check_passes(result, 4)


def test_twelve_passes_with_an_active_bound():
    p0 = {"a": 20.0, "b": 5.0, "c": 1.0}
    bounds = {"b": (0, 10), "c": (0.2, 5.0)}
    ds = data("exponential")
    result = fit_dataset(ds, exponential, y="y", x="t", p0=p0, bounds=bounds)
    check_passes(result, 12)
    assert result.active.tolist() == [False, False, True]
    assert result["c"] > 0.2
    # With c held at its bound, the other two are an unconstrained minimum.
    held = fit_dataset(
        ds, exponential, y="y", x="t", p0={"a": 2.0, "b": 0.6, "c": 0.2}, fixed=["c"]
    )
    assert standard_errors_apart(result.popt, held) < 1e-5


def test_a_start_one_period_off_ends_in_the_global_basin():
    p0 = {"a": 1.0, "w": 3 + 2 * np.pi / 10, "p": 0.0}
    result = fit_dataset(data("sine"), sine, y="y", x="t", p0=p0)
    assert result.status is Status.CONVERGED
    np.testing.assert_allclose(result["w"], 3.0, atol=1e-3)
    costs = [optimum["cost"] for optimum in result.diagnostics["optima"]]
    assert result.cost <= min(costs)


@pytest.mark.parametrize("chunk", [100, 333])
def test_of_equivalent_optima_the_nearest_to_the_start_is_kept(chunk):
    """A width and its sign, a phase and a full turn: the same fit for every chunking."""
    rng = np.random.default_rng(0)
    t = np.linspace(0, 10, 60_000)
    y = 3 * np.exp(-0.5 * ((t - 4) / 0.6) ** 2) + 2 * np.sin(3 * t + 0.3)
    ds = xr.Dataset({"y": ("row", y + rng.normal(size=t.size)), "t": ("row", t)}).chunk(row=chunk)

    def peak_and_wave(t, a, m, s, b, w, p):
        return a * jnp.exp(-0.5 * ((t - m) / s) ** 2) + b * jnp.sin(w * t + p)

    p0 = {"a": 1.0, "m": 4.5, "s": 1.0, "b": 1.0, "w": 3.1, "p": 1.0}
    result = fit_dataset(ds, peak_and_wave, y="y", x="t", p0=p0)
    assert result.success
    truth = np.array([3, 4, 0.6, 2, 3, 0.3])
    assert np.all(np.abs(result.popt - truth) < 5 * result.perr)
