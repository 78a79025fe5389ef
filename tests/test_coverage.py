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
# The start is the truth's neighbour: what is tried here is the intervals.
CONFIG = HybridStreamingConfig(max_warmup_iterations=0)

NOISE = {
    "equal": lambda t: np.full_like(t, 0.2),
    "growing": lambda t: 0.02 + 0.06 * t,
}
# With "growing" noise and no sigma, only a robust ("sandwich") covariance can hold its level.
CASES = [("equal", "asymptotic"), ("equal", "profile")]


def simulate(noise, seed):
    t = np.linspace(0.0, 10.0, NUM_ROWS)
    error = NOISE[noise](t) * np.random.default_rng([7, seed]).normal(size=NUM_ROWS)
    y = problems.decay_numpy(t, problems.TRUTH) + error
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


@functools.cache
def fits(noise, num_fits):
    return [
        fit_dataset(simulate(noise, seed), problems.decay, y="y", p0=problems.P0, config=CONFIG)
        for seed in range(num_fits)
    ]


@pytest.mark.parametrize("num_fits", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("noise", "method"), CASES)
def test_intervals_cover_the_truth(noise, method, num_fits):
    covered = np.zeros(3, int)
    for result in fits(noise, num_fits):
        assert result.success
        interval = result.confidence_interval(LEVEL, method)
        lower, upper = interval.sel(side="lower").values, interval.sel(side="upper").values
        covered += (lower <= problems.TRUTH) & (upper >= problems.TRUTH)
    for count in covered:
        assert scipy.stats.binomtest(int(count), num_fits, LEVEL).pvalue >= 1e-4, covered
