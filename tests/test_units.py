"""Units of parameters: what follows from the data's, and nothing that does not."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlsq_dask.model import Model
from nlsq_dask.results.unit_text import product_of_units
from nlsq_dask.results.units import infer_units


def units_of(function, y, *x, shapes=None):
    names = list(inspect.signature(function).parameters)
    model = Model(
        function=function, variables=tuple(names[: len(x)]), parameters=tuple(names[len(x) :])
    )
    return infer_units(model, shapes or [()] * len(model.parameters), y, x)


def test_a_decay_has_the_units_of_y_and_one_over_those_of_t():
    found = units_of(lambda t, a, rate, c: a * jnp.exp(-rate * t) + c, "kg m-3", "days")
    assert found == {"a": "kg m-3", "rate": "day-1", "c": "kg m-3"}


@pytest.mark.parametrize(
    "peak",
    [
        lambda t, a, mu, s: a * jnp.exp(-0.5 * ((t - mu) / s) ** 2),
        lambda t, a, mu, s: a * jnp.exp(-((t - mu) ** 2) / (2 * s**2)),
        lambda t, a, mu, s: a * jnp.exp(-4 * jnp.log(2) * jnp.square(t - mu) / s**2),
        lambda t, a, mu, s: a / (1 + ((t - mu) / s) ** 2),
        lambda t, a, mu, s: a * jax.nn.sigmoid((t - mu) / s),
        lambda t, a, mu, s: jnp.where(t > mu, a * jax.scipy.special.erf((t - mu) / s), 0.0),
    ],
)
def test_a_peak_is_where_t_is_and_as_wide(peak):
    found = units_of(peak, "K", "m")
    if "s" not in found:  # ``1 + …``: a number is of whatever unit it is added to
        assert inspect.getsource(peak).count("(1 +")
        assert found == {"mu": "m"}
    else:
        assert found == {"a": "K", "mu": "m", "s": "m"}


def test_an_area_has_the_product():
    def area(t, a, mu, s):
        return a / (s * jnp.sqrt(2 * jnp.pi)) * jnp.exp(-0.5 * ((t - mu) / s) ** 2)

    assert units_of(area, "K", "m") == {"a": "K m", "mu": "m", "s": "m"}


def test_a_polynomial_has_a_unit_for_each_term():
    assert units_of(lambda t, a, b, c: a + b * t + c * t**2, "m", "s") == {
        "a": "m",
        "b": "m s-1",
        "c": "m s-2",
    }


def test_the_exponent_of_a_power_law_has_none_and_its_factor_cannot_be_written():
    assert units_of(lambda x, a, b: a * x**b, "W m-2", "m") == {"b": "1"}


@pytest.mark.parametrize(
    "hill",
    [
        lambda x, v, k, n: v * x**n / (k**n + x**n),
        lambda x, v, k, n: v / (1 + (x / k) ** n),
        lambda x, v, k, n: v * (x / k) ** n / (1 + (x / k) ** n),
    ],
)
def test_what_a_variable_is_compared_with_to_any_power_is_like_it(hill):
    assert units_of(hill, "mol/l", "hPa") == {"v": "mol/l", "k": "hPa", "n": "1"}


def test_opposite_powers_are_not_taken_for_the_same():
    found = units_of(lambda x, a, k, n: a / (1 + k**-n * x**n), "K", "hPa")
    assert found.get("k") in (None, "hPa")


def test_a_season_has_an_amplitude_a_period_and_a_phase():
    def season(t, base, size, period, phase):
        return base + size * jnp.sin(2 * jnp.pi * t / period + phase)

    assert units_of(season, "degC", "day") == {
        "base": "degC",
        "size": "degC",
        "period": "day",
        "phase": "1",
    }


@pytest.mark.parametrize("number", [86400, 3600.0, 60, 24, 12, 1000, 1e-3, 8.314, 0.0172])
def test_a_number_that_may_convert_units_determines_nothing(number):
    assert units_of(lambda t, a, r: a * jnp.exp(-r * number * t), "K", "s") == {"a": "K"}


@pytest.mark.parametrize("number", [2, 0.5, -1.0, jnp.pi, 2 * np.pi, 4 * np.log(2)])
def test_a_number_of_pure_mathematics_has_no_unit(number):
    assert units_of(lambda t, r: jnp.exp(-r * number * t), "", "s") == {"r": "s-1"}


def test_a_number_that_is_added_takes_the_unit_of_what_it_is_added_to():
    arrhenius = units_of(lambda t, a, e: a * jnp.exp(-e / (t + 273.15)), "s-1", "degC")
    assert arrhenius == {"a": "s-1", "e": "degC"}
    assert units_of(lambda t, a, p: a * (1 + t / p), "K", "day") == {}


def test_a_model_that_does_not_follow_units_has_none():
    assert units_of(lambda t, a, c: a * jnp.exp(-t) + c, "K", "day") == {}
    assert units_of(lambda t, a: jnp.exp(a * t), "K", "day") == {}
    assert units_of(lambda t, a: a * jnp.exp(-t), "K", "1") == {"a": "K"}
    assert units_of(lambda t, a: a * jnp.sin(t), "K", "radian") == {"a": "K"}


def test_what_has_no_units_determines_nothing():
    assert units_of(lambda t, a, r: a * jnp.exp(-r * t), "", "day") == {"r": "day-1"}
    assert units_of(lambda t, a, r: a * jnp.exp(-r * t), "K", "") == {"a": "K"}
    assert units_of(lambda t, z, a, b: a * t + b * z, "K", "day", "") == {"a": "K day-1"}


def test_arrays_of_parameters_have_a_unit_if_their_elements_share_it():
    def steps(k, t, level, slope):
        return level[k.astype(int)] + slope * t

    shapes = [(4,), ()]
    assert units_of(steps, "K", "1", "day", shapes=shapes) == {"level": "K", "slope": "K day-1"}

    def polynomial(t, c, d):
        return sum(c[i] * t**i for i in range(3)) + d

    assert units_of(polynomial, "K", "day", shapes=[(3,), ()]) == {"d": "K"}
    assert units_of(polynomial, "K", "1", shapes=[(3,), ()]) == {"c": "K", "d": "K"}


def test_operations_without_a_rule_say_nothing_of_what_goes_through_them():
    def looped(t, a, b):
        return a * t + jax.lax.fori_loop(0, 3, lambda i, s: s * b, t)

    assert units_of(looped, "K", "day") == {"a": "K day-1"}


@given(scales=st.lists(st.sampled_from([0.5, 2.0, 4.0, 8.0]), min_size=2, max_size=2))
def test_inferred_units_are_those_in_which_the_model_is_the_same(scales):
    """Rescaling data and parameters by their units changes nothing but the unit of the value."""
    y_scale, t_scale = scales

    def model(t, a, r, n, k, c):
        return a * jnp.exp(-r * t) * (t / (k + t)) ** n + c * jnp.sqrt(t) / jnp.sqrt(k)

    found = units_of(model, "Y", "T")
    assert set(found) == {"a", "r", "n", "k", "c"}
    values = dict(zip("arnkc", (1.5, 0.3, 1.7, 2.2, 0.4), strict=True))
    powers = {"1": 1.0, "Y": y_scale, "T": t_scale, "T-1": 1 / t_scale}
    scaled = {name: value * powers[found[name]] for name, value in values.items()}
    t = np.array([0.5, 1.0, 3.0])
    np.testing.assert_allclose(
        model(t * t_scale, **scaled), y_scale * model(t, **values), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("y", "x", "quotient"),
    [
        ("kg m-3", "days", "kg m-3 day-1"),
        ("W/m^2", "K", "W m-2 K-1"),
        ("W/m2/s", "s", "W m-2 s-2"),
        ("m", "m", "1"),
        ("m s**-1", "s-1", "m"),
        ("%", "hours", "% hour-1"),
        ("µmol/l", "1", "µmol l-1"),
        ("1e-3 K", "day", "(1e-3 K) / (day)"),
        ("degrees north", "m)</script>", "(degrees north) / (m)</script>)"),
    ],
)
def test_quotients_are_written_as_udunits_reads_them(y, x, quotient):
    assert product_of_units({"y": 1, "x": -1}, {"y": y, "x": x}) == quotient


def test_units_that_have_no_whole_exponents_are_not_written():
    from fractions import Fraction

    assert product_of_units({"x": Fraction(1, 2)}, {"x": "m"}) == ""
    assert product_of_units({"x": Fraction(1, 2)}, {"x": "m2"}) == "m"
