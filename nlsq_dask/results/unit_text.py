"""Products of units as text, in UDUNITS' style."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

__all__ = ["product_of_units"]

_FACTOR = re.compile(r"([^\W\d]+|%|°[CF]?)(?:(?:\^|\*\*)?([+-]?\d+))?")
_PLURALS = ("days", "hours", "minutes", "seconds", "milliseconds", "microseconds")


def product_of_units(exponents: Mapping[str, Fraction], units: Mapping[str, str]) -> str:
    """``Π unit^exponent``; empty where an exponent is no whole number.

    Parameters
    ----------
    exponents : mapping
    units : mapping
        The text of each unit, by the same names.

    Examples
    --------
    >>> product_of_units({"y": Fraction(1), "t": Fraction(-1)}, {"y": "kg m-3", "t": "days"})
    'kg m-3 day-1'
    >>> product_of_units({"y": Fraction(1), "t": Fraction(-1)}, {"y": "1e-3 K", "t": "days"})
    '(1e-3 K) / (days)'
    """
    if len(exponents) == 1 and list(exponents.values()) == [1]:
        return units[next(iter(exponents))]  # as the data have it
    parts = {name: _factors_of(text) for name, text in units.items() if name in exponents}
    if any(part is None for part in parts.values()):
        return _quotient({units[name]: exponents[name] for name in parts})
    total: dict[str, Fraction] = {}
    for name, part in parts.items():
        for factor, power in (part or {}).items():
            total[factor] = total.get(factor, Fraction(0)) + power * exponents[name]
    total = {factor: power for factor, power in total.items() if power}
    if any(power.denominator != 1 for power in total.values()):
        return ""
    ordered = sorted(total.items(), key=lambda item: item[1] < 0)
    return " ".join(f"{f}{'' if power == 1 else power}" for f, power in ordered) or "1"


def _factors_of(text: str) -> dict[str, int] | None:
    """Exponents of simple units in ``kg m-3``, ``W/m^2`` and the like; None for anything else."""
    factors: dict[str, int] = {}
    for position, quotient in enumerate(text.split("/")):
        words = re.split(r"[\s·.]+|(?<!\*)\*(?!\*)", quotient.strip())
        for place, word in enumerate(words):
            match = _FACTOR.fullmatch(word)
            if match is None and word != "1":
                return None
            # Only what comes next is divided by: W/m2 s is (W/m2) s.
            sign = -1 if position and not place else 1
            if match is not None:
                name = match[1][:-1] if match[1] in _PLURALS else match[1]
                factors[name] = factors.get(name, 0) + sign * int(match[2] or 1)
    return factors


def _quotient(powers: Mapping[str, Fraction]) -> str:
    """Units that are not taken apart, in brackets."""
    if any(power.denominator != 1 for power in powers.values()):
        return ""
    above, below = (
        " ".join(f"({text})" + ("" if abs(p) == 1 else str(abs(p))) for text, p in side)
        for side in (
            [item for item in powers.items() if item[1] > 0],
            [item for item in powers.items() if item[1] < 0],
        )
    )
    return f"{above or '1'} / {below}" if below else above
