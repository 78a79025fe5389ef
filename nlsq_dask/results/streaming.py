"""A fit's course in the words of NLSQ: four phases, their timings and their diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nlsq_dask.telemetry import IterationRecord

__all__ = ["PHASE_NAMES", "phase_history", "streaming_diagnostics"]

PHASE_NAMES = ("normalization", "warmup", "gauss_newton", "covariance")
# Which stretches of a fit, as it times them, make up a phase.
_STRETCHES = (("plan", "sample", "normalization"), ("warmup",), ("passes",), ("covariance",))


def phase_history(
    diagnostics: Mapping[str, Any], history: Sequence[IterationRecord]
) -> list[dict[str, Any]]:
    """What each phase took: ``phase, phase_name, seconds, iterations``."""
    seconds = diagnostics["seconds"]
    iterations = (0, diagnostics["sample"].get("num_evaluations", 0), len(history), 0)
    return [
        {
            "phase": phase,
            "phase_name": name,
            "seconds": sum(seconds.get(stretch, 0.0) for stretch in _STRETCHES[phase]),
            "iterations": iterations[phase],
        }
        for phase, name in enumerate(PHASE_NAMES)
    ]


def streaming_diagnostics(
    diagnostics: Mapping[str, Any], history: Sequence[IterationRecord]
) -> dict[str, Any]:
    """NLSQ's ``streaming_diagnostics``; iterations of phase 2 are passes over all rows."""
    phases = phase_history(diagnostics, history)
    last = history[-1]
    return {
        "phase_timings": {phase["phase_name"]: phase["seconds"] for phase in phases},
        "phase_iterations": {phase["phase_name"]: phase["iterations"] for phase in phases},
        "total_time": diagnostics["seconds"]["total"],
        "warmup_diagnostics": {**diagnostics["sample"], **diagnostics.get("warmup", {})},
        "gauss_newton_diagnostics": {
            "iterations": len(history),
            "num_accepted": sum(record.accepted for record in history),
            "final_cost": last.cost,
            "final_loss": last.loss,
            "final_radius": last.radius,
            "optimality": last.optimality,
            "distance": last.distance,
        },
        "phase_history": phases,
    }
