"""What a fit came to: its numbers, and what follows from them without the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nlsq_dask._typing import Bool, Float, Shape, Vector
from nlsq_dask.errors import CovarianceError, SessionError
from nlsq_dask.model import Model
from nlsq_dask.results.provenance import Provenance
from nlsq_dask.results.session import Session
from nlsq_dask.status import Status
from nlsq_dask.telemetry import IterationRecord

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["STATISTICS", "Outcome"]

STATISTICS = {
    "cost": "what was minimised: half the chi-square, and penalties",
    "penalty_cost": "part of priors and group variances in the cost",
    "chi2": "chi-square",
    "reduced_chi2": "chi-square over degrees of freedom",
    "r_squared": "share of the variance that the model explains",
    "aic": "Akaike's information criterion",
    "bic": "Bayesian information criterion",
    "dof": "degrees of freedom",
    "num_rows": "rows that counted",
    "num_masked": "rows left out",
    "total_sum_of_squares": "weighted sum of squares about the mean",
    "num_passes": "passes over all data",
    "bytes_read": "decoded bytes read",
    "optimality": "largest cosine between the residuals and a column of the Jacobian",
    "distance": "estimated distance to the minimum, in standard errors",
    "condition_number": "condition number of the scaled Jacobian",
    "rank": "directions among the free parameters that the data determine",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """The numbers of a fit; `FitResult`, which is one, says what each is."""

    popt: Float[np.ndarray, " n"]
    p0: Float[np.ndarray, " n"]
    lower: Float[np.ndarray, " n"]
    upper: Float[np.ndarray, " n"]
    pcov: Float[np.ndarray, "n n"] | None
    param_names: tuple[str, ...]
    shapes: dict[str, Shape]
    is_free: Bool[np.ndarray, " n"]
    is_tied: Bool[np.ndarray, " n"]
    status: Status
    details: str
    cost: float
    penalty_cost: float
    num_rows: int
    num_masked: int
    total_sum_of_squares: float
    num_passes: int
    bytes_read: int
    optimality: float
    distance: float
    condition_number: float
    rank: float
    active: Bool[np.ndarray, " n"]
    absolute_sigma: bool
    loss: str
    f_scale: float
    covariance_kind: str
    num_clusters: int
    history: tuple[IterationRecord, ...] = field(repr=False)
    diagnostics: dict[str, Any] = field(repr=False)
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    model: Model | None = field(default=None, repr=False, compare=False)
    session: Session | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # A model may be a lambda, and a session holds arrays and clients: neither is pickled.
        return {**self.__dict__, "session": None, "model": None}

    def require_session(self, purpose: str) -> Session:
        """The session, or an error that says how to get one."""
        if self.session is None:
            raise SessionError(
                f"{purpose} must read the data again, and this result came from a file or another "
                "process; fit the same data with p0=result.popt in this process first"
            )
        return self.session

    # -- parameters

    @property
    def perr(self) -> Float[np.ndarray, " n"] | None:
        """Standard errors; None where there is no `pcov`."""
        return None if self.pcov is None else np.sqrt(np.diag(self.pcov))

    def require_covariance(self, purpose: str) -> tuple[Vector, Vector]:
        """`pcov` and `perr`, or an error that says why there are none."""
        if self.pcov is None:
            raise CovarianceError(
                f"{purpose} needs a covariance, and none was formed for the "
                f"{int(self.is_free.sum()):,} free parameters; raise `cg_param_threshold` above "
                "that where a matrix of their number squared fits in memory"
            )
        return self.pcov, np.sqrt(np.diag(self.pcov))

    @property
    def params(self) -> xr.DataArray:
        """`popt` by name: ``result.params.sel(param="rate")``."""
        import xarray as xr

        return xr.DataArray(self.popt, coords={"param": list(self.param_names)}, name="params")

    @property
    def covariance(self) -> xr.DataArray:
        """`pcov` by name, along ``cov_i`` and ``cov_j``."""
        names = list(self.param_names)
        pcov, _ = self.require_covariance("`covariance`")
        import xarray as xr

        return xr.DataArray(pcov, coords={"cov_i": names, "cov_j": names}, name="covariance")

    @property
    def correlation(self) -> xr.DataArray:
        """Correlations of the estimates; NaN where a standard error is zero or infinite."""
        pcov, errors = self.require_covariance("`correlation`")
        usable = np.isfinite(errors) & (errors > 0)
        scale = np.where(usable, errors, np.nan)
        return self.covariance.copy(data=pcov / np.outer(scale, scale)).rename("correlation")

    # -- how good

    @property
    def success(self) -> bool:
        """Whether a convergence test was met."""
        return self.status.is_success

    @property
    def message(self) -> str:
        """Why the fit stopped, with the numbers."""
        return f"{self.status.value} {self.details}".strip()

    @property
    def dof(self) -> int:
        """Rows less free parameters."""
        return self.num_rows - int(self.is_free.sum())

    @property
    def chi2(self) -> float:
        """``Σ r²``; for a robust loss ``Σ s² ρ((r / s)²)``."""
        return 2 * (self.cost - self.penalty_cost)

    @property
    def reduced_chi2(self) -> float:
        return self.chi2 / self.dof if self.dof > 0 else np.nan

    @property
    def r_squared(self) -> float:
        """``1 - Σ r² / Σ w (y - ȳ)²``; NaN where all `y` are equal."""
        total = self.total_sum_of_squares
        return 1 - self.chi2 / total if total > 0 else np.nan

    @property
    def aic(self) -> float:
        """Akaike's criterion, ``m ln(chi2 / m) + 2 k``."""
        return self._log_likelihood_term() + 2 * int(self.is_free.sum())

    @property
    def bic(self) -> float:
        """The Bayesian criterion, ``m ln(chi2 / m) + k ln(m)``."""
        return self._log_likelihood_term() + int(self.is_free.sum()) * math.log(self.num_rows)

    def _log_likelihood_term(self) -> float:
        chi2 = self.chi2
        return self.num_rows * math.log(chi2 / self.num_rows) if chi2 > 0 else -math.inf
