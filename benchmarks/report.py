"""The table and the plot of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import PROBLEMS

__all__ = ["claims", "markdown", "plot"]

_Run = Mapping[str, Any]
_RIGHT = 0.1  # standard errors from the minimum: a fit further off is no answer to compare with
_FAMILY_COLOURS = {
    "SciPy": "#4477aa",
    "lmfit": "#66a6c8",
    "xarray": "#8c8c8c",
    "NLSQ": "#cc6677",
    "nlsq_dask": "#117733",
}
_DASHES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D")
_GIB = 2**30


def markdown(results: Mapping[str, Any]) -> str:
    """What was measured and on what, a table for each problem, and the ratios."""
    machine, runs = results["machine"], results["runs"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB; "
        f"Python {machine['python']}, {versions}.",
        "",
        "Seconds include compilation, not imports. Peak is the resident size of all processes "
        "together while fitting, base what they held before, with the data loaded. Distances "
        "are in standard errors, the worst parameter. Ratios are to the fastest way of a package "
        f"that came within {_RIGHT} standard errors of the minimum.",
    ]
    for name in dict.fromkeys(run["problem"] for run in runs):
        lines += [
            "",
            f"## {PROBLEMS[name].title}",
            "",
            *_table([r for r in runs if r["problem"] == name]),
        ]
    return "\n".join([*lines, "", "## Ratios", "", *claims(runs), ""])


def _table(runs: Iterable[_Run]) -> list[str]:
    columns = (
        *("rows", "package", "seconds", "import s", "base MiB", "peak MiB"),
        *("from minimum", "from truth", "passes"),
    )
    lines = ["| " + " | ".join(columns) + " |", "|---:|---|" + "---:|" * (len(columns) - 2)]
    for run in runs:
        head = [f"{run['rows']:,}", run["peer"]]
        if run["status"] == "done":
            cells = [
                f"{run['seconds']:.2f}",
                f"{run['import_seconds']:.1f}",
                _mebibytes(run["base_bytes"]),
                _mebibytes(run["peak_bytes"]),
                f"{run['from_minimum']:.1e}",
                f"{run['from_truth']:.1f}",
                str(run["num_passes"] or ""),
            ]
        else:
            cells = [run["status"].replace("|", "/"), "", _mebibytes(run["base_bytes"])]
            cells += [_mebibytes(run["peak_bytes"]), "", "", ""]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return lines


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def claims(runs: Sequence[_Run]) -> list[str]:
    """How much longer others take than this package, and what memory it takes."""
    lines = []
    for problem, rows in dict.fromkeys((run["problem"], run["rows"]) for run in runs):
        here = [run for run in runs if (run["problem"], run["rows"]) == (problem, rows)]
        for own in (run for run in here if run["family"] == "nlsq_dask"):
            if own["status"] != "done":
                continue
            ratios = [
                _ratio(family, [run for run in here if run["family"] == family], own["seconds"])
                for family in dict.fromkeys(run["family"] for run in here)
                if family != "nlsq_dask"
            ]
            peak = own["peak_bytes"] / _GIB
            lines.append(
                f"- {problem}, {rows:,} rows, {own['peer']}: {own['seconds']:.2f} s, peak "
                f"{peak:.2f} GiB; times as long: {', '.join(ratios) or 'no other was run'}"
            )
    return [*lines, *_growth(runs)]


def _ratio(family: str, runs: Sequence[_Run], seconds: float) -> str:
    """Of the fastest way of a package that came to the minimum."""
    right = [r for r in runs if r["status"] == "done" and r["from_minimum"] < _RIGHT]
    if not right:
        return f"{family} none within {_RIGHT} standard errors"
    best = min(right, key=lambda run: run["seconds"])
    return f"{family} {best['seconds'] / seconds:.2g} ({best['peer']})"


def _growth(runs: Sequence[_Run]) -> list[str]:
    """Peak memory from size to size, where chunks are not cached."""
    lines = []
    for problem in dict.fromkeys(run["problem"] for run in runs):
        peaks = {
            run["rows"]: run["peak_bytes"]
            for run in runs
            if run["problem"] == problem and run["peer"].endswith("no cache") and run["peak_bytes"]
        }
        if len(peaks) > 1:
            steps = ", ".join(f"{rows:,}: {peak / _GIB:.2f}" for rows, peak in peaks.items())
            lines.append(
                f"- {problem}, peak GiB of all processes without a cache, by rows: {steps}"
            )
    return lines


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Time and peak memory against rows, a row of axes for each problem, lines labelled."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    runs = [run for run in results["runs"] if run["status"] == "done"]
    problems = list(dict.fromkeys(run["problem"] for run in runs))
    if not problems:
        return
    figure, axes = plt.subplots(
        len(problems), 2, figsize=(13, 5 * len(problems)), squeeze=False, layout="constrained"
    )
    for row, problem in zip(axes, problems, strict=True):
        here = [run for run in runs if run["problem"] == problem]
        for ax, key, scale, label in (
            (row[0], "seconds", 1.0, "seconds, compilation included"),
            (row[1], "peak_bytes", _GIB, "peak resident GiB, all processes"),
        ):
            _draw(ax, here, key, scale)
            ax.set(xlabel="rows", ylabel=label, title=PROBLEMS[problem].title)
    machine = results["machine"]
    figure.suptitle(f"{machine['cores']} cores of {machine['processor']}", fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _draw(ax: Any, runs: Sequence[_Run], key: str, scale: float) -> None:
    ends = []
    used: dict[str, int] = {}
    for peer in dict.fromkeys(run["peer"] for run in runs):
        mine = [run for run in runs if run["peer"] == peer]
        family = mine[0]["family"]
        style = used.setdefault(family, 0)
        used[family] += 1
        colour = _FAMILY_COLOURS[family]
        rows, values = [run["rows"] for run in mine], [run[key] / scale for run in mine]
        ax.plot(
            rows,
            values,
            color=colour,
            ls=_DASHES[style % 4],
            marker=_MARKS[style % 4],
            ms=4,
            lw=1.6,
        )
        ends.append((values[-1], rows[-1], peer, colour))
    ax.set(xscale="log", yscale="log")
    ax.grid(visible=True, which="major", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    _label_ends(ax, ends)


def _label_ends(ax: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names to the right of the axes, in the order of the lines' ends, none over another."""
    height = 0.055  # of a label, as a share of the axes
    to_axes = ax.transAxes.inverted()
    wanted = sorted(
        (to_axes.transform(ax.transData.transform((x, y)))[1], x, y, peer, colour)
        for y, x, peer, colour in ends
    )
    places = [place for place, *_ in wanted]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + height)
    # What was pushed past the top comes down again, and pushes in turn.
    ceiling = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - height
    for place, (_, x, y, peer, colour) in zip(places, wanted, strict=True):
        ax.annotate(
            peer,
            xy=(x, y),
            xytext=(1.04, place),
            textcoords=ax.transAxes,
            color=colour,
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "relpos": (0, 0.5)},
        )
