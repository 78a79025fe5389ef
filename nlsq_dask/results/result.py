"""What a fit says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy

from nlsq_dask._typing import Float, Shape, Vector
from nlsq_dask.errors import CovarianceError, SessionError
from nlsq_dask.results.profile import EndPoint, Minimum, profile_ends
from nlsq_dask.results.residuals import Residuals
from nlsq_dask.results.session import Session
from nlsq_dask.results.streaming import streaming_diagnostics
from nlsq_dask.status import Status
from nlsq_dask.telemetry import IterationRecord

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["FitResult"]

_MAX_TABLE_ROWS = 100
_MAX_REPR_VALUES = 20

# What NLSQ's results answer to, and the attribute that is meant.
_NLSQ_KEYS = {
    "x": "popt",
    "success": "success",
    "message": "message",
    "fun": "fun",
    "pcov": "pcov",
    "perr": "perr",
    "popt": "popt",
    "streaming_diagnostics": "streaming_diagnostics",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class FitResult(Mapping[str, Any]):
    """Parameters, their uncertainty, and how the fit came to them.

    A mapping too: ``result["rate"]`` is a parameter, by the name that the model gives it and
    in its own shape; ``result["x"]``, ``"success"``, ``"message"``, ``"fun"``, ``"pcov"``,
    ``"perr"``, ``"popt"`` and ``"streaming_diagnostics"`` are what NLSQ calls so. Where a
    parameter has one of those names, the parameter is meant; they are attributes as well.

    Attributes
    ----------
    popt : (n,)
        All parameters, fixed ones included, in the model's order.
    pcov : (n, n) or None
        Their covariance; zero rows for fixed parameters, infinite variance for those that the
        data do not determine. None from `cg_param_threshold` free parameters on, where nothing
        of that size is formed; `perr` is None then as well.
    param_names : tuple of str
        A name for each element of `popt`; elements of array parameters are ``c[0]``, ``c[1]``, …
    status : Status
        Why the fit stopped; `success` is whether a convergence test was met.
    cost : float
        What was minimised: ``½ Σ s² ρ((r / s)²)`` with ``r = √weight (model - y) / sigma`` and
        ``s = f_scale``, and `penalty_cost`. For the linear loss ``½ Σ r²``.
    penalty_cost : float
        The part of priors and group variances.
    num_rows, num_masked : int
        Rows that counted, and rows left out.
    num_passes : int
        Passes over all data.
    bytes_read : int
        Decoded bytes read from the source, the sample included; cached chunks count once.
    optimality : float
        The largest cosine between the residuals and a column of the Jacobian.
    distance : float
        Estimated distance to the minimum, in standard errors.
    condition_number : float
        Of the Jacobian with columns of unit length.
    rank : float
        Directions among the free parameters that the data determine. Like `condition_number`,
        NaN where `pcov` is None.
    active : (n,) of bool
        Parameters that a bound holds.
    history : tuple of IterationRecord
        One for each pass.
    diagnostics : dict
        The sample, the optima that competed, the plan, memory, timings, versions.
    session : Session, optional
        The way back to the rows, for what takes more passes. It is not pickled: a result from a
        file or another process has None.
    """

    popt: Float[np.ndarray, " n"]
    pcov: Float[np.ndarray, "n n"] | None
    param_names: tuple[str, ...]
    shapes: dict[str, Shape]
    is_free: np.ndarray
    is_tied: np.ndarray
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
    active: np.ndarray
    absolute_sigma: bool
    loss: str
    f_scale: float
    covariance_kind: str
    history: tuple[IterationRecord, ...] = field(repr=False)
    diagnostics: dict[str, Any] = field(repr=False)
    session: Session | None = field(default=None, repr=False, compare=False)

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # a mapping's would compare arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "session": None}

    def require_session(self, purpose: str) -> Session:
        """The session, or an error that says how to get one."""
        if self.session is None:
            raise SessionError(
                f"{purpose} must read the data again, and this result came from a file or another "
                "process; fit the same data with p0=result.popt in this process first"
            )
        return self.session

    @property
    def fun(self) -> Residuals | None:
        """``y - model`` over all rows, computed when asked for: an array to NumPy.

        None where the data cannot be read again: the result was pickled, or its batches are gone.
        """
        if self.session is None:
            return None
        return Residuals(problem=self.session.problem, params=self.popt)

    # -- parameters

    @property
    def perr(self) -> Float[np.ndarray, " n"] | None:
        """Standard errors; None where there is no `pcov`."""
        return None if self.pcov is None else np.sqrt(np.diag(self.pcov))

    def _require_covariance(self, purpose: str) -> tuple[Vector, Vector]:
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
        pcov, _ = self._require_covariance("`covariance`")
        import xarray as xr

        return xr.DataArray(pcov, coords={"cov_i": names, "cov_j": names}, name="covariance")

    @property
    def correlation(self) -> xr.DataArray:
        """Correlations of the estimates; NaN where a standard error is zero or infinite."""
        pcov, errors = self._require_covariance("`correlation`")
        usable = np.isfinite(errors) & (errors > 0)
        scale = np.where(usable, errors, np.nan)
        return self.covariance.copy(data=pcov / np.outer(scale, scale)).rename("correlation")

    # -- as a mapping

    def __getitem__(self, name: str) -> Any:
        start = 0
        for known, shape in self.shapes.items():
            size = int(np.prod(shape))
            if known == name:
                return self.popt[start : start + size].reshape(shape)
            start += size
        if name in _NLSQ_KEYS:
            return getattr(self, _NLSQ_KEYS[name])
        raise KeyError(f"{name!r} is not a parameter; there are {list(self.shapes)}")

    def __iter__(self) -> Iterator[str]:
        return iter({**_NLSQ_KEYS, **self.shapes})

    def __len__(self) -> int:
        return len({**_NLSQ_KEYS, **self.shapes})

    def _ipython_key_completions_(self) -> list[str]:
        """What IPython offers after ``result["``: parameters first."""
        return list({**self.shapes, **_NLSQ_KEYS})

    @property
    def x(self) -> Float[np.ndarray, " n"]:
        """`popt`, as SciPy's and NLSQ's results call it."""
        return self.popt

    @property
    def streaming_diagnostics(self) -> dict[str, Any]:
        """The course of the fit in NLSQ's words: timings and iterations by phase."""
        return streaming_diagnostics(self.diagnostics, self.history)

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

    # -- how sure

    def confidence_interval(
        self,
        level: float = 0.95,
        method: Literal["asymptotic", "profile"] = "asymptotic",
        params: str | Sequence[str] | None = None,
    ) -> xr.DataArray:
        """Intervals from the standard errors, or from the profile of the cost.

        Parameters
        ----------
        level : float
            Coverage, between 0 and 1.
        method : {"asymptotic", "profile"}
            ``popt ± t perr``: immediate, and right where the model is nearly linear over the
            interval. Or the values at which the cost, minimised over all other parameters, is at
            most ``t² s² / 2`` above its minimum; this takes passes over the data. `t` is the
            quantile of Student's distribution with `dof` degrees of freedom, of the normal one
            for absolute sigma (where s = 1); ``t²`` is that of F(1, `dof`).
        params : str or sequence of str, optional
            Names, of array parameters or of their elements. By default all.

        Returns
        -------
        xarray.DataArray
            Dimensions ``param`` and ``side`` (lower, upper). By profile also a coordinate
            ``status``, what is at each end, and ``attrs["num_passes"]``. An end is at the
            parameter's bound where the profile does not reach the threshold before, and infinite
            where it does not within 100 standard errors. Tied parameters have none (NaN).

        Raises
        ------
        ValueError
            If `level`, `method` or `params` is not as above; by profile, if the data do not
            determine every free parameter, or the loss is robust.
        SessionError
            By profile, if the result came from a file or another process.
        DataError
            By profile, if the data have changed since the fit.

        Warns
        -----
        scipy.optimize.OptimizeWarning
            If an end is infinite, or NaN because the cost is lower on the way than at `popt`.

        Notes
        -----
        A profile takes one pass, and two to four for each end of most problems.

        References
        ----------
        Venzon & Moolgavkar (1988), A method for computing profile-likelihood-based confidence
        intervals, Applied Statistics 37, 87-94.
        """
        if not 0 < level < 1:
            raise ValueError(f"`level` must be between 0 and 1, got {level!r}")
        if method not in ("asymptotic", "profile"):
            raise ValueError(f"`method` must be 'asymptotic' or 'profile', got {method!r}")
        chosen = self._positions(params)
        tail = 0.5 * (1 + level)
        if self.absolute_sigma:
            width = float(scipy.special.ndtri(tail))
        else:
            width = float(scipy.special.stdtrit(self.dof, tail)) if self.dof > 0 else np.inf
        if method == "profile":
            return self._profile_interval(chosen, width)
        errors = self._require_covariance("`confidence_interval`")[1][chosen]
        reach = np.where(errors > 0, errors, 0.0) * (width if np.isfinite(width) else 1.0)
        center = self.popt[chosen]
        return self._interval(chosen, np.stack([center - reach, center + reach], axis=-1))

    def _profile_interval(self, chosen: Sequence[int], width: float) -> xr.DataArray:
        session = self.require_session("A profile")
        if self.loss != "linear":
            raise ValueError(
                "method='profile' must go with loss='linear': the cost of a robust loss is no "
                f"likelihood to hold a threshold against, got loss={self.loss!r}"
            )
        pcov, perr = self._require_covariance("A profile")
        free = np.ix_(self.is_free, self.is_free)
        if not np.isfinite(pcov[free]).all():
            raise ValueError(
                "method='profile' must have every free parameter determined by the data, got the "
                f"standard errors {perr}; fix or remove parameters"
            )
        # Fixed and tied parameters have no profile, and none has where the model fits exactly.
        searched = [i for i in chosen if perr[i] > 0 and self.is_free[i]]
        minimum = Minimum(
            params=self.popt[self.is_free],
            covariance=pcov[free],
            variance=1.0 if self.absolute_sigma else self.reduced_chi2,
            cost=self.cost,
            num_rows=self.num_rows,
        )
        places = [int(self.is_free[:i].sum()) for i in searched]
        found = dict(zip(searched, profile_ends(session, minimum, places, width), strict=True))
        for i, pair in found.items():
            self._warn_of_no_end(i, pair)
        interval = self._interval(
            chosen,
            np.array(
                [
                    [end.value for end in found[i]] if i in found else [self._held_value(i)] * 2
                    for i in chosen
                ]
            ),
        )
        held = {i: "TIED" if self.is_tied[i] else "FIXED" for i in chosen}
        status = [
            [end.status.name for end in found[i]] if i in found else [held[i]] * 2 for i in chosen
        ]
        num_passes = 1 + sum(end.num_passes for pair in found.values() for end in pair)
        return interval.assign_coords(status=(("param", "side"), status)).assign_attrs(
            num_passes=num_passes
        )

    def _held_value(self, index: int) -> float:
        """Both ends of the interval of a parameter that no profile goes along."""
        return np.nan if self.is_tied[index] else float(self.popt[index])

    def _warn_of_no_end(self, index: int, pair: tuple[EndPoint, EndPoint]) -> None:
        for side, end in zip(("lower", "upper"), pair, strict=True):
            if not np.isfinite(end.value):
                warnings.warn(
                    f"{side} end for {self.param_names[index]!r}: {end.status.value}"
                    f" (last at {end.params})",
                    scipy.optimize.OptimizeWarning,
                    stacklevel=4,
                )

    def _positions(self, params: str | Sequence[str] | None) -> list[int]:
        """Places in `popt` of the parameters named."""
        if params is None:
            return list(range(len(self.popt)))
        places = []
        for name in [params] if isinstance(params, str) else params:
            labels = enumerate(self.param_names)
            found = [i for i, label in labels if name in (label, label.partition("[")[0])]
            if not found:
                raise ValueError(f"`params` must be among {list(self.param_names)}, got {name!r}")
            places += found
        return places

    def _interval(self, chosen: Sequence[int], ends: Float[np.ndarray, "p 2"]) -> xr.DataArray:
        names = [self.param_names[i] for i in chosen]
        import xarray as xr

        return xr.DataArray(
            ends,
            coords={"param": names, "side": ["lower", "upper"]},
            name="confidence_interval",
        )

    # -- text

    def summary(self) -> str:
        """A report in plain text."""
        lines = [
            self.message if self.success else f"NOT CONVERGED. {self.message}",
            "",
            *self._facts(),
            "",
            *self._table(),
        ]
        warnings = self.diagnostics.get("warnings", ())
        if warnings:
            lines += ["", *(f"Warning: {text}" for text in warnings)]
        notes = self.diagnostics.get("notes", ())
        if notes:
            lines += ["", *(f"Note: {text}." for text in notes)]
        return "\n".join(lines)

    def _facts(self) -> list[str]:
        facts = {
            "rows": f"{self.num_rows:,} ({self.num_masked:,} left out)",
            "passes over the data": f"{self.num_passes}",
            "read": f"{self.bytes_read / 1e6:,.1f} MB",
            "chi-square, reduced": f"{self.chi2:.6g}, {self.reduced_chi2:.6g}",
            "R-squared": f"{self.r_squared:.6g}",
            "condition number": f"{self.condition_number:.3g}",
            "where": str(self.diagnostics.get("evaluator", "")),
        }
        seconds = self.diagnostics.get("seconds", {})
        if seconds:
            compiling = f", {seconds['compiling']:.1f} s of them compiling here"
            facts["time"] = f"{seconds['total']:.1f} s{compiling}"
        return [f"  {name:<22}{value}" for name, value in facts.items()]

    def _table(self) -> list[str]:
        names = self.param_names[:_MAX_TABLE_ROWS]
        width = max(9, *(len(name) for name in names))
        rows = [f"  {'parameter':<{width}}  {'value':>16}  {'std. error':>12}"]
        errors = np.full(len(self.popt), np.nan) if self.perr is None else self.perr
        columns = (self.popt, errors, self.is_free, self.is_tied, self.active)
        for name, value, error, free, tied, held in zip(names, *columns, strict=False):
            note = "  (at bound)" if held else "  (tied)" if tied else ""
            note = note if free or tied else "  (fixed)"
            spread = f"{error:12.4g}" if (free or tied) and self.perr is not None else ""
            rows.append(f"  {name:<{width}}  {value:16.9g}  {spread:>12}{note}")
        if len(self.popt) > len(names):
            rows.append(f"  and {len(self.popt) - len(names):,} more, in `popt`")
        return rows

    def __repr__(self) -> str:
        pairs = list(zip(self.param_names, self.popt, strict=True))
        values = ", ".join(f"{name}={value:.6g}" for name, value in pairs[:_MAX_REPR_VALUES])
        more = ", …" if len(pairs) > _MAX_REPR_VALUES else ""
        return f"<FitResult {self.status.name}: {values}{more}; {self.num_rows:,} rows>"

    def __str__(self) -> str:
        return self.summary()
