"""Nested values and dataclasses as JSON, and back to the same values.

Reading one from a stranger is safe: nothing in the text names a type of this program. What JSON
has no word for is an object with the key "!": a tuple, an array of numbers, a number that is not
finite.
"""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

__all__ = ["from_text", "to_text", "typed"]

_Value = TypeVar("_Value")

_TAG = "!"
_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "float32", "float64")


def to_text(value: Any) -> str:
    """JSON of dicts by text, lists, tuples, arrays, numbers, text, None and dataclasses.

    Raises
    ------
    TypeError
        If there is anything else in it.
    """
    return json.dumps(_encode(value), allow_nan=False, ensure_ascii=False)


def from_text(text: str) -> Any:
    """The value; a dataclass has become a dict of its fields.

    Raises
    ------
    ValueError
        If the text is not what `to_text` writes.
    """
    try:
        return _decode(json.loads(text))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is malformed ({type(error).__name__}: {error})") from None


def _encode(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _DTYPES:
            raise TypeError(f"an array of {value.dtype} cannot be written as JSON")
        items = [_encode(item) for item in value.ravel().tolist()]
        return {_TAG: "array", "dtype": value.dtype.name, "shape": value.shape, "items": items}
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and key != _TAG for key in value):
            raise TypeError(f"keys must be text, and not {_TAG!r}, got {list(value)}")
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: "number", "item": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: _decode(item) for key, item in value.items()}
    if kind == "tuple":
        return tuple(_decode(item) for item in value["items"])
    if kind == "array" and value["dtype"] in _DTYPES:
        items = [_decode(item) for item in value["items"]]
        return np.array(items, value["dtype"]).reshape(value["shape"])
    if kind == "number" and value["item"] in ("nan", "inf", "-inf"):
        return float(value["item"])
    raise ValueError(f"it has a value of kind {kind!r}, which is not known")


def typed(kind: type[_Value], value: Any) -> _Value:
    """The dataclass that `from_text` gave as a dict, with fields of the types that it declares.

    Raises
    ------
    ValueError
        If a field is missing, or of another type.
    """
    read: _Value = _typed("it", kind, value)
    return read


@functools.lru_cache(maxsize=64)
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(name: str, kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        rest = next(arm for arm in arguments if arm is not types.NoneType)
        return None if value is None else _typed(name, rest, value)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(f"{name}.{key}", arguments[1], item) for key, item in value.items()}
    if origin is tuple and isinstance(value, tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            items = zip(kinds, value, strict=True)
            return tuple(_typed(f"{name}[{i}]", *item) for i, item in enumerate(items))
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = _hints(kind)
        if set(value) == {field.name for field in fields(kind)}:
            return kind(**{key: _typed(f"{name}.{key}", hints[key], value[key]) for key in value})
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{name} must be of type {kind}, got {value!r:.100}")
