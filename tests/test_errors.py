"""Bad input: a clear error before any pass where it can be seen, an honest status where not."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import xarray as xr
import zarr

from nlsq_dask import Chunk, HybridStreamingConfig, Status, fit_dataset

ROWS = 50
T = np.linspace(0.0, 1.0, ROWS)
RNG = np.random.default_rng(2)
Y = 2 * T + 1 + 0.01 * RNG.normal(size=ROWS)


def line(t, a, b):
    return a * t + b


def refuse(block):
    raise AssertionError("the data were read")


def unreadable(**variables):
    """A dataset of which reading `y` is an error of the test."""
    y = da.zeros(ROWS, chunks=ROWS // 2).map_blocks(refuse, dtype=float, meta=np.empty(0))
    return xr.Dataset({"y": ("t", y), **variables}, coords={"t": T})


def readable(y=Y, **variables):
    return xr.Dataset({"y": ("t", y), **variables}, coords={"t": np.linspace(0, 1, len(y))})


def assert_clear(error, *words):
    """One or two sentences that a user can act on, without a type's name around each number."""
    text = str(error)
    assert "np.float64(" not in text
    assert len(text) < 600
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


# -- arguments, seen before anything is read

ARGUMENTS = {
    "unknown loss": ({"loss": "l1"}, ValueError, "`loss`", "'soft_l1'", "'l1'"),
    "a function for a loss": ({"loss": abs}, ValueError, "`loss`", "'huber'", "abs"),
    "negative f_scale": ({"loss": "huber", "f_scale": -1}, ValueError, "`f_scale`", "-1"),
    "NaN for f_scale": ({"loss": "huber", "f_scale": math.nan}, ValueError, "`f_scale`", "nan"),
    "text for f_scale": ({"f_scale": "auto"}, ValueError, "`f_scale`", "'mad'", "'auto'"),
    "unknown covariance": ({"covariance": "HC9"}, ValueError, "`covariance`", "'HC1'", "'HC9'"),
    "two sandwiches": (
        {"covariance": "HC0", "cluster": "t"},
        ValueError,
        "`covariance`",
        "`cluster`",
        "'HC0'",
    ),
    "unknown cluster": ({"cluster": "station"}, ValueError, "`cluster`", "'station'"),
    "number for a cluster": ({"cluster": 3}, TypeError, "`cluster`", "3"),
    "priors of unknown scale": ({"priors": {"a": (1, 2)}}, ValueError, "`priors`", "absolute"),
    "prior of no parameter": (
        {"priors": {"q": (1, 2)}, "absolute_sigma": True},
        ValueError,
        "`priors`",
        "'q'",
    ),
    "prior without width": (
        {"priors": {"a": 1.0}, "absolute_sigma": True},
        ValueError,
        "`priors['a']`",
        "(mean, width)",
    ),
    "prior of no width": (
        {"priors": {"a": (1, 0)}, "absolute_sigma": True},
        ValueError,
        "`priors['a']`",
        "positive",
    ),
    "prior on a fixed parameter": (
        {"priors": {"a": (1, 1)}, "absolute_sigma": True, "fixed": "a"},
        ValueError,
        "`priors`",
        "'a' is fixed",
    ),
    "priors in a list": (
        {"priors": [(1, 1)], "absolute_sigma": True},
        TypeError,
        "`priors`",
        "[(1, 1)]",
    ),
    "prior of another shape": (
        {"priors": {"a": ([1, 2], 1)}, "absolute_sigma": True},
        ValueError,
        "`priors['a']`",
        "(2,)",
    ),
    "tie that is text": ({"ties": {"b": "2 * a"}}, TypeError, "`ties['b']`", "lambda a: 2 * a"),
    "ties in a list": ({"ties": ["b"]}, TypeError, "`ties`", "['b']"),
    "tie of no parameter": ({"ties": {"q": lambda a: a}}, ValueError, "`ties`", "'q'"),
    "tie to no parameter": ({"ties": {"b": lambda q: q}}, ValueError, "`ties['b']`", "'q'"),
    "tie by NumPy": ({"ties": {"b": lambda a: np.sin(a)}}, TypeError, "`ties['b']`", "jax.numpy"),
    "tie that raises": ({"ties": {"b": lambda a: a.no}}, TypeError, "`ties['b']`", "'no'"),
    "tie to itself": ({"ties": {"b": lambda b: b}}, ValueError, "`ties`", "circle"),
    "ties in a circle": (
        {"ties": {"b": lambda a: a, "a": lambda b: b}},
        ValueError,
        "`ties`",
        "circle",
    ),
    "start of a tied parameter": (
        {"ties": {"b": lambda a: a}, "p0": {"b": 1.0}},
        ValueError,
        "`p0`",
        "'b'",
    ),
    "bounds of a tied parameter": (
        {"ties": {"b": lambda a: a}, "bounds": {"b": (0, 1)}},
        ValueError,
        "`bounds`",
        "'b'",
    ),
    "fixed and tied": ({"ties": {"b": lambda a: a}, "fixed": "b"}, ValueError, "`fixed`", "'b'"),
    "tie to NaN": ({"ties": {"b": lambda a: a - math.inf}}, ValueError, "`ties['b']`", "inf"),
    "group beyond the parameters": (
        {
            "config": HybridStreamingConfig(
                enable_group_variance_regularization=True, group_variance_indices=[(1, 3)]
            )
        },
        ValueError,
        "`group_variance_indices`",
        "(1, 3)",
    ),
    "p0 outside bounds": ({"p0": {"a": 7}, "bounds": {"a": (0, 5)}}, ValueError, "`p0", "7", "5"),
    "NaN in p0": ({"p0": {"a": math.nan}}, ValueError, "`p0", "'a'", "nan"),
    "NaN in p0's sequence": ({"p0": [1, math.nan]}, ValueError, "`p0", "'b'", "nan"),
    "infinite p0": ({"p0": [1, math.inf]}, ValueError, "`p0", "inf"),
    "None in p0": ({"p0": {"a": None}}, ValueError, "`p0", "None"),
    "text in p0": ({"p0": {"a": "1"}}, ValueError, "`p0", "'1'"),
    "complex p0": ({"p0": [1j, 1]}, ValueError, "`p0", "1j"),
    "empty array in p0": ({"p0": {"a": []}}, ValueError, "`p0", "[]"),
    "ragged p0": ({"p0": {"a": [[1, 2], [3]]}}, ValueError, "`p0", "'a'"),
    "p0 too long": ({"p0": [1, 2, 3]}, ValueError, "`p0`", "2", "3"),
    "p0 too short": ({"p0": [1]}, ValueError, "`p0`", "2", "1"),
    "scalar p0": ({"p0": 1.0}, ValueError, "`p0`"),
    "0-d p0": ({"p0": np.array(1.0)}, ValueError, "`p0`"),
    "p0 without order": ({"p0": {1.0, 2.0}}, (ValueError, TypeError), "`p0`"),
    "string p0": ({"p0": "ab"}, ValueError, "`p0`", "'ab'"),
    "unknown name in p0": ({"p0": {"q": 1}}, ValueError, "`p0`", "'q'", "'a'"),
    "unknown name in bounds": ({"bounds": {"q": (0, 1)}}, ValueError, "`bounds`", "'q'", "'a'"),
    "unknown name in fixed": ({"fixed": ("q",)}, ValueError, "`fixed`", "'q'", "'a'"),
    "fixed by position": ({"fixed": [0]}, ValueError, "`fixed`", "'a'"),
    "fixed None": ({"fixed": None}, (ValueError, TypeError), "`fixed`"),
    "all fixed": ({"fixed": ("a", "b")}, ValueError, "`fixed`", "'a'"),
    "lower above upper": ({"bounds": {"a": (5, 0)}}, ValueError, "`bounds", "5", "0"),
    "lower equals upper": ({"bounds": {"a": (1, 1)}}, ValueError, "`bounds", "`fixed`"),
    "NaN bound": ({"bounds": {"a": (math.nan, 1)}}, ValueError, "`bounds", "nan"),
    "three bounds": ({"bounds": {"a": (0, 1, 2)}}, ValueError, "`bounds['a']`", "(0, 1, 2)"),
    "one bound": ({"bounds": {"a": 1}}, ValueError, "`bounds['a']`"),
    "text as bounds": ({"bounds": {"a": "01"}}, ValueError, "`bounds['a']`", "'01'"),
    "bounds a number": ({"bounds": 3}, (ValueError, TypeError), "`bounds`", "3"),
    "bounds too long": ({"bounds": ([0] * 3, [1] * 3)}, ValueError, "`bounds`", "2", "3"),
    "bounds of another shape": (
        {"p0": {"a": [1, 1]}, "bounds": {"a": ([0, 0, 0], 1)}, "model": lambda t, a, b: a[0] * t},
        ValueError,
        "`bounds['a']`",
        "(2,)",
        "(3,)",
    ),
    "unknown x": ({"x": "q"}, ValueError, "`x`", "'q'", "'t'"),
    "too many x": ({"x": ("t",) * 4}, ValueError, "`x`", "'a'"),
    "x a number": ({"x": 3}, (ValueError, TypeError), "`x`", "3"),
    "unknown y": ({"y": "q"}, ValueError, "`y`", "'q'", "'t'"),
    "y an array": ({"y": Y}, TypeError, "`y`", "DataArray"),
    "y with other coordinates": (
        {"y": xr.DataArray(Y, dims="t", coords={"t": T + 1})},
        ValueError,
        "`y`",
        "'t'",
    ),
    "y of another length": ({"y": xr.DataArray(Y[:3], dims="t")}, ValueError, "`y`", "3", "50"),
    "y over other dimensions": ({"y": xr.DataArray(Y, dims="u")}, ValueError, "`t`", "`y`", "'u'"),
    "unknown sigma": ({"sigma": "q"}, ValueError, "`sigma`", "'q'", "'t'"),
    "sigma a negative number": ({"sigma": -0.1}, ValueError, "`sigma`", "positive", "-0.1"),
    "sigma a list": ({"sigma": [0.1]}, TypeError, "`sigma`", "0.1"),
    "sigma of text": (
        {"sigma": xr.DataArray(["1"] * ROWS, dims="t")},
        ValueError,
        "`sigma`",
        "real numbers",
    ),
    "unknown where": ({"where": "q"}, ValueError, "`where`", "'q'", "'t'"),
    "where not boolean": ({"where": xr.DataArray(T, dims="t")}, ValueError, "`where`", "float64"),
    "where over other dimensions": (
        {"where": xr.DataArray(T > 0, dims="u")},
        ValueError,
        "`where`",
        "`y`",
        "'u'",
    ),
    "unknown nan_policy": ({"nan_policy": "drop"}, ValueError, "`nan_policy`", "'omit'", "'drop'"),
    "time_units without times": ({"time_units": "days"}, ValueError, "`time_units`", "'t'"),
    "storage_options without a URL": (
        {"storage_options": {"anon": True}},
        ValueError,
        "`storage_o",
    ),
    "config a dict": ({"config": {"seed": 1}}, TypeError, "`config`", "{'seed': 1}"),
    "client an address": ({"client": "tcp://host:1"}, TypeError, "`client`", "tcp://host:1"),
    "callback not callable": ({"callback": 3}, TypeError, "`callback`", "3"),
    "jac not callable": ({"jac": "2-point"}, TypeError, "`jac`", "2-point"),
    "jac of too few arrays": ({"jac": lambda t, a, b: (t,)}, ValueError, "`jac`", "2", "1"),
    "jac with parameters first": (
        {"jac": lambda t, a, b: jnp.stack([t, 0 * t])},
        ValueError,
        "`jac`",
        "last axis",
    ),
    "jac in NumPy": ({"jac": lambda t, a, b: (np.sin(t), 1.0)}, TypeError, "`jac`"),
    "ds a DataArray": ({"ds": readable().y}, TypeError, "`ds`", "DataArray"),
    "ds None": ({"ds": None}, TypeError, "`ds`", "NoneType"),
    "y ambiguous": ({"ds": unreadable(z=("t", T))}, ValueError, "`y`", "'y'", "'z'"),
    "no dataset": ({"ds": xr.Dataset()}, ValueError, "`y`"),
    "no rows": ({"ds": readable(Y[:0])}, ValueError, "rows", "(0,)"),
    "name of a variable and of p0": (
        {"ds": unreadable().assign_coords(a=3.0), "p0": {"a": 1}},
        ValueError,
        "`model`",
        "'a'",
        "`x=`",
    ),
    "name of a variable and of fixed": ({"fixed": ["t"]}, ValueError, "`model`", "'t'", "`x=`"),
    "variable over a foreign dimension": (
        {"ds": unreadable(z=("u", [1.0, 2])), "y": "y", "model": lambda t, z, a: a * z},
        ValueError,
        "`z`",
        "`y`",
        "'u'",
    ),
    "unknown chunk sizes": (
        {"ds": xr.Dataset({"y": ("t", da.zeros(9)[da.zeros(9) > 0])}), "y": "y"},
        ValueError,
        "`y`",
        "compute_chunk_sizes()",
    ),
}


@pytest.mark.parametrize("mistake", ARGUMENTS)
def test_arguments(mistake):
    options, kind, *words = ARGUMENTS[mistake]
    with pytest.raises(kind) as raised:
        fit_dataset(**{"ds": unreadable(), "model": line, **options})
    assert_clear(raised.value, *words)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (np.array([1, 2, "a"], object), "object"),
        (np.array(["1", "2", "3"]), "<U1"),
        (np.array([1j, 2, 3]), "complex128"),
        (np.array(["2000", "2001", "2002"], "M8[ns]"), "datetime64[ns]"),
    ],
    ids=["object", "text", "complex", "times"],
)
def test_dtypes_that_cannot_be_fitted(values, word):
    with pytest.raises(ValueError, match="`y`") as raised:
        fit_dataset(xr.Dataset({"y": ("r", values), "t": ("r", np.arange(3))}), line, y="y")
    assert_clear(raised.value, word)
    if values.dtype.kind == "M":
        return
    with pytest.raises(ValueError, match="`t`") as raised:
        fit_dataset(xr.Dataset({"t": ("r", values), "y": ("r", np.arange(3))}), line, y="y")


@pytest.mark.parametrize(
    "units", ["months", "hours since", "days since yesterday", "days since 2000-13-01", "3", 3]
)
@pytest.mark.parametrize("calendar", ["numpy", "noleap"])
def test_time_units(units, calendar):
    times = xr.date_range("2000-01-01", periods=3, calendar="standard", use_cftime=False)
    if calendar == "noleap":
        times = xr.date_range("2000-01-01", periods=3, calendar=calendar, use_cftime=True)
    ds = xr.Dataset({"y": ("t", np.zeros(3))}, coords={"t": times})
    with pytest.raises(ValueError, match="`time_units`") as raised:
        fit_dataset(ds, line, time_units=units)
    assert_clear(raised.value, str(units))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["max_warmup_iterations", "seed"], [-1, 1.5, "1", True, None]),
        *itertools.product(
            ["lbfgs_history_size", "gauss_newton_max_iterations"], [0, 2.0, "1", True, None]
        ),
        *itertools.product(["chunk_size", "max_passes"], [0, -1, 2.0, "1", True]),
        *itertools.product(["cache_bytes"], [-1, 1e9, "1 GB", True]),
        *itertools.product(
            ["trust_region_initial", "distance_tol", "max_sample_fraction"],
            [0, -1.0, math.nan, math.inf, "1", True, None],
        ),
        *itertools.product(
            ["ftol", "xtol", "gtol", "max_seconds"], [0, -1.0, math.nan, math.inf, "1", True]
        ),
        ("max_sample_fraction", 1.5),
        ("prefetch", 1),
        ("prefetch", None),
    ],
)
def test_config(name, value):
    with pytest.raises(ValueError, match=f"`{name}`") as raised:
        HybridStreamingConfig(**{name: value})
    assert_clear(raised.value, repr(value))


def test_config_takes_numpys_numbers():
    config = HybridStreamingConfig(chunk_size=np.int64(7), ftol=np.float32(0.5), seed=np.uint8(3))
    assert (config.chunk_size, config.ftol, config.seed) == (7, 0.5, 3)


# -- stores


@pytest.mark.parametrize("name", ["nothing.zarr", "nothing.nc", "folder"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_no_store(tmp_path, name, scheme):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="`ds`") as raised:
        fit_dataset(f"{scheme}{tmp_path / name}", line)
    assert_clear(raised.value, name)


@pytest.mark.parametrize("name", ["text.nc", "text.zarr"])
def test_text_is_not_a_store(tmp_path, name):
    path = tmp_path / name
    path.write_text("year,flux\n2000,1\n")
    with pytest.raises(ValueError, match="`ds`") as raised:
        fit_dataset(path, line)
    assert_clear(raised.value, name, "Zarr", "HDF5")


def test_a_zarr_array_is_not_a_group(tmp_path):
    zarr.save_array(tmp_path / "array.zarr", np.arange(3.0))
    with pytest.raises(ValueError, match="`ds`") as raised:
        fit_dataset(tmp_path / "array.zarr", line)
    assert_clear(raised.value, "array.zarr", "group")


def test_storage_options_with_a_local_path(tmp_path):
    readable().to_zarr(tmp_path / "local.zarr", consolidated=False)
    with pytest.raises(ValueError, match="`storage_options`") as raised:
        fit_dataset(tmp_path / "local.zarr", line, storage_options={"anon": True})
    assert_clear(raised.value, "local.zarr", "anon")


def test_unknown_protocol():
    with pytest.raises(ValueError, match="`ds`") as raised:
        fit_dataset("nowhere://bucket/key.zarr", line)
    assert_clear(raised.value, "nowhere")


# -- models, traced before anything is read


class Counter:
    calls = 0

    def __call__(self, t, a, b):
        self.calls += 1
        return a * t + b * self.calls


def branches(t, a, b):
    return a * t if a > 0 else b * t


MODELS = {
    "result shorter than y": (lambda t, a, b: (a * t + b)[1:], ValueError, "shape"),
    "result of two rows": (lambda t, a, b: jnp.stack([a * t, b * t]), ValueError, "shape"),
    "a parameter along the rows": (lambda t, a, b: t * jnp.zeros(3) * a, TypeError, "shapes"),
    "complex": (lambda t, a, b: a * t + 1j * b, ValueError, "real", "complex128"),
    "None": (lambda t, a, b: None, ValueError, "None"),
    "text": (lambda t, a, b: "y", ValueError, "'y'"),
    "random": (lambda t, a, b: a * t + b + np.random.default_rng().normal(), ValueError, "pure"),
    "counting": (Counter(), ValueError, "pure"),
    "NumPy ufunc of a variable": (lambda t, a, b: a * np.sin(t) + b, TypeError, "jax.numpy"),
    "NumPy ufunc of a parameter": (lambda t, a, b: np.sin(a) * t + b, TypeError, "jax.numpy"),
    "branch on a value": (branches, TypeError, "branch", "branches(t, a, b)"),
    "math": (lambda t, a, b: math.exp(a) * t + b, TypeError, "jax.numpy"),
    "float()": (lambda t, a, b: float(a) * t + b, TypeError, "jax.numpy"),
    "*args": (lambda t, *p: p[0] * t, ValueError, "*"),
    "required keyword": (lambda t, a, *, b: a * t + b, ValueError, "keyword-only", "'b'"),
    "no parameters": (lambda t: t, ValueError, "parameter"),
    "no arguments": (lambda: 1.0, ValueError, "parameter"),
    "parameters first": (lambda a, t, b: a * t + b, ValueError, "before", "'t'"),
    "not callable": (3, TypeError, "callable", "3"),
    "no signature": (max, ValueError, "signature"),
}


@pytest.mark.parametrize("mistake", MODELS)
def test_models(mistake):
    model, kind, *words = MODELS[mistake]
    with pytest.raises(kind, match="`model`") as raised:
        fit_dataset(unreadable(), model)
    assert_clear(raised.value, *words)


@pytest.mark.parametrize("size", range(1, 9))
def test_an_array_parameter_along_the_rows_is_found_for_any_length(size):
    """The lengths that the model is traced with must not happen to fit."""
    if size == 1:  # broadcasts in truth
        return
    with pytest.raises(TypeError, match="`model`"):
        fit_dataset(unreadable(), lambda t, c: c * t, p0={"c": np.ones(size)})


def test_transposed_grid():
    y = da.zeros((6, 6), chunks=3).map_blocks(refuse, dtype=float, meta=np.empty((0, 0)))
    ds = xr.Dataset({"y": (("u", "v"), y)}, coords={"u": np.arange(6.0), "v": np.arange(6.0)})
    with pytest.raises(ValueError, match="`model`") as raised:
        fit_dataset(ds, lambda u, v, a: a * (u * v).T)
    assert_clear(raised.value, "shape")


def test_errors_of_the_users_own_pass_through():
    with pytest.raises(ZeroDivisionError):
        fit_dataset(unreadable(), lambda t, a, b: 1 / 0)
    with pytest.raises(NameError, match="misspelt"):
        fit_dataset(unreadable(), lambda t, a, b: misspelt * t)


@pytest.mark.parametrize(
    "model",
    [
        lambda t, a, b: a * (t - t.mean()) + b,
        lambda t, a, b: a * jnp.cumsum(t) + b,
        lambda t, a, b: a * jnp.sum(t) + b,
        lambda t, a, b: a * t / t.shape[0] + b,
        lambda t, a, b: a * jnp.sort(t)[::-1] + b,
        lambda t, a, b=0.0: a * t + b * (t - t.mean()),  # invisible where the start is zero
    ],
    ids=["mean", "cumsum", "sum", "length", "order", "mean, zero at the start"],
)
def test_models_that_mix_rows(model):
    with pytest.raises(ValueError, match="`model` must be elementwise"):
        fit_dataset(readable(), model)


# -- data, seen when read


@pytest.mark.parametrize(
    ("ds", "options", "words"),
    [
        (readable(np.full(5, np.nan)), {}, ["`ds`", "5 rows"]),
        (readable(), {"where": xr.DataArray(np.zeros(ROWS, bool), dims="t")}, ["`ds`", "50 rows"]),
        (readable(s=("t", np.full(ROWS, np.nan))), {"y": "y", "sigma": "s"}, ["`ds`"]),
        (readable(s=("t", np.zeros(ROWS))), {"y": "y", "sigma": "s"}, ["`sigma`", "0.0"]),
        (readable(s=("t", -Y)), {"y": "y", "sigma": "s"}, ["`sigma`", "-"]),
        (readable(np.where(T > 0.9, np.nan, Y)), {"nan_policy": "raise"}, ["nan_policy", "5 rows"]),
        (readable(np.where(T > 0.9, np.inf, Y)), {"nan_policy": "raise"}, ["nan_policy", "5 rows"]),
    ],
    ids=["all NaN", "nothing selected", "NaN sigma", "zero sigma", "negative", "NaN", "infinity"],
)
def test_data(ds, options, words):
    with pytest.raises(ValueError, match="`") as raised:
        fit_dataset(ds, line, **options)
    assert_clear(raised.value, *words)


MANY = 200_000
CONFIG = HybridStreamingConfig(chunk_size=400)  # 500 chunks, of which the sample reads 128
BLEMISH = 199_999


def blemished(value, beside):
    values = np.full(MANY, beside)
    values[BLEMISH] = value
    return ("t", values)


def many(**variables):
    t = np.linspace(0, 1, MANY)
    y = 2 * t + 1 + np.sin(1e4 * t)
    return xr.Dataset({"y": ("t", y), **variables}, coords={"t": t})


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("has_missing", [False, True])
def test_a_bad_sigma_that_the_sample_misses(value, has_missing):
    ds = many(s=blemished(value, 1.0))
    if has_missing:  # in every chunk, which is none's fault
        ds.y[::100] = np.nan
    with pytest.raises(ValueError, match="`sigma`") as raised:
        fit_dataset(ds, line, y="y", sigma="s", config=CONFIG)
    assert_clear(raised.value, "1 rows", "[499]")


def test_nan_that_the_sample_misses():
    ds = many(extra=blemished(np.nan, 1.0))
    ds["y"] = ds.y * ds.extra
    with pytest.raises(ValueError, match="nan_policy") as raised:
        fit_dataset(ds, line, y="y", nan_policy="raise", config=CONFIG)
    assert_clear(raised.value, "1 rows", "all of the data")


@dataclass(frozen=True)
class Broken:
    """A source whose chunks are not what its attributes say."""

    how: str
    num_chunks: int = 4
    num_rows: int = 4 * ROWS
    chunk_shape: tuple[int, ...] = (ROWS,)
    variables: tuple[str, ...] = ("t",)

    def read(self, index):
        if self.how == "tuple":
            return (T, Y)
        if self.how == "two variables":
            return Chunk(x=(T, T), y=Y)
        if self.how == "short variable":
            return Chunk(x=(T[:-1],), y=Y)
        return Chunk(x=(np.tile(T, 2),), y=np.tile(Y, 2))


@pytest.mark.parametrize("how", ["tuple", "two variables", "short variable", "long chunk"])
def test_broken_sources(how):
    with pytest.raises((ValueError, TypeError), match="`ds`"):
        fit_dataset(Broken(how), line)


def test_source_without_chunks():
    with pytest.raises(ValueError, match="`ds` must have at least one chunk"):
        fit_dataset(Broken("", num_chunks=0), line)
    with pytest.raises(ValueError, match="`y` must not be given with a Source"):
        fit_dataset(Broken(""), line, y="y")


# -- a fit that cannot succeed says so


def test_product_of_two_parameters_is_not_identified():
    with pytest.warns(scipy.optimize.OptimizeWarning, match="1 of 2"):
        result = fit_dataset(readable(), lambda t, a, b: a * b * t)
    assert result.status is Status.UNIDENTIFIED
    assert not result.success
    assert result.rank == 1
    assert np.isinf(result.perr).all()
    np.testing.assert_allclose(result.popt.prod(), T @ Y / (T @ T), rtol=1e-8)
    assert not result.summary().lower().startswith("converged")


def test_parameter_without_influence_leaves_the_others_their_errors():
    with pytest.warns(scipy.optimize.OptimizeWarning):
        result = fit_dataset(readable(), lambda t, a, b, c: a * t + b)
    assert result.status is Status.UNIDENTIFIED
    assert np.isinf(result.perr).tolist() == [False, False, True]


@pytest.mark.parametrize(
    "model",
    [lambda t, a, b: a * t + b + jnp.nan, lambda t, a, b: a * t + b * jnp.sqrt(t - 0.9)],
    ids=["everywhere", "in some rows"],
)
def test_model_that_is_not_finite(model):
    with warnings.catch_warnings():
        # Not "the data do not determine": nothing was found out about the data.
        warnings.filterwarnings("error", message=".*determine")
        result = fit_dataset(readable(), model)
    assert result.status is Status.NOT_FINITE
    assert not result.success
    assert np.isinf(result.perr).all()
    assert "not finite" in result.message
    np.testing.assert_array_equal(result.popt, [1.0, 1.0])


def test_more_parameters_than_rows():
    with pytest.warns(scipy.optimize.OptimizeWarning):
        result = fit_dataset(readable(Y[:1]), line)
    assert not result.success
    assert np.isinf(result.perr).all()
