"""The model on a block of rows: a module-level function of arrays, found by name on workers.

What is the same for all blocks, the pickled model above all, comes as an array beside them: it is
sent to a worker once, not inside every task.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np

from nlsq_dask._typing import Array, Float, Shape
from nlsq_dask.by_value import pickled_by_value
from nlsq_dask.model import Model
from nlsq_dask.recent import Recent
from nlsq_dask.sources.columns import TimeAxis

__all__ = ["Quantity", "RowTask", "pickled_model", "token_of"]

Quantity: TypeAlias = Literal["prediction", "standard_error"]

_COMPILED = Recent(32)


def pickled_model(model: Model, shapes: Sequence[Shape]) -> np.ndarray:
    """The model and the shapes of its parameters, as bytes."""
    with pickled_by_value(model.function), pickled_by_value(model.jac):
        payload = cloudpickle.dumps((model, tuple(shapes)))
    return np.frombuffer(payload, np.uint8)


def token_of(payload: np.ndarray) -> str:
    """What kernels of a pickled model are found by."""
    return hashlib.sha256(payload.tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Kernel:
    """A jitted function and the shapes that it has been compiled for."""

    function: Callable[..., Array]
    compiled: set[Hashable] = field(default_factory=set)
    compiling: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, x: Sequence[np.ndarray], given: Sequence[np.ndarray]) -> np.ndarray:
        shapes = tuple(block.shape for block in x)
        with jax.enable_x64(True):
            if shapes in self.compiled:
                return np.asarray(self.function(tuple(x), *given))
            with self.compiling:  # one thread does, the others of the process wait for it
                value = np.asarray(self.function(tuple(x), *given))
                self.compiled.add(shapes)
                return value


@dataclass(frozen=True, kw_only=True)
class RowTask:
    """Evaluates the model, or the error of its value, on a block.

    Parameters
    ----------
    quantity : {"prediction", "standard_error"}
    token : str
        Digest of the pickled model.
    axes : tuple of tuples
        For each variable, which axes of the block its own are; it is broadcast along the others.
    times : tuple
        For each variable, how times become numbers, or None.
    full_shape : tuple
        Of the largest block, to which others are padded: one shape compiles once.
    """

    quantity: Quantity
    token: str
    axes: tuple[tuple[int, ...], ...]
    times: tuple[TimeAxis | None, ...]
    full_shape: Shape

    def __call__(self, *arrays: np.ndarray) -> Float[np.ndarray, ...]:
        """The blocks of the variables, the pickled model, and what the kernel needs beside."""
        variables, (payload, *given) = arrays[: len(self.axes)], arrays[len(self.axes) :]
        aligned = [
            self._align(block if time is None else time.to_numbers(block), axes)
            for block, axes, time in zip(variables, self.axes, self.times, strict=True)
        ]
        shape = np.broadcast_shapes(*(block.shape for block in aligned))
        if 0 in shape:
            return np.zeros(shape)
        padded = [self._pad(*pair) for pair in zip(aligned, self.axes, strict=True)]
        kernel = _COMPILED.get((self.quantity, self.token), lambda: self._build(payload))
        value = kernel(padded, given)
        return value[tuple(map(slice, shape))]

    def _align(self, block: np.ndarray, axes: tuple[int, ...]) -> Float[np.ndarray, ...]:
        """As float64, with a length of one along the axes that the variable does not have."""
        shape = [1] * len(self.full_shape)
        for axis, length in zip(axes, block.shape, strict=True):
            shape[axis] = length
        return block.astype(np.float64).reshape(shape)

    def _pad(self, block: Float[np.ndarray, ...], axes: Sequence[int]) -> Float[np.ndarray, ...]:
        """Up to the full shape along its own axes, by repeating the last values."""
        missing = [
            (0, self.full_shape[axis] - length if axis in axes else 0)
            for axis, length in enumerate(block.shape)
        ]
        return np.pad(block, missing, mode="edge") if any(map(any, missing)) else block

    def _build(self, payload: np.ndarray) -> _Kernel:
        model, shapes = cloudpickle.loads(payload.tobytes())
        kernel = _predict if self.quantity == "prediction" else _standard_error

        def named(x: tuple[Array, ...], *given: Array) -> Array:
            return kernel(model, shapes, x, *given)

        named.__name__ = f"nlsq_{self.quantity}"
        return _Kernel(function=jax.jit(named))


def _predict(
    model: Model, shapes: Sequence[Shape], x: tuple[Array, ...], params: Float[Array, " n"]
) -> Float[Array, ...]:
    """The model, over the shape that its variables have together."""
    parts, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        parts.append(params[start : start + size].reshape(shape))
        start += size
    return jnp.broadcast_to(model(x, parts), jnp.broadcast_shapes(*(part.shape for part in x)))


def _standard_error(
    model: Model,
    shapes: Sequence[Shape],
    x: tuple[Array, ...],
    params: Float[Array, " n"],
    factor: Float[Array, "r n"],
    undetermined: Float[Array, "u n"],
) -> Float[Array, ...]:
    """``|factor gradᵀ|`` row by row, without the Jacobian: one direction after the other.

    Infinite where the model moves along one of `undetermined`.
    """

    def value(params: Float[Array, " n"]) -> Float[Array, ...]:
        return _predict(model, shapes, x, params)

    at, push = jax.linearize(value, params)

    def add(total: Any, direction: Any) -> tuple[Any, None]:
        return total + push(direction) ** 2, None

    def mark(moved: Any, direction: Any) -> tuple[Any, None]:
        return moved | (push(direction) != 0), None

    variance, _ = jax.lax.scan(add, jnp.zeros_like(at), factor)
    moves, _ = jax.lax.scan(mark, jnp.zeros_like(at, bool), undetermined)
    return jnp.where(moves, jnp.inf, jnp.sqrt(variance))
