"""Labels of rows that may depend on each other, as numbers from 0 on."""

from __future__ import annotations

import math

import numpy as np

from nlsq_dask.sources.base import Column
from nlsq_dask.sources.columns import MemoryColumn

__all__ = ["build_cluster_column"]

_MAX_LABELS = 2**24  # read here, once


def build_cluster_column(column: Column) -> tuple[Column, int]:
    """Codes of the distinct labels, and how many there are.

    Raises
    ------
    ValueError
        If there are fewer than two labels, some are missing, or too many to be read here.
    """
    size = math.prod(column.shape)
    if size > _MAX_LABELS:
        raise ValueError(
            f"`cluster` must have at most {_MAX_LABELS:,} labels, as a coordinate along some "
            f"dimensions of `y` has, got {size:,}"
        )
    values = column.read((slice(None),) * len(column.shape))
    import pandas as pd

    try:
        codes, labels = pd.factorize(values.ravel(), sort=True)
    except TypeError as error:  # of lists, say
        raise ValueError(
            f"`cluster` must have labels that are numbers, text or times, got others: {error}"
        ) from None
    if (codes < 0).any():
        raise ValueError(
            f"`cluster` must have a label for every row, got {int((codes < 0).sum()):,} missing"
        )
    if len(labels) < 2:
        raise ValueError(f"`cluster` must have at least two labels, got {len(labels)}")
    shaped = codes.astype(np.int32).reshape(values.shape)
    return MemoryColumn(values=shaped, dims=column.dims), len(labels)
