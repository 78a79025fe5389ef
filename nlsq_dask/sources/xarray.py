"""An `xarray.Dataset` as rows: names resolved, dimensions checked, nothing loaded."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from xarray.core.indexing import PandasIndexingAdapter

from nlsq_dask.errors import DataError
from nlsq_dask.require import as_number, is_scale, shown
from nlsq_dask.sources.base import Column
from nlsq_dask.sources.clusters import build_cluster_column
from nlsq_dask.sources.columns import (
    LazyColumn,
    MemoryColumn,
    TimeAxis,
    TimeColumn,
    build_time_column,
)
from nlsq_dask.sources.dask import DaskColumn, is_dask_array, require_plain_blocks
from nlsq_dask.sources.grid import GridSource

__all__ = [
    "DatasetRoles",
    "build_dataset_source",
    "build_stored_source",
    "column_of",
    "dataset_of",
    "dimension_or_variable",
    "is_loaded",
    "known_names",
    "pick_y",
]

NameOrArray = str | xr.DataArray


@dataclass(frozen=True, kw_only=True)
class DatasetRoles:
    """Which variable plays which part."""

    x: tuple[str, ...]
    y: NameOrArray | None
    sigma: NameOrArray | float | None = None
    where: NameOrArray | None = None
    cluster: NameOrArray | None = None

    def __post_init__(self) -> None:
        number = as_number(self.sigma)
        if number is None:
            return
        if not is_scale(number):
            raise ValueError(
                "`sigma` must be positive, of a size whose square is a number, got "
                f"{shown(self.sigma)}"
            )
        object.__setattr__(self, "sigma", xr.DataArray(number, name=repr(number)))


def known_names(ds: xr.Dataset) -> set[str]:
    """Names that can be independent variables: variables, coordinates and dimensions."""
    return {str(name) for name in (*ds.variables, *ds.sizes)}


def build_dataset_source(
    ds: xr.Dataset, roles: DatasetRoles, time_units: str | None = None
) -> tuple[GridSource, dict[str, TimeAxis], int]:
    """Rows over the dimensions of `y`; how times among the variables became numbers; and the
    number of clusters.

    Raises
    ------
    ValueError
        If a name is unknown, dimensions do not match those of `y`, or a dtype cannot be fitted.
    DataError
        If there are no rows.
    """
    y_array = pick_y(ds, roles)
    y = _numeric("y", y_array)
    if len(set(y.dims)) < len(y.dims):
        raise ValueError(f"`y` must have distinct dimensions, got {y.dims}")
    variables: list[Column] = []
    axes: dict[str, TimeAxis] = {}
    for name in roles.x:
        array = dimension_or_variable(ds, name)
        _require_no_time_zone(name, array.variable)
        column = column_of(name, array.variable)
        if column.dtype.kind in "mMO":
            column = build_time_column(name, column, time_units)
            axes[name] = column.axis
        else:
            column = _numeric(name, array)
        variables.append(column)
    if time_units is not None and not axes:
        raise ValueError(
            f"`time_units` must go with a variable of times, got {shown(time_units)} for variables "
            f"{list(roles.x)}, of which none holds times"
        )
    sigma = where = None
    if roles.sigma is not None:
        sigma = _numeric("sigma", _resolve(ds, "sigma", roles.sigma))
        if sigma.dtype.kind == "b":
            raise ValueError("`sigma` must hold standard deviations, got booleans; see `where`")
    if roles.where is not None:
        where = column_of("where", _resolve(ds, "where", roles.where).variable)
        if where.dtype.kind != "b":
            raise ValueError(f"`where` must be boolean, got {where.dtype}")
    cluster, num_clusters = None, 0
    if roles.cluster is not None:
        array = _resolve(ds, "cluster", roles.cluster)
        cluster, num_clusters = build_cluster_column(column_of("cluster", array.variable))
    named = {**dict(zip(roles.x, variables, strict=True)), "sigma": sigma, "where": where}
    named["cluster"] = cluster
    for name, given in named.items():
        if given is not None:
            _require_within(name, given, y)
    source = GridSource(
        variables=roles.x,
        x=tuple(variables),
        y=y,
        sigma=sigma,
        where=where,
        cluster=cluster,
        leaf_shape=y.shape,
    )
    if source.num_rows == 0:
        raise DataError(f"`ds` must have rows, got `y` of shape {y.shape}")
    return source, axes, num_clusters


def build_stored_source(
    ds: xr.Dataset, sigma: NameOrArray | float | None = None
) -> tuple[GridSource, bool]:
    """Rows of the arrays ``x`` of shape ``(m,)`` or ``(m, variables)`` and ``y``.

    Also whether `x` has an axis for its variables; each is read as a column of its own.

    Raises
    ------
    ValueError
        As `build_dataset_source`.
    """
    x = ds["x"]
    parts = [x] if x.ndim == 1 else [x[:, i] for i in range(x.shape[1])]
    names = ("x",) if len(parts) == 1 else tuple(f"x{i}" for i in range(len(parts)))
    rows = ds.drop_vars("x").assign(dict(zip(names, parts, strict=True)))
    source, *_ = build_dataset_source(rows, DatasetRoles(x=names, y="y", sigma=sigma))
    return source, x.ndim == 2


def column_of(name: str, variable: xr.Variable) -> Column:
    """A variable as a column: in memory, read from where xarray opened it, or of Dask blocks."""
    dims = tuple(str(dim) for dim in variable.dims)
    data = variable._data  # `.data` would load a lazily indexed variable
    if is_dask_array(data):
        # With `dask.array`, which nobody else needs and takes a third of a second.
        from nlsq_dask.sources.graph import stored_variable

        stored = stored_variable(variable)
        if stored is not None:
            return LazyColumn(variable=_watched(stored))
        require_plain_blocks(name, data)
        return DaskColumn(array=data, dims=dims)
    if is_loaded(variable):
        return MemoryColumn(values=np.asarray(variable.values), dims=dims)
    return LazyColumn(variable=_watched(variable))


def is_loaded(variable: xr.Variable) -> bool:
    """Whether the values are in memory; xarray does not say so of the levels of a MultiIndex."""
    data: Any = variable._data
    return variable._in_memory or isinstance(data, PandasIndexingAdapter)


def _watched(variable: xr.Variable) -> xr.Variable:
    """Watched while it is read, where Zarr reads it."""
    if "zarr" not in sys.modules:  # nothing that it has opened
        return variable
    from nlsq_dask.sources.watched import watched  # loads Zarr

    return watched(variable)


def _require_no_time_zone(name: str, variable: xr.Variable) -> None:
    """An index of pandas knows its zone; the values that xarray makes of it do not."""
    if variable.dtype.kind == "M" and not isinstance(variable.dtype, np.dtype):
        raise ValueError(
            f"`{name}` must hold times without a time zone, got {variable.dtype}; "
            f"`ds.assign_coords({name}=ds.indexes[{name!r}].tz_convert(None))` has them in UTC"
        )


def dataset_of(source: GridSource) -> xr.Dataset:
    """The variables and `y` of rows that came from no dataset, as lazy as they are."""
    columns = {**dict(zip(source.variables, source.x, strict=True)), "y": source.y}
    return xr.Dataset({name: _variable_of(column) for name, column in columns.items()})


def _variable_of(column: Column) -> xr.Variable:
    if isinstance(column, TimeColumn):
        return _variable_of(column.column)
    if isinstance(column, LazyColumn):
        return column.variable
    if isinstance(column, DaskColumn):
        return xr.Variable(column.dims, column.array)
    return xr.Variable(column.dims, column.read(tuple(map(slice, column.shape))))


def pick_y(ds: xr.Dataset, roles: DatasetRoles) -> xr.DataArray:
    """What is fitted: as it was given, or the only data variable that it can be."""
    if roles.y is not None:
        return _resolve(ds, "y", roles.y)
    others = (roles.sigma, roles.where, roles.cluster)
    taken = (*roles.x, *(name for name in others if isinstance(name, str)))
    needed = {dim for name in roles.x for dim in dimension_or_variable(ds, name).dims}
    left = [
        str(name)
        for name, array in ds.data_vars.items()
        if name not in taken
        and array.dtype.kind in "iuf"
        and needed <= set(array.dims)
        and array.ndim > 0
    ]
    if len(left) != 1:
        raise ValueError(
            f"`y` must be given: besides {list(dict.fromkeys(taken))}, the model's variables (`x`) "
            "and what `sigma`, `where` and `cluster` name, `ds` has "
            f"{left or 'no numeric data variables over their dimensions'}"
        )
    return ds[left[0]]


def _resolve(ds: xr.Dataset, argument: str, given: NameOrArray | float) -> xr.DataArray:
    if isinstance(given, xr.DataArray):
        sizes = {dim: size for dim, size in ds.sizes.items() if dim in given.dims}
        wrong = {
            str(d): (given.sizes[d], size) for d, size in sizes.items() if given.sizes[d] != size
        }
        if wrong:
            raise ValueError(
                f"`{argument}` must have the lengths of `ds`, got other ones (its, that of `ds`) "
                f"along {wrong}"
            )
        try:
            xr.align(given, ds, join="exact", copy=False)
        except ValueError as error:
            raise ValueError(
                f"`{argument}` must have the coordinates of `ds`; align them first: {error}"
            ) from None
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"`{argument}` must be the name of a variable of `ds` or an xarray.DataArray, "
            f"got {shown(given)}"
        )
    if given not in ds.variables:
        raise ValueError(
            f"`{argument}` must name a variable of `ds`, {sorted(map(str, ds.variables))}, "
            f"got {given!r}"
        )
    return ds[given]


def dimension_or_variable(ds: xr.Dataset, name: str) -> xr.DataArray:
    """A variable, or the positions along a dimension that has no coordinate."""
    if name in ds.variables:
        return ds[name]
    if name in ds.sizes:
        return xr.DataArray(np.arange(ds.sizes[name], dtype=np.float64), dims=name)
    raise ValueError(
        f"`x` must name variables, coordinates or dimensions of `ds`, {sorted(known_names(ds))}, "
        f"got {name!r}"
    )


def _numeric(name: str, array: xr.DataArray) -> Column:
    column = column_of(name, array.variable)
    if column.dtype.kind not in "iufb":
        raise ValueError(f"`{name}` must hold real numbers, got dtype {column.dtype}")
    return column


def _require_within(name: str, column: Column, y: Column) -> None:
    extra = [dim for dim in column.dims if dim not in y.dims]
    if extra:
        raise ValueError(f"`{name}` must have dimensions of `y` only, {y.dims}, got {column.dims}")
    lengths = dict(zip(y.dims, y.shape, strict=True))
    for dim, length in zip(column.dims, column.shape, strict=True):
        if length != lengths[dim]:
            raise ValueError(
                f"`{name}` must be as long as `y` along {dim!r}, {lengths[dim]}, got {length}"
            )
