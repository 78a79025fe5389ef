"""What is planned follows the problem and the kind of device, and nothing else."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import xarray as xr

from nlsq_dask import HybridStreamingConfig, fit_dataset
from nlsq_dask.errors import WorkerError
from nlsq_dask.evaluate import workers
from nlsq_dask.plan import choose_strategy, choose_tile_rows
from problems import decay, make_decay


@pytest.mark.parametrize(
    ("num_free", "platform", "products"),
    [
        (3, "cpu", "lanes"),
        (16, "cpu", "lanes"),
        (17, "cpu", "dot"),
        (3, "gpu", "sweep"),
        (8, "gpu", "sweep"),
        (9, "gpu", "dot"),
    ],
)
def test_products_are_taken_by_the_number_of_parameters_and_the_device(
    num_free, platform, products
):
    assert choose_strategy(num_free, platform=platform).products == products


@pytest.mark.parametrize("num_free", [1, 3, 8, 40, 63])
def test_the_jacobian_of_a_tile_stays_in_cache(num_free):
    rows = choose_tile_rows(num_free)
    assert rows % 1024 == 0
    assert 2**18 < 8 * rows * (num_free + 1) <= 2**19 or rows == 8192


def test_a_tile_of_many_parameters_has_the_rows_that_lanes_take():
    assert choose_tile_rows(64) == choose_tile_rows(400) == 1024


def test_a_plan_for_a_gpu_computes_the_same_sums(monkeypatch):
    """Its kernels run here on a CPU, where they are slower."""
    t, y = make_decay(80_000)
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": t})
    config = HybridStreamingConfig(verbose=0)
    here = fit_dataset(ds, decay, y="y", config=config)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    there = fit_dataset(ds, decay, y="y", config=config)
    assert here.diagnostics["plan"]["strategy"]["products"] == "lanes"
    assert there.diagnostics["plan"]["strategy"]["products"] == "sweep"
    assert there.diagnostics["plan"]["tile_shape"] == there.diagnostics["plan"]["leaf_shape"]
    np.testing.assert_allclose(there.popt, here.popt, atol=1e-5 * here.perr.min())
    np.testing.assert_allclose(there.pcov, here.pcov, rtol=1e-9)


def test_workers_of_two_kinds_are_refused(monkeypatch):
    client = SimpleNamespace(
        scheduler_info=lambda **_: {"workers": {"a": {}, "b": {}}},
        run=lambda function, **_: {"a": "cpu", "b": "gpu"},
        status="running",
        scheduler=SimpleNamespace(address="tcp://scheduler:8786"),
    )
    with pytest.raises(WorkerError, match="one kind of device"):
        workers.platform_of(client)
