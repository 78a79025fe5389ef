"""Robust losses, group weights, priors, group variances and ties against independent oracles."""

from __future__ import annotations

from dataclasses import replace

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from nlsq_dask import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig, fit_dataset
from nlsq_dask.losses import LOSSES, robust_terms
from problems import TRUTH, decay, decay_jacobian, decay_numpy

ROBUST = ["soft_l1", "huber", "cauchy", "arctan"]


def make_outliers(num_rows=12_000, share=0.15, seed=0):
    rng = np.random.default_rng(seed)
    t = np.linspace(0.0, 10.0, num_rows)
    y = decay_numpy(t, TRUTH) + 0.1 * rng.normal(size=num_rows)
    is_outlier = rng.uniform(size=num_rows) < share
    y[is_outlier] += rng.exponential(2.0, is_outlier.sum())
    return t, y


def as_dataset(t, y, **more):
    return xr.Dataset({"y": ("t", y), **{k: ("t", v) for k, v in more.items()}}, coords={"t": t})


def scipy_fit(t, y, start=TRUTH, weight=1.0, **options):
    return scipy.optimize.least_squares(
        lambda p: (decay_numpy(t, p) - y) * weight,
        start,
        jac=lambda p: decay_jacobian(t, p) * np.expand_dims(weight, -1),
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        x_scale="jac",
        max_nfev=1000,
        **options,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_derivatives_of_a_loss_are_its_derivatives(loss):
    r = np.array([-30.0, -1.7, -0.4, 0.0, 0.3, 0.99, 1.01, 5.0])
    with jax.enable_x64(True):
        scale = jnp.asarray(0.7)
        terms = robust_terms(LOSSES[loss], jnp.asarray(r), scale)

        def cost(r):
            return robust_terms(LOSSES[loss], r, scale).cost

        first = jax.vmap(jax.grad(cost))(jnp.asarray(r))
        second = jax.vmap(jax.grad(jax.grad(cost)))(jnp.asarray(r))
    np.testing.assert_allclose(terms.score, first, rtol=1e-12)
    np.testing.assert_allclose(terms.curvature, second, rtol=1e-12, atol=1e-14)
    assert np.all(np.asarray(terms.clamped) > 0)


@pytest.mark.parametrize("f_scale", [0.05, 0.3])
@pytest.mark.parametrize("loss", ROBUST)
def test_robust_fits_are_scipys(loss, f_scale):
    t, y = make_outliers()
    expected = scipy_fit(t, y, loss=loss, f_scale=f_scale)
    result = fit_dataset(as_dataset(t, y), decay, loss=loss, f_scale=f_scale)
    assert result.success
    assert np.max(np.abs(result.popt - expected.x) / result.perr) < 1e-5
    assert result.cost == pytest.approx(expected.cost, rel=1e-12)


@pytest.mark.parametrize("loss", [pytest.param("huber", marks=pytest.mark.slow), "cauchy"])
def test_robust_fits_over_many_chunks_take_few_passes(loss):
    """Where the sample is a small part of the rows, so that the passes do the work."""
    t, y = make_outliers(400_000)
    weight = np.where(np.arange(t.size) % 2 == 0, 1.0, 0.5)
    expected = scipy_fit(t, y, weight=weight, loss=loss, f_scale=0.2)
    ds = as_dataset(t, y, s=1 / weight).chunk(t=50_000)
    result = fit_dataset(ds, decay, y="y", sigma="s", loss=loss, f_scale=0.2)
    assert result.success
    assert not result.diagnostics["sample"]["is_everything"]
    assert np.max(np.abs(result.popt - expected.x) / result.perr) < 1e-5
    assert result.num_passes <= 6


def test_scale_from_the_sample_is_that_of_the_inliers():
    t, y = make_outliers(share=0.1)
    result = fit_dataset(as_dataset(t, y), decay, loss="cauchy", f_scale="mad")
    residual = decay_numpy(t, result.popt) - y
    assert result.f_scale == pytest.approx(1.4826 * np.median(np.abs(residual)), rel=0.02)
    assert 0.1 < result.f_scale < 0.13
    again = fit_dataset(as_dataset(t, y), decay, loss="cauchy", f_scale=result.f_scale)
    np.testing.assert_allclose(result.popt, again.popt, atol=1e-5 * again.perr.min())


def test_a_robust_fit_reports_the_sandwich():
    t, y = make_outliers()
    robust = fit_dataset(as_dataset(t, y), decay, loss="huber", f_scale=0.2)
    plain = fit_dataset(as_dataset(t, y), decay, loss="huber", f_scale=0.2, covariance="HC0")
    jac = decay_jacobian(t, robust.popt)
    r = decay_numpy(t, robust.popt) - y
    is_inlier = np.abs(r) <= 0.2
    score = np.where(is_inlier, r, 0.2 * np.sign(r))
    # Huber's loss is linear beyond f_scale, where its second derivative is zero.
    bread = np.linalg.inv(jac[is_inlier].T @ jac[is_inlier])
    expected = bread @ (jac.T @ (jac * score[:, None] ** 2)) @ bread
    np.testing.assert_allclose(plain.pcov, expected, rtol=1e-6)
    np.testing.assert_allclose(robust.pcov, expected * len(t) / (len(t) - 3), rtol=1e-6)
    assert robust.covariance_kind == "HC1"


def test_clustered_covariance_sums_scores_over_clusters_first():
    rng = np.random.default_rng(3)
    label = np.repeat([f"station {i}" for i in range(40)], 500)
    t = np.tile(np.linspace(0, 10, 500), 40)
    y = decay_numpy(t, TRUTH) + 0.1 * rng.normal(size=t.size)
    y += 0.1 * np.repeat(rng.normal(size=40), 500)  # what the rows of a station share
    ds = xr.Dataset({"y": ("row", y), "t": ("row", t)}, coords={"station": ("row", label)})
    result = fit_dataset(ds, decay, y="y", cluster="station")
    jac = decay_jacobian(t, result.popt)
    score = jac * (decay_numpy(t, result.popt) - y)[:, None]
    sums = score.reshape(40, 500, 3).sum(axis=1)
    bread = np.linalg.inv(jac.T @ jac)
    m, k = jac.shape
    expected = bread @ sums.T @ sums @ bread * (40 / 39) * (m - 1) / (m - k)
    np.testing.assert_allclose(result.pcov, expected, rtol=1e-6)
    classical = fit_dataset(ds, decay, y="y")
    assert result.perr[2] > 2 * classical.perr[2]
    chunked = fit_dataset(ds.chunk(row=3_000), decay, y="y", cluster="station")
    np.testing.assert_allclose(chunked.pcov, expected, rtol=1e-6)
    reach = 0.5 * np.diff(result.confidence_interval(0.95), axis=1).ravel()
    np.testing.assert_allclose(reach, scipy.stats.t.ppf(0.975, 39) * result.perr, rtol=1e-9)
    assert "clustered sandwich, 40 clusters" in result.summary()
    assert not any("clusters are few" in note for note in result.diagnostics["notes"])


def test_few_clusters_are_noted_and_their_intervals_wide():
    rng = np.random.default_rng(4)
    label, t = np.repeat(np.arange(3), 500), np.tile(np.linspace(0, 10, 500), 3)
    y = decay_numpy(t, TRUTH) + 0.1 * rng.normal(size=t.size) + np.array([0.1, -0.2, 0.1])[label]
    ds = xr.Dataset({"y": ("row", y), "t": ("row", t), "label": ("row", label)})
    result = fit_dataset(ds, decay, y="y", cluster="label")
    reach = 0.5 * np.diff(result.confidence_interval(0.95), axis=1).ravel()
    np.testing.assert_allclose(reach, 4.30265273 * result.perr, rtol=1e-6)
    assert any(note.startswith("3 clusters are few") for note in result.diagnostics["notes"])


# -- weights by group


def make_groups(num_rows=9_000):
    rng = np.random.default_rng(1)
    group = rng.integers(0, 3, num_rows)
    t = rng.uniform(0, 10, num_rows)
    y = 2.0 * np.exp(-0.5 * t) + 0.1 * group + 0.1 * rng.normal(size=num_rows)
    return group, t, y


def grouped(group, t, a, b, c):
    return a * jnp.exp(-b * t) + c + 0 * group


def test_group_weights_are_weights_of_squared_residuals():
    group, t, y = make_groups()
    weights = np.array([1.0, 4.0, 0.25])
    config = HybridStreamingConfig(enable_residual_weighting=True, residual_weights=tuple(weights))
    ds = as_dataset(t, y, group=group)
    result = fit_dataset(ds, grouped, y="y", x=("group", "t"), config=config)
    expected = scipy_fit(t, y, weight=np.sqrt(weights[group]))
    assert np.max(np.abs(result.popt - expected.x) / result.perr) < 1e-5
    unweighted = fit_dataset(ds, grouped, y="y", x=("group", "t"))
    assert np.max(np.abs(result.popt - unweighted.popt) / result.perr) > 5


def test_a_group_of_weight_zero_is_left_out():
    group, t, y = make_groups()
    config = HybridStreamingConfig(enable_residual_weighting=True, residual_weights=(1, 0, 1))
    result = fit_dataset(as_dataset(t, y, group=group), grouped, x=("group", "t"), config=config)
    kept = group != 1
    expected = scipy_fit(t[kept], y[kept])
    assert np.max(np.abs(result.popt - expected.x) / result.perr) < 1e-5
    assert result.num_rows == kept.sum()
    assert result.num_masked == (~kept).sum()


def test_weights_change_between_fits_of_one_optimizer():
    group, t, y = make_groups(3_000)
    x = np.stack([group, t], axis=1)

    def model(x, a, b, c):
        return a * jnp.exp(-b * x[:, 1]) + c

    optimizer = AdaptiveHybridStreamingOptimizer()
    plain = optimizer.fit((x, y), model, p0=TRUTH)
    optimizer.set_residual_weights([1.0, 9.0, 1.0])
    weighted = optimizer.fit((x, y), model, p0=TRUTH)
    expected = scipy_fit(t, y, weight=np.sqrt(np.array([1.0, 9.0, 1.0])[group]))
    assert np.max(np.abs(weighted.popt - expected.x) / weighted.perr) < 1e-5
    assert np.max(np.abs(weighted.popt - plain.popt) / weighted.perr) > 1


@pytest.mark.parametrize("wrong", [3, -1, 0.5])
def test_a_row_of_no_group_is_an_error(wrong):
    group, t, y = make_groups(3_000)
    group = group.astype(float)
    group[17] = wrong
    config = HybridStreamingConfig(enable_residual_weighting=True, residual_weights=(1, 2, 3))
    with pytest.raises(
        ValueError, match=r"'group', the model's first variable, must hold the number .* 1 rows"
    ):
        fit_dataset(as_dataset(t, y, group=group), grouped, x=("group", "t"), config=config)


# -- penalties


def line(x, c):
    return sum(c[i] * x**i for i in range(4))


def make_line(num_rows=5_000):
    rng = np.random.default_rng(5)
    x = np.linspace(-1, 1, num_rows)
    matrix = np.stack([x**i for i in range(4)], axis=1)
    y = matrix @ [1.0, -2.0, 0.5, 3.0] + 0.2 * rng.normal(size=num_rows)
    return x, y, matrix


@pytest.mark.parametrize("chunk", [None, 700])
def test_group_variance_is_the_exact_minimiser(chunk):
    x, y, matrix = make_line()
    strength = 0.3
    config = HybridStreamingConfig(
        enable_group_variance_regularization=True,
        group_variance_lambda=strength,
        group_variance_indices=[(0, 2), (2, 4)],
    )
    source = xr.Dataset({"y": ("x", y)}, coords={"x": x})
    source = source if chunk is None else source.chunk(x=chunk)
    result = fit_dataset(source, line, p0={"c": np.zeros(4)}, config=config)
    m = len(y)
    center = np.eye(2) - 0.5
    penalty = strength * m / 2 * scipy.linalg.block_diag(center, center)
    hessian = matrix.T @ matrix + penalty
    expected = np.linalg.solve(hessian, matrix.T @ y)
    np.testing.assert_allclose(result.popt, expected, atol=1e-6 * result.perr.min())
    r = matrix @ expected - y
    variances = np.var(expected[:2]) + np.var(expected[2:])
    assert result.cost == pytest.approx(0.5 * r @ r + 0.5 * strength * m * variances, rel=1e-12)
    assert result.penalty_cost == pytest.approx(0.5 * strength * m * variances, rel=1e-9)
    s2 = r @ r / (m - 4)
    np.testing.assert_allclose(result.pcov, s2 * np.linalg.inv(hessian), rtol=1e-6)


@pytest.mark.parametrize("num_rows", [5_000, 200_000])
def test_priors_are_rows_of_the_least_squares_problem(num_rows):
    """Also where the fit begins on a sample, beside which the prior weighs as much less."""
    x, y, matrix = make_line(num_rows)
    width = 0.2 / np.sqrt(num_rows)
    sigma = np.full(num_rows, 0.2)
    ds = xr.Dataset({"y": ("x", y), "s": ("x", sigma)}, coords={"x": x})
    result = fit_dataset(
        ds,
        line,
        y="y",
        sigma="s",
        absolute_sigma=True,
        p0={"c": np.zeros(4)},
        priors={"c": (np.array([1.1, -2.0, 0.4, 3.0]), width)},
    )
    hessian = matrix.T @ matrix / 0.04 + np.eye(4) / width**2
    expected = np.linalg.solve(
        hessian, matrix.T @ y / 0.04 + np.array([1.1, -2.0, 0.4, 3.0]) / width**2
    )
    assert result.success
    np.testing.assert_allclose(result.popt, expected, atol=1e-5 * result.perr.min())
    np.testing.assert_allclose(result.pcov, np.linalg.inv(hessian), rtol=1e-6, atol=1e-18)
    assert result.chi2 == pytest.approx(np.sum((matrix @ expected - y) ** 2) / 0.04, rel=1e-9)


def test_a_prior_and_a_robust_loss_go_together():
    t, y = make_outliers()
    result = fit_dataset(
        as_dataset(t, y),
        decay,
        loss="soft_l1",
        f_scale=0.2,
        absolute_sigma=True,
        priors={"rate": (0.4, 1e-3)},
    )
    expected = scipy.optimize.minimize(
        lambda p: (
            np.sum(0.04 * (np.sqrt(1 + ((decay_numpy(t, p) - y) / 0.2) ** 2) - 1))
            + 0.5 * ((p[1] - 0.4) / 1e-3) ** 2
        ),
        result.popt + 0.01,
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-10, "maxiter": 4000},
    )
    assert np.max(np.abs(result.popt - expected.x) / result.perr) < 1e-3


# -- ties


def test_a_tied_parameter_follows_and_has_its_share_of_the_covariance():
    t, y = make_outliers(share=0.0)
    result = fit_dataset(
        as_dataset(t, y), decay, ties={"offset": lambda amplitude, rate: amplitude * rate**3}
    )

    def value(p):
        return np.array([p[0], p[1], p[0] * p[1] ** 3])

    def tangent(p):
        return np.array([[1, 0], [0, 1], [p[1] ** 3, 3 * p[0] * p[1] ** 2]])

    oracle = scipy.optimize.least_squares(
        lambda p: decay_numpy(t, value(p)) - y,
        [2.0, 0.5],
        jac=lambda p: decay_jacobian(t, value(p)) @ tangent(p),
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    expected = value(oracle.x)
    e = tangent(oracle.x)
    s2 = 2 * oracle.cost / (len(t) - 2)
    covariance = e @ np.linalg.inv(oracle.jac.T @ oracle.jac) @ e.T * s2
    np.testing.assert_allclose(result.popt, expected, atol=1e-5 * np.sqrt(covariance[0, 0]))
    size = np.sqrt(np.diag(covariance))  # one of the correlations is almost zero
    np.testing.assert_allclose(
        result.pcov / np.outer(size, size), covariance / np.outer(size, size), atol=1e-7
    )
    assert result.dof == len(t) - 2
    assert "(tied)" in result.summary()


def test_ties_depend_on_ties_and_on_fixed_parameters():
    t, y = make_outliers(share=0.0)

    def model(t, a, b, c, d):
        return a * jnp.exp(-b * t) + c + 0 * d

    result = fit_dataset(
        as_dataset(t, y),
        model,
        fixed=("a",),
        p0={"a": 2.0, "b": 0.4},
        ties={"d": lambda c, twice=2: twice * c, "c": lambda a, b: 0.05 * a + 0 * b},
    )
    assert result["c"] == pytest.approx(0.1)
    assert result["d"] == pytest.approx(0.2)
    assert result.is_free.tolist() == [False, True, False, False]


def test_a_tie_and_a_prior_on_what_it_gives():
    x, y, _ = make_line()

    def model(x, a, b):
        return a + b * x

    ds = xr.Dataset({"y": ("x", y)}, coords={"x": x})
    result = fit_dataset(
        ds,
        model,
        ties={"b": lambda a: -2 * a},
        absolute_sigma=True,
        priors={"b": (1.0, 0.01)},
    )
    column = 1 - 2 * x
    hessian = column @ column + 4 / 0.01**2
    expected = (column @ y - 2 * 1.0 / 0.01**2) / hessian
    assert result["a"] == pytest.approx(expected, abs=1e-8)
    assert result.perr[1] == pytest.approx(2 / np.sqrt(hessian), rel=1e-6)


# -- where it is computed makes no difference


@pytest.mark.cluster
def test_cluster_and_process_agree_to_the_bit(client):
    t, y = make_outliers(200_000)
    label = np.arange(t.size) // 5_000
    ds = as_dataset(t, y, station=label).chunk(t=20_000)
    options = {"y": "y", "loss": "cauchy", "f_scale": 0.2, "cluster": "station"}
    here = fit_dataset(ds, decay, **options)
    there = fit_dataset(ds, decay, client=client, **options)
    assert here.popt.tobytes() == there.popt.tobytes()
    assert here.pcov.tobytes() == there.pcov.tobytes()
    for name in ("num_rows", "residual_mean", "residual_variance"):
        chunks = here.diagnostics["chunks"][name], there.diagnostics["chunks"][name]
        assert chunks[0].tobytes() == chunks[1].tobytes()


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(
    loss=st.sampled_from(ROBUST),
    chunk=st.sampled_from([1_000, 2_500]),
    seed=st.integers(0, 5),
)
def test_chunking_does_not_matter(loss, chunk, seed):
    t, y = make_outliers(5_000, seed=seed)
    config = HybridStreamingConfig(max_warmup_iterations=0)
    whole = fit_dataset(as_dataset(t, y), decay, loss=loss, f_scale=0.3, config=config)
    lazy = xr.Dataset({"y": ("t", da.from_array(y, chunk))}, coords={"t": t})
    cut = fit_dataset(lazy, decay, loss=loss, f_scale=0.3, config=replace(config, chunk_size=chunk))
    np.testing.assert_allclose(cut.popt, whole.popt, atol=1e-5 * whole.perr.min())
    np.testing.assert_allclose(cut.pcov, whole.pcov, rtol=1e-6)
