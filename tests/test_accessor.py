"""Fits as methods of xarray's objects."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import fit_dataset

T, Y = problems.make_decay(4_000)
DS = problems.dataset(T, Y)
EXPECTED = fit_dataset(DS, problems.decay, y="y", p0=problems.P0)


def test_of_a_dataset():
    result = DS.nlsq.fit(problems.decay, y="y", p0=problems.P0)
    assert result.popt.tobytes() == EXPECTED.popt.tobytes()


@pytest.mark.parametrize("name", ["y", "flux", None, "t"])
def test_of_an_array_whatever_its_name(name):
    array = xr.DataArray(Y, dims="row", coords={"t": ("row", T)}, name=name)
    result = array.nlsq.fit(problems.decay, p0=problems.P0)
    assert result.popt.tobytes() == EXPECTED.popt.tobytes()


def test_other_arrays_go_beside_it():
    array = xr.DataArray(Y, dims="row", coords={"t": ("row", T)})
    sigma = xr.full_like(array, 0.1)
    result = array.nlsq.fit(problems.decay, p0=problems.P0, sigma=sigma, absolute_sigma=True)
    np.testing.assert_allclose(result.popt, EXPECTED.popt, atol=1e-5 * EXPECTED.perr.min())


def test_an_array_is_its_own_y():
    array = xr.DataArray(Y, dims="row", coords={"t": ("row", T)})
    with pytest.raises(TypeError, match="`y` must be left out"):
        array.nlsq.fit(problems.decay, y="y")


def test_help_shows_the_options():
    shown = inspect.signature(DS.nlsq.fit).parameters
    options = inspect.signature(fit_dataset).parameters
    assert set(options) - set(shown) == {"ds", "storage_options"}
    assert set(shown) <= set(options)
    assert set(shown) - set(inspect.signature(DS["y"].nlsq.fit).parameters) == {"y"}


@pytest.mark.parametrize(
    "lines",
    ["import nlsq_dask, xarray", "import xarray, nlsq_dask", "import nlsq_dask.accessor, xarray"],
    ids=["before", "after", "by itself"],
)
def test_it_is_there_in_whatever_order_they_are_imported(lines):
    code = f"{lines}; xarray.Dataset().nlsq.fit; xarray.DataArray().nlsq.fit"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
