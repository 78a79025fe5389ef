"""The optimizer under NLSQ's name: its call forms, its result's keys, its properties."""

from __future__ import annotations

import pickle

import dask.array as da
import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import (
    AdaptiveHybridStreamingOptimizer,
    HybridStreamingConfig,
    curve_fit,
    fit_dataset,
)
from nlsq_dask.sources.arrays import build_array_source

NUM_ROWS = 600
T, Y = problems.make_decay(NUM_ROWS, seed=3)
SIGMA = 0.05 + 0.01 * T
START = list(problems.P0.values())
PLANE = np.stack([T, np.sin(5 * T)], axis=-1)  # rows first
HEIGHT = 0.5 * PLANE[:, 0] - 2.0 * PLANE[:, 1] + 0.3 + 0.1 * np.cos(9 * T)


def plane(x, a, b, c):
    return a * x[:, 0] + b * x[:, 1] + c


def plane_oracle():
    design = np.column_stack([PLANE, np.ones(NUM_ROWS)])
    return np.linalg.lstsq(design, HEIGHT)[0]


def fit(*args, **kwargs):
    return AdaptiveHybridStreamingOptimizer().fit(*args, **kwargs)


def dataset():
    return xr.Dataset({"y": ("row", Y), "t": ("row", T), "s": ("row", SIGMA)})


# -- call forms


@pytest.mark.parametrize(
    "call",
    [
        lambda: fit((T, Y), problems.decay, START, sigma=SIGMA),
        lambda: fit([T.tolist(), Y.tolist()], problems.decay, START, (-9, 9), SIGMA),
        lambda: fit((T, Y, SIGMA), problems.decay, p0=START),
        lambda: fit(model=problems.decay, x_data=T, y_data=Y, p0=START, sigma=SIGMA),
        lambda: fit(func=problems.decay, x_data=T, y_data=Y, p0=problems.P0, sigma=SIGMA),
        lambda: fit(
            tuple(da.from_array(part, chunks=170) for part in (T, Y, SIGMA)), problems.decay, START
        ),
        lambda: fit(dataset(), problems.decay, START, sigma="s", y_data="y"),
        lambda: fit(dataset(), lambda z, a, b, c: problems.decay(z, a, b, c), START, None, "s",
                    x_data="t", y_data="y"),
        lambda: fit(build_array_source(T, Y, SIGMA), lambda x, a, b, c: problems.decay(x, a, b, c),
                    START),
        lambda: fit((T, Y), lambda x, *p: problems.decay(x, *p), START, sigma=SIGMA),
    ],
    ids=["tuple", "lists", "with sigma", "model=", "func=", "dask", "dataset", "names", "source",
         "*args"],
)  # fmt: skip
def test_every_form_is_the_same_fit(call):
    expected = problems.scipy_decay(T, Y, SIGMA)
    result = call()
    assert result.success
    assert expected.distance(result.popt) < 1e-6


def test_forms_of_stores(tmp_path):
    expected = problems.scipy_decay(T, Y)
    dataset().to_zarr(tmp_path / "rows.zarr", zarr_format=3, consolidated=False)
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["t"], file["y"] = T, Y
    for path in (tmp_path / "rows.zarr", tmp_path / "rows.h5"):
        result = fit(path, problems.decay, START, y_data="y")
        assert expected.distance(result.popt) < 1e-6


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_a_store_of_x_and_y_goes_by_position(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "h5":
        with h5py.File(path, "w") as file:
            file["x"], file["y"], file["s"] = PLANE, HEIGHT, SIGMA
    else:
        ds = xr.Dataset({"x": (("r", "v"), PLANE), "y": ("r", HEIGHT), "s": ("r", SIGMA)})
        ds.to_zarr(path, zarr_format=3, consolidated=False)
    design = np.column_stack([PLANE, np.ones(NUM_ROWS)]) / SIGMA[:, None]
    expected = np.linalg.lstsq(design, HEIGHT / SIGMA)[0]
    for function in (plane, lambda data, a, b, c: plane(data, a, b, c)):
        result = fit(str(path), function, [1.0, 1.0, 1.0], sigma="s")
        np.testing.assert_allclose(result.popt, expected, rtol=1e-6)


def test_a_store_of_one_variable_goes_by_position_or_by_name(tmp_path):
    path = tmp_path / "rows.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = T, Y
    expected = problems.scipy_decay(T, Y)
    for function in (problems.decay, lambda x, a, b, c: problems.decay(x, a, b, c)):
        assert expected.distance(fit(path, function, START).popt) < 1e-6


@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray, lambda x: da.from_array(x, (200, 1))])
def test_variables_are_rows_first(wrap):
    result = fit((wrap(PLANE), HEIGHT), plane, [1.0, 1.0, 1.0])
    np.testing.assert_allclose(result.popt, plane_oracle(), rtol=1e-6)
    popt, _ = curve_fit(lambda x, a, b, c: plane(x.T, a, b, c), PLANE.T, HEIGHT)
    np.testing.assert_allclose(result.popt, popt, rtol=1e-6)


def test_one_column_stays_two_dimensional():
    result = fit((T[:, None], Y), lambda x, a, b, c: problems.decay(x[:, 0], a, b, c), START)
    assert problems.scipy_decay(T, Y).distance(result.popt) < 1e-6


def test_rows_first_reach_worker_processes(client):
    """A model of rows first is put together on the workers, where a wrapper would not be."""
    lazy = da.from_array(PLANE, chunks=(150, 2))
    here = fit((lazy, HEIGHT), plane, [1.0, 1.0, 1.0])
    there = fit((lazy, HEIGHT), plane, [1.0, 1.0, 1.0], client=client)
    assert "cluster" in there.diagnostics["evaluator"]
    np.testing.assert_array_equal(there.popt, here.popt)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (TypeError, "`func` or `model`", ((T, Y),), {}),
        (TypeError, "`func` or `model`", ((T, Y), plane), {"model": plane}),
        (TypeError, "`x_data`", (), {"model": problems.decay, "x_data": T}),
        (TypeError, "`x_data`", ((T, Y), problems.decay), {"x_data": T}),
        (ValueError, "`data_source`", ((T,), problems.decay), {}),
        (ValueError, "`sigma`", ((T, Y, SIGMA), problems.decay), {"sigma": SIGMA}),
        (ValueError, "`x` must have as many rows", ((T[:-1], Y), problems.decay), {}),
        (ValueError, "`x` must have shape", ((PLANE[None], Y), plane), {}),
        (TypeError, "`data_source`", (3, problems.decay), {}),
        (TypeError, "`callback`", ((T, Y), problems.decay), {"callback": 3}),
        (ValueError, "`verbose`", ((T, Y), problems.decay), {"verbose": 5}),
        (TypeError, "`client`", ((T, Y), problems.decay), {"client": "tcp://127.0.0.1:1"}),
    ],
)
def test_mistakes_are_named(error, match, args, options):
    with pytest.raises(error, match=match):
        fit(*args, **options)


def test_config_must_be_one():
    with pytest.raises(TypeError, match="`config`"):
        AdaptiveHybridStreamingOptimizer({"seed": 1})


# -- the result's keys


def test_keys_of_nlsq():
    result = fit((T, Y), problems.decay, START)
    expected = {"x", "success", "message", "fun", "pcov", "perr", "popt", "streaming_diagnostics"}
    assert expected <= set(result.keys())
    assert set(result.keys()) - expected == set(problems.P0)
    assert len(result) == len(dict(result)) == len(list(result))
    assert result["x"] is result["popt"] is result.x is result.popt
    assert result["success"] is True
    assert result["message"] == result.message
    np.testing.assert_array_equal(result["perr"], np.sqrt(np.diag(result["pcov"])))
    assert "x" in result
    assert "rate" in result
    assert "nothing" not in result
    assert result.get("nothing") is None
    assert result["rate"] == result.popt[1]
    assert result == result
    assert result != fit((T, Y), problems.decay, START)
    assert hash(result) == hash(result)


def test_a_parameter_named_like_a_key_is_meant():
    result = fit((T, Y), lambda t, a, x, perr: problems.decay(t, a, x, perr), START)
    assert result["x"] == result.popt[1]
    assert result["perr"] == result.popt[2]
    assert result.x is result.popt
    assert result.perr.shape == (3,)
    assert list(result).count("x") == 1


def test_streaming_diagnostics():
    result = fit((T, Y), problems.decay, START)
    told = result["streaming_diagnostics"]
    assert set(told) == {
        "phase_timings",
        "phase_iterations",
        "total_time",
        "warmup_diagnostics",
        "gauss_newton_diagnostics",
        "phase_history",
    }
    names = ["normalization", "warmup", "gauss_newton", "covariance"]
    assert list(told["phase_timings"]) == list(told["phase_iterations"]) == names
    assert told["phase_iterations"]["gauss_newton"] == result.num_passes
    assert sum(told["phase_timings"].values()) <= told["total_time"]
    assert told["gauss_newton_diagnostics"]["final_cost"] == result.cost
    assert [phase["phase"] for phase in told["phase_history"]] == [0, 1, 2, 3]


# -- residuals


def test_residuals_are_lazy_and_unweighted():
    ds = dataset().chunk(row=150)
    ds.y[7] = np.nan
    options = HybridStreamingConfig(chunk_size=150)
    result = fit_dataset(ds, problems.decay, y="y", p0=problems.P0, sigma="s", config=options)
    fun = result["fun"]
    expected = ds.y.values - problems.decay_numpy(T, result.popt)
    assert fun.shape == (NUM_ROWS,)
    assert len(fun) == NUM_ROWS
    np.testing.assert_allclose(np.asarray(fun), expected, atol=1e-14)
    assert np.isnan(fun[7])
    assert np.asarray(fun, np.float32).dtype == np.float32
    parts = list(fun.chunks())
    assert len(parts) > 1
    np.testing.assert_array_equal(np.concatenate(parts), fun)
    np.testing.assert_allclose(0.5 * np.nansum((fun / SIGMA) ** 2), result.cost, rtol=1e-12)
    assert "computed when asked for" in repr(fun)


def test_residuals_of_a_field_have_its_shape():
    t = np.linspace(0, 3, 40)
    z = np.arange(5.0)
    values = np.exp(-t)[:, None] * (1 + z)
    ds = xr.Dataset({"v": (("t", "z"), values)}, coords={"t": t, "z": z})
    options = HybridStreamingConfig(chunk_size=60)
    result = fit_dataset(ds, lambda t, z, r: jnp.exp(-r * t) * (1 + z), config=options)
    residuals = np.asarray(result.fun)
    assert residuals.shape == values.shape
    np.testing.assert_allclose(residuals, 0, atol=1e-8)


def test_a_pickled_result_has_no_data():
    result = fit((T, Y), problems.decay, START)
    again = pickle.loads(pickle.dumps(result))
    assert again["fun"] is None
    np.testing.assert_array_equal(again["x"], result["x"])
    assert result["fun"] is not None


# -- properties


def test_properties_before_and_after_a_fit():
    optimizer = AdaptiveHybridStreamingOptimizer()
    assert optimizer.phase_status == {
        "current_phase": 0,
        "phase_name": "normalization",
        "phase_history": [],
        "total_phases": 4,
    }
    for name in ("normalizer", "normalized_bounds", "normalization_jacobian"):
        assert getattr(optimizer, name) is None
    assert optimizer.best_params_global is None
    assert optimizer.best_cost_global == np.inf
    assert optimizer.multistart_diagnostics is None
    result = optimizer.fit((T, Y), problems.decay, START)
    assert optimizer.current_phase == 3
    assert optimizer.phase_status["phase_name"] == "covariance"
    assert optimizer.phase_history == result["streaming_diagnostics"]["phase_history"]
    assert optimizer.best_params_global is result.popt
    assert optimizer.best_cost_global == result.cost


def test_residual_weights_act_from_the_next_fit():
    optimizer = AdaptiveHybridStreamingOptimizer()
    optimizer.set_residual_weights([1.0, 2.0])
    assert optimizer.config.enable_residual_weighting
    assert optimizer.config.residual_weights == (1.0, 2.0)
    with pytest.raises(ValueError, match="`residual_weights`"):
        optimizer.set_residual_weights([-1.0])


def test_verbose_is_of_one_fit(caplog):
    optimizer = AdaptiveHybridStreamingOptimizer(HybridStreamingConfig(verbose=0))
    result = optimizer.fit((T, Y), problems.decay, START, verbose=2)
    assert result.diagnostics["config"]["verbose"] == 2
    assert optimizer.config.verbose == 0


def test_callback_sees_each_pass():
    seen = []
    result = fit((T, Y), problems.decay, START, callback=seen.append)
    assert [record.num_passes for record in seen if record.num_passes] == list(
        range(1, result.num_passes + 1)
    )


def test_curve_fit_goes_the_same_way():
    popt, _ = curve_fit(problems.decay, T, Y, START, method="hybrid_streaming")
    np.testing.assert_array_equal(popt, curve_fit(problems.decay, T, Y, START)[0])


def test_the_normalizer_of_the_last_fit_is_that_of_its_warmup():
    optimizer = AdaptiveHybridStreamingOptimizer()
    assert optimizer.normalizer is None
    t = np.linspace(0.0, 10.0, 200)
    y = 2.0 * np.exp(-0.5 * t)
    optimizer.fit(
        (t, y), lambda x, a, b: a * jnp.exp(-b * x), [1.5, 0.4], ([0, -np.inf], [4, np.inf])
    )
    lower, upper = optimizer.normalized_bounds
    np.testing.assert_allclose(lower, [0.0, -np.inf])
    np.testing.assert_allclose(upper, [1.0, np.inf])
    np.testing.assert_allclose(optimizer.normalization_jacobian, np.diag([4.0, 0.4]))
    np.testing.assert_allclose(optimizer.normalizer.normalize(np.array([2.0, 0.4])), [0.5, 1.0])
