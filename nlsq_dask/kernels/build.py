"""The jitted kernels of one problem."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from nlsq_dask._typing import Array, Bool, Float, Shape, abstract
from nlsq_dask.config import Precision
from nlsq_dask.kernels.counts import count_rows, counted_rows, num_lanes
from nlsq_dask.kernels.handed import HandedSums
from nlsq_dask.kernels.products import ProductRows, Way, products_for
from nlsq_dask.kernels.rows import linearise, residual_function, row_costs
from nlsq_dask.kernels.tiles import Tile, fold_tiles, rows_shape, sum_tiles, whole_tile
from nlsq_dask.losses import LOSSES, robust_terms
from nlsq_dask.model import Model
from nlsq_dask.normal_equations import RowSummary, ScoreSums
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.recent import Recent
from nlsq_dask.sources.base import Chunk
from nlsq_dask.terms import RowTerms

__all__ = [
    "MAX_KERNELS",
    "KernelSpec",
    "Kernels",
    "LatestSpec",
    "SampleRows",
    "build_kernels",
    "share",
]


_Kernels = TypeVar("_Kernels")

MAX_KERNELS = 32
_RECENT = Recent(MAX_KERNELS)


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelSpec:
    """What kernels are built from. All else is their arguments."""

    model: Model
    space: ParameterSpace
    loss: str
    tile_shape: Shape
    products: Way
    fingerprint: str | None = None  # of model and space; None where there is none to share by

    @property
    def key(self) -> Hashable:
        """All that decides the computation: starts, bounds and fixed parameters do not."""
        return self.fingerprint, self.loss, self.tile_shape, self.products


class SampleRows(NamedTuple):
    """Rows of the least-squares problem that Gauss-Newton solves, of a small chunk.

    The residual and its cost are there where the loss makes them differ from the target.
    """

    jac: Float[Array, "k rows"]
    target: Float[Array, " rows"]
    is_row: Bool[Array, " rows"]  # weight above zero; the others are zeros
    robust: tuple[Float[Array, " rows"], Float[Array, " rows"]] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernels:
    """What is computed on a chunk. Each is compiled once per process and shapes of arguments.

    Call them with 64-bit types enabled and parameters as float64 arrays.
    """

    normal_equations: Callable[..., HandedSums]
    costs: Callable[..., Float[Array, " rivals"]]
    summary: Callable[..., RowSummary]
    scores: Callable[..., ScoreSums]
    curvature: Callable[..., Float[Array, "k k"]]
    linearisation: Callable[..., SampleRows]
    residuals: Callable[..., tuple[Float[Array, ...], Bool[Array, ...]]]
    compiled: set[Hashable] = field(default_factory=set)  # which kernels, for which shapes
    compiling: threading.Lock = field(default_factory=threading.Lock)
    temporary_bytes: dict[Hashable, int] = field(default_factory=dict)  # by shapes


def build_kernels(spec: KernelSpec) -> Kernels:
    """The jitted kernels of a problem; those of an equal one before it, where there was one."""
    return share(_RECENT, spec, _build)


def _build(latest: LatestSpec) -> Kernels:
    return Kernels(
        normal_equations=latest.jit(_normal_equations, "precision"),
        costs=latest.jit(_costs),
        summary=latest.jit(_summary),
        scores=latest.jit(_scores, "num_clusters"),
        curvature=latest.jit(_curvature),
        linearisation=latest.jit(_linearisation),
        residuals=latest.jit(_residuals),
    )


class LatestSpec:
    """The spec last asked for: what kernels are traced with for shapes yet to come.

    The spec that they were built for will not do: its model may close over what has been changed
    since, and would then no longer have the fingerprint by which it was found.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec

    def jit(self, kernel: Callable[..., Any], *static: str) -> Callable[..., Any]:
        """Jit ``kernel(spec, …)`` as a function of the rest."""

        def traced(*arguments: Any, **options: Any) -> Any:
            return kernel(self.spec, *arguments, **options)

        traced.__name__ = kernel.__name__.lstrip("_")
        return jax.jit(traced, static_argnames=static)


def share(recent: Recent, spec: KernelSpec, build: Callable[[LatestSpec], _Kernels]) -> _Kernels:
    """Kernels of this spec, found among the recent ones by what they compute."""
    if spec.fingerprint is None:
        return build(LatestSpec(spec))

    def build_pair() -> tuple[LatestSpec, _Kernels]:
        latest = LatestSpec(spec)
        return latest, build(latest)

    latest, kernels = recent.get(spec.key, build_pair)
    latest.spec = spec
    return kernels


def _normal_equations(
    spec: KernelSpec,
    params: Float[Array, " n"],
    directions: Float[Array, "n k"],
    terms: RowTerms,
    chunk: Chunk,
    precision: Precision,
) -> HandedSums:
    products = products_for(spec.products, precision)
    counted = counted_rows(chunk, terms)
    jac_dtype = jnp.float64 if precision == "float64" else jnp.float32
    dtype = jnp.float32 if precision == "float32" else jnp.float64
    # Of a linear loss the target is the residual, and all can be told from its products.
    num_summed = 0 if spec.loss == "linear" else 3

    def add(carry: Any, tile: Tile) -> Any:
        rows = linearise(
            spec.model, spec.space, spec.loss, tile, params, directions, terms, precision
        )
        summed = (rows.residual, rows.residual**2, rows.cost)[:num_summed]
        columns = ProductRows(
            jac=rows.jac.astype(jac_dtype),
            target=rows.target.astype(dtype),
            summed=tuple(column.astype(dtype) for column in summed),
        )
        return products.add(carry, columns, count_rows(tile))

    k, num_rows = directions.shape[1], math.prod(spec.tile_shape)
    column = abstract((num_rows,), dtype)
    like = ProductRows(
        jac=abstract((k, num_rows), jac_dtype), target=column, summed=(column,) * num_summed
    )
    counts = abstract((len(counted), num_lanes(num_rows)))
    sums = fold_tiles(chunk, spec.tile_shape, terms, products.start(like, counts), add)
    return HandedSums(
        sums=products.finish(sums),
        extent=jnp.asarray(rows_shape(chunk) if chunk.extent is None else chunk.extent),
        products=products,
        num_directions=k,
        num_summed=1 + num_summed,
        counted=counted,
    )


def _costs(
    spec: KernelSpec, rivals: Float[Array, "rivals n"], terms: RowTerms, chunk: Chunk
) -> Float[Array, " rivals"]:
    def reduce(tile: Tile) -> Float[Array, " rivals"]:
        residual = residual_function(spec.model, spec.space, tile)
        return jax.vmap(lambda params: jnp.sum(row_costs(spec.loss, residual(params), terms)))(
            rivals
        )

    return sum_tiles(chunk, spec.tile_shape, terms, reduce)


def _summary(
    spec: KernelSpec, center: Float[Array, ""], terms: RowTerms, chunk: Chunk
) -> RowSummary:
    def reduce(tile: Tile) -> RowSummary:
        weight = tile.scale**2
        deviation = jnp.where(tile.is_row, tile.y - center, 0.0)
        return RowSummary(
            weight=jnp.sum(weight),
            first=jnp.sum(weight * deviation),
            second=jnp.sum(weight * deviation**2),
        )

    return sum_tiles(chunk, spec.tile_shape, terms, reduce)


def _scores(
    spec: KernelSpec,
    params: Float[Array, " n"],
    directions: Float[Array, "n k"],
    terms: RowTerms,
    chunk: Chunk,
    num_clusters: int,
) -> ScoreSums:
    """Products of the scores ``ρ' r J`` and the Hessian without its clamp: a sandwich's parts."""

    def reduce(tile: Tile) -> ScoreSums:
        rows = linearise(spec.model, spec.space, "linear", tile, params, directions, terms)
        robust = robust_terms(LOSSES[spec.loss], rows.residual, terms.f_scale)
        score = rows.jac * robust.score
        clusters = None
        if num_clusters:
            assert tile.cluster is not None
            code = jnp.broadcast_to(tile.cluster, tile.y.shape).ravel()
            clusters = jax.ops.segment_sum(score.T, code, num_segments=num_clusters)
        return ScoreSums(
            meat=score @ score.T,
            bread=rows.jac @ (rows.jac * robust.curvature).T,
            clusters=clusters,
        )

    return sum_tiles(chunk, spec.tile_shape, terms, reduce)


def _curvature(
    spec: KernelSpec,
    params: Float[Array, " n"],
    directions: Float[Array, "n k"],
    terms: RowTerms,
    chunk: Chunk,
) -> Float[Array, "k k"]:
    """What Gauss-Newton leaves out of the Hessian of the cost, along directions.

    That is ``Σ ρ' r ∇²r``, and where a loss is concave the curvature that was clamped.
    """

    def reduce(tile: Tile) -> Float[Array, "k k"]:
        residual = residual_function(spec.model, spec.space, tile)
        held = residual(params)
        score: Array = held
        clamped_away: Array = jnp.zeros(())
        if spec.loss != "linear":
            robust = robust_terms(LOSSES[spec.loss], held, terms.f_scale)
            score, clamped_away = robust.score, robust.curvature - robust.clamped

        def projected(step: Float[Array, " k"]) -> Float[Array, ""]:
            moved = residual(params + directions @ step)
            return jnp.sum(score * moved + 0.5 * clamped_away * (moved - held) ** 2)

        hessian: Float[Array, "k k"] = jax.jacfwd(jax.jacfwd(projected))(
            jnp.zeros(directions.shape[1])
        )
        return hessian

    return sum_tiles(chunk, spec.tile_shape, terms, reduce)


def _linearisation(
    spec: KernelSpec,
    params: Float[Array, " n"],
    directions: Float[Array, "n k"],
    terms: RowTerms,
    chunk: Chunk,
) -> SampleRows:
    """The Jacobian of a small chunk and what it is multiplied by, scaled as the loss asks.

    Without the products, which take most of the time to compile.
    """
    tile = whole_tile(chunk, terms)
    rows = linearise(spec.model, spec.space, spec.loss, tile, params, directions, terms)
    robust = None if spec.loss == "linear" else (rows.residual, rows.cost)
    return SampleRows(rows.jac, rows.target, tile.is_row.ravel(), robust)


def _residuals(
    spec: KernelSpec, params: Float[Array, " n"], terms: RowTerms, chunk: Chunk
) -> tuple[Float[Array, ...], Bool[Array, ...]]:
    """Residuals of a small chunk, and which of them count."""
    tile = whole_tile(chunk, terms)
    return residual_function(spec.model, spec.space, tile)(params), tile.is_row
