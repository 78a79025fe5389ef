"""What compiling takes, and keeping what was compiled for the processes to come."""

from __future__ import annotations

import threading
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

__all__ = ["compile_seconds", "keep_compiled"]

_STAGES = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_LOCK = threading.Lock()
_total_seconds = 0.0


def compile_seconds() -> float:
    """Seconds that this process has spent lowering and compiling, in all threads."""
    return _total_seconds


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
    global _total_seconds
    if event in _STAGES:
        with _LOCK:
            _total_seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)
