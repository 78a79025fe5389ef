"""A problem from what the user gave, checked before any work is submitted."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import numpy as np

from nlsq_dask._typing import Shape
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.criterion import Criterion, build_penalties
from nlsq_dask.fingerprint import fingerprint_model
from nlsq_dask.kernels.width import elements_per_row
from nlsq_dask.model import check_traceable
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.plan import choose_strategy, plan_chunks, plan_leaves
from nlsq_dask.problem import Problem
from nlsq_dask.resolve import ModelledRows
from nlsq_dask.sources.base import Source
from nlsq_dask.sources.grid import GridSource

__all__ = ["build_problem"]

_MAX_CLUSTER_SUMS = 2**22


def build_problem(
    rows: ModelledRows,
    space: ParameterSpace,
    criterion: Criterion,
    config: HybridStreamingConfig,
    platform: Callable[[], str] = jax.default_backend,
) -> Problem:
    """What is asked, checked; and last, because workers have to be asked, planned."""
    source, model = rows.source, rows.model
    if not isinstance(source, GridSource):
        _require_chunks(source)
    y_shape, x_shapes = _trial_shapes(source, max([0, *itertools.chain(*space.shapes)]))
    params = space.unflatten(space.p0)
    check_traceable(model, x_shapes, params, y_shape)
    space.check_ties()
    fingerprint = fingerprint_model(
        model,
        space,
        # As the chunks are, and as the sample is.
        list(dict.fromkeys((tuple(x_shapes), tuple(y_shape[:1] for _ in x_shapes)))),
        [np.float64] if config.precision == "float64" else [np.float64, np.float32],
    )
    is_matrix_free = space.num_free >= config.cg_param_threshold
    _require_matrix(criterion, is_matrix_free, config)
    if config.enable_residual_weighting and not model.variables:
        raise ValueError(
            "`residual_weights` must go with a model of at least one variable, whose integers are "
            f"the groups, got {model.name} without one"
        )
    _require_few_clusters(rows.num_clusters, space.num_free)
    penalties = build_penalties(criterion, space, config)
    strategy = choose_strategy(
        space.num_free,
        elements_per_row(model, x_shapes, params) if is_matrix_free else None,
        num_shards=len(jax.local_devices()) if config.enable_multi_device else 1,
        platform=platform(),
    )
    if isinstance(source, GridSource):
        plan, source = plan_leaves(source, strategy, config.chunk_size)
    else:
        plan = plan_chunks(source, strategy)
    return Problem(
        model=model,
        space=space,
        source=source,
        plan=plan,
        absolute_sigma=criterion.absolute_sigma,
        loss=criterion.loss,
        f_scale=criterion.known_scale,
        group_weights=config.residual_weights if config.enable_residual_weighting else None,
        penalties=penalties,
        covariance=criterion.covariance_kind,
        num_clusters=rows.num_clusters,
        fingerprint=fingerprint,
        description=rows.origin.record.description,
    )


def _require_matrix(
    criterion: Criterion, is_matrix_free: bool, config: HybridStreamingConfig
) -> None:
    if is_matrix_free and (criterion.is_clustered or criterion.covariance != "auto"):
        raise ValueError(
            "`covariance` and `cluster` must be left out where no covariance is formed, from "
            f"`cg_param_threshold` = {config.cg_param_threshold} free parameters on, got "
            f"covariance={criterion.covariance!r}"
        )


def _require_few_clusters(num_clusters: int, num_free: int) -> None:
    """Each task returns a row of `num_free` sums for each cluster."""
    if num_clusters * num_free > _MAX_CLUSTER_SUMS:
        raise ValueError(
            f"`cluster` must have at most {_MAX_CLUSTER_SUMS // num_free:,} labels for {num_free} "
            f"free parameters, got {num_clusters:,}"
        )


def _require_chunks(source: Source) -> None:
    if source.num_chunks < 1:
        raise ValueError(f"`ds` must have at least one chunk, got {source.num_chunks}")


def _trial_shapes(source: Source, longest: int) -> tuple[Shape, list[Shape]]:
    """Shapes with the source's pattern of broadcasting, to trace the model with.

    Every length is larger than any of a parameter, so that neither passes for the other.
    """
    first = longest + 101  # and unlike the lengths of a model's own constants
    if not isinstance(source, GridSource):
        return (first,), [(first,) for _ in source.variables]
    lengths = dict(zip(source.dims, itertools.count(first), strict=False))
    shapes = [
        tuple(lengths[dim] if dim in column.dims else 1 for dim in source.dims)
        for column in source.x
    ]
    return tuple(lengths.values()), shapes
