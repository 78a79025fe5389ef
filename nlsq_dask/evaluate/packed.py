"""The sums of a leaf as a vector for each dtype: the same additions, one call for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from nlsq_dask._typing import Shape
from nlsq_dask.evaluate.tree import Bin, bin_parts
from nlsq_dask.normal_equations import Sums

__all__ = ["Layout", "PackedSums"]


class _Slot(NamedTuple):
    vector: int
    part: slice
    shape: Shape


class Layout:
    """Where each array of `Sums` lies in the vectors; the same for all leaves of a request."""

    def __init__(self, like: Sums) -> None:
        arrays, self._tree = jax.tree.flatten(like)
        dtypes = sorted({array.dtype for array in arrays}, key=str)
        filled = [0] * len(dtypes)
        slots = []
        for array in arrays:
            vector, size = dtypes.index(array.dtype), math.prod(array.shape)
            start = filled[vector]
            slots.append(_Slot(vector, slice(start, start + size), array.shape))
            filled[vector] += size
        self._slots: Sequence[_Slot] = slots
        self._members = [
            [i for i, slot in enumerate(slots) if slot.vector == vector]
            for vector in range(len(dtypes))
        ]
        where: Any = jax.tree.unflatten(self._tree, slots)
        self._bin: Sequence[_Slot] = bin_parts(where)
        self._refused: Sequence[_Slot] = (where.rows.num_bad_sigma, where.rows.num_stray)

    def pack(self, sums: Sums) -> PackedSums:
        """Fetch the arrays to the host, waiting for them where they are still being computed."""
        arrays = [np.asarray(array).reshape(-1) for array in jax.tree.leaves(sums)]
        vectors = tuple(np.concatenate([arrays[i] for i in its]) for its in self._members)
        return PackedSums(layout=self, vectors=vectors)

    def unpack(self, vectors: Sequence[np.ndarray]) -> Sums:
        sums: Sums = jax.tree.unflatten(
            self._tree,
            [vectors[slot.vector][slot.part].reshape(slot.shape) for slot in self._slots],
        )
        return sums

    def bin_of(self, vectors: Sequence[np.ndarray]) -> Bin:
        return np.array([vectors[slot.vector][slot.part.start] for slot in self._bin], np.float64)

    def is_offending(self, vectors: Sequence[np.ndarray]) -> bool:
        """Whether rows were refused, or a sum of the normal equations is not finite."""
        if any(vectors[slot.vector][slot.part.start] for slot in self._refused):
            return True
        if all(bool(np.isfinite(vector).all()) for vector in vectors):
            return False
        return not self.unpack(vectors).normal.is_finite


@dataclass(frozen=True, slots=True)
class PackedSums:
    """What one leaf, or a node of the tree above it, comes to. Additive."""

    layout: Layout
    vectors: tuple[np.ndarray, ...]

    @property
    def is_offending(self) -> bool:
        return self.layout.is_offending(self.vectors)

    def bin(self) -> Bin:
        return self.layout.bin_of(self.vectors)

    def unpack(self) -> Sums:
        return self.layout.unpack(self.vectors)

    def __add__(self, other: PackedSums) -> PackedSums:
        # A wild trial may overflow: its sums are then not finite, and it is refused.
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = tuple(map(np.add, self.vectors, other.vectors))
        return PackedSums(layout=self.layout, vectors=vectors)
