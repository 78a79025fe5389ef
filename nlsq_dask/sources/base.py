"""The contract between rows and everything that computes on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from nlsq_dask._typing import Array, Bool, Float, Index, Int, Shape
from nlsq_dask.errors import DataError
from nlsq_dask.sources.buffers import Empty, aligned_empty, is_aligned

__all__ = [
    "Chunk",
    "Column",
    "Source",
    "check_chunk",
    "finite_rows",
    "pad_chunk",
    "plain_block",
    "selected_rows",
]


_TIMES = {"M", "O"}  # of which xarray decodes each block of an array by itself


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A block of rows. All arrays have as many axes as `y` and broadcast against it.

    A row has weight zero where `where` is false, where any of its values is not finite, and
    beyond `extent`, the part of a padded chunk that is real. `cluster` numbers the group of rows
    that may depend on each other, for clustered standard errors.
    """

    x: tuple[Float[Array, ...], ...]
    y: Float[Array, ...]
    sigma: Float[Array, ...] | None = None
    where: Bool[Array, ...] | None = None
    cluster: Int[Array, ...] | None = None
    extent: Int[Array, " axes"] | None = None

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@runtime_checkable
class Source(Protocol):
    """Rows in chunks. Picklable, cheap to copy: it describes data rather than holding them.

    ``nlsq_dask.testing.check_source`` holds an implementation to this contract.
    """

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the independent variables, in the order of ``Chunk.x``."""

    @property
    def num_chunks(self) -> int: ...

    @property
    def num_rows(self) -> int:
        """Rows in all chunks, masked ones included."""

    @property
    def chunk_shape(self) -> Shape:
        """Shape of the largest chunk; smaller ones are padded to it."""

    def read(self, index: int) -> Chunk:
        """The chunk, of floating-point arrays in C order. The same bits at every call.

        It is called from several threads, and its arrays are copied before it is called again
        in the same thread.
        """


class Column(Protocol):
    """One array of a dataset, wherever it is, read by rectangles."""

    @property
    def dims(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def chunks(self) -> Shape | None:
        """Shape of the blocks in which it is best read; None if any will do."""

    @property
    def is_in_memory(self) -> bool: ...

    def read(self, index: Index) -> np.ndarray: ...


def plain_block(block: object, dtype: np.dtype) -> np.ndarray:
    """A block of Dask's as an array; it may turn out to be something else than it declares.

    Raises
    ------
    DataError
        If it is masked, or of another kind of number: that would lose an imaginary part.
    """
    array = np.asarray(block)
    is_alike = array.dtype.kind == dtype.kind or {array.dtype.kind, dtype.kind} == _TIMES
    if not is_alike or np.ma.is_masked(block):
        raise DataError(
            f"`ds` must have Dask arrays whose blocks are as they declare, plain and of {dtype}, "
            f"got a block of {array.dtype}{' with a mask' if np.ma.is_masked(block) else ''}"
        )
    return array


def check_chunk(chunk: Chunk, source: Source, index: int) -> Chunk:
    """Hold what a source read to its own description.

    Raises
    ------
    TypeError, ValueError
        Naming what differs.
    """
    where = f"`ds` must read chunk {index} as it describes it: "
    if not isinstance(chunk, Chunk):
        raise TypeError(f"{where}a Chunk, got {type(chunk).__name__}")
    if len(chunk.x) != len(source.variables):
        raise ValueError(
            f"{where}{len(source.variables)} variables {source.variables}, got {len(chunk.x)}"
        )
    most, shape = tuple(source.chunk_shape), chunk.y.shape
    if len(shape) != len(most) or any(a > b for a, b in zip(shape, most, strict=True)):
        raise ValueError(f"{where}`y` of shape {most} at most, got {shape}")
    for part in (*chunk.x, chunk.sigma, chunk.where, chunk.cluster):
        if part is not None and (
            part.ndim != len(shape)
            or any(a not in (1, b) for a, b in zip(part.shape, shape, strict=True))
        ):
            raise ValueError(
                f"{where}arrays that broadcast to the shape of its `y`, {shape}, got {part.shape}"
            )
    if chunk.extent is not None:
        raise ValueError(
            f"{where}rows that are real, which are padded later, got `extent` {chunk.extent}"
        )
    for role, part, kinds in (("where", chunk.where, "b"), ("cluster", chunk.cluster, "iu")):
        if part is not None and part.dtype.kind not in kinds:
            kind = "booleans" if role == "where" else "whole numbers"
            raise TypeError(f"{where}`{role}` of {kind}, got {part.dtype}")
    return chunk


def pad_chunk(
    chunk: Chunk, shape: Shape, empty: Empty = aligned_empty, *, is_ours: bool = True
) -> Chunk:
    """Pad a ragged chunk to `shape`, so that one compiled kernel serves all chunks.

    The padding repeats edge values, at which the model is as defined as in the chunk itself;
    `extent` records what is real. Arrays that JAX would have to copy are copied here instead,
    into memory of `empty`; and all of them where they are not `is_ours`, to keep and to compute
    on while the source reads the next.
    """
    lengths = chunk.y.shape

    def pad(given: Array) -> np.ndarray:
        # An axis shorter than the chunk's own is broadcast, and stays as it is.
        array = np.asarray(given)
        wanted = tuple(
            want if have == real else have
            for have, real, want in zip(array.shape, lengths, shape, strict=True)
        )
        if array.shape == wanted and is_ours and is_aligned(array):
            return array
        padded = empty(wanted, array.dtype)
        if array.size == 0:
            padded[...] = 1
            return padded
        padded[tuple(map(slice, array.shape))] = array
        for axis, have in enumerate(array.shape):
            before = (slice(None),) * axis
            padded[(*before, slice(have, None))] = padded[(*before, slice(have - 1, have))]
        return padded

    return Chunk(
        x=tuple(pad(column) for column in chunk.x),
        y=pad(chunk.y),
        sigma=None if chunk.sigma is None else pad(chunk.sigma),
        where=None if chunk.where is None else pad(chunk.where),
        cluster=None if chunk.cluster is None else pad(chunk.cluster),
        extent=np.asarray(lengths, np.int64),
    )


def selected_rows(chunk: Chunk) -> Bool[np.ndarray, ...]:
    """Which rows are wanted: those that `where` asks for and that are no padding."""
    selected = np.ones(chunk.y.shape, bool)
    if chunk.where is not None:
        selected &= np.asarray(chunk.where, bool)
    if chunk.extent is not None:
        is_real = np.zeros(chunk.y.shape, bool)
        is_real[tuple(slice(0, int(length)) for length in chunk.extent)] = True
        selected &= is_real
    return selected


def finite_rows(chunk: Chunk) -> Bool[np.ndarray, ...]:
    """Which rows have a finite value in every column."""
    finite = np.ones(chunk.y.shape, bool)
    for part in (chunk.y, *chunk.x, chunk.sigma):
        if part is not None:
            finite &= np.isfinite(part)
    return finite
