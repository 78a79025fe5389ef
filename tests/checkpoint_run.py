"""A fit that kills its own process, run as ``python checkpoint_run.py store checkpoint how at``."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import distributed

import problems
from nlsq_dask import FitResult, HybridStreamingConfig, IterationRecord, fit_dataset
from nlsq_dask.evaluate.leaves import ProblemHome

P0 = {**problems.P0, "rate": 3.0}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "robust": {"loss": "huber", "f_scale": "mad"},
}


def fit(store: Path, kind: str = "linear", **options: Any) -> FitResult:
    """Some passes, from a small sample of a store."""
    chosen = {
        name: options.pop(name) for name in ("checkpoint", "client", "callback") if name in options
    }
    config = HybridStreamingConfig(
        **{
            "max_warmup_iterations": 40,
            "checkpoint_frequency": 5,
            "callback_frequency": 1,
            **options,
        }
    )
    return fit_dataset(
        store,
        problems.decay,
        y="y",
        p0=P0,
        bounds={"rate": (0, 9)},
        config=config,
        **KINDS[kind],
        **chosen,
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_record(record: IterationRecord, phase: int, at: int) -> None:
    if record.phase == phase and record.iteration == at:
        die()


def die_in_pass(at: int) -> None:
    """While the leaves of a pass are being summed."""
    start, seen = ProblemHome._start, {"leaves": 0}

    @functools.wraps(start)
    def counting(self: ProblemHome, *rest: Any) -> Any:
        source = self.problem.source
        if source.num_rows > 50_000:  # not the sample
            in_the_middle = seen["leaves"] == (at - 1) * source.num_chunks + 1
            seen["leaves"] += 1
            if in_the_middle:
                die()
        return start(self, *rest)

    ProblemHome._start = counting  # type: ignore[method-assign]


def die_in_write(at: int) -> None:
    """Between the temporary file and its new name."""
    replace, seen = os.replace, {"writes": 0}

    def counting(source: Any, target: Any) -> None:
        seen["writes"] += 1
        if seen["writes"] == at:
            die()
        replace(source, target)

    os.replace = counting  # type: ignore[assignment]


def main() -> None:
    store, checkpoint, how, at, kind, address = sys.argv[1:]
    callback = None
    if how in ("warmup", "callback"):
        callback = functools.partial(die_at_record, phase=1 if how == "warmup" else 2, at=int(at))
    if how == "pass":
        die_in_pass(int(at))
    if how == "write":
        die_in_write(int(at))
    client = distributed.Client(address, set_as_default=False) if address else None
    fit(Path(store), kind, checkpoint=checkpoint, callback=callback, client=client)


if __name__ == "__main__":
    main()
