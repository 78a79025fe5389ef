"""The problems of the benchmarks: models, their Jacobians by hand, data, and the minimum.

Nothing here imports JAX: a model is written once, for any namespace of array functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import zarr

__all__ = ["PROBLEMS", "Data", "Minimum", "Problem", "find_minimum", "write_archive", "write_data"]

_BLOCK_ROWS = 500_000


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model ``f(x, p1, p2, …)`` on ``0 <= x <= 10`` and where its fit begins and should end."""

    name: str
    title: str
    build: Callable[[ModuleType], Callable[..., Any]]
    jacobian: Callable[[np.ndarray, np.ndarray], np.ndarray]
    truth: tuple[float, ...]
    p0: tuple[float, ...]
    noise: float

    def model(self, xp: ModuleType) -> Callable[..., Any]:
        """The model in the functions of `xp`: NumPy's, or JAX's NumPy."""
        return self.build(xp)

    def block(self, start: int, stop: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows `start` to `stop` of `num_rows`: the same, however they are written."""
        x = np.linspace(10 * start / num_rows, 10 * stop / num_rows, stop - start, endpoint=False)
        noise = np.random.default_rng([0, start]).normal(size=len(x))
        return x, self.model(np)(x, *self.truth) + self.noise * noise


def build_decay(xp: ModuleType) -> Callable[..., Any]:
    def decay(x: Any, amplitude: Any, rate: Any, offset: Any) -> Any:
        return amplitude * xp.exp(-rate * x) + offset

    return decay


def decay_jacobian(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    e = np.exp(-p[1] * x)
    return np.stack([e, -p[0] * x * e, np.ones_like(x)], axis=-1)


def build_double_gaussian(xp: ModuleType) -> Callable[..., Any]:
    def double_gaussian(
        x: Any, h1: Any, c1: Any, w1: Any, h2: Any, c2: Any, w2: Any, level: Any, slope: Any
    ) -> Any:
        first = h1 * xp.exp(-0.5 * ((x - c1) / w1) ** 2)
        second = h2 * xp.exp(-0.5 * ((x - c2) / w2) ** 2)
        return first + second + level + slope * x

    return double_gaussian


def double_gaussian_jacobian(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    columns = []
    for height, center, width in (p[0:3], p[3:6]):
        z = (x - center) / width
        e = np.exp(-0.5 * z**2)
        columns += [e, height * e * z / width, height * e * z**2 / width]
    return np.stack([*columns, np.ones_like(x), x], axis=-1)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            name="decay",
            title="exponential decay, 3 parameters",
            build=build_decay,
            jacobian=decay_jacobian,
            truth=(2.0, 0.5, 0.1),
            p0=(1.0, 1.0, 0.0),
            noise=0.1,
        ),
        Problem(
            name="double_gaussian",
            title="two Gaussians on a slope, 8 parameters",
            build=build_double_gaussian,
            jacobian=double_gaussian_jacobian,
            truth=(2.0, 3.0, 0.6, 1.2, 6.5, 0.9, 0.3, 0.05),
            p0=(1.5, 2.7, 0.8, 1.0, 6.9, 0.7, 0.2, 0.0),
            noise=0.1,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """One problem's rows on disk, as arrays to load and, where written, as an archive."""

    problem: str
    num_rows: int
    folder: Path

    @property
    def archive(self) -> Path:
        return self.folder / "rows.zarr"

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        return np.load(self.folder / "x.npy"), np.load(self.folder / "y.npy")


def blocks_of(problem: Problem, num_rows: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    for start in range(0, num_rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, num_rows)
        yield slice(start, stop), *problem.block(start, stop, num_rows)


def write_data(problem: Problem, num_rows: int, folder: Path) -> Data:
    """Write the rows as two arrays, a block at a time."""
    data = Data(problem=problem.name, num_rows=num_rows, folder=folder)
    x, y = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float64, (num_rows,))
        for name in ("x", "y")
    )
    for rows, x_block, y_block in blocks_of(problem, num_rows):
        x[rows], y[rows] = x_block, y_block
    x.flush()
    y.flush()
    return data


def write_archive(problem: Problem, data: Data, chunk_rows: int) -> None:
    """Write the same rows as a Zarr archive, with Zarr's own compression."""
    group = zarr.open_group(data.archive, mode="w", zarr_format=3)
    x, y = (np.load(data.folder / f"{name}.npy", mmap_mode="r") for name in ("x", "y"))
    for name, values in (("x", x), ("y", y)):
        array = group.create_array(
            name, shape=values.shape, chunks=(chunk_rows,), dtype="f8", dimension_names=["row"]
        )
        for start in range(0, len(values), chunk_rows):
            array[start : start + chunk_rows] = values[start : start + chunk_rows]


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Where the sum of squares is least, and the standard errors there."""

    popt: np.ndarray
    perr: np.ndarray

    def distance(self, params: Any) -> float:
        """In standard errors, the worst parameter."""
        return float(np.max(np.abs(np.asarray(params, np.float64) - self.popt) / self.perr))


def find_minimum(problem: Problem, num_rows: int) -> Minimum:
    """Gauss-Newton in NumPy from the truth, block by block: what every result is held against.

    Residuals are noise, so that a step leaves 1e-3 of the distance or less.
    """
    params = np.array(problem.truth)
    n = len(params)
    for _ in range(5):
        gram, grad, square = np.zeros((n, n)), np.zeros(n), 0.0
        for _, x, y in blocks_of(problem, num_rows):
            residual = problem.model(np)(x, *params) - y
            jac = problem.jacobian(x, params)
            gram += jac.T @ jac
            grad += jac.T @ residual
            square += residual @ residual
        covariance = np.linalg.inv(gram) * square / (num_rows - n)
        perr = np.sqrt(np.diag(covariance))
        step = -np.linalg.solve(gram, grad)
        params = params + step
        if np.max(np.abs(step) / perr) < 1e-3:
            break
    return Minimum(popt=params, perr=perr)
