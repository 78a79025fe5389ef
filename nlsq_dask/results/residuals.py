"""Residuals of a fit, computed when they are asked for: there are as many as rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from nlsq_dask._typing import Array, Float, Shape
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.problem import Problem
from nlsq_dask.sources.base import Chunk, finite_rows, selected_rows
from nlsq_dask.sources.grid import GridSource

__all__ = ["Residuals"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Residuals(NDArrayOperatorsMixin):
    """``y - model``, unweighted, over all rows; NaN in rows that were left out.

    An array to NumPy: `numpy.asarray`, arithmetic and indexing read the data again, in this
    process, and hold ``8 m`` bytes. `chunks` holds one chunk at a time.
    """

    problem: Problem
    params: Float[np.ndarray, " n"]

    dtype = np.dtype(np.float64)

    @property
    def shape(self) -> Shape:
        """That of `y`, or ``(m,)`` for a source whose chunks are not of one grid."""
        source = self.problem.source
        return source.shape if isinstance(source, GridSource) else (source.num_rows,)

    def chunks(self) -> Iterator[Float[np.ndarray, ...]]:
        """The residuals of each chunk of the source, in its order."""
        problem = self.problem
        home = ProblemHome(problem=problem, cache_bytes=0, prefetch=False)

        @jax.jit
        def evaluate(params: Array, x: tuple[Array, ...], y: Array) -> Array:
            value = problem.model(x, problem.space.unflatten(params))
            return y - jnp.broadcast_to(value, y.shape)

        for index in range(problem.source.num_chunks):
            chunk = home.host_leaf(index)
            with jax.enable_x64(True):
                x = tuple(np.asarray(part, np.float64) for part in chunk.x)
                every = np.asarray(evaluate(self.params, x, np.asarray(chunk.y, np.float64)))
            counts = selected_rows(chunk) & finite_rows(chunk)
            yield np.where(counts, every, np.nan)[_extent(chunk)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("`copy` must not be False: residuals are computed when asked for")
        source = self.problem.source
        if not isinstance(source, GridSource):
            parts = [part.ravel() for part in self.chunks()]
            return np.concatenate(parts).astype(dtype or self.dtype)
        out = np.empty(self.shape, dtype or self.dtype)
        for index, part in enumerate(self.chunks()):
            region = source.region(index)
            out[tuple(region[dim] for dim in source.dims)] = part
        return out

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [np.asarray(part) if isinstance(part, Residuals) else part for part in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(np.asarray(self))

    def __repr__(self) -> str:
        return f"<Residuals of shape {self.shape}, computed when asked for>"


def _extent(chunk: Chunk) -> tuple[slice, ...]:
    """What of a padded chunk is real."""
    lengths = chunk.y.shape if chunk.extent is None else chunk.extent
    return tuple(slice(0, int(length)) for length in lengths)
