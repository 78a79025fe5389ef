"""Mistakes, one a line: what it is, the call, the exception, and its message.

In a message ``…`` stands for anything. Each names the argument, what it must be and what it got.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import cftime
import dask.array as da
import distributed
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr

from nlsq_dask import (
    AdaptiveHybridStreamingOptimizer,
    HybridStreamingConfig,
    compat,
    curve_fit,
    fit_dataset,
)

Row: TypeAlias = tuple[str, Callable[[], Any], type[Exception], str]

ROWS = 50
T = np.linspace(0.0, 1.0, ROWS)
Y = 2 * T + 1 + 0.01 * np.sin(99 * T)
ONES = np.ones(3)
HUGE = 10**400  # no float


class Untouched(distributed.Client):
    """A client that must not be asked for anything."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        if name == "status":
            return "running"
        raise AssertionError(f"work was submitted: the client was asked for {name}")

    def __repr__(self) -> str:
        return "Untouched()"


class Opaque:
    """Nothing can be learnt of it."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = object.__hash__


def line(t: Any, a: Any, b: Any) -> Any:
    return a * t + b


def of_x(x: Any, a: Any, b: Any) -> Any:
    return a * x + b


def refuse(block: Any) -> Any:
    raise AssertionError("the data were read")


def lazy(rows: int = ROWS) -> Any:
    """A Dask array of which no block may be computed."""
    return da.zeros(rows, chunks=25).map_blocks(refuse, dtype=float, meta=np.empty(0))


def unreadable(**variables: Any) -> xr.Dataset:
    return xr.Dataset({"y": ("t", lazy()), **variables}, coords={"t": T})


def over(t: Any, y: Any = Y) -> xr.Dataset:
    """`y` along a variable that is no index."""
    return xr.Dataset({"y": ("row", np.asarray(y)[: len(t)])}, coords={"t": ("row", t)})


def along(values: Any, dim: str = "t") -> xr.DataArray:
    return xr.DataArray(values, dims=dim)


def twice() -> xr.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return xr.Dataset({"y": (("t", "t"), np.ones((5, 5))), "t": np.arange(5.0)})


def fit(**options: Any) -> Callable[[], Any]:
    given = {"ds": unreadable(), "model": line, "client": Untouched(), **options}
    return lambda: fit_dataset(**given)


def accessor(**options: Any) -> Callable[[], Any]:
    return lambda: unreadable().nlsq.fit(line, **{"client": Untouched(), **options})


def arrays(**options: Any) -> Callable[[], Any]:
    given = {"f": of_x, "xdata": T, "ydata": Y, "client": Untouched(), **options}
    return lambda: curve_fit(**given)


def rows(**options: Any) -> Callable[[], Any]:
    given = {"data_source": (T, Y), "func": of_x, "client": Untouched(), **options}
    return lambda: AdaptiveHybridStreamingOptimizer().fit(**given)


def batches(*given: Any, **options: Any) -> Callable[[], Any]:
    return lambda: AdaptiveHybridStreamingOptimizer().fit(iter(given), of_x, **options)


def config(**options: Any) -> Callable[[], Any]:
    return lambda: HybridStreamingConfig(**options)


def mapping(options: Any) -> Callable[[], Any]:
    return lambda: HybridStreamingConfig.from_mapping(options)


def prior(pair: Any) -> Callable[[], Any]:
    return fit(priors={"a": pair}, absolute_sigma=True)


def tie(function: Any) -> Callable[[], Any]:
    return fit(ties={"b": function})


def masked(values: Any) -> Any:
    return np.ma.array(values, mask=np.arange(len(values)) % 2 == 1)


def generated(t: Any, a: Any, b: Any) -> Any:
    yield a * t + b


def absent(t: Any, a: Any = None, b: Any = 1.0) -> Any:
    return a * t + b


def textual(t: Any, a: Any = "x", b: Any = 1.0) -> Any:
    return a * t + b


TIMES = xr.date_range("2000-01-01", periods=ROWS, use_cftime=False)
ZONED = pd.date_range("2000-01-01", periods=ROWS, tz="Europe/Berlin")
TWO_CALENDARS = np.array(
    [cftime.DatetimeNoLeap(2000, 1, 1), cftime.Datetime360Day(2000, 1, 1)], object
)
SEEDS = itertools.count()
MASKED_BLOCKS = da.ma.masked_array(da.ones(ROWS), mask=da.ones(ROWS, dtype=bool))

LOSS = "`loss` must be one of … 'soft_l1' … got "
SCALE = "`f_scale` must be 'mad' or a positive number, … got "
FLAG = "must be True or False, got "
PAIR = "must be (lower, upper)… got "
TRACE = "must return "

# fmt: off
# -- fit_dataset, and ds.nlsq.fit

CRITERIA: list[Row] = [
    ("loss: array", fit(loss=ONES), ValueError, LOSS + "array("),
    ("loss: list", fit(loss=["linear"]), ValueError, LOSS + "['linear']"),
    ("loss: case", fit(loss="Linear"), ValueError, LOSS + "'Linear'"),
    ("loss: object", fit(loss=Opaque()), ValueError, LOSS + "<Opaque instance"),
    ("loss: bytes", accessor(loss=b"huber"), ValueError, LOSS + "b'huber'"),
    ("f_scale: array", fit(f_scale=ONES), ValueError, SCALE + "array("),
    ("f_scale: 0-d array", fit(f_scale=np.array(1.0)), ValueError, SCALE + "array(1.)"),
    ("f_scale: beyond floats", fit(f_scale=HUGE), ValueError, SCALE + "an integer of"),
    ("f_scale: complex", fit(f_scale=1j), ValueError, SCALE + "1j"),
    ("f_scale: boolean", fit(f_scale=True), ValueError, SCALE + "True"),
    ("f_scale: None", fit(f_scale=None), ValueError, SCALE + "None"),
    ("f_scale: decimal", fit(f_scale=Decimal(1)), ValueError, SCALE + "Decimal('1')"),
    ("f_scale: its square is zero", fit(f_scale=1e-200), ValueError, SCALE + "1e-200"),
    ("f_scale: its square is infinite", fit(f_scale=1e200), ValueError, SCALE + "1e+200"),
    ("absolute_sigma: text", fit(absolute_sigma="no"), TypeError, f"`absolute_sigma` {FLAG}'no'"),
    ("absolute_sigma: None", fit(absolute_sigma=None), TypeError, f"`absolute_sigma` {FLAG}None"),
    ("absolute_sigma: 1", accessor(absolute_sigma=1), TypeError, f"`absolute_sigma` {FLAG}1"),
    ("nan_policy: array", fit(nan_policy=ONES), ValueError, "`nan_policy` must be one of … got ar"),
    ("nan_policy: None", fit(nan_policy=None), ValueError, "`nan_policy` must be one of … got None"),
    ("covariance: array", fit(covariance=ONES), ValueError, "`covariance` must be … got array"),
    ("covariance: None", fit(covariance=None), ValueError, "`covariance` must be … got None"),
    ("progress: 1", fit(progress=1), TypeError, "`progress` must be True, False or None, got 1"),
    ("progress: array", fit(progress=ONES), TypeError, "`progress` must be … got array"),
    ("config: class", fit(config=HybridStreamingConfig), TypeError, "`config` must be a … got <cl"),
    ("config: path", fit(config="c.toml"), TypeError, "`config` must be a … got 'c.toml'"),
    ("client: object", fit(client=Opaque()), TypeError, "`client` must be a … got <Opaque"),
    ("client: class", fit(client=distributed.Client), TypeError, "`client` must be a … got <class"),
    ("callback: text", fit(callback="print"), TypeError, "`callback` must be callable, got 'print'"),
    ("callback: no argument", fit(callback=lambda: 0), TypeError, "`callback` must take one … got"),
    ("callback: two arguments", fit(callback=lambda record, other: 0), TypeError, "`callback` must take one argument, … got … (record, other)"),
]
STARTS: list[Row] = [
    ("p0: bytes", fit(p0=b"ab"), ValueError, "`p0` must be a mapping … got b'ab'"),
    ("p0: generator", fit(p0=(v for v in ONES)), ValueError, "`p0` must be … got <generator"),
    ("p0: object", fit(p0=Opaque()), ValueError, "`p0` must be a mapping … got <Opaque"),
    ("p0: function", fit(p0=line), ValueError, "`p0` must be a mapping … got <function line"),
    ("p0: positions for names", fit(p0={1: 1.0}), ValueError, "`p0` must name … got [1]"),
    ("p0: mapping of mappings", fit(p0={"a": {}}), ValueError, "`p0['a']` must be real … got {}"),
    ("p0: booleans", fit(p0=[True, False]), ValueError, "`p0['a']` must be real numbers, got True"),
    ("p0: endless", fit(p0=range(10**20)), ValueError, "`p0` must have one value … got inf values"),
    ("p0: a long range", fit(p0=[range(10**12), 1.0]), ValueError, "`p0['a']` must … got range(0, 1000"),
    ("p0: beyond floats", fit(p0=[HUGE, 1]), ValueError, "`p0['a']` must be finite … bits"),
    ("p0: beyond float64", fit(p0=[np.longdouble("1e4000"), 1]), ValueError, "`p0['a']` must be fi… got"),
    ("p0: decimals", fit(p0=[Decimal(1), 1]), ValueError, "`p0['a']` must be real … got Decimal"),
    ("p0: dates", fit(p0=np.array(["2000", "2001"], "M8[D]")), ValueError, "`p0['a']` must be real … got"),
    ("p0: text of numbers", fit(p0=["1", "2"]), ValueError, "`p0['a']` must be real … got '1'"),
    ("p0: masked", fit(p0=masked(np.ones(2))), ValueError, "`p0` must have no masked … got 1"),
    ("p0: frame", fit(p0=pd.DataFrame({"a": [1.0]})), ValueError, "`p0` must have one … got 1"),
    ("p0: series of other names", fit(p0=pd.Series({"a": 1, "q": 2})), ValueError, "`p0` must name … got ['q']"),
    ("p0: array without elements", fit(p0={"a": np.zeros((0, 3))}), ValueError, "`p0['a']` must be finite and not empty, got array("),
    ("p0: arrays for numbers", fit(p0={"a": [1.0, 2.0]}), TypeError, "`model` must be traceable … `p0` or defaults give parameters the shapes {'a': (2,)}"),
    ("p0: matrix for a number", fit(p0={"b": [[1.0]]}), ValueError, "`model` must return an array that broadcasts … got shape (1, …; `p0` or defaults give parameters the shapes {'b': (1, 1)}"),
    ("ties: a variable", fit(ties={"t": 1.0}), ValueError, "`model` argument 't' … by `p0`, `bounds`, `fixed`, `ties` or `priors`; say which"),
    ("p0: default of text", fit(model=textual), ValueError, "`p0['a']` must be real numbers, got 'x', the model's own"),
    ("p0: default of None", fit(model=absent), ValueError, "`p0['a']` must be real numbers, got None, the model's"),
    ("bounds: endless", fit(bounds=(0.0, range(10**20))), ValueError, "`bounds` must have at most … got range"),
    ("bounds: endless range", fit(bounds=range(10**20)), ValueError, f"`bounds` {PAIR}range(0, 1000"),
    ("bounds: text", fit(bounds="ab"), ValueError, f"`bounds` {PAIR}'ab'"),
    ("bounds: bytes", fit(bounds=b"ab"), ValueError, f"`bounds` {PAIR}b'ab'"),
    ("bounds: set", fit(bounds={0, 1}), ValueError, f"`bounds` {PAIR}" + "{0, 1}"),
    ("bounds: generator", fit(bounds=(v for v in (0, 1))), ValueError, f"`bounds` {PAIR}<gen"),
    ("bounds: 0-d array", fit(bounds=np.array(3)), ValueError, f"`bounds` {PAIR}array(3)"),
    ("bounds: three rows", fit(bounds=np.zeros((3, 2))), ValueError, f"`bounds` {PAIR}array("),
    ("bounds: complex", fit(bounds=(1j, 2)), ValueError, "`bounds` must be real numbers, got 1j"),
    ("bounds: text of numbers", fit(bounds=("0", "1")), ValueError, "`bounds` must be real … got '0'"),
    ("bounds: None for both", fit(bounds=(None, None)), ValueError, "`bounds` must be real … got No"),
    ("bounds: masked", fit(bounds=(masked(np.zeros(2)), 1)), ValueError, "`bounds` must have no masked … got 1"),
    ("bounds: positions", fit(bounds={0: (0, 1)}), ValueError, "`bounds` must name … got [0]"),
    ("bounds: None for a pair", fit(bounds={"a": None}), ValueError, f"`bounds['a']` {PAIR}None"),
    ("bounds: dates", fit(bounds={"a": (TIMES[0], TIMES[1])}), ValueError, "`bounds['a']` must be real … got"),
    ("bounds: at infinity", fit(bounds=(math.inf, math.inf)), ValueError, "`bounds` must have each lower … got (inf, inf)"),
    ("bounds: beyond the start", fit(bounds={"a": (2, HUGE)}, p0=[1, 1]), ValueError, "`p0` must lie within `bounds`: a = 1.0 … [2.0, inf]"),
    ("fixed: mapping", fit(fixed={"a": 3}), TypeError, "`fixed` must be names … got {'a': 3}; … `p0`"),
    ("fixed: bytes", fit(fixed=b"a"), TypeError, "`fixed` must be names … got b'a'"),
    ("fixed: boolean", fit(fixed=True), TypeError, "`fixed` must be names … got True"),
    ("fixed: lists", fit(fixed=[["a"]]), ValueError, "`fixed` must name … got [['a']]"),
    ("fixed: None in it", fit(fixed=[None]), ValueError, "`fixed` must name … got [None]"),
    ("fixed: generator of unknown", fit(fixed=(n for n in "aq")), ValueError, "`fixed` must name … got ['q']"),
]
TIES: list[Row] = [
    ("ties: None", tie(None), TypeError, "`ties['b']` must be a function … got None"),
    ("ties: builtin", tie(max), ValueError, "`ties['b']` must have a signature … got <built-in"),
    ("ties: *args", tie(lambda *a: 1.0), ValueError, "`ties['b']` must take parameters by … got … *a"),
    ("ties: **kwargs", tie(lambda **a: 1.0), ValueError, "`ties['b']` must take … got … **a"),
    ("ties: by position only", tie(lambda a, /: a), ValueError, "`ties['b']` must take … got … a"),
    ("ties: ufunc of JAX", tie(jnp.exp), ValueError, "`ties['b']` must take … got … x"),
    ("ties: returns text", tie(lambda a: "x"), ValueError, "`ties['b']` must be real … got array('x'"),
    ("ties: returns None", tie(lambda a: None), ValueError, "`ties['b']` must be real … got array(None"),
    ("ties: complex", tie(lambda a: 1j * a), ValueError, "`ties['b']` must be real … got array(0.+1.j"),
    ("ties: set", fit(ties={"b"}), TypeError, "`ties` must map … got {'b'}"),
    ("ties: position", fit(ties={1: lambda a: a}), ValueError, "`ties` must name … got 1"),
    ("ties: all", fit(ties={"a": lambda: 1.0, "b": lambda: 2.0}), ValueError, "`fixed` and `ties` must leave … got all"),
    ("ties: random", tie(lambda a: a + np.random.default_rng().normal()), ValueError, "`ties` must be pure … two traces of them differ"),
    ("ties: float()", tie(lambda a: float(a)), TypeError, "`ties['b']` must be traceable … raised"),
    ("priors: text", fit(priors="a", absolute_sigma=True), TypeError, "`priors` must map … got 'a'"),
    ("priors: number", fit(priors=3), TypeError, "`priors` must map … got 3"),
    ("priors: empty list", fit(priors=[]), TypeError, "`priors` must map … got []"),
    ("priors: position", fit(priors={0: (1, 1)}, absolute_sigma=True), ValueError, "`priors` must name … got 0"),
    ("priors: None", prior(None), ValueError, "`priors['a']` must be (mean, width), got None"),
    ("priors: three", prior((1, 2, 3)), ValueError, "`priors['a']` must be (mean, width), got (1, 2, 3)"),
    ("priors: set", prior({1, 2}), ValueError, "`priors['a']` must be (mean, width), got {1, 2}"),
    ("priors: two letters", prior("12"), ValueError, "`priors['a']` must be (mean, width), got '12'"),
    ("priors: text of numbers", prior(("1", "2")), ValueError, "`priors['a']` must be real … got '1'"),
    ("priors: complex", prior((1j, 2)), ValueError, "`priors['a']` must be real … got 1j"),
    ("priors: booleans", prior((True, True)), ValueError, "`priors['a']` must be real … got True"),
    ("priors: dates", prior((np.datetime64("2000"), 1)), ValueError, "`priors['a']` must be real … got"),
    ("priors: negative width", prior((1, -1)), ValueError, "`priors['a']` must have … positive … got (1, -1)"),
    ("priors: NaN", prior((math.nan, 1)), ValueError, "`priors['a']` must have a finite … got (nan, 1)"),
    ("priors: infinite width", prior((0, math.inf)), ValueError, "`priors['a']` must have … got (0, inf)"),
    ("priors: beyond floats", prior((HUGE, 1)), ValueError, "`priors['a']` must have a finite … bits"),
    ("priors: width whose square is zero", prior((1, 1e-200)), ValueError, "`priors['a']` must have … got (1, 1e-200)"),
    ("priors: masked", prior((masked(np.ones(2)), 1)), ValueError, "`priors['a']` must have no masked … got 1"),
]
NAMES: list[Row] = [
    ("y: bytes", fit(y=b"y"), TypeError, "`y` must be the name … got b'y'"),
    ("y: list", fit(y=["y"]), TypeError, "`y` must be the name … got ['y']"),
    ("y: position", fit(y=0), TypeError, "`y` must be the name … got 0"),
    ("y: empty", fit(y=""), ValueError, "`y` must name a variable … got ''"),
    ("y: series", fit(y=pd.Series(Y)), TypeError, "`y` must be the name … got 0"),
    ("y: dataset", accessor(y=unreadable()), TypeError, "`y` must be the name … got <xarray.Datas"),
    ("y: taken by x", fit(x="y"), ValueError, "`y` must be given: besides ['y'], the model's variables (`x`) and what … `ds` has no numeric"),
    ("y: taken by cluster", fit(cluster="y"), ValueError, "`y` must be given: besides ['t', 'y'], … `cluster` name, `ds` has no numeric"),
    ("y: duplicate dimensions", fit(ds=twice(), y="y"), ValueError, "`y` must have distinct … got ('t', 't')"),
    ("y: dtype of text", fit(y=along(Y.astype("U"))), ValueError, "`y` must hold real numbers, got dtype <U"),
    ("y: durations", fit(y=along(np.arange(ROWS).astype("m8[ns]"))), ValueError, "`y` must hold real numbers, got dtype timedelta"),
    ("y: records", fit(y=along(np.zeros(ROWS, [("a", float)]))), ValueError, "`y` must hold real numbers, got dtype [('a'"),
    ("y: void", fit(y=along(np.zeros(ROWS, "V8"))), ValueError, "`y` must hold real numbers, got dtype |V8"),
    ("y: objects", fit(y=along(Y.astype(object))), ValueError, "`y` must hold real numbers, got dtype object"),
    ("x: positions", fit(x=[1]), TypeError, "`x` must be a name or a sequence of names, got [1]"),
    ("x: None in it", fit(x=[None]), TypeError, "`x` must be a name … got [None]"),
    ("x: lists", fit(x=[["t"]]), TypeError, "`x` must be a name … got [['t']]"),
    ("x: bytes", fit(x=b"t"), TypeError, "`x` must be a name … got b't'"),
    ("x: set", fit(x={"t"}), TypeError, "`x` must be a name … got {'t'}"),
    ("x: mapping", fit(x={"t": 1}), TypeError, "`x` must be a name … got {'t': 1}"),
    ("x: array", fit(x=np.array(["t"])), TypeError, "`x` must be a name … got array(['t']"),
    ("x: generator", fit(x=(v for v in "t")), TypeError, "`x` must be a name … got <generator"),
    ("x: DataArray", fit(x=along(T)), TypeError, "`x` must be a name … got <xarray.DataArray"),
    ("x: text", fit(ds=over(np.array(list("ab") * 25))), ValueError, "`t` must hold real numbers, got dtype <U1"),
    ("x: complex", fit(ds=over(T * 1j)), ValueError, "`t` must hold real numbers, got dtype complex"),
    ("sigma: array", fit(sigma=ONES), TypeError, "`sigma` must be the name … got array("),
    ("sigma: booleans", fit(sigma=along(T > 0.5)), ValueError, "`sigma` must hold standard deviations, got booleans"),
    ("sigma: complex", fit(sigma=along(T * 1j)), ValueError, "`sigma` must hold real numbers, got dtype complex"),
    ("sigma: another dimension", fit(sigma=xr.DataArray(np.ones((ROWS, 2)), dims=("t", "u"))), ValueError, "`sigma` must have dimensions of `y` only, … got ('t', 'u')"),
    ("where: array", fit(where=T > 0), TypeError, "`where` must be the name … got array("),
    ("where: boolean", fit(where=True), TypeError, "`where` must be the name … got True"),
    ("where: integers", fit(where=along(np.ones(ROWS, int))), ValueError, "`where` must be boolean, got int64"),
    ("where: objects", fit(where=along(np.array([True] * ROWS, object))), ValueError, "`where` must be boolean, got object"),
    ("cluster: array", fit(cluster=ONES), TypeError, "`cluster` must be the name … got array("),
    ("cluster: NaN", fit(cluster=along(np.where(T > 0.9, np.nan, 1.0))), ValueError, "`cluster` must have a label for every row, got 5"),
    ("cluster: None", fit(cluster=along(np.array([None, "a"] * 25, object))), ValueError, "`cluster` must have a label … got 25"),
    ("cluster: NaT", fit(cluster=along(np.full(ROWS, "NaT", "M8[ns]"))), ValueError, "`cluster` must have a label … got 50"),
    ("cluster: one label", fit(cluster=along(np.ones(ROWS))), ValueError, "`cluster` must have at least two … got 1"),
    ("cluster: another dimension", fit(cluster=along([1, 2], "u")), ValueError, "`cluster` must have dimensions … got ('u',)"),
    ("cluster: lists", fit(cluster=along(np.array([[1], (2,)] * 24 + [None, 2], object))), ValueError, "`cluster` must have labels that are … got others"),
    ("time zone: index", fit(ds=xr.Dataset({"y": ("t", Y)}, coords={"t": ZONED})), ValueError, "`t` must hold times without a time zone, got … Berlin…tz_convert"),
    ("time zone: objects", fit(ds=over(np.array(list(ZONED), object))), ValueError, "`t` must hold … without a time zone, got … Timestamp"),
    ("dates without hours", fit(ds=over(np.array([datetime.date(2000, 1, 1)] * ROWS))), ValueError, "`t` must hold … times … got objects of type date"),
    ("periods", fit(ds=xr.Dataset({"y": ("t", Y)}, coords={"t": pd.period_range("2000", periods=ROWS)})), ValueError, "`t` must hold numbers … got … Period"),
    ("no times at all", fit(ds=over(np.full(ROWS, "NaT", "M8[ns]"))), ValueError, "`t` must hold at least one time, got none"),
    ("time_units: list", fit(ds=over(TIMES), time_units=["days"]), ValueError, "`time_units` must be … got ['days']"),
    ("time_units: bytes", fit(ds=over(TIMES), time_units=b"days"), ValueError, "`time_units` must be … got b'days'"),
    ("time_units: empty", fit(ds=over(TIMES), time_units=""), ValueError, "`time_units` must be … got ''"),
    ("time_units: endless", fit(ds=over(TIMES), time_units="d" * 10**6 + "!"), ValueError, "`time_units` must be … got 'ddd"),
    ("time_units: years", fit(ds=over(TIMES), time_units="years since 2000"), ValueError, "`time_units` must be … got 'years"),
    ("time_units: year beyond integers", fit(ds=over(TIMES), time_units="days since 99999999999-01-01"), ValueError, "`time_units` must have a date … got … 999"),
    ("time_units: a date for durations", fit(ds=over(np.arange(ROWS).astype("m8[D]")), time_units="days since 2000-01-01"), ValueError, "`time_units` must be a unit alone … got"),
    ("ds: empty path", fit(ds=""), ValueError, "`ds` must be a path … got ''"),
    ("ds: zero byte", fit(ds="a\0b"), ValueError, "`ds` must be a path … got 'a"),
    ("ds: DataArray", fit(ds=along(T)), TypeError, "`ds` must be … got DataArray; pass `da.to_dataset("),
    ("ds: list of files", fit(ds=["a.nc"]), TypeError, "`ds` must be … got list; … `xarray.open_mfdataset`"),
    ("model: a variable misspelt", fit(model=lambda T, a, b: a + b * T), ValueError, "`model` argument 'T' must be a variable of `ds` or a parameter, and `ds` has 't'; write it so"),
    ("model: no variable", fit(model=lambda u, a, b: a + b * u), ValueError, "`model` must take a variable of `ds`, … got the arguments ['u', 'a', 'b']; where 'u' is none, as"),
    ("ds: long name", fit(ds="x" * 300), FileNotFoundError, "`ds` must name a store that exists, got 'xxx…: File name too long"),
    ("ds: long path", fit(ds="x/" * 3000), FileNotFoundError, "`ds` must name a store that exists, got 'x/…: File name too long"),
    ("ds: below a file", fit(ds=f"{__file__}/x"), FileNotFoundError, "`ds` must name a store that exists, got …: Not a directory"),
    ("ds: bytes", fit(ds=b"x.zarr"), TypeError, "`ds` must be an xarray.Dataset, … got bytes"),
    ("ds: frame", fit(ds=pd.DataFrame({"t": T})), TypeError, "`ds` must be an … got DataFrame"),
    ("ds: mapping", fit(ds={"t": T, "y": Y}), TypeError, "`ds` must be an … got dict"),
    ("ds: tree", fit(ds=xr.DataTree(unreadable())), TypeError, "`ds` must be an … got DataTree"),
    ("ds: list", fit(ds=[unreadable()]), TypeError, "`ds` must be an … got list"),
    ("storage_options: list", fit(ds="memory://x", storage_options=["a"]), TypeError, "`storage_options` must be a mapping … got list"),
    ("storage_options: text", fit(ds="memory://x", storage_options="anon"), TypeError, "`storage_options` must be … got str"),
    ("storage_options: empty text", fit(ds="memory://x", storage_options=""), TypeError, "`storage_options` must be … got str"),
    ("storage_options: number", fit(ds="memory://x", storage_options=3), TypeError, "`storage_options` must be … got int"),
    ("storage_options: key", fit(ds="memory://x", storage_options={1: 2}), TypeError, "`storage_options` must be … got dict with the keys [1]"),
    ("storage_options: a dataset", fit(storage_options={}), ValueError, "`storage_options` must go with … got … Dataset"),
]
MODELS: list[Row] = [
    ("model: text", fit(model="line"), TypeError, "`model` must be callable, got 'line'"),
    ("model: None", fit(model=None), TypeError, "`model` must be callable, got None"),
    ("model: generator", fit(model=generated), TypeError, f"`model` {TRACE}an array … got <generator"),
    ("model: object", fit(model=lambda t, a, b: object()), TypeError, f"`model` {TRACE}an array … got <object"),
    ("model: list", fit(model=lambda t, a, b: [a * t]), ValueError, f"`model` {TRACE}one array … got […Tracer…float64[101]"),
    ("model: tuple", fit(model=lambda t, a, b: (a * t, b)), ValueError, f"`model` {TRACE}one array … got ("),
    ("model: mapping", fit(model=lambda t, a, b: {"y": a * t}), ValueError, f"`model` {TRACE}one array … got {{'y'"),
    ("model: integers", fit(model=lambda t, a, b: (a * t).astype(int)), ValueError, f"`model` {TRACE}real numbers … got int64"),
    ("model: a constant", fit(model=lambda t, a, b: 3), ValueError, f"`model` {TRACE}real numbers … got int"),
    ("model: comparison", fit(model=lambda t, a, b: a * t > b), ValueError, f"`model` {TRACE}real numbers … got bool"),
    ("model: text array", fit(model=lambda t, a, b: np.array(["a"] * 3)), TypeError, f"`model` {TRACE}an array … got array(['a'"),
    ("model: other shape", fit(model=lambda t, a, b: jnp.ones(3) * a), ValueError, f"`model` {TRACE}an array … shape … got shape (3,)"),
    ("model: clock", fit(model=lambda t, a, b: a * t + datetime.datetime.now().timestamp()), ValueError, "`model` must be pure: two traces of it differ"),
    ("model: drawn seed", fit(model=lambda t, a, b: (a * t + jax.random.normal(jax.random.key(next(SEEDS))))), ValueError, "`model` must be pure: two traces"),
    ("model: in place", fit(model=lambda t, a, b: t.__setitem__(0, a)), TypeError, "`model` must be traceable … raised TypeError"),
    ("model: rows by value", fit(model=lambda t, a, b: a * t[t > 0.5]), TypeError, "`model` must be traceable … raised NonConcrete"),
    ("model: loop to a value", fit(model=lambda t, a, b: sum(t for _ in range(a))), TypeError, "`model` must be traceable … raised"),
    ("model: length of a parameter", fit(model=lambda t, a, b: len(a) * t), TypeError, "`model` must be traceable … raised"),
    ("jac: boolean", fit(jac=True), TypeError, "`jac` must be callable, got True"),
    ("jac: None", fit(jac=lambda t, a, b: None), ValueError, "`jac` must return arrays of real … got None"),
    ("jac: text", fit(jac=lambda t, a, b: ("a", "b")), ValueError, "`jac` must return arrays of real … got 'a'"),
    ("jac: complex", fit(jac=lambda t, a, b: (t * 1j, 1.0)), ValueError, "`jac` must return arrays of real … got"),
    ("jac: number", fit(jac=lambda t, a, b: 1.0), ValueError, "`jac` must return an array whose last … got shape ()"),
    ("jac: other length", fit(jac=lambda t, a, b: (jnp.ones(7), 1.0)), ValueError, "`jac` must return for 'a' … got shape (7,)"),
    ("jac: more axes", fit(jac=lambda t, a, b: jnp.ones((3, 3, 2))), ValueError, "`jac` must return an array of the model's shape … got shape (3, 3, 2)"),
    ("jac: fewer arguments", fit(jac=lambda t, a: (t,)), TypeError, "`jac` must be traceable … raised TypeError"),
    ("jac: attribute", fit(jac=lambda t, a, b: t.nothing), TypeError, "`jac` must be traceable … raised AttributeError"),
    ("jac: random", fit(jac=lambda t, a, b: (t * np.random.default_rng().normal(), 1.0)), ValueError, "`model` must be pure: two traces"),
]

# -- arrays: curve_fit, the optimizer, and batches

ARRAYS: list[Row] = [
    ("xdata: text", arrays(xdata="abc"), ValueError, "`xdata` must hold real numbers, got dtype <U3 of 'abc'"),
    ("xdata: None", arrays(xdata=None), ValueError, "`xdata` must hold real numbers, got dtype object of None"),
    ("xdata: 0-d", arrays(xdata=np.array(1.0)), ValueError, "`xdata` must have shape (m,) or … got shape ()"),
    ("xdata: 3-d", arrays(xdata=np.ones((2, 3, 4))), ValueError, "`xdata` must have shape … got shape (2, 3, 4)"),
    ("xdata: ragged", arrays(xdata=[[1, 2], [3]]), ValueError, "`xdata` must be … of one shape, got [[1, 2], [3]]"),
    ("xdata: no variables", arrays(xdata=np.ones((0, ROWS))), ValueError, "`xdata` must have shape … got shape (0, 50)"),
    ("xdata: masked", arrays(xdata=masked(T)), ValueError, "`xdata` must have no masked elements, got 25; … filled"),
    ("xdata: mapping", arrays(xdata={"t": T}), ValueError, "`xdata` must hold real numbers, got dtype object of {'t'"),
    ("xdata: generator", arrays(xdata=(v for v in T)), ValueError, "`xdata` must hold real … got dtype object of <gen"),
    ("xdata: dates", arrays(xdata=np.arange(ROWS).astype("M8[D]")), ValueError, "`xdata` must hold real … got dtype datetime64"),
    ("xdata: records", arrays(xdata=np.zeros(ROWS, [("a", float)])), ValueError, "`xdata` must hold real … got dtype [('a'"),
    ("xdata: frame", arrays(xdata=pd.DataFrame({"t": T})), ValueError, "`xdata` must have as many rows as `ydata`, 50, got shape (1,)"),
    ("xdata: one row less", arrays(xdata=lazy(49)), ValueError, "`xdata` must have as many rows … got shape (49,)"),
    ("ydata: dataset", arrays(ydata=unreadable()), ValueError, "`ydata` must be a number or an array … got <xarray.Dataset"),
    ("ydata: column", arrays(ydata=Y[:, None]), ValueError, "`ydata` must be 1-d, got shape (50, 1)"),
    ("ydata: number", arrays(ydata=3.0), ValueError, "`ydata` must be 1-d, got shape ()"),
    ("ydata: text of numbers", arrays(ydata=list(map(str, Y))), ValueError, "`ydata` must hold real … got dtype <U"),
    ("ydata: masked", arrays(ydata=masked(Y)), ValueError, "`ydata` must have no masked elements, got 25"),
    ("ydata: Dask array with a mask", arrays(ydata=MASKED_BLOCKS), ValueError, "`ydata` must have blocks that are plain … got numpy.ma"),
    ("ydata: NaN", arrays(ydata=np.where(T > 0.9, np.nan, Y)), ValueError, "`ydata` must not contain … got 5"),
    ("sigma: zero", arrays(sigma=0.0), ValueError, "`sigma` must be positive in every row, got 0.0 in row 0"),
    ("sigma: negative", arrays(sigma=1 - 2 * T), ValueError, "`sigma` must be positive … got -… in row 25"),
    ("sigma: masked", arrays(sigma=masked(np.ones(ROWS))), ValueError, "`sigma` must have no masked … got 25"),
    ("sigma: text", arrays(sigma="a"), ValueError, "`sigma` must hold real numbers, got dtype <U1 of 'a'"),
    ("sigma: two columns", arrays(sigma=np.ones((ROWS, 2))), ValueError, "`sigma` must have as many rows … got shape (50, 2)"),
    ("check_finite: text", arrays(check_finite="no"), TypeError, f"`check_finite` {FLAG}'no'"),
    ("full_output: text", arrays(full_output="no"), TypeError, f"`full_output` {FLAG}'no'"),
    ("absolute_sigma: text in curve_fit", arrays(absolute_sigma="False"), TypeError, f"`absolute_sigma` {FLAG}'False'"),
    ("method: array", arrays(method=ONES), ValueError, "`method` must be one of … got array"),
    ("method: number", arrays(method=3), ValueError, "`method` must be one of … got 3"),
    ("maxfev: fraction", arrays(maxfev=1.5), ValueError, "`maxfev` must be an integer >= 1, got 1.5"),
    ("max_nfev: none", arrays(max_nfev=0), ValueError, "`max_nfev` must be an integer >= 1, got 0"),
    ("max_nfev and maxfev", arrays(max_nfev=3, maxfev=4), TypeError, "`max_nfev` and `maxfev` are … got 3 and 4"),
    ("ftol: text", arrays(ftol="a"), ValueError, "`ftol` must be a positive … got 'a'"),
    ("xtol: beyond floats", arrays(xtol=HUGE), ValueError, "`xtol` must be a positive … bits"),
    ("nan_policy: SciPy's third", arrays(nan_policy="propagate"), ValueError, "`nan_policy` must be one of … got 'propagate'"),
    ("loss: function", arrays(loss=np.square), ValueError, LOSS + "<ufunc"),
    ("f: None", arrays(f=None), TypeError, "`f` must be callable, got None"),
    ("f: no parameters", arrays(f=lambda x: x), ValueError, "`f` must take the data and at least one parameter, got … ['x']"),
    ("f: any number", arrays(f=lambda x, *p: p[0] * x), ValueError, "`p0` must be given where `f` … got neither"),
    ("f: keyword only", arrays(f=lambda x, a, *, b: a), ValueError, "`f` must take … got the keyword-only argument 'b'"),
    ("func: None", rows(func=None), TypeError, "`func` or `model` must be given, got neither"),
    ("func and model", rows(model=of_x), TypeError, "`func` or `model` must be given, and not both, got both"),
    ("func: text", rows(func="of_x"), TypeError, "`func` must be callable, got 'of_x'"),
    ("model: number", rows(func=None, model=3), TypeError, "`model` must be callable, got 3"),
    ("data_source: array", rows(data_source=np.stack([T, Y])), TypeError, "`data_source` must be … got ndarray"),
    ("data_source: one part", rows(data_source=(T,)), ValueError, "`data_source` must be … got 1 parts"),
    ("data_source: no such store", rows(data_source="none.zarr"), FileNotFoundError, "`data_source` must name a store that exists, got 'none.zarr'"),
    ("data_source: long name", rows(data_source="x" * 300), FileNotFoundError, "`data_source` must name a store that exists, got 'xxx…: File name too long"),
    ("data_source: zero byte", rows(data_source="a\0b"), ValueError, "`data_source` must be a path … got 'a"),
    ("data_source: text file", rows(data_source=__file__), ValueError, "`data_source` must be a Zarr store or an HDF5/netCDF4 file, got … bad_input.py', which is neither"),
    ("data_source: folder", rows(data_source=str(Path(__file__).parent)), FileNotFoundError, "`data_source` must name a store that exists, and nothing was found at"),
    ("data_source: set", rows(data_source={1, 2}), TypeError, "`data_source` must be … got set"),
    ("x: 3-d", rows(data_source=(np.ones((ROWS, 2, 2)), Y)), ValueError, "`x` must have shape … got shape (50, 2, 2)"),
    ("x: variables first", rows(data_source=(np.ones((2, ROWS)), Y)), ValueError, "`x` must have as many rows as `y`, 50, got shape (2,)"),
    ("x: no columns", rows(data_source=(np.ones((ROWS, 0)), Y)), ValueError, "`x` must have shape … got shape (50, 0)"),
    ("y: masked", rows(data_source=(T, masked(Y))), ValueError, "`y` must have no masked … got 25"),
    ("verbose: text", rows(verbose="a"), ValueError, "`verbose` must be an integer >= 0, got 'a'"),
    ("verbose: 7", rows(verbose=7), ValueError, "`verbose` must be 0, 1 or 2, got 7"),
    ("spool: with arrays", rows(spool="/tmp"), ValueError, "`spool` must not be given … got '/tmp'"),
    ("batches: verbose", batches(None, verbose=7), ValueError, "`verbose` must be 0, 1 or 2, got 7"),
    ("batches: model", batches(None, model=3), TypeError, "`func` or `model` must be given, and not both, got both"),
    ("batches: spool", batches(None, spool=3), TypeError, "`spool` must be a path or URL, got 3"),
    ("batches: unknown protocol", batches(None, spool="nowhere://x"), ValueError, "`spool` must be a folder … got 'nowhere://x'"),
    ("batches: spool is a file", batches(None, spool=__file__), OSError, "`spool` must be a folder … got … bad_input.py"),
    ("batches: long spool", batches(None, spool="x" * 300), OSError, "`spool` must be a folder … got 'xxx"),
    ("batches: limit of text", batches(None, spool_limit_bytes="1 GB"), ValueError, "`spool_limit_bytes` must be an integer >= 1, got '1 GB'"),
    ("batches: negative limit", batches(None, spool_limit_bytes=-1), ValueError, "`spool_limit_bytes` must be … got -1"),
    ("batches: number", batches(3), ValueError, "batch 0 must be (x, y) or … got int"),
    ("batches: mapping", batches({"x": T, "y": Y}), ValueError, "batch 0 must be (x, y) … got dict"),
    ("batches: masked", batches((T, masked(Y))), ValueError, "batch 0: `y` must have no masked … got 25"),
    ("batches: ragged", batches(([[1], [1, 2]], [1, 2])), ValueError, "batch 0: `x` must be … of one shape, got"),
    ("batches: complex", batches((T * 1j, Y)), ValueError, "batch 0 must hold real numbers in `x`, got dtype complex"),
    ("batches: no rows", batches(), ValueError, "there must be rows to fit, got 0 batches"),
    ("weights: number", lambda: AdaptiveHybridStreamingOptimizer().set_residual_weights(3), ValueError, "`residual_weights` must be … got 3"),
    ("weights: text", lambda: AdaptiveHybridStreamingOptimizer().set_residual_weights("ab"), ValueError, "`residual_weights` must be real … got 'ab'"),
    ("weights: None", lambda: AdaptiveHybridStreamingOptimizer().set_residual_weights(None), ValueError, "`residual_weights` must be given … got None"),
    ("weights: beyond floats", lambda: AdaptiveHybridStreamingOptimizer().set_residual_weights([HUGE]), ValueError, "`residual_weights` must be finite … bits"),
]

# -- options, and NLSQ's names

OPTIONS: list[Row] = [
    ("precision: array", config(precision=ONES), ValueError, "`precision` must be one of … got array"),
    ("sampler: list", config(multistart_sampler=["lhs"]), ValueError, "`multistart_sampler` must be … got ['lhs']"),
    ("ftol beyond floats", config(ftol=HUGE), ValueError, "`ftol` must be a positive … bits"),
    ("seed: array", config(seed=ONES), ValueError, "`seed` must be an integer … got array"),
    ("flag of NumPy", config(prefetch=np.array(True)), ValueError, "`prefetch` must be True or False, got array"),
    ("weights: bytes", config(residual_weights=b"x"), ValueError, "`residual_weights` must be real … got b'x'"),
    ("weights: 0-d", config(residual_weights=np.array(1)), ValueError, "`residual_weights` must be finite … got array(1)"),
    ("weights: mapping", config(residual_weights={0: 1.0}), ValueError, "`residual_weights` must be real … got {0: 1.0}"),
    ("groups: one beyond floats", config(group_variance_indices=HUGE), ValueError, "`group_variance_indices` must be … bits"),
    ("criteria: lists", config(active_switching_criteria=[["plateau"]]), ValueError, "`active_switching_criteria` must name … got [['plateau']]"),
    ("folder: empty", config(checkpoint_dir=""), ValueError, "`checkpoint_dir` must be a path … got ''"),
    ("folder: zero byte", config(checkpoint_dir="a\0"), ValueError, "`checkpoint_dir` must be a path … got 'a"),
    ("folder: bytes", config(checkpoint_dir=b"/x"), ValueError, "`checkpoint_dir` must be a path, got b'/x'"),
    ("folder: class", config(checkpoint_dir=Path), ValueError, "`checkpoint_dir` must be a path, got <class"),
    ("resume: number", config(resume_from_checkpoint=3), ValueError, "`resume_from_checkpoint` must be a path, got 3"),
    ("cache: object", config(compilation_cache_dir=Opaque()), ValueError, "`compilation_cache_dir` must be a path, got <Opaque"),
    ("mapping: None", mapping(None), TypeError, "`options` must be a mapping … got None"),
    ("mapping: pairs", mapping([("seed", 1)]), TypeError, "`options` must be a mapping … got [('seed', 1)]"),
    ("mapping: text", mapping("seed"), TypeError, "`options` must be a mapping … got 'seed'"),
    ("mapping: nested", mapping({"seed": {"a": 1}}), ValueError, "`seed` must be an integer … got {'a': 1}"),
    ("mapping: cls", mapping({"cls": 1}), TypeError, "`cls` is not an option"),
    ("mapping: self", mapping({"self": 1}), TypeError, "`self` is not an option"),
    ("mapping: long name", mapping({"x" * 10**6: 1}), TypeError, "`xxx…` is not an option"),
    ("mapping: number for a name", mapping({1: 1}), TypeError, "`1` is not an option"),
    ("compat: method", lambda: compat.curve_fit(of_x, T, Y, method=ONES), ValueError, "`method` must be one of … got array"),
    ("compat: show_progress", lambda: compat.curve_fit(of_x, T, Y, show_progress="no"), TypeError, f"`show_progress` {FLAG}'no'"),
    ("compat: absolute_sigma", lambda: compat.CurveFit(absolute_sigma="x"), TypeError, f"`absolute_sigma` {FLAG}'x'"),
    ("compat: masked", lambda: compat.curve_fit(of_x, T, masked(Y)), ValueError, "`y` must have no masked … got 25"),
    ("compat: memory_config", lambda: compat.LargeDatasetFitter(of_x, T, Y, memory_config=3), TypeError, "`memory_config` must be an LDMemoryConfig, got 3"),
    ("compat: max_memory_gb text", lambda: compat.LDMemoryConfig(max_memory_gb="8"), ValueError, "`max_memory_gb` must be a positive … got '8'"),
    ("compat: max_memory_gb boolean", lambda: compat.LDMemoryConfig(max_memory_gb=True), ValueError, "`max_memory_gb` must be … got True"),
    ("compat: min_chunk_size", lambda: compat.LDMemoryConfig(min_chunk_size=1.5), ValueError, "`min_chunk_size` must be an integer … got 1.5"),
    ("compat: batch_size text", lambda: compat.StreamingConfig(batch_size="1"), ValueError, "`batch_size` must be an integer … got '1'"),
    ("compat: batch_size fraction", lambda: compat.StreamingConfig(batch_size=1.5), ValueError, "`batch_size` must be … got 1.5"),
    ("compat: streaming config", lambda: compat.StreamingOptimizer(of_x, config=HybridStreamingConfig()), TypeError, "`config` must be a StreamingConfig, got Hybrid"),
    ("compat: streaming model", lambda: compat.StreamingOptimizer(3), TypeError, "`model` must be callable, got 3"),
    ("compat: limit", lambda: compat.StreamingOptimizer(of_x, spool_limit_bytes=1e9), ValueError, "`spool_limit_bytes` must be an integer … got 1000000000.0"),
]

BEFORE_WORK = [*CRITERIA, *STARTS, *TIES, *NAMES, *MODELS, *ARRAYS, *OPTIONS]

# fmt: on
# -- what only the data show


def dataset(y: Any = Y, **variables: Any) -> xr.Dataset:
    return xr.Dataset({"y": ("t", y), **variables}, coords={"t": T})


def blocks(function: Callable[[Any], Any]) -> xr.Dataset:
    """Dask blocks that are not what they say they are."""
    y = da.ones(ROWS, chunks=25).map_blocks(function, dtype=float, meta=np.empty(0))
    return dataset(y)


def read(ds: Any, **options: Any) -> Callable[[], Any]:
    return functools.partial(fit_dataset, ds, line, **{"y": "y", **options})


# fmt: off
IN_THE_DATA: list[Row] = [
    ("two calendars", read(over(TWO_CALENDARS)), ValueError, "`ds` must have times of one calendar, 'noleap' … got ['360_day'"),
    ("complex blocks", read(blocks(lambda b: b + 1j)), ValueError, "`ds` must have Dask arrays … float64, got a block of complex"),
    ("blocks of text", read(blocks(lambda b: b.astype("U3"))), ValueError, "`ds` must have Dask arrays … float64, got a block of <U3"),
    ("masked blocks", read(blocks(lambda b: masked(b))), ValueError, "`ds` must have Dask arrays … got a block of float64 with a mask"),
    ("shorter blocks", read(blocks(lambda b: b[:-1])), ValueError, "`ds` must read chunk 0 as it describes it… got"),
    ("no blocks", read(blocks(lambda b: None)), ValueError, "`ds` must read chunk 0 as it describes it… got (50,)"),
    ("sigma beyond squares", read(dataset(), sigma=along(np.full(ROWS, 1e200))), ValueError, "`sigma` must be positive … got 1e+200"),
    ("sigma below squares", read(dataset(), sigma=along(np.full(ROWS, 1e-200))), ValueError, "`sigma` must be positive … got 1e-200"),
    ("sigma infinite", read(dataset(), sigma=along(np.full(ROWS, np.inf))), ValueError, "`ds` must have rows that can be fitted: of 50 rows none"),
    ("beyond float64", read(dataset(Y.astype(np.longdouble) * np.longdouble("1e4000"))), ValueError, "`ds` must have rows that can be fitted: of 50"),
    ("where: a scalar", read(dataset(), where=xr.DataArray(False)), ValueError, "`ds` must have rows that can be fitted: of 50"),
]
