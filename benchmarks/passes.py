"""Passes over Zarr archives against their floors, reading alone and computing alone.

    python benchmarks/passes.py                # all of it, some minutes
    python benchmarks/passes.py --short        # a tenth of the rows and leaves

In one run: for each codec, reading alone, computing alone (all leaves cached), the pass of one
thread that does both, and the pass's ratio to the larger; what a cluster of two workers adds to a
pass over cached leaves, where each store chunk is a leaf; seconds per pass by rows, with the
slope; bytes read where vectors broadcast against an array of three dimensions. Times are the
least of several, taken in turns. A ratio means something only where a second processor is free:
how many were is measured beside it, by two threads that each do what one did before.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import zarr
from archives import decay, reading_job, write_archive
from distributed import Client
from workers import start_workers
from zarr.codecs import BloscCodec, ZstdCodec

from nlsq_dask import HybridStreamingConfig, fit_dataset
from nlsq_dask.evaluate.base import Request
from nlsq_dask.evaluate.cluster import ClusterEvaluator
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.evaluate.local import LocalEvaluator
from nlsq_dask.problem import Problem

CHUNK_ROWS = 500_000
TINY_CHUNK_ROWS = 64
CODECS = {
    "raw": None,
    "blosc-lz4": BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=8),
    "zstd": ZstdCodec(level=3),
}


def separable(time, lat, amplitude=2.0, rate=0.5):
    return amplitude * jnp.exp(-rate * time) * lat


def prepare(path: Path, model: Callable[..., Any], **options: Any) -> tuple[Problem, Request]:
    """The problem of a fit, and normal equations at its start."""
    config = HybridStreamingConfig(max_passes=1, cache_bytes=0, **options)
    session = fit_dataset(path, model, y="y", config=config).session
    problem = session.problem
    directions = np.eye(problem.space.size)
    return problem, Request(params=problem.space.p0, terms=session.terms, directions=directions)


def least_seconds(jobs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least time of each job, one of each in turns, after one of each that does not count."""
    best = dict.fromkeys(jobs, np.inf)
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def hash_once(megabytes: bytes = bytes(2**25)) -> None:
    hashlib.sha256(megabytes)


def hash_twice() -> None:
    threads = [threading.Thread(target=hash_once) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def against_floors(folder: Path, num_rows: int, repeats: int) -> None:
    chunk_rows = num_rows // 40
    print(f"\npasses over {num_rows:,} rows, chunks of {chunk_rows:,}, one thread")
    print("codec       reading  computing     pass  ratio  free processors")
    for name, codec in CODECS.items():
        path = write_archive(folder / f"{name}.zarr", num_rows, chunk_rows, codec=codec, decimals=4)
        took = least_seconds(jobs_against_floors(*prepare(path, decay)), repeats)
        floor = max(took["reading"], took["computing"])
        print(
            f"{name:<10}{took['reading']:>7.3f} s{took['computing']:>9.3f} s{took['pass']:>7.3f} s"
            f"{took['pass'] / floor:>7.2f}{2 * took['one'] / took['two']:>17.1f}"
        )


def jobs_against_floors(problem: Problem, request: Request) -> dict[str, Callable[[], Any]]:
    leaves = range(problem.source.num_chunks)
    cold = ProblemHome(problem=problem, cache_bytes=0, prefetch=True)
    warm = ProblemHome(problem=problem, cache_bytes=2**62, prefetch=True)
    return {
        "reading": reading_job(problem.source),
        "computing": lambda: warm.reduce(leaves, request),
        "pass": lambda: cold.reduce(leaves, request),
        "one": hash_once,
        "two": hash_twice,
    }


def on_a_cluster(folder: Path, sizes: list[int], repeats: int) -> None:
    print(f"\ncached leaves of {TINY_CHUNK_ROWS} rows, each a chunk of the store")
    print("leaves   1 thread  2 threads  2 workers  busiest worker  over process  over worker")
    with start_workers() as cluster, Client(cluster) as client:
        for num_leaves in sizes:
            num_rows = num_leaves * TINY_CHUNK_ROWS
            path = folder / f"{num_leaves}.zarr"
            write_archive(path, num_rows, TINY_CHUNK_ROWS, codec=None, decimals=4)
            problem, request = prepare(path, decay, chunk_size=TINY_CHUNK_ROWS)
            assert problem.source.num_chunks == num_leaves
            jobs, busiest = jobs_on_a_cluster(problem, request, client)
            took = least_seconds(jobs, repeats)
            one, two, there, busy = (1e3 * t for t in (*took.values(), min(busiest)))
            print(
                f"{num_leaves:<6,}{one:>9.1f} ms{two:>8.1f} ms{there:>8.1f} ms{busy:>13.1f} ms"
                f"{there - min(one, two):>11.1f} ms{there - busy:>10.1f} ms"
            )


def jobs_on_a_cluster(
    problem: Problem, request: Request, client: Client
) -> tuple[dict[str, Callable[[], Any]], list[float]]:
    """A pass by one thread, by two, by the workers; seconds of the busiest of these, in each."""
    config = HybridStreamingConfig(chunk_size=TINY_CHUNK_ROWS)
    one, two = (LocalEvaluator(problem, config, num_threads=n) for n in (1, 2))
    remote = ClusterEvaluator(problem, config, client)
    busiest = []

    def there() -> None:
        reports = remote.evaluate(request).reports
        busiest.append(max(report.busy_seconds for report in reports))

    here = {"1": lambda: one.evaluate(request), "2": lambda: two.evaluate(request)}
    return {**here, "there": there}, busiest


def by_rows(folder: Path, sizes: list[int], repeats: int) -> None:
    print("\nseconds per pass, raw, one thread, nothing cached")
    seconds = []
    for num_rows in sizes:
        path = folder / f"rows-{num_rows}.zarr"
        write_archive(path, num_rows, CHUNK_ROWS, codec=None, decimals=4)
        problem, request = prepare(path, decay)
        home = ProblemHome(problem=problem, cache_bytes=0, prefetch=True)
        a_pass = functools.partial(home.reduce, range(problem.source.num_chunks), request)
        took = least_seconds({"pass": a_pass}, repeats)
        seconds.append(took["pass"])
        print(
            f"{num_rows:>13,} rows {seconds[-1]:8.3f} s {1e9 * seconds[-1] / num_rows:7.1f} ns/row"
        )
    slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    print(f"slope of log seconds against log rows: {slope:.3f}")


def in_three_dimensions(folder: Path, num_times: int) -> None:
    shape = num_times, 180, 360
    group = zarr.open_group(folder / "cube.zarr", mode="w", zarr_format=3)
    names = "time", "lat", "lon"
    y = group.create_array(
        "y", shape=shape, chunks=(10, 180, 360), dtype="f8", dimension_names=names
    )
    for name, length in zip(names[:2], shape, strict=False):
        group.create_array(name, data=np.linspace(0.1, 1, length), dimension_names=[name])
    t, lat = np.linspace(0.1, 1, num_times), np.linspace(0.1, 1, 180)
    y[:] = np.broadcast_to((2 * np.exp(-0.5 * t)[:, None] * lat)[:, :, None], shape)
    problem, request = prepare(folder / "cube.zarr", separable)
    home = ProblemHome(problem=problem, cache_bytes=0, prefetch=True)
    report = home.reduce(range(problem.source.num_chunks), request)
    vectors = report.bytes_read - y.nbytes
    print(
        f"\n3-d broadcast: {y.nbytes:,} bytes of y{shape}; a pass reads {report.bytes_read:,}, "
        f"{vectors:,} of them vectors, in {problem.source.num_chunks} leaves "
        f"(expanded: {2 * y.nbytes:,})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tenth of the rows and leaves")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where archives are written; a temporary one by default")
    options = parser.parse_args()
    part = 10 if options.short else 1
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        against_floors(folder, 20_000_000 // part, options.repeats)
        in_three_dimensions(folder, 300 // part)
        rows = [size // part for size in (10_000_000, 30_000_000, 100_000_000)]
        by_rows(folder, rows, options.repeats)
        leaves = [100, 1_000] if options.short else [100, 1_000, 10_000]
        on_a_cluster(folder, leaves, options.repeats)


if __name__ == "__main__":
    main()
