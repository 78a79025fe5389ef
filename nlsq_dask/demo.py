"""What the command line shows first: an archive made, fitted, and compared with the truth."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
import zarr

from nlsq_dask._typing import Vector
from nlsq_dask.api import fit_dataset
from nlsq_dask.results.result import FitResult

if TYPE_CHECKING:
    import distributed

__all__ = [
    "chunk_rows",
    "comparison",
    "fit_archive",
    "require_recovered",
    "ringdown",
    "throughput",
    "write_archive",
]

_MAX_CHUNK_ROWS = 500_000
_MIN_CHUNKS = 8  # a small archive too has work for each worker
_DURATION_DAYS = 27.0
_NOISE = 0.02
_SEED = 20240229
_TRUTH = {
    "amplitude": 0.8,
    "decay_time": 9.5,
    "period": 2.137,
    "phase": 0.6,
    "quiescent": 1.25,
}
_MAX_DEVIATION = 4.0  # standard errors; a parameter is further off in one run out of 16,000


def ringdown(
    time: jax.Array,
    amplitude: float = 1.0,
    decay_time: float = 15.0,
    period: float = 2.3,
    phase: float = 0.0,
    quiescent: float = 1.0,
) -> jax.Array:
    """A star that rings down after an outburst: a decaying oscillation on a constant flux.

    Parameters
    ----------
    time, decay_time, period : days
    amplitude, quiescent : relative flux
    phase : radians
    """
    oscillation = jnp.cos(2 * jnp.pi * time / period + phase)
    return quiescent + amplitude * jnp.exp(-time / decay_time) * oscillation


def chunk_rows(num_rows: int) -> int:
    return min(_MAX_CHUNK_ROWS, -(-num_rows // _MIN_CHUNKS))


def write_archive(path: Path, num_rows: int) -> None:
    """Zarr format 3, written chunk by chunk: the whole is never in memory."""
    step = chunk_rows(num_rows)
    group = zarr.create_group(path, zarr_format=3)
    layout: dict[str, Any] = {
        "shape": (num_rows,),
        "chunks": (step,),
        "dimension_names": ("time",),
    }
    # Not "days", which older versions of xarray decode to timedeltas.
    times = group.create_array("time", dtype="float64", attributes={"units": "d"}, **layout)
    fluxes = group.create_array("flux", dtype="float32", attributes={"units": "1"}, **layout)
    rng = np.random.default_rng(_SEED)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        moments = np.arange(rows.start, rows.stop) * (_DURATION_DAYS / num_rows)
        with jax.enable_x64(True):
            flux = np.asarray(ringdown(jnp.asarray(moments), **_TRUTH))
        times[rows] = moments
        fluxes[rows] = (flux + _NOISE * rng.standard_normal(len(moments))).astype(np.float32)


def fit_archive(path: Path, client: distributed.Client) -> tuple[FitResult, float]:
    start = time.perf_counter()
    # An index on `time` would load it whole.
    ds = xr.open_zarr(path, consolidated=False, create_default_indexes=False)
    click.echo(
        "Fitting a decaying oscillation with 5 parameters to all rows. A small random sample\n"
        "gives the start; each line below is one pass over the whole archive.\n"
    )
    result = fit_dataset(ds, ringdown, client=client, progress=True)
    return result, time.perf_counter() - start


def _deviations(result: FitResult) -> Vector:
    """Fitted less true, in standard errors."""
    truth = np.array([_TRUTH[name] for name in result.param_names])
    deviations: Vector = (result.popt - truth) / result.perr
    return deviations


def comparison(result: FitResult) -> str:
    assert result.perr is not None
    lines = [
        "Fitted values against those that the archive was made with:",
        "",
        f"  {'parameter':<12}{'true':>10}{'fitted':>16}{'std. error':>14}{'off by':>16}",
    ]
    for name, value, error, deviation in zip(
        result.param_names, result.popt, result.perr, _deviations(result), strict=True
    ):
        lines.append(
            f"  {name:<12}{_TRUTH[name]:>10.6g}{value:>16.9g}{error:>14.3g}"
            f"{deviation:>+9.2f} errors"
        )
    return "\n".join(lines)


def throughput(result: FitResult, elapsed_seconds: float) -> str:
    in_passes = sum(record.seconds for record in result.history)
    passes = result.diagnostics["passes"]
    peaks = passes["peak_memory_bytes_by_process"].values()
    best = max(record.rows_per_second for record in result.history)
    lines = [
        f"The fit took {elapsed_seconds:.1f} s, of which {in_passes:.1f} s in "
        f"{result.num_passes} passes over {result.num_rows:,} rows.",
        f"Rows per second: {result.num_rows * result.num_passes / in_passes:,.0f} over all "
        f"passes, {best:,.0f} in the best.",
        f"Read: {result.bytes_read / 1e6:,.1f} MB.",
        f"Peak memory of the worker processes: {_megabytes(peaks)}.",
    ]
    return "\n".join(lines)


def _megabytes(sizes_bytes: Any) -> str:
    return " and ".join(f"{size / 1e6:,.0f} MB" for size in sizes_bytes)


def require_recovered(result: FitResult) -> None:
    if not result.success:
        raise click.ClickException("the fit did not converge")
    worst = int(np.argmax(np.abs(_deviations(result))))
    deviation = abs(float(_deviations(result)[worst]))
    if not deviation <= _MAX_DEVIATION:
        raise click.ClickException(
            f"{result.param_names[worst]!r} is {deviation:.1f} standard errors from the truth, "
            f"more than {_MAX_DEVIATION:g}"
        )
    click.echo(
        f"\nConverged, with every parameter within {_MAX_DEVIATION:g} standard errors of the truth."
    )
