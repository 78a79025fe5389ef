"""The covariance from factors and scores, against inverses in extended precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlsq_dask.normal_equations import ScoreSums
from nlsq_dask.parameters.given import build_parameter_space
from nlsq_dask.results.covariance import (
    estimate_covariance,
    no_covariance,
    sandwich,
    small_sample_factor,
)
from oracles import LONG, inverse

SEEDS = st.integers(0, 2**32 - 1)


def make_space(k, fixed=(), ties=None):
    names = tuple("abcdefgh"[:k])
    starts = {name: 1.0 + i for i, name in enumerate(names) if name not in (ties or {})}
    return build_parameter_space(names, {}, starts, None, fixed, ties)


def factor_of(jac):
    return np.linalg.qr(jac, mode="r")


def as_float(matrix):
    return np.asarray(matrix, float)


def make_jacobian(seed, k, decades=0.0):
    """Columns of different units, ten to the power of up to so many."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(k + 5, k)) * 10 ** rng.uniform(-decades, decades, k)


@settings(max_examples=25)
@given(
    seed=SEEDS,
    k=st.integers(1, 5),
    decades=st.sampled_from([0.0, 12.0]),
    variance=st.floats(1e-6, 1e6),
)
def test_classical_is_the_inverse_of_the_gram(seed, k, decades, variance):
    jac = make_jacobian(seed, k, decades)
    space = make_space(k)
    covariance = estimate_covariance(factor_of(jac), variance, space, space.p0)
    exact = jac.astype(LONG)
    expected = as_float(inverse(exact.T @ exact) * variance)
    size = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(covariance.matrix, expected, atol=0, rtol=1e-7 * condition(jac))
    np.testing.assert_allclose(
        np.sqrt(np.diag(covariance.matrix)), size, rtol=1e-12 * condition(jac)
    )
    assert covariance.rank == k
    assert covariance.condition_number == pytest.approx(condition(jac), rel=1e-9)
    assert covariance.rank_tolerance == 4 * k * 2.0**-52


def condition(jac):
    return float(np.linalg.cond(jac / np.linalg.norm(jac, axis=0)))


def test_a_parameter_that_no_row_sees_is_infinite_by_itself():
    space = make_space(2)
    jac = np.array([[2.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    covariance = estimate_covariance(factor_of(jac), 1.0, space, np.ones(2))
    np.testing.assert_allclose(covariance.matrix[0, 0], 1 / 9)
    assert covariance.matrix[1, 1] == np.inf
    assert covariance.rank == 1
    assert covariance.condition_number == np.inf


@pytest.mark.parametrize("gap", [0.5, 2.0])
def test_the_rank_is_judged_at_its_tolerance(gap):
    """Singular values of 1 and as much as the tolerance times `gap`, of unit columns nearly."""
    tolerance = 8 * 2.0**-52
    cosine_gap = gap * tolerance  # the smaller value of two unit columns at a small angle
    factor = np.array([[1.0, 1.0], [0.0, cosine_gap * np.sqrt(2) * np.sqrt(2)]])
    space = make_space(2)
    covariance = estimate_covariance(factor, 1.0, space, np.ones(2))
    assert covariance.rank == (2 if gap > 1 else 1)


def test_variances_beyond_all_numbers_are_infinite_without_a_warning():
    space = make_space(1)
    covariance = estimate_covariance(np.array([[1e-158]]), 1.0, space, np.ones(1))
    assert covariance.matrix[0, 0] == np.inf


def test_a_variance_beyond_all_numbers_leaves_the_others_alone():
    """On a plateau: the square of the derivative by b is no normal number."""
    covariance = estimate_covariance(np.diag([2.0, 1e-158]), 1.0, make_space(2), np.ones(2))
    assert covariance.matrix[0, 0] == 0.25
    assert covariance.matrix[1, 1] == np.inf
    assert np.isnan(covariance.matrix[0, 1])
    assert covariance.rank == 2


def test_a_sandwich_that_overflows_leaves_the_others_alone():
    robust = np.array([[2.0, np.inf, 0.5], [np.inf, np.inf, -np.inf], [0.5, -np.inf, 1.0]])
    covariance = estimate_covariance(np.eye(3), 1.0, make_space(3), np.ones(3), robust)
    np.testing.assert_array_equal(
        covariance.matrix[np.ix_([0, 2], [0, 2])], robust[np.ix_([0, 2], [0, 2])]
    )
    assert covariance.matrix[1, 1] == np.inf


def test_a_sandwich_takes_the_place_of_the_classical_one():
    space = make_space(3, fixed=("b",))
    robust = np.array([[2.0, 0.3], [0.3, 1.0]])
    covariance = estimate_covariance(np.eye(2), 7.0, space, np.ones(2), robust)
    np.testing.assert_array_equal(covariance.matrix[np.ix_([0, 2], [0, 2])], robust)
    assert np.all(covariance.matrix[1] == 0)


def test_no_covariance_knows_nothing():
    nothing = no_covariance()
    assert nothing.matrix is None
    assert np.isnan([nothing.rank, nothing.rank_tolerance, nothing.condition_number]).all()


def along(whitening, matrix):
    back = inverse(whitening)
    return as_float(back.T @ matrix @ back)


def make_sandwich(seed, k):
    rng = np.random.default_rng(seed)
    jac = rng.normal(size=(40, k)).astype(LONG)
    curvature = rng.uniform(-0.2, 1.0, 40).astype(LONG)
    score = rng.normal(size=40).astype(LONG)
    whitening = np.triu(rng.normal(size=(k, k)), 1) + np.diag(rng.uniform(0.5, 3.0, k))
    return jac, curvature, score, whitening


@settings(max_examples=20)
@given(seed=SEEDS, k=st.integers(1, 4), clustered=st.booleans(), penalised=st.booleans())
def test_sandwich_is_bread_meat_bread(seed, k, clustered, penalised):
    jac, curvature, score, whitening = make_sandwich(seed, k)
    penalty = np.diag(np.arange(1.0, k + 1)) if penalised else np.zeros((k, k))
    bread = (jac.T * curvature) @ jac
    scores = jac * score[:, None]
    sums = scores.reshape(8, 5, k).sum(axis=1)
    back = inverse(whitening)
    parts = ScoreSums(
        meat=along(whitening, scores.T @ scores),
        bread=along(whitening, bread),
        clusters=as_float(sums @ back) if clustered else None,
    )
    actual, is_clamped = sandwich(
        parts, whitening, along(whitening, penalty), np.full((k, k), np.nan), 1.7
    )
    inner = inverse(bread + penalty)
    meat = sums.T @ sums if clustered else scores.T @ scores
    expected = as_float(inner @ meat @ inner * LONG(1.7))
    size = np.sqrt(np.diag(expected))
    assert not is_clamped
    np.testing.assert_allclose(
        actual / np.outer(size, size), expected / np.outer(size, size), atol=1e-9
    )


@pytest.mark.parametrize(("smallest", "clamped"), [(-1e-3, True), (1e-9, True), (1e-7, False)])
def test_a_bread_that_is_not_of_a_minimum_is_replaced(smallest, clamped):
    whitening = np.array([[2.0, 1.0], [0.0, 0.5]])
    meat = np.array([[2.0, 0.5], [0.5, 1.0]])
    bread = np.diag([4.0, 4.0 * smallest])
    gram = np.array([[3.0, 0.2], [0.2, 1.0]])
    scores = ScoreSums(meat=meat, bread=bread, clusters=None)
    actual, is_clamped = sandwich(scores, whitening, np.zeros((2, 2)), gram, 1.0)
    half = np.linalg.inv(whitening) @ np.linalg.inv(gram if clamped else bread)
    assert is_clamped is clamped
    np.testing.assert_allclose(actual, half @ meat @ half.T, rtol=1e-9)


def test_a_bread_of_nothing_is_replaced():
    scores = ScoreSums(meat=np.eye(2), bread=np.zeros((2, 2)), clusters=None)
    actual, is_clamped = sandwich(scores, np.eye(2), np.zeros((2, 2)), 2.0 * np.eye(2), 1.0)
    assert is_clamped
    np.testing.assert_allclose(actual, 0.25 * np.eye(2))


@pytest.mark.parametrize(
    ("kind", "num_rows", "num_free", "num_clusters", "factor"),
    [
        ("HC0", 10, 4, 0, 1.0),
        ("HC1", 10, 4, 0, 10 / 6),
        ("HC1", 5, 4, 0, 5.0),
        ("HC1", 4, 4, 0, 1.0),
        ("HC1", 3, 4, 0, 1.0),
        ("HC1", 10, 4, 5, 10 / 6),
        ("clustered", 10, 4, 5, 9 / 6 * 5 / 4),
        ("clustered", 10, 4, 2, 9 / 6 * 2),
        ("clustered", 10, 4, 1, 10 / 6),
        ("clustered", 4, 4, 2, 1.0),
    ],
)
def test_small_samples_are_corrected_for(kind, num_rows, num_free, num_clusters, factor):
    assert small_sample_factor(kind, num_rows, num_free, num_clusters) == pytest.approx(factor)


def test_fixed_parameters_do_not_vary_and_tied_ones_follow():
    """b = 3 a + c², d is fixed: the tangent of the tie carries the covariance of a and c."""
    space = make_space(4, fixed=("d",), ties={"b": lambda a, c: 3 * a + c**2})
    jac = make_jacobian(1, 2)
    free = np.array([0.7, -1.5])
    covariance = estimate_covariance(factor_of(jac), 2.0, space, free)
    inner = 2.0 * as_float(inverse(jac.T.astype(LONG) @ jac))
    tangents = np.array([[1.0, 0.0], [3.0, 2 * -1.5], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(covariance.matrix, tangents @ inner @ tangents.T, rtol=1e-12)
    assert covariance.rank == 2


def test_directions_without_data_are_infinite_and_the_rest_is_exact():
    """a and b enter as a + b alone; c by itself; d, fixed, and e, tied to a, beside them."""
    space = make_space(5, fixed=("d",), ties={"e": lambda a: 2 * a})
    rng = np.random.default_rng(2)
    together, alone = rng.normal(size=20), rng.normal(size=20)
    jac = np.stack([together, together, alone], axis=1)
    covariance = estimate_covariance(factor_of(jac), 1.5, space, np.ones(3))
    pair = np.stack([together, alone], axis=1)
    expected = 1.5 * np.linalg.inv(pair.T @ pair)
    matrix = covariance.matrix
    assert covariance.rank == 2
    assert matrix[2, 2] == pytest.approx(expected[1, 1], rel=1e-10)
    for i in (0, 1, 4):
        assert matrix[i, i] == np.inf
        others = [j for j in (0, 1, 2, 4) if j != i]
        assert np.isnan(matrix[i, others]).all()
        assert np.isnan(matrix[others, i]).all()
    assert np.all(matrix[3] == 0)
    assert np.all(matrix[:, 3] == 0)


def test_too_few_rows_make_every_variance_infinite_but_that_of_what_is_fixed():
    space = make_space(4, fixed=("b",), ties={"d": lambda a: a})
    covariance = estimate_covariance(np.eye(2), np.inf, space, np.ones(2))
    varies = [0, 2, 3]
    assert np.all(covariance.matrix[np.ix_(varies, varies)] == np.inf)
    assert np.all(covariance.matrix[1] == 0)
    assert np.all(covariance.matrix[:, 1] == 0)
