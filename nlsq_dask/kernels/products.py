"""Products of a tile's rows, summed from tile to tile: most of a kernel's work beside the model.

What XLA makes of them depends on how they are put, so there is more than one way:

=======  ============================================================================  ==========
lanes    row ``i`` is added to lane ``i mod 128``, element by element, and the lanes   CPU, few
         are added at the end: additions beside each other, not one after the other    parameters
dot      a matrix product for each tile                                                CPU, more
sweep    a reduction for each pair of parameters, which XLA fuses on a GPU into one    GPU, few
         sweep over the rows that keeps no Jacobian                                    parameters
=======  ============================================================================  ==========
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nlsq_dask._typing import Array, Float, Int
from nlsq_dask.config import Precision

__all__ = ["LANES", "ProductRows", "Products", "Totals", "Way", "products_for"]

Way: TypeAlias = Literal["lanes", "dot", "sweep"]
Counts: TypeAlias = Float[Array, "counted lanes"]  # lanes: a multiple of `LANES`

LANES = 128
_PER_LANE = 8  # products that are added before they reach their lane
_BLOCK = LANES * _PER_LANE
_GROUPS = 3  # of columns, multiplied with all that follow: each is compiled by itself


class ProductRows(NamedTuple):
    """What is multiplied, and what is only summed, over the rows of a tile.

    `jac` may be of lower precision than the rest.
    """

    jac: Float[Array, "k rows"]
    target: Float[Array, " rows"]
    summed: tuple[Float[Array, " rows"], ...] = ()


class Totals(NamedTuple):
    """Sums over all rows, in float64."""

    gram: Float[Array, "k k"]  # Σ jac jacᵀ
    grad: Float[Array, " k"]  # Σ jac target
    square: Float[Array, ""]  # Σ target²
    sums: tuple[Float[Array, ""], ...]  # of the target, and of what is only summed


class Products(Protocol):
    """A way to take products and to sum them, beside counts that are sums already."""

    def start(self, rows: ProductRows, counts: Counts) -> Any:
        """Nothing yet, for rows and counts of which only shapes and dtypes are known."""

    def add(self, carry: Any, rows: ProductRows, counts: Counts) -> Any: ...

    def finish(self, carry: Any) -> Float[Array, " sums"]:
        """All in one vector: what takes it apart would take a while to compile."""

    def split(
        self, sums: Float[np.ndarray, " sums"], k: int, num_summed: int
    ) -> tuple[Totals, Float[np.ndarray, " counts"]]:
        """What the vector holds, on the host; each count may be in several parts yet."""


@dataclass(frozen=True)
class Dot:
    """One matrix product for each tile."""

    def start(self, rows: ProductRows, counts: Counts) -> tuple[Totals, Counts]:
        k = len(rows.jac)
        zero = jnp.zeros(())
        sums = (zero,) * (1 + len(rows.summed))
        totals = Totals(gram=jnp.zeros((k, k)), grad=jnp.zeros(k), square=zero, sums=sums)
        return totals, jnp.zeros(counts.shape)

    def add(
        self, carry: tuple[Totals, Counts], rows: ProductRows, counts: Counts
    ) -> tuple[Totals, Counts]:
        new = Totals(
            gram=rows.jac @ rows.jac.T,
            # The gradient decides where the fit ends: in mixed precision it stays in float64.
            grad=rows.jac.astype(rows.target.dtype) @ rows.target,
            square=_sum(rows.target**2),
            sums=tuple(_sum(part) for part in (rows.target, *rows.summed)),
        )
        added: tuple[Totals, Counts] = jax.tree.map(
            lambda total, part: total + part, carry, (new, counts)
        )
        return added

    def finish(self, carry: tuple[Totals, Counts]) -> Float[Array, " sums"]:
        totals, counts = carry
        parts = (totals.gram, totals.grad, totals.square, *totals.sums, jnp.sum(counts, axis=-1))
        return jnp.concatenate([jnp.ravel(part) for part in parts])

    def split(
        self, sums: Float[np.ndarray, " sums"], k: int, num_summed: int
    ) -> tuple[Totals, Float[np.ndarray, " counts"]]:
        ends = np.cumsum([k**2, k, 1, num_summed])
        gram, grad, square, summed, counts = np.split(sums, ends)
        return Totals(gram.reshape(k, k), grad, square[0], tuple(summed)), counts


def _sum(row: Float[Array, " rows"]) -> Float[Array, ""]:
    """In lanes, as far as they go."""
    whole = len(row) - len(row) % _BLOCK
    blocks = row[:whole].reshape(-1, _PER_LANE, LANES)
    in_lanes = sum(blocks[:, i] for i in range(_PER_LANE))
    return jnp.sum(jnp.sum(in_lanes, axis=0)) + jnp.sum(row[whole:])


@dataclass(frozen=True)
class Sweep(Dot):
    """A reduction for each pair of columns, beside each other."""

    def add(
        self, carry: tuple[Totals, Counts], rows: ProductRows, counts: Counts
    ) -> tuple[Totals, Counts]:
        before, counted = carry
        k = len(rows.jac)
        gram = jnp.asarray(before.gram)
        for i, j in itertools.combinations_with_replacement(range(k), 2):
            gram = gram.at[i, j].add(jnp.sum(rows.jac[i] * rows.jac[j]))
        columns = rows.jac.astype(rows.target.dtype)
        totals = Totals(
            gram=gram,
            grad=before.grad + jnp.stack([jnp.sum(column * rows.target) for column in columns]),
            square=before.square + jnp.sum(rows.target**2),
            sums=tuple(
                total + jnp.sum(part)
                for total, part in zip(before.sums, (rows.target, *rows.summed), strict=True)
            ),
        )
        return totals, counted + counts

    def split(
        self, sums: Float[np.ndarray, " sums"], k: int, num_summed: int
    ) -> tuple[Totals, Float[np.ndarray, " counts"]]:
        totals, counts = super().split(sums, k, num_summed)
        upper = totals.gram
        return totals._replace(gram=np.triu(upper) + np.triu(upper, 1).T), counts


class _Lanes(NamedTuple):
    """The rows of the latest tile, in memory, and the sums in lanes.

    Lines of sums: products of jac and target, group after group; the target and what is only
    summed; counts. They are one array, since XLA takes a while to compile each that it has to
    fill with zeros.
    """

    buffer: Float[Array, "columns padded"]  # jac, target, and what is only summed
    sums: Float[Array, "lines lanes"]


@dataclass(frozen=True)
class Lanes:
    """Sums in lanes, of columns of one precision.

    A reduction is one scalar addition after the other, since its order is fixed, and the
    product of a flat matrix by itself is what matrix products are worst at. Sums in lanes are
    additions of vectors. Rows are written to memory that stays in cache first, because XLA would
    otherwise compute them again for each product, and column by column, because it does not
    vectorise a concatenation.
    """

    def start(self, rows: ProductRows, counts: Counts) -> _Lanes:
        k, num_rows = rows.jac.shape
        padded = -(-num_rows // _BLOCK) * _BLOCK
        num_columns = k + 1 + len(rows.summed)
        num_counts = math.prod(counts.shape) // LANES
        num_lines = _num_products(k + 1) + num_columns - k + num_counts
        return _Lanes(
            buffer=jnp.zeros((num_columns, padded), rows.jac.dtype),
            sums=jnp.zeros((num_lines, LANES)),
        )

    def add(self, carry: _Lanes, rows: ProductRows, counts: Counts) -> _Lanes:
        k = len(rows.jac)
        buffer = lax.dynamic_update_slice(carry.buffer, rows.jac, (0, 0))
        for i, part in enumerate((rows.target, *rows.summed)):
            buffer = lax.dynamic_update_slice(buffer, part[None], (k + i, 0))
        counted = counts.reshape(-1, LANES)
        sums = _add_lines(carry.sums, len(carry.sums) - len(counted), counted)

        def add_block(number: Array, sums: Array) -> Array:
            block = lax.dynamic_slice_in_dim(buffer, number * _BLOCK, _BLOCK, axis=1)
            part = block.reshape(len(buffer), _PER_LANE, LANES)
            first = 0
            for group in _groups(k + 1):
                products = sum(
                    part[group.start : group.stop, None, i] * part[None, group.start : k + 1, i]
                    for i in range(_PER_LANE)
                )
                lines = jnp.asarray(products).reshape(-1, LANES)
                sums = _add_lines(sums, first, lines)
                first += len(lines)
            return _add_lines(sums, first, sum(part[k:, i] for i in range(_PER_LANE)))

        num_blocks = buffer.shape[1] // _BLOCK
        return _Lanes(buffer, lax.fori_loop(0, num_blocks, add_block, sums))

    def finish(self, carry: _Lanes) -> Float[Array, " sums"]:
        return jnp.sum(carry.sums, axis=-1)

    def split(
        self, sums: Float[np.ndarray, " sums"], k: int, num_summed: int
    ) -> tuple[Totals, Float[np.ndarray, " counts"]]:
        where = _where(k + 1)
        first = _num_products(k + 1)
        totals = Totals(
            gram=sums[where[:k, :k]],
            grad=sums[where[:k, k]],
            square=sums[where[k, k]],
            sums=tuple(sums[first : first + num_summed]),
        )
        return totals, sums[first + num_summed :]


def _add_lines(
    sums: Float[Array, "lines lanes"], first: int, lines: Any
) -> Float[Array, "lines lanes"]:
    """In place, for so XLA compiles it."""
    changed = sums[first : first + len(lines)] + lines
    return lax.dynamic_update_slice(sums, changed, (first, 0))


@functools.cache
def _where(k: int) -> Int[np.ndarray, "k k"]:
    """Where each product of two columns is among those of the groups, one after the other."""
    where = np.zeros((k, k), np.int32)
    begin = 0
    for group in _groups(k):
        width = k - group.start
        for i in group:
            where[i, group.start :] = begin + np.arange(width)
            begin += width
    return np.triu(where) + np.triu(where, 1).T


def _groups(k: int) -> Sequence[range]:
    size = math.ceil(k / _GROUPS)
    return [range(start, min(start + size, k)) for start in range(0, k, size)]


def _num_products(k: int) -> int:
    """Of the columns of each group with those from its first on."""
    return sum(len(group) * (k - group.start) for group in _groups(k))


_PRODUCTS: Mapping[Way, Products] = {"lanes": Lanes(), "dot": Dot(), "sweep": Sweep()}


def products_for(way: Way, precision: Precision) -> Products:
    """The way that was planned; sums in lanes are for columns of one precision."""
    return Dot() if way == "lanes" and precision == "mixed" else _PRODUCTS[way]
