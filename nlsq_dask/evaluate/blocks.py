"""Columns that travel as blocks of Dask arrays, cut like the leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import dask
import distributed
import numpy as np

from nlsq_dask.evaluate.base import Request
from nlsq_dask.evaluate.tree import bin_level
from nlsq_dask.evaluate.waiting import wait_for_all
from nlsq_dask.evaluate.worker import BlockTask, HomeSpec, merge_reports
from nlsq_dask.problem import Problem
from nlsq_dask.sources.base import Column, Source
from nlsq_dask.sources.columns import TimeColumn, stored_among
from nlsq_dask.sources.dask import DaskColumn
from nlsq_dask.sources.grid import GridSource, RemoteColumn

__all__ = ["DaskBlocks", "least_sent"]

_MAX_SHIPPED_BYTES = 2**16  # larger arrays travel as blocks, not inside each task


def least_sent(source: Source) -> Source:
    """The same rows; of those that would be sent from here, the stored ones are read there."""
    if not isinstance(source, GridSource):
        return source
    sent = [role for role, column in source.columns.items() if _is_large(column)]
    if not sent or not any(stored_among(source.columns.values())):
        return source
    from nlsq_dask.sources.originals import with_originals  # loads Zarr

    return with_originals(source, sent)


class DaskBlocks:
    """The Dask arrays among a source's columns, by role; none of them for a store."""

    def __init__(self, problem: Problem) -> None:
        self._source = problem.source
        self._arrays = _remote_arrays(problem.source)
        self._futures: dict[Any, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._arrays)

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self._arrays.values())

    @property
    def is_persisted(self) -> bool:
        return bool(self._futures)

    @property
    def are_all_columns(self) -> bool:
        """Whether the workers read nothing beside the blocks that come with their tasks."""
        source = self._source
        return isinstance(source, GridSource) and all(
            role in self._arrays or column.is_in_memory for role, column in source.columns.items()
        )

    def cut_from(self, problem: Problem) -> Problem:
        """The problem as it is sent: without the arrays that come as blocks."""
        if not self._arrays:
            return problem
        columns = self._grid.columns
        remote = {
            role: RemoteColumn(
                dims=columns[role].dims, shape=columns[role].shape, dtype=columns[role].dtype
            )
            for role in self._arrays
        }
        return replace(problem, source=self._grid.with_columns(remote))

    def persist(self, client: distributed.Client) -> None:
        """Have the workers compute the blocks once and keep them."""
        # Arrays of the client's own travel in the graph, where the scheduler can make a lost
        # block again; scattered ones could not be.
        quiet = dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"})
        with quiet, client.as_current():
            kept = client.persist(list(self._arrays.values()))
        futures = {future.key: future for future in distributed.futures_of(kept)}
        wait_for_all(client, dict.fromkeys(futures.values(), 0))
        self._arrays = dict(zip(self._arrays, kept, strict=True))
        self._futures = futures

    def futures_of(self, leaves: range) -> dict[int, dict[str, Any]]:
        """The blocks of some leaves, where they are kept."""
        return {
            leaf: {role: self._futures[key] for role, key in self._keys(leaf).items()}
            for leaf in leaves
        }

    def delayed_of(self, leaf: int) -> dict[str, Any]:
        """The blocks of a leaf, kept or yet to be computed."""
        return {
            role: self._arrays[role].blocks[tuple(key[1:])].to_delayed().ravel()[0]
            for role, key in self._keys(leaf).items()
        }

    def reduction(
        self, spec: HomeSpec, request: Request, ranges: Sequence[range], name: str
    ) -> list[Any]:
        """A delayed report for each range: a kernel task for each leaf, fused with its loading."""
        import dask.array as da  # a quarter of a second, which a store does not need

        source = self._grid
        number = da.from_array(
            np.arange(source.num_chunks).reshape(source.grid), chunks=1, name=False
        )
        pairs: list[Any] = [number, source.dims]
        for role, array in self._arrays.items():
            pairs += [array, source.columns[role].dims]
        reduced = da.blockwise(
            BlockTask(spec=spec, roles=tuple(self._arrays), request=request),
            source.dims,
            *pairs,
            align_arrays=False,
            adjust_chunks=dict.fromkeys(source.dims, 1),
            dtype=object,
            meta=np.empty((0,) * len(source.dims), object),
            name=name,
        )
        reports = reduced.to_delayed().ravel()
        level = bin_level(source.num_chunks)
        return [
            dask.delayed(merge_reports, pure=False)([reports[leaf] for leaf in leaves], level)
            for leaves in ranges
        ]

    def release(self) -> None:
        self._arrays, self._futures = {}, {}

    @property
    def _grid(self) -> GridSource:
        assert isinstance(self._source, GridSource)
        return self._source

    def _keys(self, leaf: int) -> dict[str, tuple[Any, ...]]:
        source = self._grid
        position = dict(zip(source.dims, np.unravel_index(leaf, source.grid), strict=True))
        return {
            role: (array.name, *(int(position[dim]) for dim in source.columns[role].dims))
            for role, array in self._arrays.items()
        }


def _remote_arrays(source: Any) -> dict[str, Any]:
    if not isinstance(source, GridSource):
        return {}
    leaf = dict(zip(source.dims, source.leaf_shape, strict=True))
    remote = {}
    for role, column in source.columns.items():
        chunks = tuple(leaf[dim] for dim in column.dims)
        if isinstance(column, DaskColumn):
            array = column.array
        elif isinstance(column, TimeColumn) and isinstance(column.column, DaskColumn):
            array = column.column.array.map_blocks(column.axis.to_numbers, dtype=column.dtype)
        elif _is_large(column):
            import dask.array as da

            values = column.read((slice(None),) * len(column.shape))
            array = da.from_array(values, chunks=chunks, name=False)  # else named by its digest
        else:
            continue
        remote[role] = array.rechunk(chunks)
    return remote


def _is_large(column: Column) -> bool:
    """Whether it is an array of this process too large to travel inside each task."""
    nbytes = math.prod(column.shape) * column.dtype.itemsize
    return column.is_in_memory and nbytes > _MAX_SHIPPED_BYTES
