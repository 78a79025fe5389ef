"""NIST's Statistical Reference Datasets for nonlinear regression (public domain)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

FOLDER = Path(__file__).parent / "data" / "nist"
exp, cos, sin, pi, arctan = jnp.exp, jnp.cos, jnp.sin, np.pi, jnp.arctan


def misra1a(x, b1, b2):
    return b1 * (1 - exp(-b2 * x))


def misra1b(x, b1, b2):
    return b1 * (1 - (1 + b2 * x / 2) ** -2)


def misra1c(x, b1, b2):
    return b1 * (1 - (1 + 2 * b2 * x) ** -0.5)


def misra1d(x, b1, b2):
    return b1 * b2 * x / (1 + b2 * x)


def chwirut(x, b1, b2, b3):
    return exp(-b1 * x) / (b2 + b3 * x)


def lanczos(x, b1, b2, b3, b4, b5, b6):
    return b1 * exp(-b2 * x) + b3 * exp(-b4 * x) + b5 * exp(-b6 * x)


def gauss(x, b1, b2, b3, b4, b5, b6, b7, b8):
    one = b3 * exp(-((x - b4) ** 2) / b5**2)
    return b1 * exp(-b2 * x) + one + b6 * exp(-((x - b7) ** 2) / b8**2)


def danwood(x, b1, b2):
    return b1 * x**b2


def kirby2(x, b1, b2, b3, b4, b5):
    return (b1 + b2 * x + b3 * x**2) / (1 + b4 * x + b5 * x**2)


def hahn1(x, b1, b2, b3, b4, b5, b6, b7):
    return (b1 + b2 * x + b3 * x**2 + b4 * x**3) / (1 + b5 * x + b6 * x**2 + b7 * x**3)


def nelson(x1, x2, b1, b2, b3):
    return b1 - b2 * x1 * exp(-b3 * x2)


def mgh09(x, b1, b2, b3, b4):
    return b1 * (x**2 + x * b2) / (x**2 + x * b3 + b4)


def mgh10(x, b1, b2, b3):
    return b1 * exp(b2 / (x + b3))


def mgh17(x, b1, b2, b3, b4, b5):
    return b1 + b2 * exp(-x * b4) + b3 * exp(-x * b5)


def roszman1(x, b1, b2, b3, b4):
    return b1 - b2 * x - arctan(b3 / (x - b4)) / pi


def enso(x, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    value = b1 + b2 * cos(2 * pi * x / 12) + b3 * sin(2 * pi * x / 12)
    value += b5 * cos(2 * pi * x / b4) + b6 * sin(2 * pi * x / b4)
    return value + b8 * cos(2 * pi * x / b7) + b9 * sin(2 * pi * x / b7)


def thurber(x, b1, b2, b3, b4, b5, b6, b7):
    return (b1 + b2 * x + b3 * x**2 + b4 * x**3) / (1 + b5 * x + b6 * x**2 + b7 * x**3)


def rat42(x, b1, b2, b3):
    return b1 / (1 + exp(b2 - b3 * x))


def rat43(x, b1, b2, b3, b4):
    return b1 / (1 + exp(b2 - b3 * x)) ** (1 / b4)


def eckerle4(x, b1, b2, b3):
    return b1 / b2 * exp(-0.5 * ((x - b3) / b2) ** 2)


def bennett5(x, b1, b2, b3):
    return b1 * (b2 + x) ** (-1 / b3)


MODELS: dict[str, Callable[..., object]] = {
    "Misra1a": misra1a,
    "Misra1b": misra1b,
    "Misra1c": misra1c,
    "Misra1d": misra1d,
    "Chwirut1": chwirut,
    "Chwirut2": chwirut,
    "Lanczos1": lanczos,
    "Lanczos2": lanczos,
    "Lanczos3": lanczos,
    "Gauss1": gauss,
    "Gauss2": gauss,
    "Gauss3": gauss,
    "DanWood": danwood,
    "Kirby2": kirby2,
    "Hahn1": hahn1,
    "Nelson": nelson,
    "MGH09": mgh09,
    "MGH10": mgh10,
    "MGH17": mgh17,
    "Roszman1": roszman1,
    "ENSO": enso,
    "Thurber": thurber,
    "Rat42": rat42,
    "Rat43": rat43,
    "Eckerle4": eckerle4,
    "Bennett5": bennett5,
    "BoxBOD": misra1a,
}


@dataclass(frozen=True)
class NistProblem:
    name: str
    model: Callable[..., object]
    x: np.ndarray
    y: np.ndarray
    starts: tuple[np.ndarray, np.ndarray]
    values: np.ndarray
    errors: np.ndarray
    residual_sum_of_squares: float


def load(name: str) -> NistProblem:
    """Read a problem; `x` is `(m,)`, or `(2, m)` for Nelson, whose response is its logarithm."""
    lines = (FOLDER / f"{name}.dat").read_text().splitlines()
    number = r"([-+.\dEe]+)"
    row = re.compile(rf"\s*b\d+\s*=\s*{number}\s+{number}\s+{number}\s+{number}")
    parameters = np.array(
        [[float(part) for part in match.groups()] for line in lines if (match := row.match(line))]
    )
    squares = next(line for line in lines if line.startswith("Residual Sum of Squares"))
    data = np.array([[float(part) for part in line.split()] for line in lines[60:] if line.strip()])
    y, x = data[:, 0], data[:, 1:].T
    return NistProblem(
        name=name,
        model=MODELS[name],
        x=x[0] if len(x) == 1 else x,
        y=np.log(y) if name == "Nelson" else y,
        starts=(parameters[:, 0], parameters[:, 1]),
        values=parameters[:, 2],
        errors=parameters[:, 3],
        residual_sum_of_squares=float(squares.split()[-1]),
    )


def digits(actual: np.ndarray, certified: np.ndarray) -> float:
    """The log relative error of the worst element, at most 11, as many as are certified."""
    error = np.max(np.abs(actual - certified) / np.abs(certified))
    return 11.0 if error == 0 else min(11.0, -np.log10(error))
