"""Mutation testing: does a test fail when an operator or a number of the package is changed?

    pip install cosmic-ray && python tests/mutate.py results.covariance --sample 100

Mutants are Cosmic Ray's, of the operators that `mutants.toml` lists, each tried by the tests that
it lists for the module. Cosmic Ray's own runner starts Python anew for each mutant; here pytest
collects once, and each mutant is a fork of that process in which the functions of the module are
given the mutant's code. No file is touched. Survivors that `mutants.md` explains are told apart
from those that it does not: the exit status says whether there are any.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import enum
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import tomllib
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CONFIG = tomllib.loads((TESTS / "mutants.toml").read_text())
EXPLAINED = TESTS / "mutants.md"
UNFIT = 70  # the exit status of a fork that did not come to its tests
NUMBERS = (bool, int, float, tuple)


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
        cells = (self.module, self.before, self.after)
        return "| " + " | ".join(f"`{cell}`".replace("|", r"\|") for cell in cells) + " |"


def path_of(module: str) -> Path:
    return ROOT / "nlsq_dask" / f"{module.replace('.', '/')}.py"


def meaning(source: str) -> str | None:
    """The code without annotations and the flags of dataclasses; None if it is no code."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
        elif isinstance(node, ast.ClassDef):
            node.decorator_list = []
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


def adopt(old: Any, new: Any) -> None:
    """Give a function, a property or a class the code of its mutant, wherever it is known."""
    if isinstance(old, property):
        adopt(old.fget, new.fget)
    elif isinstance(old, types.FunctionType):
        if hasattr(old, "__wrapped__"):
            adopt(old.__wrapped__, new.__wrapped__)
        elif old.__code__ != new.__code__:
            old.__code__ = new.__code__
        old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    elif isinstance(old, type):
        if issubclass(old, enum.Enum):
            renumber(old, new)
        for name, part in vars(new).items():
            if isinstance(part, NUMBERS) and not issubclass(old, enum.Enum):
                setattr(old, name, part)
            elif not name.startswith("__") or name == "__init__":
                adopt(vars(old).get(name), part)


def renumber(old: type[enum.Enum], new: type[enum.Enum]) -> None:
    """Members stay who they are, and are found by the numbers of their mutants."""
    for name, member in new.__members__.items():
        old[name]._value_ = member.value
    old._value2member_map_ = {new[name].value: old[name] for name in new.__members__}


def become(mutant: Mutant) -> None:
    """Change the module, and the numbers that other modules have imported from it."""
    name = f"nlsq_dask.{mutant.module}"
    module = sys.modules[name]
    changed = types.ModuleType(name)
    try:
        exec(compile(mutant.source, module.__file__, "exec", dont_inherit=True), vars(changed))
    except (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError):
        # A module that cannot be imported fails every test.
        os._exit(1)
    for key, new in list(vars(changed).items()):
        old = vars(module).get(key)
        if isinstance(new, NUMBERS) and new != old:
            for other in list(sys.modules.values()):
                if vars(other).get(key) is old and other.__name__.startswith(
                    ("nlsq_dask", "test_")
                ):
                    setattr(other, key, new)
        elif getattr(new, "__module__", None) == name:
            adopt(old, new)


def register_profile() -> None:
    """A failing example need not be small, nor kept."""
    hypothesis.settings.register_profile(
        "mutants",
        deadline=None,
        database=None,
        derandomize=True,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )


def fork(mutant: Mutant | None, session: pytest.Session) -> int:
    """A process that tries one mutant; its exit status is 0 if no test failed."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    status = UNFIT
    try:
        plugins = session.config.pluginmanager
        plugins.unregister(plugins.get_plugin("terminalreporter"))
        if mutant is not None:
            become(mutant)
        for item, after in itertools.zip_longest(session.items, session.items[1:]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if session.testsfailed:
                break
        status = int(session.testsfailed > 0)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
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
        code = os.waitstatus_to_exitcode(status) if ended else 1
        if code == UNFIT:
            raise RuntimeError(f"no process can become this mutant: {mutant.name}")
        yield mutant, "survived" if code == 0 else "killed" if ended else "late"


@dataclass
class Trials:
    """A plugin of pytest's that tries mutants on the tests that were collected."""

    mutants: list[Mutant]
    jobs: int
    after: Callable[[Mutant, str], None]
    fails_without: bool = False

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        start = time.monotonic()
        _, status = os.waitpid(fork(None, session), 0)
        self.fails_without = status != 0 or not session.items
        limit = 60 + 10 * (time.monotonic() - start)
        waiting, running = list(reversed(self.mutants)), dict[int, tuple[Mutant, float]]()
        while (waiting or running) and not self.fails_without:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop()
                running[fork(mutant, session)] = mutant, time.monotonic()
            for mutant, outcome in wait_for(running, limit):
                self.after(mutant, outcome)
            time.sleep(0.01)
        return True


def run(mutants: list[Mutant], tests: list[str], jobs: int, after: Callable[..., None]) -> None:
    """Each mutant with what became of it: killed, survived, or late, which is killed as well."""
    trials = Trials(mutants, jobs, after)
    quick = ["-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    quick += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "--no-summary"]
    pytest.main([*quick, *tests], plugins=[trials])
    if trials.fails_without:
        raise SystemExit(f"the tests fail without a mutant: pytest -n 0 {' '.join(tests)}")


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
        register_profile()
        for module in options.modules or CONFIG["tests"]:
            every = list(mutants_of(module))
            chosen = every
            if again is not None:
                left = {
                    (row["module"], row["before"], row["after"])
                    for row in again
                    if row["outcome"] == "survived"
                }
                chosen = [m for m in every if (m.module, m.before, m.after) in left]
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

    def after(mutant: Mutant, outcome: str) -> None:
        tally[outcome] += 1
        if outcome == "survived" and mutant.name not in explained:
            left.append(mutant)
        if options.log:
            row = {name: getattr(mutant, name) for name in ("module", "operator", "line")}
            row |= {"before": mutant.before, "after": mutant.after, "outcome": outcome}
            with options.log.open("a") as log:
                log.write(json.dumps(row) + "\n")

    if chosen:
        run(chosen, CONFIG["tests"][module], options.jobs, after)
    sys.stdout.write(
        f"{module}: {len(chosen)} of {total} mutants tried, {tally['killed'] + tally['late']} "
        f"killed, {tally['survived'] - len(left)} explained, {len(left)} neither "
        f"({time.monotonic() - start:.0f} s)\n"
    )
    for mutant in left:
        sys.stdout.write(f"{mutant.name} line {mutant.line}\n")
    sys.stdout.flush()
    return len(left)


if __name__ == "__main__":
    main()
