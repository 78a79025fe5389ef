"""What can go wrong, each also the builtin that a user would catch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = [
    "CheckpointError",
    "ConvergenceError",
    "CovarianceError",
    "DataChangedError",
    "DataError",
    "FitInterrupted",
    "LengthError",
    "MemoryProjectionError",
    "ModelError",
    "ResultFileError",
    "SessionError",
    "SpoolLimitError",
    "StoreDamagedError",
    "StoreDeniedError",
    "StoreLockedError",
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


class DataChangedError(DataError):
    """Rows were read with other values than before in the same fit."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or resumed: the place, the file, or it is of another fit."""


class ResultFileError(ValueError):
    """A result cannot be saved there, or what is there is none that this version can read."""


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


class StoreDamagedError(OSError):
    """What a store holds cannot be decoded: a checksum or codec refuses it, or it is cut short."""


class StoreLockedError(BlockingIOError):
    """A file is being written to by another process."""


class SpoolLimitError(OSError):
    """A batch would take the spool over its limit of bytes. Nothing of it was stored."""


class MemoryProjectionError(MemoryError):
    """The plan needs more memory than a worker has. Raised before the first pass."""


class WorkerError(RuntimeError):
    """The cluster cannot run the fit, or not go on with it; no work is left on it.

    It has no workers, other versions, a task that kept killing them, or a scheduler that is gone.

    Attributes
    ----------
    checkpoint : Path or None
        From which ``config.resume_from_checkpoint`` goes on, where one was written.
    """

    def __init__(self, text: str, checkpoint: Path | None = None) -> None:
        if checkpoint is not None:
            text += f"; {_goes_on_from(checkpoint)}"
        super().__init__(text)
        self.checkpoint = checkpoint


class ConvergenceError(RuntimeError):
    """`curve_fit` ended without meeting a convergence test."""


class FitInterrupted(KeyboardInterrupt):
    """A fit was interrupted from the keyboard; no work is left on the cluster.

    Attributes
    ----------
    result : FitResult or None
        At the best parameters that a pass over all rows has evaluated; None where no pass was
        over, or not yet put together.
    checkpoint : Path or None
        From which ``config.resume_from_checkpoint`` goes on, where one was written.
    """

    def __init__(self, result: Any, checkpoint: Path | None) -> None:
        when = "before it had a result" if result is None else f"after pass {result.num_passes}"
        text = f"The fit was interrupted {when}"
        if result is not None:
            text += "; `result` of this exception is what it has come to"
        if checkpoint is not None:
            text += f"; {_goes_on_from(checkpoint)}"
        super().__init__(text)
        self.result = result
        self.checkpoint = checkpoint


def _goes_on_from(checkpoint: Path) -> str:
    return f"resume_from_checkpoint={str(checkpoint)!r} goes on from there"
