"""Columns in memory, behind xarray's lazy indexing, and along time."""

from __future__ import annotations

import datetime
import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import cftime
import numpy as np

from nlsq_dask._typing import Index, Shape
from nlsq_dask.errors import DataError
from nlsq_dask.require import shown
from nlsq_dask.sources.base import Column
from nlsq_dask.sources.buffers import lender
from nlsq_dask.sources.held import holder, most_held
from nlsq_dask.sources.rereading import read_in_pieces
from nlsq_dask.sources.retrying import UNDECODABLE
from nlsq_dask.sources.transport import (
    comes_late,
    place_of,
    reported_reading,
    transport_of,
    zarr_array_of,
)

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "LazyColumn",
    "MemoryColumn",
    "TimeAxis",
    "TimeColumn",
    "build_time_column",
    "leading_blocks",
    "places_of",
    "stored_among",
    "transports_of",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryColumn:
    """A NumPy array."""

    values: np.ndarray
    dims: tuple[str, ...]
    is_in_memory: bool = True
    chunks: Shape | None = None

    @property
    def shape(self) -> Shape:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def read(self, index: Index) -> np.ndarray:
        return self.values[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class LazyColumn:
    """A variable as xarray opens it without Dask: a Zarr array, an HDF5 dataset, any backend.

    It travels as xarray pickles it, without values, and is opened again where it is read.
    CF packing and missing values are decoded there, by xarray's own rules.
    """

    variable: xr.Variable
    is_in_memory: bool = False

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(str(dim) for dim in self.variable.dims)

    @property
    def shape(self) -> Shape:
        return self.variable.shape

    @property
    def dtype(self) -> np.dtype:
        dtype: np.dtype = self.variable.dtype
        return dtype

    @functools.cached_property
    def chunks(self) -> Shape | None:
        """The store's shards where they are of a readable size, else its chunks.

        Along an axis whose chunks differ in length, the longest of them.
        """
        encoding = self.variable.encoding
        for name in ("shards", "chunks", "chunksizes"):
            grid = encoding.get(name)
            if grid is None or len(grid) != len(self.shape):
                continue
            lengths = tuple(int(np.max(along)) for along in grid)
            if name == "shards" and np.prod(lengths) > _MAX_SHARD_ROWS:
                continue
            return lengths
        return None

    @functools.cached_property
    def transport(self) -> str:
        """What carries its bytes."""
        return transport_of(self._backend)

    @functools.cached_property
    def place(self) -> str:
        """The name of the array and its store, without secrets."""
        return place_of(self._backend)

    @property
    def zarr_array(self) -> Any:
        """The array that Zarr reads; None of other libraries."""
        return zarr_array_of(self._backend)

    @property
    def _backend(self) -> Any:
        array: Any = self.variable._data
        while hasattr(array, "array"):  # xarray's decoding and indexing
            array = array.array
        return array

    def read(self, index: Index) -> np.ndarray:
        """A rectangle; what cannot be decoded is read again, chunk by chunk.

        Where it is a small part of its chunks, these are kept for the next.

        Raises
        ------
        StoreDamagedError
            If that does not help. Naming the chunk.
        StoreDeniedError, StoreLockedError, StoreNotFoundError, StoreUnreachableError
            If the store cannot be read.
        """
        ends = [part.indices(n) for part, n in zip(index, self.shape, strict=True)]
        around, kept = self._chunks_around(ends), holder()
        if not around or kept is None:
            return self._decoded(index)
        whole = tuple(slice(first, last) for first, last in around)
        part = kept.blocks_of(self).get(around, lambda: self._decoded(whole))[
            tuple(
                slice(start - first, stop - first)
                for (start, stop, _), (first, _) in zip(ends, around, strict=True)
            )
        ]
        empty = lender()
        if empty is None or part.dtype.kind not in "iuf":
            return part.copy()
        lent = empty(part.shape, part.dtype)
        lent[...] = part
        return lent

    def held_bytes(self, index: Index, num_at_once: int) -> int:
        """What is kept of chunks where such a rectangle is a small part of them, at most."""
        around = self._chunks_around(
            [part.indices(n) for part, n in zip(index, self.shape, strict=True)]
        )
        if not around:
            return 0
        block = math.prod(last - first for first, last in around)
        size = self.dtype.itemsize
        return most_held(size * block, size * math.prod(self.shape), num_at_once)

    def _chunks_around(self, ends: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, int], ...]:
        """Ends of the whole chunks that a rectangle lies in; none if they are not much larger."""
        if self.chunks is None or any(step != 1 for *_, step in ends):
            return ()
        around = tuple(
            (start // chunk * chunk, min(-(-stop // chunk) * chunk, length))
            for (start, stop, _), chunk, length in zip(ends, self.chunks, self.shape, strict=True)
        )
        wanted = math.prod(max(stop - start, 0) for start, stop, _ in ends)
        decoded = math.prod(last - first for first, last in around)
        return around if 0 < _MUCH_MORE * wanted < decoded else ()

    def _decoded(self, index: Index) -> np.ndarray:
        try:
            return self._values(index)
        except UNDECODABLE as error:
            return read_in_pieces(
                self._values,
                tuple(slice(*part.indices(n)) for part, n in zip(index, self.shape, strict=True)),
                self.chunks or self.shape,
                self.place,
                error,
                is_far=comes_late(self.transport),
            )

    def _values(self, index: Index) -> np.ndarray:
        with reported_reading(self.transport, self.place):
            return np.asarray(self.variable[index].values)


_MUCH_MORE = 2  # times the rows that are wanted, in the chunks that they lie in
_MAX_SHARD_ROWS = 2**21


@dataclass(frozen=True, kw_only=True)
class TimeAxis:
    """How times became numbers: ``(time - origin) / unit``."""

    unit: str
    origin: Any  # numpy.datetime64, a cftime datetime, or None for a duration
    calendar: str | None

    @classmethod
    def from_units(cls, units: str, calendar: str | None) -> Self:
        """The axis that has these `units`.

        Raises
        ------
        ValueError
            If they are not CF's.
        """
        unit, text = _parse_units(units)
        if text is None:
            return cls(unit=unit, origin=None, calendar=None)
        if calendar is None:
            return cls(unit=unit, origin=np.datetime64(text), calendar=None)
        return cls(unit=unit, origin=_parse_origin(unit, text, calendar), calendar=calendar)

    @property
    def units(self) -> str:
        """In CF's words: ``days since 2001-01-01 00:00:00``, or ``days``."""
        if self.origin is None:
            return self.unit
        origin = self.origin
        if isinstance(origin, np.datetime64):
            text = np.datetime_as_string(origin)
            return f"{self.unit} since {text.rstrip('0').rstrip('.') if '.' in text else text}"
        return f"{self.unit} since {origin.isoformat()}"

    def to_numbers(self, values: np.ndarray) -> np.ndarray:
        """Times as float64, NaN where there is none.

        Of a standard calendar, those that datetime64 has may come as it or as cftime's objects,
        whatever the origin is: xarray decides that for each block.
        """
        if values.dtype.kind in "mM":
            days, rest = _days_and_rest(values)
            if self.origin is not None:
                first, rest_of_first = self._days_and_rest_of_origin()
                days, rest = days - first, rest - rest_of_first
            unit = _NANOSECONDS[self.unit]
            return np.asarray(days * (_NANOSECONDS["days"] / unit) + rest / unit, np.float64)
        missing = np.array([value is None or value != value for value in values.flat], bool)
        numbers = np.full(values.size, np.nan)
        present = values.ravel()[~missing]
        if present.size:
            numbers[~missing] = self._numbers_of_objects(present)
        return numbers.reshape(values.shape)

    def _numbers_of_objects(self, times: np.ndarray) -> Any:
        strange = {type(time).__name__ for time in times if not isinstance(time, cftime.datetime)}
        if strange:
            raise DataError(f"`ds` must have times of one kind, got objects of types {strange}")
        calendar, *others = {time.calendar for time in times}
        if not others and calendar == self.calendar:
            return cftime.date2num(times, self.units, calendar=calendar)
        if others or self.calendar is not None or calendar not in _STANDARD:
            raise DataError(
                f"`ds` must have times of one calendar, {self.calendar or 'standard'!r} as the "
                f"first is, got {sorted(map(str, [calendar, *others]))}"
            )
        first, rest = self._days_and_rest_of_origin()
        origin = int(first) * _MICROSECONDS_A_DAY + round(rest / 1e3)
        return (_microseconds(times, calendar) - origin) / (_NANOSECONDS[self.unit] / 1e3)

    def _days_and_rest_of_origin(self) -> tuple[Any, Any]:
        if isinstance(self.origin, np.datetime64):
            return _days_and_rest(self.origin)
        if self.calendar not in _STANDARD:
            raise DataError(
                f"`ds` must have times of one calendar, {self.calendar!r} as the first is, "
                "got numpy.datetime64"
            )
        days, rest = divmod(int(_microseconds(self.origin, self.calendar)), _MICROSECONDS_A_DAY)
        return days, 1e3 * rest


def _microseconds(times: Any, calendar: str) -> Any:
    """Of cftime's objects, from the day on that datetime64 counts from; whole numbers."""
    return cftime.date2num(times, "microseconds since 1970-01-01", calendar=calendar)


def _days_and_rest(times: Any) -> tuple[Any, Any]:
    """Whole days and the nanoseconds beyond: int64 holds only 292 years of nanoseconds."""
    kind = times.dtype.kind
    whole = times.astype(f"{kind}8[D]")
    days = whole - np.datetime64(0, "D") if kind == "M" else whole
    return days / np.timedelta64(1, "D"), (times - whole) / np.timedelta64(1, "ns")


_MICROSECONDS_A_DAY = 86_400 * 10**6
# Those of which xarray makes datetime64 where it can.
_STANDARD = ("standard", "gregorian", "proleptic_gregorian")
_NANOSECONDS = {
    "days": 86_400e9,
    "hours": 3_600e9,
    "minutes": 60e9,
    "seconds": 1e9,
    "milliseconds": 1e6,
    "microseconds": 1e3,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TimeColumn:
    """A column of times, read as float64."""

    column: Column
    axis: TimeAxis
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float64))

    @property
    def dims(self) -> tuple[str, ...]:
        return self.column.dims

    @property
    def shape(self) -> Shape:
        return self.column.shape

    @property
    def chunks(self) -> Shape | None:
        return self.column.chunks

    @property
    def is_in_memory(self) -> bool:
        return self.column.is_in_memory

    def read(self, index: Index) -> np.ndarray:
        return self.axis.to_numbers(self.column.read(index))


def transports_of(columns: Iterable[Column]) -> list[str]:
    """What carries the bytes of those columns that are stored."""
    return sorted({column.transport for column in stored_among(columns)})


def places_of(columns: Iterable[Column]) -> list[str]:
    """The stored arrays among columns, by name and store."""
    return sorted({column.place for column in stored_among(columns)})


def stored_among(columns: Iterable[Column]) -> Iterator[LazyColumn]:
    """The stored arrays themselves, those of times too."""
    innermost = (column.column if isinstance(column, TimeColumn) else column for column in columns)
    return (column for column in innermost if isinstance(column, LazyColumn))


def build_time_column(name: str, column: Column, time_units: str | None) -> TimeColumn:
    """Read times as float64 in `time_units`, by default days since the first one.

    Raises
    ------
    ValueError
        If `time_units` is not CF's ``<unit>`` or ``<unit> since <date>``, or the column is of
        objects that are not dates.
    """
    unit, origin_text = _parse_units(time_units)
    if column.dtype.kind == "m":
        if origin_text is not None:
            raise ValueError(
                f"`time_units` must be a unit alone for {name!r}, which holds durations, "
                f"got {time_units!r}"
            )
        return TimeColumn(column=column, axis=TimeAxis(unit=unit, origin=None, calendar=None))
    first = _first_time(name, column)
    if isinstance(first, np.datetime64):
        origin = first
        if origin_text is not None:
            date = _parse_origin(unit, origin_text, "proleptic_gregorian")
            origin = np.datetime64(date.isoformat())
        axis = TimeAxis(unit=unit, origin=origin, calendar=None)
    else:
        origin = first
        if origin_text is not None:
            origin = _parse_origin(unit, origin_text, first.calendar)
        axis = TimeAxis(unit=unit, origin=origin, calendar=first.calendar)
    return TimeColumn(column=column, axis=axis)


def leading_blocks(column: Column, at_once_bytes: int = 0) -> Iterator[Index]:
    """The column along its first axis: a chunk at once, or as many as come to `at_once_bytes`."""
    if not column.shape:
        yield ()
        return
    length, *rest = column.shape
    chunk = max((column.chunks or column.shape)[0], 1)
    chunk_bytes = chunk * math.prod(rest) * column.dtype.itemsize
    step = chunk * max(at_once_bytes // max(chunk_bytes, 1), 1)
    for start in range(0, length, step):
        yield (slice(start, min(start + step, length)), *(slice(0, size) for size in rest))


def _parse_origin(unit: str, text: str, calendar: str) -> Any:
    """The date of ``<unit> since <date>``, by CF's rules."""
    try:
        return cftime.num2date(0, f"{unit} since {text}", calendar=calendar)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"`time_units` must have a date after 'since', got '{unit} since {text}': {error}"
        ) from None


def _parse_units(time_units: Any) -> tuple[str, str | None]:
    if time_units is None:
        return "days", None
    text = time_units[:200] if isinstance(time_units, str) else ""
    match = re.fullmatch(r"\s*(\w+?)s?(?:\s+since\s+(.+?))?\s*", text)
    unit = f"{match.group(1).lower()}s" if match else ""
    if match is None or unit not in _NANOSECONDS:
        raise ValueError(
            f"`time_units` must be one of {list(_NANOSECONDS)}, with 'since <date>' if you like, "
            f"got {shown(time_units)}"
        )
    return unit, match.group(2)


def _first_time(name: str, column: Column) -> Any:
    """The first value that is a time, from the first block that has one."""
    for index in leading_blocks(column):
        block = column.read(index).ravel()
        if block.dtype.kind == "M":
            present = block[~np.isnat(block)]
        else:
            present = block[[value is not None and value == value for value in block]]
        if present.size:
            value = present[0]
            if not isinstance(value, np.datetime64 | cftime.datetime):
                zoned = "; `pandas.to_datetime(…, utc=True).tz_convert(None)` makes times of dates"
                remedy = zoned if isinstance(value, datetime.date) else ""
                raise ValueError(
                    f"`{name}` must hold numbers, or times without a time zone, got objects of "
                    f"type {type(value).__name__}{remedy}"
                )
            return value
    raise ValueError(f"`{name}` must hold at least one time, got none")
