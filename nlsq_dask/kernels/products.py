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

__all__ = ["ProductRows", "Products", "Totals", "Way", "products_for"]

Way: TypeAlias = Literal["lanes", "dot", "sweep"]

_LANES = 128
_PER_LANE = 8  # products that are added before they reach their lane
_BLOCK = _LANES * _PER_LANE
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
    """A way to take products and to sum them."""

    def start(self, rows: ProductRows) -> Any:
        """Nothing yet, for rows of which only shapes and dtypes are known."""

    def add(self, carry: Any, rows: ProductRows) -> Any: ...

    def finish(self, carry: Any) -> Totals: ...


@dataclass(frozen=True)
class Dot:
    """One matrix product for each tile."""

    def start(self, rows: ProductRows) -> Totals:
        k = len(rows.jac)
        zero = jnp.zeros(())
        sums = (zero,) * (1 + len(rows.summed))
        return Totals(gram=jnp.zeros((k, k)), grad=jnp.zeros(k), square=zero, sums=sums)

    def add(self, carry: Totals, rows: ProductRows) -> Totals:
        new = Totals(
            gram=rows.jac @ rows.jac.T,
            # The gradient decides where the fit ends: in mixed precision it stays in float64.
            grad=rows.jac.astype(rows.target.dtype) @ rows.target,
            square=_sum(rows.target**2),
            sums=tuple(_sum(part) for part in (rows.target, *rows.summed)),
        )
        added: Totals = jax.tree.map(lambda total, part: total + part, carry, new)
        return added

    def finish(self, carry: Totals) -> Totals:
        return carry


def _sum(row: Float[Array, " rows"]) -> Float[Array, ""]:
    """In lanes, as far as they go."""
    whole = len(row) - len(row) % _BLOCK
    blocks = row[:whole].reshape(-1, _PER_LANE, _LANES)
    in_lanes = sum(blocks[:, i] for i in range(_PER_LANE))
    return jnp.sum(jnp.sum(in_lanes, axis=0)) + jnp.sum(row[whole:])


@dataclass(frozen=True)
class Sweep:
    """A reduction for each pair of columns, beside each other."""

    def start(self, rows: ProductRows) -> Totals:
        return Dot().start(rows)

    def add(self, carry: Totals, rows: ProductRows) -> Totals:
        k = len(rows.jac)
        gram = jnp.asarray(carry.gram)
        for i, j in itertools.combinations_with_replacement(range(k), 2):
            gram = gram.at[i, j].add(jnp.sum(rows.jac[i] * rows.jac[j]))
        columns = rows.jac.astype(rows.target.dtype)
        return Totals(
            gram=gram,
            grad=carry.grad + jnp.stack([jnp.sum(column * rows.target) for column in columns]),
            square=carry.square + jnp.sum(rows.target**2),
            sums=tuple(
                total + jnp.sum(part)
                for total, part in zip(carry.sums, (rows.target, *rows.summed), strict=True)
            ),
        )

    def finish(self, carry: Totals) -> Totals:
        return carry._replace(gram=_symmetric(carry.gram))


class _Lanes(NamedTuple):
    """The rows of the latest tile, in memory, and the sums in lanes."""

    buffer: Float[Array, "columns padded"]  # jac, target, and what is only summed
    gram: tuple[Float[Array, "group columns lanes"], ...]  # of jac and target together
    sums: Float[Array, "summed lanes"]


@dataclass(frozen=True)
class Lanes:
    """Sums in lanes, of columns of one precision.

    A reduction is one scalar addition after the other, since its order is fixed, and the
    product of a flat matrix by itself is what matrix products are worst at. Sums in lanes are
    additions of vectors. Rows are written to memory that stays in cache first, because XLA would
    otherwise compute them again for each product, and column by column, because it does not
    vectorise a concatenation.
    """

    def start(self, rows: ProductRows) -> _Lanes:
        k, num_rows = rows.jac.shape
        padded = -(-num_rows // _BLOCK) * _BLOCK
        summed = 1 + len(rows.summed)
        return _Lanes(
            buffer=jnp.zeros((k + summed, padded), rows.jac.dtype),
            gram=tuple(jnp.zeros((len(g), k + 1 - g.start, _LANES)) for g in _groups(k + 1)),
            sums=jnp.zeros((summed, _LANES)),
        )

    def add(self, carry: _Lanes, rows: ProductRows) -> _Lanes:
        k = len(rows.jac)
        buffer = lax.dynamic_update_slice(carry.buffer, rows.jac, (0, 0))
        for i, part in enumerate((rows.target, *rows.summed)):
            buffer = lax.dynamic_update_slice(buffer, part[None], (k + i, 0))

        def add_block(number: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            gram, sums = carry
            block = lax.dynamic_slice_in_dim(buffer, number * _BLOCK, _BLOCK, axis=1)
            part = block.reshape(len(buffer), _PER_LANE, _LANES)
            gram = tuple(
                total
                + sum(
                    part[group.start : group.stop, None, i] * part[None, group.start : k + 1, i]
                    for i in range(_PER_LANE)
                )
                for group, total in zip(_groups(k + 1), gram, strict=True)
            )
            return gram, sums + sum(part[k:, i] for i in range(_PER_LANE))

        num_blocks = buffer.shape[1] // _BLOCK
        gram, sums = lax.fori_loop(0, num_blocks, add_block, (carry.gram, carry.sums))
        return _Lanes(buffer, gram, sums)

    def finish(self, carry: _Lanes) -> Totals:
        """All lanes in one sum: each step of its own would take a while to compile."""
        k = len(carry.buffer) - len(carry.sums)
        lanes = [group.reshape(-1, _LANES) for group in (*carry.gram, carry.sums)]
        totals = jnp.sum(jnp.concatenate(lanes), axis=-1)
        where = _where(k + 1)
        first = sum(map(len, lanes[:-1]))
        return Totals(
            gram=totals[where[:k, :k]],
            grad=totals[where[:k, k]],
            square=totals[where[k, k]],
            sums=tuple(totals[first + i] for i in range(len(carry.sums))),
        )


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


def _symmetric(upper: Float[Array, "k k"]) -> Float[Array, "k k"]:
    return jnp.triu(upper) + jnp.triu(upper, 1).T


_PRODUCTS: Mapping[Way, Products] = {"lanes": Lanes(), "dot": Dot(), "sweep": Sweep()}


def products_for(way: Way, precision: Precision) -> Products:
    """The way that was planned; sums in lanes are for columns of one precision."""
    return Dot() if way == "lanes" and precision == "mixed" else _PRODUCTS[way]
