"""Where rows came from: what a user called data, in words that can be kept with a result."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nlsq_dask.sources.base import Source
from nlsq_dask.sources.columns import TimeAxis
from nlsq_dask.sources.grid import GridSource

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "DataRecord",
    "Origin",
    "VariableRecord",
    "describe_store",
    "origin_of_dataset",
    "origin_of_source",
    "units_of",
]


@dataclass(frozen=True, kw_only=True)
class VariableRecord:
    """An array of the data: its name, and the units of the numbers that were read from it.

    Of times, `time_units` and `calendar` say in CF's words how they became numbers.
    """

    name: str
    units: str = ""  # not known
    time_units: str | None = None
    calendar: str | None = None

    @property
    def axis(self) -> TimeAxis | None:
        """How times become the numbers that the model was fitted to; None for numbers."""
        if self.time_units is None:
            return None
        return TimeAxis.from_units(self.time_units, self.calendar)


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """What was fitted: text alone, saved with the result. No credentials."""

    description: str = ""
    dims: tuple[str, ...] = ()  # of `y`; none for a source that has only chunks
    y: VariableRecord = VariableRecord(name="y")
    x: tuple[VariableRecord, ...] = ()
    sigma: str = ""
    where: str = ""
    cluster: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """The record, and the dataset itself as it was given, for as long as the process lives."""

    record: DataRecord
    ds: xr.Dataset | None = None
    y: xr.DataArray | None = None


def describe_store(store: object) -> str:
    """The path or URL of a store, without user, password, query and fragment.

    Examples
    --------
    >>> describe_store("https://me:secret@example.org/sst.zarr?token=abc")
    'https://example.org/sst.zarr'
    """
    text = os.fspath(store) if isinstance(store, os.PathLike) else str(store)
    if "://" not in text:
        return text
    return re.split(r"[?#]", re.sub(r"//[^/?#]*@", "//", text))[0]


def origin_of_source(source: Source, description: str = "") -> Origin:
    """Of arrays, whose columns have only places; or of a user's own source."""
    dims = source.dims if isinstance(source, GridSource) else ()
    kind = "arrays" if dims else type(source).__name__
    return Origin(
        record=DataRecord(
            description=description or f"{kind} of {source.num_rows:,} rows",
            dims=dims,
            x=tuple(VariableRecord(name=name) for name in source.variables),
        )
    )


def origin_of_dataset(
    ds: xr.Dataset,
    y: xr.DataArray,
    axes: Mapping[str, TimeAxis],
    roles: Mapping[str, Any],
    description: str = "",
) -> Origin:
    """Of named variables: `roles` has the names of `x`, and what was given for the others."""
    text = description or _describe_dataset(ds)
    return Origin(
        record=DataRecord(
            description=text,
            dims=tuple(map(str, y.dims)),
            y=VariableRecord(name="y" if y.name is None else str(y.name), units=units_of(y.attrs)),
            x=tuple(_variable(ds, name, axes.get(name)) for name in roles["x"]),
            **{role: _name_of(roles[role]) for role in ("sigma", "where", "cluster")},
        ),
        ds=ds,
        y=y,
    )


def units_of(attributes: Mapping[Any, Any]) -> str:
    """The attribute `units`, without the origin of a time; empty where there is none."""
    return str(attributes.get("units", "")).partition(" since ")[0].strip()


def _variable(ds: xr.Dataset, name: str, axis: TimeAxis | None) -> VariableRecord:
    if axis is None:
        attributes = ds[name].attrs if name in ds.variables else {"units": "1"}  # positions
        return VariableRecord(name=name, units=units_of(attributes))
    return VariableRecord(name=name, units=axis.unit, time_units=axis.units, calendar=axis.calendar)


def _name_of(given: Any) -> str:
    if given is None:
        return ""
    return (
        given
        if isinstance(given, str)
        else ("a DataArray" if given.name is None else str(given.name))
    )


def _describe_dataset(ds: xr.Dataset) -> str:
    sizes = ", ".join(f"{dim}: {size:,}" for dim, size in ds.sizes.items())
    source = ds.encoding.get("source")
    return f"xarray.Dataset ({sizes})" + (f" of {describe_store(source)}" if source else "")
