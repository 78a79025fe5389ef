"""The four layers that keep L-BFGS from spoiling a good start, counted.

1. A start that already explains the data is left to Levenberg-Marquardt.
2. The better the start, the more the length of the first step is trusted.
3. A descent ends where the loss exceeds the start's, and the best point is returned.
4. No step is longer than a share of normalized space.

A *warmup* here is one start that L-BFGS was to descend from.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DefenseLayerTelemetry",
    "DefenseRecord",
    "get_defense_telemetry",
    "render_metrics",
    "reset_defense_telemetry",
]

_MAX_EVENTS = 1000
_PREFIX = "nlsq_defense_"
# Counter of the telemetry -> name and meaning of the metric.
_METRICS: Mapping[str, tuple[str, str]] = {
    "warmups": ("warmup_calls_total", "Starts that L-BFGS was to descend from."),
    "layer1": ("layer1_triggers_total", "Warm starts left to Levenberg-Marquardt."),
    "refinement": ("layer2_refinement_total", "Descents begun with the refinement step."),
    "careful": ("layer2_careful_total", "Descents begun with the careful step."),
    "exploration": ("layer2_exploration_total", "Descents begun with the exploration step."),
    "layer3": ("layer3_triggers_total", "Descents ended by the cost guard."),
    "layer4": ("layer4_triggers_total", "Descents in which steps were shortened."),
    "history_fill": ("lbfgs_history_fill_total", "Descents that filled the L-BFGS history."),
    "line_search_failures": (
        "lbfgs_line_search_failures_total",
        "Line searches without sufficient decrease.",
    ),
}
_RATES: Mapping[str, str] = {
    "layer1_warm_start_rate": "layer1",
    "layer2_refinement_rate": "refinement",
    "layer2_careful_rate": "careful",
    "layer2_exploration_rate": "exploration",
    "layer3_cost_guard_rate": "layer3",
    "layer4_clip_rate": "layer4",
}


@dataclass(frozen=True, kw_only=True)
class DefenseRecord:
    """What the layers did in one warmup."""

    start_loss: float  # over the variance of y
    is_warm_start: bool
    first_step: str | None  # refinement, careful or exploration; None where layer 2 had no say
    guard_ended: bool
    num_clipped: int
    history_filled: bool
    num_line_search_failures: int


class DefenseLayerTelemetry:
    """Counts of what the layers did, over any number of warmups. Safe to share by threads."""

    def __init__(self, records: Iterable[DefenseRecord] = ()) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        for record in records:
            self.record(record)

    def record(self, record: DefenseRecord) -> None:
        """Count one warmup."""
        with self._lock:
            self._counts["warmups"] += 1
            number = self._counts["warmups"]
            for layer, name, count in _triggers(record):
                self._counts[name if layer == 2 else f"layer{layer}"] += 1
                self._events.append(
                    {
                        "warmup": number,
                        "layer": layer,
                        "event": name,
                        "count": count,
                        "start_loss": record.start_loss,
                    }
                )
            self._counts["history_fill"] += record.history_filled
            self._counts["line_search_failures"] += record.num_line_search_failures

    def get_summary(self) -> dict[str, dict[str, float]]:
        """Per layer, how often it acted, and in how many percent of the warmups."""
        counts, rates = self.export_metrics(), self.get_trigger_rates()
        summary: dict[str, dict[str, float]] = {
            "warmups": {"count": counts[_PREFIX + "warmup_calls_total"], "rate": 100.0}
        }
        for rate, counter in _RATES.items():
            name = rate.removesuffix("_rate")
            summary[name] = {"count": counts[_PREFIX + _METRICS[counter][0]], "rate": rates[rate]}
        return summary

    def get_trigger_rates(self) -> dict[str, float]:
        """How often each layer acted, in percent of the warmups; 0 where there were none."""
        with self._lock:
            total = max(self._counts["warmups"], 1)
            return {rate: 100.0 * self._counts[name] / total for rate, name in _RATES.items()}

    def get_recent_events(self, n: int = 10) -> list[dict[str, Any]]:
        """The last `n` times that a layer acted, the latest last; a thousand are kept."""
        with self._lock:
            return list(self._events)[-n:] if n > 0 else []

    def export_metrics(self) -> dict[str, float]:
        """Counters by the name of their metric; `render_metrics` gives Prometheus's text."""
        with self._lock:
            return {_PREFIX + metric: self._counts[name] for name, (metric, _) in _METRICS.items()}

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._counts.clear()
            self._events.clear()

    def describe(self) -> dict[str, Any]:
        """Plain values, for the diagnostics of a fit."""
        return {
            "summary": self.get_summary(),
            "metrics": self.export_metrics(),
            "events": self.get_recent_events(_MAX_EVENTS),
        }


def render_metrics(telemetry: DefenseLayerTelemetry) -> str:
    """The metrics in the text format that Prometheus reads (exposition format 0.0.4)."""
    values = telemetry.export_metrics()
    lines = []
    for metric, meaning in _METRICS.values():
        name = _PREFIX + metric
        lines += [
            f"# HELP {name} {meaning}",
            f"# TYPE {name} counter",
            f"{name} {values[name]}",
        ]
    return "\n".join(lines) + "\n"


_OF_THIS_PROCESS = DefenseLayerTelemetry()


def get_defense_telemetry() -> DefenseLayerTelemetry:
    """What the layers did in all fits of this process."""
    return _OF_THIS_PROCESS


def reset_defense_telemetry() -> None:
    """Forget the fits of this process."""
    _OF_THIS_PROCESS.reset()


def _triggers(record: DefenseRecord) -> list[tuple[int, str, int]]:
    """Layer, name and number of times, of each layer that acted."""
    acted = []
    if record.is_warm_start:
        acted.append((1, "warm_start", 1))
    if record.first_step is not None:
        acted.append((2, record.first_step, 1))
    if record.guard_ended:
        acted.append((3, "cost_guard", 1))
    if record.num_clipped:
        acted.append((4, "step_clipping", record.num_clipped))
    return acted
