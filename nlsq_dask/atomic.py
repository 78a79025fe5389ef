"""Files and folders that are replaced in one step: whoever looks sees the old or the new."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

__all__ = ["sync_folder", "temporary_beside", "write_synced"]


def temporary_beside(path: Path) -> Path:
    """A new hidden name in the same folder, from where a rename is one step."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_synced(path: Path, *parts: bytes | memoryview) -> None:
    """Write a new file, and have it on the disk."""
    with open(path, "xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a new name last, where folders can be opened and synced.

    Not on Windows, nor on every file system, nor where one may write but not look. The file has
    its name already: only a power cut right now could take it back.
    """
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
