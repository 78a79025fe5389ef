"""`curve_fit` beside `scipy.optimize.curve_fit`: the same numbers, and errors of the same type."""

from __future__ import annotations

import functools
import warnings

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from nlsq_dask import FitResult, curve_fit

RNG = np.random.default_rng(1)
X = np.linspace(0.0, 3.0, 60)
Y = 2.5 * np.exp(-1.3 * X) + 0.4 + 0.05 * RNG.normal(size=X.size)
SIGMA = 0.02 + 0.05 * X
PLANE = np.stack([X, np.sin(5 * X)])


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def decay_numpy(x, a, b, c):
    return a * np.exp(-b * x) + c


def plane(x, a, b, c):
    return a * x[0] + b * x[1] + c


def line(x, a, b):
    return a * x + b


class Decay:
    offset = 0.0

    def __call__(self, x, a, b, c):
        return a * jnp.exp(-b * x) + c + self.offset

    def evaluate(self, x, a, b, c):
        return self(x, a, b, c)


def scipy_fit(f, *args, **kwargs):
    """SciPy's answer, converged further than by its default tolerances."""
    return scipy.optimize.curve_fit(f, *args, ftol=1e-14, xtol=1e-14, gtol=1e-14, **kwargs)


def assert_same(ours, theirs):
    """Equal to a millionth of a standard error: SciPy's differences give no more."""
    (popt, pcov), (popt_scipy, pcov_scipy) = ours, theirs
    assert popt.shape == popt_scipy.shape
    assert pcov.shape == pcov_scipy.shape
    assert popt.dtype == pcov.dtype == np.float64
    error = np.sqrt(np.diag(pcov_scipy))
    np.testing.assert_array_less(np.abs(popt - popt_scipy), 1e-6 * error)
    np.testing.assert_allclose(
        pcov / np.outer(error, error), pcov_scipy / np.outer(error, error), atol=1e-6
    )


# -- the same numbers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sigma": SIGMA},
        {"sigma": SIGMA, "absolute_sigma": True},
        {"sigma": 0.05, "absolute_sigma": True},
        {"sigma": [0.05], "absolute_sigma": True},
        {"bounds": (0, [3.0, 2.0, 1.0])},
        {"bounds": (0, np.inf), "method": "dogbox"},
        {"bounds": scipy.optimize.Bounds([0, 0, 0], [9, 9, 9]), "p0": np.array([1, 2, 3])},
    ],
    ids=str,
)
def test_equals_scipy(options):
    assert_same(curve_fit(decay, X, Y, **options), scipy_fit(decay_numpy, X, Y, **options))


def test_active_bound_gives_scipy_parameters():
    options = {"bounds": ([0, 0, 0], [2.0, 9, 9])}
    popt, _ = curve_fit(decay, X, Y, **options)
    expected, _ = scipy_fit(decay_numpy, X, Y, method="trf", **options)
    np.testing.assert_allclose(popt, expected, rtol=1e-6)
    assert popt[0] == pytest.approx(2.0, abs=1e-6)
    assert popt[0] <= 2.0


@pytest.mark.parametrize(
    ("x", "y", "sigma"),
    [
        (X.tolist(), Y.tolist(), SIGMA.tolist()),
        (da.from_array(X, chunks=25), da.from_array(Y, chunks=40), da.from_array(SIGMA, chunks=7)),
        (jnp.asarray(X.astype(np.float32)), jnp.asarray(Y.astype(np.float32)), None),
        (X.astype(">f8"), Y[::-1][::-1], SIGMA.astype(np.float32)),
    ],
    ids=["lists", "dask", "jax float32", "big-endian, strided, float32"],
)
def test_array_likes(x, y, sigma):
    plain = [None if part is None else np.asarray(part, np.float64) for part in (x, y, sigma)]
    assert_same(
        curve_fit(decay, x, y, None, sigma), scipy_fit(decay_numpy, *plain[:2], None, plain[2])
    )


@pytest.mark.parametrize(
    "f",
    [
        jax.jit(decay),
        functools.partial(lambda shift, x, a, b, c: decay(x, a, b, c) + shift, 0.0),
        Decay(),
        Decay().evaluate,
        lambda x, *p: p[0] * jnp.exp(-p[1] * x) + p[2],
    ],
    ids=["jitted", "partial", "callable object", "bound method", "*args"],
)
def test_callables(f):
    p0 = [2.0, 1.0, 0.1]
    assert_same(curve_fit(f, X, Y, p0), scipy_fit(decay_numpy, X, Y, p0))


@pytest.mark.parametrize("f", [lambda x, c: c, lambda x, c: c + 0 * x], ids=["scalar", "array"])
def test_constant_model(f):
    popt, pcov = curve_fit(f, X, Y)
    assert_same((popt, pcov), scipy_fit(f, X, Y))
    np.testing.assert_allclose(popt, Y.mean())
    np.testing.assert_allclose(pcov, Y.var(ddof=1) / Y.size)


@pytest.mark.parametrize(
    "x",
    [PLANE, (PLANE[0], PLANE[1]), da.from_array(PLANE, chunks=(1, 17))],
    ids=["2-d", "tuple", "dask"],
)
def test_two_variables(x):
    design = np.column_stack([*PLANE, np.ones(X.size)])
    popt, pcov = curve_fit(plane, x, Y)
    expected, square, *_ = np.linalg.lstsq(design, Y)
    np.testing.assert_allclose(popt, expected, rtol=1e-10)
    covariance = np.linalg.inv(design.T @ design) * square / (X.size - 3)
    np.testing.assert_allclose(pcov, covariance, rtol=1e-8)


def test_a_sequence_of_dask_arrays_is_variables():
    lazy = [da.from_array(part, chunks=13) for part in PLANE]
    assert_same(curve_fit(plane, lazy, da.from_array(Y, chunks=13)), scipy_fit(plane, PLANE, Y))


def test_one_variable_in_two_dimensions_arrives_in_two():
    def f(x, a, b):
        return a * x[0] + b

    assert_same(curve_fit(f, X[None], Y), scipy_fit(f, X[None], Y))


def test_jac_is_used():
    """A derivative too large by 2 in one parameter halves that parameter's standard error."""

    def wrong(x, a, b):
        return jnp.stack([x, 2 * jnp.ones_like(x)], axis=-1)

    _, pcov = curve_fit(line, X, Y)
    _, halved = curve_fit(line, X, Y, jac=wrong)
    np.testing.assert_allclose(halved[1, 1], pcov[1, 1] / 4, rtol=1e-6)
    np.testing.assert_allclose(halved[0, 0], pcov[0, 0], rtol=1e-6)


def test_nan_policy_omits():
    y = Y.copy()
    y[::7] = np.nan
    kept = np.isfinite(y)
    ours = curve_fit(decay, X, y, nan_policy="omit")
    assert_same(ours, scipy_fit(decay_numpy, X[kept], Y[kept]))


def test_full_output_in_scipys_places():
    returned = curve_fit(decay, X, Y, full_output=True)
    theirs = scipy.optimize.curve_fit(decay_numpy, X, Y, full_output=True)
    assert len(returned) == len(theirs) == 5
    popt, _, information, message, flag = returned
    np.testing.assert_allclose(popt, theirs[0], rtol=1e-5)
    assert isinstance(information["result"], FitResult)
    assert information["nfev"] == information["result"].num_passes
    assert message == information["result"].message
    assert flag in (1, 2, 3, 4)


# -- where the covariance cannot be estimated


@pytest.mark.parametrize(
    ("f", "rows"),
    [(line, 2), (lambda x, a, b: a * x, 60), (lambda x, a: 0 * a * x, 60)],
    ids=["no degrees of freedom", "unused parameter", "no parameter matters"],
)
def test_infinite_covariance_and_warning_as_scipy(f, rows):
    with pytest.warns(scipy.optimize.OptimizeWarning):
        expected, expected_cov = scipy.optimize.curve_fit(f, X[:rows], Y[:rows])
    with pytest.warns(scipy.optimize.OptimizeWarning):
        popt, pcov = curve_fit(f, X[:rows], Y[:rows])
    assert np.isinf(expected_cov).all()
    assert np.isinf(pcov).all()
    np.testing.assert_allclose(popt, expected, rtol=1e-6, atol=1e-9)


def test_degenerate_product_is_said_not_hidden():
    with pytest.warns(scipy.optimize.OptimizeWarning, match="1 of 2"):
        popt, pcov = curve_fit(lambda x, a, b: a * b * x, X, Y)
    np.testing.assert_allclose(popt[0] * popt[1], X @ Y / (X @ X), rtol=1e-8)
    assert np.isinf(np.diag(pcov)).all()


# -- the same errors

NAN = np.where(np.arange(X.size) == 3, np.nan, Y)
MISTAKES = {
    "NaN in ydata": (decay, X, NAN),
    "NaN in xdata": (decay, NAN, Y),
    "infinity in ydata": (decay, X, np.where(Y > 2, np.inf, Y)),
    "NaN refused by nan_policy": (decay, X, NAN, {"nan_policy": "raise", "check_finite": False}),
    "unknown nan_policy": (decay, X, Y, {"nan_policy": "propagate"}),
    "empty ydata": (decay, [], []),
    "only ydata empty": (decay, X, []),
    "xdata longer": (decay, X, Y[:-1]),
    "ydata longer": (decay, X[:-1], Y),
    "sigma too short": (decay, X, Y, {"sigma": SIGMA[:-1]}),
    "sigma of a wrong shape": (decay, X, Y, {"sigma": np.ones((3, X.size))}),
    "p0 too long": (decay, X, Y, {"p0": [1, 2, 3, 4]}),
    "p0 too short": (decay, X, Y, {"p0": [1.0]}),
    "p0 a scalar for three": (decay, X, Y, {"p0": 1.0}),
    "p0 outside bounds": (decay, X, Y, {"p0": [9, 1, 1], "bounds": (0, 5)}),
    "bounds with lm": (decay, X, Y, {"method": "lm", "bounds": (0, 5)}),
    "one bound with lm": (decay, X, Y, {"method": "lm", "bounds": ([0, -np.inf, -np.inf], np.inf)}),
    "bounds crossed": (decay, X, Y, {"bounds": (5, 0)}),
    "bounds too long": (decay, X, Y, {"bounds": ([0] * 4, [1] * 4)}),
    "bounds without an upper side": (decay, X, Y, {"bounds": ([0, 0, 0],)}),
    "unknown method": (decay, X, Y, {"method": "newton"}),
    "unknown option": (decay, X, Y, {"foo": 1}),
    "no parameters": (lambda x: x, X, Y),
    "no arguments": (lambda: 1.0, X, Y),
    "*args without p0": (lambda x, *p: p[0] * x, X, Y),
    "fewer rows than parameters, lm": (decay, X[:2], Y[:2]),
    "not callable": (3, X, Y),
    "strings": (decay, X, ["a"] * X.size),
    "jac not callable": (decay, X, Y, {"jac": 3}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_are_of_scipys_types(mistake):
    f, x, y, *rest = MISTAKES[mistake]
    options = rest[0] if rest else {}
    ours, theirs = f, f
    if f is decay:
        theirs = decay_numpy
    with pytest.raises(Exception) as expected:
        scipy.optimize.curve_fit(theirs, x, y, **options)
    with pytest.raises(type(expected.value)):
        curve_fit(ours, x, y, **options)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("xdata", {"xdata": da.from_array(X, chunks=20)[da.from_array(X, chunks=20) > 1]}),
        ("ydata", {"ydata": da.from_array(Y, chunks=20)[da.from_array(X, chunks=20) > 1]}),
        ("ydata", {"ydata": Y[:, None]}),
        ("ydata", {"ydata": Y + 0j}),
        ("xdata", {"xdata": X.astype(object)}),
        ("xdata", {"xdata": np.zeros((2, 2, X.size))}),
        ("sigma", {"sigma": np.diag(SIGMA)}),
        ("sigma", {"sigma": 0 * SIGMA}),
        ("sigma", {"sigma": -SIGMA}),
        ("p0", {"p0": [1.0, np.nan, 1.0]}),
        ("p0", {"p0": np.array(1.0)}),
        ("p0", {"p0": {1.0, 2.0, 3.0}}),
        ("p0", {"p0": [1.0, [1.0, 2.0, [3.0]], 1.0]}),
        ("jac", {"jac": 3}),
        ("jac", {"jac": "2-point"}),
        ("client", {"client": "tcp://127.0.0.1:1"}),
        ("config", {"config": {"seed": 1}}),
        ("bounds", {"bounds": 3}),
        ("ydata", {"ydata": NAN}),
        ("xdata", {"xdata": NAN}),
        ("nan_policy", {"nan_policy": "propagate"}),
        ("method", {"method": "newton"}),
    ],
)
def test_errors_name_the_argument(argument, options):
    with pytest.raises((ValueError, TypeError), match=f"`{argument}") as raised:
        curve_fit(decay, **{"xdata": X, "ydata": Y, **options})
    assert "np.float64(" not in str(raised.value)


def test_a_fit_that_does_not_converge_raises_runtime_error():
    options = {"p0": [100.0, 30.0, -5.0], "maxfev": 1}
    with pytest.raises(RuntimeError, match="Optimal parameters not found"):
        scipy.optimize.curve_fit(decay_numpy, X, Y, **options)
    with pytest.raises(RuntimeError, match="Optimal parameters not found"):
        curve_fit(lambda x, a: a * x + jnp.nan, X, Y)


def test_nothing_is_printed_or_warned_in_a_good_fit(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve_fit(line, X, Y)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
