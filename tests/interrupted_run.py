"""A fit that waits to be interrupted, run as ``python interrupted_run.py where folder``.

It prints ``pass`` after its first pass over all rows. From then on each leaf takes a second.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client

import problems
from conftest import start_cluster
from nlsq_dask import FitInterrupted, FitResult, HybridStreamingConfig, IterationRecord, fit_dataset
from nlsq_dask.sources.base import Chunk

NUM_CHUNKS, CHUNK_ROWS = 120, 1000


@dataclass(frozen=True)
class SlowRows:
    """A decay in chunks, slow to read once `brake` exists."""

    brake: Path
    variables: tuple[str, ...] = ("t",)
    num_chunks: int = NUM_CHUNKS
    num_rows: int = NUM_CHUNKS * CHUNK_ROWS
    chunk_shape: tuple[int, ...] = (CHUNK_ROWS,)

    def read(self, index: int) -> Chunk:
        if self.brake.exists():
            time.sleep(1.0)
        t, y = problems.make_decay(self.num_rows)
        rows = slice(index * CHUNK_ROWS, (index + 1) * CHUNK_ROWS)
        return Chunk(x=(t[rows],), y=y[rows])


def fit(folder: Path, **options: Any) -> FitResult:
    chosen = {
        name: options.pop(name) for name in ("client", "callback", "checkpoint") if name in options
    }
    return fit_dataset(
        SlowRows(folder / "brake"),
        problems.decay,
        p0=problems.P0,
        config=HybridStreamingConfig(cache_bytes=0, distance_tol=1e-9, **options),
        **chosen,
    )


def main() -> None:
    where, folder = sys.argv[1], Path(sys.argv[2])
    # A shell's background jobs, and whatever they start, ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def brake(record: IterationRecord) -> None:
        if record.phase == 2:
            (folder / "brake").touch()
            sys.stdout.write("pass\n")
            sys.stdout.flush()

    with contextlib.ExitStack() as stack:
        client = None
        if where == "cluster":
            client = stack.enter_context(Client(stack.enter_context(start_cluster(2))))
        try:
            fit(folder, client=client, callback=brake, checkpoint=folder / "run.h5")
        except FitInterrupted as stop:
            caught = stop
        left = 0
        if client is not None:
            time.sleep(2.0)  # a leaf that is being read is read to its end
            left = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
        result = caught.result
        assert result is not None
        told = {
            "text": str(caught),
            "passes": result.num_passes,
            "status": result.status.name,
            "popt": np.asarray(result.popt).tolist(),
            "perr": np.asarray(result.perr).tolist(),
            "checkpoint": str(caught.checkpoint),
            "tasks": left,
        }
        sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
