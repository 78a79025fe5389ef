"""The run-time dependencies, as pyproject.toml and the metadata of what is installed have them.

python tests/runtime.py     a table of their licences
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["blocked_modules", "direct_names", "licence_of", "runtime_names"]

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def direct_names() -> set[str]:
    """Distributions that pyproject.toml asks for."""
    return _names(PYPROJECT["project"]["dependencies"])


def runtime_names() -> set[str]:
    """These, and what they need in turn, without any extra."""
    names: set[str] = set()
    waiting = direct_names()
    while waiting:
        name = waiting.pop()
        names.add(name)
        waiting |= _names(importlib.metadata.requires(name) or []) - names
    return names


def _names(requirements: list[str]) -> set[str]:
    """Of the requirements that hold here, with their extras' own left aside."""
    each = map(Requirement, requirements)
    return {
        canonicalize_name(one.name)
        for one in each
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def blocked_modules() -> list[str]:
    """Top-level modules that are installed and belong to none of them."""
    kept = runtime_names() | {"nlsq-dask"}
    return sorted(
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not kept.intersection(map(canonicalize_name, owners))
    )


def licence_of(name: str) -> str:
    """As its metadata say it, in one line: by expression, by classifier or by field."""
    about = importlib.metadata.metadata(name)
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in about.get_all("Classifier") or []
        if text.startswith("License :: ")
    ]
    field = re.sub(r"\s+", " ", (about.get("License") or "").strip())[:80]
    return about.get("License-Expression") or ", ".join(classifiers) or field


if __name__ == "__main__":
    for name in sorted(runtime_names()):
        sys.stdout.write(f"{name:<24}{licence_of(name)}\n")
