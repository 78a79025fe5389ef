"""Frozen dataclasses as flat mappings of names to arrays and strings, and back.

The annotations are the schema: what is read has the dtypes and shapes that the fields declare,
or is refused. Nothing in the mapping names a type, so that reading one can only ever build what
was asked for.

A tuple of dataclasses is stored by columns. An optional field that is None is left out.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import jaxtyping
import numpy as np

from nlsq_dask._typing import Bool, Float, Int
from nlsq_dask.errors import CheckpointError

__all__ = ["Leaf", "flatten", "read_fields", "unflatten"]

_Value = TypeVar("_Value")

Leaf: TypeAlias = np.ndarray[Any, Any] | str

_SCALARS = {bool: np.bool_, int: np.int64, float: np.float64}
_ARRAYS: dict[Any, Any] = {Bool: np.bool_, Int: np.int64, Float: np.float64}


def flatten(value: Any, only: Collection[str] | None = None) -> dict[str, Leaf]:
    """Leaves by dotted name. Fields of the root must be of types that `unflatten` can read.

    `only` names the fields that are wanted; by default all.
    """
    return {
        name: leaf
        for field, kind in _fields(type(value))
        if only is None or field in only
        for name, leaf in _encode(field, kind, getattr(value, field))
    }


def unflatten(kind: type[_Value], leaves: Mapping[str, Leaf], lengths: Mapping[str, int]) -> _Value:
    """The dataclass whose leaves these are.

    Parameters
    ----------
    kind : type
    leaves : mapping
    lengths : mapping
        Of the axes that annotations name, as far as they are known. Others have to agree with
        each other.

    Raises
    ------
    CheckpointError
        If a leaf is missing, or of another type or shape than its annotation says.
    """
    return kind(**read_fields(kind, leaves, lengths))


def read_fields(
    kind: type,
    leaves: Mapping[str, Leaf],
    lengths: Mapping[str, int],
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Some of its fields, by name; see `unflatten`."""
    reader = _Reader(leaves, dict(lengths))
    return {
        field: reader.read(field, hint)
        for field, hint in _fields(kind)
        if only is None or field in only
    }


@functools.lru_cache(maxsize=64)
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fields(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = _hints(kind)
    return tuple((field.name, hints[field.name]) for field in fields(kind) if field.init)


# -- annotations


def _split_optional(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether None was among them."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    arms = [arm for arm in get_args(kind) if arm is not type(None)]
    # One array of NumPy's or JAX's: read as NumPy's.
    return arms[0], len(arms) < len(get_args(kind))


def _item_of(kind: Any) -> Any:
    """What a tuple of any length holds; None for another type."""
    if get_origin(kind) is tuple and get_args(kind)[1:] == (...,):
        return get_args(kind)[0]
    return None


def _array_of(kind: Any) -> tuple[Any, list[str]] | None:
    """dtype and axes of an annotated array; None for another type."""
    if isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractArray):
        return _ARRAYS[kind.dtype], str(kind.dim_str).split()
    return None


def _is_record(kind: Any) -> bool:
    return is_dataclass(kind)


def _is_text(kind: Any) -> bool:
    is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
    return kind is str or is_enum or get_origin(kind) is Literal


# -- out


def _encode(name: str, kind: Any, value: Any) -> Iterator[tuple[str, Leaf]]:
    kind, _ = _split_optional(kind)
    item = _item_of(kind)
    if value is None:
        return
    if _is_record(kind):
        for field, hint in _fields(kind):
            yield from _encode(f"{name}.{field}", hint, getattr(value, field))
    elif item is not None and _is_record(item):
        for field, hint in _fields(item):
            yield f"{name}.{field}", _column(hint, [getattr(row, field) for row in value])
    elif item is not None:
        yield name, np.array(value, _SCALARS[item])
    else:
        yield name, _leaf(kind, value)


def _column(kind: Any, values: Sequence[Any]) -> np.ndarray:
    kind, _ = _split_optional(kind)
    array = _array_of(kind)
    return np.array(values, _SCALARS[kind] if array is None else array[0])


def _leaf(kind: Any, value: Any) -> Leaf:
    if _is_text(kind):
        return value.name if isinstance(value, enum.Enum) else str(value)
    array = _array_of(kind)
    return np.array(value, _SCALARS[kind] if array is None else array[0])


# -- in


class _Reader:
    def __init__(self, leaves: Mapping[str, Leaf], lengths: dict[str, int]) -> None:
        self._leaves = leaves
        self._lengths = lengths

    def read(self, name: str, kind: Any) -> Any:
        kind, is_optional = _split_optional(kind)
        item = _item_of(kind)
        if is_optional and not self._is_there(name):
            return None
        if _is_record(kind):
            given = {field: self.read(f"{name}.{field}", hint) for field, hint in _fields(kind)}
            return kind(**given)
        if item is not None and _is_record(item):
            return self._rows(name, item)
        if item is not None:
            return tuple(self._array(name, _SCALARS[item], ["_"]).tolist())
        if _is_text(kind):
            return self._text(name, kind)
        array = _array_of(kind)
        if array is not None:
            return self._array(name, *array)
        return kind(self._array(name, _SCALARS[kind], []).item())

    def _is_there(self, name: str) -> bool:
        return any(key == name or key.startswith(f"{name}.") for key in self._leaves)

    def _rows(self, name: str, item: Any) -> tuple[Any, ...]:
        columns = {}
        for field, hint in _fields(item):
            kind, _ = _split_optional(hint)
            array = _array_of(kind)
            dtype, axes = (_SCALARS[kind], []) if array is None else array
            columns[field] = (kind, self._array(f"{name}.{field}", dtype, [f"{name}[]", *axes]))
        return tuple(
            item(**{field: _cell(kind, column[i]) for field, (kind, column) in columns.items()})
            for i in range(self._lengths[f"{name}[]"])
        )

    def _text(self, name: str, kind: Any) -> Any:
        text = self._leaves.get(name)
        if not isinstance(text, str):
            raise CheckpointError(f"its {name!r} is not text")
        choices = get_args(kind)
        if choices and text not in choices:
            raise CheckpointError(f"its {name!r} must be one of {list(choices)}, got {text!r}")
        if not issubclass(str if choices else kind, enum.Enum):
            return text
        if text not in kind.__members__:
            raise CheckpointError(f"its {name!r} is none of a {kind.__name__}, got {text!r}")
        return kind[text]

    def _array(self, name: str, dtype: Any, axes: Sequence[str]) -> np.ndarray:
        array = self._leaves.get(name)
        if not isinstance(array, np.ndarray) or array.dtype != np.dtype(dtype):
            raise CheckpointError(f"its {name!r} is not of {np.dtype(dtype).name} numbers")
        # Whole numbers count or point at something: limits would never be met from below zero.
        if array.dtype.kind == "i" and (array < 0).any():
            raise CheckpointError(f"its {name!r} must not be negative, got {int(array.min())}")
        is_empty = array.ndim > 0 and array.shape[0] == 0 and axes[:1] == [f"{_stem(name)}[]"]
        if is_empty:  # columns of nothing have no further axes
            self._lengths.setdefault(axes[0], 0)
            axes = [axes[0], *map(str, array.shape[1:])]
        fits = array.ndim == len(axes) and all(
            length == (int(axis) if axis.isdigit() else self._lengths.setdefault(axis, length))
            for axis, length in zip(axes, array.shape, strict=True)
            if axis != "_"
        )
        if not fits:
            raise CheckpointError(f"its {name!r} has the wrong shape, {array.shape}")
        return array


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _cell(kind: Any, value: Any) -> Any:
    return kind(value) if kind in _SCALARS else value
