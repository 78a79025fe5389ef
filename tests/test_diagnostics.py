"""What users are told to check, the result says by itself."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from nlsq_dask import HybridStreamingConfig, fit_dataset
from problems import TRUTH, decay, decay_jacobian, decay_numpy, make_decay

CONFIG = HybridStreamingConfig(max_warmup_iterations=0)


def fit(y, t=None, model=decay, chunk=None, **options):
    t = np.linspace(0, 10, len(y)) if t is None else t
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": t})
    config = HybridStreamingConfig(max_warmup_iterations=0, chunk_size=chunk)
    return fit_dataset(ds, model, y="y", config=config, **options)


def about(result, words):
    return [note for note in result.diagnostics["notes"] if words in note]


def test_a_good_fit_has_nothing_to_say():
    result = fit(make_decay(40_000)[1], chunk=1_000)
    assert result.diagnostics["notes"] == []
    checks = result.diagnostics["checks"]
    assert 0.5 < checks["cost_reduction"] < 1
    assert checks["rank"] == 3
    assert max(map(abs, checks["gradient_cosines"].values())) < 1e-8
    assert 0.5 < checks["overdispersion"] < 2


@pytest.mark.parametrize("num_rows", [6_400, 200_000])
def test_statistics_by_chunk_are_those_of_the_chunks(num_rows):
    t, y = make_decay(num_rows)
    y[::7] = np.nan
    result = fit(y, t, chunk=num_rows // 64)
    residual = decay_numpy(t, result.popt) - y
    parts = residual.reshape(64, -1)
    chunks = result.diagnostics["chunks"]
    assert chunks["leaves_per_bin"] == 1
    np.testing.assert_array_equal(chunks["num_masked"], np.isnan(parts).sum(axis=1))
    np.testing.assert_array_equal(chunks["num_rows"], (~np.isnan(parts)).sum(axis=1))
    np.testing.assert_allclose(chunks["residual_mean"], np.nanmean(parts, axis=1), atol=1e-12)
    np.testing.assert_allclose(chunks["residual_variance"], np.nanvar(parts, axis=1), rtol=1e-9)


def test_many_chunks_are_kept_in_at_most_1024_bins():
    t, y = make_decay(30_000)
    result = fit(y, t, chunk=10)
    chunks = result.diagnostics["chunks"]
    assert result.diagnostics["plan"]["num_leaves"] == 3_000
    assert chunks["leaves_per_bin"] == 4
    assert len(chunks["num_rows"]) == 750
    residual = (decay_numpy(t, result.popt) - y).reshape(750, 40)
    np.testing.assert_allclose(chunks["residual_mean"], residual.mean(axis=1), atol=1e-12)


@pytest.mark.parametrize("num_rows", [8_000, 120_000])
def test_correlated_residuals_are_noticed(num_rows):
    """Fewer rows than a sample holds are judged in runs, more by chunk."""
    t, _ = make_decay(num_rows)
    noise = np.random.default_rng(0).normal(size=num_rows)
    slow = np.convolve(noise, np.ones(200) / np.sqrt(200), "same")
    result = fit(decay_numpy(t, TRUTH) + 0.1 * slow, t, chunk=1_000)
    (note,) = about(result, "scatter")
    assert "standard errors are too small" in note
    assert "cluster=" in note
    assert "Note: " in result.summary()
    assert result.diagnostics["checks"]["overdispersion"] > 20


def test_parameters_that_cannot_be_told_apart_are_named():
    def model(t, a, b, c):
        return a * t + b * (t + 1e-7 * t**2) + c

    t = np.linspace(0, 10, 2_000)
    y = 2 * t + 1 + 0.1 * np.random.default_rng(0).normal(size=2_000)
    result = fit(y, t, model=model)
    (note,) = about(result, "correlated")
    assert "a and b" in note
    assert about(result, "condition number") or result.condition_number < 1e8
    first, second, value = result.diagnostics["checks"]["correlated_pairs"][0]
    assert {first, second} == {"a", "b"}
    assert value == pytest.approx(-1.0, abs=1e-3)


def test_a_mean_that_is_not_zero_is_noticed():
    def wave(t, amplitude):
        return amplitude * jnp.sin(2 * jnp.pi * t)

    t = np.linspace(0, 10, 2_000)
    noise = 0.1 * np.random.default_rng(0).normal(size=t.size)
    result = fit(np.sin(2 * np.pi * t) + 0.3 + noise, t, model=wave)
    assert about(result, "lack an offset")


def test_chunks_without_rows_are_counted():
    t, y = make_decay(16_000)
    y[2_000:4_000] = np.nan
    assert about(fit(y, t, chunk=1_000), "2 of 16 chunks have no row that counts")


def test_cosines_are_those_of_residuals_and_columns():
    t, y = make_decay(3_000)
    result = fit(y, t, bounds={"rate": (0.6, 2.0)})
    jac, r = decay_jacobian(t, result.popt), decay_numpy(t, result.popt) - y
    expected = jac.T @ r / np.linalg.norm(jac, axis=0) / np.linalg.norm(r)
    actual = result.diagnostics["checks"]["gradient_cosines"]
    np.testing.assert_allclose(list(actual.values()), expected, atol=1e-9)
    assert abs(actual["rate"]) > 1e-3


def test_a_start_where_the_model_is_not_finite_is_noted():
    t = np.linspace(1.0, 3.0, 200)
    ds = xr.Dataset({"y": ("t", np.log(2.0) * t)}, coords={"t": t})
    result = fit_dataset(ds, lambda t, a: jnp.log(a) * t, p0={"a": -0.5})
    assert result.success
    np.testing.assert_allclose(result.popt, [2.0])
    assert "Note: the model is not finite at `p0`" in result.summary()


def test_residuals_of_rounding_size_worry_nobody():
    result = fit(decay_numpy(np.linspace(0, 10, 20_000), TRUTH), chunk=1_000)
    assert result.status.name == "CONVERGED_TO_ROUNDING"
    assert not about(result, "offset")
    assert not about(result, "scatter")
    assert result.message.endswith("of rounding size, and with them the standard errors.")
    # Small, but more than rounding.
    noisy = fit(decay_numpy(np.linspace(0, 10, 20_000), TRUTH) + 1e-12 * np.linspace(-1, 1, 20_000))
    assert "rounding size" not in noisy.message
