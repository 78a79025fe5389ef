"""Batches that come once: spooled, fitted with all their rows, and gone."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import problems
from nlsq_dask import AdaptiveHybridStreamingOptimizer, testing
from nlsq_dask.errors import DataError, SpoolLimitError, WorkerError
from nlsq_dask.sources.batches import Spool

NUM_ROWS = 1200
T, Y = problems.make_decay(NUM_ROWS, seed=5)
SIGMA = 0.05 + 0.02 * T
START = list(problems.P0.values())


def batches(sizes=(500, 1, 699), sigma=False):
    """Rows in one buffer that is used again and again, as readers do."""
    start = 0
    buffer = np.empty((3, max(sizes)))
    for size in sizes:
        stop = start + size
        buffer[:, :size] = T[start:stop], Y[start:stop], SIGMA[start:stop]
        x, y, s = buffer[:, :size]
        yield (x, y, s) if sigma else (x, y)
        start = stop


def fit(data, **options):
    return AdaptiveHybridStreamingOptimizer().fit(data, problems.decay, START, **options)


def left_behind(folder):
    return [path for path, _, files in os.walk(folder) if files]


# -- the store


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    chunk_rows=st.sampled_from([1, 7, 64]),
    num_variables=st.sampled_from([None, 1, 3]),
    read_between=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_rows_come_back_as_they_went(
    tmp_path_factory, sizes, chunk_rows, num_variables, read_between
):
    rng = np.random.default_rng(0)
    shape = () if num_variables is None else (num_variables,)
    parts = [(rng.normal(size=(n, *shape)), rng.normal(size=n).astype("f4")) for n in sizes]
    with Spool(tmp_path_factory.mktemp("spool"), chunk_rows=chunk_rows) as spool:
        for x, y in parts:
            spool.append(x, y)
            if read_between and spool.num_rows:
                spool.source()
        if not spool.num_rows:
            with pytest.raises(DataError, match="rows"):
                spool.source()
            return
        source, is_stacked = spool.source()
        testing.check_source(source)
        chunk = source.read(0)
        x = np.concatenate([x for x, _ in parts]).reshape(spool.num_rows, -1)
        np.testing.assert_array_equal(np.stack(chunk.x, axis=-1), x)
        np.testing.assert_array_equal(chunk.y, np.concatenate([y for _, y in parts]))
        assert is_stacked == (num_variables is not None)
        assert chunk.y.dtype == np.float32
        assert source.y.chunks == (chunk_rows,)


def test_bytes_in_the_store_are_those_it_counts(tmp_path):
    with Spool(tmp_path, chunk_rows=100) as spool:
        spool.extend(batches(sigma=True))
        spool.source()
        assert spool.nbytes == 3 * 8 * NUM_ROWS
        held = sum(
            os.path.getsize(os.path.join(path, name))
            for path, _, names in os.walk(tmp_path)
            for name in names
            if name != "zarr.json"
        )
        assert held == spool.nbytes
    assert not left_behind(tmp_path)


def test_closing_twice_and_appending_afterwards(tmp_path):
    spool = Spool(tmp_path)
    spool.close()
    spool.close()
    with pytest.raises(ValueError, match="closed"):
        spool.append(T, Y)


MISTAKES = {
    "variables": (lambda: (np.ones((3, 2)), np.ones(3)), "like the first one.*2"),
    "dtype of x": (lambda: (np.ones(3, np.float32), np.ones(3)), "float32"),
    "dtype of y": (lambda: (np.ones(3), np.ones(3, int)), "int64"),
    "sigma appears": (lambda: (np.ones(3), np.ones(3), np.ones(3)), "no sigma; got.*sigma"),
    "rows": (lambda: (np.ones(3), np.ones(2)), r"x of \(3,\), y of \(2,\)"),
    "sigma's rows": (lambda: (np.ones(3), np.ones(3), np.ones(1)), r"sigma of \(1,\)"),
    "dimensions": (lambda: (np.ones((3, 1, 1)), np.ones(3)), r"x of \(3, 1, 1\)"),
    "scalar": (lambda: (1.0, 2.0), r"x of \(\)"),
    "no variables": (lambda: (np.ones((3, 0)), np.ones(3)), "variable"),
    "complex": (lambda: (np.ones(3), np.ones(3) + 0j), "`y`.*complex"),
    "objects": (lambda: (np.array(["a", "b"]), np.ones(2)), "`x`"),
    "not a tuple": (lambda: np.ones(3), r"\(x, y\).*ndarray"),
    "four parts": (lambda: (1, 2, 3, 4), "4 parts"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_batch_unlike_the_first_is_refused_by_number(tmp_path, mistake):
    make, match = MISTAKES[mistake]

    def stream():
        yield from batches()
        yield make()

    with pytest.raises(ValueError, match=f"batch 3 .*{match}"):
        fit(stream(), spool=tmp_path)
    assert not left_behind(tmp_path)


# -- fits


@pytest.mark.parametrize("sigma", [False, True])
def test_a_generator_is_fitted_exactly(tmp_path, sigma):
    expected = problems.scipy_decay(T, Y, SIGMA if sigma else None)
    result = fit(batches(sigma=sigma), spool=tmp_path)
    assert result.success
    assert result.num_rows == NUM_ROWS
    assert expected.distance(result.popt) < 1e-6
    np.testing.assert_allclose(result.pcov, expected.pcov, rtol=1e-5)
    assert result["fun"] is None
    assert not left_behind(tmp_path)


def test_the_default_place_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert fit(batches()).success
    assert not list(tmp_path.iterdir())


def test_workers_read_the_spool(tmp_path, client):
    here = fit(batches((0, 1200)), spool=tmp_path)
    there = fit(batches((0, 1200)), spool=tmp_path, client=client)
    assert "store read by the workers" in there.diagnostics["evaluator"]
    np.testing.assert_array_equal(there.popt, here.popt)
    assert not left_behind(tmp_path)


def test_an_unreachable_spool_is_refused_before_the_first_batch(client):
    """fsspec's ``memory://`` is of one process: no worker sees what the client writes there."""
    asked = []

    def stream():
        asked.append(True)
        yield from batches()

    with pytest.raises(WorkerError, match=r"`spool`.*tcp://.* does not see memory://.*folder"):
        fit(stream(), spool="memory://spool", client=client)
    assert not asked


def test_a_url_is_a_place(tmp_path):
    fs = pytest.importorskip("fsspec").filesystem("memory")
    assert fit(batches(), spool="memory://spool").success
    assert not fs.find("/spool")


def test_the_limit_names_bytes_and_loses_nothing(tmp_path):
    with Spool(tmp_path, limit_bytes=16 * 600) as spool:
        spool.append(T[:500], Y[:500])
        with pytest.raises(SpoolLimitError, match=r"batch 1 of 8,000 bytes.*8,000.*9,600"):
            spool.append(T[500:1000], Y[500:1000])
        spool.append(T[500:600], Y[500:600])
        source, _ = spool.source()
        np.testing.assert_array_equal(source.read(0).y, Y[:600])


def test_a_generator_over_the_limit(tmp_path):
    with pytest.raises(OSError, match=r"batch 2 .*`spool_limit_bytes`"):
        fit(batches(), spool=tmp_path, spool_limit_bytes=10_000)
    assert not left_behind(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_generator_that_raises_leaves_nothing(tmp_path, error):
    def stream():
        yield from batches((600,))
        raise error("no more")

    with pytest.raises(error, match="no more"):
        fit(stream(), spool=tmp_path)
    assert not left_behind(tmp_path)


def test_an_interrupted_fit_leaves_nothing(tmp_path):
    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(batches(), spool=tmp_path, callback=interrupt)
    assert not left_behind(tmp_path)


def test_mistakes_are_seen_at_the_first_batch(tmp_path):
    def stream():
        yield T[:10], Y[:10]
        raise AssertionError("the second batch was asked for")

    with pytest.raises(ValueError, match="`p0`"):
        AdaptiveHybridStreamingOptimizer().fit(stream(), problems.decay, [1.0], spool=tmp_path)
    with pytest.raises(ValueError, match="`model`"):
        AdaptiveHybridStreamingOptimizer().fit(
            stream(), lambda x, a: np.exp(a * x), [1.0], spool=tmp_path
        )


def test_no_rows(tmp_path):
    with pytest.raises(DataError, match="rows"):
        fit(iter([]), spool=tmp_path)
    with pytest.raises(DataError, match="rows"):
        fit(batches((0, 0)), spool=tmp_path)


def test_options_that_need_batches():
    with pytest.raises(ValueError, match="`spool`"):
        fit((T, Y), spool="somewhere")
    with pytest.raises(ValueError, match="`sigma`"):
        fit(batches(), sigma=SIGMA)
    with pytest.raises(TypeError, match="`spool`"):
        fit(batches(), spool=3)
