"""What the package stands on at run time, and that it stands on nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

import runtime

# Imports all of the package where nothing but its run-time dependencies can be imported.
IMPORT_ALL = """
import importlib, json, pkgutil, sys

blocked = set(json.loads(sys.argv[1]))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is no run-time dependency", name=name)

sys.meta_path.insert(0, Blocker())
import nlsq_dask

names = [m.name for m in pkgutil.walk_packages(nlsq_dask.__path__, "nlsq_dask.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_every_module_is_imported_with_run_time_dependencies_alone():
    blocked = runtime.blocked_modules()
    assert {"pytest", "hypothesis", "_pytest"} <= set(blocked)
    status, out, error = run(IMPORT_ALL, json.dumps(blocked))
    assert status == 0, error[-2000:]
    assert int(out) > 100


def test_and_would_not_be_without_one_of_them():
    blocked = [*runtime.blocked_modules(), "h5netcdf", "scipy"]
    status, _, error = run(IMPORT_ALL, json.dumps(blocked))
    assert status == 1
    assert "is no run-time dependency" in error


PERMISSIVE = re.compile(r"\b(MIT|0?BSD|Apache|ISC|PSF|Zlib|CC0|Unlicense|Python Software)")
# Of the Mozilla licence: files that are changed stay under it, and nothing else is asked.
BY_FILE = {"tqdm"}


@pytest.mark.parametrize("name", sorted(runtime.runtime_names()))
def test_licences_go_with_the_mit_licence(name):
    licence = runtime.licence_of(name)
    parts = [part for part in re.split(r" AND |, ", licence) if part]
    others = [part for part in parts if not PERMISSIVE.search(part)]
    assert parts
    assert not others or (name in BY_FILE and others == ["MPL-2.0"]), licence


def test_dependencies_have_lower_bounds_and_no_upper_ones():
    """An upper bound would keep others from upgrading; a lower one is tried by `.ci/oldest`."""
    for text in runtime.PYPROJECT["project"]["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", text), text


def test_what_is_installed_is_within_the_bounds():
    """`pip check` says the rest: of what the dependencies ask of each other."""
    for requirement in map(Requirement, runtime.PYPROJECT["project"]["dependencies"]):
        installed = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), requirement
