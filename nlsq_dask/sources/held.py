"""Decoded chunks that are longer than what is read of them, kept for the next part.

A coordinate is often stored in one chunk, all of which each leaf of the rows would decode.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from nlsq_dask.sources.buffers import lending
from nlsq_dask.sources.retrying import current_log, reading_log
from nlsq_dask.sources.within import set_within

__all__ = ["HeldBlocks", "Holder", "holder", "holding", "most_held"]

_MOST_BYTES = 2**26  # beyond the block that was asked for last

_Key: TypeAlias = tuple[tuple[int, int], ...]  # start and stop along each axis


@dataclass
class _Block:
    values: np.ndarray | None = None
    missing: set[str] = field(default_factory=set)  # keys that the store did not have
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        return 0 if self.values is None else self.values.nbytes


def most_held(block_bytes: int, array_bytes: int, num_at_once: int) -> int:
    """Bytes of an array's blocks, those that are kept and so many that are being decoded.

    What is decoded is there as it is stored too, which is no longer than that in general.
    """
    decoded = min(_MOST_BYTES + (1 + num_at_once) * block_bytes, array_bytes)
    return decoded + min(num_at_once * block_bytes, array_bytes)


class HeldBlocks:
    """The blocks of an array that were asked for last.

    Who asks for one that is being decoded waits for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()

    def get(self, key: _Key, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The block, from `decode` where it is not held, or where that is read once more."""
        with self._lock:
            block = self._blocks.setdefault(key, _Block())
            self._blocks.move_to_end(key)
        log = current_log()
        with block.lock:
            if block.values is None or log.is_again:
                with reading_log(may_retry=log.may_retry) as own, lending(None):
                    block.values = decode()
                block.missing = own.missing
                log.num_retries += own.num_retries
            log.missing |= block.missing
            values = block.values
        self._let_go()
        return values

    def _let_go(self) -> None:
        with self._lock:
            *others, _ = self._blocks.values()
            excess = sum(block.nbytes for block in others) - _MOST_BYTES
            while excess > 0:
                _, oldest = self._blocks.popitem(last=False)
                excess -= oldest.nbytes


class Holder:
    """Keeps blocks of the columns of a source, as long as it lives."""

    def __init__(self) -> None:
        self._columns: dict[int, HeldBlocks] = {}

    def blocks_of(self, column: object) -> HeldBlocks:
        return self._columns.setdefault(id(column), HeldBlocks())


_HOLDER: ContextVar[Holder | None] = ContextVar("nlsq_dask_holder", default=None)


def holding(in_holder: Holder) -> AbstractContextManager[None]:
    """Let columns that are read by the code within keep blocks there."""
    return set_within(_HOLDER, in_holder)


def holder() -> Holder | None:
    """Where blocks are kept now, if anywhere."""
    return _HOLDER.get()
