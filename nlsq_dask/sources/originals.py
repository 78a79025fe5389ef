"""Loaded coordinates, and the stored arrays that they were loaded from.

xarray loads a coordinate that indexes a dimension as it opens a store (`xr.open_zarr`). Workers
that read the other columns from that store can read the coordinate there too, as they do of a
store given by path: that takes less time than to send it to them. Whether it is the same is told
by comparing all values; names, and where a dataset says that it came from, prove nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import xarray as xr

from nlsq_dask._typing import Index
from nlsq_dask.sources.base import Column
from nlsq_dask.sources.columns import LazyColumn, TimeColumn, leading_blocks, stored_among
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.sources.retrying import UNDECODABLE
from nlsq_dask.sources.stores import open_group_of
from nlsq_dask.sources.transport import transport_errors
from nlsq_dask.sources.xarray import column_of

__all__ = ["with_originals"]

_COMPARED_BYTES = 2**22  # at once, in whole chunks of the store
_NUM_THREADS = 2


def with_originals(source: GridSource, roles: Collection[str]) -> GridSource:
    """The same rows, with loaded variables read from the Zarr group of the other columns.

    Parameters
    ----------
    source : GridSource
    roles : collection of str
        Of the columns that would be sent. Of these, variables are looked for, by their names.

    Returns
    -------
    GridSource
        With a `LazyColumn` for each variable that the group has with the same dimensions, dtype
        and bits.
    """
    arrays = [column.zarr_array for column in stored_among(source.columns.values())]
    array = next((array for array in arrays if array is not None), None)
    names = {f"x{i}": name for i, name in enumerate(source.variables) if f"x{i}" in roles}
    if array is None or not names:
        return source
    try:
        group = open_group_of(array)
        stored = {
            role: _as_stored(source.columns[role], group[name].variable)
            for role, name in names.items()
            if name in group.variables
        }
    except _unreadable():
        return source  # whoever reads the other columns will tell, if it concerns these
    return source.with_columns(stored)


def _as_stored(loaded: Column, variable: xr.Variable) -> Column:
    """`variable` as a column, where it is what was loaded; else what was loaded."""
    if isinstance(loaded, TimeColumn):
        return replace(loaded, column=_as_stored(loaded.column, variable))
    stored = column_of("x", variable)
    is_same = (
        isinstance(stored, LazyColumn)
        and (stored.dims, stored.shape, stored.dtype) == (loaded.dims, loaded.shape, loaded.dtype)
        and stored.dtype.kind in "biufmM"
        and stored.chunks is not None
        and _have_same_bits(stored, loaded)
    )
    return stored if is_same else loaded


def _unreadable() -> tuple[type[Exception], ...]:
    return (*transport_errors(), *UNDECODABLE)


def _have_same_bits(stored: LazyColumn, loaded: Column) -> bool:
    def is_same(index: Index) -> bool:
        ours, theirs = (
            np.ascontiguousarray(column.read(index)).reshape(-1).view(np.uint8)
            for column in (loaded, stored)
        )
        return np.array_equal(ours, theirs)

    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="nlsq-compare") as threads:
        return all(threads.map(is_same, leading_blocks(stored, _COMPARED_BYTES)))
