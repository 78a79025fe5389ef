"""Results in files: netCDF4 or Zarr, written whole or not at all, read as data from a stranger.

Neither format is harmless by itself. Zarr finds codecs by name among all that are installed, and
one of numcodecs' unpickles what it reads, where it is allowed to; so the codecs of every array are
looked at before Zarr sees the folder, and only compressors and text are let through. HDF5 files
may point to others: links are not followed, and neither are arrays that are kept elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from nlsq_dask.atomic import sync_file, sync_folder, temporary_beside
from nlsq_dask.errors import ResultFileError
from nlsq_dask.results.labelled import FORMAT, from_dataset, to_dataset
from nlsq_dask.results.outcome import Outcome

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["load", "save"]

_SUFFIXES = (".nc", ".h5", ".zarr")
_HARMLESS = {"blosc", "zstd", "lz4", "zlib", "gzip", "vlen-utf8"}


def save(fit: Outcome, path: str | os.PathLike[str]) -> None:
    """What `FitResult.save` documents."""
    place = _local_path(path)
    if place.exists() and _format_of(place) != FORMAT:
        raise ResultFileError(
            f"`path` must name a new file or a saved result, got {str(place)!r}, which is "
            "something else and would be overwritten"
        )
    ds, temporary = to_dataset(fit), temporary_beside(place)
    # Bits as they are: no value stands for a missing one.
    encoding = {name: {"_FillValue": None} for name in ds.data_vars}
    try:
        if place.suffix == ".zarr":
            # Of text in arrays, only format 2 is settled.
            ds.to_zarr(temporary, zarr_format=2, consolidated=True, encoding=encoding)
        else:
            ds.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)
            sync_file(temporary)
        _replace(temporary, place)
    finally:
        _remove(temporary)
    sync_folder(place.parent)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of the result that was saved: see `FitResult.load`."""
    place = _local_path(path)
    if not place.exists():
        raise FileNotFoundError(f"`path` must name a saved result, got {str(place)!r}: not there")
    with _as_refusal(place), _opened(place) as ds:
        return from_dataset(ds)


def _local_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` must be a path, got {path!r}")
    text = os.fspath(path)
    if "://" in text or Path(text).suffix not in _SUFFIXES:
        raise ResultFileError(
            f"`path` must be local and end in one of {', '.join(_SUFFIXES)}, got {text!r}"
        )
    return Path(os.path.realpath(text))


# -- out


def _replace(temporary: Path, place: Path) -> None:
    """Give the new result the name; a folder's old one is moved aside first."""
    if not place.is_dir():
        os.replace(temporary, place)
        return
    old = temporary_beside(place)
    os.rename(place, old)
    os.rename(temporary, place)
    shutil.rmtree(old)


def _remove(temporary: Path) -> None:
    """What a failure left behind."""
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


# -- in


@contextlib.contextmanager
def _as_refusal(place: Path) -> Iterator[None]:
    """Say which file it is."""
    try:
        yield
    except ResultFileError as error:
        raise ResultFileError(f"`path` {str(place)!r}: {error}") from None
    # What h5py, Zarr and xarray raise where a file is not as they have it.
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ResultFileError(
            f"`path` {str(place)!r}: it is malformed ({type(error).__name__}: {error})"
        ) from error


@contextlib.contextmanager
def _opened(place: Path) -> Iterator[xr.Dataset]:
    """The dataset, after a look at what reading it would do."""
    import xarray as xr

    if place.is_dir():
        _require_harmless_codecs(place)
        options: dict[str, Any] = {"engine": "zarr", "consolidated": False}
    else:
        _require_no_links(place)
        options = {"engine": "h5netcdf"}
    with xr.open_dataset(place, decode_times=False, **options) as ds:
        yield ds


def _format_of(place: Path) -> object:
    """What a file says that it is; None where it says nothing."""
    if place.is_file():
        if not h5py.is_hdf5(place):
            return None
        with h5py.File(place, "r") as file:
            return file.attrs.get("format")
    import zarr

    try:
        return zarr.open_group(place, mode="r").attrs.get("format")
    except (FileNotFoundError, ValueError):
        return None


def _require_harmless_codecs(place: Path) -> None:
    """Refuse arrays that are decoded by anything but what `save` writes."""
    for array in place.glob("**/.zarray"):
        described = json.loads(array.read_text(encoding="utf-8"))
        codecs = [described["compressor"], *(described["filters"] or [])]
        unknown = {codec["id"] for codec in codecs if codec is not None} - _HARMLESS
        if unknown:
            raise ResultFileError(f"its {array.parent.name!r} has the codecs {sorted(unknown)}")
    if any(place.glob("**/zarr.json")):
        raise ResultFileError("it must be of Zarr format 2, and is of format 3")


def _require_no_links(place: Path) -> None:
    """Refuse what leads out of the file."""
    if not h5py.is_hdf5(place):
        raise ResultFileError("it must be a netCDF4 file, and is not HDF5")
    with h5py.File(place, "r") as file:
        for name in file:
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise ResultFileError(f"its {name!r} is a link")
            member = file[name]
            if isinstance(member, h5py.Dataset) and (member.is_virtual or member.external):
                raise ResultFileError(f"its {name!r} is kept in another file")
