"""Why a fit stopped."""

from __future__ import annotations

import enum

__all__ = ["Status"]


class Status(enum.Enum):
    """Why a fit stopped. The value is the message the user reads."""

    RUNNING = "Running."
    CONVERGED = (
        "Converged: the estimated distance to the minimum is within `distance_tol` standard errors."
    )
    CONVERGED_TO_ROUNDING = (
        "Converged to rounding: the reduction still predicted is smaller than the rounding error "
        "of the cost, and another step did not shorten the way to the minimum."
    )
    CONVERGED_FTOL = "Converged: the relative reduction of the cost is within `ftol`."
    CONVERGED_XTOL = "Converged: the relative change of the parameters is within `xtol`."
    CONVERGED_GTOL = (
        "Converged: the largest cosine between the residuals and a column of the Jacobian "
        "is within `gtol`."
    )
    UNIDENTIFIED = (
        "Not unique: the cost is minimal, but the data do not determine every parameter. "
        "Parameters with an infinite standard error are arbitrary; fix or remove some of them."
    )
    STALLED = (
        "Stopped: no step lowers the cost, however short. Either the parameters are optimal "
        "to rounding, or the model is not finite or not differentiable nearby."
    )
    NOT_FINITE = (
        "Failed: the model or its derivative is not finite at every start tried, `p0` included."
    )
    MAX_ITERATIONS = "Stopped: `gauss_newton_max_iterations` trials without convergence."
    MAX_PASSES = "Stopped: `max_passes` passes over the data without convergence."
    MAX_SECONDS = "Stopped: `max_seconds` elapsed without convergence."
    INTERRUPTED = "Stopped: interrupted from the keyboard."
    STOPPED_BY_CALLBACK = "Stopped: the callback raised StopIteration."

    @property
    def is_success(self) -> bool:
        """Whether a convergence test was met and the minimum is unique."""
        return self.name.startswith("CONVERGED")
