"""Everything that writes, on a disk that is full, run as ``python full_disk_run.py folder``.

The system refuses to make any file longer than `MOST_BYTES`, as it would were the disk full. What
each attempt ended with is printed, and which files it left.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import numpy as np

import problems
from nlsq_dask import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig, fit_dataset

MOST_BYTES = 2_000  # some of the files begin well


def main(folder: Path) -> None:
    t, y = problems.make_decay(20_000)
    ds = problems.dataset(t, y)
    result = fit_dataset(ds, problems.decay, y="y", p0=problems.P0)
    batches = zip(np.split(t, 10), np.split(y, 10), strict=True)
    attempts = {
        "netCDF": lambda: result.save(folder / "result.nc"),
        "Zarr": lambda: result.save(folder / "result.zarr"),
        "checkpoint": lambda: fit_dataset(
            ds,
            problems.decay,
            y="y",
            p0=problems.P0,
            config=HybridStreamingConfig(checkpoint_dir=folder),
        ),
        "spool": lambda: AdaptiveHybridStreamingOptimizer().fit(
            batches, problems.decay, p0=problems.P0, spool=folder
        ),
    }
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, MOST_BYTES))
    ends = {}
    for what, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            ends[what] = [error.strerror, *getattr(error, "__notes__", [])]
        else:
            ends[what] = ["nothing raised"]
    sys.stdout.write(json.dumps([ends, sorted(path.name for path in folder.rglob("*"))]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
