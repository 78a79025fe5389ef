"""NLSQ's doors: the same fit behind each, and scripts whose import alone was changed."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import textwrap

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import problems
from nlsq_dask import HybridStreamingConfig
from nlsq_dask.compat import (
    CurveFit,
    LargeDatasetFitter,
    LDMemoryConfig,
    StreamingConfig,
    StreamingOptimizer,
    curve_fit,
    curve_fit_large,
)
from nlsq_dask.errors import SpoolLimitError, WorkerError

NUM_ROWS = 900
X, Y = problems.make_decay(NUM_ROWS, seed=8)
SIGMA = 0.05 + 0.01 * X
START = list(problems.P0.values())
BOUNDS = ([0.0, 0.0, -1.0], [9.0, 9.0, 1.0])


def stream(optimizer, sigma=False):
    with optimizer:
        for part in np.array_split(np.arange(NUM_ROWS), 4):
            optimizer.update(X[part], Y[part], *([SIGMA[part]] if sigma else []))
        return optimizer.result()


DOORS = {
    "curve_fit": lambda **options: curve_fit(problems.decay, X, Y, START, **options),
    "curve_fit_large": lambda **options: curve_fit_large(problems.decay, X, Y, START, **options),
    "CurveFit": lambda **options: CurveFit(problems.decay, X, Y, START, **options).fit(),
    "CurveFit().curve_fit": lambda **options: CurveFit().curve_fit(
        problems.decay, X, Y, p0=START, **options
    ),
    "LargeDatasetFitter": lambda **options: LargeDatasetFitter(
        problems.decay, X, Y, START, memory_config=LDMemoryConfig(min_chunk_size=100), **options
    ).fit(),
    "StreamingOptimizer": lambda **options: stream(
        StreamingOptimizer(problems.decay, START, StreamingConfig(batch_size=200), **options)
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("options", [{}, {"bounds": BOUNDS, "loss": "linear"}], ids=str)
def test_every_door_gives_the_exact_fit(door, options):
    expected = problems.scipy_decay(X, Y)
    result = DOORS[door](**options)
    popt, pcov = result
    assert result.success
    assert expected.distance(popt) < 1e-6
    np.testing.assert_allclose(pcov, expected.pcov, rtol=1e-5)
    assert result.popt is popt is result["x"] is result[0]
    assert result["rate"] == popt[1]
    assert "perr" in result
    assert result.message == result.result.message


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "`method`", {"method": "newton"}),
        (ValueError, "`loss`", {"loss": "least"}),
        (TypeError, "step_length", {"step_length": 1.0}),
        (TypeError, "`client`", {"client": "tcp://127.0.0.1:1"}),
        (ValueError, "`bounds`", {"bounds": 3}),
    ],
    ids=str,
)
def test_mistakes_are_named_at_every_door(door, error, match, options):
    with pytest.raises(error, match=match):
        DOORS[door](**options)


def test_sigma_and_tolerances_and_verbosity_arrive():
    expected = problems.scipy_decay(X, Y, SIGMA, absolute_sigma=True)
    options = {"absolute_sigma": True, "ftol": 1e-12, "max_nfev": 77, "verbose": 2}
    fits = [
        curve_fit(problems.decay, X, Y, START, SIGMA, **options),
        CurveFit(problems.decay, X, Y, START, sigma=SIGMA, **options).fit(),
        stream(StreamingOptimizer(problems.decay, START, **options), sigma=True),
    ]
    for result in fits:
        assert expected.distance(result.popt) < 1e-6
        np.testing.assert_allclose(result.pcov, expected.pcov, rtol=1e-5)
        config = result.diagnostics["config"]
        assert config["ftol"] == 1e-12
        assert config["gauss_newton_max_iterations"] == 77
        assert config["verbose"] == 2


def test_rows_come_first():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(500, 2))
    y = 2.0 * x[:, 0] - x[:, 1] + 0.1 * rng.normal(size=500)

    def plane(x, a, b):
        return a * x[:, 0] + b * x[:, 1]

    expected = np.linalg.lstsq(x, y)[0]
    np.testing.assert_allclose(curve_fit(plane, x, y).popt, expected, rtol=1e-8)
    with StreamingOptimizer(plane) as optimizer:
        optimizer.update(x[:100], y[:100])
        optimizer.update(x[100:], y[100:])
        np.testing.assert_allclose(optimizer.result().popt, expected, rtol=1e-8)


def test_functions_raise_where_methods_return():
    options = {"config": HybridStreamingConfig(max_passes=1, max_sample_fraction=1e-3)}
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 10, 60_000)
    y = problems.decay_numpy(x, problems.TRUTH) + 0.3 * np.sin(x) + rng.normal(size=x.size)
    with pytest.raises(RuntimeError, match="Optimal parameters not found"):
        curve_fit(problems.decay, x, y, START, **options)
    assert not CurveFit(problems.decay, x, y, START, **options).fit().success


def test_a_fit_needs_data():
    with pytest.raises(TypeError, match="`CurveFit`"):
        CurveFit(problems.decay).fit()


def test_a_result_is_copied_and_pickled():
    result = curve_fit(problems.decay, X, Y, START)
    for again in (copy.copy(result), pickle.loads(pickle.dumps(result))):
        np.testing.assert_array_equal(again.popt, result.popt)
        assert len(again) == 2
    assert repr(result) == repr(result.result)
    assert str(result) == result.summary()
    with pytest.raises(AttributeError, match="nothing"):
        result.nothing  # noqa: B018


# -- large


def test_parts_are_not_fitted_alone():
    """Rows in the order of `x`: most chunks cannot tell the rate, and their mean is far off."""
    rng = np.random.default_rng(4)
    x = np.sort(rng.uniform(0.0, 12.0, 4000))
    y = problems.decay_numpy(x, [2.0, 0.8, 0.0]) + 0.05 * rng.normal(size=x.size)

    def numpy_model(x, a, b):
        return a * np.exp(-b * x)

    def model(x, a, b):
        return a * jnp.exp(-b * x)

    whole, whole_cov = scipy.optimize.curve_fit(numpy_model, x, y, [1.0, 1.0], bounds=(0, 9))
    chunks = zip(np.array_split(x, 8), np.array_split(y, 8), strict=True)
    alone = [
        scipy.optimize.curve_fit(numpy_model, *chunk, [1.0, 1.0], bounds=(0, 9))[0]
        for chunk in chunks
    ]
    errors = np.sqrt(np.diag(whole_cov))
    assert np.max(np.abs(np.mean(alone, axis=0) - whole) / errors) > 100
    memory = LDMemoryConfig(max_memory_gb=1e-6, min_chunk_size=500)
    result = LargeDatasetFitter(
        model, x, y, [1.0, 1.0], memory_config=memory, bounds=(0, 9)
    ).fit_with_progress()
    assert result.diagnostics["plan"]["num_leaves"] == 8
    np.testing.assert_array_less(np.abs(result.popt - whole) / errors, 1e-3)


def test_memory_is_a_ceiling_on_the_rows_of_a_chunk():
    assert LDMemoryConfig().chunk_size == 8 * 2**20
    assert LDMemoryConfig(max_memory_gb=1e-3).chunk_size == 100_000
    with pytest.raises(ValueError, match="`max_memory_gb`"):
        LDMemoryConfig(max_memory_gb=0)
    with pytest.raises(ValueError, match="`min_chunk_size`"):
        LDMemoryConfig(min_chunk_size=0)


def test_dask_arrays_on_a_cluster(client):
    lazy = [da.from_array(part, chunks=300) for part in (X, Y)]
    result = LargeDatasetFitter(problems.decay, *lazy, START, client=client).fit()
    assert "cluster" in result.diagnostics["evaluator"]
    assert problems.scipy_decay(X, Y).distance(result.popt) < 1e-6


def test_progress_is_shown_and_then_quiet(capsys):
    logger = logging.getLogger("nlsq_dask")
    before = list(logger.handlers), logger.level
    LargeDatasetFitter(problems.decay, X, Y, START).fit_with_progress()
    assert "pass 1: cost" in capsys.readouterr().err
    assert (list(logger.handlers), logger.level) == before
    LargeDatasetFitter(problems.decay, X, Y, START).fit()
    assert capsys.readouterr().err == ""


# -- streams


def test_more_may_follow_a_result(tmp_path):
    half = NUM_ROWS // 2 + 7
    with StreamingOptimizer(
        problems.decay, START, StreamingConfig(batch_size=100), spool=tmp_path
    ) as optimizer:
        optimizer.update(X[:half], Y[:half])
        first = optimizer.result()
        optimizer.update(X[half:], Y[half:])
        second = optimizer.result()
        again = optimizer.result()
    assert problems.scipy_decay(X[:half], Y[:half]).distance(first.popt) < 1e-6
    assert problems.scipy_decay(X, Y).distance(second.popt) < 1e-6
    np.testing.assert_array_equal(again.popt, second.popt)
    assert second.num_rows == NUM_ROWS
    assert not list(tmp_path.iterdir())


def test_closed_is_closed(tmp_path):
    optimizer = StreamingOptimizer(problems.decay, START, spool=tmp_path)
    optimizer.update(X, Y)
    optimizer.close()
    optimizer.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="closed"):
        optimizer.update(X, Y)
    with pytest.raises(ValueError, match="closed"):
        optimizer.result()


def test_the_spool_goes_with_the_optimizer(tmp_path):
    optimizer = StreamingOptimizer(problems.decay, START, spool=tmp_path)
    optimizer.update(X, Y)
    assert list(tmp_path.iterdir())
    del optimizer
    assert not list(tmp_path.iterdir())


def test_a_refused_batch_changes_nothing(tmp_path):
    with StreamingOptimizer(
        problems.decay, START, spool=tmp_path, spool_limit_bytes=16 * NUM_ROWS
    ) as optimizer:
        optimizer.update(X, Y)
        with pytest.raises(SpoolLimitError, match="batch 1"):
            optimizer.update(X, Y)
        with pytest.raises(ValueError, match="batch 1"):
            optimizer.update(X.astype(np.float32), Y)
        assert optimizer.result().num_rows == NUM_ROWS


def test_an_interrupted_update_changes_nothing(tmp_path, monkeypatch):
    with StreamingOptimizer(
        problems.decay, START, StreamingConfig(batch_size=100), spool=tmp_path
    ) as optimizer:
        optimizer.update(X[:250], Y[:250])

        def interrupt(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("zarr.Array.resize", interrupt)
            with pytest.raises(KeyboardInterrupt):
                optimizer.update(X[250:], Y[250:])
        optimizer.update(X[250:], Y[250:])
        result = optimizer.result()
    assert result.num_rows == NUM_ROWS
    assert problems.scipy_decay(X, Y).distance(result.popt) < 1e-6


def test_an_unreachable_spool_is_refused_at_once(client):
    with pytest.raises(WorkerError, match="`spool`"):
        StreamingOptimizer(problems.decay, START, spool="memory://spool", client=client)


def test_workers_fit_a_stream(tmp_path, client):
    optimizer = StreamingOptimizer(
        problems.decay, START, StreamingConfig(batch_size=200), spool=tmp_path, client=client
    )
    result = stream(optimizer)
    assert "store read by the workers" in result.diagnostics["evaluator"]
    assert problems.scipy_decay(X, Y).distance(result.popt) < 1e-6
    assert not [path for path, _, files in os.walk(tmp_path) if files]


@pytest.mark.parametrize("config", [StreamingConfig, {"batch_size": 3}, HybridStreamingConfig()])
def test_a_streaming_config_is_asked_for(config):
    with pytest.raises(TypeError, match="`config`"):
        StreamingOptimizer(problems.decay, START, config)


# -- scripts

SCRIPT = """
    import jax.numpy as jnp
    import numpy as np
    from nlsq import (
        AdaptiveHybridStreamingOptimizer,
        CurveFit,
        HybridStreamingConfig,
        LargeDatasetFitter,
        LDMemoryConfig,
        StreamingConfig,
        StreamingOptimizer,
        curve_fit,
        curve_fit_large,
    )

    def model(x, a, b, c):
        return a * jnp.exp(-b * x) + c

    rng = np.random.default_rng(42)
    x = np.linspace(0, 5, 3000)
    y = np.asarray(model(x, 2.5, 1.3, 0.5)) + rng.normal(0, 0.1, len(x))
    p0 = np.array([2.0, 1.0, 0.0])
    bounds = (np.array([0.0, 0.0, -1.0]), np.array([10.0, 5.0, 2.0]))

    answers = {}
    popt, pcov = curve_fit(model, x, y, p0=p0)
    answers["curve_fit"] = popt
    result = curve_fit(model, x, y, p0=p0, bounds=bounds, method="hybrid_streaming", verbose=0)
    popt, pcov = result
    answers["hybrid"] = result.popt
    perr = np.sqrt(np.diag(pcov))

    answers["class"] = CurveFit(model, x, y, p0, bounds=bounds, method="trf").fit().popt
    popt, pcov = curve_fit_large(model, x, y, p0, bounds=bounds, show_progress=False)
    answers["large"] = popt

    fitter = LargeDatasetFitter(
        model, x, y, p0, memory_config=LDMemoryConfig(max_memory_gb=8.0, min_chunk_size=100_000)
    )
    answers["fitter"] = fitter.fit_with_progress().popt

    config = StreamingConfig(batch_size=100_000, n_epochs=15, optimizer="adam")
    optimizer = StreamingOptimizer(model, p0, config=config)
    for start in range(0, len(x), 1000):
        optimizer.update(x[start : start + 1000], y[start : start + 1000])
    answers["stream"] = optimizer.result()["x"]

    config = HybridStreamingConfig.scientific_default(chunk_size=1000)
    optimizer = AdaptiveHybridStreamingOptimizer(config)
    result = optimizer.fit(data_source=(x, y), func=model, p0=p0, bounds=bounds, verbose=0)
    assert result["success"], result["message"]
    answers["optimizer"] = result["x"]
    chi2 = np.sum(result["fun"] ** 2)
    total = result["streaming_diagnostics"]["total_time"]
    phases = optimizer.phase_status["phase_history"]
"""


def test_a_script_needs_only_another_import():
    script = textwrap.dedent(SCRIPT).replace("from nlsq import", "from nlsq_dask.compat import")
    names = {}
    exec(compile(script, "script.py", "exec"), names)
    x, y = names["x"], names["y"]
    expected, cov = scipy.optimize.curve_fit(
        lambda x, a, b, c: a * np.exp(-b * x) + c, x, y, [2.0, 1.0, 0.0], xtol=1e-12, ftol=1e-12
    )
    for name, popt in names["answers"].items():
        distance = np.max(np.abs(popt - expected) / np.sqrt(np.diag(cov)))
        assert distance < 1e-4, name
    np.testing.assert_allclose(names["perr"], np.sqrt(np.diag(cov)), rtol=1e-4)
    residual = y - problems.decay_numpy(x, expected)
    np.testing.assert_allclose(names["chi2"], np.sum(residual**2), rtol=1e-10)
    assert [phase["phase"] for phase in names["phases"]] == [0, 1, 2, 3]
