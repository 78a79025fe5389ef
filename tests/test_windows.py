"""Arrays in memory enter kernels where they lie, to the same bits as copies of them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import HybridStreamingConfig, curve_fit, fit_dataset
from nlsq_dask.evaluate import leaves, local
from nlsq_dask.evaluate.base import Request
from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.sources.base import pad_chunk
from nlsq_dask.sources.buffers import aligned_empty, is_aligned
from nlsq_dask.sources.columns import MemoryColumn
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.sources.windows import MARGIN, Window, windows_of

ROWS, LEAF = 4_203, 500
NUM_LEAVES = 9
BEFORE = range(MARGIN)


def placed(values: np.ndarray, before: int) -> np.ndarray:
    """A copy that begins `before` values after an aligned place."""
    memory = aligned_empty((len(values) + MARGIN,), values.dtype)
    memory[before : before + len(values)] = values
    return memory[before : before + len(values)]


def source_of(leaf: int = LEAF, **columns: np.ndarray) -> GridSource:
    held = {
        role: MemoryColumn(values=values, dims=("row", "column")[: values.ndim])
        for role, values in columns.items()
    }
    shape = (leaf, *columns["y"].shape[1:])
    return GridSource(
        variables=("x",), x=(held.pop("x"),), y=held.pop("y"), leaf_shape=shape, **held
    )


def rows(before: int = 2) -> dict[str, np.ndarray]:
    t, y = problems.make_decay(ROWS)
    return {"x": placed(t, before), "y": placed(y, before)}


# -- leaves


@pytest.mark.parametrize("before", BEFORE)
def test_leaves_are_views_of_what_was_given(before):
    given = rows(before)
    windows = windows_of(source_of(**given, sigma=placed(np.full(ROWS, 0.1), before)))
    each = dict(windows.stream(range(NUM_LEAVES)))
    for index, window in each.items():
        start, end = index * LEAF, min((index + 1) * LEAF, ROWS)
        is_end = index == NUM_LEAVES - 1 or (index == 0 and before > 0)
        for array, values in zip((*window.x, window.y), given.values(), strict=True):
            assert is_aligned(array)
            assert array.shape == (LEAF + MARGIN,)
            own = array[int(window.before) :][: end - start]
            np.testing.assert_array_equal(own, values[start:end])
            assert np.shares_memory(array, values) is not is_end
        assert window.sigma.shape == window.y.shape
        assert window.extent == [end - start]
    assert windows.nbytes(range(NUM_LEAVES)) == 3 * 8 * ROWS
    assert windows.nbytes([8]) == 3 * 8 * 203


def test_a_window_reaches_neither_before_nor_beyond_the_array():
    """Whole leaves at both ends, where the margin would not be the caller's memory."""
    t, y = problems.make_decay(NUM_LEAVES * LEAF)
    given = {"x": placed(t, 2), "y": placed(y, 2)}
    for index, window in windows_of(source_of(**given)).stream(range(NUM_LEAVES)):
        is_view = np.shares_memory(window.y, given["y"])
        assert is_view is (index not in (0, NUM_LEAVES - 1))
        if is_view:
            begins = (window.y.ctypes.data - given["y"].ctypes.data) // 8
            assert 0 <= begins <= len(y) - len(window.y)


def test_windows_are_taken_only_where_they_gain():
    given = rows()
    assert windows_of(source_of(**given)) is not None
    assert windows_of(source_of(**given, leaf=1_500)) is None  # three leaves
    assert windows_of(source_of(**rows(0), leaf=504)) is None  # aligned as they are
    assert windows_of(source_of(x=given["x"], y=rows(3)["y"])) is None
    assert windows_of(source_of(x=given["x"], y=given["y"].astype(np.float32))) is None
    assert windows_of(source_of(x=given["x"], y=given["y"].astype(">f8"))) is None
    assert windows_of(source_of(x=given["x"], y=np.repeat(given["y"], 2)[::2])) is None
    assert windows_of(source_of(**given, where=np.ones(ROWS, bool))) is None
    field = np.zeros((ROWS, 2))
    assert windows_of(source_of(x=given["x"], y=field)) is None


def test_in_jax_a_window_is_the_memory_that_was_given():
    given = rows()
    window = windows_of(source_of(**given)).leaf(3)
    with jax.enable_x64(True):
        handed = jax.device_put(window.y, may_alias=True)
        assert handed.unsafe_buffer_pointer() == window.y.ctypes.data


# -- bits


@pytest.fixture
def copies(monkeypatch):
    """Leaves are copied from here on."""

    def begin() -> None:
        monkeypatch.setattr(leaves, "windows_of", lambda _: None)

    return begin


def quartic(t, a, b, c, d, e):
    return a + t * (b + t * (c + t * (d + t * e)))


def line(t, slope, level):
    return slope * t + level


MODELS = {
    "line": (line, [0.5, 1.0]),
    "decay": (problems.decay, problems.P0),
    "quartic": (quartic, [1.0, 0.1, 0.0, 0.0, 0.0]),
}
KINDS = {
    "plain": {},
    "sigma": {"sigma": 0.1 + 0.05 * np.cos(np.arange(ROWS))},
    "robust": {"loss": "soft_l1"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_sums_have_the_bits_of_copied_leaves(name, kind, copies):
    model, p0 = MODELS[name]
    given, options = rows(), dict(KINDS[kind])
    if "sigma" in options:
        options["sigma"] = xr.DataArray(placed(options["sigma"], 2), dims="row")
    for hole in (0, 499, 500, 1_999, 2_000, 2_003, ROWS - 1):  # beside the ends of leaves
        given["y"][hole] = np.nan
    config = HybridStreamingConfig(chunk_size=LEAF, max_passes=1)
    ds = problems.dataset(*given.values())
    session = fit_dataset(ds, model, y="y", p0=p0, config=config, **options).session
    space = session.problem.space
    request = Request(
        params=space.p0,
        terms=session.terms,
        directions=np.eye(space.size),
        rivals=np.stack([space.p0, 1.1 * space.p0]),
        center=0.3,
        with_scores=True,
        names_leaves=True,
    )

    def reduced() -> list[np.ndarray]:
        home = ProblemHome(problem=session.problem, cache_bytes=0, prefetch=False)
        assert (home.windows is None) is is_copied
        report = home.reduce(range(NUM_LEAVES), request)
        if not is_copied:
            assert report.bytes_read == ROWS * 8 * (2 + ("sigma" in options))
        return [np.asarray(part) for part in jax.tree.leaves((report.nodes, report.bins))]

    is_copied = False
    in_windows = reduced()
    copies()
    is_copied = True
    copied = reduced()
    assert len(in_windows) == len(copied) > 10
    for one, other in zip(in_windows, copied, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("before", BEFORE)
def test_a_fit_does_not_depend_on_where_arrays_lie(before, num_threads, copies, monkeypatch):
    monkeypatch.setattr(local, "num_cpus", lambda: num_threads)
    config = HybridStreamingConfig(chunk_size=LEAF)
    options = {"p0": problems.P0, "config": config}
    taken = []
    stream = leaves.Windows.stream
    monkeypatch.setattr(
        leaves.Windows, "stream", lambda *arguments: taken.append(1) or stream(*arguments)
    )
    popt, pcov = curve_fit(problems.decay, *rows(before).values(), **options)
    assert taken
    ds = problems.dataset(*rows(before).values())
    assert fit_dataset(ds, problems.decay, y="y", **options).popt.tobytes() == popt.tobytes()
    copies()
    taken.clear()
    again, covariance = curve_fit(problems.decay, *rows(before).values(), **options)
    assert not taken
    assert popt.tobytes() == again.tobytes()
    assert pcov.tobytes() == covariance.tobytes()


def test_a_window_is_a_chunk_of_its_own_rows():
    """With `before` as JAX sees it: an argument, not part of what is compiled."""
    windows = windows_of(source_of(**rows()))
    shapes = {str(jax.tree.structure(windows.leaf(i))) for i in range(NUM_LEAVES)}
    assert len(shapes) == 1
    assert {int(windows.leaf(i).before) for i in range(1, NUM_LEAVES - 1)} == {2, 6}
    padded = pad_chunk(windows.source.read(8), (LEAF + MARGIN,))
    assert isinstance(windows.leaf(8), Window)
    np.testing.assert_array_equal(windows.leaf(8).y, padded.y)
