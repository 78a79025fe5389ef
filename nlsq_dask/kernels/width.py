"""How much room a model needs for each row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from nlsq_dask._typing import Array, Shape, abstract
from nlsq_dask.model import Model

__all__ = ["elements_per_row"]


def elements_per_row(model: Model, x_shapes: Sequence[Shape], params: Sequence[Array]) -> int:
    """Elements of the largest array that the model makes, over its rows; at least 1.

    Traced, never computed: 1 where each row looks a few parameters up, `n` where it is a sum
    over all of them. Reverse mode keeps such arrays for the way back.
    """
    rows = math.prod(max(axis) for axis in zip(*x_shapes, strict=True))
    with jax.enable_x64(True):
        x = [abstract(shape) for shape in x_shapes]
        closed = jax.make_jaxpr(model)(x, tuple(params))
    width: int = -(-_largest(closed.jaxpr) // max(rows, 1))
    return width


def _largest(jaxpr: Any) -> int:
    """Over all equations, those of inner functions included; at least 1."""
    sizes = [1]
    for equation in jaxpr.eqns:
        sizes += [math.prod(out.aval.shape) for out in equation.outvars]
        sizes += [_largest(inner) for inner in _inner(equation.params)]
    return max(sizes)


def _inner(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """JAX's own `jaxprs_in_params`, which is not public in all the releases allowed."""
    for value in params.values():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each
