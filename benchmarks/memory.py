"""Peak memory of worker processes while they fit a Zarr archive, with the chunk cache off.

    python benchmarks/memory.py --rows 10000000 100000000

For each size: an archive is written in a temporary folder, two worker processes compile the
kernels on a small fit, their resident size is taken as the base, and the largest size during
the fit of the archive is compared with the base and with the projection made beforehand. Exits
non-zero if a worker grows by more than 1 GiB, or beyond its projection. This has room for
compiling (320 MiB), which is in the base already: growth is what says more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from archives import decay, write_archive
from distributed import Client
from workers import start_workers

from nlsq_dask import FitResult, HybridStreamingConfig, fit_dataset

CHUNK_ROWS = 500_000
LIMIT_BYTES = 2**30


class PeakWatch:
    """The largest resident size of each process, sampled every 10 ms."""

    def __init__(self, pids: list[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self.base = [process.memory_info().rss for process in self._processes]
        self.peak = list(self.base)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            now = [process.memory_info().rss for process in self._processes]
            self.peak = [max(pair) for pair in zip(self.peak, now, strict=True)]


def fit(path: Path, client: Client) -> FitResult:
    config = HybridStreamingConfig(cache_bytes=0)
    return fit_dataset(path, decay, y="y", client=client, config=config)


def measure(num_rows: int, folder: Path) -> bool:
    small = write_archive(folder / "small.zarr", 2 * CHUNK_ROWS, CHUNK_ROWS)
    large = write_archive(folder / "large.zarr", num_rows, CHUNK_ROWS)
    with start_workers() as cluster, Client(cluster) as client:
        fit(small, client)
        pids = [worker["pid"] for worker in client.run(process_id).values()]
        start = time.perf_counter()
        with PeakWatch(pids) as watch:
            result = fit(large, client)
        seconds = time.perf_counter() - start
    growth = max(peak - base for peak, base in zip(watch.peak, watch.base, strict=True))
    projected = result.diagnostics["memory"]["projected_bytes"]
    print(
        f"{num_rows:>13,} rows: {result.num_passes} passes, {seconds:.1f} s; a worker grew by "
        f"{growth / 2**20:.0f} MiB over a base of {max(watch.base) / 2**20:.0f} MiB; "
        f"peak {max(watch.peak) / 2**20:.0f} MiB of {projected / 2**20:.0f} MiB projected"
    )
    return result.success and growth < LIMIT_BYTES and max(watch.peak) < projected


def process_id() -> dict[str, int]:
    return {"pid": psutil.Process().pid}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000_000, 100_000_000])
    passed = []
    for num_rows in parser.parse_args().rows:
        with tempfile.TemporaryDirectory() as folder:
            passed.append(measure(num_rows, Path(folder)))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
