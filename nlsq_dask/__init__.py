"""Out-of-core nonlinear least squares on JAX and Dask.

One parameter vector, fitted to a whole chunked archive: `fit_dataset` for xarray datasets, Zarr
and HDF5 stores; `curve_fit` with SciPy's contract for arrays. xarray's objects have them as
``ds.nlsq.fit``.
"""

import wrapt

from nlsq_dask._version import __version__
from nlsq_dask.api import curve_fit, fit_dataset
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import FitInterrupted
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
    "FitInterrupted",
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

# As soon as xarray is there: loading it takes as long as all of this package.
wrapt.register_post_import_hook("nlsq_dask.accessor:register", "xarray")
