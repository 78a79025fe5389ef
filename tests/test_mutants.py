"""A sample of mutants: each is noticed by a test, or explained."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mutate.py")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["results.covariance"])
def test_mutants_are_killed_or_explained(module, record_property):
    if importlib.util.find_spec("cosmic_ray") is None:
        pytest.skip("cosmic-ray is not installed")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), module, "--sample", "25"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"(\d+) of \d+ mutants tried, (\d+) killed, (\d+) explained", done.stdout)
    for what, count in zip(("tried", "killed", "explained"), found.groups(), strict=True):
        record_property(f"mutants {what}", int(count))
