"""Both examples, against an independent fit by SciPy to the same data in memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import iris_sample_data
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import xarray as xr

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = Path(iris_sample_data.path)


def run_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


def load_columns(file, variable, times_of):
    """Times, latitudes, longitudes and values of the cells that are not NaN, as flat columns."""
    with xr.open_dataset(DATA / file) as ds:
        values = ds[variable].transpose("time", "latitude", "longitude").values.astype(float)
        axes = np.meshgrid(
            times_of(ds["time"].values),
            ds["latitude"].values.astype(float),
            ds["longitude"].values.astype(float),
            indexing="ij",
        )
    is_valid = ~np.isnan(values)
    return [column[is_valid] for column in (*axes, values)]


def fit_with_scipy(residual, start, error):
    """Least squares by SciPy, to rounding; and standard errors from its Jacobian.

    SciPy ends where the rounding of the cost, some 1e-16 of it, hides a further fall; at m rows
    that is `sqrt(m) * 1e-8` standard errors away. One step that does not look at the cost goes
    the rest of the way. It solves for the parameters in units of `error`.
    """
    fit = scipy.optimize.least_squares(
        residual, start, jac="3-point", x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15
    )
    q, r = scipy.linalg.qr(fit.jac * error, mode="economic")
    step = scipy.linalg.solve_triangular(r, -q.T @ fit.fun)
    variance = 2 * fit.cost / (len(fit.fun) - len(start))
    inverse = scipy.linalg.solve_triangular(r, np.eye(len(start)))
    return fit.x + step * error, error * np.sqrt(variance * np.sum(inverse**2, axis=1))


def assert_agrees(result, residual):
    assert result.success
    rng = np.random.default_rng(0)
    start = result.popt * (1 + 0.01 * rng.choice([-1, 1], len(result.popt)))
    expected, errors = fit_with_scipy(residual, start, result.perr)
    np.testing.assert_array_less(np.abs(result.popt - expected) / errors, 1e-5)
    np.testing.assert_allclose(result.perr, errors, rtol=1e-6)


@pytest.mark.slow
def test_sea_surface_temperature(capsys):
    def days(times):
        return (times - np.datetime64("2006-01-01")) / np.timedelta64(1, "D")

    time, latitude, longitude, observed = load_columns(
        "ostia_monthly.nc", "surface_temperature", days
    )
    phi, lam = latitude / 5, 2 * np.pi * longitude / 360

    def residual(p):
        mean = np.polynomial.polynomial.polyval(phi, p[0:3])
        zonal = p[3] * np.cos(lam) + p[4] * np.cos(2 * lam) + p[5] * np.cos(3 * lam)
        zonal += p[6] * np.sin(lam) + p[7] * np.sin(2 * lam) + p[8] * np.sin(3 * lam)
        warmest = np.polynomial.polynomial.polyval(phi, p[11:14])
        season = (p[9] + p[10] * phi) * np.cos(2 * np.pi * (time - warmest) / 365.25)
        return mean + zonal + season - observed

    result = run_example("sea_surface_temperature")
    assert_agrees(result, residual)
    assert result.num_rows == len(observed) == 308_934
    printed = capsys.readouterr().out
    assert "amplitude of (1.140 ± 0.006) K" in printed
    assert "at 5°N it is (0.231 ± 0.006) K, on day 144" in printed


def test_warming_curve(capsys):
    def years(times):
        return np.array(
            [when.year + (when.month - 1) / 12 + (when.day - 1) / 360 for when in times]
        )

    year, latitude, longitude, observed = load_columns(
        "E1_north_america.nc", "air_temperature", years
    )
    north, east = (latitude - 37.5) / 22.5, (longitude - 270) / 45
    terms = [north**i * east**j for i in range(4) for j in range(4) if i + j < 4]

    def residual(p):
        share = 0.5 * (1 + np.tanh(0.5 * (year - p[12]) / p[13]))
        field = sum(c * term for c, term in zip(p[:10], terms, strict=True))
        return field + (p[10] + p[11] * north) * share - observed

    result = run_example("warming_curve")
    assert_agrees(result, residual)
    assert result.num_rows == len(observed) == 240 * 37 * 49
    printed = capsys.readouterr().out
    assert "(1.64 ± 0.02) K at 20°N and by (3.31 ± 0.02) K at 55°N" in printed
    assert "by the year 2017.5 ± 0.3" in printed
