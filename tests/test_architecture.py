"""House rules: imports go one way, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

PACKAGE = Path(__file__).parents[1] / "nlsq_dask"

# A layer may import those to its left.
ORDER = [
    {
        "_version",
        "errors",
        "status",
        "_typing",
        "presets",
        "recent",
        "atomic",
        "by_value",
        "warn",
        "machine",
    },
    {"plain_hdf5"},
    {"options", "compilation", "require", "traces", "config_file"},
    {"config"},
    {"checkpoint.flat"},
    {"checkpoint.file"},
    {"normal_equations", "telemetry", "terms", "losses", "parameters.ties", "warmup.defense"},
    {"parameters.labels"},
    {"parameters.space", "warmup.normalization", "model"},
    {"sources.within", "sources.staying", "sources.straight"},
    {"sources.buffers"},
    {"sources.retrying"},
    {"parameters.given", "sources.base", "sources.transport"},
    {
        "parameters.penalties",
        "fingerprint",
        "sources.held",
        "sources.rereading",
        "sources.marks",
        "sources.watched",
    },
    {"sources.columns", "sources.dask", "sources.graph", "sources.grid", "sources.objects"},
    {"sources.stores", "sources.windows"},
    {"sources.clusters"},
    {"sources.arrays", "sources.xarray", "sample"},
    {"sources.batches", "sources.origin", "sources.originals"},
    {"kernels.tiles", "kernels.products"},
    {"kernels.rows", "kernels.counts"},
    {"kernels.handed"},
    {"kernels.build", "kernels.width", "plan"},
    {"kernels.reverse"},
    {"problem"},
    {"criterion"},
    {"evaluate.tree", "evaluate.clients", "evaluate.heap", "evaluate.touch", "evaluate.departure"},
    {"progress", "evaluate.ahead", "evaluate.ownership", "evaluate.marks"},
    {"evaluate.base"},
    {"evaluate.shards", "evaluate.packed", "evaluate.reading"},
    {"evaluate.leaves"},
    {"evaluate.local", "evaluate.worker", "evaluate.waiting"},
    {"evaluate.autopsy", "evaluate.blocks", "evaluate.workers"},
    {"evaluate.cluster", "evaluate.reach"},
    {"solvers.triangle"},
    {"solvers.quadratic", "solvers.lbfgs", "solvers.bending"},
    {"solvers.subproblem"},
    {"solvers.acceptance", "solvers.conjugate"},
    {"solvers.trust_region", "solvers.truncated_newton"},
    {"solvers.minimize", "solvers.end_point", "objective.penalised"},
    {"results.session", "objective.on_sample"},
    {"results.residuals", "results.streaming", "results.profile", "results.unit_text"},
    {"results.units", "results.plain", "results.rows", "results.convergence_svg"},
    {"results.provenance", "results.stored"},
    {"results.outcome"},
    {"results.intervals", "results.labelled", "results.summary"},
    {"results.prediction", "results.saving", "results.html", "results.sampled"},
    {"results.plot"},
    {"results.covariance", "results.diagnostics", "objective.dense", "results.result"},
    {"warmup.multistart", "warmup.descents"},
    {"warmup.state"},
    {"warmup.search", "objective.matrix_free"},
    {"warmup.scale"},
    {"results.report", "checkpoint.identity"},
    {"checkpoint.newton_standing"},
    {"checkpoint.snapshot"},
    {"checkpoint.journal"},
    {"checkpoint.ledger"},
    {"solving", "screening"},
    {"phases", "resolve"},
    {"building", "places"},
    {"optimizer"},
    {"api", "testing"},
    {"accessor"},
    {"", "compat", "demo"},
    {"cli"},
]
KNOWS_DASK = {
    "evaluate.autopsy",
    "evaluate.blocks",
    "evaluate.cluster",
    "evaluate.departure",
    "evaluate.touch",
    "evaluate.waiting",
    "evaluate.worker",
    "evaluate.workers",
    "sources.dask",
    "sources.graph",
    "results.prediction",
    "results.saving",
    "cli",
    "demo",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module}
    return names


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path):
    layers = {name: rank for rank, names in enumerate(ORDER) for name in names}
    module = module_of(path)
    names = imported(ast.parse(path.read_text()))
    own = {name.removeprefix("nlsq_dask").lstrip(".") for name in names if "nlsq_dask" in name}
    if path.name == "__init__.py" and module:
        assert not own
        return
    for name in own:
        assert layers[name] < layers[module], f"{module} imports {name}"
    others = {name.split(".")[0] for name in names}
    if module not in KNOWS_DASK:
        assert not others & {"dask", "distributed"}
    if module.startswith("solvers"):
        assert not {name for name in own if name.startswith(("sources", "evaluate"))}
        assert "time" not in others


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines"
        assert not (
            isinstance(node, ast.ExceptHandler)
            and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        )


@pytest.mark.parametrize(
    "heavy", ["dask", "distributed", "xarray", "pandas", "zarr", "scipy.stats", "matplotlib"]
)
def test_importing_loads_only_what_every_fit_needs(heavy):
    """The rest, whoever uses it has loaded already or waits for it once."""
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, nlsq_dask; print({heavy!r} in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "False"


def test_a_fit_of_a_store_loads_no_arrays_of_dask(tmp_path):
    """They take a third of a second to load, of which a fit by path has no use."""
    t, path = np.linspace(0, 1, 100), tmp_path / "rows.zarr"
    xr.Dataset({"y": ("t", np.exp(-t))}, {"t": t}).to_zarr(path, consolidated=False)
    code = (
        "import sys, jax.numpy as jnp, nlsq_dask\n"
        "nlsq_dask.fit_dataset(sys.argv[1], lambda t, rate=0.5: jnp.exp(-rate * t))\n"
        "print('dask.array' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
