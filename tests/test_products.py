"""Each way of summing products, by itself, over tiles of any number of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlsq_dask.kernels.products import Dot, ProductRows, products_for
from oracles import LONG


@pytest.mark.parametrize(("num_rows", "k", "num_summed"), [(7, 1, 0), (1025, 4, 3), (2500, 8, 3)])
@pytest.mark.parametrize("way", ["lanes", "dot", "sweep"])
def test_sums_of_products_over_tiles_are_dense(way, num_rows, k, num_summed):
    """Fewer rows than lanes, whole blocks, and what is left over."""
    rng = np.random.default_rng(num_rows)
    tiles = [
        ProductRows(
            jac=rng.normal(size=(k, num_rows)),
            target=rng.normal(size=num_rows),
            summed=tuple(rng.normal(size=(num_summed, num_rows))),
        )
        for _ in range(2)
    ]
    products = products_for(way, "float64")
    counts = rng.integers(0, 100, (2, 256)).astype(float)

    @jax.jit
    def total(first, second):
        carry = products.start(*jax.eval_shape(lambda: (first, counts)))
        for tile in (first, second):
            carry = products.add(carry, tile, counts)
        return products.finish(carry)

    with jax.enable_x64(True):
        sums = np.asarray(total(*tiles))
    totals, counted = products.split(sums, k, 1 + num_summed)
    np.testing.assert_array_equal(counted.reshape(2, -1).sum(axis=1), 2 * counts.sum(axis=1))
    jac = np.concatenate([tile.jac for tile in tiles], axis=1).astype(LONG)
    target = np.concatenate([tile.target for tile in tiles]).astype(LONG)
    summed = np.stack(
        [
            np.concatenate(parts)
            for parts in zip(*((t.target, *t.summed) for t in tiles), strict=True)
        ]
    )
    rounding = 2 * num_rows * 2.0**-53  # of a sum in any order, relative to the sum of sizes
    sizes = np.abs(jac), np.abs(target), np.abs(summed)
    for actual, expected, size in (
        (totals.gram, jac @ jac.T, sizes[0] @ sizes[0].T),
        (totals.grad, jac @ target, sizes[0] @ sizes[1]),
        (totals.square, target @ target, target @ target),
        (totals.sums, summed.astype(LONG).sum(axis=1), sizes[2].sum(axis=1)),
    ):
        assert np.shape(actual) == expected.shape
        assert np.all(np.abs(np.asarray(actual, LONG) - expected) <= rounding * size)


def test_lanes_are_for_columns_of_one_precision():
    """A Jacobian in float32 beside residuals in float64 goes by matrix products."""
    assert products_for("lanes", "mixed") == Dot()
    assert products_for("dot", "mixed") == Dot()
    assert products_for("lanes", "float32") == products_for("lanes", "float64")
    assert products_for("lanes", "float32") != Dot()
    rng = np.random.default_rng(0)
    jac, target = rng.normal(size=(3, 40)).astype(np.float32), rng.normal(size=40)
    with jax.enable_x64(True):
        rows = ProductRows(jac=jnp.asarray(jac), target=jnp.asarray(target))
        counts = jnp.zeros((1, 128))
        totals, _ = Dot().add(Dot().start(rows, counts), rows, counts)
    np.testing.assert_allclose(totals.grad, jac.astype(float) @ target, rtol=1e-14)
    np.testing.assert_allclose(totals.gram, jac.astype(float) @ jac.T.astype(float), rtol=1e-5)
