"""A fit as HTML for notebooks: tables and a small picture, without scripts, ids or data reads.

Names come from users and from files of strangers: whatever is not a number goes through `_text`.
Colours are those of the page, with two more that can be told from light and dark alike.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from nlsq_dask.results.convergence_svg import convergence_svg
from nlsq_dask.results.outcome import Outcome
from nlsq_dask.results.summary import (
    call_of,
    covariance_text,
    strongest_correlations,
    times_text,
)

__all__ = ["to_html"]

_MAX_PARAMETERS = 40
_MAX_MATRIX = 12
_MAX_PAIRS = 12
_MAX_TRIALS = 12

_STYLE = """
.nlsq-fit{color:inherit;line-height:1.4;max-width:60em;
 --nlsq-line:color-mix(in srgb,currentColor 22%,transparent);font-variant-numeric:tabular-nums}
.nlsq-fit .nlsq-muted{opacity:.7}
.nlsq-fit .nlsq-call{font-family:var(--jp-code-font-family,ui-monospace,monospace);
 overflow-wrap:anywhere}
.nlsq-fit .nlsq-said{border-left:3px solid var(--nlsq-line);padding-left:.6em;margin:.4em 0}
.nlsq-fit .nlsq-bad{border-color:#d9822b}
.nlsq-fit .nlsq-good{border-color:#3b82c4}
.nlsq-fit .nlsq-parts{display:flex;flex-wrap:wrap;gap:0 2.5em;align-items:flex-start}
.nlsq-fit .nlsq-part{overflow-x:auto;max-width:100%}
.nlsq-fit .nlsq-title{font-weight:600;margin:.9em 0 .3em}
.nlsq-fit table.nlsq-table{border-collapse:collapse;margin:0;font-size:inherit;border:0}
.nlsq-fit table.nlsq-table tr,.nlsq-fit table.nlsq-table tbody tr:nth-child(odd){background:none}
.nlsq-fit table.nlsq-table th,.nlsq-fit table.nlsq-table td{padding:.15em .7em;border:0;
 border-bottom:1px solid var(--nlsq-line);text-align:right;white-space:nowrap;max-width:24em;
 overflow:hidden;text-overflow:ellipsis}
.nlsq-fit table.nlsq-table .nlsq-name{text-align:left;font-weight:600;padding-left:0}
.nlsq-fit table.nlsq-table .nlsq-left{text-align:left}
.nlsq-fit table.nlsq-matrix td{text-align:center;border:1px solid var(--nlsq-line)}
.nlsq-fit svg{width:420px;max-width:100%;height:auto;display:block}
.nlsq-fit summary{cursor:pointer;margin:.6em 0}
.nlsq-fit pre{overflow-x:auto;margin:0}
"""


def to_html(fit: Outcome) -> str:
    """What a notebook shows of a `FitResult`."""
    parts = [
        f"<style>{_STYLE}</style>",
        *_head(fit),
        '<div class="nlsq-parts">',
        _part("Parameters", _parameters(fit)),
        "</div>",
        '<div class="nlsq-parts">',
        _part("Fit", _facts(fit)),
        '<div class="nlsq-part">',
        _part("Correlations", _correlations(fit)),
        _part("Distance to the minimum, in standard errors", convergence_svg(fit.history)),
        "</div></div>",
        _details("Passes over the data", _trials(fit)),
    ]
    source = fit.provenance.model_source
    if source:
        parts.append(_details("Model source", f"<pre>{_text(source)}</pre>"))
    return f'<div class="nlsq-fit">{"".join(parts)}</div>'


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _head(fit: Outcome) -> Iterator[str]:
    yield f'<div class="nlsq-call">{_text(call_of(fit))}</div>'
    for line in times_text(fit):
        yield f'<div class="nlsq-said nlsq-muted">{_text(line)}</div>'
    verdict = fit.message if fit.success else f"NOT CONVERGED. {fit.message}"
    yield f'<div class="nlsq-said nlsq-{"good" if fit.success else "bad"}">{_text(verdict)}</div>'
    for text in fit.diagnostics.get("warnings", ()):
        yield f'<div class="nlsq-said nlsq-bad">Warning: {_text(text)}</div>'
    for text in fit.diagnostics.get("notes", ()):
        yield f'<div class="nlsq-said">Note: {_text(text)}.</div>'


def _part(title: str, body: str) -> str:
    if not body:
        return ""
    return f'<div class="nlsq-part"><div class="nlsq-title">{title}</div>{body}</div>'


def _details(title: str, body: str) -> str:
    return f'<details><summary>{title}</summary><div class="nlsq-part">{body}</div></details>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; the first of a row is its name."""
    cells = "".join(f"<th>{cell}</th>" for cell in head[1:])
    top = f'<thead><tr><th class="nlsq-name">{head[0]}</th>{cells}</tr></thead>' if head else ""
    body = "".join(
        f'<tr><th class="nlsq-name">{name}</th>{"".join(rest)}</tr>' for name, *rest in rows
    )
    return f'<table class="nlsq-table {kind}">{top}<tbody>{body}</tbody></table>'


def _cell(text: object, attributes: str = "") -> str:
    return f"<td{attributes}>{_text(text)}</td>"


def _more(number: int, where: str) -> str:
    return f'<div class="nlsq-muted">and {number:,} more, in {where}</div>' if number > 0 else ""


# -- what was found


def _parameters(fit: Outcome) -> str:
    head = ["", "value", "std. error", "", "start", "bounds", "units", ""]
    shown = range(min(len(fit.popt), _MAX_PARAMETERS))
    rows = [_parameter(fit, i) for i in shown]
    # A column in which there is nothing is none.
    used = [j for j in range(len(head)) if j < 2 or any(row[j] for row in rows)]
    body = [[_text(row[0]), *(_cell(row[j]) for j in used[1:])] for row in rows]
    table = _table([head[j] for j in used], body)
    return table + _more(len(fit.popt) - len(shown), "<code>popt</code>")


def _parameter(fit: Outcome, i: int) -> list[str]:
    """Name, value, error, its share, start, bounds, units and what holds it, as text."""
    name, value, moves = fit.param_names[i], float(fit.popt[i]), fit.is_free[i] | fit.is_tied[i]
    error = np.sqrt(fit.pcov[i, i]) if fit.pcov is not None and moves else np.nan
    is_bounded = np.isfinite(fit.lower[i]) or np.isfinite(fit.upper[i])
    notes = {
        "fixed": not moves,
        "tied": fit.is_tied[i],
        "at bound": fit.active[i],
        "not determined": np.isinf(error),
    }
    return [
        name,
        f"{value:.8g}",
        "" if np.isnan(error) else f"± {error:.3g}".replace("inf", "∞"),
        f"{abs(error / value):.2%}" if np.isfinite(error) and value else "",
        f"{fit.p0[i]:.6g}" if fit.is_free[i] else "",
        f"{fit.lower[i]:.6g} … {fit.upper[i]:.6g}".replace("inf", "∞") if is_bounded else "",
        fit.provenance.units.get(name.partition("[")[0], ""),
        ", ".join(note for note, holds in notes.items() if holds),
    ]


def _facts(fit: Outcome) -> str:
    seconds = fit.diagnostics.get("seconds", {}).get("total")
    facts = {
        "rows": f"{fit.num_rows:,}",
        "left out": f"{fit.num_masked:,}",
        "chi-square": f"{fit.chi2:.7g}",
        "reduced": f"{fit.reduced_chi2:.7g}",
        "R-squared": f"{fit.r_squared:.7g}",
        "AIC": f"{fit.aic:.7g}",
        "BIC": f"{fit.bic:.7g}",
        "loss": fit.loss,
        "covariance": covariance_text(fit),
        "condition": f"{fit.condition_number:.3g}",
        "passes": f"{fit.num_passes}",
        "read": f"{fit.bytes_read / 1e6:,.1f} MB",
        "time": "" if seconds is None else f"{seconds:.1f} s",
        "where": fit.diagnostics.get("evaluator", ""),
    }
    rows = ([name, _cell(text, ' class="nlsq-left"')] for name, text in facts.items() if text != "")
    return _table([], rows)


def _correlations(fit: Outcome) -> str:
    """A shaded matrix, or the strongest pairs where there are many parameters."""
    if fit.pcov is None:
        return ""
    values = fit.correlation.values
    kept = np.flatnonzero(np.isfinite(np.diag(values)))
    if len(kept) < 2:
        return ""
    names = [_text(fit.param_names[i]) for i in kept]
    values = values[np.ix_(kept, kept)]
    if len(kept) <= _MAX_MATRIX:
        rows = ([name, *map(_shaded, row)] for name, row in zip(names, values, strict=True))
        return _table(["", *names], rows, "nlsq-matrix")
    pairs = strongest_correlations(values, 0.0)[:_MAX_PAIRS]
    rows = ([f"{names[i]}, {names[j]}", _shaded(values[i, j])] for i, j in pairs)
    return _table([], rows, "nlsq-matrix")


def _shaded(value: float) -> str:
    colour = "59,130,196" if value >= 0 else "217,130,43"
    share = min(abs(value), 1.0) * 0.6
    return _cell(f"{round(value, 2) + 0.0:+.2f}", f' style="background:rgba({colour},{share:.3f})"')


def _trials(fit: Outcome) -> str:
    head = ["pass", "cost", "to go, std. errors", "step", "gain", "rows/s"]
    records = [record for record in fit.history if record.phase == 2]
    rows = (
        [
            str(record.num_passes),
            _cell(f"{record.cost:.9g}"),
            _cell(f"{record.distance:.1e}"),
            _cell("products" if record.is_product else "taken" if record.accepted else "rejected"),
            _cell("" if np.isnan(record.gain) else f"{record.gain:.3f}"),
            _cell(f"{record.rows_per_second:,.0f}"),
        ]
        for record in records[-_MAX_TRIALS:]
    )
    return _table(head, rows) + _more(len(records) - _MAX_TRIALS, "<code>history</code>")
