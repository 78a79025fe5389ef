"""Time of a fit of an archive opened with Dask (`xr.open_zarr`), over that of the same by path.

    python benchmarks/open_zarr.py --rows 20000000 --chunk-rows 20000

An archive is written in a temporary folder and fitted in this process and on two worker
processes, each way in turn, kernels compiled and dataset opened beforehand; the best time of
each way counts. Once its rows are numbered by a dimension without a coordinate, once they lie
along a time coordinate, which `xr.open_zarr` loads and the path does not. Exits non-zero if the
bits of the parameters differ, if the rows were not read in the same way, or if a ratio exceeds
the limit. A short run is for the first two: a single collection by Python, of 0.1 s, is half as
long as a fit of a million rows (`--rows 1000000 --repeats 1 --limit inf`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr
from archives import decay, write_archive
from distributed import Client
from workers import start_workers

from nlsq_dask import fit_dataset


def compare(path: Path, where: str, client: Client | None, repeats: int, limit: float) -> bool:
    ways = {"by path": path, "open_zarr": xr.open_zarr(path, consolidated=False)}
    results = {way: fit_dataset(ds, decay, y="y", client=client) for way, ds in ways.items()}
    seconds = dict.fromkeys(ways, np.inf)
    for _ in range(repeats):
        for way, ds in ways.items():
            start = time.perf_counter()
            fit_dataset(ds, decay, y="y", client=client)
            seconds[way] = min(seconds[way], time.perf_counter() - start)
    ratio = seconds["open_zarr"] / seconds["by path"]
    same = results["open_zarr"].popt.tobytes() == results["by path"].popt.tobytes()
    evaluators = [result.diagnostics["evaluator"] for result in results.values()]
    print(
        f"{path.stem:>10}, {where}: {seconds['by path']:.2f} s by path, "
        f"{seconds['open_zarr']:.2f} s by open_zarr, ratio {ratio:.2f}, "
        f"bits {'the same' if same else 'DIFFER'}; {' / '.join(dict.fromkeys(evaluators))}",
        flush=True,
    )
    return same and len(set(evaluators)) == 1 and ratio <= limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--chunk-rows", type=int, default=500_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1.5, help="the largest ratio that passes")
    given = parser.parse_args()
    how = given.repeats, given.limit
    with tempfile.TemporaryDirectory() as folder:
        archives = [
            write_archive(Path(folder) / f"{name}.zarr", given.rows, given.chunk_rows, dim=dim)
            for name, dim in (("numbered", "row"), ("timed", "t"))
        ]
        passed = [compare(path, "this process", None, *how) for path in archives]
        with start_workers() as cluster, Client(cluster, set_as_default=False) as client:
            passed += [compare(path, "2 workers", client, *how) for path in archives]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
