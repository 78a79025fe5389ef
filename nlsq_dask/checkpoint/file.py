"""Where a fit stands, in one HDF5 file: plain numbers and text, written whole or not at all.

Layout, format 3.0::

    bytes 0 to 511   the line "nlsq_dask checkpoint", and the SHA-256 of all that follows
    attributes       format, format_version: fixed-length UTF-8
    /identity        what the fit is of: to resume another is refused, by name
    /about           versions, the time of writing; for whoever looks
    /warmup_state    phase 1, while it is under way
    /warmup          what it came to
    /passes          phase 2: solver, history, statistics; and the parts of a sandwich covariance
    /newton          in its place, where there are many parameters

Each group holds datasets alone, under dotted names: 64-bit floats and integers, bytes for
booleans, fixed-length UTF-8 for text; contiguous, without filters. HDF5 tools read it.

A checkpoint is read as data from a stranger. The digest is compared before the HDF5 library sees
a byte, so that damage by accident never gets as far. After that only hard links to datasets of
these kinds are followed, and only those are read whose bytes are in the file: what is small on
disk cannot be large in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import h5py
import numpy as np

from nlsq_dask.atomic import sync_folder, temporary_beside, write_synced
from nlsq_dask.checkpoint.flat import Leaf
from nlsq_dask.errors import CheckpointError
from nlsq_dask.plain_hdf5 import NotPlainError, member, require_in_one_piece, require_within
from nlsq_dask.require import require_path, shown

__all__ = [
    "FORMAT_VERSION",
    "Sections",
    "local_path",
    "read_checkpoint",
    "require_writable",
    "write_checkpoint",
]

Sections: TypeAlias = dict[str, dict[str, Leaf]]

FORMAT_VERSION = "4.0"
_FORMAT = "nlsq_dask checkpoint"
_MAGIC = f"{_FORMAT}\n".encode()
_HEADER_BYTES = 512  # HDF5's user block
_SECTIONS = ("identity", "about", "warmup_state", "warmup", "passes", "newton")
_MAX_LEAVES = 10_000  # in a section
_DTYPES = {np.dtype(np.float64): np.float64, np.dtype(np.int64): np.int64}
_BLOCK_BYTES = 2**20


def local_path(argument: str, value: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint; links are followed, so that what they point to is replaced.

    Raises
    ------
    TypeError, CheckpointError
        If it is not a path, or a URL.
    """
    text = require_path(argument, value)
    if "://" in text:
        raise CheckpointError(
            f"`{argument}` must be a local path, got the URL {text!r}: a checkpoint is replaced "
            "in one step, which object stores and web servers do not offer"
        )
    return Path(os.path.realpath(text))


def require_writable(argument: str, path: Path) -> None:
    """See that a checkpoint can be written here, and that nothing else would be lost.

    Raises
    ------
    CheckpointError
        If the folder is not there or not writable, or the file is no checkpoint.
    """
    trial = temporary_beside(path)
    try:
        if path.exists() and not _is_checkpoint(path):
            raise CheckpointError(
                f"`{argument}` must name a new file or a checkpoint, got {str(path)!r}, which is "
                "something else and would be overwritten"
            )
        with open(trial, "xb"):
            pass
        trial.unlink()
    except OSError as error:
        raise CheckpointError(
            f"`{argument}` must be in a folder that can be written to, got {shown(str(path))}: "
            f"{type(error).__name__}: {error.strerror}"
        ) from error


def _is_checkpoint(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


# -- out


def write_checkpoint(path: Path, sections: Mapping[str, Mapping[str, Leaf]]) -> None:
    """Replace the file by these sections: whoever looks sees the old one or the new one.

    Raises
    ------
    OSError
        If it cannot be written; what was there before is as it was.
    """
    image = _image(sections)
    header = _MAGIC + hashlib.sha256(memoryview(image)[_HEADER_BYTES:]).hexdigest().encode()
    temporary = temporary_beside(path)
    try:
        write_synced(
            temporary, header.ljust(_HEADER_BYTES, b"\n"), memoryview(image)[_HEADER_BYTES:]
        )
        os.replace(temporary, path)
    except OSError as error:
        error.add_note(
            f"The checkpoint {str(path)!r} could not be written; if there was one before, it is "
            "whole, and the fit can be resumed from it."
        )
        raise
    finally:  # an interrupt too leaves nothing behind
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _image(sections: Mapping[str, Mapping[str, Leaf]]) -> bytes:
    memory = io.BytesIO()
    with h5py.File(memory, "w", userblock_size=_HEADER_BYTES) as file:
        for name, text in (("format", _FORMAT), ("format_version", FORMAT_VERSION)):
            file.attrs.create(name, _text(text))
        for section, leaves in sections.items():
            group = file.create_group(section)
            for name, leaf in leaves.items():
                group.create_dataset(name, data=_text(leaf) if isinstance(leaf, str) else leaf)
    return memory.getvalue()


def _text(text: str) -> np.ndarray:
    encoded = text.encode()
    return np.array(encoded, h5py.string_dtype("utf-8", max(len(encoded), 1)))


# -- in


def read_checkpoint(path: Path) -> Sections:
    """The sections of a checkpoint.

    Raises
    ------
    CheckpointError
        If the file is not there or not a checkpoint, is damaged, or was written by a later
        version of this package.
    """
    try:
        # A pipe would be waited for, a device may have no end.
        if path.exists() and not path.is_file():
            raise CheckpointError(
                f"`resume_from_checkpoint` must name a checkpoint, got {str(path)!r}, which is not "
                "a file"
            )
        with open(path, "rb") as file, _as_refusal(path):
            _check_digest(file)
            return _read_sections(file)
    except OSError as error:
        raise CheckpointError(
            f"`resume_from_checkpoint` must name a checkpoint, got {shown(str(path))}: "
            f"{type(error).__name__}: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def _as_refusal(path: Path) -> Iterator[None]:
    """Say which file it is."""
    try:
        yield
    except (CheckpointError, NotPlainError) as error:
        raise CheckpointError(f"The checkpoint {str(path)!r} cannot be used: {error}") from None
    # What h5py raises where a file that has its digest is not as HDF5 has it.
    except (KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} cannot be used: it is malformed "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_digest(file: BinaryIO) -> None:
    header = file.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC):
        raise CheckpointError("it is not a checkpoint of this package")
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    expected = _MAGIC + digest.hexdigest().encode()
    if header != expected.ljust(_HEADER_BYTES, b"\n"):
        raise CheckpointError("it is damaged or cut short: its bytes do not have their digest")
    file.seek(0)


def _read_sections(file: BinaryIO) -> Sections:
    with h5py.File(file, "r") as root:
        if _attribute(root, "format") != _FORMAT:
            raise CheckpointError("it is not a checkpoint of this package")
        version = _attribute(root, "format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"it has format {version}, and this version of the package reads {FORMAT_VERSION}"
            )
        groups = [member(root, section, h5py.Group) for section in _SECTIONS if section in root]
        datasets = [_members(group) for group in groups]
        require_within(file, [part for parts in datasets for part in parts.values()])
        return {
            str(group.name).lstrip("/"): {name: _read_leaf(part) for name, part in parts.items()}
            for group, parts in zip(groups, datasets, strict=True)
        }


def _attribute(root: Any, name: str) -> str:
    """A short text; nothing else is read."""
    if name not in root.attrs:
        return ""
    attribute = root.attrs.get_id(name)
    if attribute.dtype.kind != "S" or attribute.dtype.itemsize > 256 or attribute.shape != ():
        return ""
    value = root.attrs[name]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _members(group: Any) -> dict[str, Any]:
    """Datasets whose bytes are in the file, as they are."""
    if len(group) > _MAX_LEAVES:
        raise CheckpointError(f"its {group.name!r} has {len(group):,} parts")
    members = {name: member(group, name, h5py.Dataset) for name in group}
    require_in_one_piece(members.values())
    return members


def _read_leaf(dataset: Any) -> Leaf:
    """Numbers or text; nothing else is read."""
    dtype = dataset.dtype
    if dtype.kind == "S" and dataset.shape == ():
        return bytes(dataset[()]).decode("utf-8")
    if dtype == np.dtype(bool):
        return np.asarray(dataset[()], bool)
    if dtype not in _DTYPES:
        raise CheckpointError(f"its {dataset.name!r} is of {dtype}, not of numbers or text")
    return np.asarray(dataset[()], _DTYPES[dtype])
