"""The pages say what the code does: names, messages, links, and the examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import iris_sample_data
import numpy as np
import pytest

from nlsq_dask import Status, errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nlsq_dask"
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]
PUBLIC = ["nlsq_dask", "nlsq_dask.compat", "nlsq_dask.errors", "nlsq_dask.testing"]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^(`{3,}|:{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)


# -- names


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_is_public(module):
    found = importlib.import_module(module)
    if module.count(".") and Path(str(found.__file__)).name == "__init__.py":
        assert not hasattr(found, "__all__")  # a folder: its modules have names
        return
    if module not in ("nlsq_dask._version", "nlsq_dask._typing"):
        assert all(hasattr(found, name) for name in found.__all__)


def documented() -> list[Any]:
    """What the reference has entries for, as objects: a name may be imported from two places."""
    found = []
    for page in sorted((DOCS / "reference").glob("*.md")):
        pattern = r"^\.\. auto(?:function|class|exception|data):: (\S+)\.(\w+)(?:\(.*\))?$"
        for module, name in re.findall(pattern, page.read_text(), re.MULTILINE):
            found.append(getattr(importlib.import_module(module), name))
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module):
    public = importlib.import_module(module)
    entries = {id(entry) for entry in documented()}
    missing = [name for name in public.__all__ if id(getattr(public, name)) not in entries]
    assert not missing


# -- messages


def literals(path: Path) -> Iterator[str]:
    """Every text of a module but its docstrings, with ``…`` for values."""
    tree = ast.parse(path.read_text())
    documents = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [node.value] if id(node) not in documents else []


SOURCE = {text for path in sorted(PACKAGE.rglob("*.py")) for text in literals(path)}
QUOTED = re.findall(
    r"^(`+) ?(.+?) ?\1\n: ", (DOCS / "how-to/troubleshooting.md").read_text(), re.MULTILINE
)


def test_messages_are_found():
    assert len(QUOTED) > 80


@pytest.mark.parametrize("quoted", [text for _, text in QUOTED])
def test_a_quoted_message_is_one_of_the_package(quoted):
    """Word for word; where the page has ``…`` the code has a value or more words."""
    words = [re.escape(part.strip()) for part in quoted.split("…")]
    assert sum(map(len, words)) >= 10, "too short to be found by"
    pattern = re.compile(".*?".join(words), re.DOTALL)
    assert any(pattern.search(text) for text in SOURCE)


def test_exceptions_and_failures_are_on_the_pages():
    exceptions = (DOCS / "reference/errors.md").read_text()
    assert not [name for name in errors.__all__ if name not in exceptions]
    text = " ".join(text for _, text in QUOTED)
    explained = (Status.STALLED, Status.NOT_FINITE, Status.UNIDENTIFIED, Status.MAX_PASSES)
    assert not [s for s in explained if s.value.split(".")[0][:30] not in text]


# -- links


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_within_the_project_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    for link in links:
        if "://" in link or link.startswith("mailto:"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", without_code(target.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), link


def slug(heading: str) -> str:
    """GitHub's anchor of a heading, which is MyST's too."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# -- examples

WITH_EXAMPLES = [
    module
    for module in MODULES
    if ">>> " in Path(str(importlib.import_module(module).__file__)).read_text()
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_of_docstrings_run(module):
    tried = doctest.testmod(importlib.import_module(module))
    assert tried.attempted > 0
    assert tried.failed == 0


@pytest.fixture
def readers_folder(tmp_path, monkeypatch) -> Path:
    """Where a reader of README.md has the file of the example."""
    monkeypatch.chdir(tmp_path)
    source = Path(iris_sample_data.path) / "E1_north_america.nc"
    shutil.copy(source, tmp_path / source.name)
    return tmp_path


@pytest.mark.cluster
def test_python_of_the_readme_runs(readers_folder, cluster):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert len(blocks) >= 6
    example = ast.parse((ROOT / "examples/warming_curve.py").read_text())
    above = [n for n in example.body if isinstance(n, ast.Import | ast.ImportFrom | ast.Assign)]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(ast.Module(above, []), "warming_curve.py", "exec"), names)  # what it imports
    x = np.linspace(0.0, 4.0, 500)
    names |= {"xdata": x, "ydata": 2.0 * np.exp(-0.7 * x) + 0.2, "p0": [1.0, 1.0, 0.1]}
    names |= {"sigma": np.full(500, 0.1)}
    # The archive is made before it is read, as one who pastes would do.
    for block in sorted(blocks, key=lambda block: "to_zarr" not in block):
        text = block.replace("tcp://scheduler:8786", cluster.scheduler_address)
        text = text.replace(
            "/data/measurements.zarr", os.fspath(readers_folder / "measurements.zarr")
        )
        if "curve_fit(f," in text:
            names["f"] = names["decay"]
        exec(compile(text, "README.md", "exec"), names)
        if "result" in names:
            assert names.pop("result").success, block
    names["client"].close()
    np.testing.assert_allclose(names["popt"], [2.0, 0.7, 0.2], rtol=1e-6)
