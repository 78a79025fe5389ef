"""Parameters that are functions of others: ``ties={"b": lambda a: 2 * a}``.

A tie is a Python function whose arguments name other parameters; it is traced with the model, so
derivatives of every order go through it.
"""

from __future__ import annotations

import graphlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nlsq_dask._typing import Array
from nlsq_dask.errors import UntraceableModelError
from nlsq_dask.require import shown

__all__ = ["Tie", "order_ties"]

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, kw_only=True)
class Tie:
    """``parameter = function(*arguments)``."""

    parameter: str
    arguments: tuple[str, ...]
    function: Callable[..., Any]

    def __call__(self, values: Mapping[str, Array]) -> Any:
        try:
            return self.function(**{name: values[name] for name in self.arguments})
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise UntraceableModelError(
                f"`ties[{self.parameter!r}]` must be traceable by JAX: write it with `jax.numpy`. "
                f"Calling it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error


def order_ties(
    ties: Mapping[str, Callable[..., Any]] | None,
    names: Sequence[str],
    taken: Mapping[str, Iterable[str]],
) -> tuple[Tie, ...]:
    """Read the functions' signatures, and put ties after those that they depend on.

    Parameters
    ----------
    ties : mapping
        Functions by the name of the parameter that they give.
    names : sequence of str
        The model's parameters.
    taken : mapping
        By argument (``p0``, ``bounds``, ``fixed``), the parameters that it names.

    Raises
    ------
    TypeError
        If `ties` is not a mapping of callables.
    ValueError
        If a name is unknown, a tied parameter is also started, bounded or fixed, or ties go
        round in a circle.
    """
    if ties is None:
        return ()
    if not isinstance(ties, Mapping):
        raise TypeError(f"`ties` must map names of parameters to functions, got {shown(ties)}")
    found = {}
    for name, function in ties.items():
        if name not in names:
            raise ValueError(
                f"`ties` must name parameters of the model, {list(names)}, got {shown(name)}"
            )
        arguments = _arguments(name, function, names)
        found[name] = Tie(parameter=name, arguments=arguments, function=function)
    for argument, given in taken.items():
        both = [name for name in given if name in found]
        if both:
            raise ValueError(
                f"`{argument}` must leave tied parameters alone, got {both[0]!r}, which `ties` "
                "gives"
            )
    graph = {
        name: [other for other in tie.arguments if other in found] for name, tie in found.items()
    }
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"`ties` must not go round in a circle, got {error.args[1]}") from None
    return tuple(found[name] for name in order)


def _arguments(name: str, function: object, names: Sequence[str]) -> tuple[str, ...]:
    """The parameters that a tie takes; an argument with a default of its own may be another."""
    if not callable(function):
        raise TypeError(
            f"`ties[{name!r}]` must be a function of other parameters, `lambda a: 2 * a` say, "
            f"got {shown(function)}"
        )
    try:
        given = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(
            f"`ties[{name!r}]` must have a signature that Python can read, got {shown(function)}; "
            "wrap it in a lambda"
        ) from None
    nameless = [str(argument) for argument in given if argument.kind not in _BY_NAME]
    if nameless:
        raise ValueError(
            f"`ties[{name!r}]` must take parameters by their names, got the argument {nameless[0]}"
        )
    taken = [
        argument.name
        for argument in given
        if argument.name in names or argument.default is inspect.Parameter.empty
    ]
    unknown = [argument for argument in taken if argument not in names]
    if unknown:
        raise ValueError(
            f"`ties[{name!r}]` must take parameters of the model, {list(names)}, got the "
            f"argument {unknown[0]!r}"
        )
    return tuple(taken)
