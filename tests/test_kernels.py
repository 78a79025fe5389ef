"""Kernels against J by hand in NumPy, over shapes, tilings, masks and weights."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from nlsq_dask.kernels.build import KernelSpec, build_kernels
from nlsq_dask.kernels.reverse import build_reverse_kernels
from nlsq_dask.kernels.tiles import choose_tile_shape, sum_tiles
from nlsq_dask.kernels.width import elements_per_row
from nlsq_dask.model import Model
from nlsq_dask.parameters.given import build_parameter_space
from nlsq_dask.sources.base import Chunk, pad_chunk
from nlsq_dask.terms import RowTerms


def surface(t, z, a, b, c):
    return a * jnp.exp(-b * t) + c * z**2


MODEL = Model(function=surface, variables=("t", "z"), parameters=("a", "b", "c"))
SPACE = build_parameter_space(("a", "b", "c"), {}, {"a": 2.0, "b": 0.5, "c": 0.3})
PARAMS = SPACE.p0


def terms_of(*fill: float) -> RowTerms:
    return RowTerms(fill=np.array(fill), f_scale=np.float64(1.0))


def kernels_of(model: Model, space, tile_shape, loss="linear", products="lanes"):
    return build_kernels(
        KernelSpec(model=model, space=space, loss=loss, tile_shape=tile_shape, products=products)
    )


TERMS = terms_of(0.5, 0.5)


def dense(chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals, Jacobian and mask of all rows, without JAX."""
    t, z = (np.broadcast_to(np.asarray(x, np.float64), chunk.y.shape) for x in chunk.x)
    sigma = 1.0 if chunk.sigma is None else np.broadcast_to(chunk.sigma, chunk.y.shape)
    a, b, c = PARAMS
    with np.errstate(invalid="ignore"):
        e = np.exp(-b * t)
        r = (a * e + c * z**2 - chunk.y) / sigma
        jac = np.stack([e, -a * t * e, z**2], axis=-1) / np.expand_dims(sigma, -1)
        valid = np.isfinite(chunk.y) & np.isfinite(t) & np.isfinite(z) & np.isfinite(sigma)
    if chunk.where is not None:
        valid &= np.broadcast_to(chunk.where, chunk.y.shape)
    return r[valid], jac[valid], valid


@st.composite
def chunks(draw):
    """1-d and 3-d chunks with gaps, where the variables broadcast in the second case."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        shape = (draw(st.integers(1, 90)),)
        t_shape = z_shape = shape
    else:
        shape = tuple(draw(st.integers(1, 9)) for _ in range(3))
        t_shape, z_shape = (shape[0], 1, 1), (1, *shape[1:])
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    t, z = rng.uniform(0, 3, t_shape).astype(dtype), rng.uniform(0, 3, z_shape)
    y = rng.normal(size=shape).astype(dtype)
    y[rng.uniform(size=shape) < 0.1] = np.nan
    t[rng.uniform(size=t_shape) < 0.1] = np.inf
    sigma = rng.uniform(0.5, 2, shape) if draw(st.booleans()) else None
    where = rng.uniform(size=shape) < 0.8 if draw(st.booleans()) else None
    return Chunk(x=(t, z), y=y, sigma=sigma, where=where)


@settings(max_examples=8, deadline=None)
@given(
    chunk=chunks(),
    tile_rows=st.sampled_from([8, 40, 1000]),
    padding=st.integers(0, 3),
    products=st.sampled_from(["lanes", "dot", "sweep"]),
)
def test_normal_equations_are_those_of_the_dense_jacobian(chunk, tile_rows, padding, products):
    r, jac, valid = dense(chunk)
    padded_shape = tuple(length + padding for length in chunk.y.shape)
    tile = choose_tile_shape(padded_shape, tile_rows)
    kernels = kernels_of(MODEL, SPACE, tile, products=products)
    whitening = np.array([[1.0, 0.3, -0.2], [0.0, 2.0, 0.1], [0.0, 0.0, 0.7]])
    directions = np.linalg.inv(whitening)
    with jax.enable_x64(True):
        padded = pad_chunk(chunk, padded_shape)
        normal, rows = kernels.normal_equations(
            PARAMS, directions, TERMS, padded, precision="float64"
        ).finish()
        costs = kernels.costs(np.stack([PARAMS, PARAMS]), TERMS, padded)
        summary = kernels.summary(np.asarray(0.25), TERMS, padded)
    whitened = jac @ directions
    scale = max(1.0, np.abs(r).max(initial=0.0) ** 2 * max(len(r), 1))
    np.testing.assert_allclose(normal.gram, whitened.T @ whitened, rtol=1e-11, atol=1e-12 * scale)
    np.testing.assert_allclose(normal.grad, whitened.T @ r, rtol=1e-11, atol=1e-12 * scale)
    np.testing.assert_allclose(normal.cost, 0.5 * r @ r, rtol=1e-11)
    np.testing.assert_allclose(costs, 0.5 * r @ r, rtol=1e-11)
    assert int(normal.num_rows) == valid.sum()
    wanted = chunk.y.size if chunk.where is None else chunk.where.sum()
    assert int(rows.num_invalid) == wanted - valid.sum()
    assert int(rows.num_masked) == chunk.y.size - valid.sum()
    np.testing.assert_allclose(rows.residual_sum, r.sum(), atol=1e-11 * scale)
    np.testing.assert_allclose(rows.residual_square, r @ r, rtol=1e-11)
    weight = 1.0 if chunk.sigma is None else chunk.sigma[valid] ** -2
    y = chunk.y[valid].astype(np.float64)
    np.testing.assert_allclose(summary.second, np.sum(weight * (y - 0.25) ** 2), rtol=1e-9)


def test_masked_rows_never_reach_the_derivative():
    """Where the model is not defined for rows left out, gram and gradient stay clean."""

    def power(x, a, b):
        return a * x**b

    model = Model(function=power, variables=("x",), parameters=("a", "b"))
    space = build_parameter_space(("a", "b"), {}, {"a": 1.0, "b": 1.5})
    chunk = Chunk(
        x=(np.array([1.0, 2.0, -1.0, 0.0, np.nan]),),
        y=np.array([1.0, 3.0, 1.0, 1.0, 1.0]),
        where=np.array([True, True, False, False, True]),
    )
    kernels = kernels_of(model, space, (5,))
    with jax.enable_x64(True):
        normal, _ = kernels.normal_equations(
            space.p0, np.eye(2), terms_of(1.0), chunk, precision="float64"
        ).finish()
    assert normal.is_finite
    assert int(normal.num_rows) == 2


def test_rows_are_weighed_and_counted_by_their_group():
    """A group of weight zero is left out; a number that is no group is told, where wanted."""
    group = np.array([0.0, 1.0, 2.0, 1.5, -1.0, 3.0, np.nan, 1.0, 0.0, 7.0])
    where = np.array([True] * 8 + [False] * 2)
    y = np.arange(10.0)
    chunk = Chunk(x=(group, np.ones(10)), y=y, where=where)
    weights = np.array([4.0, 0.25, 0.0])
    terms = RowTerms(fill=np.ones(2), f_scale=np.float64(1.0), group_weights=weights)
    model = Model(function=lambda group, x, a: a * x, variables=("group", "x"), parameters=("a",))
    space = build_parameter_space(("a",), {}, {"a": 2.0})
    for tile in ((10,), (8,)):
        with jax.enable_x64(True):
            normal, rows = (
                kernels_of(model, space, tile)
                .normal_equations(space.p0, np.eye(1), terms, chunk, precision="float64")
                .finish()
            )
        assert int(normal.num_rows) == 3  # rows 0, 1 and 7
        expected = 0.5 * (4.0 * (2 - 0) ** 2 + 0.25 * (2 - 1) ** 2 + 0.25 * (2 - 7) ** 2)
        assert float(normal.cost) == pytest.approx(expected)
        assert int(rows.num_stray) == 3  # 1.5, -1 and 3
        assert int(rows.num_invalid) == 1  # NaN
        assert int(rows.num_masked) == 7


@pytest.mark.parametrize("loss", ["linear", "huber", "cauchy"])
def test_statistics_are_of_the_residuals_whatever_the_loss(loss):
    rng = np.random.default_rng(5)
    x, y = rng.uniform(0, 3, (2, 50)), 3 * rng.normal(size=50)
    chunk = Chunk(x=tuple(x), y=y)
    r, *_ = dense(chunk)
    with jax.enable_x64(True):
        normal, rows = (
            kernels_of(MODEL, SPACE, (16,), loss)
            .normal_equations(PARAMS, np.eye(3), TERMS, chunk, precision="float64")
            .finish()
        )
    oracle = scipy.optimize.least_squares(
        lambda p: p[0] * np.exp(-p[1] * x[0]) + p[2] * x[1] ** 2 - y, PARAMS, loss=loss, max_nfev=1
    )
    assert float(normal.cost) == pytest.approx(oracle.cost, rel=1e-12)
    assert float(rows.residual_sum) == pytest.approx(r.sum())
    assert float(rows.residual_square) == pytest.approx(r @ r)


def test_curvature_is_the_missing_part_of_the_hessian():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 2, 200)
    y = rng.normal(size=200)

    def wave(x, a, w):
        return a * jnp.sin(w * x)

    model = Model(function=wave, variables=("x",), parameters=("a", "w"))
    space = build_parameter_space(("a", "w"), {}, {"a": 1.3, "w": 2.1})
    a, w = space.p0
    s, c = np.sin(w * x), np.cos(w * x)
    r = a * s - y
    expected = np.array([[0.0, r @ (x * c)], [r @ (x * c), -a * r @ (x**2 * s)]])
    with jax.enable_x64(True):
        curvature = kernels_of(model, space, (64,)).curvature
        actual = curvature(space.p0, np.eye(2), terms_of(1.0), Chunk(x=(x,), y=y))
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "rows"), [((100,), 8), ((7, 5, 30), 60), ((1,), 8000), ((54, 18, 432), 8000)]
)
def test_tiles_are_about_as_large_as_asked(shape, rows):
    tile = choose_tile_shape(shape, rows)
    assert all(1 <= size <= length for size, length in zip(tile, shape, strict=True))
    assert np.prod(tile) <= 2 * rows + 64


def width_of(function, *x_shapes):
    names = tuple(f"x{i}" for i in range(len(x_shapes)))
    model = Model(function=function, variables=names, parameters=("a",))
    return elements_per_row(model, x_shapes, [np.float64(1.0)])


@pytest.mark.parametrize(("rows", "width"), [(1, 7), (2, 4), (3, 3), (7, 1), (0, 7)])
def test_the_width_of_a_model_is_that_of_its_largest_array(rows, width):
    """Rounded up; a model may also ask for 64 bits by name."""

    def seven(x, a):
        return x.astype(jnp.float64) + jnp.sum(a * jnp.arange(7.0, dtype=jnp.float64))

    assert width_of(seven, (rows,)) == width


@pytest.mark.parametrize(
    "within",
    [
        jax.jit,
        jax.checkpoint,
        lambda inner: lambda a: jax.lax.cond(a > 0, inner, lambda a: 0 * a, a),
        lambda inner: lambda a: jax.lax.fori_loop(0, 3, lambda _, b: b + inner(a), a),
    ],
)
def test_arrays_within_inner_functions_count(within):
    inner = within(lambda a: jnp.sum(a * jnp.arange(50.0)))
    assert width_of(lambda x, y, a: x + y + inner(a), (5, 1), (1, 2)) == 5


def test_a_model_that_makes_no_array_is_one_wide():
    assert width_of(lambda x, a: x, (1,)) == 1
    assert width_of(lambda x, a: x, (1000,)) == 1


def test_sigma_of_zero_or_less_is_counted_where_a_row_would_count():
    sigma = np.array([1.0, 0.0, -1.0, 0.5, np.nan, 0.0])
    y = np.array([1.0, 2.0, 3.0, 4.0, 5.0, np.nan])
    chunk = Chunk(x=(y.copy(), np.ones(6)), y=y, sigma=sigma)
    with jax.enable_x64(True):
        _, rows = (
            kernels_of(MODEL, SPACE, (4,))
            .normal_equations(PARAMS, np.eye(3), TERMS, chunk, precision="float64")
            .finish()
        )
    assert int(rows.num_bad_sigma) == 2
    assert int(rows.num_invalid) == 2


@pytest.mark.parametrize("num_rows", [130_000, 2432 * 128])
@pytest.mark.parametrize("products", ["dot", "sweep", "lanes"])
def test_rows_of_a_tile_as_large_as_an_accelerators_are_all_counted(products, num_rows):
    """More of them in a lane than 16 bits hold, had all tiles as many lanes."""
    sigma = np.full(num_rows, -1.0)
    sigma[::3] = 1.0
    y = np.zeros(num_rows)
    y[1::10] = np.nan
    where = np.ones(num_rows, bool)
    where[:1000] = False
    chunk = Chunk(x=(np.zeros(num_rows), np.zeros(num_rows)), y=y, sigma=sigma, where=where)
    with jax.enable_x64(True):
        kernels = kernels_of(MODEL, SPACE, (num_rows,), products=products)
        handed = kernels.normal_equations(PARAMS, np.eye(3), TERMS, chunk, precision="float64")
        normal, rows = handed.finish()
    counts = where & np.isfinite(y)
    assert int(normal.num_rows) == counts.sum()
    assert int(rows.num_masked) == num_rows - counts.sum()
    assert int(rows.num_invalid) == (where & ~np.isfinite(y)).sum()
    assert int(rows.num_bad_sigma) == (counts & (sigma < 0)).sum()


@pytest.mark.parametrize("loss", ["linear", "huber"])
def test_reverse_kernels_tell_the_moments_of_the_residuals(loss):
    rng = np.random.default_rng(6)
    chunk = Chunk(x=tuple(rng.uniform(0, 3, (2, 50))), y=3 * rng.normal(size=50))
    r, *_ = dense(chunk)
    spec = KernelSpec(model=MODEL, space=SPACE, loss=loss, tile_shape=(16,), products="lanes")
    with jax.enable_x64(True):
        _, rows = build_reverse_kernels(spec).gradient(PARAMS, TERMS, chunk, precision="float64")
    assert float(rows.residual_sum) == pytest.approx(r.sum())
    assert float(rows.residual_square) == pytest.approx(r @ r)


def diagonal_of(function, x, start):
    """By the kernel: from gradients of small tiles with random signs."""
    names = tuple(start)
    model = Model(function=function, variables=("x",), parameters=names)
    space = build_parameter_space(names, {}, start)
    spec = KernelSpec(model=model, space=space, loss="linear", tile_shape=x.shape, products="lanes")
    with jax.enable_x64(True):
        kernels = build_reverse_kernels(spec)
        return kernels.diagonal(space.p0, terms_of(1.0), Chunk(x=(x,), y=np.zeros(x.shape)))


@pytest.mark.parametrize("num_rows", [3000, 70_000])
def test_the_diagonal_is_estimated_where_all_rows_depend_on_a_parameter(num_rows):
    """To √(2 / 1024), by the docstring; here within four times that."""
    x = np.random.default_rng(2).uniform(1, 2, num_rows)
    diagonal = diagonal_of(lambda x, a, b: a * x + b, x, {"a": 1.0, "b": 2.0})
    np.testing.assert_allclose(diagonal, [x @ x, num_rows], rtol=4 * np.sqrt(2 / 1024))


def test_the_diagonal_is_exact_where_rows_of_a_tile_share_no_parameter():
    """Of 2,100 rows two make a tile: each depends on the parameter that its sign says."""
    x = np.random.default_rng(3).uniform(1, 2, 2100) * np.tile([1.0, -1.0], 1050)
    diagonal = diagonal_of(lambda x, a, b: jnp.where(x > 0, a * x, b * x), x, {"a": 1.0, "b": 2.0})
    np.testing.assert_allclose(diagonal, [x[::2] @ x[::2], x[1::2] @ x[1::2]], rtol=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_tile_may_be_one_row(rows):
    """Where rows are so wide that fewer are asked for than there can be."""
    assert choose_tile_shape((5, 1), rows) == (1, 1)


def test_kernels_are_shared_by_what_they_compute_and_never_without_a_fingerprint():
    spec = KernelSpec(model=MODEL, space=SPACE, loss="linear", tile_shape=(8,), products="lanes")
    assert build_kernels(spec) is not build_kernels(spec)
    known = replace(spec, fingerprint="of this test")
    kernels = build_kernels(known)
    assert build_kernels(replace(known)) is kernels
    for other in ({"loss": "huber"}, {"tile_shape": (16,)}, {"products": "dot"}):
        assert build_kernels(replace(known, **other)) is not kernels
    assert build_kernels(replace(known, fingerprint="of another model")) is not kernels


@pytest.mark.parametrize(
    ("shape", "rows", "tile"),
    [
        ((100,), 8, (8,)),
        ((1000,), 300, (256,)),
        ((1000,), 1000, (1000,)),
        ((9, 30), 70, (2, 30)),
        ((4, 9, 30), 60, (1, 2, 30)),
        ((2, 30), 30, (1, 30)),
        ((3, 100), 5, (1, 8)),
    ],
)
def test_tiles_are_nearly_equal_and_walked_once(shape, rows, tile):
    """In whole registers of eight, where there is more than one along the last axis."""
    assert choose_tile_shape(shape, rows) == tile
    y = np.random.default_rng(9).uniform(1, 2, shape)
    chunk = Chunk(x=(np.ones(shape), np.ones(shape)), y=y)

    def reduce(tile):
        return jnp.stack([1.0, jnp.sum(tile.is_row), jnp.sum(tile.y, where=tile.is_row)])

    with jax.enable_x64(True):
        num_tiles, num_rows, total = np.asarray(sum_tiles(chunk, tile, TERMS, reduce))
    assert num_tiles == np.prod(np.ceil(np.divide(shape, tile)))
    assert num_rows == np.prod(shape)
    assert float(total) == pytest.approx(y.sum(), rel=1e-12)


def test_fewer_directions_than_parameters():
    """As where a parameter is fixed: all is along the directions, which are no square."""
    rng = np.random.default_rng(7)
    chunk = Chunk(x=tuple(rng.uniform(0, 3, (2, 40))), y=rng.normal(size=40))
    _, jac, _ = dense(chunk)
    directions = np.array([[1.0, 0.5], [0.0, 2.0], [0.3, 0.0]])
    kernels = kernels_of(MODEL, SPACE, (16,))
    with jax.enable_x64(True):
        normal, _ = kernels.normal_equations(
            PARAMS, directions, TERMS, chunk, precision="float64"
        ).finish()
        along = kernels.curvature(PARAMS, directions, TERMS, chunk)
        whole = np.asarray(kernels.curvature(PARAMS, np.eye(3), TERMS, chunk))
    whitened = jac @ directions
    np.testing.assert_allclose(normal.gram, whitened.T @ whitened, rtol=1e-11)
    np.testing.assert_allclose(along, directions.T @ whole @ directions, rtol=1e-11)


def test_variables_that_broadcast_along_any_axis():
    """Also where all the rows that one of their values belongs to are left out."""
    rng = np.random.default_rng(8)
    t, z = rng.uniform(0, 3, (4, 1, 1)), rng.uniform(0, 3, (1, 3, 4))
    y = rng.normal(size=(4, 3, 4))
    t[1], y[2], y[:, 1, 2] = np.nan, np.nan, np.inf
    chunk = Chunk(x=(t, z), y=y)
    r, jac, valid = dense(chunk)
    assert valid.sum() == 2 * 11
    with jax.enable_x64(True):
        normal, _ = (
            kernels_of(MODEL, SPACE, (2, 3, 4))
            .normal_equations(PARAMS, np.eye(3), TERMS, chunk, precision="float64")
            .finish()
        )
    assert int(normal.num_rows) == len(r)
    np.testing.assert_allclose(normal.gram, jac.T @ jac, rtol=1e-11)
    np.testing.assert_allclose(normal.grad, jac.T @ r, rtol=1e-11)


@pytest.mark.parametrize("loss", ["linear", "cauchy"])
def test_rows_that_are_handed_out_come_to_the_normal_equations(loss):
    """The residual and its cost beside them only where the target is another."""
    rng = np.random.default_rng(8)
    x, y = rng.uniform(0, 3, (2, 30)), 3 * rng.normal(size=30)
    y[4] = np.nan
    chunk = Chunk(x=tuple(x), y=y)
    kernels = kernels_of(MODEL, SPACE, (8,), loss)
    with jax.enable_x64(True):
        rows = jax.device_get(kernels.linearisation(PARAMS, np.eye(3), TERMS, chunk))
        normal, counts = kernels.normal_equations(
            PARAMS, np.eye(3), TERMS, chunk, precision="float64"
        ).finish()
    np.testing.assert_allclose(rows.jac @ rows.jac.T, normal.gram, rtol=1e-12)
    np.testing.assert_allclose(rows.jac @ rows.target, normal.grad, rtol=1e-12)
    assert np.flatnonzero(~rows.is_row).tolist() == [4]
    residual = rows.target
    if loss == "linear":
        assert rows.robust is None
    else:
        residual, cost = rows.robust
        assert float(cost.sum()) == pytest.approx(float(normal.cost))
    assert float(residual.sum()) == pytest.approx(float(counts.residual_sum))
