"""A saved result as arrays and text, from a netCDF4 file or a Zarr folder, as data from a stranger.

`save` writes both plainly: every array in one piece, without compression or filters. So there is
no codec that could be a bomb, or run what it decodes; and nothing is read but what `load` asks for
by name. HDF5 is read through a file that Python has opened, so that the library opens none. A Zarr
folder of this form is a text that describes an array, and a file that is its bytes: for these no
more of Zarr is needed, and its reader would follow links, look for codecs and take what is missing
to be the fill value.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nlsq_dask.machine import available_memory
from nlsq_dask.plain_hdf5 import NotPlainError, member, require_in_one_piece, require_within

__all__ = ["Stored", "format_of", "read_stored"]

_MOST_TEXT_BYTES = 2**26
_FEW_BYTES = 2**26  # of arrays, for which there is memory
# Of xarray's files: booleans are bytes there.
_DTYPES = {"<f8": np.float64, "<i8": np.int64, "|i1": np.bool_, "|b1": np.bool_}


@dataclass(frozen=True)
class Stored:
    """Attributes and arrays by name, as far as they were asked for and are there."""

    attributes: Mapping[str, str]
    arrays: Mapping[str, np.ndarray[Any, Any]]


def read_stored(place: Path, attributes: Collection[str], arrays: Collection[str]) -> Stored:
    """What of a file or folder has these names.

    Raises
    ------
    NotPlainError, KeyError, OSError, RuntimeError, TypeError, ValueError, OverflowError
        If it is not as `save` writes it.
    """
    read = _read_folder if place.is_dir() else _read_hdf5
    return read(place, attributes, arrays)


def format_of(place: Path) -> str | None:
    """What a file or folder says that it is; None where it says nothing."""
    try:
        return read_stored(place, ["format"], []).attributes.get("format")
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, OverflowError):
        return None


def _require_memory(num_bytes: int) -> None:
    """A file with holes may be larger than the disk that it is on."""
    if num_bytes <= _FEW_BYTES:
        return
    available = available_memory()
    if num_bytes > available:
        raise NotPlainError(f"its arrays have {num_bytes:,} bytes, and {available:,} are free")


def _as_bool(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if not np.isin(values.view(np.int8), (0, 1)).all():
        raise NotPlainError(f"its {name!r} has values that are neither true nor false")
    return values.astype(np.bool_)


# -- netCDF4


def _read_hdf5(place: Path, attributes: Collection[str], arrays: Collection[str]) -> Stored:
    if not place.is_file():  # a pipe would be waited for, a device may have no end
        raise NotPlainError("it is not a file")
    if not h5py.is_hdf5(place):
        raise NotPlainError("it must be a netCDF4 file, and is not HDF5")
    with open(place, "rb") as file, h5py.File(file, "r") as root:
        found = set(root).intersection(arrays)
        datasets = {name: member(root, name, h5py.Dataset) for name in sorted(found)}
        require_in_one_piece(datasets.values())
        require_within(file, datasets.values())
        _require_memory(sum(dataset.nbytes for dataset in datasets.values()))
        return Stored(
            {name: _attribute(root, name) for name in attributes if name in root.attrs},
            {name: _array(name, dataset) for name, dataset in datasets.items()},
        )


def _attribute(root: Any, name: str) -> str:
    """One text; a sequence of them could be of the same one, over and over."""
    attribute = root.attrs.get_id(name)
    if attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL:  # the empty text
        return ""
    if attribute.shape != () or h5py.check_string_dtype(attribute.dtype) is None:
        raise NotPlainError(f"its attribute {name!r} is not one text")
    if attribute.dtype.kind == "S" and attribute.dtype.itemsize > _MOST_TEXT_BYTES:
        raise NotPlainError(f"its attribute {name!r} has {attribute.dtype.itemsize:,} bytes")
    value = root.attrs[name]
    return value.decode() if isinstance(value, bytes) else str(value)


def _array(name: str, dataset: Any) -> np.ndarray[Any, Any]:
    dtype = _dtype(name, dataset.dtype.str)
    values = np.asarray(dataset[()])
    return _as_bool(name, values) if dtype is np.bool_ else values.astype(dtype, copy=False)


def _dtype(name: str, text: object) -> Any:
    if not isinstance(text, str) or text not in _DTYPES:
        raise NotPlainError(f"its {name!r} is of {text!r:.100}, not of numbers as they are saved")
    return _DTYPES[text]


# -- Zarr, format 2


def _read_folder(place: Path, attributes: Collection[str], arrays: Collection[str]) -> Stored:
    if not (place / ".zgroup").exists():
        raise NotPlainError("it must be a Zarr group of format 2, and is none")
    texts = _json(place, ".zattrs")
    wrong = [name for name in attributes if not isinstance(texts.get(name, ""), str)]
    if wrong:
        raise NotPlainError(f"its attributes {wrong} are not text")
    names = [name for name in sorted(arrays) if os.path.lexists(place / name)]
    shapes = {name: _described(place, name) for name in names}
    sizes = {
        name: math.prod(shape) * np.dtype(text).itemsize for name, (text, shape) in shapes.items()
    }
    _require_memory(sum(sizes.values()))
    return Stored(
        {name: texts[name] for name in attributes if name in texts},
        {name: _chunk(place, name, *shapes[name]) for name in names},
    )


def _described(place: Path, name: str) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of an array that is one chunk as it is in memory."""
    if not stat.S_ISDIR(os.lstat(place / name).st_mode):
        raise NotPlainError(f"its {name!r} is a link, or not a folder")
    about = _json(place, f"{name}/.zarray")
    codecs = [about["compressor"], *(about["filters"] or [])]
    if codecs != [None]:
        raise NotPlainError(f"its {name!r} has codecs, {codecs!r:.100}, and is saved without")
    shape, text = about["shape"], about["dtype"]
    _dtype(name, text)
    lengths_are_right = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    is_one_chunk = lengths_are_right and about["chunks"] == [max(n, 1) for n in shape]
    if not is_one_chunk or about["zarr_format"] != 2 or about["order"] != "C":
        raise NotPlainError(f"its {name!r} is not stored in one piece")
    return text, tuple(shape)


def _chunk(place: Path, name: str, text: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    num_bytes = math.prod(shape) * np.dtype(text).itemsize
    key = ".".join("0" for _ in shape) or "0"
    content = _content(place, f"{name}/{key}", num_bytes) if num_bytes else b""
    if len(content) != num_bytes:
        raise NotPlainError(f"its {name!r} must have {num_bytes:,} bytes, got {len(content):,}")
    values = np.frombuffer(content, text).reshape(shape)
    dtype = _dtype(name, text)
    return _as_bool(name, values) if dtype is np.bool_ else values.astype(dtype)


def _json(place: Path, key: str) -> dict[str, Any]:
    try:
        found = json.loads(_content(place, key, _MOST_TEXT_BYTES))
    except RecursionError:
        raise NotPlainError(f"its {key!r} is nested too deeply") from None
    if not isinstance(found, dict):
        raise NotPlainError(f"its {key!r} is not an object of JSON")
    return found


def _content(place: Path, key: str, most_bytes: int) -> bytes:
    """The bytes of a file that is in the folder itself: a link may lead anywhere."""
    path = place / key
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise NotPlainError(f"its {key!r} is a link, or not a file")
    if status.st_size > most_bytes:
        raise NotPlainError(f"its {key!r} has {status.st_size:,} bytes, of at most {most_bytes:,}")
    return path.read_bytes()
