"""A pass over a Zarr archive against reading alone and computing alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import jax
from archives import reading_job
from synthetic import build_problem, build_request

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.evaluate.local import LocalEvaluator
from nlsq_dask.resolve import resolve_dataset


def test_pass_over_archive(
    case: cases.Problem, archive: cases.Data, compare: Any, report: Callable[..., None]
) -> None:
    """One thread computes; the thread that reads beside it has a processor if there is one."""
    rows = resolve_dataset(archive.archive, case.model(jax.numpy), y="y")
    problem = build_problem(case, rows.source)
    request = build_request(problem)
    config = HybridStreamingConfig(cache_bytes=0)
    evaluator = LocalEvaluator(problem, config, num_threads=1)
    kept = ProblemHome(problem=problem, cache_bytes=2**62, prefetch=False)
    leaves = range(problem.source.num_chunks)
    seconds = compare(
        both=lambda: evaluator.evaluate(request),
        reading=reading_job(problem.source),
        computing=lambda: kept.reduce(leaves, request),
    )
    floor = max(seconds["reading"], seconds["computing"])
    ns = {name: 1e9 * value / archive.num_rows for name, value in seconds.items()}
    report(
        f"{ns['both']:.1f} ns a row, {seconds['both'] / floor:.2f} times the longer of reading "
        f"({ns['reading']:.1f}) and computing ({ns['computing']:.1f})",
        ratio_to_floor=seconds["both"] / floor,
        ratio_to_sum=seconds["both"] / (seconds["reading"] + seconds["computing"]),
        ns_per_row=ns["both"],
    )
