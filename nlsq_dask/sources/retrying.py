"""What is tried again when a store fails for a moment: the one policy, and a log of what was met.

obstore and s3fs try again by themselves where a service is busy or drops a connection. What they
let through is tried again here: what the other libraries of fsspec fail at, bytes that a checksum
or a codec refuses, chunks that come out otherwise than they did before.
"""

from __future__ import annotations

import lzma
import random
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from nlsq_dask.errors import StoreDamagedError
from nlsq_dask.sources.within import set_within

__all__ = ["UNDECODABLE", "ReadingLog", "current_log", "pauses", "reading_log"]

_MOST_TRIES = 8
_TRIES_NEARBY = 2  # a disk garbles nothing on the way
_FIRST_SECONDS = 0.05
_LONGEST_SECONDS = 2.0
_PATIENCE_SECONDS = 20.0  # after which nothing is begun again

# What codecs, checksums and decoding raise; there is no common ancestor.
UNDECODABLE = (
    *(ValueError, ArithmeticError, IndexError, EOFError, RuntimeError, struct.error),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, StoreDamagedError),
)


@dataclass
class ReadingLog:
    """What was met while something was read, in whatever thread, and whether to try again."""

    may_retry: bool = True
    is_again: bool = False  # what was decoded before is not to be used
    num_retries: int = 0
    missing: set[str] = field(default_factory=set)  # keys of chunks that do not exist


_LOG: ContextVar[ReadingLog | None] = ContextVar("nlsq_dask_reading_log", default=None)


@contextmanager
def reading_log(*, may_retry: bool = True) -> Iterator[ReadingLog]:
    """Log what is read by the code within, and by the coroutines that it starts."""
    log = ReadingLog(may_retry=may_retry)
    with set_within(_LOG, log):
        yield log


def current_log() -> ReadingLog:
    """The innermost log, or one that nobody looks at."""
    log = _LOG.get()
    return ReadingLog() if log is None else log


def pauses(*, is_far: bool = True) -> Iterator[float]:
    """Seconds to wait before each further attempt, as long as there may be one; from now on.

    Twice as long each time, and between half of that and all of it at random: processes that
    failed together do not come back together.
    """
    return _pauses(_MOST_TRIES if is_far else _TRIES_NEARBY, time.monotonic(), current_log())


def _pauses(most_tries: int, started: float, log: ReadingLog) -> Iterator[float]:
    longest = _FIRST_SECONDS
    for _ in range(1, most_tries):
        if not log.may_retry or time.monotonic() - started > _PATIENCE_SECONDS:
            return
        log.num_retries += 1
        yield longest * random.uniform(0.5, 1.0)
        longest = min(2 * longest, _LONGEST_SECONDS)
