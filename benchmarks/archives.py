"""Archives of an exponential decay, in chunks of any length and codec, and reading one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import zarr

from nlsq_dask.sources.base import Source
from nlsq_dask.sources.buffers import BufferPool, lending

__all__ = ["decay", "reading_job", "write_archive"]

_BLOCK_ROWS = 500_000  # written at a time, where chunks are smaller


def decay(t, amplitude=1.0, rate=1.0, offset=0.0):
    return amplitude * jnp.exp(-rate * t) + offset


def write_archive(
    path: Path,
    num_rows: int,
    chunk_rows: int,
    *,
    dim: str = "row",
    codec: Any = "auto",
    decimals: int | None = None,
) -> Path:
    """Write `t` and `y` along `dim`; a `y` of few decimals, as of an instrument, compresses."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    t, y = (
        group.create_array(
            name,
            shape=(num_rows,),
            chunks=(chunk_rows,),
            dtype="f8",
            dimension_names=[dim],
            compressors=codec,
        )
        for name in "ty"
    )
    step = chunk_rows * -(-_BLOCK_ROWS // chunk_rows)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        times = 10 * np.arange(rows.start, rows.stop) / num_rows
        noise = np.random.default_rng([0, start]).normal(size=times.size)
        values = 2 * np.exp(-0.5 * times) + 0.1 + 0.1 * noise
        t[rows] = times
        y[rows] = values if decimals is None else np.round(values, decimals)
    return path


def reading_job(source: Source) -> Callable[[], None]:
    """Read all leaves as a pass does: in a thread, into memory that is used again."""
    pool = BufferPool()

    def read_all() -> None:
        with lending(pool.empty):
            deque(map(source.read, range(source.num_chunks)), maxlen=0)

    def read_in_a_thread() -> None:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(read_all).result()

    return read_in_a_thread
