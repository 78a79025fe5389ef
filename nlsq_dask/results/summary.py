"""A fit as a report in plain text."""

from __future__ import annotations

import numpy as np

from nlsq_dask.results.outcome import Outcome

__all__ = ["summarise"]

_MAX_TABLE_ROWS = 100


def summarise(fit: Outcome) -> str:
    """What `FitResult.summary` returns."""
    lines = [
        fit.message if fit.success else f"NOT CONVERGED. {fit.message}",
        "",
        *_facts(fit),
        "",
        *_table(fit),
    ]
    warnings = fit.diagnostics.get("warnings", ())
    if warnings:
        lines += ["", *(f"Warning: {text}" for text in warnings)]
    notes = fit.diagnostics.get("notes", ())
    if notes:
        lines += ["", *(f"Note: {text}." for text in notes)]
    return "\n".join(lines)


def _facts(fit: Outcome) -> list[str]:
    facts = {
        "rows": f"{fit.num_rows:,} ({fit.num_masked:,} left out)",
        "passes over the data": f"{fit.num_passes}",
        "read": f"{fit.bytes_read / 1e6:,.1f} MB",
        "chi-square, reduced": f"{fit.chi2:.6g}, {fit.reduced_chi2:.6g}",
        "R-squared": f"{fit.r_squared:.6g}",
        "condition number": f"{fit.condition_number:.3g}",
        "where": str(fit.diagnostics.get("evaluator", "")),
    }
    seconds = fit.diagnostics.get("seconds", {})
    if seconds:
        compiling = f", {seconds['compiling']:.1f} s of them compiling here"
        facts["time"] = f"{seconds['total']:.1f} s{compiling}"
    return [f"  {name:<22}{value}" for name, value in facts.items()]


def _table(fit: Outcome) -> list[str]:
    names = fit.param_names[:_MAX_TABLE_ROWS]
    width = max(9, *(len(name) for name in names))
    rows = [f"  {'parameter':<{width}}  {'value':>16}  {'std. error':>12}"]
    errors = np.full(len(fit.popt), np.nan) if fit.perr is None else fit.perr
    columns = (fit.popt, errors, fit.is_free, fit.is_tied, fit.active)
    for name, value, error, free, tied, held in zip(names, *columns, strict=False):
        note = "  (at bound)" if held else "  (tied)" if tied else ""
        note = note if free or tied else "  (fixed)"
        spread = f"{error:12.4g}" if (free or tied) and fit.perr is not None else ""
        rows.append(f"  {name:<{width}}  {value:16.9g}  {spread:>12}{note}")
    if len(fit.popt) > len(names):
        rows.append(f"  and {len(fit.popt) - len(names):,} more, in `popt`")
    return rows
