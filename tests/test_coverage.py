"""Intervals hold the truth as often as they say."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.stats
import xarray as xr

import problems
from nlsq_dask import HybridStreamingConfig, fit_dataset

LEVEL = 0.95
NUM_ROWS = 100
NUM_FITS = 120
# The start is the truth's neighbour: what is tried here is the intervals.
CONFIG = HybridStreamingConfig(max_warmup_iterations=0)

NOISE = {
    "equal": lambda t: np.full_like(t, 0.2),
    "growing": lambda t: 0.02 + 0.06 * t,
}
# With "growing" noise and no sigma, only the sandwich can hold its level.
CASES = [
    ("equal", "classical", "asymptotic"),
    ("equal", "classical", "profile"),
    pytest.param("growing", "HC1", "asymptotic", marks=pytest.mark.slow),
]


def simulate(noise, seed):
    t = np.linspace(0.0, 10.0, NUM_ROWS)
    error = NOISE[noise](t) * np.random.default_rng([7, seed]).normal(size=NUM_ROWS)
    y = problems.decay_numpy(t, problems.TRUTH) + error
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


@functools.cache
def fits(noise, covariance, num_fits):
    return [
        fit_dataset(
            simulate(noise, seed),
            problems.decay,
            y="y",
            p0=problems.P0,
            covariance=covariance,
            config=CONFIG,
        )
        for seed in range(num_fits)
    ]


def covered(noise, covariance, method, num_fits):
    """How many of the intervals hold each parameter's true value."""
    counts = np.zeros(3, int)
    for result in fits(noise, covariance, num_fits):
        assert result.success
        interval = result.confidence_interval(LEVEL, method)
        lower, upper = interval.sel(side="lower").values, interval.sel(side="upper").values
        counts += (lower <= problems.TRUTH) & (upper >= problems.TRUTH)
    return counts


@pytest.mark.parametrize(("noise", "covariance", "method"), CASES)
def test_intervals_cover_the_truth(noise, covariance, method):
    counts = covered(noise, covariance, method, NUM_FITS)
    for count in counts:
        assert scipy.stats.binomtest(int(count), NUM_FITS, LEVEL).pvalue >= 1e-4, counts
