"""Opening a store by path or URL: metadata now, rows later, where they are computed on."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import fsspec
import h5py
import xarray as xr
from zarr.abc.store import Store as ZarrStore
from zarr.storage import ZipStore

from nlsq_dask.errors import StoreDeniedError, StoreNotFoundError
from nlsq_dask.require import shown
from nlsq_dask.sources.objects import (
    PROTOCOLS,
    build_object_store,
    protocol_of,
    without_credentials,
)
from nlsq_dask.sources.retrying import pauses
from nlsq_dask.sources.transport import (
    comes_late,
    is_transient,
    redacted,
    reported,
    reported_file,
    transport_errors,
    transport_of_store,
    unwatched,
)

__all__ = ["open_group_of", "open_store"]

_ANSWER_SECONDS = 30
_HDF5_SUFFIXES = (".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".he5")


def open_store(
    store: str | os.PathLike[str] | ZarrStore,
    storage_options: Mapping[str, Any] | None = None,
    argument: str = "ds",
) -> xr.Dataset:
    """Open a Zarr or HDF5/netCDF4 store lazily, without Dask and without loading coordinates.

    A URL is of Zarr, and read by obstore or by fsspec: `nlsq_dask.sources.objects` has the rule.
    HDF5 is a local file, read through h5py (xarray's ``h5netcdf`` engine); datasets without
    dimension scales get dimensions ``phony_dim_0``, … by length. `argument` is what the caller
    calls the store.

    Raises
    ------
    StoreNotFoundError
        If nothing is there.
    StoreDeniedError, StoreUnreachableError
        If it may not be read, or what should serve it does not answer within half a minute.
    ImportError
        If a package is missing, with the extra that has it.
    ValueError
        If what is there is neither a Zarr group nor an HDF5 file.
    """
    if isinstance(store, ZarrStore):
        return _open_zarr(store, None, _Asked(argument, redacted(repr(store))))
    path = _local_path(os.fspath(store))
    if "://" in path:
        return _open_url(path, storage_options or {}, argument)
    asked = _Asked(argument, repr(path))
    _require_there(path, asked)
    if storage_options:
        raise ValueError(
            f"`storage_options` must go with a URL, got the local path {path!r} and options "
            f"{sorted(storage_options)}"
        )
    if not Path(path).is_file():
        return _open_zarr(path, None, asked)
    if zipfile.is_zipfile(path):
        return _open_zarr(ZipStore(path, mode="r"), None, asked)
    return _open_hdf5(path, asked)


def open_group_of(array: Any) -> xr.Dataset:
    """The Zarr group that a `zarr.Array` is in, opened as by `open_store`.

    Raises
    ------
    StoreNotFoundError, StoreDeniedError, StoreUnreachableError, ValueError
        As `open_store`.
    """
    store = unwatched(array.store)
    group = array.path.rpartition("/")[0]
    asked = _Asked("ds", redacted(repr(store)))
    return _open_group(store, None, asked, array.metadata.zarr_format, group)


@dataclass(frozen=True)
class _Asked:
    """For errors: what the caller calls the store, and its name there, without secrets."""

    argument: str
    name: str


def _require_there(path: str, asked: _Asked) -> None:
    try:
        os.stat(path)
    except OSError as error:
        why = "" if isinstance(error, FileNotFoundError) else f": {error.strerror}"
        raise StoreNotFoundError(
            f"`{asked.argument}` must name a store that exists, got {shown(path)}{why}"
        ) from None


def _local_path(given: str) -> str:
    """A URL of this machine's own files as the path that it is."""
    return url2pathname(urlsplit(given).path) if given.startswith("file://") else given


def _open_url(given: str, storage_options: Mapping[str, Any], argument: str) -> xr.Dataset:
    url, options = without_credentials(given, storage_options)
    name = repr(redacted(url))
    asked = _Asked(argument, name)
    if protocol_of(url) in PROTOCOLS and urlsplit(url).query:
        raise ValueError(
            f"`{argument}` must be a URL without a query, got {name}: a Zarr store is many "
            "objects, and a query, such as a signature, is for one; give credentials by "
            "`storage_options`"
        )
    if urlsplit(url).path.endswith(_HDF5_SUFFIXES):
        # h5py reads a URL through a file object of Python's, and crashes when the process ends.
        raise ValueError(
            f"`{argument}` must be a Zarr group where it is a URL, got {name}, an HDF5 file by its "
            "name; copy it to a disk that the workers see, or make a virtual Zarr store of it "
            "(VirtualiZarr, kerchunk) and pass the dataset that xarray opens of that"
        )
    with reported(name, argument):
        store = build_object_store(url, options)
    if store is not None:
        return _open_zarr(store, None, asked)
    with _refused(asked):
        _await_answer(url, options)
    return _open_zarr(url, options, asked)


def _await_answer(url: str, options: Mapping[str, Any]) -> None:
    """Ask once what fsspec is to read: left to itself it may wait for minutes."""
    fs, path = fsspec.core.url_to_fs(url, **options)
    if fs.async_impl:
        fsspec.asyn.sync(fs.loop, fs._exists, path, timeout=_ANSWER_SECONDS)


def _open_zarr(store: Any, options: Mapping[str, Any] | None, asked: _Asked) -> xr.Dataset:
    try:
        return _with_variables(_open_group(store, options, asked, None), asked)
    except StoreDeniedError:
        # Who may not list is denied what does not exist, and so the other format's metadata.
        for zarr_format in (3, 2):
            with contextlib.suppress(StoreDeniedError, StoreNotFoundError):
                return _with_variables(_open_group(store, options, asked, zarr_format), asked)
        raise


def _open_group(
    store: Any,
    options: Mapping[str, Any] | None,
    asked: _Asked,
    zarr_format: int | None,
    group: str | None = None,
) -> xr.Dataset:
    with warnings.catch_warnings(), _refused(asked):
        # Format 3 does not have consolidated metadata; not finding it is no news.
        warnings.filterwarnings("ignore", message="Failed to open Zarr store with consolidated")
        return _patiently(
            functools.partial(
                xr.open_dataset,
                store,
                engine="zarr",
                group=group,
                chunks=None,
                cache=False,
                storage_options=dict(options) if options else None,
                zarr_format=zarr_format,
                create_default_indexes=False,
            ),
            _transport_of(store),
        )


def _transport_of(store: Any) -> str:
    """What reads a store of Zarr's: by its URL fsspec does, by its path Zarr itself."""
    if isinstance(store, str):
        return "fsspec" if "://" in store else "LocalStore"
    return transport_of_store(store)


def _patiently(open_dataset: Callable[[], xr.Dataset], transport: str) -> xr.Dataset:
    """Open again where metadata came from afar as what is no JSON, or not at all."""
    waits = pauses()
    while True:
        try:
            return open_dataset()
        except (json.JSONDecodeError, UnicodeDecodeError):
            wait = next(waits, None) if comes_late(transport) else None
            if wait is None:
                raise
        except transport_errors() as error:
            wait = next(waits, None) if is_transient(error, transport) else None
            if wait is None:
                raise
        time.sleep(wait)


@contextlib.contextmanager
def _refused(asked: _Asked) -> Iterator[None]:
    """What keeps a store from being opened, in words that hold no secrets."""
    try:
        with reported(asked.name, asked.argument):
            yield
    except ImportError as error:
        raise ImportError(
            f"`{asked.argument}` must be of a protocol whose package is installed, got "
            f"{asked.name}: {error}; "
            "pip install 'nlsq-dask[cloud]', and where options of fsspec's own are given, gcsfs "
            "for Google Cloud, adlfs for Azure"
        ) from None
    except (ValueError, TypeError) as error:  # an array, an unknown protocol, an unknown option
        raise ValueError(
            f"`{asked.argument}` must name a Zarr group, got {asked.name}: {redacted(error)}"
        ) from None


def _open_hdf5(path: str, asked: _Asked) -> xr.Dataset:
    if not h5py.is_hdf5(path):
        raise ValueError(
            f"`{asked.argument}` must be a Zarr store or an HDF5/netCDF4 file, got {asked.name}, "
            "which is neither; "
            "open it with xarray and pass the dataset"
        )
    with reported_file(repr(path), asked.argument):
        ds = xr.open_dataset(
            path,
            engine="h5netcdf",
            chunks=None,
            cache=False,
            phony_dims="sort",
            create_default_indexes=False,
        )
    return _with_variables(ds, asked)


def _with_variables(ds: xr.Dataset, asked: _Asked) -> xr.Dataset:
    if ds.variables or ds.sizes:
        return ds
    raise ValueError(
        f"`{asked.argument}` must have variables, got {asked.name}, which has none at its root; "
        "of a group in it, pass the dataset that xarray opens with `group=`"
    )
