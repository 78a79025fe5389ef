r"""Units of parameters, as far as they follow from those of the data.

The model is traced, and every operation of the trace says how units go through it: what is added
or compared has one unit, products multiply them, exponents and angles have none. Taking
logarithms of units, these are linear equations, with whole or simple coefficients, for the
unknown units of the parameters (Kennedy 1997, inference of units as in Hindley-Milner). A
parameter whose unit they determine in terms of known ones has that; all others have none.

Nothing is guessed. A number that is added or compared has whatever unit it takes: ``x - 273.15``.
So has a number that multiplies, since ``exp(-rate * 86400 * t)`` may convert units, unless it is
one of pure mathematics: 2, ½, π, √(2π), ln 2 and the like. Where the equations contradict the
data's units, as ``exp(x)`` of days does, the model does not follow units, and none are given.

To the power of a parameter, units are symbols of their own: ``x**n`` has the unit xⁿ, whatever n
will be. What holds for every n, ``k**n + x**n`` or ``1 + (x / k)**n``, says that k is like x; and
an amplitude ``a * x**n`` has no unit that could be written down.

References
----------
Kennedy (1997), Relational parametricity and units of measure, POPL '97, 442-455.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from nlsq_dask._typing import Shape, abstract
from nlsq_dask.model import Model
from nlsq_dask.results.unit_text import product_of_units

__all__ = ["infer_units"]

# The logarithm of a unit: exponents of those that are known, sought, or met on the way.
_Form: TypeAlias = Mapping[str, Fraction]

_NONE: _Form = {}
_ONE = Fraction(1)
_HALF = Fraction(1, 2)
_WITHOUT_UNITS = ("1", "rad", "radian", "radians", "dimensionless")

# What operations of a trace do to units.
_TABLE = """
unchanged: broadcast_in_dim convert_element_type copy reshape squeeze transpose
same: abs ceil cummax cummin cumsum dynamic_slice floor gather neg real reduce_max reduce_min
same: reduce_sum rev round slice
one: add add_any sub max min rem nextafter concatenate clamp
compare: eq ne lt le gt ge atan2
pure: exp exp2 expm1 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh logistic
pure: erf erfc erf_inv lgamma digamma bessel_i0e bessel_i1e
none: sign is_finite log argmax argmin and or not xor iota
product: mul dot_general
quotient: div
call: pjit jit closed_call core_call remat2 checkpoint
call: custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
"""
_RULES = {
    word: line.partition(":")[0]
    for line in _TABLE.strip().splitlines()
    for word in line.partition(":")[2].split()
}
_POWERS = {"sqrt": _HALF, "rsqrt": -_HALF, "cbrt": Fraction(1, 3), "square": Fraction(2)}

_CONSTANTS = [1.0, 3.0, math.pi, math.sqrt(math.pi), math.sqrt(2), math.log(2)]
_CONSTANTS += [math.sqrt(2 * math.pi), math.sqrt(math.log(2)), math.sqrt(2 * math.log(2))]
# Neither 10, which may be a prefix, nor 12, 24, 60, 3600, which convert times.
_PURE_NUMBERS = np.array([c * 2.0**i for c in _CONSTANTS for i in range(-3, 4) if c != 3 or i < 2])


def infer_units(
    model: Model, shapes: Sequence[Shape], y_units: str, x_units: Sequence[str]
) -> dict[str, str]:
    """Units of the parameters that those of the data determine, by name.

    Parameters
    ----------
    model : Model
    shapes : sequence of shapes
        Of its parameters. An array has a unit where it is the same for all elements.
    y_units, x_units : str
        Of what is fitted and of each variable; empty where not known.

    Returns
    -------
    dict
        Units in UDUNITS' style, ``"kg m-3 day-1"``, "1" for none. Parameters that are not in it
        are not determined.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> decay = Model(
    ...     function=lambda t, amplitude, rate: amplitude * jnp.exp(-rate * t),
    ...     variables=("t",),
    ...     parameters=("amplitude", "rate"),
    ... )
    >>> infer_units(decay, [(), ()], "kg m-3", ["day"])
    {'amplitude': 'kg m-3', 'rate': 'day-1'}
    """
    texts = [y_units, *x_units]
    # That elements share a unit would say something of variables whose units are not known.
    found = _infer(model, shapes, texts, arrays_have_units=True) if all(texts) else None
    if found is None:
        found = _infer(model, shapes, texts, arrays_have_units=False)
    return found or {}


def _infer(
    model: Model, shapes: Sequence[Shape], texts: Sequence[str], arrays_have_units: bool
) -> dict[str, str] | None:
    """Units by name; None where the model contradicts those of the data."""
    symbols = ["y", *(f"x{i}" for i in range(len(texts) - 1))]
    parameters = {f"p{i}": name for i, name in enumerate(model.parameters)}
    walk = _Walk()
    variables: list[_Traced] = [{symbol: _ONE} for symbol in symbols[1:]]
    given: list[_Traced] = [
        {symbol: _ONE} if arrays_have_units or not shape else _Number(math.nan)
        for symbol, shape in zip(parameters, shapes, strict=True)
    ]
    (value,) = walk.closed(_trace(model, len(variables), shapes), [*variables, *given])
    walk.equate(value, {"y": _ONE})
    units = dict(zip(symbols, texts, strict=True))
    known = [symbol for symbol, text in units.items() if text]
    sought = [*(symbol for symbol, text in units.items() if not text), *parameters]
    forms, relations = _solve([*walk.equations, *walk.raised_equations()], sought, known)
    if any(product_of_units(form, units) not in _WITHOUT_UNITS for form in relations):
        return None
    written = {
        name: product_of_units(forms[symbol], units)
        for symbol, name in parameters.items()
        if symbol in forms
    }
    return {name: text for name, text in written.items() if text}


def _trace(model: Model, num_variables: int, shapes: Sequence[Shape]) -> ClosedJaxpr:
    rows = abstract((max([0, *(length for shape in shapes for length in shape)]) + 101,))

    def evaluate(*arrays: Any) -> Any:
        return model(arrays[:num_variables], arrays[num_variables:])

    with jax.enable_x64(True):
        x = [rows] * num_variables
        return jax.make_jaxpr(evaluate)(*x, *(abstract(shape) for shape in shapes))


# -- the trace


def _combine(*terms: tuple[_Form, Fraction | int]) -> _Form:
    total: dict[str, Fraction] = {}
    for form, factor in terms:
        for name, exponent in form.items():
            total[name] = total.get(name, Fraction(0)) + factor * exponent
    return {name: exponent for name, exponent in total.items() if exponent}


@dataclass(frozen=True)
class _Number:
    """A number written in the model: what it is depends on what is done with it.

    NaN is one that is not known, of an array of parameters whose elements differ in units.
    """

    value: float


_Traced: TypeAlias = "_Form | _Number"


@dataclass(kw_only=True)
class _Walk:
    """Goes through a trace and collects forms that have to be zero."""

    equations: list[_Form] = field(default_factory=list)
    exponents: list[_Form] = field(default_factory=list)  # fitted; the same object is the same
    num_unknown: int = 0

    def equate(self, first: _Traced, second: _Traced) -> None:
        difference = _combine((self._loose(first), 1), (self._loose(second), -1))
        powers = {name.partition("^")[2] for name in difference} - {""}
        plain = {name: e for name, e in difference.items() if "^" not in name}
        # An unknown may hold such powers too; without one, what is raised to each is one.
        if powers and not any(name[0] in "p?" for name in plain):
            for power in powers:
                raised = {n: e for n, e in difference.items() if n.endswith(f"^{power}")}
                self.equations.append({name.partition("^")[0]: e for name, e in raised.items()})
            difference = plain
        self.equations.append(difference)

    def raised_equations(self) -> list[_Form]:
        """What holds of units holds of all their powers."""
        plain = [form for form in self.equations if not any("^" in name for name in form)]
        return [
            {f"{name}^{place}": e for name, e in form.items()}
            for place in range(len(self.exponents))
            for form in plain
        ]

    def closed(self, closed: ClosedJaxpr, given: Sequence[_Traced]) -> list[_Traced]:
        constants = [_number(const) or self._unknown() for const in closed.consts]
        return self._body(closed.jaxpr, [*constants, *given])

    def _body(self, jaxpr: Jaxpr, given: Sequence[_Traced]) -> list[_Traced]:
        places = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))

        def read(variable: Any) -> _Traced:
            if isinstance(variable, Literal):
                return _number(variable.val) or self._unknown()
            return places[variable]

        for equation in jaxpr.eqns:
            operands = [read(variable) for variable in equation.invars]
            results = self._step(equation.primitive.name, equation.params, operands)
            known = results or [self._unknown() for _ in equation.outvars]
            places.update(zip(equation.outvars, known, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _step(
        self, name: str, options: Mapping[str, Any], operands: Sequence[_Traced]
    ) -> list[_Traced]:
        """The results' units; nothing for an operation that says nothing of them."""
        rule = _RULES.get(name)
        if rule == "call":
            return self.closed(_called(options), operands)
        if rule == "unchanged":
            return [operands[0]]
        if rule == "same":
            return [self._changed(operands[0])]
        if rule in ("product", "quotient"):
            return [self._product(operands[0], operands[1], 1 if rule == "product" else -1)]
        if name in _POWERS or name == "integer_pow":
            return [self._power(operands[0], _POWERS.get(name) or Fraction(options["y"]))]
        if name == "pow":
            return [self._general_power(*operands)]
        if rule == "one" or name == "select_n":
            return [self._one_unit(operands if rule else operands[1:])]
        return self._without_units(rule, operands)

    def _without_units(self, rule: str | None, operands: Sequence[_Traced]) -> list[_Traced]:
        if rule == "compare":
            self._one_unit(operands)
        if rule == "pure":
            for operand in operands:
                self.equate(operand, _NONE)
        return [_NONE] if rule in ("compare", "pure", "none") else []

    def _one_unit(self, operands: Sequence[_Traced]) -> _Form:
        first, *others = (self._loose(operand) for operand in operands)
        for other in others:
            self.equate(first, other)
        return first

    def _product(self, first: _Traced, second: _Traced, sign: int) -> _Traced:
        if isinstance(first, _Number) and isinstance(second, _Number):
            with np.errstate(all="ignore"):
                return _Number(float(np.float64(first.value) * np.float64(second.value) ** sign))
        return _combine((self._strict(first), 1), (self._strict(second), sign))

    def _power(self, base: _Traced, power: Fraction) -> _Traced:
        if isinstance(base, _Number):
            with np.errstate(all="ignore"):
                return _Number(float(np.float64(base.value) ** float(power)))
        return _combine((base, power))

    def _general_power(self, base: _Traced, exponent: _Traced) -> _Traced:
        """A power that is written down, or a symbol for one that is fitted."""
        if isinstance(exponent, _Number):
            power = Fraction(exponent.value).limit_denominator(12)
            is_simple = math.isclose(power, exponent.value, rel_tol=1e-12)
            return self._power(base, power) if is_simple else self._unknown()
        self.equate(exponent, _NONE)
        if isinstance(base, _Number):
            return _NONE
        if any("^" in name for name in base):
            return self._unknown()
        place = next((i for i, known in enumerate(self.exponents) if known is exponent), None)
        if place is None:
            place = len(self.exponents)
            self.exponents.append(exponent)
        return {f"{name}^{place}": e for name, e in base.items()}

    def _strict(self, operand: _Traced) -> _Form:
        """As a factor: a number of pure mathematics has no unit."""
        is_pure = isinstance(operand, _Number) and _is_pure(operand.value)
        return _NONE if is_pure else self._loose(operand)

    def _loose(self, operand: _Traced) -> _Form:
        """As a term: a number has the unit of what it is added to."""
        if not isinstance(operand, _Number):
            return operand
        return self._unknown("?" if math.isnan(operand.value) else "#")

    def _unknown(self, kind: str = "?") -> _Form:
        """A number's unit (#), or that of what no rule was found for (?)."""
        self.num_unknown += 1
        return {f"{kind}{self.num_unknown}": _ONE}

    def _changed(self, operand: _Traced) -> _Traced:
        """Another value of the same unit; of a number, its sign alone may be another."""
        return operand if isinstance(operand, _Number) else dict(operand)


def _called(options: Mapping[str, Any]) -> ClosedJaxpr:
    inner = next(options[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in options)
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _number(value: Any) -> _Number | None:
    """A constant that is one number; None for others."""
    array = np.asarray(value)
    if array.size == 0 or array.dtype.kind not in "iufb" or not (array == array.flat[0]).all():
        return None
    return _Number(float(array.flat[0]))


def _is_pure(value: float) -> bool:
    near = np.isclose(abs(value), [_PURE_NUMBERS, 1 / _PURE_NUMBERS], rtol=1e-12, atol=0)
    return bool(near.any())


# -- the equations


def _solve(
    equations: Sequence[_Form], sought: Sequence[str], known: Sequence[str]
) -> tuple[dict[str, _Form], list[_Form]]:
    """What is sought in terms of what is known, and what is known to be one of nothing else.

    Gauss-Jordan in exact arithmetic. Unknowns met on the way are eliminated first, so that what
    is left is all that can be said without them.
    """
    met = {name: None for form in equations for name in form}.keys() - {*sought, *known}
    order = {name: rank for rank, name in enumerate([*sorted(met), *sought, *known])}
    solved: dict[str, _Form] = {}
    for equation in equations:
        form = _substitute(equation, solved)
        if not form:
            continue
        pivot = min(form, key=order.__getitem__)
        rest = {name: -e / form[pivot] for name, e in form.items() if name != pivot}
        solved = {name: _substitute(other, {pivot: rest}) for name, other in solved.items()}
        solved[pivot] = rest
    found = {name: solved[name] for name in sought if name in solved}
    determined = {name: form for name, form in found.items() if set(form) <= set(known)}
    relations = [
        _combine(({name: _ONE}, 1), (solved[name], -1)) for name in known if name in solved
    ]
    return determined, relations


def _substitute(form: _Form, solved: Mapping[str, _Form]) -> _Form:
    if solved.keys().isdisjoint(form):
        return form
    return _combine(*((solved.get(name, {name: _ONE}), e) for name, e in form.items()))
