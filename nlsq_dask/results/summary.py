"""A fit as a report in plain text, in the layout of lmfit's ``fit_report``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.results.outcome import Outcome

__all__ = ["call_of", "covariance_text", "strongest_correlations", "summarise", "times_text"]

_MAX_PARAMETERS = 100
_MAX_CORRELATIONS = 20
_MIN_CORRELATION = 0.1


def summarise(fit: Outcome) -> str:
    """What `FitResult.summary` returns."""
    warnings = fit.diagnostics.get("warnings", ())
    notes = fit.diagnostics.get("notes", ())
    return "\n".join(
        [
            fit.message if fit.success else f"NOT CONVERGED. {fit.message}",
            "[[Model]]",
            f"    {call_of(fit)}",
            *(f"    {line}" for line in times_text(fit)),
            "[[Fit Statistics]]",
            *(f"    {name:<18} = {value}" for name, value in _statistics(fit).items()),
            "[[Variables]]",
            *_variables(fit),
            *_correlations(fit),
            *(f"Warning: {text}" for text in warnings),
            *(f"Note: {text}." for text in notes),
        ]
    )


def call_of(fit: Outcome) -> str:
    """The model with its arguments, and what it was fitted to."""
    data = fit.provenance.data
    name = fit.provenance.model.rpartition(".")[2] or "model"
    variables = ", ".join(variable.name for variable in data.x)
    to = f" to {data.y.name} of {data.description}" if data.description else ""
    return f"{name}({variables}; {', '.join(fit.shapes)}){to}"


def times_text(fit: Outcome) -> list[str]:
    """As which numbers the model was given times."""
    return [
        f"{variable.name} in {variable.time_units}"
        for variable in fit.provenance.data.x
        if variable.time_units is not None
    ]


def covariance_text(fit: Outcome) -> str:
    """What standard errors are of."""
    if fit.pcov is None:
        return "none, too many parameters"
    if fit.num_clusters:
        return f"clustered sandwich, {fit.num_clusters:,} clusters"
    if fit.covariance_kind != "classical":
        return f"{fit.covariance_kind} sandwich"
    scaled = "unscaled, sigma is absolute" if fit.absolute_sigma else "scaled by reduced chi-square"
    return f"classical, {scaled}"


def _statistics(fit: Outcome) -> dict[str, str]:
    num_free = int(fit.is_free.sum())
    loss = fit.loss if fit.loss == "linear" else f"{fit.loss}, f_scale = {fit.f_scale:.6g}"
    rank = "not known" if np.isnan(fit.rank) else f"{fit.rank:.0f} of {num_free:,}"
    condition = "not known" if np.isnan(fit.condition_number) else f"{fit.condition_number:.3g}"
    facts = {
        "# loss": loss,
        "# passes over data": f"{fit.num_passes} ({fit.bytes_read / 1e6:,.1f} MB read)",
        "# data points": f"{fit.num_rows:,} rows ({fit.num_masked:,} left out)",
        "# variables": f"{num_free:,}",
        "chi-square": f"{fit.chi2:.8g}",
        "reduced chi-square": f"{fit.reduced_chi2:.8g}",
        "Akaike info crit": f"{fit.aic:.8g}",
        "Bayesian info crit": f"{fit.bic:.8g}",
        "R-squared": f"{fit.r_squared:.8g}",
        "covariance": covariance_text(fit),
        "rank": rank,
        "condition number": condition,
        "where": str(fit.diagnostics.get("evaluator", "")),
    }
    seconds = fit.diagnostics.get("seconds", {})
    if seconds:
        compiling = f", {seconds['compiling']:.1f} s of them compiling here"
        facts["time"] = f"{seconds['total']:.1f} s{compiling}"
    return facts


def _variables(fit: Outcome) -> Iterator[str]:
    shown = fit.param_names[:_MAX_PARAMETERS]
    width = max(len(name) for name in shown) + 1
    for i, name in enumerate(shown):
        units = fit.provenance.units.get(name.partition("[")[0], "")
        label = f" [{units}]" if units not in ("", "1") else ""
        yield f"    {name + ':':<{width}} {_estimate(fit, i)}{label}"
    if len(fit.param_names) > len(shown):
        yield f"    and {len(fit.param_names) - len(shown):,} more, in `popt`"


def _estimate(fit: Outcome, i: int) -> str:
    """Value, error, start and bounds of a parameter."""
    value = float(fit.popt[i])
    text = f"{value: .8g}"
    if not (fit.is_free[i] or fit.is_tied[i]):
        return f"{text} (fixed)"
    if fit.pcov is not None:
        error = float(np.sqrt(fit.pcov[i, i]))
        text += f" +/- {error:.4g}"
        if np.isfinite(error) and value:
            text += f" ({abs(error / value):.2%})"
    if fit.is_tied[i]:
        return f"{text} (tied)"
    text += f" (init = {fit.p0[i]:.6g})"
    if np.isfinite(fit.lower[i]) or np.isfinite(fit.upper[i]):
        text += f" (bounds = {fit.lower[i]:.6g}, {fit.upper[i]:.6g})"
    return f"{text} (at bound)" if fit.active[i] else text


def strongest_correlations(
    correlation: Float[np.ndarray, "n n"], least: float
) -> list[tuple[int, int]]:
    """Pairs of parameters whose correlation is at least so strong, the strongest first."""
    i, j = np.triu_indices(len(correlation), 1)
    strength = np.nan_to_num(np.abs(correlation[i, j]))
    order = np.argsort(-strength, kind="stable")
    order = order[strength[order] >= least]
    return list(zip(i[order].tolist(), j[order].tolist(), strict=True))


def _correlations(fit: Outcome) -> Iterator[str]:
    if fit.pcov is None:
        return
    values = fit.correlation.values.copy()
    values[fit.is_tied], values[:, fit.is_tied] = np.nan, np.nan  # as its tie has it
    pairs = strongest_correlations(values, _MIN_CORRELATION)
    if not pairs:
        return
    yield f"[[Correlations]] (unreported correlations are < {_MIN_CORRELATION:.3f})"
    names = {pair: "C({}, {})".format(*(fit.param_names[i] for i in pair)) for pair in pairs}
    shown = pairs[:_MAX_CORRELATIONS]
    width = max(len(names[pair]) for pair in shown)
    for pair in shown:
        yield f"    {names[pair]:<{width}} = {values[pair]:+.4f}"
    if len(pairs) > len(shown):
        yield f"    and {len(pairs) - len(shown):,} more, in `correlation`"
