"""For each option of checkpoints, what it changes: rows of (field, shows())."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import problems
from nlsq_dask import FitResult, HybridStreamingConfig, fit_dataset
from nlsq_dask.checkpoint import journal as journal_module
from nlsq_dask.checkpoint.file import read_checkpoint, write_checkpoint

Row = tuple[str, Callable[[], bool]]


def _fit(**options: Any) -> FitResult:
    t, y = problems.make_decay(1_000)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})
    start = {"amplitude": 5.0, "rate": 2.0, "offset": -1.0}
    return fit_dataset(ds, problems.decay, y="y", p0=start, config=HybridStreamingConfig(**options))


def _num_files(**options: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        _fit(checkpoint_dir=folder, **options)
        return len(list(Path(folder).iterdir()))


def _num_warmup_writes(frequency: int) -> int:
    """How often the warmup is written, of the kinds of sections in each file."""
    written: list[bool] = []

    def noting(path: Path, sections: Any) -> None:
        written.append("warmup_state" in sections)
        write_checkpoint(path, sections)

    journal_module.write_checkpoint = noting
    try:
        _num_files(checkpoint_frequency=frequency)
    finally:
        journal_module.write_checkpoint = write_checkpoint
    return sum(written)


def _writes_into_its_folder() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        result = _fit(checkpoint_dir=folder)
        path = Path(result.diagnostics["checkpoint"]["path"])
        return path.parent == Path(folder).resolve() and "passes" in read_checkpoint(path)


def _resumes_what_was_found() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        first = _fit(checkpoint_dir=folder, max_passes=1)
        path = first.diagnostics["checkpoint"]["path"]
        second = _fit(resume_from_checkpoint=path)
        resumed_from = second.diagnostics["checkpoint"]["resumed_from"]
        # The first pass is remembered, to the microsecond that it took.
        is_remembered = second.history[0].seconds == first.history[0].seconds
        return bool(resumed_from == path and is_remembered and np.isfinite(second.cost))


ROWS: list[Row] = [
    ("enable_checkpoints", lambda: _num_files() == 1 and _num_files(enable_checkpoints=False) == 0),
    ("checkpoint_frequency", lambda: _num_warmup_writes(1) > _num_warmup_writes(1_000)),
    ("checkpoint_dir", _writes_into_its_folder),
    ("resume_from_checkpoint", _resumes_what_was_found),
]
