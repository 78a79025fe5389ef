"""Out-of-core nonlinear least squares on JAX and Dask.

One parameter vector, fitted to a whole chunked archive: `fit_dataset` for xarray datasets, Zarr
and HDF5 stores; `curve_fit` with SciPy's contract for arrays.
"""

from nlsq_dask._version import __version__
from nlsq_dask.api import curve_fit, fit_dataset
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.optimizer import AdaptiveHybridStreamingOptimizer
from nlsq_dask.results.result import FitResult
from nlsq_dask.sources.base import Chunk, Source
from nlsq_dask.status import Status
from nlsq_dask.telemetry import IterationRecord
from nlsq_dask.warmup.defense import (
    DefenseLayerTelemetry,
    get_defense_telemetry,
    reset_defense_telemetry,
)

__all__ = [
    "AdaptiveHybridStreamingOptimizer",
    "Chunk",
    "DefenseLayerTelemetry",
    "FitResult",
    "HybridStreamingConfig",
    "IterationRecord",
    "Source",
    "Status",
    "__version__",
    "curve_fit",
    "fit_dataset",
    "get_defense_telemetry",
    "reset_defense_telemetry",
]
