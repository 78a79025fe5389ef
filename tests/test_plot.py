"""The figure of a fit."""

from __future__ import annotations

import pickle
import sys

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import HybridStreamingConfig, fit_dataset

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    plt.close("all")


def make_fit(num_rows, **options):
    t, y = problems.make_decay(num_rows, seed=2)
    ds = xr.Dataset({"y": ("t", y, {"units": "V"})}, coords={"t": ("t", t, {"units": "s"})})
    return fit_dataset(ds, problems.decay, p0=problems.P0, **options)


@pytest.fixture(scope="module")
def few():
    return make_fit(500)


@pytest.fixture(scope="module")
def many():
    config = HybridStreamingConfig(chunk_size=10_000, seed=5)
    return make_fit(300_000, config=config)


def panels(axes):
    return {ax.get_title().partition(":")[0].partition(",")[0]: ax for ax in axes.flat}


def test_few_rows_are_dots_and_the_model_a_line(few):
    axes = few.plot()
    assert axes.shape == (2, 2)
    figure = axes[0, 0].figure
    assert figure is plt.gcf()
    assert "decay(t; amplitude, rate, offset)" in figure.get_suptitle()
    ax = panels(axes)["Data and model"]
    data, model = (line.get_xydata() for line in ax.lines)
    np.testing.assert_allclose(data[:, 1].sum(), problems.make_decay(500, seed=2)[1].sum())
    assert (np.diff(model[:, 0]) >= 0).all()
    np.testing.assert_allclose(model[:, 1], problems.decay_numpy(model[:, 0], few.popt), rtol=1e-12)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("t (s)", "y (V)")
    assert "all 500 rows" in ax.get_title()
    figure.canvas.draw()


def test_many_rows_are_a_density_of_a_sample(many):
    axes = many.plot()
    ax = panels(axes)["Data and model"]
    (cells,) = ax.collections
    drawn = int(cells.get_array().sum())
    assert drawn < 100_000
    assert f"{drawn:,} of 300,000 rows" in ax.get_title()
    residuals = panels(axes)["Residuals"]
    area = sum(bar.get_width() * bar.get_height() for bar in residuals.patches)
    assert area == pytest.approx(1.0)
    again = panels(many.plot())["Residuals"]
    heights = [[bar.get_height() for bar in ax.patches] for ax in (residuals, again)]
    assert heights[0] == heights[1]  # the seed of the fit
    ax.figure.canvas.draw()


def test_means_by_chunk_are_those_of_all_rows(many):
    ax = panels(many.plot())["Mean residual by chunk"]
    means = ax.lines[-1].get_ydata()
    assert len(means) == 30
    expected = np.asarray(many.fun).reshape(30, 10_000).mean(axis=1)
    np.testing.assert_allclose(means, expected, atol=1e-12)


def test_convergence_is_on_a_log_scale(many):
    ax = panels(many.plot())["Convergence"]
    assert ax.get_yscale() == "log"
    passes, distances = ax.lines[0].get_xydata().T
    assert passes.tolist() == [record.num_passes for record in many.history]
    np.testing.assert_array_equal(distances, [record.distance for record in many.history])


def test_of_several_variables_what_is_observed_is_drawn_over_the_model():
    x, z = np.linspace(0, 3, 40), np.linspace(0, 5, 7)
    y = 2 * np.exp(-0.5 * x)[:, None] + 0.3 * z
    ds = xr.Dataset({"T": (("x", "z"), y, {"units": "$K$"})}, coords={"x": x, "z": z})
    fit = fit_dataset(ds, lambda x, z, a, b, c: a * jnp.exp(-b * x) + c * z, y="T")
    ax = panels(fit.plot())["Data and model"]
    np.testing.assert_allclose(*ax.lines[0].get_xydata().T, rtol=1e-9)
    assert ax.get_ylabel() == r"T (\$K\$)"
    ax.figure.canvas.draw()


def test_it_is_drawn_where_one_asks(few):
    figure = plt.figure()
    left, right = figure.subfigures(1, 2)
    axes = few.plot(figure=left)
    assert list(axes.flat) == left.axes
    assert not right.axes


def test_without_data_what_is_known_is_drawn(few):
    axes = pickle.loads(pickle.dumps(few)).plot()
    assert axes.shape == (1, 2)
    assert list(panels(axes)) == ["Mean residual by chunk", "Convergence"]
    axes[0, 0].figure.canvas.draw()


def test_without_matplotlib_it_says_how_to_get_it(few, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'nlsq-dask\[plot\]'"):
        few.plot()


@pytest.mark.filterwarnings("ignore::scipy.optimize.OptimizeWarning")
def test_fits_that_failed_are_drawn_too():
    t = np.arange(40.0)
    ds = xr.Dataset({"y": ("t", t)}, coords={"t": t})
    for model in (lambda t, a: jnp.log(-jnp.abs(a) - t), lambda t, a, b: (a + b) * t):
        fit_dataset(ds, model).plot()[0, 0].figure.canvas.draw()
