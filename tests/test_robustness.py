"""Starts far off: as often to the certified fit as SciPy from the same starts."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import nist
import robustness
from nlsq_dask import fit_dataset

HARD = ["MGH10", "Nelson", "Eckerle4"]


def compare(name, num_starts):
    problem = nist.load(name)
    ours = robustness.successes(problem, robustness.fit_by_curve_fit(problem), num_starts)
    scipys = robustness.successes(problem, robustness.fit_by_scipy(problem), num_starts)
    assert ours.sum() >= scipys.sum(), f"{name}: {ours.sum()} of {num_starts}, SciPy {scipys.sum()}"


@pytest.mark.parametrize(
    "name", [HARD[0], *(pytest.param(name, marks=pytest.mark.slow) for name in HARD[1:])]
)
def test_hard_problems_from_a_few_starts_over_two_decades(name):
    compare(name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", nist.MODELS)
def test_every_problem_from_starts_over_two_decades(name):
    compare(name, 20)


NUM_ROWS = 1_000_000
TRUTH = {"a": 1e4, "fast": 1.0, "b": 100.0, "slow": 0.01, "c": 1.0}
SIGNS = list(itertools.product([-1, 1], repeat=5))


def two_decays(t, a, fast, b, slow, c):
    return a * jnp.exp(-fast * t) + b * jnp.exp(-slow * t) + c


@pytest.fixture(scope="module")
def two_scales():
    t = np.linspace(0.0, 500.0, NUM_ROWS)
    a, fast, b, slow, c = TRUTH.values()
    noise = np.random.default_rng(9).normal(size=NUM_ROWS)
    y = a * np.exp(-fast * t) + b * np.exp(-slow * t) + c + noise
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


@pytest.mark.parametrize(
    "signs",
    [
        signs
        if np.prod(signs) > 0 and signs[0] == signs[3]
        else pytest.param(signs, marks=pytest.mark.slow)
        for signs in SIGNS
    ],
)
def test_scales_four_decades_apart_from_a_factor_of_three(signs, two_scales):
    p0 = {name: value * 3.0**sign for (name, value), sign in zip(TRUTH.items(), signs, strict=True)}
    result = fit_dataset(two_scales, two_decays, y="y", p0=p0)
    assert result.success
    assert np.all(np.abs(result.popt - np.array(list(TRUTH.values()))) < 5 * result.perr)
    assert result.num_passes <= 8
