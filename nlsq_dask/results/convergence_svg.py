"""How a fit came to its minimum, as a small SVG: the distance after each pass, on a log scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nlsq_dask.telemetry import IterationRecord

__all__ = ["convergence_svg"]

_WIDTH, _HEIGHT = 420, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34
_MAX_TICKS = 6
_FLOOR = 1e-16  # standard errors; what is nearer is shown there


def convergence_svg(history: Sequence[IterationRecord]) -> str:
    """The picture; empty where no pass has a distance. Colours are those of the text around it."""
    points = [
        (record.num_passes, math.log10(max(record.distance, _FLOOR)), record.accepted)
        for record in history
        if record.phase == 2 and math.isfinite(record.distance)
    ]
    if not points:
        return ""
    passes = [point[0] for point in points]
    low = math.floor(min(point[1] for point in points))
    high = max(math.ceil(max(point[1] for point in points)), low + 1)

    def at(number: float, decade: float) -> tuple[float, float]:
        across = (number - min(passes) + 0.5) / (max(passes) - min(passes) + 1)
        down = (high - decade) / (high - low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _TOP + down * (_HEIGHT - _TOP - _BOTTOM),
        )

    places = [at(number, decade) for number, decade, _ in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" stroke="#3b82c4" stroke-width="1.5" '
        f'fill="{"#3b82c4" if point[2] else "none"}"/>'
        for (x, y), point in zip(places, points, strict=True)
    )
    decades = range(low, high + 1, -(-(high - low) // _MAX_TICKS))
    numbers = range(min(passes), max(passes) + 1, -(-(max(passes) - min(passes) + 1) // 10))
    grid = "".join(_level(at(min(passes), decade)[1], f"1e{decade}") for decade in decades)
    ticks = "".join(
        _label(at(number, low)[0], _HEIGHT - _BOTTOM + 15, str(number)) for number in numbers
    )
    title = _label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, "pass over the data")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="12" fill="currentColor" '
        'font-family="inherit" '
        f'aria-label="{len(points)} passes, from 1e{points[0][1]:.1f} to 1e{points[-1][1]:.1f} '
        f'standard errors">{grid}{ticks}{title}'
        f'<polyline points="{line}" fill="none" stroke="#3b82c4" stroke-width="1.5"/>{dots}</svg>'
    )


def _level(y: float, text: str) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
        'stroke="currentColor" stroke-opacity=".18"/>'
        f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
