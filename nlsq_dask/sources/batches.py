"""Batches of rows that come once, kept in a Zarr store until they are fitted.

A fit passes over its rows several times and a stream does not come back, so batches are spooled:
every row is written once, and the fit is that of all rows. There is one array for each variable,
`y` and `sigma`, in chunks that are leaves of the plan; what does not fill a chunk waits in memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from nlsq_dask.errors import DataError, SpoolLimitError
from nlsq_dask.require import array_of, require_integer, shown
from nlsq_dask.sources.grid import GridSource

__all__ = ["CHUNK_ROWS", "Spool"]

CHUNK_ROWS = 2**18
_DIM = "row"


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What all batches have in common. Dtypes by name: to NumPy, None equals float64."""

    x_dtype: str
    num_variables: int | None  # None for `x` of shape (rows,)
    y_dtype: str
    sigma_dtype: str | None

    @property
    def variables(self) -> tuple[str, ...]:
        count = self.num_variables
        return ("x",) if count in (None, 1) else tuple(f"x{i}" for i in range(count or 0))

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """By name of the array in the store."""
        names = {**dict.fromkeys(self.variables, self.x_dtype), "y": self.y_dtype}
        if self.sigma_dtype is not None:
            names["sigma"] = self.sigma_dtype
        return {name: np.dtype(dtype) for name, dtype in names.items()}

    @property
    def row_bytes(self) -> int:
        return sum(dtype.itemsize for dtype in self.dtypes.values())

    def __str__(self) -> str:
        shape = "(rows,)" if self.num_variables is None else f"(rows, {self.num_variables})"
        sigma = "no sigma" if self.sigma_dtype is None else f"sigma of {self.sigma_dtype}"
        return f"x of shape {shape} and {self.x_dtype}, y of {self.y_dtype}, {sigma}"


class Spool:
    """A temporary store that batches ``(x, y[, sigma])`` are appended to.

    Parameters
    ----------
    location : str or path, optional
        A folder, local or by URL, in which the spool makes one of its own. By default the
        system's folder of temporary files.
    limit_bytes : int, optional
        Bytes that it may hold. By default half of what is free on a local disk, and no limit
        at a URL.
    chunk_rows : int
        Rows in a chunk of the store; so many at most wait in memory.
    storage_options : mapping, optional
        For a URL, in fsspec's names.

    Notes
    -----
    Nothing is compressed: the bytes in the store are those of the arrays. `close` removes it,
    as does leaving its ``with`` block by whatever way, and the end of the process.
    """

    def __init__(
        self,
        location: str | os.PathLike[str] | None = None,
        *,
        limit_bytes: int | None = None,
        chunk_rows: int = CHUNK_ROWS,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        if limit_bytes is not None:
            require_integer("spool_limit_bytes", limit_bytes, 1)
        self._options = dict(storage_options or {})
        self._chunk_rows = chunk_rows
        self._url = f"{_parent(location)}/nlsq-spool-{uuid.uuid4().hex[:12]}"
        try:
            fs, path = fsspec.core.url_to_fs(self._url, **self._options)
            fs.makedirs(path)
        except (OSError, ValueError, ImportError) as error:  # a protocol that is not known, too
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(
                f"`spool` must be a folder that can be written to, got {shown(location)}: {error}"
            ) from error
        self._remove = weakref.finalize(self, _remove, fs, path)
        if limit_bytes is None and isinstance(fs, LocalFileSystem):
            limit_bytes = shutil.disk_usage(path).free // 2
        self._limit_bytes = limit_bytes
        self._layout: _Layout | None = None
        self._arrays: dict[str, Any] = {}
        self._pending: list[dict[str, np.ndarray]] = []  # rows of the last chunk, not yet full
        self._num_written = 0  # rows in full chunks
        self._num_pending = 0
        self._num_batches = 0

    @property
    def url(self) -> str:
        return self._url

    @property
    def storage_options(self) -> dict[str, Any]:
        return dict(self._options)

    @property
    def num_rows(self) -> int:
        return self._num_written + self._num_pending

    @property
    def nbytes(self) -> int:
        return 0 if self._layout is None else self.num_rows * self._layout.row_bytes

    def extend(self, batches: Iterable[Any]) -> None:
        """Append each batch, a tuple ``(x, y)`` or ``(x, y, sigma)``."""
        for batch in batches:
            if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
                raise ValueError(
                    f"batch {self._num_batches} must be (x, y) or (x, y, sigma), got "
                    f"{type(batch).__name__}"
                    + (f" of {len(batch)} parts" if isinstance(batch, tuple | list) else "")
                )
            self.append(*batch)

    def append(self, x: Any, y: Any, sigma: Any = None) -> None:
        """Append rows, all of them or, with an error, none.

        Parameters
        ----------
        x : (rows,) or (rows, variables)
        y : (rows,)
        sigma : (rows,), optional

        Raises
        ------
        ValueError
            If shapes or dtypes are not those of the first batch; it names the batch, counted
            from 0.
        SpoolLimitError
            If the spool would hold more than its limit.
        """
        self._require_open()
        columns, layout = _columns(self._num_batches, x, y, sigma)
        first = layout if self._layout is None else self._layout
        if layout != first:
            raise ValueError(
                f"batch {self._num_batches} must be like the first one, {first}; got {layout}"
            )
        self._require_room(len(columns["y"]) * layout.row_bytes)
        with ExitStack() as undo:
            self._pending.append(columns)
            undo.callback(self._pending.pop)
            full = self._num_pending + len(columns["y"])
            full -= full % self._chunk_rows
            if full:
                joined = self._joined(first)
                self._store({name: column[:full] for name, column in joined.items()})
            undo.pop_all()
        if full:
            self._pending = [{name: column[full:].copy() for name, column in joined.items()}]
        self._layout = first
        self._num_written += full
        self._num_pending += len(columns["y"]) - full
        self._num_batches += 1

    def _require_open(self) -> None:
        if not self._remove.alive:
            raise ValueError("the spool must not be closed before its batches are fitted")

    def _require_room(self, more_bytes: int) -> None:
        limit = self._limit_bytes
        if limit is not None and self.nbytes + more_bytes > limit:
            raise SpoolLimitError(
                f"batch {self._num_batches} of {more_bytes:,} bytes does not fit the spool: it "
                f"holds {self.nbytes:,} bytes of {self._num_batches:,} batches, and is limited to "
                f"{limit:,}; raise `spool_limit_bytes`, or choose a larger disk by `spool`"
            )

    def source(self) -> tuple[GridSource, bool]:
        """All rows so far, and whether `x` has an axis for its variables.

        Raises
        ------
        DataError
            If there are none.
        """
        self._require_open()
        if self._layout is None or self.num_rows == 0:
            raise DataError(f"there must be rows to fit, got {self._num_batches} batches with none")
        self._store(self._joined(self._layout))
        from nlsq_dask.sources.stores import open_store
        from nlsq_dask.sources.xarray import column_of

        ds = open_store(self._url, self._options or None)
        columns = {name: column_of(name, ds[name].variable) for name in self._layout.dtypes}
        source = GridSource(
            variables=self._layout.variables,
            x=tuple(columns[name] for name in self._layout.variables),
            y=columns["y"],
            sigma=columns.get("sigma"),
            leaf_shape=(self.num_rows,),
        )
        return source, self._layout.num_variables is not None

    def close(self) -> None:
        """Remove the store. Closing twice does nothing."""
        self._remove()
        self._pending = []
        self._num_pending = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- the store

    def _joined(self, layout: _Layout) -> dict[str, np.ndarray]:
        return {
            name: np.concatenate([np.empty(0, dtype), *(part[name] for part in self._pending)])
            for name, dtype in layout.dtypes.items()
        }

    def _store(self, columns: Mapping[str, np.ndarray]) -> None:
        """Write rows after those in full chunks; over the start of a chunk written before."""
        if not self._arrays:
            self._arrays = self._create_arrays(columns)
        end = self._num_written + len(columns["y"])
        for name, array in self._arrays.items():
            array.resize((end,))
            array[self._num_written : end] = columns[name]

    def _create_arrays(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        import zarr

        group = zarr.create_group(
            store=self._url,
            zarr_format=3,
            overwrite=True,  # what an interruption left of it
            storage_options=self._options or None,
        )
        return {
            name: group.create_array(
                name,
                shape=(0,),
                chunks=(self._chunk_rows,),
                dtype=column.dtype,
                dimension_names=(_DIM,),
                compressors=None,
            )
            for name, column in columns.items()
        }


def _parent(location: str | os.PathLike[str] | None) -> str:
    if location is None:
        return tempfile.gettempdir()
    if not isinstance(location, str | os.PathLike):
        raise TypeError(f"`spool` must be a path or URL, got {shown(location)}")
    parent = os.fspath(location).rstrip("/")
    # Workers have working directories of their own.
    return parent if "://" in parent else os.path.abspath(parent)


def _remove(fs: Any, path: str) -> None:
    if fs.exists(path):
        fs.rm(path, recursive=True)


def _columns(number: int, x: Any, y: Any, sigma: Any) -> tuple[dict[str, np.ndarray], _Layout]:
    """A batch as flat columns that are copies: whoever streams may use the buffers again."""
    given = {"x": x, "y": y} | ({} if sigma is None else {"sigma": sigma})
    try:
        parts = {name: array_of(name, array) for name, array in given.items()}
    except ValueError as error:
        raise ValueError(f"batch {number}: {error}") from None
    for name, array in parts.items():
        if array.dtype.kind not in "iufb" or array.dtype.itemsize > 8:
            raise ValueError(
                f"batch {number} must hold real numbers in `{name}`, got dtype {array.dtype} of "
                f"{shown(given[name])}"
            )
        most = 2 if name == "x" else 1
        if not 1 <= array.ndim <= most or array.shape[0] != parts["x"].shape[0]:
            raise ValueError(
                f"batch {number} must have `x` of shape (rows,) or (rows, variables), `y` and "
                f"`sigma` of shape (rows,), got {_shapes(parts)}"
            )
    xs = parts.pop("x")
    layout = _Layout(
        x_dtype=str(xs.dtype),
        num_variables=None if xs.ndim == 1 else xs.shape[1],
        y_dtype=str(parts["y"].dtype),
        sigma_dtype=str(parts["sigma"].dtype) if sigma is not None else None,
    )
    if not layout.variables:
        raise ValueError(f"batch {number} must have a variable, got `x` of shape {xs.shape}")
    flat = [xs] if xs.ndim == 1 else list(xs.T)
    columns = {**dict(zip(layout.variables, flat, strict=True)), **parts}
    return {name: np.array(column, order="C") for name, column in columns.items()}, layout


def _shapes(parts: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} of {array.shape}" for name, array in parts.items())
