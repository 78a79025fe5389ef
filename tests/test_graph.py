"""Dask graphs that only read a store are passed by, and no others."""

from __future__ import annotations

import copy
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from dask.array.core import getter
from dask.blockwise import blockwise, blockwise_token
from dask.highlevelgraph import HighLevelGraph
from dask.layers import ArraySliceDep
from dask.task_spec import Task, TaskRef

from nlsq_dask import fit_dataset
from nlsq_dask.sources.columns import LazyColumn
from nlsq_dask.sources.dask import DaskColumn
from nlsq_dask.sources.xarray import column_of
from problems import decay, scipy_decay

SHAPE, CHUNKS = (23, 11), (5, 4)  # ragged both ways
NUM_ROWS = 200_000

# Blocks that cut through the store's chunks are part of what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:The specified chunks separate")


def plane() -> np.ndarray:
    return np.random.default_rng(3).normal(size=SHAPE)


def make_dataset() -> xr.Dataset:
    values = plane()
    return xr.Dataset(
        {
            "y": (("t", "s"), values),
            "packed": (("t", "s"), np.where(values > 2, np.nan, 0.01 * np.rint(100 * values))),
            "start": (("t",), np.datetime64("2001-01-01", "ns") + np.arange(23) * 3_600 * 10**9),
            "good": (("t", "s"), values > 0),
        },
        coords={"depth": (("s",), np.linspace(0.0, 1.0, 11))},
    )


def grids(key: str) -> dict[str, dict]:
    packing = {"scale_factor": 0.01, "dtype": "i2", "_FillValue": -9999}
    return {
        "y": {key: CHUNKS},
        "packed": {key: CHUNKS, **packing},
        "start": {key: CHUNKS[:1]},
        "good": {key: CHUNKS},
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "a.zarr"
    make_dataset().to_zarr(path, encoding=grids("chunks"), consolidated=False)
    return path


def open_zarr(path: Path, **options: object) -> xr.Dataset:
    if "inline_array" in options:
        return xr.open_dataset(path, engine="zarr", chunks={}, consolidated=False, **options)
    return xr.open_zarr(path, consolidated=False, **options)


def column(array: xr.DataArray) -> LazyColumn | DaskColumn:
    assert isinstance(array.variable._data, da.Array)
    return column_of("y", array.variable)


def assert_reads(array: xr.DataArray, kind: type, expected: np.ndarray | None = None) -> None:
    """All of the column and a rectangle across blocks, against NumPy."""
    found = column(array)
    assert type(found) is kind
    expected = array.values if expected is None else expected
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    for index in (slice(None),) * array.ndim, (slice(3, 9),) * array.ndim:
        np.testing.assert_array_equal(found.read(index), expected[index])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inline_array": True},
        {"chunks": {"t": 7, "s": 3}},
        {"chunks": {"t": (1, 20, 2), "s": -1}},
        {"chunks": "auto"},
    ],
    ids=str,
)
def test_an_opened_store_is_read_directly_on_its_own_grid(path, options):
    y = open_zarr(path, **options)["y"]
    assert_reads(y, LazyColumn, plane())
    assert column(y).chunks == CHUNKS


@pytest.mark.parametrize("name", ["y", "packed", "start", "good", "depth"])
def test_values_are_decoded_as_by_path(path, name):
    assert_reads(open_zarr(path)[name], LazyColumn, make_dataset()[name].values)


def test_an_opened_netcdf_file_is_read_directly(tmp_path):
    make_dataset().to_netcdf(tmp_path / "a.nc", engine="h5netcdf", encoding=grids("chunksizes"))
    with xr.open_dataset(tmp_path / "a.nc", engine="h5netcdf", chunks={}) as ds:
        for name in ("y", "packed", "start", "good", "depth"):
            assert_reads(ds[name], LazyColumn, make_dataset()[name].values)
        assert column(ds["y"]).chunks == CHUNKS


STILL_READS = {
    "selected": lambda ds: ds[["y"]]["y"],
    "renamed": lambda ds: ds.rename(y="z", t="u")["z"],
    "copied": lambda ds: ds.copy(deep=True)["y"],
    "moved": lambda ds: ds.assign(z=ds["y"])["z"],
    "labelled": lambda ds: ds.assign_coords(t=np.arange(23.0))["y"],
    "all of it": lambda ds: ds.isel(t=slice(None))["y"],
    "chunked as it was": lambda ds: ds["y"].chunk(t=5, s=4),
    "computed once": lambda ds: ds["y"] if ds["y"].mean().compute() is not None else None,
    "opened, then chunked": lambda ds: xr.open_zarr(
        ds.encoding["source"], chunks=None, consolidated=False
    )["y"].chunk(t=6, s=11),
}


@pytest.mark.parametrize("how", STILL_READS)
def test_what_leaves_the_values_alone_is_read_directly(path, how):
    assert_reads(STILL_READS[how](open_zarr(path)), LazyColumn, plane())


def edited(array: xr.DataArray) -> xr.DataArray:
    array[2:4] = -1.0
    return array


def edited_data(array: xr.DataArray) -> xr.DataArray:
    array.data[2:4] = -1.0
    return array


def edited_before_chunks(path: Path, cache: bool) -> xr.DataArray:
    ds = xr.open_dataset(path, engine="zarr", chunks=None, consolidated=False, cache=cache)
    ds["y"][2:4] = -1.0
    return ds["y"].chunk(t=5)


def minus_one(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[2:4] = -1.0
    return values


ANOTHER_GRAPH = {
    "isel": (lambda y: y.isel(t=slice(2, 20)), lambda v: v[2:20]),
    "isel reversed": (lambda y: y.isel(t=slice(None, None, -1)), lambda v: v[::-1]),
    "isel list": (
        lambda y: y.isel(t=[*range(10), *range(9, 22)]),
        lambda v: v[[*range(10), *range(9, 22)]],
    ),
    "isel blocks": (
        lambda y: y.copy(data=y.data.blocks[::-1]),
        lambda v: np.concatenate([v[20:], v[15:20], v[10:15], v[5:10], v[:5]]),
    ),
    "roll": (lambda y: y.roll(t=5), lambda v: np.roll(v, 5, axis=0)),
    "shift": (
        lambda y: y.shift(t=1, fill_value=0.0),
        lambda v: np.concatenate([np.zeros((1, 11)), v[:-1]]),
    ),
    "transpose": (lambda y: y.transpose("s", "t"), lambda v: v.T),
    "arithmetic": (lambda y: 2 * y + 1, lambda v: 2 * v + 1),
    "where": (lambda y: y.where(y > 0, 0.0), lambda v: np.where(v > 0, v, 0.0)),
    "fillna": (lambda y: y.fillna(0.0), lambda v: v),
    "astype": (lambda y: y.astype(np.float32), lambda v: v.astype(np.float32)),
    "rechunk": (lambda y: y.chunk(t=6), lambda v: v),
    "reassignment": (lambda y: y.copy(data=y.data[::-1]), lambda v: v[::-1]),
    "edit of the variable": (edited, minus_one),
    "edit of its array": (edited_data, minus_one),
    "concatenation": (lambda y: xr.concat([y, y], "t"), lambda v: np.concatenate([v, v])),
    "persist": (lambda y: y.persist(scheduler="synchronous"), lambda v: v),
    "optimize": (lambda y: dask.optimize(y * 1)[0], lambda v: v),
    "map_blocks": (lambda y: y.copy(data=y.data.map_blocks(np.negative)), np.negative),
}


@pytest.mark.parametrize("how", ANOTHER_GRAPH)
def test_any_other_graph_is_computed_as_it_is(path, how):
    change, expected = ANOTHER_GRAPH[how]
    y = open_zarr(path)["y"]
    changed = change(y)
    changed.encoding.update(open_zarr(path)["y"].encoding)  # it proves nothing
    assert_reads(changed, DaskColumn, expected(plane()))


def test_a_shift_by_a_whole_block_is_no_read(path):
    """The shape, the blocks and the encoding are the store's own: the order is not."""
    y = open_zarr(path, chunks={"t": 23, "s": 11})["y"]
    data = da.concatenate([y.data[12:], y.data[:12]]).rechunk(y.data.chunks)
    assert_reads(y.copy(data=data), DaskColumn, np.roll(plane(), 11, axis=0))


@pytest.mark.parametrize("cache", [True, False])
def test_values_edited_before_there_was_a_graph_are_kept(path, cache):
    assert_reads(edited_before_chunks(path, cache), DaskColumn, minus_one(plane()))


def test_arrays_in_memory_stay_blocks(path):
    assert_reads(open_zarr(path).load()["y"].chunk(t=5), DaskColumn, plane())


def test_a_lock_is_kept(path):
    lazy = xr.open_dataset(path, engine="zarr", chunks=None, consolidated=False)
    assert_reads(lazy.chunk(t=5, lock=True)["y"], DaskColumn, plane())


def test_an_annotated_read_stays_where_it_was_put(path):
    with dask.annotate(workers=["one"]):
        y = open_zarr(path)["y"]
    assert type(column(y)) is DaskColumn


def test_no_task_is_made_to_recognise_a_graph_of_many_blocks(tmp_path):
    zarr.open_group(tmp_path / "many.zarr", mode="w").create_array(
        "y", shape=(200_000,), chunks=(2,), dtype="f8", dimension_names=["row"]
    )
    y = open_zarr(tmp_path / "many.zarr")["y"]
    assert y.data.npartitions == 100_000
    assert type(column(y)) is LazyColumn
    assert not any(
        layer.is_materialized() for layer in y.data.dask.layers.values() if len(layer) > 1
    )


# -- graphs by hand


def stored_in(y: xr.DataArray) -> object:
    return next(iter(y.data.dask.layers[f"original-{y.data.name}"].values()))


def by_hand(y: xr.DataArray, cut: ArraySliceDep, function=getter, axes="ij", **options):
    """One layer that cuts the stored array as `cut` says."""
    given = stored_in(y)
    layer = blockwise(function, "by-hand", "ij", given, None, cut, axes, numblocks={}, **options)
    graph = HighLevelGraph.from_collections("by-hand", layer)
    return y.copy(data=da.Array(graph, "by-hand", y.data.chunks, dtype=y.dtype))


def test_a_layer_by_hand_is_recognised_by_what_it_does(path):
    y = open_zarr(path)["y"]
    assert_reads(by_hand(y, ArraySliceDep(y.data.chunks)), LazyColumn, plane())


def test_two_blocks_in_each_others_place_are_no_read(path):
    y = open_zarr(path, chunks={"t": 23, "s": 4})["y"]

    class Swapped(ArraySliceDep):
        def __getitem__(self, position):
            i, j = position
            return super().__getitem__((i, {0: 1, 1: 0}.get(j, j)))

    v = plane()
    expected = np.concatenate([v[:, 4:8], v[:, :4], v[:, 8:]], axis=1)
    assert_reads(by_hand(y, Swapped(y.data.chunks)), DaskColumn, expected)


def test_slices_from_elsewhere_are_no_read(path):
    y = open_zarr(path, chunks={"t": 23, "s": 4})["y"]
    cut = ArraySliceDep(y.data.chunks)
    cut.starts = ((0, 23), (4, 8, 11, 11))
    assert type(column(by_hand(y, cut))) is DaskColumn


def test_blocks_of_other_sizes_are_no_read(path):
    y = open_zarr(path, chunks={"t": 23, "s": 4})["y"]
    assert type(column(by_hand(y, ArraySliceDep(((23,), (3, 4, 4)))))) is DaskColumn


def test_part_of_a_stored_array_is_not_all_of_it(path):
    y = open_zarr(path)["y"]
    short = ((5, 5), (4, 4))
    graph = by_hand(y, ArraySliceDep(short)).data.dask
    part = xr.DataArray(da.Array(graph, "by-hand", short, dtype=y.dtype), dims=y.dims)
    assert_reads(part, DaskColumn, plane()[:10, :8])


def negated(a, b, asarray=True, lock=None):
    return -getter(a, b)


def test_another_getter_is_no_read(path):
    y = open_zarr(path)["y"]
    assert_reads(by_hand(y, ArraySliceDep(y.data.chunks), negated), DaskColumn, -plane())


def test_blocks_across_the_diagonal_are_no_read(tmp_path):
    """A square array, whose block ``(i, j)`` is the stored block ``(j, i)``."""
    path = tmp_path / "square.zarr"
    v = plane()[:10, :10]
    xr.Dataset({"y": (("t", "s"), v)}).to_zarr(path, consolidated=False)
    y = open_zarr(path, chunks={"t": 5, "s": 5})["y"]
    expected = np.block([[v[:5, :5], v[5:, :5]], [v[:5, 5:], v[5:, 5:]]])
    assert_reads(by_hand(y, ArraySliceDep(y.data.chunks), axes="ji"), DaskColumn, expected)


@pytest.mark.parametrize("tokens", [(0, 1), (1, 0), (0, 0), (0,), (0, 1, 1)])
def test_other_arguments_are_no_read(path, tokens):
    data = open_zarr(path)["y"].data
    layer = copy.copy(data.dask.layers[data.name])
    arguments = [TaskRef(blockwise_token(i)) for i in tokens]
    layer.task = Task(data.name, getter, *arguments)
    graph = HighLevelGraph({**data.dask.layers, data.name: layer}, data.dask.dependencies)
    other = xr.DataArray(da.Array(graph, data.name, data.chunks, dtype=data.dtype))
    assert type(column(other)) is (LazyColumn if tokens == (0, 1) else DaskColumn)


def test_a_layer_with_a_third_input_is_no_read(path):
    y = open_zarr(path)["y"]
    cut = ArraySliceDep(y.data.chunks)
    layer = blockwise(
        getter, "by-hand", "ij", stored_in(y), None, cut, "ij", False, None, numblocks={}
    )
    graph = HighLevelGraph.from_collections("by-hand", layer)
    data = da.Array(graph, "by-hand", y.data.chunks, dtype=y.dtype)
    assert type(column(y.copy(data=data))) is DaskColumn


def test_materialised_blocks_are_computed(path):
    y = open_zarr(path)["y"]
    graph = HighLevelGraph({y.data.name: dict(y.data.dask)}, {y.data.name: set()})
    data = da.Array(graph, y.data.name, y.data.chunks, dtype=y.dtype)
    assert_reads(y.copy(data=data), DaskColumn, plane())


# -- whole fits


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    t = np.linspace(0.0, 10.0, NUM_ROWS)
    y = 2 * np.exp(-0.5 * t) + 0.1 + 0.1 * np.random.default_rng(5).normal(size=NUM_ROWS)
    path = tmp_path_factory.mktemp("rows") / "rows.zarr"
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})
    chunks = {name: {"chunks": (35_000,)} for name in ("t", "y")}
    ds.to_zarr(path, encoding=chunks, consolidated=False)
    return path, t, y


@pytest.mark.parametrize("chunks", [{}, {"row": 15_000}])
def test_the_same_bits_as_by_path(rows, chunks):
    path, t, y = rows
    expected = fit_dataset(path, decay, y="y")
    actual = fit_dataset(open_zarr(path, chunks=chunks), decay, y="y")
    assert actual.popt.tobytes() == expected.popt.tobytes()
    assert actual.pcov.tobytes() == expected.pcov.tobytes()
    assert scipy_decay(t, y).distance(actual.popt) < 1e-3


def line(start, depth, a=0.0, b=0.0):
    return a * start + b * depth


def test_times_and_packed_values_are_fitted_as_by_path(path):
    by_path = fit_dataset(path, line, y="packed", where="good")
    opened = fit_dataset(open_zarr(path), line, y="packed", where="good")
    assert opened.popt.tobytes() == by_path.popt.tobytes()
    values = make_dataset()
    y, good = values["packed"].values, values["good"].values & ~np.isnan(values["packed"].values)
    days = np.broadcast_to(np.arange(23)[:, None] / 24, SHAPE)
    depth = np.broadcast_to(values["depth"].values, SHAPE)
    matrix = np.stack([days[good], depth[good]], axis=1)
    expected = np.linalg.lstsq(matrix, y[good])[0]
    np.testing.assert_allclose(opened.popt, expected, rtol=1e-4)


@pytest.mark.cluster
def test_workers_read_the_store_and_keep_no_blocks(rows, client):
    path, *_ = rows
    expected = fit_dataset(path, decay, y="y")
    actual = fit_dataset(open_zarr(path), decay, y="y", client=client)
    assert actual.popt.tobytes() == expected.popt.tobytes()
    assert actual.diagnostics["evaluator"].endswith("store read by the workers")


@pytest.mark.cluster
@pytest.mark.parametrize("persist", [True, False])
def test_what_is_read_beside_blocks_is_read_once_where_blocks_are_kept(
    rows, client, persist, monkeypatch
):
    """`t` by its own graph, `y` from the store."""
    from nlsq_dask.evaluate import cluster

    if not persist:
        monkeypatch.setattr(cluster, "_PERSIST_SHARE", 0.0)
    path, t, y = rows
    ds = open_zarr(path)
    result = fit_dataset(ds.assign(t=ds["t"] + 0.0), decay, y="y", client=client)
    assert scipy_decay(t, y).distance(result.popt) < 1e-3
    where = result.diagnostics["evaluator"]
    if persist:
        assert "store read by the workers, beside Dask blocks that they keep" in where
        read = [record.bytes_read for record in result.history]
        assert len(read) > 1
        assert read[0] >= y.nbytes
        assert not any(read[1:])
    else:
        assert "computed in every pass" in where
