"""For those who write a `Source`: what it must keep to, as a test to call."""

from __future__ import annotations

import cloudpickle
import jax
import numpy as np

from nlsq_dask.sources.base import Source, check_chunk

__all__ = ["check_source"]


def check_source(source: Source) -> None:
    """Hold a source to the contract of `Source`.

    Reads every chunk twice, the second time from a pickled copy.

    Raises
    ------
    AssertionError
        If chunks differ from one reading to the next, are not of floating-point numbers, or do
        not add up to `num_rows`.
    TypeError, ValueError
        If a chunk is not as the source describes it.
    """
    copy: Source = cloudpickle.loads(cloudpickle.dumps(source))
    num_rows = 0
    for index in range(source.num_chunks):
        chunk = check_chunk(source.read(index), source, index)
        for column in (chunk.y, *chunk.x, *([] if chunk.sigma is None else [chunk.sigma])):
            assert column.dtype in (np.float32, np.float64), (
                f"chunk {index} must hold float32 or float64, got {column.dtype}"
            )
        again = copy.read(index)
        same = jax.tree.map(np.array_equal, _without_nan(chunk), _without_nan(again))
        assert jax.tree.all(same), f"chunk {index} must be the same at every reading"
        num_rows += chunk.y.size
    assert num_rows == source.num_rows, (
        f"`num_rows` must be the rows of all chunks, {num_rows:,}, got {source.num_rows:,}"
    )


def _without_nan(chunk: object) -> object:
    """The bits of a chunk, in which NaN equals itself."""
    return jax.tree.map(lambda array: np.ascontiguousarray(array).view(np.uint8), chunk)
