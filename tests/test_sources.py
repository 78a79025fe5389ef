"""Sources, and the suite that holds other people's to the contract."""

from __future__ import annotations

from dataclasses import dataclass, replace

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from nlsq_dask import Chunk
from nlsq_dask.plan import choose_leaf_shape, choose_strategy, plan_leaves
from nlsq_dask.sources.dask import DaskColumn
from nlsq_dask.sources.stores import open_store
from nlsq_dask.sources.xarray import DatasetRoles, build_dataset_source
from nlsq_dask.testing import check_source


@dataclass(frozen=True)
class Lines:
    """Ten chunks of a line."""

    num_rows: int = 95
    fault: str = ""

    variables = ("x",)
    num_chunks = 10
    chunk_shape = (10,)

    def read(self, index: int) -> Chunk:
        x = np.arange(index * 10.0, min(index * 10 + 10, 95))
        if self.fault == "integers":
            x = x.astype(int)
        if self.fault == "drifts":
            x = x + np.random.default_rng().normal()
        return Chunk(x=(x,), y=np.where(x == 7, np.nan, x))


def test_a_good_source_passes():
    check_source(Lines())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Lines(fault="integers"), "float"),
        (Lines(fault="drifts"), "same at every reading"),
        (Lines(num_rows=100), "num_rows"),
    ],
)
def test_a_bad_source_is_told_why(source, message):
    with pytest.raises(AssertionError, match=message):
        check_source(source)


@pytest.mark.parametrize("store", ["zarr", "nc"])
def test_stores_keep_to_the_contract(store, tmp_path):
    rng = np.random.default_rng(0)
    ds = xr.Dataset(
        {"y": (("time", "z"), rng.normal(size=(50, 7))), "s": ("z", rng.uniform(1, 2, 7))},
        coords={"time": np.arange(50).astype("datetime64[D]")},
    )
    path = tmp_path / f"a.{store}"
    if store == "zarr":
        ds.chunk(time=8, z=4).to_zarr(path, consolidated=False)
    else:
        ds.to_netcdf(path, engine="h5netcdf", encoding={"y": {"chunksizes": (8, 4)}})
    roles = DatasetRoles(x=("time", "s"), y="y", sigma="s")
    source, axes, _ = build_dataset_source(open_store(path), roles)
    plan, source = plan_leaves(source, choose_strategy(2), chunk_size=16)
    assert all(c % leaf == 0 for c, leaf in zip((8, 4), plan.leaf_shape, strict=True))
    assert axes["time"].units.startswith("days since 1970-01-01")
    check_source(source)
    check_source(replace(source, leaf_shape=(9, 3)))


@pytest.mark.parametrize(
    ("shape", "unit", "chunk_size", "leaf"),
    [
        ((10**8,), (500_000,), None, (1_000_000,)),
        ((10**8,), (10**7,), None, (10**7,)),
        ((10**8,), (10**7,), 10**6, (10**6,)),
        ((10**8,), None, None, (2**20,)),
        ((100_000,), None, None, (2**16,)),
        ((54, 18, 432), (1, 18, 432), None, (8, 18, 432)),
        ((1000, 1000, 1000), (100, 10, 10), None, (100, 10, 1000)),
    ],
)
def test_leaves_are_multiples_of_chunks_or_their_divisors(shape, unit, chunk_size, leaf):
    assert choose_leaf_shape(shape, unit, chunk_size) == leaf


def test_blocks_that_a_cluster_keeps_can_be_read_here(client):
    """A small fit is computed in this process, even if its data were persisted on a cluster."""
    values = np.arange(100.0)
    kept = client.persist(da.from_array(values, chunks=30))
    column = DaskColumn(array=kept, dims=("row",))
    np.testing.assert_array_equal(column.read((slice(20, 70),)), values[20:70])
    there = DaskColumn(array=kept + 1, dims=("row",))
    np.testing.assert_array_equal(there.read((slice(None),)), values + 1)
