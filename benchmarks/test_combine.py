"""Adding the sums of leaves in the tree, against adding the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nlsq_dask.evaluate.tree import bin_level, bin_of, fold_nodes, split_leaves, sum_range
from nlsq_dask.normal_equations import NormalEquations, RowStatistics, Sums

_NUM_LEAVES = 1024


def make_sums(n: int, rng: np.random.Generator) -> Sums:
    count = np.int64(1)
    return Sums(
        normal=NormalEquations(
            gram=rng.normal(size=(n, n)),
            grad=rng.normal(size=n),
            cost=np.float64(rng.normal()),
            num_rows=count,
        ),
        rows=RowStatistics(
            num_masked=count,
            num_invalid=count,
            num_bad_sigma=count,
            num_stray=count,
            residual_sum=np.float64(rng.normal()),
            residual_square=np.float64(rng.normal()),
        ),
    )


@pytest.mark.parametrize("num_params", [3, 8, 64])
@pytest.mark.usefixtures("one_core")
def test_tree_of_sums(num_params: int, compare: Any, report: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    leaves = [make_sums(num_params, rng) for _ in range(_NUM_LEAVES)]
    grams = [sums.equations.gram for sums in leaves]
    grads = [sums.equations.grad for sums in leaves]
    ranges = split_leaves(_NUM_LEAVES, 8)

    def tree() -> Sums:
        nodes: dict[Any, Sums] = {}
        for part in ranges:
            nodes |= sum_range(((i, leaves[i]) for i in part), bin_level(_NUM_LEAVES), bin_of)[0]
        return fold_nodes(nodes, _NUM_LEAVES)

    def arrays() -> None:
        for parts in (grams, grads):
            total = parts[0].copy()
            for part in parts[1:]:
                np.add(total, part, out=total)

    seconds = compare(tree=tree, arrays=arrays)
    np.testing.assert_allclose(tree().equations.gram, sum(grams), rtol=1e-9, atol=1e-9)
    each = 1e6 * seconds["tree"] / (_NUM_LEAVES - 1)
    ratio = seconds["tree"] / seconds["arrays"]
    report(
        f"{each:.1f} us an addition, {ratio:.1f} times NumPy's of gram and gradient",
        microseconds=each,
        ratio_to_numpy=ratio,
    )
