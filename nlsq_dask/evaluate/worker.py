"""What runs on the workers of a cluster: module-level functions, found there by name."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, TypeVar

import cloudpickle
import distributed
import jax
import numpy as np
import psutil
from distributed.diagnostics.plugin import WorkerPlugin

from nlsq_dask.compilation import keep_compiled
from nlsq_dask.config import Precision
from nlsq_dask.errors import WorkerError
from nlsq_dask.evaluate.base import RangeReport, Request
from nlsq_dask.evaluate.heap import keep_freed_memory, return_freed_memory
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.evaluate.marks import merge_marks
from nlsq_dask.evaluate.reading import Meter
from nlsq_dask.evaluate.tree import bin_of, sum_range
from nlsq_dask.sources.base import Chunk
from nlsq_dask.sources.grid import GridSource, RemoteColumn
from nlsq_dask.sources.transport import at_chunk

__all__ = [
    "BlockTask",
    "HomeSpec",
    "ProcessSettings",
    "compile_ahead",
    "forget_home",
    "map_blocks",
    "map_chunks",
    "merge_reports",
    "platform_of_worker",
    "probe_worker",
    "reduce_range",
    "same_spec",
]

_Value = TypeVar("_Value")

JAXLIB_VERSION = importlib.metadata.version("jaxlib")


@dataclass(frozen=True, kw_only=True)
class HomeSpec:
    """What a worker needs to set up a problem."""

    token: str
    payload: bytes = field(repr=False)  # Dask logs arguments; it may hold a key
    cache_bytes: int
    prefetch: bool
    precision: Precision
    compilation_cache_dir: str | None
    keeps_on_device: bool = True
    may_retry: bool = True
    jaxlib: str = JAXLIB_VERSION  # the client's, wherever it is unpickled


_HOMES: dict[str, ProblemHome] = {}
_FORGOTTEN: deque[str] = deque(maxlen=100)  # a late task must not set up again what was let go
_HOMES_LOCK = threading.Lock()


def home_of(spec: HomeSpec) -> ProblemHome:
    """This process's home of the problem: kernels survive from task to task.

    Raises
    ------
    CancelledError
        If it was let go.
    WorkerError
        If this process has another jaxlib than the client: workers may come at any time.
    """
    if spec.jaxlib != JAXLIB_VERSION:
        raise WorkerError(
            f"the workers must have the client's jaxlib, {spec.jaxlib}, "
            f"but one of them has {JAXLIB_VERSION}"
        )
    with _HOMES_LOCK:
        if spec.token in _FORGOTTEN:
            raise CancelledError("the fit has ended")
        if spec.token not in _HOMES:
            if spec.compilation_cache_dir is not None:
                keep_compiled(spec.compilation_cache_dir)
            _HOMES[spec.token] = ProblemHome(
                problem=cloudpickle.loads(spec.payload),
                cache_bytes=spec.cache_bytes,
                keeps_on_device=spec.keeps_on_device,
                prefetch=spec.prefetch,
                may_retry=spec.may_retry,
            )
        return _HOMES[spec.token]


def forget_home(token: str) -> None:
    """Let go of a problem. What still runs on it ends after the leaf that it is at."""
    with _HOMES_LOCK:
        home = _HOMES.pop(token, None)
        _FORGOTTEN.append(token)
    if home is not None:
        home.is_stopped.set()


def same_spec(spec: HomeSpec) -> HomeSpec:
    return spec


def platform_of_worker(dask_worker: Any) -> str:
    """The kind of device that JAX computes on there."""
    _fit_thread_pool(dask_worker)  # before JAX looks for devices
    return jax.default_backend()


def compile_ahead(spec: HomeSpec, leaf: int) -> int:
    """What the first pass needs, while the client is busy with the sample; XLA's bytes for it."""
    home = home_of(spec)
    return home.prepare(spec.precision, home.leaf(leaf))


def probe_worker(spec: HomeSpec) -> dict[str, Any]:
    problem = home_of(spec).problem
    source = problem.source
    is_remote = isinstance(source, GridSource) and any(
        isinstance(column, RemoteColumn) for column in source.columns.values()
    )
    if not is_remote:
        with at_chunk(0):
            source.read(0)
    return {"base_bytes": psutil.Process().memory_info().rss}


def reduce_range(
    spec: HomeSpec,
    leaves: range,
    request: Request,
    owner: str,
    owned: Sequence[range],
    blocks: Mapping[int, Mapping[str, np.ndarray]] | None,
) -> RangeReport:
    home = home_of(spec)
    is_owner = distributed.get_worker().address == owner
    if is_owner:
        home.reader.retain(owned)
    return home.reduce(leaves, request, may_cache=is_owner, blocks=blocks)


def map_chunks(
    spec: HomeSpec,
    function: Callable[[int, Chunk], _Value],
    indices: Sequence[int],
    owner: str,
) -> list[_Value]:
    """Apply a function to chunks, which stay with their owner for the passes to come."""
    is_owner = distributed.get_worker().address == owner
    chunks = home_of(spec).reader.stream(indices, Meter(), may_cache=is_owner)
    with contextlib.closing(chunks):
        return [function(index, jax.device_get(chunk)) for index, chunk in chunks]


def map_blocks(
    spec: HomeSpec,
    function: Callable[[int, Chunk], _Value],
    index: int,
    blocks: Mapping[str, np.ndarray],
) -> list[_Value]:
    """Apply a function to a chunk that comes in Dask's blocks."""
    chunk = home_of(spec).reader.fetch_host(index, may_cache=False, blocks={index: blocks})
    return [function(index, chunk)]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockTask:
    """Reduces one leaf whose blocks are the arguments."""

    spec: HomeSpec
    roles: tuple[str, ...]
    request: Request

    def __call__(self, number: np.ndarray, *blocks: np.ndarray) -> np.ndarray:
        leaf = int(number.ravel()[0])
        report = home_of(self.spec).reduce(
            range(leaf, leaf + 1),
            self.request,
            may_cache=False,
            blocks={leaf: dict(zip(self.roles, blocks, strict=True))},
        )
        out = np.empty((1,) * number.ndim, object)
        out[...] = report
        return out


def merge_reports(reports: Sequence[np.ndarray], level: int) -> RangeReport:
    """The reports of consecutive leaves as one."""
    each: list[RangeReport] = [report.ravel()[0] for report in reports]
    leaves = ((node[1], sums) for report in each for node, sums in report.nodes.items())
    nodes, bins = sum_range(leaves, level, bin_of)
    return RangeReport(
        nodes=nodes,
        bins=bins,
        bytes_read=sum(report.bytes_read for report in each),
        read_seconds=sum(report.read_seconds for report in each),
        busy_seconds=sum(report.busy_seconds for report in each),
        num_compilations=sum(report.num_compilations for report in each),
        peak_memory_bytes=max(report.peak_memory_bytes for report in each),
        process=each[-1].process,
        offending_leaves=tuple(leaf for report in each for leaf in report.offending_leaves)[:16],
        marks=merge_marks(report.marks for report in each),
        missing=frozenset().union(*(report.missing for report in each)),
        num_retries=sum(report.num_retries for report in each),
    )


class ProcessSettings(WorkerPlugin):
    """For a fit: the size of XLA's thread pool, and freed memory kept at hand.

    Dask applies the plugin again to a worker that was restarted. Taking it away lets go of the
    problem, too: that is how a scheduler ends the fit of a client that died.
    """

    def __init__(self, token: str) -> None:
        self._token = token

    def setup(self, worker: Any) -> None:
        with _HOMES_LOCK, contextlib.suppress(ValueError):
            _FORGOTTEN.remove(self._token)  # registered again, after a worker died of it
        _fit_thread_pool(worker)
        keep_freed_memory(self._token)

    def teardown(self, worker: Any) -> None:
        forget_home(self._token)
        return_freed_memory(self._token)


def _fit_thread_pool(worker: Any) -> None:
    """XLA's thread pool as large as the worker, not as the machine.

    Only this variable works, and only before the process's first computation.
    """
    os.environ.setdefault("PJRT_NPROC", str(worker.state.nthreads))
