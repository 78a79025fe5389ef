"""Mutation testing: does a test fail when an operator or a number of the package is changed?

    pip install cosmic-ray && python tests/mutate.py results.covariance kernels.build --sample 100

Mutants are Cosmic Ray's, of the operators that `mutants.toml` lists, each run on the tests that it
lists for the module. Cosmic Ray's own runner starts Python anew for each mutant; here each runs
in a fork of a process that has imported all but the package and started no thread of JAX's. The
mutant is compiled in memory: no file is touched. Survivors that `mutants.md` explains are told
apart from those that it does not; the latter are the exit status.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CONFIG = tomllib.loads((TESTS / "mutants.toml").read_text())
EXPLAINED = TESTS / "mutants.md"


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    module: str
    operator: str
    line: int
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        """How `mutants.md` knows it."""
        return f"| `{self.module}` | `{self.before}` | `{self.after}` |".replace("||", "")


def path_of(module: str) -> Path:
    return ROOT / "nlsq_dask" / f"{module.replace('.', '/')}.py"


def meaning(source: str) -> str | None:
    """The code without annotations and docstrings, which nothing executes; None if it is none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def mutants_of(module: str) -> Iterator[Mutant]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = path_of(module).read_text()
    lines, seen = source.splitlines(), {meaning(source), None}
    for name in CONFIG["operators"]:
        operator = get_operator(name)()
        positions = [
            start
            for node in ast_nodes(get_ast(source))
            for start, _ in operator.mutation_positions(node)
        ]
        for occurrence, (line, _) in enumerate(positions):
            mutated = mutate_code(source, operator, occurrence)
            if mutated is None or meaning(mutated) in seen:
                continue
            seen.add(meaning(mutated))
            after = mutated.splitlines()
            gone = len(lines) - len(after)  # a decorator takes its line along
            yield Mutant(
                module=module,
                operator=name.removeprefix("core/"),
                line=line,
                before=lines[line - 1].strip(),
                after="" if gone else after[line - 1].strip(),
                source=mutated,
            )


class MutantLoader(importlib.machinery.SourceFileLoader):
    """Executes a mutant in the place of the module."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(f"nlsq_dask.{mutant.module}", str(path_of(mutant.module)))
        self._mutant = mutant

    def get_code(self, fullname):
        return compile(self._mutant.source, self.path, "exec", dont_inherit=True)

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)


def preload() -> None:
    """Everything that tests import, except for the package."""
    for name in ("jax.numpy", "scipy.optimize", "scipy.stats", "xarray", "dask.array"):
        importlib.import_module(name)
    for name in ("distributed", "zarr", "h5py", "pytest", "cftime"):
        importlib.import_module(name)
    import hypothesis

    # A failing example need not be small, nor kept.
    hypothesis.settings.register_profile(
        "mutants",
        deadline=None,
        database=None,
        derandomize=True,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )
    assert "nlsq_dask" not in sys.modules


def run_tests(mutant: Mutant | None, tests: list[str]) -> int:
    """In a fork: pytest's exit status."""
    import pytest

    if mutant is not None:
        sys.meta_path.insert(0, MutantLoader(mutant))
    if "NLSQ_DASK_MUTANTS_SHOW" not in os.environ:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    quick = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    quick += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are imported already
    return int(pytest.main([*quick, *tests]))


def fork(mutant: Mutant | None, tests: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    status = 70
    try:
        status = run_tests(mutant, tests)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(pids: dict[int, tuple[Mutant, float]], limit: float) -> Iterator[tuple[Mutant, str]]:
    """What has ended, of those that run; what runs too long is ended."""
    for pid, (mutant, start) in list(pids.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        is_late = time.monotonic() > start + limit
        if not ended and not is_late:
            continue
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        del pids[pid]
        survived = bool(ended) and os.waitstatus_to_exitcode(status) == 0
        yield mutant, "survived" if survived else "late" if not ended else "killed"


def run(mutants: list[Mutant], tests: list[str], jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with what became of it: killed, survived, or late, which is killed as well."""
    start = time.monotonic()
    _, status = os.waitpid(fork(None, tests), 0)
    if status:
        raise SystemExit(f"the tests fail without a mutant: pytest -n 0 {' '.join(tests)}")
    limit = 30 + 6 * (time.monotonic() - start)
    waiting, running = list(reversed(mutants)), dict[int, tuple[Mutant, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[fork(mutant, tests)] = mutant, time.monotonic()
        yield from wait_for(running, limit)
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="solvers.quadratic; all by default")
    parser.add_argument("--sample", type=int, help="mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", type=Path, help="only the survivors in a log of --log")
    parser.add_argument("--log", type=Path, help="a line of JSON for each mutant")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    explained = EXPLAINED.read_text() if EXPLAINED.exists() else ""
    again = [json.loads(line) for line in options.again.open()] if options.again else None
    unexplained = 0
    with tempfile.TemporaryDirectory(prefix="nlsq-dask-mutants-") as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
        preload()
        for module in options.modules or CONFIG["tests"]:
            every = list(mutants_of(module))
            chosen = every
            if again is not None:
                left = {
                    (row["module"], row["before"], row["after"], row["line"])
                    for row in again
                    if row["outcome"] == "survived"
                }
                chosen = [m for m in every if (m.module, m.before, m.after, m.line) in left]
            if options.sample is not None and options.sample < len(chosen):
                chosen = random.Random(f"{options.seed} {module}").sample(chosen, options.sample)
            unexplained += report(module, chosen, len(every), explained, options)
    sys.exit(1 if unexplained else 0)


def report(
    module: str, chosen: list[Mutant], total: int, explained: str, options: argparse.Namespace
) -> int:
    """Run a module's mutants, and say what became of them. Returns survivors without a word."""
    tally = {"killed": 0, "late": 0, "survived": 0}
    left, start = [], time.monotonic()
    for mutant, outcome in run(chosen, CONFIG["tests"][module], options.jobs) if chosen else ():
        tally[outcome] += 1
        if outcome == "survived" and mutant.name not in explained:
            left.append(mutant)
        if options.log:
            row = {name: getattr(mutant, name) for name in ("module", "operator", "line")}
            row |= {"before": mutant.before, "after": mutant.after, "outcome": outcome}
            with options.log.open("a") as log:
                log.write(json.dumps(row) + "\n")
    sys.stdout.write(
        f"{module}: {len(chosen)} of {total} mutants tried, {tally['killed'] + tally['late']} "
        f"killed, {tally['survived'] - len(left)} explained, {len(left)} neither "
        f"({time.monotonic() - start:.0f} s)\n"
    )
    for mutant in left:
        sys.stdout.write(f"  {mutant.line}: {mutant.before}  ->  {mutant.after}\n")
    sys.stdout.flush()
    return len(left)


if __name__ == "__main__":
    main()
