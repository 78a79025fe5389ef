"""Confidence intervals of the parameters: by their standard errors, or by profiles of the cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy

from nlsq_dask._typing import Float
from nlsq_dask.results.outcome import Outcome
from nlsq_dask.results.profile import EndPoint, Minimum, profile_ends
from nlsq_dask.warn import warn_user

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["confidence_interval", "width_in_errors"]


def width_in_errors(fit: Outcome, level: float) -> float:
    """Half the width of an interval, in standard errors.

    The quantile of Student's distribution with `dof` degrees of freedom, or one less than there
    are clusters (Cameron & Miller 2015, sec. VI); of the normal one where sigma is absolute.
    Infinite without degrees of freedom.

    Raises
    ------
    ValueError
        If `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level!r}")
    tail = 0.5 * (1 + level)
    if fit.num_clusters:
        return float(scipy.special.stdtrit(fit.num_clusters - 1, tail))
    if fit.absolute_sigma:
        return float(scipy.special.ndtri(tail))
    return float(scipy.special.stdtrit(fit.dof, tail)) if fit.dof > 0 else np.inf


def confidence_interval(
    fit: Outcome, level: float, method: str, params: str | Sequence[str] | None
) -> xr.DataArray:
    """What `FitResult.confidence_interval` documents."""
    width = width_in_errors(fit, level)
    if method not in ("asymptotic", "profile"):
        raise ValueError(f"`method` must be 'asymptotic' or 'profile', got {method!r}")
    chosen = _positions(fit, params)
    if method == "profile":
        return _profile_interval(fit, chosen, width)
    errors = fit.require_covariance("`confidence_interval`")[1][chosen]
    reach = np.where(errors > 0, errors, 0.0) * (width if np.isfinite(width) else 1.0)
    center = fit.popt[chosen]
    return _interval(fit, chosen, np.stack([center - reach, center + reach], axis=-1))


def _profile_interval(fit: Outcome, chosen: Sequence[int], width: float) -> xr.DataArray:
    session = fit.require_session("A profile")
    if fit.loss != "linear":
        raise ValueError(
            "method='profile' must go with loss='linear': the cost of a robust loss is no "
            f"likelihood to hold a threshold against, got loss={fit.loss!r}"
        )
    if fit.covariance_kind != "classical":
        raise ValueError(
            "method='profile' must go with the classical covariance: the cost takes all rows for "
            f"independent and their sigma for right, got covariance={fit.covariance_kind!r}"
        )
    pcov, perr = fit.require_covariance("A profile")
    free = np.ix_(fit.is_free, fit.is_free)
    if not np.isfinite(pcov[free]).all():
        raise ValueError(
            "method='profile' must have every free parameter determined by the data, got the "
            f"standard errors {perr}; fix or remove parameters"
        )
    # Fixed and tied parameters have no profile, and none has where the model fits exactly.
    searched = [i for i in chosen if perr[i] > 0 and fit.is_free[i]]
    minimum = Minimum(
        params=fit.popt[fit.is_free],
        covariance=pcov[free],
        variance=1.0 if fit.absolute_sigma else fit.reduced_chi2,
        cost=fit.cost,
        num_rows=fit.num_rows,
    )
    places = [int(fit.is_free[:i].sum()) for i in searched]
    found = dict(zip(searched, profile_ends(session, minimum, places, width), strict=True))
    for i, pair in found.items():
        _warn_of_no_end(fit, i, pair)
    interval = _interval(
        fit,
        chosen,
        np.array(
            [
                [end.value for end in found[i]] if i in found else [_held_value(fit, i)] * 2
                for i in chosen
            ]
        ),
    )
    held = {i: "TIED" if fit.is_tied[i] else "FIXED" for i in chosen}
    status = [
        [end.status.name for end in found[i]] if i in found else [held[i]] * 2 for i in chosen
    ]
    num_passes = 1 + sum(end.num_passes for pair in found.values() for end in pair)
    return interval.assign_coords(status=(("param", "side"), status)).assign_attrs(
        num_passes=num_passes
    )


def _held_value(fit: Outcome, index: int) -> float:
    """Both ends of the interval of a parameter that no profile goes along."""
    return np.nan if fit.is_tied[index] else float(fit.popt[index])


def _warn_of_no_end(fit: Outcome, index: int, pair: tuple[EndPoint, EndPoint]) -> None:
    for side, end in zip(("lower", "upper"), pair, strict=True):
        if not np.isfinite(end.value):
            warn_user(
                f"{side} end for {fit.param_names[index]!r}: {end.status.value}"
                f" (last at {end.params})",
                scipy.optimize.OptimizeWarning,
            )


def _positions(fit: Outcome, params: str | Sequence[str] | None) -> list[int]:
    """Places in `popt` of the parameters named."""
    if params is None:
        return list(range(len(fit.popt)))
    places = []
    for name in [params] if isinstance(params, str) else params:
        labels = enumerate(fit.param_names)
        found = [i for i, label in labels if name in (label, label.partition("[")[0])]
        if not found:
            raise ValueError(f"`params` must be among {list(fit.param_names)}, got {name!r}")
        places += found
    return places


def _interval(fit: Outcome, chosen: Sequence[int], ends: Float[np.ndarray, "p 2"]) -> xr.DataArray:
    names = [fit.param_names[i] for i in chosen]
    import xarray as xr

    return xr.DataArray(
        ends,
        coords={"param": names, "side": ["lower", "upper"]},
        name="confidence_interval",
    )
