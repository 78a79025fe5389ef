"""Parameters by name: shapes, starts, bounds, and which of them are free."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from nlsq_dask._typing import Array, Bool, Float, Shape, Vector
from nlsq_dask.errors import LengthError, ModelError
from nlsq_dask.parameters.labels import labels_of
from nlsq_dask.parameters.ties import Tie, order_ties
from nlsq_dask.require import array_of, real_array, shown
from nlsq_dask.traces import trace_of

if TYPE_CHECKING:
    from scipy.optimize import Bounds

__all__ = [
    "BoundsLike",
    "ParameterSpace",
    "StartsLike",
    "build_parameter_space",
    "claimed_names",
    "count_parameters",
    "held_names",
    "is_pair",
    "strictly_inside",
]

StartsLike: TypeAlias = Mapping[str, Any] | Sequence[Any] | Vector | None
BoundsLike: TypeAlias = "Mapping[str, Any] | Sequence[Any] | Bounds | None"


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


def build_parameter_space(
    names: Sequence[str],
    defaults: Mapping[str, Any],
    p0: StartsLike = None,
    bounds: BoundsLike = None,
    fixed: Iterable[str] = (),
    ties: Mapping[str, Callable[..., Any]] | None = None,
    start_within: Callable[[Vector, Vector], Vector] | None = None,
) -> ParameterSpace:
    """Resolve starts and bounds, given in SciPy's forms or by name, into one flat space.

    Parameters
    ----------
    names : sequence of str
        The model's parameters, in its order.
    defaults : mapping
        Starts from the model's own keyword defaults.
    p0 : mapping or sequence, optional
        Starts by name (the rest default), or one for each parameter in order. An array is a
        parameter with as many elements.
    bounds : mapping, ``(lower, upper)`` or `scipy.optimize.Bounds`, optional
        By name ``(lower, upper)``, each scalar or of the parameter's shape, None for none; or
        SciPy's two sequences over the flat vector.
    fixed : iterable of str
        Parameters held at their start.
    ties : mapping, optional
        Parameters that are functions of others: see `nlsq_dask.parameters.ties`.
    start_within : callable, optional
        ``(lower, upper) -> start`` for parameters given nowhere; 1 clipped into the bounds
        by default.

    Raises
    ------
    ValueError
        If a name is unknown, a value is not finite, shapes disagree, bounds are not ordered,
        or a start is outside its bounds.
    """
    if not names:
        raise ValueError("`model` must have at least one parameter besides its variables")
    held = held_names(fixed)
    p0 = by_name(p0)
    taken = {"p0": p0, "bounds": bounds}
    named = {key: value for key, value in taken.items() if isinstance(value, Mapping)}
    ordered = order_ties(ties, names, {**named, "fixed": held})
    starts, given = _resolve_starts(names, defaults, p0)
    starts = _follow(names, starts, ordered)
    shapes = tuple(start.shape for start in starts)
    flat = np.concatenate([start.ravel() for start in starts])
    is_given = np.concatenate(
        [np.full(start.size, known) for start, known in zip(starts, given, strict=True)]
    )
    lower, upper = _resolve_bounds(names, shapes, bounds)
    chosen = np.clip(1.0, lower, upper) if start_within is None else start_within(lower, upper)
    flat = np.where(is_given, flat, chosen)
    is_fixed = _resolve_fixed(names, shapes, held)
    is_fixed |= _resolve_fixed(names, shapes, tuple(tie.parameter for tie in ordered))
    outside = ((flat < lower) | (flat > upper)) & ~is_fixed
    space = ParameterSpace(
        names=tuple(names),
        shapes=shapes,
        p0=np.where(is_fixed, flat, strictly_inside(flat, lower, upper)),
        lower=lower,
        upper=upper,
        is_free=~is_fixed,
        ties=ordered,
    )
    if outside.any():
        worst = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"`p0` must lie within `bounds`: {space.labels[worst]} = {float(flat[worst])!r} is "
            f"outside [{float(lower[worst])!r}, {float(upper[worst])!r}]"
        )
    if is_fixed.all():
        raise ValueError(
            f"`fixed` and `ties` must leave a parameter free, got all of {list(names)}"
        )
    return replace(space, p0=space.expand(space.p0[space.is_free])) if ordered else space


def _follow(names: Sequence[str], starts: Sequence[Vector], ties: Sequence[Tie]) -> list[Vector]:
    """Starts, with those of tied parameters computed: they have the shapes that ties give."""
    values: dict[str, Any] = dict(zip(names, starts, strict=True))
    for tie in ties:
        with jax.enable_x64(True):
            value = np.asarray(tie(values))
        values[tie.parameter] = _finite_array(f"ties[{tie.parameter!r}]", value)
    return list(values.values())


def _as_pair(bounds: Any) -> Any:
    """``(lower, upper)`` of SciPy's object, of which there is none before its module is loaded."""
    optimize = sys.modules.get("scipy.optimize")
    is_scipys = optimize is not None and isinstance(bounds, optimize.Bounds)
    return (bounds.lb, bounds.ub) if is_scipys else bounds


def count_parameters(p0: StartsLike, bounds: BoundsLike) -> int | None:
    """How many parameters `p0` or `bounds` speak of, where a signature does not say."""
    if p0 is not None:
        return len(p0) if isinstance(p0, Mapping) else int(np.size(np.asarray(p0)))
    pair = _as_pair(bounds)
    if isinstance(pair, Mapping) or not isinstance(pair, Collection):
        return None
    sizes = [int(np.size(side)) for side in pair if np.ndim(side) > 0]
    return max(sizes) if sizes else None


def claimed_names(p0: StartsLike, bounds: BoundsLike, fixed: Iterable[str] = ()) -> set[Any]:
    """Names that an argument uses for parameters."""
    named = [given for given in (by_name(p0), bounds) if isinstance(given, Mapping)]
    held: Iterable[Any] = held_names(fixed)
    return set().union(*named, (name for name in held if isinstance(name, str)))


def by_name(p0: StartsLike) -> StartsLike:
    """Starts as a mapping where they are a pandas Series with names for an index."""
    pandas = sys.modules.get("pandas")
    if pandas is None or not isinstance(p0, pandas.Series):
        return p0
    is_named = all(isinstance(name, str) for name in p0.index)
    return dict(p0) if is_named else p0


def _resolve_starts(
    names: Sequence[str], defaults: Mapping[str, Any], p0: StartsLike
) -> tuple[list[Vector], list[bool]]:
    if p0 is None:
        values: dict[str, Any] = dict(defaults)
    elif isinstance(p0, Mapping):
        _require_known("p0", p0, names)
        values = {**defaults, **p0}
    else:
        values = dict(zip(names, _sequence_of("p0", p0, len(names), names), strict=True))
    chosen = p0 if isinstance(p0, Mapping) else names if p0 is not None else ()
    starts = [
        _finite_array(
            f"p0[{name!r}]",
            values.get(name, 1.0),
            ", the model's own default; give another" if name not in chosen else "",
        )
        for name in names
    ]
    return starts, [name in values for name in names]


def _sequence_of(argument: str, value: Any, length: int, names: Sequence[str]) -> Sequence[Any]:
    """An ordered collection with as many elements as there are parameters."""
    if not isinstance(value, Sequence) and hasattr(value, "__array__"):
        value = np.atleast_1d(array_of(argument, value))
    elif isinstance(value, int | float):
        value = [value]
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise ValueError(
            f"`{argument}` must be a mapping by name or a sequence over the parameters "
            f"{list(names)}, got {shown(value)}"
        )
    if len(value) != length:
        raise LengthError(
            f"`{argument}` must have one value for each of the {length} parameters "
            f"{list(names)}, got {len(value)} values"
        )
    return list(value)


def _finite_array(argument: str, value: Any, origin: str = "") -> Vector:
    try:
        array = real_array(argument, value)
    except ValueError as error:
        raise ValueError(f"{error}{origin}") from None
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"`{argument}` must be finite and not empty, got {shown(value)}{origin}")
    return array


def _resolve_bounds(
    names: Sequence[str], shapes: Sequence[Shape], bounds: BoundsLike
) -> tuple[Vector, Vector]:
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    if bounds is None:
        return np.full(total, -np.inf), np.full(total, np.inf)
    if isinstance(bounds, Mapping):
        _require_known("bounds", bounds, names)
        pairs = [
            _bounds_of(name, shape, bounds.get(name, (None, None)))
            for name, shape in zip(names, shapes, strict=True)
        ]
        lower, upper = (np.concatenate(side) for side in zip(*pairs, strict=True))
    else:
        pair = _as_pair(bounds)
        if not is_pair(pair):
            raise ValueError(
                f"`bounds` must be (lower, upper), a mapping by name or scipy.optimize.Bounds, "
                f"got {shown(bounds)}"
            )
        lower, upper = (_side(side, total) for side in pair)
    _require_ordered(names, shapes, lower, upper)
    return lower, upper


def is_pair(value: Any) -> bool:
    """Whether a value is two in order."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and len(value) == 2
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == 2


def _side(side: Any, total: int) -> Vector:
    array = real_array("bounds", side)
    if array.ndim > 0 and array.size != total:
        raise LengthError(
            f"`bounds` must be scalars or have {total} elements, one for each parameter, "
            f"got {array.size}"
        )
    return np.broadcast_to(array.ravel() if array.ndim else array, (total,)).copy()


def _bounds_of(name: str, shape: Shape, pair: Any) -> tuple[Vector, Vector]:
    if not is_pair(pair):
        raise ValueError(f"`bounds[{name!r}]` must be (lower, upper), got {shown(pair)}")
    low, high = (
        real_array(f"bounds[{name!r}]", default if value is None else value)
        for value, default in zip(pair, (-np.inf, np.inf), strict=True)
    )
    try:
        return np.broadcast_to(low, shape).ravel(), np.broadcast_to(high, shape).ravel()
    except ValueError:
        raise ValueError(
            f"`bounds[{name!r}]` must be scalars or have the parameter's shape {shape}, "
            f"got shapes {low.shape} and {high.shape}"
        ) from None


def _require_ordered(
    names: Sequence[str], shapes: Sequence[Shape], lower: Vector, upper: Vector
) -> None:
    wrong = np.flatnonzero(~(lower < upper))
    if wrong.size:
        first = int(wrong[0])
        owners = np.repeat(np.array(names), [math.prod(shape) for shape in shapes])
        raise ValueError(
            f"`bounds` must have each lower bound strictly less than its upper bound, got "
            f"({float(lower[first])!r}, {float(upper[first])!r}) for {owners[first]!s}; "
            "to hold a parameter, name it in `fixed`"
        )


def held_names(fixed: Any) -> tuple[str, ...]:
    """The names in `fixed`. An iterator has them once; values of a mapping would say nothing."""
    if isinstance(fixed, str):
        return (fixed,)
    is_point = isinstance(fixed, np.ndarray) and fixed.ndim == 0
    if not isinstance(fixed, Iterable) or isinstance(fixed, Mapping | bytes) or is_point:
        raise TypeError(
            f"`fixed` must be names of parameters, held at their start, got {shown(fixed)}; "
            "say where they start by `p0`"
        )
    return tuple(fixed)


def _resolve_fixed(
    names: Sequence[str], shapes: Sequence[Shape], held: Sequence[str]
) -> Bool[np.ndarray, " n"]:
    _require_known("fixed", held, names)
    return np.concatenate(
        [np.full(math.prod(shape), name in held) for name, shape in zip(names, shapes, strict=True)]
    )


def _require_known(argument: str, given: Iterable[str], names: Sequence[str]) -> None:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(
            f"`{argument}` must name parameters of the model, {list(names)}, got {shown(unknown)}"
        )


@np.errstate(over="ignore")  # bounds may be further apart than the largest number
def strictly_inside(params: Vector, lower: Vector, upper: Vector) -> Vector:
    """Move points that lie on a bound just off it: every iterate is strictly feasible."""
    room = np.where(np.isfinite(lower) & np.isfinite(upper), upper - lower, np.inf)
    low, high = (
        np.minimum(1e-10 * np.maximum(1.0, np.abs(side)), 0.5 * room)
        for side in (np.nan_to_num(lower), np.nan_to_num(upper))
    )
    return np.clip(params, lower + low, upper - high)
