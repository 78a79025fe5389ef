"""Telling models apart by what they compute: a digest of their traces.

Source code and identity say little: the same function may close over other numbers, and another
function object may be the same model, defined again in a notebook or unpickled in a worker. What
JAX traces is what is computed. The trace taken is of value, first and second derivative along a
direction, through ties: kernels need no other rule of differentiation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from nlsq_dask._typing import Array, Float, Shape, abstract
from nlsq_dask.model import Model
from nlsq_dask.parameters.space import ParameterSpace

__all__ = ["fingerprint_model"]

# Names of jitted functions and the mesh in force: the same computation under any.
_SAYS_NOTHING = ("name", "ctx_mesh")
# Whose rules of differentiation the trace has followed already, wherever they matter.
_WITH_RULES = ("custom_jvp_call", "custom_vjp_call")


def fingerprint_model(
    model: Model,
    space: ParameterSpace,
    patterns: Sequence[Sequence[Shape]],
    dtypes: Sequence[Any] = (np.float64,),
) -> str | None:
    """A digest of what the model computes; None where the trace does not tell.

    That is where it calls back to Python, or holds anything else that prints as an address.

    Parameters
    ----------
    model : Model
    space : ParameterSpace
        Names, shapes and ties count; starts, bounds and which parameters are fixed do not.
    patterns : sequence of sequences of shapes
        The variables' shapes to trace with, for each way in which they may broadcast.
    dtypes : sequence
        Of the arithmetic.
    """
    digest = hashlib.sha256(repr((space.names, space.shapes)).encode())
    try:
        for shapes in patterns:
            for dtype in dtypes:
                digest.update(_Reader().digest(_trace(model, space, shapes, dtype)))
    except _OpaqueError:
        return None
    # A rule of differentiation that cannot be traced: the kernels will say what is wrong.
    except (TypeError, ValueError, NotImplementedError):
        return None
    return digest.hexdigest()


def _trace(model: Model, space: ParameterSpace, shapes: Sequence[Shape], dtype: Any) -> ClosedJaxpr:
    def twice(
        x: tuple[Array, ...], params: Float[Array, " n"], along: Float[Array, " n"]
    ) -> tuple[Any, Any]:
        def once(params: Float[Array, " n"]) -> tuple[Any, Any]:
            return jax.jvp(lambda p: model(x, space.unflatten(p)), (params,), (along,))

        return jax.jvp(once, (params,), (along,))

    flat = abstract((space.size,), dtype)
    with jax.enable_x64(True):
        x = tuple(abstract(shape, dtype) for shape in shapes)
        return jax.make_jaxpr(twice)(x, flat, flat)


class _OpaqueError(Exception):
    """Part of a trace that is not data."""


class _Reader:
    """Digests of jaxprs, each read once however often it is called."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}

    def digest(self, closed: ClosedJaxpr) -> bytes:
        constants = [self._value(const) for const in closed.consts]
        return hashlib.sha256(repr((self._body(closed.jaxpr), constants)).encode()).digest()

    def _body(self, jaxpr: Jaxpr) -> bytes:
        if id(jaxpr) in self._known:
            return self._known[id(jaxpr)]
        if jaxpr.effects:
            raise _OpaqueError
        places: dict[Any, int] = {}

        def place(variable: Any) -> object:
            if isinstance(variable, Literal):
                return self._value(variable.val), str(variable.aval)
            return places.setdefault(variable, len(places)), str(variable.aval)

        digest = hashlib.sha256()
        for variable in (*jaxpr.constvars, *jaxpr.invars):
            digest.update(repr(place(variable)).encode())
        for equation in jaxpr.eqns:
            read = (
                equation.primitive.name,
                [place(variable) for variable in equation.invars],
                [place(variable) for variable in equation.outvars],
                self._options(equation.primitive.name, equation.params),
            )
            digest.update(repr(read).encode())
        digest.update(repr([place(variable) for variable in jaxpr.outvars]).encode())
        return self._known.setdefault(id(jaxpr), digest.digest())

    def _options(self, primitive: str, params: Mapping[str, Any]) -> object:
        if primitive in _WITH_RULES:
            params = {k: v for k, v in params.items() if isinstance(v, Jaxpr | ClosedJaxpr)}
        return [
            (key, self._value(value))
            for key, value in sorted(params.items())
            if key not in _SAYS_NOTHING
        ]

    def _value(self, value: Any) -> object:
        """What `repr` of the result says in full."""
        if isinstance(value, ClosedJaxpr):
            return self.digest(value)
        if isinstance(value, Jaxpr):
            return self._body(value)
        if isinstance(value, tuple | list):
            return [self._value(part) for part in value]
        if isinstance(value, Mapping):
            return sorted((repr(key), repr(self._value(part))) for key, part in value.items())
        if isinstance(value, np.ndarray | np.generic | jax.Array) or hasattr(value, "__array__"):
            return _array(value)
        if _is_primitive_of_jax(value):
            return type(value).__name__, list(map(str, value.in_avals)), self._value(value.params)
        text = repr(value)
        is_function = callable(value) and not isinstance(value, type)
        if is_function or re.search(r"\bat 0x[0-9a-f]+|\bobject\b", text):
            raise _OpaqueError
        return text


def _is_primitive_of_jax(value: Any) -> bool:
    """Whether it is an operation that JAX (since 0.12) passes as an object: `searchsorted`, say."""
    is_of_jax = type(value).__module__.partition(".")[0] == "jax"
    return is_of_jax and hasattr(value, "in_avals") and hasattr(value, "params")


def _array(value: Any) -> object:
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise _OpaqueError
    return array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest()
