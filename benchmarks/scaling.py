"""What a pass costs beside its work: on two real workers, and on a thousand simulated ones.

    python benchmarks/scaling.py --workers 10 100 1000
    python benchmarks/scaling.py --workers 10 100 1000 --throughput 100e6

First, passes over chunks of 16 rows, which are no work, in this process and on a cluster of two
worker processes. Then passes over `--rows` rows on workers that sleep as long as their rows
would take: the larger of computing (`--ns-per-row`) and reading (`--bytes-per-row` at
`--throughput` for each worker). Everything else is real, see simulation.py, and runs on this one
machine: where its processors are busy most of the time, they are what is measured, and a cluster
whose workers have processors of their own does better.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from cases import PROBLEMS
from distributed import Client
from simulation import SimulatedCluster, count_messages, make_report, raise_file_limit
from synthetic import MadeRows, build_problem, build_request
from workers import start_workers

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.evaluate.base import Evaluator, Request
from nlsq_dask.evaluate.cluster import ClusterEvaluator
from nlsq_dask.evaluate.local import LocalEvaluator

_CASE = PROBLEMS["double_gaussian"]
_START_SECONDS = 300.0
_BUSY = 0.7  # of the machine: tasks and messages wait for a processor
_LONG_SECONDS = 20.0  # such passes are not repeated


def pass_seconds(evaluator: Evaluator, request: Request, repeats: int) -> float:
    """The median pass; the first, which compiles and sends the problem, is left out."""
    evaluator.evaluate(request)
    return statistics.median(evaluator.evaluate(request).seconds for _ in range(repeats))


def measure_overhead(num_chunks: int, client: Client, repeats: int) -> dict[str, Any]:
    """Passes without work: in process, and on the workers of `client`."""
    problem = build_problem(_CASE, MadeRows(num_chunks=num_chunks))
    request = build_request(problem)
    here = pass_seconds(LocalEvaluator(problem), request, repeats)
    evaluator = ClusterEvaluator(problem, HybridStreamingConfig(), client)
    there = pass_seconds(evaluator, request, repeats)
    evaluator.close()
    print(
        f"{num_chunks:>9,} chunks: {1e3 * here:>7.1f} ms in process, {1e3 * there:>7.1f} ms on "
        f"two workers, {1e6 * there / num_chunks:.0f} us a chunk",
        flush=True,
    )
    return {"chunks": num_chunks, "local_seconds": here, "cluster_seconds": there}


def measure_overheads(options: argparse.Namespace) -> list[dict[str, Any]]:
    print("A pass without work:")
    with start_workers() as cluster, Client(cluster) as client:
        return [measure_overhead(chunks, client, options.repeats) for chunks in options.chunks]


def simulate(num_workers: int, options: argparse.Namespace, counts: Any) -> dict[str, Any]:
    """Passes over all rows by so many workers."""
    num_leaves = -(-options.rows // options.leaf_rows)
    source = MadeRows(num_chunks=num_leaves, rows_claimed=options.leaf_rows)
    problem = build_problem(_CASE, source)
    request = build_request(problem)
    with (
        SimulatedCluster(num_workers, options.workers_per_process, counts) as cluster,
        Client(cluster.address, set_as_default=False) as client,
    ):
        start = time.perf_counter()
        client.wait_for_workers(num_workers, timeout=_START_SECONDS)
        started = time.perf_counter() - start
        start = time.perf_counter()
        evaluator = ClusterEvaluator(problem, HybridStreamingConfig(cache_bytes=0), client)
        first = evaluator.evaluate(request)  # every worker gets the problem
        prepared = time.perf_counter() - start
        empty = statistics.median(evaluator.evaluate(request).seconds for _ in range(3))
        cluster.speed.seconds_per_leaf = options.leaf_rows * seconds_per_row(options)
        ideal = options.rows * seconds_per_row(options) / num_workers
        repeats = 1 if ideal > _LONG_SECONDS else options.repeats
        before, machine = cluster.effort, psutil.cpu_times()
        seconds = [evaluator.evaluate(request).seconds for _ in range(repeats)]
        effort = cluster.effort.since(before)
        busy = busy_share(machine, psutil.cpu_times())
    per_pass = {name: value / repeats for name, value in asdict(effort).items()}
    num_tasks = len(first.reports)
    wall = statistics.median(seconds)
    used = sum(value for name, value in per_pass.items() if name.endswith("_seconds"))
    return {
        "workers": num_workers,
        "rows": options.rows,
        "tasks": num_tasks,
        "start_seconds": started,
        "prepare_seconds": prepared,
        "ideal_seconds": ideal,
        "split_seconds": longest_share(num_leaves, num_tasks, num_workers)
        * options.leaf_rows
        * seconds_per_row(options),
        "seconds": wall,
        "seconds_without_work": empty,
        "efficiency": ideal / wall,
        "machine_share": used / (sum(seconds) / repeats * num_cores()),
        "machine_busy": busy,
        "report_bytes": len(pickle.dumps(largest_report(num_leaves, num_tasks))),
        **per_pass,
    }


def longest_share(num_leaves: int, num_tasks: int, num_workers: int) -> int:
    """Leaves of the worker that has most: whole tasks do not divide evenly among many."""
    return -(-num_tasks // num_workers) * -(-num_leaves // num_tasks)


def largest_report(num_leaves: int, num_tasks: int) -> Any:
    """A task's answer, from the middle of the leaves, where ranges have most nodes."""
    length = -(-num_leaves // num_tasks)
    start = num_leaves // 2 - length // 2
    return make_report(range(start, min(start + length, num_leaves)), num_leaves, len(_CASE.p0))


def seconds_per_row(options: argparse.Namespace) -> float:
    """The next leaf is read while one is computed on: the slower of the two."""
    reading = options.bytes_per_row / options.throughput if options.throughput else 0.0
    return float(max(1e-9 * options.ns_per_row, reading))


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['workers']:>6,} workers, {result['tasks']:,} tasks: ideal "
        f"{result['ideal_seconds']:.2f} s, {result['split_seconds']:.2f} s as they are split, "
        f"measured {result['seconds']:.2f} s, efficiency {100 * result['efficiency']:.0f} %; "
        f"without work {result['seconds_without_work']:.2f} s\n"
        f"        processor seconds a pass: client {result['client_seconds']:.2f}, scheduler "
        f"{result['scheduler_seconds']:.2f}, all workers {result['workers_seconds']:.2f}: "
        f"{100 * result['machine_share']:.0f} % of this machine's {num_cores()} cores, which are "
        f"{100 * result['machine_busy']:.0f} % busy\n"
        f"        written a pass: client {traffic(result, 'client')}, scheduler "
        f"{traffic(result, 'scheduler')}, workers {traffic(result, 'workers')}; a report "
        f"{result['report_bytes']:,} bytes\n"
        f"        {result['start_seconds']:.0f} s to start them, {result['prepare_seconds']:.1f} s "
        "to send the problem and make the first pass",
        flush=True,
    )
    if result["machine_busy"] > _BUSY:
        print("        this machine is the limit here, and the times are its own", flush=True)


def busy_share(before: Any, after: Any) -> float:
    """Of all processors, by whatever runs on this machine."""
    spent = [late - early for early, late in zip(before, after, strict=True)]
    idle = spent[before._fields.index("idle")]
    return float(1.0 - idle / sum(spent))


def traffic(result: dict[str, Any], role: str) -> str:
    size = result[f"{role}_bytes"] / 2**20
    return f"{result[f'{role}_messages']:,.0f} messages, {size:.2f} MiB"


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, nargs="*", default=[100, 1_000, 10_000])
    parser.add_argument("--workers", type=int, nargs="*", default=[10, 30, 100, 300, 1_000])
    parser.add_argument("--rows", type=int_of_float, default=10**10)
    parser.add_argument("--leaf-rows", type=int_of_float, default=2**20)
    parser.add_argument("--ns-per-row", type=float, default=22.0)
    parser.add_argument("--bytes-per-row", type=float, default=16.0)
    parser.add_argument("--throughput", type=float, help="bytes a second; without, from memory")
    parser.add_argument("--workers-per-process", type=int, default=125)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    return parser.parse_args()


def int_of_float(text: str) -> int:
    return int(float(text))


def main() -> int:
    options = parse()
    results: dict[str, Any] = {"overhead": [], "simulation": []}
    if options.chunks:
        results["overhead"] = measure_overheads(options)
    counts = [0, 0]
    raise_file_limit()
    count_messages(counts)
    if options.workers:
        print(f"{options.rows:,} rows, {1e9 * seconds_per_row(options):.0f} ns a row and worker:")
    for num_workers in options.workers:
        results["simulation"].append(simulate(num_workers, options, counts))
        show(results["simulation"][-1])
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
