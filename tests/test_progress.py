"""What a fit shows of itself: bars, lines, the log, and events on the scheduler."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

import problems
from nlsq_dask import curve_fit, fit_dataset
from nlsq_dask import progress as shown
from nlsq_dask.evaluate.base import Request
from nlsq_dask.evaluate.local import LocalEvaluator
from nlsq_dask.evaluate.reading import ChunkReader

T, Y = problems.make_decay(200_000)
DS = problems.dataset(T, Y)


class Recorder:
    """A progress that remembers what it was told."""

    shows_trials = True

    def __init__(self):
        self.parts, self.records = [], []

    def restart(self):
        return

    def begin(self, title, num_rows):
        self.parts.append([title, num_rows, 0, False])

    def advance(self, num_rows):
        self.parts[-1][2] += num_rows

    def end(self):
        self.parts[-1][3] = True

    def tell(self, record):
        self.records.append(record)


def fit(**options):
    return fit_dataset(DS, problems.decay, y="y", p0=problems.P0, **options)


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("nlsq_dask.optimizer.choose_progress", lambda *_: recorder)
    return recorder


def check(recorder, result):
    titles = [title for title, *_ in recorder.parts]
    assert titles == ["sample", *(f"pass {i}" for i in range(1, result.num_passes + 1))]
    for title, num_rows, done, is_over in recorder.parts:
        assert is_over
        assert done == num_rows, title
        assert title == "sample" or num_rows == len(T)
    assert [r.num_passes for r in recorder.records if r.phase == 2] == [
        r.num_passes for r in result.history
    ]


def test_every_row_of_every_pass_is_told_in_process(recorder):
    check(recorder, fit())


@pytest.mark.cluster
def test_every_row_of_every_pass_is_told_on_a_cluster(recorder, client):
    check(recorder, fit(client=client))


@pytest.mark.cluster
def test_blocks_that_are_computed_in_every_pass_are_told_as_well(recorder, client, monkeypatch):
    monkeypatch.setattr("nlsq_dask.evaluate.cluster._PERSIST_SHARE", 0.0)
    result = fit_dataset(DS.chunk(row=50_000), problems.decay, y="y", p0=problems.P0, client=client)
    assert "computed in every pass" in result.diagnostics["evaluator"]
    check(recorder, result)


def test_a_pass_that_fails_is_over_too(monkeypatch):
    recorder = Recorder()
    session = fit().session
    evaluator = LocalEvaluator(session.problem, progress=recorder)

    def fail(*arguments, **options):
        raise OSError("the disk is gone")

    monkeypatch.setattr(ChunkReader, "stream", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        evaluator.evaluate(Request(params=session.problem.space.p0, terms=session.terms))
    assert recorder.parts[-1][3]


@pytest.mark.cluster
def test_a_trial_is_an_event_on_the_scheduler(client):
    result = fit(client=client)
    events = [event for _, event in client.get_events("nlsq_dask")]
    mine = events[-len(result.history) :]
    assert [event["num_passes"] for event in mine] == [r.num_passes for r in result.history]
    assert mine[-1]["cost"] == result.cost
    assert list(mine[-1]["params"]) == result.popt.tolist()
    assert {"accepted", "distance", "relative_change", "seconds"} <= set(mine[-1])


def test_lines_are_shown_where_asked_for(capfd):
    result = fit(progress=True)
    text = capfd.readouterr().err
    for number in range(1, result.num_passes + 1):
        assert f"pass {number}: cost" in text
    assert "standard errors to go" in text
    assert "%|" not in text  # no bar where it would be printed again and again


def test_nothing_is_shown_where_nobody_looks_on(capfd):
    fit()
    fit(progress=False)
    curve_fit(problems.decay, T, Y, p0=tuple(problems.P0.values()))
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


def test_the_log_has_the_lines_once(capfd):
    logger, stream = logging.getLogger("nlsq_dask"), io.StringIO()
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        fit(progress=True)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert stream.getvalue().count("pass 1: cost") == 1
    assert "pass 1: cost" not in capfd.readouterr().err


def test_a_long_pass_is_logged_now_and_then(caplog, monkeypatch):
    clock = iter(np.arange(0.0, 1000.0, 20.0))
    monkeypatch.setattr(shown.time, "perf_counter", lambda: next(clock))
    caplog.set_level(logging.INFO, "nlsq_dask")
    log = shown.LogProgress()
    log.begin("pass 3", 1000)
    for _ in range(10):
        log.advance(100)
    log.end()
    lines = [record.message for record in caplog.records]
    assert lines == [  # every other call: 40 s; none at the end
        "pass 3: 20 % of 1,000 rows, 5 rows/s, about 160 s to go".replace("160 s", "3 min"),
        "pass 3: 40 % of 1,000 rows, 5 rows/s, about 2 min to go",
        "pass 3: 60 % of 1,000 rows, 5 rows/s, about 80 s to go",
        "pass 3: 80 % of 1,000 rows, 5 rows/s, about 40 s to go",
    ]


def test_a_terminal_shows_a_long_fit_by_itself():
    """A real terminal: the far end of a pseudo-terminal; with the two seconds made none."""
    code = (
        "import nlsq_dask.progress as p; p._SILENT_SECONDS = 0.0\n"
        "import sys; sys.path.insert(0, 'tests'); import test_progress as t; t.fit()"
    )
    far, near = pty.openpty()
    termios.tcsetwinsize(near, (24, 100))
    run = subprocess.Popen([sys.executable, "-c", code], stderr=near, stdout=near)
    os.close(near)
    text = b""
    start = time.monotonic()
    while time.monotonic() - start < 120:
        try:
            part = os.read(far, 4096)
        except OSError:  # the near end is closed
            break
        text += part
    os.close(far)
    assert run.wait() == 0, text
    assert b"pass 1: cost" in text
    assert b"pass 1:   0%|" in text


def test_what_follows_a_fit_has_its_own_two_seconds(monkeypatch):
    """A profile interval asked for an hour later takes passes of its own, however short."""
    bars = []
    monkeypatch.setattr(shown, "_is_watched", lambda: True)
    monkeypatch.setattr(shown, "_SILENT_SECONDS", 100.0)
    monkeypatch.setattr(shown, "_bars", lambda: lambda **options: bars.append(options) or Bar())
    result = fit()
    late = time.perf_counter() + 1e6
    monkeypatch.setattr(shown.time, "perf_counter", lambda: late)
    num_bars = len(bars)
    result.confidence_interval(params="rate", method="profile")
    assert num_bars < len(bars)
    assert all(bar["delay"] > 0 for bar in bars)


class Bar:
    def update(self, count):
        return

    def close(self):
        return


def test_a_quiet_configuration_stays_quiet():
    watched = shown.choose_progress(None, verbose=0)
    assert isinstance(watched, shown.LogProgress)


@pytest.mark.parametrize("wrong", ["yes", 1, object()])
def test_progress_is_a_bool(wrong):
    with pytest.raises(TypeError, match="`progress` must be True, False or None"):
        fit(progress=wrong)
    with pytest.raises(TypeError, match="`progress` must be True, False or None"):
        curve_fit(problems.decay, T, Y, progress=wrong)
