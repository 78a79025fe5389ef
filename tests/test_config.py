"""The configuration: checked once, and no field that nothing reads."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from jax.experimental.compilation_cache import compilation_cache

import config_rows_checkpoint
import config_rows_many
import config_rows_warmup
from nlsq_dask import Chunk, FitResult, HybridStreamingConfig, Status, curve_fit, fit_dataset
from problems import decay, make_decay

NAMES = {field.name for field in fields(HybridStreamingConfig)}
PRESETS = {
    "aggressive": {"warmup_iterations": 50, "max_warmup_iterations": 100, "chunk_size": 20_000},
    "conservative": {"gauss_newton_tol": 1e-10, "trust_region_initial": 0.5},
    "memory_optimized": {"chunk_size": 5_000, "cache_bytes": 0, "precision": "mixed"},
    "with_multistart": {"enable_multistart": True, "n_starts": 10},
    "defense_strict": {"max_warmup_step_size": 0.05, "max_warmup_iterations": 60},
    "defense_relaxed": {"warm_start_threshold": 0.5, "max_warmup_iterations": 120},
    "defense_disabled": {"enable_cost_guard": False, "enable_step_clipping": False},
    "scientific_default": {"gauss_newton_max_iterations": 200, "enable_checkpoints": True},
}


# -- the object


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configurations_that_can_be_varied(name):
    preset = getattr(HybridStreamingConfig, name)
    config = preset()
    for option, value in PRESETS[name].items():
        assert getattr(config, option) == value
    assert preset(seed=7, n_starts=3) == replace(config, seed=7, n_starts=3)


def test_it_is_frozen_hashable_and_goes_through_json_and_pickle():
    config = HybridStreamingConfig.aggressive(
        group_variance_indices=[(0, 2)], residual_weights=[1, 2]
    )
    with pytest.raises(AttributeError):
        config.seed = 1
    text = json.dumps(config.as_dict())
    assert HybridStreamingConfig.from_mapping(json.loads(text)) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert len({config, replace(config), replace(config, seed=1)}) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("warmup_learning_rate", "first-order warmup"),
        ("use_learning_rate_schedule", "first-order warmup"),
        ("lr_schedule_warmup_steps", "first-order warmup"),
        ("warmup_lr_refinement", "first-order warmup"),
        ("warmup_lr_careful", "first-order warmup"),
        ("gc_chunk_interval", "there is none"),
        ("loop_strategy", "there is one"),
        ("min_success_rate", "none are ever dropped"),
        ("distence_tol", "did you mean `distance_tol`"),
    ],
)
def test_names_that_are_no_options_are_refused_with_the_reason(name, reason):
    with pytest.raises(TypeError, match=reason):
        HybridStreamingConfig(**{name: 1})
    with pytest.raises(TypeError, match=reason):
        HybridStreamingConfig.from_mapping({name: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"active_switching_criteria": "plateau"},
        {"active_switching_criteria": ("flat",)},
        {"active_switching_criteria": ()},
        {"normalization_strategy": "sqrt"},
        {"lbfgs_line_search": "armijo"},
        {"multistart_sampler": "uniform"},
        {"precision": "float16"},
        {"verbose": 3},
        {"elimination_fraction": 1.5},
        {"residual_weights": [1, -1]},
        {"residual_weights": [0, 0]},
        {"residual_weights": "12"},
        {"enable_residual_weighting": True},
        {"enable_group_variance_regularization": True},
        {"group_variance_indices": [(2, 2)]},
        {"group_variance_indices": [(0, 1, 2)]},
        {"group_variance_indices": 3},
        {"checkpoint_dir": 3},
        {"normalize": 1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(
        ValueError, match="`(" + "|".join([*options, "residual_w", "group_v"]) + ")"
    ):
        HybridStreamingConfig(**options)


# -- what each field changes, beside those of the warmup


def make_dataset(num_rows: int) -> xr.Dataset:
    t, y = make_decay(num_rows)
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


def fit(num_rows: int = 60_000, **options) -> FitResult:
    """More rows than a sample holds, so that there is more than one pass."""
    return fit_dataset(
        make_dataset(num_rows),
        decay,
        y="y",
        p0={"amplitude": 1.5, "rate": 0.4},
        config=HybridStreamingConfig(verbose=0, **options),
    )


def statuses(name: str, value: float) -> bool:
    loose = {"distance_tol": 1e-300, "gauss_newton_tol": 1e-300}
    return fit(**{name: value, **loose}).status is Status[f"CONVERGED_{name.upper()}"]


def chunks_named(validate: bool) -> str:
    def broken(t, a):
        return a * jnp.sqrt(t - 5.0)

    ds = make_dataset(2_000)
    config = HybridStreamingConfig(validate_numerics=validate, chunk_size=500, verbose=0)
    return fit_dataset(ds, broken, y="y", config=config).message


@dataclass(frozen=True)
class RecordingSource:
    """Rows in memory that note the threads which read them, and how often each chunk was read."""

    threads: list
    variables: tuple = ("t",)
    num_chunks: int = 8
    num_rows: int = 80_000
    chunk_shape: tuple = (10_000,)

    def read(self, index):
        self.threads.append((threading.current_thread().name, index))
        t, y = make_decay(self.num_rows)
        rows = slice(index * 10_000, (index + 1) * 10_000)
        return Chunk(x=(t[rows],), y=y[rows])


def readers(**options) -> list[tuple[str, int]]:
    source = RecordingSource(threads=[])
    fit_dataset(source, decay, config=HybridStreamingConfig(verbose=0, **options))
    return source.threads


def is_read_ahead(prefetch: bool) -> bool:
    return any("nlsq-read" in name for name, _ in readers(prefetch=prefetch, cache_bytes=0))


def keeps_what_it_compiles() -> bool:
    """JAX's setting is for the process: this one gets it back."""
    before = jax.config.jax_compilation_cache_dir
    with tempfile.TemporaryDirectory() as folder:
        try:
            t, y = make_decay(500)
            config = HybridStreamingConfig(verbose=0, compilation_cache_dir=folder)
            curve_fit(lambda t, a, b: a / (1.5 + b * t), t, y, config=config)
            return any(Path(folder).iterdir())
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
            compilation_cache.reset_cache()


GROUPS = {"enable_group_variance_regularization": True, "group_variance_lambda": 1.0}
WEIGHTS = {"residual_weights": [1.0, 100.0]}


def group_fit(**options) -> list[float]:
    rng = np.random.default_rng(0)
    g = rng.integers(0, 2, 500).astype(float)
    ds = xr.Dataset({"y": ("row", 1.0 + g + 0.1 * rng.normal(size=500)), "g": ("row", g)})

    def model(g, a, b):
        return a + 0.5 * b + 0 * g

    result = fit_dataset(
        ds, model, y="y", config=HybridStreamingConfig(verbose=0, **options), fixed=("b",)
    )
    return result.popt.tolist()


def variance_fit(**options) -> float:
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 500)
    ds = xr.Dataset({"y": ("x", 1 + 2 * x + 0.1 * rng.normal(size=500))}, coords={"x": x})
    config = HybridStreamingConfig(verbose=0, **options)
    result = fit_dataset(ds, lambda x, a, b, c: a + b * x + c * x**2, y="y", config=config)
    return result["b"] - result["a"]


ROWS: list[tuple[str, Callable[[], bool]]] = [
    (
        "gauss_newton_max_iterations",
        lambda: (
            fit(gauss_newton_max_iterations=1, distance_tol=1e-14).status is Status.MAX_ITERATIONS
        ),
    ),
    (
        "gauss_newton_tol",
        lambda: (
            fit(400, distance_tol=10.0, gauss_newton_tol=1e-12).num_passes
            > fit(400, distance_tol=10.0, gauss_newton_tol=0.1).num_passes
        ),
    ),
    (
        "trust_region_initial",
        lambda: (
            fit(trust_region_initial=0.5).history[0].radius
            < 0.6 * fit(trust_region_initial=1.0).history[0].radius
        ),
    ),
    (
        "distance_tol",
        lambda: (
            fit(distance_tol=10.0, gauss_newton_tol=1.0).num_passes
            < fit(gauss_newton_tol=1.0).num_passes
        ),
    ),
    ("ftol", lambda: statuses("ftol", 0.1)),
    ("xtol", lambda: statuses("xtol", 0.1)),
    ("gtol", lambda: statuses("gtol", 0.1)),
    (
        "enable_group_variance_regularization",
        lambda: (
            variance_fit(**{**GROUPS, "group_variance_indices": [(0, 2)]})
            < 0.9
            < variance_fit(
                group_variance_lambda=1.0,
                group_variance_indices=[(0, 2)],
            )
        ),
    ),
    (
        "group_variance_lambda",
        lambda: (
            variance_fit(
                **{**GROUPS, "group_variance_indices": [(0, 2)], "group_variance_lambda": 100.0}
            )
            < 0.1
        ),
    ),
    (
        "group_variance_indices",
        lambda: (
            variance_fit(**{**GROUPS, "group_variance_indices": [(0, 2)]})
            != variance_fit(**{**GROUPS, "group_variance_indices": [(1, 3)]})
        ),
    ),
    (
        "enable_residual_weighting",
        lambda: (
            group_fit(**WEIGHTS, enable_residual_weighting=True)
            != group_fit(**WEIGHTS, enable_residual_weighting=False)
        ),
    ),
    (
        "residual_weights",
        lambda: (
            group_fit(**WEIGHTS, enable_residual_weighting=True)
            > group_fit(residual_weights=[100.0, 1.0], enable_residual_weighting=True)
        ),
    ),
    ("chunk_size", lambda: fit(chunk_size=10_000).diagnostics["plan"]["num_leaves"] == 6),
    (
        "validate_numerics",
        lambda: "chunks [0, 1]" in chunks_named(True) and "chunks" not in chunks_named(False),
    ),
    ("precision", lambda: fit(precision="float32").popt.tobytes() != fit().popt.tobytes()),
    (
        "max_sample_fraction",
        lambda: (
            fit(max_sample_fraction=0.5).diagnostics["sample"]["num_rows"]
            > fit(max_sample_fraction=0.01).diagnostics["sample"]["num_rows"]
        ),
    ),
    ("cache_bytes", lambda: len(readers(cache_bytes=0)) > len(readers(cache_bytes=2**30)) == 8),
    ("prefetch", lambda: is_read_ahead(True) and not is_read_ahead(False)),
    ("compilation_cache_dir", keeps_what_it_compiles),
    ("max_passes", lambda: fit(max_passes=1, distance_tol=1e-14).status is Status.MAX_PASSES),
    (
        "max_seconds",
        lambda: fit(max_seconds=1e-9, distance_tol=1e-14).status is Status.MAX_SECONDS,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[name for name, _ in ROWS])
def test_the_field_changes_what_its_row_names(row):
    assert row[1]()


@pytest.mark.parametrize("row", config_rows_warmup.ROWS, ids=lambda row: row[0])
def test_the_field_of_the_warmup_changes_what_its_row_names(row):
    assert row[1](config_rows_warmup.fit)


@dataclass(frozen=True)
class FlakySource:
    """A chunk that cannot be read at the first attempts, whichever process makes them."""

    folder: str
    failures: int
    variables: tuple = ("t",)
    num_chunks: int = 4
    num_rows: int = 80_000
    chunk_shape: tuple = (20_000,)

    def read(self, index):
        attempt = len(list(Path(self.folder).iterdir()))
        if index == 3 and attempt < self.failures:
            (Path(self.folder) / str(attempt)).touch()
            raise OSError(f"attempt {attempt} failed")
        t, y = make_decay(self.num_rows)
        rows = slice(index * 20_000, (index + 1) * 20_000)
        return Chunk(x=(t[rows],), y=y[rows])


FAULTS = [
    ("enable_fault_tolerance", {"enable_fault_tolerance": True}, {"enable_fault_tolerance": False}),
    ("max_retries_per_batch", {"max_retries_per_batch": 1}, {"max_retries_per_batch": 0}),
]


@pytest.mark.cluster
@pytest.mark.parametrize(("name", "survives", "fails"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_failed_task_is_tried_again_as_often_as_asked(client, tmp_path, name, survives, fails):
    for folder, options in (("survives", survives), ("fails", fails)):
        (tmp_path / folder).mkdir()
        source = FlakySource(folder=str(tmp_path / folder), failures=1)
        config = HybridStreamingConfig(verbose=0, **options)
        if folder == "fails":
            with pytest.raises(OSError, match="attempt 0 failed"):
                fit_dataset(source, decay, client=client, config=config)
        else:
            assert fit_dataset(source, decay, client=client, config=config).success


def test_every_field_has_its_row():
    covered = {
        *(name for name, _ in ROWS),
        *(name for name, *_ in FAULTS),
        *(name for name, _ in config_rows_warmup.ROWS),
        *(name for name, _ in config_rows_checkpoint.ROWS),
        *(name for name, _ in config_rows_many.ROWS),
    }
    assert covered == NAMES
