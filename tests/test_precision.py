"""Fewer digits where they do, float64 where they do not."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from nlsq_dask import HybridStreamingConfig, Status, fit_dataset
from problems import P0, decay, make_decay, scipy_decay


def fit(y, t, precision, model=decay, p0=None, **options):
    ds = xr.Dataset({"y": ("row", y), "t": ("row", t)})
    config = HybridStreamingConfig(precision=precision, max_warmup_iterations=0, **options)
    return fit_dataset(ds, model, y="y", x="t", p0=p0, config=config)


@pytest.mark.parametrize(("precision", "limit"), [("mixed", 1e-3), ("float32", 0.05)])
@pytest.mark.parametrize("num_rows", [4_000, 400_000])
def test_the_answer_is_float64s_within_a_fraction_of_a_standard_error(precision, limit, num_rows):
    t, y = make_decay(num_rows)
    oracle = scipy_decay(t, y)
    result = fit(y, t, precision, p0=P0)
    assert result.success
    assert result.diagnostics["precision"] == {
        "requested": precision,
        "used": precision,
        "reason": "",
    }
    assert oracle.distance(result.popt) < limit
    np.testing.assert_allclose(result.pcov, oracle.pcov, rtol=1e-4)


def test_numbers_beyond_float32_move_the_fit_to_float64():
    """1e30 squared is infinite in float32, and finite in float64."""

    def model(t, a, b):
        return jnp.sqrt((a * 1e30) ** 2) * 1e-30 * jnp.exp(-b * t)

    t, y = make_decay(3_000)
    result = fit(y, t, "float32", model, p0={"a": 1.5, "b": 0.4})
    expected = fit(y, t, "float64", model, p0={"a": 1.5, "b": 0.4})
    assert result.success
    told = result.diagnostics["precision"]
    assert told["used"] == "float64"
    assert "not finite" in told["reason"]
    np.testing.assert_allclose(result.popt, expected.popt, atol=1e-6 * expected.perr.min())


@pytest.mark.parametrize("num_rows", [3_000, 200_000])
def test_an_ill_conditioned_fit_leaves_mixed_precision(num_rows):
    def model(t, a, b, c, d, e):
        return a + b * t + c * t**2 + d * t**3 + e * t**4

    rng = np.random.default_rng(0)
    t = np.linspace(9.0, 10.0, num_rows)
    y = np.polyval([1.0, -2.0, 0.5, 3.0, 1.0], t) + 0.1 * rng.normal(size=num_rows)
    result = fit(y, t, "mixed", model)
    expected = fit(y, t, "float64", model)
    told = result.diagnostics["precision"]
    assert told["used"] == "float64"
    assert "condition number" in told["reason"]
    assert result.success
    distance = np.abs(result.popt - expected.popt) / expected.perr
    assert distance.max() < 1e-3


def test_a_stall_in_float32_is_no_end():
    """The model is constant in float32 between its steps, so that no step lowers the cost."""

    def model(t, a):
        return (a + 1e8) - 1e8 + 0 * t

    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, 60_000)
    y = 3.3 + 0.01 * rng.normal(size=t.size)
    result = fit(y, t, "float32", model, p0={"a": 0.0})
    assert result["a"] == pytest.approx(y.mean(), abs=1e-6)
    assert result.diagnostics["precision"]["used"] == "float64" or result.success
    assert result.status is not Status.STALLED


def test_a_model_that_is_nan_in_any_precision_says_so():
    t, y = make_decay(2_000)
    result = fit(y, t, "mixed", lambda t, a: jnp.sqrt(-1 - a**2) * t)
    assert result.status is Status.NOT_FINITE
    assert not result.success
