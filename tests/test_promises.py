"""What the pages promise is held by tests that exist; and two promises that had none."""

from __future__ import annotations

import ast
import functools
import random
import re
from pathlib import Path

import numpy as np
import pytest

import problems
from nlsq_dask import HybridStreamingConfig, curve_fit
from nlsq_dask.errors import MemoryProjectionError
from nlsq_dask.plan import MemoryProjection

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/explanation/promises.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| promise")
]


def words(text):
    return " ".join(text.split())


@functools.lru_cache
def names_in(file):
    tree = ast.parse((ROOT / file).read_text())
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_there_are_promises():
    assert len(ROWS) > 20
    assert all(len(row) == 3 for row in ROWS)
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_promise_is_on_its_page_and_held_by_tests_that_exist(row):
    promise, page, holders = row
    assert words(promise) in words((ROOT / page.strip("`")).read_text())
    gate = (ROOT / ".ci/run").read_text()
    found = re.findall(r"`([^`]+)`", holders)
    assert found
    for holder in found:
        file, _, name = holder.partition("::")
        assert (ROOT / file).is_file(), holder
        if name:
            assert name in names_in(file), holder
        else:
            assert f"python {file} " in gate, holder


def test_no_global_random_state_is_read_or_changed():
    t, y = problems.make_decay(2_000, seed=3)
    config = HybridStreamingConfig(enable_multistart=True, n_starts=4)
    found = []
    for seed in (1, 2):
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = np.random.get_state()[1].tobytes(), random.getstate()  # noqa: NPY002
        popt, _ = curve_fit(problems.decay, t, y, p0=[1.0, 1.0, 0.0], config=config)
        found.append(popt.tobytes())
        assert (np.random.get_state()[1].tobytes(), random.getstate()) == before  # noqa: NPY002
    assert found[0] == found[1]


def test_a_plan_that_does_not_fit_is_refused_with_one_that_does():
    """What a kernel needs is of its tiles, and stays as it is in smaller leaves."""
    mebibyte = 2**20
    limit_bytes, leaf_rows = 4096 * mebibyte, 2**26

    def projection(rows):
        return MemoryProjection(
            base_bytes=300 * mebibyte,
            leaf_bytes=16 * rows,
            reading_bytes=32 * rows,
            kernel_bytes=50 * mebibyte,
            num_threads=2,
            held_bytes=80 * mebibyte,
            cache_bytes=100 * mebibyte,
        )

    with pytest.raises(MemoryProjectionError, match="`chunk_size` <= ") as raised:
        projection(leaf_rows).require_within(limit_bytes, leaf_rows)
    rows = int(re.search(r"<= ([\d,]+)", str(raised.value))[1].replace(",", ""))
    projection(rows).require_within(limit_bytes, rows)
    assert projection(rows).total_bytes > 0.99 * limit_bytes


def test_a_plan_that_chunks_of_the_store_do_not_leave_room_for_says_so():
    projection = MemoryProjection(
        base_bytes=2**28,
        leaf_bytes=2**24,
        reading_bytes=2**25,
        kernel_bytes=2**20,
        num_threads=2,
        held_bytes=2**31,
        cache_bytes=0,
    )
    with pytest.raises(MemoryProjectionError, match="2,048 MiB of it are whole chunks of the st"):
        projection.require_within(2**30, 2**20)
