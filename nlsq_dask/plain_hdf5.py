"""HDF5 from a stranger: hard links to arrays in one piece; whatever else there may be is refused.

What is small on disk is small in memory: filters, chunks, fill values and arrays that are kept in
other files are not read, and the parts of a file together are no larger than it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, BinaryIO

import h5py

__all__ = ["NotPlainError", "member", "require_in_one_piece", "require_within"]


class NotPlainError(ValueError):
    """A part of a file is not as this package writes them; the text says which, of "its" parts."""


def member(group: Any, name: str, kind: type) -> Any:
    """What a hard link leads to: soft and external links are not followed.

    Raises
    ------
    NotPlainError
        If it is another kind of link, or of object.
    """
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise NotPlainError(f"its {name!r} is a link")
    found = group[name]
    if not isinstance(found, kind):
        raise NotPlainError(f"its {name!r} is not a {kind.__name__.lower()}")
    return found


def require_in_one_piece(datasets: Collection[Any]) -> None:
    """Refuse datasets whose bytes are not in the file, one after the other."""
    for dataset in datasets:
        is_plain = dataset.chunks is None and not dataset.is_virtual and not dataset.external
        if not is_plain or dataset.id.get_storage_size() != dataset.nbytes:
            raise NotPlainError(f"its {dataset.name!r} is not stored in one piece")


def require_within(file: BinaryIO, datasets: Collection[Any]) -> None:
    """Refuse parts that lie on top of each other, or claim to be longer than the file."""
    if sum(dataset.nbytes for dataset in datasets) > file.seek(0, os.SEEK_END):
        raise NotPlainError("its parts are larger than the file")
