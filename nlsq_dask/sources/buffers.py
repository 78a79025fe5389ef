"""Host memory that JAX takes without a copy, used again once nothing refers to it.

On the CPU an array enters a jitted function without a copy where it begins at a multiple of 64
bytes; NumPy's own begin at multiples of 16. Memory that is new to the process is mapped page by
page while it is first written, which costs as much as decoding a fast codec does.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, TypeAlias

import numpy as np

from nlsq_dask._typing import Shape
from nlsq_dask.sources.within import set_within

__all__ = ["ALIGNMENT", "BufferPool", "Empty", "aligned_empty", "is_aligned", "lender", "lending"]

Empty: TypeAlias = Callable[[Shape, np.dtype], np.ndarray]  # as `numpy.empty`

ALIGNMENT = 64
_MIN_POOLED_BYTES = 2**16  # smaller ones stay within pages that are mapped already
_MAX_FREE_BLOCKS = 16
_HUGE_BYTES = 2**22  # from here on NumPy asks for huge pages


def is_aligned(array: np.ndarray) -> bool:
    """Whether the array enters JAX on the CPU without a copy."""
    address: int = array.__array_interface__["data"][0]
    return array.flags.c_contiguous and address % ALIGNMENT == 0


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """As `numpy.empty`, beginning at a multiple of `ALIGNMENT` bytes."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return _begin(_block(num_bytes), num_bytes).view(dtype).reshape(shape)


_LENDER: ContextVar[Empty | None] = ContextVar("nlsq_dask_lender", default=None)


def lending(empty: Empty | None) -> AbstractContextManager[None]:
    """Let columns that are read by the code within write into memory of `empty`."""
    return set_within(_LENDER, empty)


def lender() -> Empty | None:
    """What lends memory to a column that is being read; None where it is to take its own."""
    return _LENDER.get()


class BufferPool:
    """Aligned arrays in blocks of memory that are used again.

    A block returns when the last array in it is gone: a view, a cached chunk or a computation
    that JAX has not finished each hold on to it.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """As `aligned_empty`, in a block of the same size that nothing refers to any more."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _MIN_POOLED_BYTES:
            return aligned_empty(shape, dtype)
        try:  # another thread may be faster
            block = self._free[num_bytes].pop()
        except (KeyError, IndexError):
            block = _block(num_bytes)
        lent = np.asarray(_Lease(self, block, num_bytes))
        return lent.view(dtype).reshape(shape)

    def take_back(self, block: np.ndarray, num_bytes: int) -> None:
        if sum(map(len, list(self._free.values()))) < _MAX_FREE_BLOCKS:
            self._free.setdefault(num_bytes, []).append(block)


class _Lease:
    """Owns the memory of an array: NumPy refers to it from each view, however derived."""

    def __init__(self, pool: BufferPool, block: np.ndarray, num_bytes: int) -> None:
        self._pool, self._block, self._num_bytes = pool, block, num_bytes
        self.__array_interface__: dict[str, Any] = _begin(block, num_bytes).__array_interface__

    def __del__(self) -> None:
        self._pool.take_back(self._block, self._num_bytes)


def _block(num_bytes: int) -> np.ndarray:
    """Memory for so many bytes from an aligned one on.

    NumPy asks for huge pages in large blocks. Where the machine is virtual or its memory in
    pieces, the system first has to find them: measured with two processes, 1 GB/s and at times
    0.3, against 2 GB/s in ordinary pages. What is written once and then read from end to end
    has no other use for them.
    """
    if num_bytes < _HUGE_BYTES or os.name != "posix":
        return np.empty(num_bytes + ALIGNMENT, np.uint8)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, num_bytes, flags=private), np.uint8)


def _begin(block: np.ndarray, num_bytes: int) -> np.ndarray:
    """The part of a block that begins at the first aligned address."""
    skipped = -block.__array_interface__["data"][0] % ALIGNMENT
    return block[skipped : skipped + num_bytes]
