"""A whole fit against its passes and its compilation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
from archives import reading_job
from synthetic import build_problem, build_request

from nlsq_dask import FitResult, fit_dataset, model
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.evaluate.local import LocalEvaluator
from nlsq_dask.kernels import build, reverse
from nlsq_dask.resolve import resolve_dataset


def compile_seconds(case: cases.Problem, archive: cases.Data) -> float:
    """Of the one kernel that a fit cannot do without."""
    problem = build_problem(case, resolve_dataset(archive.archive, case.model(jnp), y="y").source)
    home = ProblemHome(problem=problem, cache_bytes=0, prefetch=False)
    request, chunk = build_request(problem), home.reader.fetch(0)
    arguments = request.params, request.directions, request.terms, chunk
    start = time.perf_counter()
    with jax.enable_x64(True):
        home.kernels.normal_equations.lower(*arguments, precision="float64").compile()
    return time.perf_counter() - start


def forget_what_is_compiled() -> None:
    """As in a new process: kernels that are kept would say that they need no compiling."""
    jax.clear_caches()
    for module in (model, build, reverse):
        module._RECENT.clear()


def test_fit_of_archive(
    case: cases.Problem, archive: cases.Data, compare: Any, report: Callable[..., None]
) -> None:
    names = list(resolve_dataset(archive.archive, case.model(jnp), y="y").model.parameters)
    results: list[FitResult] = []

    def fit() -> None:
        forget_what_is_compiled()
        starts = dict(zip(names, case.p0, strict=True))
        results.append(fit_dataset(archive.archive, case.model(jnp), y="y", p0=starts))

    seconds = compare(fit=fit)  # apart from the passes: it clears what they compiled
    problem = build_problem(case, resolve_dataset(archive.archive, case.model(jnp), y="y").source)
    request = build_request(problem)
    evaluator = LocalEvaluator(problem)
    # The first pass reads, the others find the rows in the cache.
    seconds |= compare.least_seconds(
        reading=reading_job(problem.source),
        computing=lambda: evaluator.evaluate(request),
    )
    compiling = compile_seconds(case, archive)
    num_passes = results[-1].num_passes
    first = max(seconds["reading"], seconds["computing"])
    floor = first + (num_passes - 1) * seconds["computing"] + compiling
    assert results[-1].success
    report(
        f"{seconds['fit']:.2f} s, {seconds['fit'] / floor:.2f} times the floor of {floor:.2f}: "
        f"{num_passes} passes, the first of {first:.2f}, others of {seconds['computing']:.2f}, "
        f"and {compiling:.2f} to compile",
        ratio_to_floor=seconds["fit"] / floor,
        num_passes=num_passes,
    )
