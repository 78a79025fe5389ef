"""Where a fit computes: threads of this process, or the workers of a cluster."""

from __future__ import annotations

from typing import Any

import jax

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.evaluate.base import Evaluator
from nlsq_dask.evaluate.clients import active_client
from nlsq_dask.evaluate.local import LocalEvaluator
from nlsq_dask.problem import Problem
from nlsq_dask.progress import Progress
from nlsq_dask.sources.base import Source
from nlsq_dask.sources.grid import is_in_memory

__all__ = ["choose_client", "open_evaluator_at", "platform_at"]

# Less work than this in a pass is done sooner in this process than sent to a cluster.
_IN_PROCESS_ROW_PARAMETERS = 5e6


def choose_client(source: Source, num_free: int, client: Any) -> Any:
    """The one that is given; else the active one, where the work is worth sending."""
    if client is not None:
        return client
    is_small = source.num_rows * (num_free + 1) < _IN_PROCESS_ROW_PARAMETERS
    return None if is_small or is_in_memory(source) else active_client()


def open_evaluator_at(
    problem: Problem, config: HybridStreamingConfig, client: Any, progress: Progress
) -> Evaluator:
    progress.restart()
    if client is None:
        return LocalEvaluator(problem, config, progress=progress)
    from nlsq_dask.evaluate.cluster import ClusterEvaluator  # Dask takes its time to load

    return ClusterEvaluator(problem, config, client, progress)


def platform_at(client: Any) -> str:
    """The kind of device that rows are computed on."""
    if client is None:
        return jax.default_backend()
    from nlsq_dask.evaluate.workers import platform_of

    return platform_of(client)
