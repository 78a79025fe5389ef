"""The telemetry of the defence layers, by itself and of a fit."""

from __future__ import annotations

import re
import threading

import pytest

from config_rows_warmup import GOOD, POOR, fit
from nlsq_dask.warmup.defense import (
    DefenseLayerTelemetry,
    DefenseRecord,
    get_defense_telemetry,
    render_metrics,
    reset_defense_telemetry,
)

METRICS = {
    "nlsq_defense_warmup_calls_total",
    "nlsq_defense_layer1_triggers_total",
    "nlsq_defense_layer2_refinement_total",
    "nlsq_defense_layer2_careful_total",
    "nlsq_defense_layer2_exploration_total",
    "nlsq_defense_layer3_triggers_total",
    "nlsq_defense_layer4_triggers_total",
    "nlsq_defense_lbfgs_history_fill_total",
    "nlsq_defense_lbfgs_line_search_failures_total",
}


def record(**changes):
    nothing = {
        "start_loss": 2.0,
        "is_warm_start": False,
        "first_step": "exploration",
        "guard_ended": False,
        "num_clipped": 0,
        "history_filled": False,
        "num_line_search_failures": 0,
    }
    return DefenseRecord(**{**nothing, **changes})


RECORDS = [
    record(is_warm_start=True, first_step=None),
    record(first_step="refinement", history_filled=True),
    record(num_clipped=7, num_line_search_failures=2),
    record(guard_ended=True, num_clipped=1),
]


@pytest.fixture
def telemetry():
    return DefenseLayerTelemetry(RECORDS)


def parse_prometheus(text: str) -> dict[str, float]:
    """Samples by name, of the text exposition format 0.0.4; AssertionError where it is not."""
    assert text.endswith("\n")
    kinds, samples = {}, {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            assert re.fullmatch(r"# HELP [a-zA-Z_:][a-zA-Z0-9_:]* [^\n]*", line)
        elif line.startswith("# TYPE "):
            found = re.fullmatch(r"# TYPE ([a-zA-Z_:][a-zA-Z0-9_:]*) (counter|gauge)", line)
            assert found
            assert found[1] not in samples  # a type comes before its samples
            kinds[found[1]] = found[2]
        else:
            found = re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*) ([-+0-9.eE]+|NaN|[+-]Inf)", line)
            assert found
            assert found[1] not in samples
            samples[found[1]] = float(found[2])
            assert kinds[found[1]] == "counter"
            assert found[1].endswith("_total")
    return samples


def test_metrics_are_valid_prometheus_text(telemetry):
    exported = telemetry.export_metrics()
    assert set(exported) == METRICS
    assert parse_prometheus(render_metrics(telemetry)) == exported
    lines = [f"{name} {value}" for name, value in exported.items()]
    bare = "\n".join(f"# TYPE {line.split()[0]} counter\n{line}" for line in lines) + "\n"
    assert parse_prometheus(bare) == exported


def test_counts_and_rates(telemetry):
    exported = telemetry.export_metrics()
    assert exported["nlsq_defense_warmup_calls_total"] == 4
    assert exported["nlsq_defense_lbfgs_history_fill_total"] == 1
    assert exported["nlsq_defense_lbfgs_line_search_failures_total"] == 2
    assert telemetry.get_trigger_rates() == {
        "layer1_warm_start_rate": 25.0,
        "layer2_refinement_rate": 25.0,
        "layer2_careful_rate": 0.0,
        "layer2_exploration_rate": 50.0,
        "layer3_cost_guard_rate": 25.0,
        "layer4_clip_rate": 50.0,
    }
    summary = telemetry.get_summary()
    assert summary["warmups"] == {"count": 4, "rate": 100.0}
    assert summary["layer4_clip"] == {"count": 2, "rate": 50.0}


def test_recent_events_are_the_latest(telemetry):
    events = telemetry.get_recent_events()
    assert [event["event"] for event in events] == [
        *("warm_start", "refinement", "exploration", "step_clipping"),
        *("exploration", "cost_guard", "step_clipping"),
    ]
    assert telemetry.get_recent_events(n=1) == events[-1:]
    assert telemetry.get_recent_events(n=0) == []
    assert events[3] == {
        "warmup": 3,
        "layer": 4,
        "event": "step_clipping",
        "count": 7,
        "start_loss": 2.0,
    }


def test_reset_forgets(telemetry):
    telemetry.reset()
    assert not any(telemetry.export_metrics().values())
    assert not any(telemetry.get_trigger_rates().values())
    assert telemetry.get_recent_events() == []


def test_threads_lose_no_count():
    telemetry = DefenseLayerTelemetry()
    threads = [
        threading.Thread(target=lambda: [telemetry.record(record()) for _ in range(500)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert telemetry.export_metrics()["nlsq_defense_warmup_calls_total"] == 2000


def test_the_process_adds_up_what_fits_report():
    reset_defense_telemetry()
    one = fit(p0=POOR).diagnostics["defense"]
    other = fit(p0=GOOD, warm_start_threshold=0.5).diagnostics["defense"]
    assert one["metrics"]["nlsq_defense_layer1_triggers_total"] == 0
    assert other["metrics"]["nlsq_defense_layer1_triggers_total"] == 1
    total = get_defense_telemetry().export_metrics()
    assert total == {name: one["metrics"][name] + other["metrics"][name] for name in METRICS}
    assert one["summary"]["layer4_clip"]["rate"] == 100.0
    reset_defense_telemetry()
    assert not any(get_defense_telemetry().export_metrics().values())
