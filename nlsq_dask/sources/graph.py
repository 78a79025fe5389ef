"""Dask graphs that only read one stored array, and the array that they read.

xarray opens an archive with ``chunks=`` through `dask.array.from_array`: the graph then holds
the very array that it would have given without Dask, and one layer that cuts it into blocks.
Whether it is that is read off the layer's definition: no task is made, however many the blocks.
Where a dataset came from, its encoding for instance, proves nothing: it survives slices, rolls
and new values.
"""

from __future__ import annotations

from typing import Any

import xarray as xr
from dask._task_spec import Alias, TaskRef  # `dask.task_spec` had no `Alias` at first
from dask.array.core import getter
from dask.blockwise import Blockwise, blockwise_token
from dask.highlevelgraph import HighLevelGraph
from dask.layers import ArraySliceDep
from xarray.backends import BackendArray
from xarray.core.indexing import ExplicitlyIndexedNDArrayMixin, ImplicitToExplicitIndexingAdapter

from nlsq_dask._typing import Shape

__all__ = ["stored_variable"]


def stored_variable(variable: xr.Variable) -> xr.Variable | None:
    """The variable as xarray opens it without Dask, where its graph only reads a store.

    Parameters
    ----------
    variable : xarray.Variable
        Of a Dask array.

    Returns
    -------
    xarray.Variable or None
        None where any block is anything but the rectangle of the stored array at its own
        place: sliced, rolled, edited, computed, persisted, or read under a lock or an
        annotation (such as the workers that may read it), which a direct read would pass by.
    """
    array: Any = variable._data
    read = _array_read_by(array)
    if not isinstance(read, ImplicitToExplicitIndexingAdapter) or not _is_stored(read.array):
        return None
    if read.shape != array.shape or read.dtype != array.dtype:
        return None
    return xr.Variable(variable.dims, read.array, variable.attrs, variable.encoding)


def _array_read_by(array: Any) -> object:
    """What one layer of the graph cuts into the blocks of `array`; None if there is no such."""
    if not isinstance(array.dask, HighLevelGraph):
        return None
    layers = array.dask.layers
    cut = layers.get(array.name)
    if not isinstance(cut, Blockwise) or not _cuts_in_order(cut, array.chunks):
        return None
    read, _ = cut.indices[0]
    if isinstance(read, TaskRef):
        return layers.get(read.key, {}).get(read.key)
    return read  # ``inline_array=True``


def _cuts_in_order(layer: Blockwise, chunks: tuple[Shape, ...]) -> bool:
    """Whether each block is ``asarray(given[slices])``, with the slices of its own position."""
    if len(layer.indices) != 2 or len(layer.task.args) != 2:
        return False
    _, (cut, axes) = layer.indices
    slices, task = layer.io_deps.get(cut), layer.task
    return (
        axes == layer.output_indices
        and type(slices) is ArraySliceDep
        and vars(slices) == vars(ArraySliceDep(chunks))
        and task.func is getter
        and all(_is_argument(given, i) for i, given in enumerate(task.args))
        and not task.kwargs  # a lock, or blocks that stay as the store gives them
        and not layer.annotations
    )


def _is_argument(given: object, position: int) -> bool:
    """Whether a task is given that input of its layer, in the words of any release of Dask."""
    token = blockwise_token(position)
    return given in (TaskRef(token), Alias(token))


def _is_stored(array: Any) -> bool:
    """Whether nothing but xarray's decoding lies between an array and its backend.

    Not so where values were assigned, or loaded, before the array was cut into blocks.
    """
    is_wrapped = isinstance(array, ExplicitlyIndexedNDArrayMixin)
    return _is_stored(array.array) if is_wrapped else isinstance(array, BackendArray)
