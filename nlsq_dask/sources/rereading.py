"""Reading again, chunk by chunk, what could not be decoded: only what decodes is ever used."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nlsq_dask._typing import Index, Shape
from nlsq_dask.errors import StoreDamagedError
from nlsq_dask.sources.retrying import UNDECODABLE, current_log, pauses
from nlsq_dask.sources.transport import redacted

__all__ = ["read_in_pieces"]

_LOGGER = logging.getLogger("nlsq_dask")


def read_in_pieces(
    read: Callable[[Index], np.ndarray],
    index: Sequence[slice],
    chunks: Shape,
    place: str,
    failed: Exception,
    *,
    is_far: bool,
) -> np.ndarray:
    """A rectangle of a stored array, each chunk of it as often as it takes, within limits.

    Of many chunks that are read at once it would be unlikely that none is garbled.

    Parameters
    ----------
    read : callable
        Reads a rectangle.
    index : sequence of slice
        Which one; with numbers for start and stop.
    chunks : tuple of int
        Of the store.
    place : str
        Names the array.
    failed : Exception
        What came of reading it at once.
    is_far : bool
        Whether bytes may be garbled on the way.

    Raises
    ------
    StoreDamagedError
        Naming the first chunk that could not be decoded.
    """
    log = current_log()
    if not log.may_retry:
        raise _damaged(index, place, _reason(failed)) from None
    log.num_retries += 1
    whole: np.ndarray | None = None
    for piece in _pieces(index, chunks):
        block = _patiently(read, piece, place, is_far=is_far)
        if whole is None:
            whole = np.empty([part.stop - part.start for part in index], block.dtype)
        whole[
            tuple(
                slice(part.start - first.start, part.stop - first.start)
                for part, first in zip(piece, index, strict=True)
            )
        ] = block
    assert whole is not None  # of nothing there is nothing that cannot be decoded
    return whole


def _pieces(index: Sequence[slice], chunks: Shape) -> Iterator[tuple[slice, ...]]:
    along = []
    for part, length in zip(index, chunks, strict=True):
        inner = range((part.start // length + 1) * length, part.stop, length)
        along.append(list(itertools.pairwise([part.start, *inner, part.stop])))
    for ends in itertools.product(*along):
        yield tuple(slice(start, stop) for start, stop in ends)


def _patiently(
    read: Callable[[Index], np.ndarray], piece: tuple[slice, ...], place: str, *, is_far: bool
) -> np.ndarray:
    waits = pauses(is_far=is_far)
    while True:
        try:
            return read(piece)
        except UNDECODABLE as error:
            reason = _reason(error)
            wait = next(waits, None)
            if wait is None:
                raise _damaged(piece, place, reason) from None
        _LOGGER.info("Decoding %s of %s failed (%s); reading again.", _text(piece), place, reason)
        time.sleep(wait)


def _reason(error: Exception) -> str:
    said = redacted(error).partition("\n")[0]
    return said if isinstance(error, StoreDamagedError) else f"{type(error).__name__}: {said}"


def _text(index: Sequence[slice]) -> str:
    return f"[{', '.join(f'{part.start}:{part.stop}' for part in index)}]"


def _damaged(index: Sequence[slice], place: str, reason: str) -> StoreDamagedError:
    return StoreDamagedError(
        f"`ds` must be whole, and {_text(index)} of {place} cannot be decoded ({reason}); write "
        "that chunk again, or leave its rows out by slicing"
    )
