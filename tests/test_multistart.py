"""The tournament: who may compete, who stays, and that it finds what one start does not."""

from __future__ import annotations

import dataclasses
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from nlsq_dask import HybridStreamingConfig, fit_dataset
from nlsq_dask.warmup.multistart import draw_candidates, hold_tournament

P0 = np.array([2.0, 0.0, -4.0])
FREE = np.full(3, -np.inf), np.full(3, np.inf)
BOUNDED = np.array([0.0, -1.0, -np.inf]), np.array([8.0, 3.0, np.inf])


def multistart(**options):
    return HybridStreamingConfig(enable_multistart=True, **options)


@pytest.mark.parametrize("sampler", ["lhs", "sobol", "halton"])
@pytest.mark.parametrize("n_starts", [1, 3, 10, 16])
def test_candidates_are_p0_and_n_starts_repeatable_points(sampler, n_starts):
    config = multistart(multistart_sampler=sampler, n_starts=n_starts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        candidates = draw_candidates(config, P0, BOUNDED)
    assert candidates.shape == (n_starts + 1, 3)
    np.testing.assert_array_equal(candidates[0], P0)
    np.testing.assert_array_equal(candidates, draw_candidates(config, P0, BOUNDED))
    other = draw_candidates(dataclasses.replace(config, seed=1), P0, BOUNDED)
    assert not np.array_equal(candidates, other)


@pytest.mark.parametrize(
    ("bounds", "options", "low", "high"),
    [
        (FREE, {}, [0, -1, -8], [4, 1, 0]),
        (FREE, {"scale_factor": 3.0}, [-4, -3, -16], [8, 3, 8]),
        (FREE, {"center_on_p0": False}, [0, -1, -8], [4, 1, 0]),
        (BOUNDED, {}, [0, -1, -8], [6, 2, 0]),
        (BOUNDED, {"center_on_p0": False}, [0, -1, -8], [8, 3, 0]),
        (BOUNDED, {"center_on_p0": False, "scale_factor": 0.5}, [2, 0, -6], [6, 2, -2]),
        (BOUNDED, {"scale_factor": 100.0}, [0, -1, -404], [8, 3, 396]),
    ],
)
def test_candidates_fill_the_box(bounds, options, low, high):
    config = multistart(n_starts=400, **options)
    points = draw_candidates(config, P0, bounds)[1:]
    low, high = np.array(low, float), np.array(high, float)
    assert np.all((points >= low) & (points <= high))
    span = high - low
    assert np.all(points.min(axis=0) < low + 0.01 * span)
    assert np.all(points.max(axis=0) > high - 0.01 * span)


class Valley:
    """A stand-in for the sample: the cost is the first parameter, not finite below zero."""

    def __init__(self, p0, num_rows=10_000, num_blocks=4):
        self.problem = dataclasses.make_dataclass("Problem", ["space"])(self)
        self.sample = self
        self.p0, self.is_free = np.asarray(p0, float), np.ones(len(p0), bool)
        self.free_bounds = np.full(len(p0), -np.inf), np.full(len(p0), np.inf)
        self.num_rows, self.blocks = num_rows, range(num_blocks)
        self.seen = []

    def costs(self, candidates, blocks):
        self.seen.append((len(candidates), len(blocks)))
        return np.where(candidates[:, 0] < 0, np.nan, candidates[:, 0])


@given(
    n_starts=st.integers(1, 40),
    rounds=st.integers(0, 5),
    fraction=st.floats(0.01, 1.0),
    p0=st.sampled_from([[3.0, 1.0], [-2.0, 0.0], [0.0, 5.0]]),
)
def test_p0_and_the_best_stay_and_the_worst_go_first(n_starts, rounds, fraction, p0):
    config = multistart(
        n_starts=n_starts, elimination_rounds=rounds, elimination_fraction=fraction, scale_factor=3
    )
    held = hold_tournament(Valley(p0), config)
    np.testing.assert_array_equal(held.survivors[0], p0)
    assert len(held.survivors) >= 2
    before = np.ones(n_starts + 1, bool)
    for stage in held.rounds:
        assert stage.survives[0]
        assert not (stage.survives & ~before).any()
        cost = np.where(np.isfinite(stage.costs), stage.costs, np.inf)
        kept = cost[1:][stage.survives[1:]]
        lost = cost[1:][(before & ~stage.survives)[1:]]
        assert not lost.size or kept.max() <= lost.min()
        np.testing.assert_array_equal(np.isnan(stage.costs[~before]), True)
        before = stage.survives


def test_rounds_double_their_rows_and_candidates_come_in_groups_of_one_size():
    sample = Valley([1.0, 1.0], num_rows=2048, num_blocks=8)
    held = hold_tournament(sample, multistart(n_starts=39, batches_per_round=1))
    assert [stage.num_rows for stage in held.rounds] == [256, 512, 1024]
    assert {group for group, _ in sample.seen} == {16}
    assert [int(stage.survives.sum()) for stage in held.rounds] == [20, 10, 5]


def wave(t, a, w, p):
    return a * jnp.sin(w * t + p)


def waves():
    t = np.linspace(0, 10, 4000)
    y = 2 * np.sin(7 * t + 0.5) + 0.1 * np.random.default_rng(0).normal(size=t.size)
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


def test_a_tournament_finds_a_basin_far_from_the_start():
    p0 = {"a": 1.0, "w": 1.5, "p": 0.0}
    bounds = {"a": (0, 5), "w": (0, 12), "p": (-3.2, 3.2)}
    config = multistart(
        n_starts=256, elimination_rounds=4, center_on_p0=False, multistart_sampler="sobol"
    )
    alone = fit_dataset(waves(), wave, y="y", x="t", p0=p0, bounds=bounds)
    result = fit_dataset(waves(), wave, y="y", x="t", p0=p0, bounds=bounds, config=config)
    assert result.success
    np.testing.assert_allclose(result.popt, [2, 7, 0.5], atol=0.02)
    assert result.cost < 0.1 * alone.cost
    told = result.diagnostics["multistart"]
    assert len(told["candidates"]) == 257
    assert [len(stage["survives"]) for stage in told["rounds"]] == [129, 65, 33, 17]
    np.testing.assert_array_equal(told["survivors"][0], [1, 1.5, 0])
    assert len(result.diagnostics["warmup"]["ends"]) == len(told["survivors"])
