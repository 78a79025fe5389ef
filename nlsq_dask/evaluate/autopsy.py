"""Which chunk killed the workers that read it: found out by a process that nobody will miss.

Dask knows the tasks that a worker had when it died, and blames all of them.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

import cloudpickle
import distributed

from nlsq_dask.evaluate.worker import HomeSpec

__all__ = ["find_deadly", "spans_of"]

_READ_SECONDS = 60.0
_RAISED = 1  # the status of a Python that an exception has ended: of such a worker lives
_TOO_LARGE = 3  # but not of this one
_WAIT_SECONDS = 90.0  # for a worker, too


def find_deadly(client: distributed.Client, spec: HomeSpec, leaves: Sequence[int]) -> int | None:
    """The first of some chunks that kills a process by being read; None if it cannot be told."""
    found = client.submit(_first_deadly, spec, leaves, pure=False)
    try:
        deadly: int | None = found.result(timeout=_WAIT_SECONDS)
    except (OSError, CancelledError, distributed.KilledWorker):
        return None
    finally:
        found.cancel(force=True)
    return deadly


def spans_of(leaves: Sequence[int]) -> str:
    """Which chunks those are, in words.

    Examples
    --------
    >>> spans_of([2, 3, 4, 5, 9])
    'chunks 2 to 5, 9'
    """
    spans: list[list[int]] = []
    for leaf in leaves:
        if spans and leaf == spans[-1][1] + 1:
            spans[-1][1] = leaf
        else:
            spans.append([leaf, leaf])
    text = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)
    return f"chunk{'s' if len(leaves) > 1 else ''} {text}"


def _first_deadly(spec: HomeSpec, leaves: Sequence[int]) -> int | None:
    """On a worker: the first chunk whose reader dies; None if there is none."""
    limit = distributed.get_worker().memory_manager.memory_limit
    child = subprocess.Popen(
        [sys.executable, "-c", f"import {__name__} as autopsy; autopsy._read_in_turn()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    with child:
        try:
            told, _ = child.communicate(pickle.dumps((spec.payload, leaves, limit)), _READ_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            return None
    read = told.split()
    return int(read[-1]) if read and child.returncode not in (0, _RAISED) else None


def _read_in_turn() -> None:
    """In that process: say which chunk is next, and read it."""
    payload, leaves, limit = pickle.load(sys.stdin.buffer)
    source: Any = cloudpickle.loads(payload).source
    if limit and sys.platform != "win32":
        import resource  # POSIX only

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for leaf in leaves:
        sys.stdout.write(f"{leaf}\n")
        sys.stdout.flush()
        try:
            source.read(leaf)
        except MemoryError:
            sys.exit(_TOO_LARGE)
