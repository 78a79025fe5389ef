"""A fit as a figure: data and model, residuals, their means over all data, convergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nlsq_dask.results.outcome import Outcome
from nlsq_dask.results.prediction import require_model
from nlsq_dask.results.sampled import SampledRows, sample_rows
from nlsq_dask.results.summary import call_of
from nlsq_dask.sources.origin import VariableRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["plot"]

_MOST_AS_DOTS = 3_000
_MAX_BINS = 60
_DATA, _MODEL = "#3b82c4", "#d9822b"


def plot(fit: Outcome, figure: Figure | SubFigure | None) -> np.ndarray:
    """What `FitResult.plot` documents."""
    num_rows = 1 if fit.session is None else 2
    drawn: Figure | SubFigure = _new_figure(3.5 * num_rows) if figure is None else figure
    grid = drawn.subplots(num_rows, 2, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    if fit.session is not None:
        seed = fit.diagnostics["config"]["seed"]
        rows = sample_rows(fit, fit.session, require_model(fit), seed)
        _draw_data(fit, rows, axes[0])
        _draw_residuals(fit, rows, axes[1])
    _draw_chunks(fit, axes[-2])
    _draw_convergence(fit, axes[-1])
    drawn.suptitle(_plain(_short(call_of(fit))), fontsize="medium")
    # Not the figure: a notebook would draw it twice, as an open one and as the cell's value.
    return grid


def _new_figure(height: float) -> Figure:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "`plot` needs matplotlib, which is not installed; pip install 'nlsq-dask[plot]'"
        ) from error
    return plt.figure(figsize=(10, height), layout="constrained")


def _short(text: str, longest: int = 100) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _label(record: VariableRecord) -> str:
    units = record.time_units or record.units
    return _plain(f"{record.name} ({units})" if units not in ("", "1") else record.name)


def _plain(text: str) -> str:
    """Without what matplotlib would take for mathematics."""
    return text.replace("$", r"\$")


def _of(rows: SampledRows) -> str:
    every = f"{rows.num_rows:,}"
    return f"all {every} rows" if rows.is_everything else f"{len(rows.y):,} of {every} rows"


def _draw_data(fit: Outcome, rows: SampledRows, ax: Axes) -> None:
    """Over the variable where there is one; else what was observed over what is predicted."""
    data = fit.provenance.data
    if len(rows.x) == 1:
        order = np.argsort(rows.x[0], kind="stable")
        _cloud(ax, rows.x[0], rows.y)
        ax.plot(rows.x[0][order], rows.value[order], color=_MODEL, lw=1.5, label="model")
        ax.set(xlabel=_label(data.x[0]), ylabel=_label(data.y))
    else:
        _cloud(ax, rows.value, rows.y)
        ends = np.array([rows.value.min(), rows.value.max()])
        ax.plot(ends, ends, color=_MODEL, lw=1.5, label="observed = model")
        ax.set(xlabel=f"model of {_label(data.y)}", ylabel=_label(data.y))
    ax.set_title(f"Data and model, {_of(rows)}", fontsize="medium")
    ax.legend(fontsize="small")


def _cloud(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Dots, or how many there are where dots would hide each other."""
    if len(y) <= _MOST_AS_DOTS:
        ax.plot(x, y, ".", ms=3, color=_DATA, alpha=0.6, label="data")
        return
    cells = ax.hexbin(x, y, gridsize=60, bins="log", mincnt=1, cmap="Blues", linewidths=0.1)
    ax.figure.colorbar(cells, ax=ax, label="rows")


def _draw_residuals(fit: Outcome, rows: SampledRows, ax: Axes) -> None:
    """Their histogram, beside a normal distribution as wide."""
    ax.set(xlabel=f"{_label(fit.provenance.data.y)}: data - model", ylabel="density")
    ax.set_title(f"Residuals, {_of(rows)}", fontsize="medium")
    residuals = rows.y - rows.value
    residuals = residuals[np.isfinite(residuals)]  # none where a fit failed
    if not residuals.size:
        return
    center, width = float(residuals.mean()), float(residuals.std())
    bins = min(len(np.histogram_bin_edges(residuals, "auto")) - 1, _MAX_BINS)
    ax.hist(residuals, bins=bins, density=True, color=_DATA)
    if width > 0:
        at = np.linspace(center - 4 * width, center + 4 * width, 200)
        density = np.exp(-0.5 * ((at - center) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        ax.plot(at, density, color=_MODEL, lw=1.5, label=f"normal, s = {width:.3g}")
        ax.legend(fontsize="small")


def _draw_chunks(fit: Outcome, ax: Axes) -> None:
    """Means with standard errors by chunk, which the passes have collected over all rows."""
    chunks: dict[str, Any] = fit.diagnostics["chunks"]
    mean, count = np.asarray(chunks["residual_mean"]), np.asarray(chunks["num_rows"])
    variance = np.asarray(chunks["residual_variance"])
    error = np.sqrt(np.maximum(variance, 0.0) / np.maximum(count, 1))
    place = (np.arange(len(mean)) + 0.5) * chunks["leaves_per_bin"]
    ax.axhline(0.0, color=_MODEL, lw=1.5)
    ax.errorbar(place, -mean, error, fmt=".", ms=4, lw=0.8, color=_DATA)
    what = "chunk" if chunks["leaves_per_bin"] == 1 else f"{chunks['leaves_per_bin']} chunks"
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="chunk", ylabel="(data - model) / sigma")
    ax.set_xlim(0, len(mean) * chunks["leaves_per_bin"])
    ax.set_title(f"Mean residual by {what}, all {fit.num_rows:,} rows", fontsize="medium")


def _draw_convergence(fit: Outcome, ax: Axes) -> None:
    records = [record for record in fit.history if record.phase == 2]
    passes = np.array([record.num_passes for record in records])
    distance = np.array([record.distance for record in records])
    accepted = np.array([record.accepted for record in records], bool)
    seen = np.isfinite(distance) & (distance > 0)
    ax.plot(passes[seen], distance[seen], "-", color=_DATA, lw=1)
    for marks, name, fill in ((accepted, "taken", _DATA), (~accepted, "rejected", "none")):
        if (seen & marks).any():
            at = (passes[seen & marks], distance[seen & marks])
            ax.plot(*at, "o", color=_DATA, mfc=fill, label=name)
    limit = fit.diagnostics["config"]["distance_tol"]
    ax.axhline(limit, color=_MODEL, ls="--", lw=1, label="limit")
    ax.set_yscale("log")
    ax.set_xlim(0.5, max(passes, default=1) + 0.5)
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="pass over the data", ylabel="distance to the minimum (std. errors)")
    ax.set_title(f"Convergence: {fit.status.name}", fontsize="medium")
    ax.legend(fontsize="small")
