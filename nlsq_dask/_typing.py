"""Aliases for annotations. ``m`` counts rows, ``n`` parameters, ``k`` free parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["Array", "Bool", "Float", "Index", "Int", "ModelFunction", "Shape", "Vector", "abstract"]

Array: TypeAlias = np.ndarray[Any, Any] | jax.Array
Vector: TypeAlias = np.ndarray[tuple[Any, ...], np.dtype[np.float64]]
Shape: TypeAlias = tuple[int, ...]
Index: TypeAlias = tuple[slice, ...]
ModelFunction: TypeAlias = Callable[..., Any]


def abstract(shape: Shape, dtype: Any = np.float64) -> Any:
    """An array that has only a shape and a dtype, to trace with."""
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]
