"""What can go wrong, each also the builtin that a user would catch."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConvergenceError",
    "CovarianceError",
    "DataError",
    "LengthError",
    "MemoryProjectionError",
    "ModelError",
    "SessionError",
    "SpoolLimitError",
    "StoreDeniedError",
    "StoreNotFoundError",
    "StoreUnreachableError",
    "UntraceableModelError",
    "WorkerError",
]


class ModelError(ValueError):
    """The model breaks the contract: an elementwise, pure function of its arguments."""


class UntraceableModelError(ModelError, TypeError):
    """JAX cannot trace the model."""


class DataError(ValueError):
    """The data cannot be fitted as they are: no valid rows, or values that were refused."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or resumed: the place, the file, or it is of another fit."""


class LengthError(ValueError, TypeError):
    """There are more or fewer values than parameters. SciPy has a TypeError for that."""


class SessionError(RuntimeError):
    """A result from a file or another process has no way back to the data."""


class CovarianceError(ValueError):
    """There are too many parameters for a covariance to have been formed."""


class StoreNotFoundError(FileNotFoundError):
    """There is no store at the path or URL given."""


class StoreDeniedError(PermissionError):
    """A store may not be read with the credentials given, or there are none."""


class StoreUnreachableError(ConnectionError):
    """What should serve a store does not answer, or not as such a service does."""


class SpoolLimitError(OSError):
    """A batch would take the spool over its limit of bytes. Nothing of it was stored."""


class MemoryProjectionError(MemoryError):
    """The plan needs more memory than a worker has. Raised before the first pass."""


class WorkerError(RuntimeError):
    """The cluster cannot run the fit: no workers, other versions, or a task that kept failing."""


class ConvergenceError(RuntimeError):
    """`curve_fit` ended without meeting a convergence test."""
