"""A chunk-stratified random sample of rows.

Archives are ordered in time or space, so a few whole chunks say little about the rest: rows are
drawn at random offsets from chunks spread evenly over all of them. Chunks of even and odd
position in the draw make two disjoint halves, whose optima should agree within sampling error.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nlsq_dask._typing import Array, Bool, Float, Int
from nlsq_dask.errors import DataError
from nlsq_dask.sources.base import Chunk
from nlsq_dask.sources.columns import MemoryColumn
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.sources.marks import mark_of

__all__ = ["ROWS_ALWAYS_SAMPLED", "Rows", "Sample", "draw_sample", "sample_size"]

ROWS_ALWAYS_SAMPLED = 50_000
_MIN_ROWS = 10_000  # 1 % of a million
_MAX_ROWS = 2**20
_ROWS_PER_PARAMETER = 20
_FEWEST_VALID = 1024  # of a sample; of fewer, more rows are drawn
_MORE_OF_EACH = 32
_BLOCK_ROWS = 2**14
_FIRST_STRATA = 128
_CHUNKS_TO_SPLIT = 32  # fewer are not comparable halves of an archive in time order
_LEAST_HALF = 1 / 3  # of the rows: both are cut to the smaller


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Valid rows of those drawn from one chunk, flat, and how many were drawn."""

    x: tuple[Float[np.ndarray, " rows"], ...]
    y: Float[np.ndarray, " rows"]
    sigma: Float[np.ndarray, " rows"] | None
    num_invalid: int  # wanted, but with a value that is not finite
    num_drawn: int
    smallest_sigma: float
    chunk_bytes: int
    mark: int  # of the chunk


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Rows in blocks of one size: those of the first half, then those of the second.

    `halves` are the blocks of each; they are equal where the sample is all there is.
    """

    source: GridSource
    halves: tuple[range, range]
    is_everything: bool
    num_chunks_read: int
    bytes_read: int
    num_invalid: int  # rows drawn and wanted, but with a value that is not finite
    valid_share: float  # of the rows drawn
    smallest_sigma: float
    marks: Mapping[int, int] = field(default_factory=dict)  # of the chunks looked at
    # Of all rows there are, which one each was when it was read; None where that says nothing.
    places: Int[np.ndarray, " rows"] | None = None

    @property
    def num_rows(self) -> int:
        return self.source.num_rows

    @property
    def blocks(self) -> range:
        return range(self.source.num_chunks)

    def in_one_block(self) -> Sample:
        """The same rows in random order, to be computed on at once."""
        order = np.random.default_rng(0).permutation(self.num_rows)
        columns = {
            role: MemoryColumn(values=column.read((slice(None),))[order], dims=column.dims)
            for role, column in self.source.columns.items()
        }
        source = replace(self.source.with_columns(columns), leaf_shape=(self.num_rows,))
        places = None if self.places is None else self.places[order]
        return replace(self, source=source, halves=(range(1), range(1)), places=places)

    @property
    def center(self) -> float:
        """About the mean of `y`."""
        with np.errstate(over="ignore"):
            return float(np.mean(self.source.y.read((slice(None),))))

    @property
    def data_square(self) -> float:
        """``Σ w y²``."""
        every = (slice(None),)
        y = self.source.y.read(every)
        sigma = 1.0 if self.source.sigma is None else self.source.sigma.read(every)
        with np.errstate(over="ignore"):
            return float(np.sum((y / sigma) ** 2))

    @property
    def fill(self) -> Float[np.ndarray, " variables"]:
        """A value of each variable at which the model is evaluated where no row counts."""
        return np.array([column.read((slice(0, 1),))[0] for column in self.source.x])


def sample_size(num_rows: int, max_fraction: float, num_free: int = 0) -> int:
    """Rows to draw: all of few, a share of many, and between the two never too few to judge by.

    Many parameters ask for more rows, whatever the share: each of them must be seen.
    """
    least = max(_MIN_ROWS, _ROWS_PER_PARAMETER * num_free)
    if num_rows <= max(ROWS_ALWAYS_SAMPLED, least):
        return num_rows
    return max(least, min(int(max_fraction * num_rows), _MAX_ROWS))


def draw_rows(index: int, chunk: Chunk, *, fraction: float, seed: int) -> Rows:
    """What is valid of a share of a chunk's rows, drawn by seed and chunk alone.

    No others are looked at: looking at all would take as long as a good part of a pass.
    """
    shape = chunk.y.shape if chunk.extent is None else tuple(map(int, chunk.extent))
    num_real = math.prod(shape)
    num_drawn = min(num_real, math.ceil(fraction * num_real))
    if num_drawn < num_real:
        rng = np.random.default_rng([seed, index])
        drawn = np.sort(rng.choice(num_real, num_drawn, replace=False, shuffle=False))
    else:
        drawn = np.arange(num_real)
    position = np.unravel_index(drawn, shape)

    def take(array: Array) -> np.ndarray:
        values = np.asarray(array)
        at = tuple(
            axis if length > 1 else np.zeros_like(axis)
            for axis, length in zip(position, values.shape, strict=True)
        )
        return np.asarray(values[at])

    selected = np.ones(num_drawn, bool) if chunk.where is None else take(chunk.where)
    sigma = () if chunk.sigma is None else (chunk.sigma,)
    columns = [np.asarray(take(part), np.float64) for part in (chunk.y, *chunk.x, *sigma)]
    valid = selected & np.logical_and.reduce([np.isfinite(column) for column in columns])
    num_valid = int(np.count_nonzero(valid))
    if num_valid < num_drawn:
        columns = [column[valid] for column in columns]
    y, *others = columns
    return Rows(
        x=tuple(others[: len(chunk.x)]),
        y=y,
        sigma=others[-1] if sigma else None,
        num_invalid=int(np.count_nonzero(selected)) - num_valid,
        num_drawn=num_drawn,
        smallest_sigma=float(np.min(others[-1], initial=np.inf)) if sigma else np.inf,
        chunk_bytes=chunk.nbytes,
        mark=mark_of(chunk, index),
    )


MapChunks = Callable[[Callable[[int, Chunk], Rows], Sequence[int]], list[Rows]]


def draw_sample(
    map_chunks: MapChunks,
    num_chunks: int,
    num_rows: int,
    variables: tuple[str, ...],
    *,
    max_fraction: float,
    seed: int,
    num_free: int = 0,
) -> Sample:
    """Draw rows from evenly spread chunks; from more, and more of each, where too few are valid.

    Raises
    ------
    DataError
        If no row of any chunk is valid.
    """
    target = sample_size(num_rows, max_fraction, num_free)
    everything = target == num_rows
    strata = num_chunks if everything else min(_FIRST_STRATA, num_chunks)
    wanted = target
    while True:
        rng = np.random.default_rng([seed, strata])
        chosen = _stratified(num_chunks, strata, rng)
        share = min(1.0, wanted * num_chunks / (num_rows * strata))
        drawn = map_chunks(functools.partial(draw_rows, fraction=share, seed=seed), chosen)
        found = sum(len(rows.y) for rows in drawn)
        if found >= min(target, _FEWEST_VALID) or (strata == num_chunks and share == 1.0):
            break
        if strata < num_chunks:
            strata = min(num_chunks, 8 * strata)
        else:
            wanted *= _MORE_OF_EACH
    if found == 0:
        raise DataError(
            f"`ds` must have rows that can be fitted: of {num_rows:,} rows none is selected, "
            "with finite values in all its variables"
        )
    return _assemble(drawn, chosen, variables, everything)


def _stratified(num_chunks: int, strata: int, rng: np.random.Generator) -> list[int]:
    """One chunk of each of `strata` equal stretches."""
    edges = np.linspace(0, num_chunks, strata + 1)
    return sorted({int(a + (b - a) * rng.random()) for a, b in itertools.pairwise(edges)})


def _assemble(
    drawn: Sequence[Rows],
    chosen: Sequence[int],
    variables: tuple[str, ...],
    everything: bool,
) -> Sample:
    columns = _stack(drawn, len(variables))
    owner = np.repeat(np.arange(len(drawn)), [len(rows.y) for rows in drawn])
    num_blocks = -(-len(owner) // _BLOCK_ROWS)
    places = None
    if everything or len(owner) < 2:
        # Every so many rows, so that a block alone is a sample of those in time order too.
        block = -(-len(owner) // num_blocks)
        places = np.concatenate([np.arange(b, len(owner), num_blocks) for b in range(num_blocks)])
        columns = [column[places] for column in columns]
        first = second = range(num_blocks)
    else:
        # Blocks of one shape, so that the sample compiles once. They are drawn at random from
        # their half: any of them alone is a sample of it.
        order = np.random.default_rng(0).permutation(len(owner))
        is_second = _in_second_half([len(rows.y) for rows in drawn])[owner[order]]
        share = is_second.mean()
        if len(drawn) < _CHUNKS_TO_SPLIT or min(share, 1 - share) < _LEAST_HALF:
            is_second = np.arange(len(order)) % 2 == 1
        halves = order[~is_second], order[is_second]
        smallest = min(map(len, halves))
        num_blocks = -(-smallest // _BLOCK_ROWS)
        block = smallest // num_blocks
        kept = np.concatenate([half[: num_blocks * block] for half in halves])
        columns = [column[kept] for column in columns]
        first, second = range(num_blocks), range(num_blocks, 2 * num_blocks)
    return Sample(
        source=_flat_source(columns, variables, block),
        halves=(first, second),
        is_everything=everything,
        num_chunks_read=len(chosen),
        bytes_read=sum(rows.chunk_bytes for rows in drawn),
        num_invalid=sum(rows.num_invalid for rows in drawn),
        valid_share=len(owner) / sum(rows.num_drawn for rows in drawn),
        smallest_sigma=min(rows.smallest_sigma for rows in drawn),
        marks={leaf: rows.mark for leaf, rows in zip(chosen, drawn, strict=True)},
        places=places,
    )


def _in_second_half(counts: Sequence[int]) -> Bool[np.ndarray, " chunks"]:
    """Chunks in turns, so that the halves cover the same times, and hold as many rows."""
    rows, chosen = [0, 0], []
    for count in counts:
        half = int(rows[1] < rows[0])
        rows[half] += count
        chosen.append(half == 1)
    return np.array(chosen)


def _stack(rows: Sequence[Rows], num_variables: int) -> list[np.ndarray]:
    """Columns y, sigma if any, x1, x2, … of several chunks."""
    columns = [np.concatenate([part.y for part in rows])]
    if rows[0].sigma is not None:
        columns.append(np.concatenate([part.sigma for part in rows if part.sigma is not None]))
    columns += [np.concatenate([part.x[i] for part in rows]) for i in range(num_variables)]
    return columns


def _flat_source(
    columns: Sequence[np.ndarray], variables: tuple[str, ...], block: int
) -> GridSource:
    as_column = [MemoryColumn(values=values, dims=("row",)) for values in columns]
    has_sigma = len(columns) == len(variables) + 2
    return GridSource(
        variables=variables,
        y=as_column[0],
        sigma=as_column[1] if has_sigma else None,
        x=tuple(as_column[1 + has_sigma :]),
        leaf_shape=(block,),
    )
