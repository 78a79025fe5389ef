"""The report in plain text."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import HybridStreamingConfig, fit_dataset


def make_data(num_rows=300):
    t, y = problems.make_decay(num_rows, seed=1)
    return xr.Dataset({"y": ("t", y, {"units": "V"})}, coords={"t": ("t", t, {"units": "s"})})


@pytest.fixture(scope="module")
def result():
    return fit_dataset(make_data(), problems.decay, p0=problems.P0, bounds={"rate": (0, 5)})


def sections(text):
    """Lines by heading; the first is what comes before any."""
    parts = re.split(r"^\[\[(.+?)\]\].*\n", text, flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_sections_are_lmfits(result):
    found = sections(result.summary())
    assert list(found) == ["", "Model", "Fit Statistics", "Variables", "Correlations"]
    assert found[""].startswith("Converged")
    assert "decay(t; amplitude, rate, offset) to y of xarray.Dataset (t: 300)" in found["Model"]


def test_times_are_said_to_be_numbers():
    data = make_data()
    elapsed = (data["t"].values * 3600).astype("timedelta64[s]")
    times = data.drop_vars("t").assign_coords(t=np.datetime64("2020-01-01", "s") + elapsed)
    fit = fit_dataset(times, problems.decay, p0=problems.P0)
    line = "t in days since 2020-01-01"
    assert line in sections(fit.summary())["Model"]
    assert line in fit._repr_html_()


def test_values_are_those_of_the_result(result):
    found = sections(result.summary())
    statistics = dict(re.findall(r"^    (.+?) += (\S+)", found["Fit Statistics"], re.MULTILINE))
    assert float(statistics["chi-square"]) == pytest.approx(result.chi2, rel=1e-7)
    assert float(statistics["reduced chi-square"]) == pytest.approx(result.reduced_chi2, rel=1e-7)
    assert float(statistics["Akaike info crit"]) == pytest.approx(result.aic, rel=1e-7)
    assert float(statistics["R-squared"]) == pytest.approx(result.r_squared, rel=1e-7)
    assert statistics["# variables"] == statistics["rank"] == "3"
    pattern = r"(\w+): +(\S+) \+/- (\S+) \((\S+)%\) \(init = (\S+)\)"
    rows = re.findall(pattern, found["Variables"])
    assert [row[0] for row in rows] == list(result.param_names)
    for i, row in enumerate(rows):
        value, error, share, start = map(float, row[1:])
        assert value == pytest.approx(result.popt[i], rel=1e-7)
        assert error == pytest.approx(result.perr[i], rel=1e-3)
        assert share == pytest.approx(100 * result.perr[i] / abs(result.popt[i]), abs=0.01)
        assert start == result.p0[i]
    rate = next(line for line in found["Variables"].splitlines() if "rate" in line)
    assert rate.endswith("(bounds = 0, 5) [s-1]")


def test_weak_correlations_are_left_out(result):
    found = sections(result.summary())["Correlations"]
    pairs = re.findall(r"C\((\w+), (\w+)\) += ([+-]\S+)", found)
    values = [abs(float(value)) for *_, value in pairs]
    assert values == sorted(values, reverse=True)
    assert min(values) >= 0.1
    for first, second, value in pairs:
        actual = result.correlation.sel(cov_i=first, cov_j=second).item()
        assert float(value) == pytest.approx(actual, abs=1e-4)
    strong = np.abs(result.correlation.values[np.triu_indices(3, 1)]) >= 0.1
    assert len(pairs) == strong.sum()


def test_what_is_held_says_by_what():
    fit = fit_dataset(
        make_data(),
        problems.decay,
        p0={"amplitude": 1.0},
        bounds={"amplitude": (0, 1.5)},
        ties={"offset": lambda amplitude: 0.05 * amplitude},
        fixed=["rate"],
    )
    variables = sections(fit.summary())["Variables"].splitlines()
    assert variables[0].strip().startswith("amplitude:")
    assert "(at bound)" in variables[0]
    assert "(fixed)" in variables[1]
    assert "+/-" not in variables[1]
    assert "(tied)" in variables[2]


def test_failures_and_warnings_are_not_hidden(result):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loose = fit_dataset(make_data(), lambda t, a, b, c: (a + b) * t + c)
    text = loose.summary()
    assert text.startswith("NOT CONVERGED. Not unique")
    assert "+/- inf" in text
    assert "rank               = 2 of 3" in text
    assert "Warning: the data determine 2 of 3" in text
    noted = replace(result, diagnostics={**result.diagnostics, "notes": ["something is odd"]})
    assert noted.summary().endswith("Note: something is odd.")
    robust = replace(result, loss="huber", f_scale=0.5, covariance_kind="HC1")
    assert "huber, f_scale = 0.5" in robust.summary()
    assert "HC1 sandwich" in robust.summary()
    assert "sigma is absolute" in replace(result, absolute_sigma=True).summary()


def test_many_parameters_are_abbreviated():
    names = tuple(f"c[{i}]" for i in range(150))
    t = np.linspace(0.0, 1.0, 3000)
    level = np.arange(3000) // 20
    ds = xr.Dataset({"y": ("t", np.sin(9 * t)), "k": ("t", level)}, coords={"t": t})
    fit = fit_dataset(
        ds, lambda k, t, c, s: c[k.astype(int)] + s * t, y="y", p0={"c": np.zeros(150)}
    )
    assert fit.param_names[:150] == names
    text = fit.summary()
    assert "and 51 more, in `popt`" in text
    assert len(text.splitlines()) < 160
    assert re.search(r"and [\d,]+ more, in `correlation`", text)
    without = fit_dataset(
        ds, lambda t, a, b: a + b * t, y="y", config=HybridStreamingConfig(cg_param_threshold=1)
    )
    assert "[[Correlations]]" not in without.summary()
    assert "covariance         = none" in without.summary()
