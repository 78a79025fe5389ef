"""Results in files: netCDF4 or Zarr, written whole or not at all, read as data from a stranger.

Neither format is harmless by itself. Zarr finds codecs by name among all that are installed, and
one of numcodecs' unpickles what it reads, where it is allowed to. HDF5 files may point to others,
and both may hold gigabytes in few bytes. So arrays are written plainly, and what is not plain is
refused before it is read: see `nlsq_dask.results.stored`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlsq_dask.atomic import sync_folder, temporary_beside, write_synced
from nlsq_dask.errors import ResultFileError
from nlsq_dask.plain_hdf5 import NotPlainError
from nlsq_dask.require import require_path, shown
from nlsq_dask.results.labelled import ARRAYS, ATTRIBUTES, FORMAT, from_stored, to_dataset
from nlsq_dask.results.outcome import Outcome
from nlsq_dask.results.stored import format_of, read_stored

if TYPE_CHECKING:
    import xarray as xr
    from zarr.core.buffer import Buffer

__all__ = ["load", "require_place", "save"]

_SUFFIXES = (".nc", ".h5", ".zarr")
_SETTING_DASK = threading.Lock()


def save(fit: Outcome, path: str | os.PathLike[str]) -> None:
    """What `FitResult.save` documents."""
    place = require_place(path)
    temporary = temporary_beside(place)
    ds = to_dataset(fit)
    # Bits as they are: no value stands for a missing one.
    encoding: dict[Any, Any] = {name: {"_FillValue": None} for name in ds.data_vars}
    try:
        if place.suffix == ".zarr":
            _write_folder(ds, temporary, encoding)
        else:
            write_synced(temporary, _netcdf(ds, encoding))
        _replace(temporary, place)
    except OSError as error:
        error.add_note(
            f"The result could not be saved as {str(place)!r}; what was there before is whole."
        )
        raise
    finally:
        _remove(temporary)
    sync_folder(place.parent)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of the result that was saved: see `FitResult.load`."""
    place = _local_path(path)
    try:
        os.stat(place)
    except OSError as error:
        raise FileNotFoundError(
            f"`path` must name a saved result, got {shown(str(place))}: not there "
            f"({error.strerror})"
        ) from None
    with _as_refusal(place):
        return from_stored(read_stored(place, ATTRIBUTES, ARRAYS))


def _local_path(path: str | os.PathLike[str]) -> Path:
    text = require_path("path", path)
    if "://" in text or Path(text).suffix not in _SUFFIXES:
        raise ResultFileError(
            f"`path` must be local and end in one of {', '.join(_SUFFIXES)}, got {shown(text)}"
        )
    return Path(os.path.realpath(text))


# -- out


def require_place(path: str | os.PathLike[str]) -> Path:
    """See that a result can be written here, and that nothing else would be lost.

    Raises
    ------
    ResultFileError
        If not.
    """
    place = _local_path(path)
    temporary = temporary_beside(place)
    try:
        is_there = place.exists()
        with open(temporary, "xb"):
            pass
        temporary.unlink()
    except OSError as error:
        raise ResultFileError(
            f"`path` must be in a folder that can be written to, got {shown(str(place))}: "
            f"{type(error).__name__}: {error.strerror}"
        ) from error
    if is_there and format_of(place) != FORMAT:
        raise ResultFileError(
            f"`path` must name a new file or a saved result, got {str(place)!r}, which is "
            "something else and would be overwritten"
        )
    return place


def _write_folder(ds: xr.Dataset, temporary: Path, encoding: Mapping[Any, Any]) -> None:
    """Each array is one chunk, as it is in memory; of text in arrays, only format 2 is settled.

    Zarr writes in threads that go on after one has failed. It writes to memory here, and files
    come from this thread.
    """
    from zarr.storage import MemoryStore

    plain = {
        name: {
            **encoding.get(name, {}),
            "compressors": None,
            "chunks": tuple(max(n, 1) for n in variable.shape),
        }
        for name, variable in ds.variables.items()
    }
    written: dict[str, Buffer] = {}
    ds.to_zarr(
        MemoryStore(written),
        zarr_format=2,
        consolidated=True,
        encoding=plain,
        write_empty_chunks=True,
    )
    for key, content in written.items():
        file = temporary / key
        file.parent.mkdir(parents=True, exist_ok=True)
        write_synced(file, content.to_bytes())


def _netcdf(ds: xr.Dataset, encoding: Mapping[Any, Any]) -> bytes:
    """The file, made in memory: where the disk is full, HDF5 cannot close one, and h5py crashes.

    Where a client of Dask's is there, xarray would have its scheduler lock what nobody else sees.
    The setting is the whole process's: of two threads, one would put back what the other had set.
    """
    import dask

    with _SETTING_DASK, dask.config.set(scheduler="synchronous"):
        return bytes(ds.to_netcdf(engine="h5netcdf", encoding=encoding))


def _replace(temporary: Path, place: Path) -> None:
    """Give the new result the name; a folder's old one is moved aside first."""
    if not place.is_dir():
        os.replace(temporary, place)
        return
    old = temporary_beside(place)
    os.rename(place, old)
    try:
        os.rename(temporary, place)
    except OSError:
        os.rename(old, place)
        raise
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
    except (ResultFileError, NotPlainError) as error:
        raise ResultFileError(f"`path` {str(place)!r}: {error}") from None
    # What h5py raises where a file is not as HDF5 has it, and Python where text is not as said.
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ResultFileError(
            f"`path` {str(place)!r}: it is malformed ({type(error).__name__}: {error})"
        ) from error
