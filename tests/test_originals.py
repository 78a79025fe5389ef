"""Loaded coordinates are read from the store where it holds the same bits, and sent elsewhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from nlsq_dask import fit_dataset
from nlsq_dask.sources.columns import LazyColumn, MemoryColumn, TimeColumn
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.sources.originals import with_originals
from nlsq_dask.sources.xarray import DatasetRoles, build_dataset_source
from problems import decay, scipy_decay

NUM_ROWS, CHUNK, LEAF = 1_000, 70, 100
NUMBERS = np.linspace(-1.0, 3.0, NUM_ROWS)
SINCE_2001 = np.datetime64("2001-01-01", "ns") + np.arange(NUM_ROWS) * 3_600 * 10**9


def write(path: Path, t: np.ndarray, *, group: str = "", chunk: int = CHUNK, **packing) -> Path:
    """`y` along the dimension `t`, whose coordinate xarray loads as it opens the store."""
    ds = xr.Dataset({"y": ("t", np.sin(NUMBERS))}, coords={"t": t})
    encoding = {"y": {"chunks": (CHUNK,)}, "t": {"chunks": (chunk,), **packing}}
    ds.to_zarr(path, group=group or None, encoding=encoding, consolidated=False)
    return path


def rows_of(ds: xr.Dataset, name: str = "t") -> GridSource:
    source, *_ = build_dataset_source(ds, DatasetRoles(x=(name,), y="y"))
    return replace(source, leaf_shape=(LEAF,))


def opened(path: Path, **options) -> xr.Dataset:
    return xr.open_zarr(path, consolidated=False, **options)


def found(source: GridSource, roles=("x0",)) -> type:
    """How `x` is read; whichever way, to the same bits."""
    seen = with_originals(source, roles)
    assert [seen.read(i).x[0].tobytes() for i in range(10)] == [
        source.read(i).x[0].tobytes() for i in range(10)
    ]
    column = seen.x[0]
    return type(column.column if isinstance(column, TimeColumn) else column)


@pytest.mark.parametrize(
    "t",
    [NUMBERS, NUMBERS.astype(np.float32), np.arange(NUM_ROWS), SINCE_2001],
    ids=["float64", "float32", "int64", "datetime64"],
)
def test_a_loaded_coordinate_is_read_from_its_store(tmp_path, t):
    ds = opened(write(tmp_path / "a.zarr", t))
    assert ds["t"].variable._in_memory
    assert found(rows_of(ds)) is LazyColumn


def test_so_are_packed_ones_in_groups(tmp_path):
    t = np.arange(NUM_ROWS) / 4
    packing = {"dtype": "i2", "scale_factor": 0.25, "_FillValue": -9999}
    path = write(tmp_path / "a.zarr", t, group="night/3", **packing)
    assert found(rows_of(opened(path, group="night/3"))) is LazyColumn


def test_so_are_those_loaded_by_hand(tmp_path):
    ds = xr.Dataset({"y": ("row", np.sin(NUMBERS)), "t": ("row", NUMBERS)})
    chunks = {name: {"chunks": (CHUNK,)} for name in ds}
    ds.to_zarr(tmp_path / "a.zarr", encoding=chunks, consolidated=False)
    ds = opened(tmp_path / "a.zarr")
    ds["t"].load()
    assert found(rows_of(ds)) is LazyColumn
    ds["t"].values[500] += 1e-9
    assert found(rows_of(ds)) is MemoryColumn


OTHERS = {
    "one bit of the last": lambda t: np.concatenate([t[:-1], np.nextafter(t[-1:], 9)]),
    "a zero's sign": lambda t: np.where(t == 0, -0.0, t),
    "another dtype": lambda t: t.astype(np.float32),
    "the same bits of another dtype": lambda t: t.view(np.int64),
    "another byte order": lambda t: t.astype(">f8"),
    "a slice": lambda t: t[:900],
    "rolled rows": lambda t: np.roll(t, 1),
    "rows the other way": lambda t: t[::-1],
}


@pytest.mark.parametrize("how", OTHERS)
def test_what_is_not_the_same_to_the_last_bit_stays(tmp_path, how):
    t = np.arange(NUM_ROWS) / 4
    source = rows_of(opened(write(tmp_path / "a.zarr", t)))
    other = MemoryColumn(values=OTHERS[how](t), dims=("t",))
    assert type(with_originals(source, ["x0"]).x[0]) is LazyColumn
    assert with_originals(replace(source, x=(other,)), ["x0"]).x == (other,)


def test_another_name_is_not_found(tmp_path):
    ds = opened(write(tmp_path / "a.zarr", NUMBERS))
    assert found(rows_of(ds.rename(t="u"), "u")) is MemoryColumn


def test_only_what_would_be_sent_is_looked_for(tmp_path):
    assert found(rows_of(opened(write(tmp_path / "a.zarr", NUMBERS))), roles=()) is MemoryColumn


def test_chunks_may_be_longer_than_a_leaf(tmp_path):
    assert found(rows_of(opened(write(tmp_path / "a.zarr", NUMBERS, chunk=7 * LEAF)))) is LazyColumn


def test_dates_of_other_calendars_are_sent_as_numbers(tmp_path):
    t = xr.date_range("2001-01-01", periods=NUM_ROWS, calendar="noleap", use_cftime=True)
    assert found(rows_of(opened(write(tmp_path / "a.zarr", t)))) is MemoryColumn


def lose_chunk(path: Path) -> None:
    (path / "t" / "c" / "3").unlink()


def damage_chunk(path: Path) -> None:
    (path / "t" / "c" / "3").write_bytes(b"not a chunk")


def lose_array(path: Path) -> None:
    shutil.rmtree(path / "t")


def lose_metadata(path: Path) -> None:
    (path / "zarr.json").unlink()


@pytest.mark.parametrize("harm", [lose_chunk, damage_chunk, lose_array, lose_metadata])
def test_what_can_no_longer_be_read_is_sent(tmp_path, harm):
    ds = opened(write(tmp_path / "a.zarr", NUMBERS))
    harm(tmp_path / "a.zarr")
    assert found(rows_of(ds)) is MemoryColumn


def test_a_netcdf_file_is_left_alone(tmp_path):
    ds = xr.Dataset({"y": ("t", np.sin(NUMBERS))}, coords={"t": NUMBERS})
    ds.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "a.nc", chunks={}, engine="h5netcdf") as lazy:
        assert found(rows_of(lazy)) is MemoryColumn


# -- whole fits


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    t = np.linspace(0.0, 10.0, 200_000)
    y = 2 * np.exp(-0.5 * t) + 0.1 + 0.1 * np.random.default_rng(5).normal(size=t.size)
    path = tmp_path_factory.mktemp("series") / "series.zarr"
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": t})
    chunks = {"y": {"chunks": (35_000,)}, "t": {"chunks": (20_000,)}}
    ds.to_zarr(path, encoding=chunks, consolidated=False)
    return path, t, y


@pytest.mark.cluster
def test_workers_read_the_coordinate_as_by_path(series, client):
    path, *_ = series
    expected = fit_dataset(path, decay, y="y", client=client)
    actual = fit_dataset(opened(path), decay, y="y", client=client)
    assert actual.popt.tobytes() == expected.popt.tobytes()
    assert actual.pcov.tobytes() == expected.pcov.tobytes()
    assert actual.diagnostics["evaluator"].endswith("store read by the workers")


@pytest.mark.cluster
def test_a_coordinate_of_ones_own_is_sent(series, client):
    path, t, y = series
    ds = opened(path).assign_coords(t=t + 1e-3)
    result = fit_dataset(ds, decay, y="y", client=client)
    assert result.diagnostics["evaluator"].endswith("beside Dask blocks that they keep")
    assert scipy_decay(t + 1e-3, y).distance(result.popt) < 1e-3


def test_zarr_keeps_chunks_where_the_tests_look_for_them(tmp_path):
    write(tmp_path / "a.zarr", NUMBERS)
    assert (tmp_path / "a.zarr" / "t" / "c" / "3").exists()
    assert zarr.open_array(tmp_path / "a.zarr" / "t", mode="r").chunks == (CHUNK,)
