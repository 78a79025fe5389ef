"""Names for the elements of the flat vector of parameters."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nlsq_dask._typing import Shape

__all__ = ["labels_of"]


def labels_of(shapes: Iterable[tuple[str, Shape]]) -> tuple[str, ...]:
    """For pairs of name and shape: ``a``, ``c[0]``, ``c[1]``, …"""
    return tuple(
        name if not shape else f"{name}[{','.join(map(str, index))}]"
        for name, shape in shapes
        for index in np.ndindex(shape)
    )
