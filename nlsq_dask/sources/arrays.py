"""NumPy, JAX and Dask arrays in SciPy's layout as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nlsq_dask.errors import DataError
from nlsq_dask.require import array_of, shown
from nlsq_dask.sources.base import Column
from nlsq_dask.sources.columns import MemoryColumn
from nlsq_dask.sources.dask import DaskColumn, is_dask_array, require_plain_blocks
from nlsq_dask.sources.grid import GridSource

__all__ = ["build_array_source", "build_row_source", "require_finite"]

_DIM = "row"
_BLOCK_ROWS = 2**16


def build_array_source(xdata: Any, ydata: Any, sigma: Any = None) -> GridSource:
    """Rows of ``xdata`` of shape ``(m,)`` or ``(variables, m)`` and ``ydata`` of shape ``(m,)``.

    Raises
    ------
    ValueError
        If lengths differ, or an array is not of real numbers.
    DataError
        If there are no rows.
    """
    return _build(("xdata", _variables(xdata)), ("ydata", ydata), sigma)


def build_row_source(x: Any, y: Any, sigma: Any = None) -> tuple[GridSource, bool]:
    """Rows of `x` of shape ``(m,)`` or ``(m, variables)``, and whether it is the latter.

    Raises
    ------
    ValueError, DataError
        As `build_array_source`.
    """
    array = x if is_dask_array(x) else _real_numbers("x", x)
    if array.ndim not in (1, 2) or 0 in array.shape[1:]:
        raise ValueError(
            f"`x` must have shape (m,) or (m, variables), got shape {tuple(array.shape)}"
        )
    variables = [array] if array.ndim == 1 else list(array.T)
    return _build(("x", variables), ("y", y), sigma), array.ndim == 2


def _build(named_x: tuple[str, Sequence[Any]], named_y: tuple[str, Any], sigma: Any) -> GridSource:
    (x_name, parts), (y_name, values) = named_x, named_y
    y = _column(y_name, values)
    if len(y.shape) != 1:
        raise ValueError(f"`{y_name}` must be 1-d, got shape {y.shape}")
    if y.shape[0] == 0:
        raise DataError(f"`{y_name}` must not be empty!")
    x = tuple(_column(x_name, part) for part in parts)
    scale = None if sigma is None else _sigma(sigma, y.shape[0])
    for name, column in (*((x_name, column) for column in x), ("sigma", scale)):
        if column is not None and column.shape != y.shape:
            raise ValueError(
                f"`{name}` must have as many rows as `{y_name}`, {y.shape[0]}, "
                f"got shape {column.shape}"
            )
    return GridSource(
        variables=tuple(f"x{i}" for i in range(len(x))) if len(x) > 1 else ("x",),
        x=x,
        y=y,
        sigma=scale,
        leaf_shape=y.shape,
    )


def require_finite(source: GridSource) -> None:
    """Refuse NaN and infinity in arrays that are at hand; Dask arrays are looked at in passing.

    Raises
    ------
    ValueError
        Naming the array and its first row that is not finite.
    """
    named = [*(("xdata", column) for column in source.x), ("ydata", source.y)]
    if source.sigma is not None:
        named.append(("sigma", source.sigma))
    for name, column in named:
        if not column.is_in_memory:
            continue
        values = column.read((slice(None),))
        # In blocks: memory for as many answers as there are rows takes longer to get than they do.
        starts = range(0, len(values), _BLOCK_ROWS)
        if not all(np.isfinite(values[start : start + _BLOCK_ROWS]).all() for start in starts):
            bad = np.flatnonzero(~np.isfinite(values))
            raise ValueError(
                f"`{name}` must not contain infs or NaNs, got {bad.size:,} of them, the first in "
                f"row {int(bad[0]):,}; nan_policy='omit' leaves such rows out"
            )


def _variables(xdata: Any) -> Sequence[Any]:
    """The variables one by one."""
    if isinstance(xdata, tuple | list) and any(is_dask_array(part) for part in xdata):
        return xdata
    array = xdata if is_dask_array(xdata) else _real_numbers("xdata", xdata)
    if array.ndim == 1:
        return [array]
    if array.ndim == 2 and array.shape[0] > 0:
        return list(array)
    raise ValueError(
        f"`xdata` must have shape (m,) or (variables, m), got shape {tuple(array.shape)}"
    )


def _column(name: str, values: Any) -> Column:
    if is_dask_array(values):
        require_plain_blocks(name, values)
        if values.dtype.kind not in "iufb":
            raise ValueError(f"`{name}` must hold real numbers, got dtype {values.dtype}")
        return DaskColumn(array=values, dims=(_DIM,) * values.ndim)
    array = _real_numbers(name, values)
    return MemoryColumn(values=array, dims=(_DIM,) * array.ndim)


def _real_numbers(name: str, values: Any) -> np.ndarray:
    array = array_of(name, values)
    if array.dtype.kind not in "iufb":
        raise ValueError(
            f"`{name}` must hold real numbers, got dtype {array.dtype} of {shown(values)}"
        )
    return array


def _sigma(sigma: Any, num_rows: int) -> Column:
    column = _column("sigma", sigma)
    if len(column.shape) == 2 and column.shape == (num_rows, num_rows):
        raise ValueError(
            "`sigma` must have one standard deviation for each row; a full covariance couples "
            f"rows, which no single pass over chunks can undo, got shape {column.shape}"
        )
    if column.shape in ((), (1,)):
        value = np.broadcast_to(np.asarray(sigma, np.float64), (num_rows,))
        column = MemoryColumn(values=value, dims=(_DIM,))
    if column.is_in_memory:
        _require_positive(column.read((slice(None),) * len(column.shape)))
    return column


def _require_positive(sigma: np.ndarray) -> None:
    """As far as it can be seen before any row is read elsewhere."""
    bad = np.flatnonzero(sigma <= 0)
    if bad.size:
        raise DataError(
            f"`sigma` must be positive in every row, got {shown(sigma.flat[bad[0]])} in row "
            f"{int(bad[0]):,}"
        )
