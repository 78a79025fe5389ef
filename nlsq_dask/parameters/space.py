"""Parameters by name: shapes, starts, bounds, and which of them are free."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nlsq_dask._typing import Array, Bool, Float, Shape, Vector
from nlsq_dask.errors import ModelError
from nlsq_dask.parameters.labels import labels_of
from nlsq_dask.parameters.ties import Tie
from nlsq_dask.traces import trace_of

__all__ = ["ParameterSpace", "strictly_inside"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterSpace:
    """The flat vector of all `n` parameters, and the `k` of them that are free."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    p0: Float[np.ndarray, " n"]
    lower: Float[np.ndarray, " n"]
    upper: Float[np.ndarray, " n"]
    is_free: Bool[np.ndarray, " n"]
    ties: tuple[Tie, ...] = ()  # each after those that it depends on

    @property
    def size(self) -> int:
        return len(self.p0)

    @property
    def num_free(self) -> int:
        return int(self.is_free.sum())

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each element of the flat vector: ``a``, ``c[0]``, ``c[1]``, …"""
        return labels_of(zip(self.names, self.shapes, strict=True))

    @property
    def free_bounds(self) -> tuple[Vector, Vector]:
        return self.lower[self.is_free], self.upper[self.is_free]

    @property
    def is_tied(self) -> Bool[np.ndarray, " n"]:
        tied = np.zeros(self.size, bool)
        for tie in self.ties:
            tied[self.slice_of(tie.parameter)] = True
        return tied

    def slice_of(self, name: str) -> slice:
        """Where a named parameter is in the flat vector."""
        sizes = [math.prod(shape) for shape in self.shapes]
        position = self.names.index(name)
        start = sum(sizes[:position])
        return slice(start, start + sizes[position])

    def unflatten(self, params: Float[Array, " n"]) -> tuple[Array, ...]:
        """One array for each named parameter, in the shape that the model expects.

        Tied ones are computed from the others, whatever `params` has in their place, so that
        derivatives by the others go through the ties.
        """
        values = {
            name: params[self.slice_of(name)].reshape(shape)
            for name, shape in zip(self.names, self.shapes, strict=True)
        }
        for tie in self.ties:
            shape = values[tie.parameter].shape
            values[tie.parameter] = jnp.broadcast_to(jnp.asarray(tie(values)), shape)
        return tuple(values.values())

    def beside(self, params: Float[np.ndarray, " n"], seed: int) -> Float[np.ndarray, " n"]:
        """A point a tenth away in every parameter, within the bounds."""
        rng = np.random.default_rng([seed, 2])
        size = 0.1 * np.where(params != 0, np.abs(params), 1.0)
        moved = params + size * rng.uniform(0.5, 1.0, len(params))
        moved = np.where(moved < self.upper, moved, 0.5 * (params + self.upper))
        return np.where(self.is_free, np.maximum(moved, self.lower), params)

    def expand(self, free: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
        """All parameters, given the free ones; fixed ones stay at `p0`, tied ones follow."""
        params = self.p0.copy()
        params[self.is_free] = free
        if not self.ties:
            return params
        with jax.enable_x64(True):
            return np.asarray(self.complete(params), np.float64)

    def complete(self, params: Float[Array, " n"]) -> Float[Array, " n"]:
        """The flat vector with tied elements computed from the others."""
        return jnp.concatenate([jnp.ravel(part) for part in self.unflatten(params)])

    def embed(self, columns: Float[np.ndarray, "k j"]) -> Float[np.ndarray, "n j"]:
        """Directions among the free parameters, as directions among all of them.

        Tied rows are zero: ties are part of what is differentiated.
        """
        directions = np.zeros((self.size, columns.shape[1]))
        directions[self.is_free] = columns
        return directions

    def tangents(
        self, free: Float[np.ndarray, " k"], columns: Float[np.ndarray, "k j"]
    ) -> Float[np.ndarray, "n j"]:
        """How all parameters move along directions among the free ones, ties included."""
        directions = self.embed(columns)
        if not self.ties:
            return directions
        with jax.enable_x64(True):
            _, push = jax.linearize(self.complete, jnp.asarray(self.expand(free)))
            return np.asarray(jax.vmap(push, in_axes=1, out_axes=1)(directions))

    def check_ties(self) -> None:
        """Trace the ties, without data.

        Raises
        ------
        TypeError
            If JAX cannot.
        ModelError
            If they differ from one trace to the next.
        """
        with jax.enable_x64(True):
            # By its instance alone JAX would know the method again, and not trace it.
            first, second = (
                trace_of(jax.make_jaxpr(lambda params: self.complete(params))(self.p0))
                for _ in range(2)
            )
        if first != second:
            raise ModelError(
                "`ties` must be pure functions: two traces of them differ, so one has state or "
                "draws random numbers outside of JAX"
            )

    def linearise(self, free: Float[np.ndarray, " k"]) -> Linearisation:
        """`tangents` at one point, and its transpose, to be used many times."""
        if not self.ties:
            return Linearisation(
                push=lambda vectors: self.embed(vectors.T).T,
                pull=lambda covectors: covectors[:, self.is_free],
            )
        push, pull = _derivatives_of_ties(self)
        point = self.expand(free)

        def pushed(vectors: Float[np.ndarray, "v k"]) -> Float[np.ndarray, "v n"]:
            with jax.enable_x64(True):
                return np.asarray(push(point, self.embed(vectors.T).T))

        def pulled(covectors: Float[np.ndarray, "v n"]) -> Float[np.ndarray, "v k"]:
            with jax.enable_x64(True):
                return np.asarray(pull(point, covectors))[:, self.is_free]

        return Linearisation(push=pushed, pull=pulled)


@functools.lru_cache(maxsize=8)
def _derivatives_of_ties(space: ParameterSpace) -> tuple[Callable[..., Array], ...]:
    """Products with the derivative of ``complete`` and its transpose, jitted."""

    def push(params: Array, vectors: Array) -> Array:
        _, along = jax.linearize(space.complete, params)
        return jnp.asarray(jax.vmap(along)(vectors))

    def pull(params: Array, covectors: Array) -> Array:
        _, back = jax.vjp(space.complete, params)
        return jnp.asarray(jax.vmap(back)(covectors)[0])

    return jax.jit(push), jax.jit(pull)


@dataclass(frozen=True, kw_only=True, eq=False)
class Linearisation:
    """How all parameters follow the free ones near a point."""

    push: Callable[[Float[np.ndarray, "v k"]], Float[np.ndarray, "v n"]]  # directions
    pull: Callable[[Float[np.ndarray, "v n"]], Float[np.ndarray, "v k"]]  # gradients


@np.errstate(over="ignore")  # bounds may be further apart than the largest number
def strictly_inside(params: Vector, lower: Vector, upper: Vector) -> Vector:
    """Move points that lie on a bound just off it: every iterate is strictly feasible."""
    room = np.where(np.isfinite(lower) & np.isfinite(upper), upper - lower, np.inf)
    low, high = (
        np.minimum(1e-10 * np.maximum(1.0, np.abs(side)), 0.5 * room)
        for side in (np.nan_to_num(lower), np.nan_to_num(upper))
    )
    return np.clip(params, lower + low, upper - high)
