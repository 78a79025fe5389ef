"""Memory that a worker process frees, kept at hand for the next leaf.

Dask starts workers with ``MALLOC_TRIM_THRESHOLD_`` set. In glibc that also fixes the size from
which memory is mapped afresh and unmapped at once, at 128 KiB: each buffer that a store's codecs
go through is then mapped page by page while it is written, which takes longer than decoding it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading

__all__ = ["keep_freed_memory", "return_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_VARIABLE = "MALLOC_TRIM_THRESHOLD_"
_USUAL_MMAP_BYTES = 2**17
_KEPT_MMAP_BYTES = 2**25  # the largest that glibc takes
_KEPT_BYTES = 2**26

_LOCK = threading.Lock()
_USERS: set[str] = set()


def keep_freed_memory(user: str) -> None:
    """Let this process hold on to up to 64 MiB for each thread, until no user is left."""
    with _LOCK:
        _USERS.add(user)
        _set_thresholds(_KEPT_MMAP_BYTES, _KEPT_BYTES)


def return_freed_memory(user: str) -> None:
    """Free memory as the worker was started to."""
    with _LOCK:
        _USERS.discard(user)
        if not _USERS:
            _set_thresholds(_USUAL_MMAP_BYTES, int(os.environ.get(_VARIABLE, 0)))


def _set_thresholds(mmap_bytes: int, trim_bytes: int) -> None:
    # Left to itself, glibc finds good thresholds; other libraries have no such call.
    if _VARIABLE in os.environ and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, mmap_bytes)
        libc.mallopt(_TRIM_THRESHOLD, trim_bytes)
