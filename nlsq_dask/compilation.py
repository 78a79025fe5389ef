"""What compiling takes, and keeping what was compiled for the processes to come."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

__all__ = ["compile_seconds", "keep_compiled", "require_folder"]

_STAGES = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_LOCK = threading.Lock()
_intervals: list[tuple[float, float]] = []  # apart from each other, in order


def compile_seconds() -> float:
    """Seconds in which this process was lowering or compiling, in one thread or several."""
    with _LOCK:
        return sum(end - start for start, end in _intervals)


def require_folder(folder: str) -> None:
    """See that what is compiled can be kept: JAX would only warn, at each program.

    Raises
    ------
    ValueError
        If the folder is not there and cannot be made.
    """
    if "://" in folder:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`compilation_cache_dir` must be a folder, or the name of a new one, got {folder!r}: "
            f"{type(error).__name__}: {error.strerror}"
        ) from error


def keep_compiled(folder: str) -> None:
    """Have JAX keep every program it compiles in `folder`, and look there first.

    For the rest of this process, whoever compiles: the setting is JAX's own.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir == folder:
        return
    settings.update("jax_compilation_cache_dir", folder)
    settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    settings.update("jax_persistent_cache_min_entry_size_bytes", 0)
    compilation_cache.reset_cache()  # JAX decides once, at its first compilation, whether to


def _count(event: str, duration_secs: float, **_: Any) -> None:
    if event not in _STAGES:
        return
    end = time.perf_counter()
    start = end - duration_secs
    with _LOCK:
        while _intervals and _intervals[-1][1] >= start:
            start = min(start, _intervals.pop()[0])
        _intervals.append((start, end))


jax.monitoring.register_event_duration_secs_listener(_count)
