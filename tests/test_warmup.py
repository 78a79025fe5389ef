"""Phase 1 on a sample: what it hands out, that it can be resumed, and what it is good for."""

from __future__ import annotations

import dataclasses
import itertools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import problems
from config_rows_warmup import GOOD, POOR, ROWS, fit, warmup_of
from nlsq_dask import HybridStreamingConfig, Status, fit_dataset, phases
from nlsq_dask.objective.on_sample import SampleObjective
from nlsq_dask.results.diagnostics import runs_of
from nlsq_dask.warmup import search
from nlsq_dask.warmup.search import warm_up
from nlsq_dask.warmup.state import WarmupState


@pytest.mark.parametrize(("field", "shows"), ROWS, ids=[field for field, _ in ROWS])
def test_each_option_changes_what_it_says(field, shows):
    assert field in {known.name for known in dataclasses.fields(HybridStreamingConfig)}
    assert shows(fit)


def arguments(**options):
    """What a fit hands to the warmup: objective, configuration, tolerances."""
    with mock.patch.object(phases, "warm_up", wraps=warm_up) as watched:
        fit(**options)
    return watched.call_args.args


def flat(warmup):
    """All numbers of a warmup, to compare bits."""
    found = [warmup.whitening, warmup.num_starts, warmup.num_evaluations, warmup.halves_agree]
    for optimum in warmup.optima:
        found += [optimum.params, optimum.cost, optimum.factor]
    for descent in warmup.descents:
        found += [getattr(descent, field.name) for field in dataclasses.fields(descent)]
    found += [warmup.normalizer.offset, warmup.normalizer.scale]
    found += [np.array(list(warmup.defense.export_metrics().values()))]
    if warmup.tournament is not None:
        found += [warmup.tournament.candidates, warmup.tournament.survivors]
        found += [stage.costs for stage in warmup.tournament.rounds]
    return [np.asarray(part).tobytes() for part in found]


# -- resumed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_multistart": True, "n_starts": 5},
        {"p0": GOOD, "warm_start_threshold": 0.5, "lbfgs_line_search": "backtracking"},
        {"bounds": {"rate": (0, 2.5), "offset": (0.2, 1)}, "p0": {**POOR, "offset": 0.5}},
    ],
    ids=["scattered", "tournament", "warm start", "bounds"],
)
def test_resumed_from_any_state_it_ends_in_the_same_bits(options):
    objective, config, tolerances = arguments(checkpoint_frequency=13, **options)
    states = []
    whole = warm_up(objective, config, tolerances, on_state=states.append)
    assert len(states) > 3
    assert states[-1].progress.carry is None
    for state in states:
        arrays = {name: np.array(value) for name, value in state.to_arrays().items()}
        assert all(value.dtype.kind in "bif" for value in arrays.values())
        again = WarmupState.from_arrays(arrays)
        assert flat(warm_up(objective, config, tolerances, resume=again)) == flat(whole)


def test_states_come_every_so_many_iterations_and_at_the_end():
    objective, config, tolerances = arguments(checkpoint_frequency=20)
    states = []
    whole = warm_up(objective, config, tolerances, on_state=states.append)
    total = sum(descent.num_iterations for descent in whole.descents)
    *under_way, last = states
    counts = [state.num_iterations + state.progress.carry.count for state in under_way]
    assert set(counts) <= set(range(20, total, 20))
    assert len(counts) >= total // 20 - len(whole.descents)
    assert last.num_iterations == total
    assert last.progress.finished == whole.descents


def test_a_resumed_warmup_goes_on_telling():
    objective, config, tolerances = arguments(checkpoint_frequency=40, callback_frequency=10)
    states, records, later = [], [], []
    warm_up(objective, config, tolerances, on_state=states.append, on_iteration=records.append)
    warm_up(objective, config, tolerances, on_iteration=later.append, resume=states[0])
    expected = [record.iteration for record in records if record.iteration > 40]
    assert [record.iteration for record in later] == expected


def test_a_state_of_another_problem_is_refused():
    objective, config, tolerances = arguments()
    states = []
    warm_up(objective, config, tolerances, on_state=states.append)
    other = dataclasses.replace(states[-1], starts=np.zeros((1, 7)))
    with pytest.raises(ValueError, match=r"`resume` must .* 3 free parameters.*\(1, 7\)"):
        warm_up(objective, config, tolerances, resume=other)


def test_watching_does_not_change_the_bits():
    objective, config, tolerances = arguments(callback_frequency=1, checkpoint_frequency=1)
    alone = warm_up(objective, config, tolerances)
    watched = warm_up(
        objective, config, tolerances, on_iteration=lambda _: None, on_state=lambda _: None
    )
    assert flat(alone) == flat(watched)


# -- many blocks


def arguments_of(t, y, model, p0, **options):
    """What a fit of these rows hands to the warmup."""
    ds = xr.Dataset({"y": ("row", y), "t": ("row", t)}).chunk(row=len(t) // 64)
    with mock.patch.object(phases, "warm_up", wraps=warm_up) as watched:
        config = HybridStreamingConfig(max_sample_fraction=0.5, verbose=0, **options)
        fit_dataset(ds, model, y="y", x="t", p0=p0, config=config)
    return watched.call_args.args


def in_blocks(t, y, model, p0):
    """The warmup of a fit whose sample has several blocks, and the blocks of each solve."""
    objective, config, tolerances = arguments_of(t, y, model, p0)
    assert len(objective.sample.blocks) >= 4
    with mock.patch.object(search, "minimize", wraps=search.minimize) as solved:
        warmup = warm_up(objective, config, tolerances)
    return warmup, objective.sample, [call.args[0].blocks for call in solved.call_args_list]


def test_starts_that_lead_to_one_point_take_the_last_of_the_way_once():
    t, y = problems.make_decay(200_000, seed=3)
    warmup, sample, solves = in_blocks(t, y, problems.decay, problems.P0)
    assert warmup.num_starts > 3
    assert len(warmup.optima) == 1
    # From there, and once more for the best of all.
    assert solves.count(sample.blocks) == 2
    # That the halves agree their first steps tell.
    assert warmup.halves_agree
    assert not set(solves) & set(sample.halves)


def test_starts_that_lead_apart_stay_apart():
    """A wave of the wrong frequency: several optima, of which the whole sample knows the best."""
    t = np.linspace(0, 10, 200_000)
    y = 2 * np.sin(3 * t + 0.3) + np.random.default_rng(0).normal(size=t.size)

    def wave(t, a, w, p):
        return a * jnp.sin(w * t + p)

    p0 = {"a": 1.0, "w": 3 + 2 * np.pi / 10, "p": 0.0}
    warmup, sample, solves = in_blocks(t, y, wave, p0)
    assert solves.count(sample.blocks) > 2
    assert len(warmup.optima) > 1
    assert abs(warmup.optima[0].params[1]) == pytest.approx(3, abs=0.01)


def test_halves_are_of_as_many_rows_where_chunks_are_not():
    """Every second chunk of a hundred has next to no rows: night, or an instrument that was off."""
    t, y = problems.make_decay(100_000, noise=0.1)
    y = np.where((np.arange(t.size) // 1000 % 2 == 1) & (np.arange(t.size) % 200 > 0), np.nan, y)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)})
    config = HybridStreamingConfig(chunk_size=1000, max_sample_fraction=0.3)
    result = fit_dataset(ds, problems.decay, y="y", p0=problems.P0, config=config)
    sample = result.diagnostics["sample"]
    assert sample["num_rows"] > 0.25 * np.isfinite(y).sum()
    assert sample["halves_agree"]
    assert result.num_passes <= 4


@pytest.mark.parametrize(("drift", "agree"), [(0.0, True), (0.02, False)])
def test_optima_of_halves_that_disagree_compete(drift, agree):
    """The values of one half are smaller by `drift`."""
    t, y = problems.make_decay(200_000, seed=3)
    given, config, tolerances = arguments_of(t, y, problems.decay, problems.P0)
    source, (first, second) = given.sample.source, given.sample.halves
    values = source.y.values.copy()
    values[second.start * source.leaf_shape[0] :] *= 1 - drift
    column = dataclasses.replace(source.y, values=values)
    sample = dataclasses.replace(given.sample, source=source.with_columns({"y": column}))
    objective = SampleObjective(given.problem, sample)
    with mock.patch.object(search, "minimize", wraps=search.minimize) as solved:
        warmup = warm_up(objective, config, tolerances)
    assert warmup.halves_agree is agree
    solves = [call.args[0].blocks for call in solved.call_args_list]
    assert (first in solves, second in solves) == (not agree, not agree)
    assert len(warmup.optima) == (1 if agree else 3)


@pytest.mark.parametrize("num_rows", [20_000, 49_999])
def test_a_block_of_all_rows_is_a_sample_of_their_whole_time(num_rows):
    t, y = problems.make_decay(num_rows, seed=3)
    y[7] = np.nan
    objective, *_ = arguments_of(t, y, problems.decay, problems.P0)
    assert objective.sample.is_everything
    assert len(objective.sample.blocks) > 1
    times = np.asarray(objective.block(0).x[0])
    middle = np.quantile(times, [0.01, 0.25, 0.5, 0.75, 0.99])
    np.testing.assert_allclose(middle, np.quantile(t, [0.01, 0.25, 0.5, 0.75, 0.99]), atol=0.02)


@pytest.mark.parametrize("options", [{}, {"cg_param_threshold": 1}], ids=["dense", "matrix free"])
def test_residuals_of_all_rows_are_in_the_order_they_were_read(options):
    t, y = problems.make_decay(40_001, seed=3)
    y[[0, 9, 40_000]] = np.nan
    seen = []

    def watched(residuals):
        seen.append(residuals)
        return runs_of(residuals)

    ds = xr.Dataset({"y": ("row", y), "t": ("row", t)}).chunk(row=1000)
    config = HybridStreamingConfig(verbose=0, **options)
    with mock.patch.object(phases, "runs_of", watched):
        fit = fit_dataset(ds, problems.decay, y="y", x="t", p0=problems.P0, config=config)
    amplitude, rate, offset = fit.popt
    expected = amplitude * np.exp(-rate * t) + offset - y
    np.testing.assert_allclose(seen[-1], expected[np.isfinite(y)], atol=1e-12)


# -- records


def test_records_are_in_original_space_with_the_loss_at_their_point():
    t, y = problems.make_decay(400, noise=0.05)
    records = []
    result = fit(callback=records.append, callback_frequency=3)
    in_warmup = [record for record in records if record.phase == 1]
    in_passes = [record for record in records if record.phase == 2]
    assert records == in_warmup + in_passes
    assert [record.iteration for record in in_passes] == list(range(1, result.num_passes + 1))
    assert result.history == tuple(in_passes)
    assert len(in_warmup) > 5
    for record in in_warmup:
        assert record.iteration % 3 == 0
        residual = problems.decay_numpy(t, record.params) - y
        np.testing.assert_allclose(record.loss, np.mean(residual**2), rtol=1e-10)
        np.testing.assert_allclose(record.cost, 0.5 * np.sum(residual**2), rtol=1e-10)
        assert record.num_rows == 400
        assert np.isnan(record.distance)
    assert str(in_warmup[0]).startswith("warmup, iteration 3: loss ")
    assert str(in_passes[0]).startswith("pass 1: cost ")


def test_records_hold_all_parameters_fixed_ones_too():
    records = []
    ds = xr.Dataset(dict(zip("ty", [("row", v) for v in problems.make_decay(300)], strict=True)))
    fit_dataset(
        ds,
        problems.decay,
        y="y",
        x="t",
        p0=POOR | {"offset": 0.1},
        fixed=["offset"],
        callback=records.append,
    )
    assert records[0].phase == 1
    assert all(record.params.shape == (3,) and record.params[2] == 0.1 for record in records)


def test_stop_iteration_in_the_warmup_ends_the_fit_after_a_pass():
    seen = []

    def stop(record):
        seen.append(record)
        raise StopIteration

    # So many rows that one pass does not do.
    result = fit(callback=stop, num_rows=60_000, callback_frequency=5)
    assert [record.phase for record in seen] == [1, 2]
    assert result.status is Status.STOPPED_BY_CALLBACK
    assert result.num_passes == 1
    assert warmup_of(result)["criteria"] == ["callback"]
    assert warmup_of(result)["was_stopped"]
    np.testing.assert_allclose(result.popt, problems.TRUTH, atol=0.05)


# -- what was done


def test_the_diagnostics_say_how_each_descent_went():
    t, y = problems.make_decay(400, noise=0.05)
    told = warmup_of(fit(max_warmup_iterations=30))
    assert set(told["criteria"]) <= {"stationary", "max_iter"}
    lists = ("criteria", "iterations", "losses", "ends", "line_search_failures", "history_fill")
    assert {len(told[name]) for name in lists} == {5}
    np.testing.assert_array_equal(told["starts"][0], list(POOR.values()))
    for point, loss in itertools.chain(
        zip(told["starts"], told["start_losses"], strict=True),
        zip(told["ends"], told["losses"], strict=True),
    ):
        residual = problems.decay_numpy(t, point) - y
        np.testing.assert_allclose(loss, np.mean(residual**2) / np.var(y), rtol=1e-8)
    assert all(count <= 30 for count in told["iterations"])


def test_the_relative_loss_counts_weights():
    """Of y, as sigma weights it, about its weighted mean: 1 for a constant at that mean."""
    t, y = problems.make_decay(300)
    sigma = np.linspace(0.1, 3, 300)
    mean = float(np.average(y, weights=sigma**-2))
    ds = xr.Dataset({name: ("row", v) for name, v in zip("tys", (t, y, sigma), strict=True)})
    result = fit_dataset(
        ds, problems.decay, y="y", x="t", sigma="s", p0={**GOOD, "amplitude": 0.0, "offset": mean}
    )
    np.testing.assert_allclose(warmup_of(result)["start_losses"][0], 1.0)


def test_without_iterations_there_are_no_descents():
    result = fit(max_warmup_iterations=0)
    assert result.success
    assert warmup_of(result)["criteria"] == []
    assert result.diagnostics["defense"]["metrics"]["nlsq_defense_warmup_calls_total"] == 0


def test_the_loss_is_compiled_once_for_all_descents():
    def count(n_starts):
        traced = []

        def model(t, amplitude, rate, offset):  # another for each count: none is compiled yet
            traced.append(1)
            return problems.decay(t, amplitude, rate, offset) + 1e-300 * n_starts

        told = warmup_of(
            fit(model, enable_multistart=True, n_starts=n_starts, elimination_rounds=0)
        )
        assert len(told["ends"]) > n_starts // 2
        return len(traced)

    assert count(3) == count(12)


# -- what it is good for


def two_decays(t, fast, fast_rate, slow, slow_rate, offset):
    return fast * jnp.exp(-fast_rate * t) + slow * jnp.exp(-slow_rate * t) + offset


TWO = np.array([1e4, 1.0, 100.0, 0.01, 1.0])


@pytest.fixture(scope="module")
def imbalanced():
    t = np.geomspace(0.01, 600, 1_000_000)
    y = np.asarray(two_decays(t, *TWO)) + np.random.default_rng(0).normal(size=t.size)
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


FACTORS = [
    (3, 3, 3, 3, 3),
    (1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3),
    (3, 1 / 3, 3, 1 / 3, 3),
    (1 / 3, 3, 1 / 3, 3, 1 / 3),
]


# A trial with a negative rate has a cost, but its Jacobian's norms overflow: it is rejected.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("strategy", ["auto", "jacobian"])
def test_scales_a_million_apart_from_a_factor_of_three_off(imbalanced, factors, strategy):
    config = HybridStreamingConfig(normalization_strategy=strategy)
    result = fit_dataset(
        imbalanced, two_decays, y="y", x="t", p0=list(TWO * factors), config=config
    )
    assert result.success
    assert np.all(np.abs(result.popt - TWO) < 5 * result.perr)
    assert np.all(result.perr < 0.02 * TWO)
