"""What the kernel of the normal equations hands over, to be taken apart on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import numpy as np

from nlsq_dask._typing import Array, Float, Int
from nlsq_dask.kernels.counts import Counted, row_statistics
from nlsq_dask.kernels.products import Products
from nlsq_dask.normal_equations import NormalEquations, RowStatistics

__all__ = ["HandedSums"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class HandedSums:
    """The normal equations of a chunk in one vector.

    XLA takes 10 ms to compile each step that takes it apart, which NumPy does in microseconds.
    """

    sums: Float[Array, " sums"]
    extent: Int[Array, " d"]  # of the chunk, without its padding
    products: Products = field(metadata={"static": True})
    num_directions: int = field(metadata={"static": True})
    num_summed: int = field(metadata={"static": True})
    counted: tuple[Counted, ...] = field(metadata={"static": True})

    def finish(self) -> tuple[NormalEquations, RowStatistics]:
        """Wait for the sums, and put each where it belongs."""
        totals, counts = self.products.split(
            np.asarray(self.sums), self.num_directions, self.num_summed
        )
        counts = counts.reshape(len(self.counted), -1).sum(axis=1)
        target_sum, *robust = totals.sums
        residual_sum, square, cost = robust or (target_sum, totals.square, 0.5 * totals.square)
        num_real = math.prod(np.asarray(self.extent).tolist())
        rows = row_statistics(self.counted, counts, num_real, residual_sum, square)
        normal = NormalEquations(
            gram=totals.gram,
            grad=totals.grad,
            cost=np.asarray(cost),
            num_rows=num_real - rows.num_masked,
        )
        return normal, rows
