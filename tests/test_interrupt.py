"""Ctrl-C ends a fit at once, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import interrupted_run
import problems
from nlsq_dask import (
    FitInterrupted,
    HybridStreamingConfig,
    Status,
    fit_dataset,
    optimizer,
    phases,
)

SCRIPT = Path(interrupted_run.__file__)


@pytest.mark.parametrize("where", ["here", pytest.param("cluster", marks=pytest.mark.cluster)])
def test_an_interrupted_fit_hands_over_what_it_has(where, tmp_path):
    command = [sys.executable, str(SCRIPT), where, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout.readline() == "pass\n"
        time.sleep(1.0)  # into the second pass, which would take a minute or two
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers as well
        start = time.monotonic()
        told = json.loads(run.stdout.read())
        assert time.monotonic() - start < 30
        assert run.wait() == 0
    assert told["status"] == "INTERRUPTED"
    assert told["passes"] == 1
    assert told["tasks"] == 0
    assert told["checkpoint"] in told["text"]
    (tmp_path / "brake").unlink()
    whole = interrupted_run.fit(tmp_path)
    # Where the first pass was: at the optimum of the sample, a part of the rows.
    assert 0 < np.abs((told["popt"] - whole.popt) / whole.perr).max() < 10
    np.testing.assert_allclose(told["perr"], whole.perr, rtol=0.05)
    resumed = interrupted_run.fit(tmp_path, resume_from_checkpoint=told["checkpoint"])
    assert resumed.popt.tobytes() == whole.popt.tobytes()
    assert resumed.pcov.tobytes() == whole.pcov.tobytes()


def test_before_the_first_pass_there_is_no_result():
    t, y = problems.make_decay(5_000)

    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(FitInterrupted, match="before it had a result") as caught:
        fit_dataset(
            problems.dataset(t, y),
            problems.decay,
            y="y",
            p0=problems.P0,
            callback=interrupt,
        )
    assert caught.value.result is None
    assert caught.value.checkpoint is None


@pytest.mark.parametrize("stage", ["open_evaluator_at", "build_result"])
def test_at_either_end_the_checkpoint_is_named(stage, monkeypatch, tmp_path):
    """While Dask's blocks are computed on the workers, and while the result is put together."""
    t, y = problems.make_decay(5_000)
    path = tmp_path / "run.h5"
    place = {"y": "y", "p0": problems.P0, "checkpoint": path}
    if stage == "open_evaluator_at":
        config = HybridStreamingConfig(max_passes=1)
        fit_dataset(problems.dataset(t, y), problems.decay, config=config, **place)
        place["config"] = HybridStreamingConfig(resume_from_checkpoint=path)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    module = optimizer if stage == "open_evaluator_at" else phases
    monkeypatch.setattr(module, stage, interrupt)
    with pytest.raises(FitInterrupted) as caught:
        fit_dataset(problems.dataset(t, y), problems.decay, **place)
    assert caught.value.checkpoint == path


def test_a_checkpoint_that_was_there_before_is_not_named(tmp_path):
    """It is of another fit, for as long as this one has not written its own."""
    t, y = problems.make_decay(5_000)
    place = {"y": "y", "p0": problems.P0, "checkpoint": tmp_path / "run.h5"}
    fit_dataset(problems.dataset(t, y), problems.decay, **place)
    assert place["checkpoint"].exists()

    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(FitInterrupted) as caught:
        fit_dataset(problems.dataset(t, 2 * y), problems.decay, callback=interrupt, **place)
    assert caught.value.checkpoint is None


def test_a_robust_fit_is_handed_over_without_its_sandwich():
    """Which would take the pass that nobody waits for."""
    t, y = problems.make_decay(200_000)

    def interrupt(record):
        if record.phase == 2:
            raise KeyboardInterrupt

    with pytest.raises(FitInterrupted, match="after pass 1") as caught:
        fit_dataset(
            problems.dataset(t, y),
            problems.decay,
            y="y",
            p0=problems.P0,
            loss="huber",
            f_scale=0.1,
            callback=interrupt,
        )
    result = caught.value.result
    assert result.status is Status.INTERRUPTED
    assert not result.success
    assert result.covariance_kind == "classical"
    assert np.isfinite(result.pcov).all()
