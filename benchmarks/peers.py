"""One fit by one package, in a process of its own; started by compare.py.

Speaks in lines of JSON on standard output: ``{"event": "ready"}`` once everything is imported
and the data are where the package wants them, ``{"event": "done", …}`` after the fit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import PROBLEMS, Data, Problem

__all__ = ["PEERS", "Peer"]

Fit = Callable[[], Any]  # returns the parameters, or the parameters and what else to report
_NLSQ_CHUNK_ROWS = 1_000_000
_TO_READ = ("xarray", "zarr")  # loaded when they are first needed, here too before the clock runs
_MEMORY_GB = 16.0  # that NLSQ is told it may use


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How one package fits. `prepare` imports and loads; what it yields is timed."""

    name: str
    family: str  # packages are compared by the best of their ways
    prepare: Callable[[Problem, Data], contextlib.AbstractContextManager[Fit]]
    modules: tuple[str, ...]
    reads_archive: bool = False


@contextlib.contextmanager
def scipy_curve_fit(problem: Problem, data: Data) -> Iterator[Fit]:
    from scipy.optimize import curve_fit

    (x, y), model = data.load(), problem.model(np)
    yield lambda: curve_fit(model, x, y, problem.p0)[0]


@contextlib.contextmanager
def scipy_with_jacobian(problem: Problem, data: Data) -> Iterator[Fit]:
    from scipy.optimize import curve_fit

    (x, y), model = data.load(), problem.model(np)

    def jac(x: np.ndarray, *params: float) -> np.ndarray:
        return problem.jacobian(x, np.array(params))

    yield lambda: curve_fit(model, x, y, problem.p0, jac=jac)[0]


@contextlib.contextmanager
def lmfit_model(problem: Problem, data: Data) -> Iterator[Fit]:
    import lmfit

    x, y = data.load()
    model = lmfit.Model(problem.model(np))
    starts = dict(zip(model.param_names, problem.p0, strict=True))

    def fit() -> Any:
        result = model.fit(y, x=x, **starts)
        return [result.best_values[name] for name in model.param_names]

    yield fit


@contextlib.contextmanager
def xarray_curvefit(problem: Problem, data: Data) -> Iterator[Fit]:
    import xarray as xr

    (x, y), model = data.load(), problem.model(np)
    dataset = xr.Dataset({"y": ("x", y)}, coords={"x": x})
    names = list(model.__code__.co_varnames[1 : model.__code__.co_argcount])

    def fit() -> Any:
        starts = dict(zip(names, problem.p0, strict=True))
        return dataset.curvefit("x", model, p0=starts)["y_curvefit_coefficients"].values

    yield fit


@contextlib.contextmanager
def nlsq_curve_fit(problem: Problem, data: Data) -> Iterator[Fit]:
    import nlsq  # enables 64 bits, and has to be imported before JAX
    from jax import numpy as jnp

    (x, y), model = data.load(), problem.model(jnp)

    def fit() -> Any:
        popt, _ = nlsq.curve_fit(model, x, y, p0=np.array(problem.p0))
        return popt

    yield fit


@contextlib.contextmanager
def nlsq_curve_fit_large(problem: Problem, data: Data) -> Iterator[Fit]:
    import nlsq
    from jax import numpy as jnp

    (x, y), model = data.load(), problem.model(jnp)

    def fit() -> Any:
        p0 = np.array(problem.p0)
        popt, _ = nlsq.curve_fit_large(model, x, y, p0=p0, memory_limit_gb=_MEMORY_GB)
        return popt

    yield fit


@contextlib.contextmanager
def nlsq_large_fitter(problem: Problem, data: Data) -> Iterator[Fit]:
    import nlsq
    from jax import numpy as jnp

    (x, y), model = data.load(), problem.model(jnp)
    fitter = nlsq.LargeDatasetFitter(memory_limit_gb=_MEMORY_GB)
    yield lambda: fitter.fit(model, x, y, p0=np.array(problem.p0))["popt"]


@contextlib.contextmanager
def nlsq_hybrid_streaming(problem: Problem, data: Data) -> Iterator[Fit]:
    import nlsq
    from jax import numpy as jnp

    (x, y), model = data.load(), problem.model(jnp)
    # Faster than its defaults: 10,000 rows to a call into XLA, and 200 warmup iterations where
    # its documentation has 20 to 50 as typical.
    config = nlsq.HybridStreamingConfig(
        chunk_size=min(_NLSQ_CHUNK_ROWS, data.num_rows),
        warmup_iterations=20,
        max_warmup_iterations=50,
        verbose=0,
    )
    optimizer = nlsq.AdaptiveHybridStreamingOptimizer(config)
    yield lambda: optimizer.fit((x, y), model, jnp.array(problem.p0), verbose=0)["x"]


@contextlib.contextmanager
def own_in_memory(problem: Problem, data: Data) -> Iterator[Fit]:
    from jax import numpy as jnp

    from nlsq_dask import curve_fit

    (x, y), model = data.load(), problem.model(jnp)

    def fit() -> Any:
        popt, _, information, _, _ = curve_fit(model, x, y, problem.p0, full_output=True)
        return popt, account_of(information["result"])

    yield fit


@contextlib.contextmanager
def own_in_process(problem: Problem, data: Data) -> Iterator[Fit]:
    yield own_fit(problem, data)


@contextlib.contextmanager
def own_on_workers(problem: Problem, data: Data, cache_bytes: int | None = None) -> Iterator[Fit]:
    from distributed import Client
    from workers import start_workers

    with start_workers() as cluster, Client(cluster) as client:
        # Workers import when they are first asked to: that is no part of a fit.
        for module in ("nlsq_dask", *_TO_READ):
            client.run(importlib.import_module, module)
        client.run(gc.collect)
        yield own_fit(problem, data, client, cache_bytes)


@contextlib.contextmanager
def own_on_workers_uncached(problem: Problem, data: Data) -> Iterator[Fit]:
    with own_on_workers(problem, data, cache_bytes=0) as fit:
        yield fit


def own_fit(
    problem: Problem, data: Data, client: Any = None, cache_bytes: int | None = None
) -> Fit:
    from jax import numpy as jnp

    from nlsq_dask import HybridStreamingConfig, fit_dataset

    model = problem.model(jnp)
    names = model.__code__.co_varnames[1 : model.__code__.co_argcount]
    config = HybridStreamingConfig(cache_bytes=cache_bytes)

    def fit() -> Any:
        starts = dict(zip(names, problem.p0, strict=True))
        result = fit_dataset(data.archive, model, y="y", p0=starts, client=client, config=config)
        return result.popt, account_of(result)

    return fit


def account_of(result: Any) -> dict[str, Any]:
    return {
        "num_passes": result.num_passes,
        "pass_seconds": [record.seconds for record in result.history if record.phase == 2],
        "success": bool(result.success),
    }


PEERS = {
    peer.name: peer
    for peer in (
        Peer(name="scipy", family="SciPy", prepare=scipy_curve_fit, modules=("scipy.optimize",)),
        Peer(
            name="scipy with jac",
            family="SciPy",
            prepare=scipy_with_jacobian,
            modules=("scipy.optimize",),
        ),
        Peer(name="lmfit", family="lmfit", prepare=lmfit_model, modules=("lmfit",)),
        Peer(name="xarray curvefit", family="xarray", prepare=xarray_curvefit, modules=("xarray",)),
        Peer(name="nlsq curve_fit", family="NLSQ", prepare=nlsq_curve_fit, modules=("nlsq",)),
        Peer(
            name="nlsq curve_fit_large",
            family="NLSQ",
            prepare=nlsq_curve_fit_large,
            modules=("nlsq",),
        ),
        Peer(
            name="nlsq LargeDatasetFitter",
            family="NLSQ",
            prepare=nlsq_large_fitter,
            modules=("nlsq",),
        ),
        Peer(
            name="nlsq hybrid_streaming",
            family="NLSQ",
            prepare=nlsq_hybrid_streaming,
            modules=("nlsq",),
        ),
        Peer(
            name="nlsq_dask, memory",
            family="nlsq_dask",
            prepare=own_in_memory,
            modules=("nlsq_dask",),
        ),
        Peer(
            name="nlsq_dask, zarr",
            family="nlsq_dask",
            prepare=own_in_process,
            modules=("nlsq_dask", *_TO_READ),
            reads_archive=True,
        ),
        Peer(
            name="nlsq_dask, zarr, 2 workers",
            family="nlsq_dask",
            prepare=own_on_workers,
            modules=("nlsq_dask", "distributed", *_TO_READ),
            reads_archive=True,
        ),
        Peer(
            name="nlsq_dask, zarr, 2 workers, no cache",
            family="nlsq_dask",
            prepare=own_on_workers_uncached,
            modules=("nlsq_dask", "distributed", *_TO_READ),
            reads_archive=True,
        ),
    )
}


def speak(stream: Any, **message: Any) -> None:
    print(json.dumps(message), file=stream, flush=True)


def largest_resident_bytes() -> int:
    """Of this process, at any time."""
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=list(PEERS), required=True)
    parser.add_argument("--problem", choices=list(PROBLEMS), required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    # What packages print goes to standard error: standard output is for the driver alone.
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer, problem = PEERS[arguments.peer], PROBLEMS[arguments.problem]
    data = Data(problem=problem.name, num_rows=arguments.rows, folder=arguments.folder)
    start = time.perf_counter()
    for module in peer.modules:
        importlib.import_module(module)
    import_seconds = time.perf_counter() - start
    with peer.prepare(problem, data) as fit:
        gc.collect()  # the objects that imports made, which would be looked through in the fit
        speak(stream, event="ready", import_seconds=import_seconds)
        start = time.perf_counter()
        fitted = fit()
        seconds = time.perf_counter() - start
        speak(stream, event="fitted", seconds=seconds)
    params, account = fitted if isinstance(fitted, tuple) else (fitted, {})
    speak(
        stream,
        event="done",
        params=[float(value) for value in np.asarray(params).ravel()],
        resident_bytes=largest_resident_bytes(),
        **account,
    )


if __name__ == "__main__":
    main()
