"""Opening a store by path or URL: metadata now, rows later, where they are computed on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import xarray as xr
import zarr
from zarr.abc.store import Store as ZarrStore

from nlsq_dask.errors import StoreNotFoundError

__all__ = ["open_store"]


def open_store(
    store: str | os.PathLike[str] | ZarrStore,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Open a Zarr or HDF5/netCDF4 store lazily, without Dask and without loading coordinates.

    HDF5 is read through h5py (xarray's ``h5netcdf`` engine); datasets without dimension scales
    get dimensions ``phony_dim_0``, … by length.

    Raises
    ------
    StoreNotFoundError
        If nothing is there.
    ValueError
        If what is there is neither a Zarr group nor an HDF5 file.
    """
    if isinstance(store, ZarrStore):
        return _open_zarr(store, None)
    path = os.fspath(store)
    is_local = "://" not in path
    if is_local and not Path(path).exists():
        raise StoreNotFoundError(f"`ds` must name a store that exists, got {path!r}")
    if is_local and storage_options:
        raise ValueError(
            f"`storage_options` must go with a URL, got the local path {path!r} and options "
            f"{sorted(storage_options)}"
        )
    if is_local and Path(path).is_file() and not path.endswith(".zip"):
        return _open_hdf5(path)
    return _open_zarr(path, storage_options)


def _open_zarr(store: Any, storage_options: Mapping[str, Any] | None) -> xr.Dataset:
    options = dict(storage_options) if storage_options else None
    try:
        with warnings.catch_warnings():
            # Format 3 does not have consolidated metadata; not finding it is no news.
            warnings.filterwarnings("ignore", message="Failed to open Zarr store with consolidated")
            return xr.open_dataset(
                store,
                engine="zarr",
                chunks=None,
                cache=False,
                storage_options=options,
                create_default_indexes=False,
            )
    except (FileNotFoundError, zarr.errors.NodeNotFoundError) as error:
        raise StoreNotFoundError(f"`ds` must name a Zarr group, got {store!r}: {error}") from error
    except (ValueError, ImportError) as error:  # an array, an unknown protocol or its package
        raise ValueError(f"`ds` must name a Zarr group, got {store!r}: {error}") from error


def _open_hdf5(path: str) -> xr.Dataset:
    if not h5py.is_hdf5(path):
        raise ValueError(
            f"`ds` must be a Zarr store or an HDF5/netCDF4 file, got {path!r}, which is neither; "
            "open it with xarray and pass the dataset"
        )
    return xr.open_dataset(
        path,
        engine="h5netcdf",
        chunks=None,
        cache=False,
        phony_dims="sort",
        create_default_indexes=False,
    )
