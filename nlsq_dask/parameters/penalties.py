r"""What is added to the cost for the parameters themselves: priors and group variances.

    P(θ) = ½ Σⱼ ((θⱼ - μⱼ)/τⱼ)²  +  ½ λ m Σ_g Var(θ_g)

with m the rows that count and Var the mean squared deviation (ddof 0) of a group of parameters.
Both are sums of squares of rows that are linear in θ, so that cost, gradient and Gauss-Newton
Hessian are those of a few more residuals, and the Hessian is exact. They are added once, where
the sums over the data arrive, never per chunk.

On a sample of m_s of m rows, P is scaled by m_s / m, so that its weight against the data is
what it will be on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nlsq_dask._typing import Array, Float, Int, Vector
from nlsq_dask.parameters.given import is_pair
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.require import is_scale, real_array, shown

__all__ = ["Penalties", "PenaltyRows", "build_priors", "require_priors"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PenaltyRows:
    """The penalty as residuals linear in θ, at its weight for a number of rows."""

    index: Int[np.ndarray, " priors"]
    mean: Float[np.ndarray, " priors"]
    root: Float[np.ndarray, " priors"]  # √weight / τ
    groups: tuple[tuple[int, int], ...]
    group_roots: tuple[float, ...]  # √(λ m / length)

    def cost(self, params: Float[Array, " n"]) -> Float[Array, ""]:
        """``P(θ)``; NumPy or JAX arrays."""
        total: Array = 0.5 * ((self.root * (params[self.index] - self.mean)) ** 2).sum()
        for (start, end), root in zip(self.groups, self.group_roots, strict=True):
            part = params[start:end]
            total = total + 0.5 * root**2 * ((part - part.mean()) ** 2).sum()
        return total

    def residual(self, params: Vector) -> Vector:
        """The rows at θ; their half sum of squares is the cost."""
        return np.concatenate([self.root * (params[self.index] - self.mean), *self._spread(params)])

    def push(self, directions: Float[np.ndarray, "n j"]) -> Float[np.ndarray, "q j"]:
        """Their derivative along directions in parameter space."""
        root = self.root.reshape(-1, *([1] * (directions.ndim - 1)))
        return np.concatenate([root * directions[self.index], *self._spread(directions)])

    def pull(self, rows: Float[np.ndarray, " q"], size: int) -> Float[np.ndarray, " n"]:
        """The transpose of `push`: a gradient in parameter space."""
        grad = np.zeros(size)
        np.add.at(grad, self.index, self.root * rows[: len(self.index)])
        first = len(self.index)
        for (start, end), root in zip(self.groups, self.group_roots, strict=True):
            part = rows[first : first + end - start]
            grad[start:end] += root * (part - part.mean())
            first += end - start
        return grad

    def diagonal(self, size: int) -> Float[np.ndarray, " n"]:
        """Of their Hessian, in parameter space."""
        diagonal = np.zeros(size)
        np.add.at(diagonal, self.index, self.root**2)
        for (start, end), root in zip(self.groups, self.group_roots, strict=True):
            diagonal[start:end] += root**2 * (1 - 1 / (end - start))
        return diagonal

    def _spread(self, values: np.ndarray) -> list[np.ndarray]:
        return [
            root * (values[start:end] - values[start:end].mean(axis=0))
            for (start, end), root in zip(self.groups, self.group_roots, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Penalties:
    """Gaussian priors on some parameters, and the variance of groups of them."""

    prior_index: Int[np.ndarray, " priors"] = field(default_factory=lambda: np.zeros(0, np.int64))
    prior_mean: Vector = field(default_factory=lambda: np.zeros(0))
    prior_width: Vector = field(default_factory=lambda: np.zeros(0))
    groups: tuple[tuple[int, int], ...] = ()
    group_lambda: float = 0.0

    @property
    def is_empty(self) -> bool:
        return not (len(self.prior_index) or self.groups)

    def rows(self, num_rows: float, share: float = 1.0) -> PenaltyRows:
        """The penalty beside the cost of `num_rows` rows, which are a `share` of all."""
        return PenaltyRows(
            index=self.prior_index,
            mean=self.prior_mean,
            root=np.sqrt(share) / self.prior_width,
            groups=self.groups,
            group_roots=tuple(
                float(np.sqrt(self.group_lambda * num_rows / (end - start)))
                for start, end in self.groups
            ),
        )


def require_priors(priors: object) -> None:
    if priors is not None and not isinstance(priors, Mapping):
        raise TypeError(f"`priors` must map names to (mean, width), got {shown(priors)}")


def build_priors(
    space: ParameterSpace, priors: Mapping[str, Any] | None
) -> tuple[Int[np.ndarray, " priors"], Vector, Vector]:
    """Elements of the parameter vector with a prior, their means and widths.

    Parameters
    ----------
    space : ParameterSpace
    priors : mapping
        ``{name: (mean, width)}``, each a number or of the parameter's shape.

    Raises
    ------
    ValueError
        If a name is unknown or held, or a mean or width is not usable.
    """
    index, means, widths = [], [], []
    for name, pair in (priors or {}).items():
        if name not in space.names:
            raise ValueError(
                f"`priors` must name parameters of the model, {list(space.names)}, "
                f"got {shown(name)}"
            )
        mean, width = _mean_and_width(name, pair)
        where = space.slice_of(name)
        if not (space.is_free | space.is_tied)[where].any():
            raise ValueError(f"`priors` must be on parameters that vary, but {name!r} is fixed")
        shape = space.shapes[space.names.index(name)]
        try:
            means.append(np.broadcast_to(mean, shape).ravel())
            widths.append(np.broadcast_to(width, shape).ravel())
        except ValueError:
            raise ValueError(
                f"`priors[{name!r}]` must be numbers or have the parameter's shape {shape}, got "
                f"shapes {mean.shape} and {width.shape}"
            ) from None
        index.append(np.arange(where.start, where.stop))
    if not index:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    return np.concatenate(index), np.concatenate(means), np.concatenate(widths)


def _mean_and_width(name: str, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    if not is_pair(pair):
        raise ValueError(f"`priors[{name!r}]` must be (mean, width), got {shown(pair)}")
    mean, width = (real_array(f"priors[{name!r}]", part) for part in pair)
    if not np.isfinite(mean).all() or not all(map(is_scale, width.ravel().tolist())):
        raise ValueError(
            f"`priors[{name!r}]` must have a finite mean and a positive finite width, of which the "
            f"square is not zero, got {shown(pair)}"
        )
    return mean, width
