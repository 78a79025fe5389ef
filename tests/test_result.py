"""What a result says, against the formulas."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import scipy.stats
import xarray as xr

import problems
from nlsq_dask import Status, fit_dataset
from nlsq_dask.errors import SessionError

NUM_ROWS = 400


@pytest.fixture(scope="module")
def data():
    t, y = problems.make_decay(NUM_ROWS, seed=4)
    y[7] = np.nan
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


@pytest.fixture(scope="module")
def result(data):
    return fit_dataset(data, problems.decay, y="y", p0=problems.P0)


def test_statistics_follow_their_formulas(data, result):
    y = data.y.values[np.isfinite(data.y.values)]
    t = data.t.values[np.isfinite(data.y.values)]
    chi2 = np.sum((problems.decay_numpy(t, result.popt) - y) ** 2)
    m, k = len(y), 3
    assert (result.num_rows, result.num_masked, result.dof) == (m, 1, m - k)
    np.testing.assert_allclose(result.chi2, chi2, rtol=1e-12)
    np.testing.assert_allclose(result.reduced_chi2, chi2 / (m - k), rtol=1e-12)
    np.testing.assert_allclose(result.r_squared, 1 - chi2 / np.sum((y - y.mean()) ** 2), rtol=1e-10)
    np.testing.assert_allclose(result.aic, m * np.log(chi2 / m) + 2 * k, rtol=1e-12)
    np.testing.assert_allclose(result.bic, m * np.log(chi2 / m) + k * np.log(m), rtol=1e-12)
    assert result.rank == 3
    assert 1 < result.condition_number < 100
    assert result.optimality < 1e-6


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_confidence_intervals_are_students(result, level):
    interval = result.confidence_interval(level)
    width = scipy.stats.t.ppf(0.5 + level / 2, result.dof) * result.perr
    np.testing.assert_allclose(interval.sel(side="lower"), result.popt - width, rtol=1e-10)
    np.testing.assert_allclose(interval.sel(side="upper"), result.popt + width, rtol=1e-10)
    with pytest.raises(ValueError, match="`level`"):
        result.confidence_interval(1.5)


def test_parameters_have_names(result):
    assert float(result.params.sel(param="rate")) == result["rate"] == result.popt[1]
    assert float(result.covariance.sel(cov_i="rate", cov_j="offset")) == result.pcov[1, 2]
    np.testing.assert_allclose(np.diag(result.correlation), 1.0)
    with pytest.raises(KeyError, match="amplitude"):
        result["nothing"]


def test_a_report_has_what_users_are_told_to_check(result):
    text = result.summary()
    assert text == str(result)
    assert text.startswith("Converged")
    for word in ("rows", "399", "left out", "passes", "rate", "condition number", "R-squared"):
        assert word in text
    assert "CONVERGED" in repr(result)
    record = result.history[-1]
    assert record.distance <= 1e-6
    assert "standard errors to go" in str(record)


def test_fixed_parameters_stay_with_zero_rows(data):
    fixed = fit_dataset(
        data, problems.decay, y="y", p0=dict(problems.P0, offset=0.1), fixed=["offset"]
    )
    assert fixed.status is Status.CONVERGED
    assert fixed["offset"] == 0.1
    assert not fixed.pcov[2].any()
    assert not fixed.pcov[:, 2].any()
    assert np.isnan(fixed.correlation.values[2]).all()
    assert "(fixed)" in fixed.summary()


def test_a_session_is_not_pickled(result):
    assert result.session is not None
    copy = pickle.loads(pickle.dumps(result))
    assert copy.session is None
    np.testing.assert_array_equal(copy.popt, result.popt)
    with pytest.raises(SessionError, match=r"p0=result\.popt"):
        copy.require_session("Everything")
