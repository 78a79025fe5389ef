"""What is asked of arguments at any door, and how an error shows what arrived instead."""

from __future__ import annotations

import inspect
import math
import os
import reprlib
from collections.abc import Iterable, Sequence, Sized
from numbers import Integral, Real
from typing import Any

import numpy as np

from nlsq_dask._typing import Vector

__all__ = [
    "array_of",
    "as_number",
    "is_scale",
    "length_of",
    "real_array",
    "require_callback",
    "require_choice",
    "require_flag",
    "require_integer",
    "require_path",
    "require_positive",
    "shown",
]

_MOST_DIGITS = 30
_MOST_ELEMENTS = 10**7  # of what is no array
_FEW_ELEMENTS = 1000


class _Short(reprlib.Repr):
    """`reprlib`'s, which also survives what raises in its own ``__repr__``."""

    def __init__(self) -> None:
        super().__init__()
        self.maxother = self.maxstring = 120
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out integers of more than 4,300 digits.
        if abs(x) < 10**_MOST_DIGITS:
            return repr(x)
        return f"an integer of {x.bit_length():,} bits"


_SHORT = _Short()


def shown(value: object) -> str:
    """A value in one short line, whatever it is; a number without its type's name around it."""
    if isinstance(value, np.bool_ | np.number):
        value = value.item()
    return " ".join(_SHORT.repr(value).split())


def as_number(value: Any) -> float | None:
    """A real number as a float, infinite where it is too large; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number: Any = value
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def is_scale(value: float) -> bool:
    """Whether a number is positive, and its square and that one's inverse are too."""
    return 0.0 < value < math.inf and 0.0 < value * value < math.inf and 1 / (value * value) > 0


def require_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    # An array is equal to a text element by element.
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {shown(value)}")


def require_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}")


def require_integer(name: str, value: Any, smallest: int) -> None:
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < smallest:
        raise ValueError(f"`{name}` must be an integer >= {smallest}, got {shown(value)}")


def require_positive(name: str, value: Any) -> None:
    number = as_number(value)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"`{name}` must be a positive finite number, got {shown(value)}")


def require_path(name: str, value: Any) -> str:
    """The path as text.

    Raises
    ------
    TypeError, ValueError
        If it is none, or one that no file can have.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a path, got {shown(value)}")
    if not text or "\0" in text:
        raise ValueError(f"`{name}` must be a path that a file can have, got {shown(text)}")
    return text


def require_callback(callback: Any) -> None:
    """Refuse what cannot be called with one argument, as far as its signature says."""
    if callback is None:
        return
    if not callable(callback):
        raise TypeError(f"`callback` must be callable, got {shown(callback)}")
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(None)
    except TypeError:
        raise TypeError(
            f"`callback` must take one argument, an IterationRecord, got {shown(callback)} "
            f"that takes {signature}"
        ) from None


def array_of(name: str, value: Any) -> np.ndarray:
    """A value as an array, of whatever dtype.

    Raises
    ------
    ValueError
        If it is ragged, something that does not become an array, or has masked elements; or
        longer than a list can sensibly be: a `range` becomes as many numbers as it promises.
    """
    for part in (value, *_elements(value)):
        if not isinstance(part, np.ndarray) and length_of(part) > _MOST_ELEMENTS:
            raise ValueError(
                f"`{name}` must have at most {_MOST_ELEMENTS:,} elements where it is no array, "
                f"got {shown(part)}"
            )
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"`{name}` must be a number or an array of one shape, got {shown(value)}: {error}"
        ) from None
    require_unmasked(name, value)
    return array


def _elements(value: Any) -> Iterable[Any]:
    """Those of a short sequence, which may be sequences themselves."""
    is_list = isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.dtype.kind == "O" and value.ndim > 0
    )
    return value if is_list and len(value) <= _FEW_ELEMENTS else ()


def length_of(value: Any) -> float:
    """Its length, infinite where it is too large for an index; 0 of what has none."""
    if not isinstance(value, Sized):
        return 0
    try:
        return len(value)
    except OverflowError:  # of a range
        return math.inf
    except (TypeError, ValueError):  # of an array without dimensions, or of unknown length
        return 0


def require_unmasked(name: str, value: Any) -> None:
    """Refuse masked elements: an array of NumPy would have what lies under the mask."""
    if np.ma.is_masked(value):
        raise ValueError(
            f"`{name}` must have no masked elements, got {int(np.ma.getmaskarray(value).sum()):,}; "
            f"`{name}.filled(np.nan)` makes them values that are missing"
        )


def real_array(name: str, value: Any) -> Vector:
    """A value as an array of float64; integers and fractions of any size among them.

    Raises
    ------
    ValueError
        If it is not of real numbers.
    """
    array = array_of(name, value)
    if array.dtype.kind == "O":
        numbers = [as_number(element) for element in array.flat]
        if None not in numbers:
            return np.array(numbers, np.float64).reshape(array.shape)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"`{name}` must be real numbers, got {shown(value)}")
    with np.errstate(over="ignore"):  # of longer floats, to infinity
        return array.astype(np.float64)
