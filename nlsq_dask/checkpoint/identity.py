"""What a fit is of: what has to be the same for a checkpoint to be its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import jax
import numpy as np

from nlsq_dask.checkpoint.flat import Leaf
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import CheckpointError
from nlsq_dask.problem import Problem
from nlsq_dask.sample import Sample
from nlsq_dask.sources.grid import GridSource

__all__ = ["identify", "require_same", "require_same_sample", "sample_digest"]

# Where, how fast and for how long: the same bits under any of these.
_FREE_TO_CHANGE = (
    "gauss_newton_max_iterations",
    "max_passes",
    "max_seconds",
    "cache_bytes",
    "prefetch",
    "validate_numerics",  # only names the chunks
    "enable_checkpoints",
    "checkpoint_frequency",
    "checkpoint_dir",
    "resume_from_checkpoint",
    "enable_fault_tolerance",
    "max_retries_per_batch",
    "callback_frequency",
    "log_frequency",
    "verbose",
)
_ARE = {
    "parameters.names": "the parameters",
    "parameters.shapes": "the shapes of the parameters",
    "parameters.ties": "the ties",
    "fit.loss": "`loss`",
    "fit.f_scale": "`f_scale`",
    "fit.absolute_sigma": "`absolute_sigma`",
    "fit.covariance": "the kind of covariance",
    "fit.num_clusters": "the number of clusters",
    "fit.nan_policy": "`nan_policy`",
    "data.kind": "the kind of source",
    "data.variables": "the variables",
    "data.columns": "the dimensions, shapes or types of the columns",
    "data.num_rows": "the number of rows",
    "data.num_chunks": "the number of chunks",
    "data.leaf_shape": "the shape of the chunks",
    "data.tile_shape": "the shape of the kernels' tiles",
    "data.strategy": "how kernels go over the rows",
    "jax.version": "the version of JAX",
}
_VECTORS = {
    "parameters.p0": "`p0`",
    "parameters.is_free": "which parameters are fixed: whether free",
    "parameters.lower": "the lower bound",
    "parameters.upper": "the upper bound",
}
_PRIORS = ("priors.index", "priors.mean", "priors.width")


def identify(problem: Problem, config: HybridStreamingConfig, nan_policy: str) -> dict[str, Leaf]:
    """Everything that decides the bits of a fit, as far as it is known without the data.

    Raises
    ------
    CheckpointError
        If the model cannot be told from others.
    """
    if problem.fingerprint is None:
        raise CheckpointError(
            f"A checkpoint must be of a model that can be told from others, and "
            f"{problem.model.name} calls back to Python or holds what is not numbers; fit it "
            "without `checkpoint`, `checkpoint_dir` and `resume_from_checkpoint`"
        )
    space, penalties = problem.space, problem.penalties
    f_scale = "estimated" if problem.f_scale is None else repr(problem.f_scale)
    identity: dict[str, Leaf] = {
        "model.fingerprint": problem.fingerprint,
        "jax.version": jax.__version__,
        "parameters.names": _text(space.names),
        "parameters.shapes": _text(space.shapes),
        "parameters.ties": _text({tie.parameter: tie.arguments for tie in space.ties}),
        "parameters.p0": space.p0,
        "parameters.is_free": space.is_free,
        "parameters.lower": space.lower,
        "parameters.upper": space.upper,
        "fit.loss": problem.loss,
        "fit.f_scale": f_scale,
        "fit.absolute_sigma": str(problem.absolute_sigma),
        "fit.covariance": problem.covariance,
        "fit.num_clusters": str(problem.num_clusters),
        "fit.nan_policy": nan_policy,
        "priors.index": np.asarray(penalties.prior_index, np.int64),
        "priors.mean": penalties.prior_mean,
        "priors.width": penalties.prior_width,
    }
    return identity | _describe_data(problem) | _describe_config(config)


def _text(value: Any) -> str:
    return json.dumps(value, default=int)  # NumPy's integers


def _describe_data(problem: Problem) -> dict[str, Leaf]:
    source, plan = problem.source, problem.plan
    columns = {}
    if isinstance(source, GridSource):
        columns = {
            role: [column.dims, column.shape, str(column.dtype)]
            for role, column in source.columns.items()
        }
    return {
        "data.kind": type(source).__name__,
        "data.variables": _text(source.variables),
        "data.columns": _text(columns),
        "data.num_rows": str(source.num_rows),
        "data.num_chunks": str(source.num_chunks),
        "data.leaf_shape": _text(plan.leaf_shape),
        "data.tile_shape": _text(plan.tile_shape),
        "data.strategy": _text(asdict(plan.strategy)),
    }


def _describe_config(config: HybridStreamingConfig) -> dict[str, Leaf]:
    options = config.as_dict()
    return {
        f"config.{field.name}": _text(options[field.name])
        for field in fields(config)
        if field.name not in _FREE_TO_CHANGE
    }


def require_same(
    saved: Mapping[str, Leaf], current: Mapping[str, Leaf], labels: Sequence[str]
) -> None:
    """Refuse a checkpoint of another fit.

    Raises
    ------
    CheckpointError
        Naming what differs.
    """
    for key, meaning in _ARE.items():
        if key.partition(".")[0] in ("parameters", "fit"):
            _require_equal_text(meaning, saved.get(key), current[key])
    for key, meaning in _VECTORS.items():
        _require_equal_vector(meaning, saved.get(key), current[key], labels)
    if any(not np.array_equal(saved.get(key, ""), current[key]) for key in _PRIORS):
        raise CheckpointError("`priors`: others in the checkpoint")
    for key, text in current.items():
        kind, _, name = key.partition(".")
        if kind == "config":
            _require_equal_text(f"`{name}` of the configuration", saved.get(key), text)
    for key, meaning in _ARE.items():
        if key.startswith("data"):
            _require_equal_text(meaning, saved.get(key), current[key])
    if saved.get("model.fingerprint") != current["model.fingerprint"]:
        _require_equal_text(_ARE["jax.version"], saved.get("jax.version"), current["jax.version"])
        raise CheckpointError(
            "the model computes something else than the checkpoint's: its formula, a number that "
            "it closes over, its derivative or a tie has changed"
        )


def _require_equal_text(what: str, saved: object, current: Leaf) -> None:
    if saved is None:
        raise CheckpointError(f"it does not say {what}")
    if saved != current:
        raise CheckpointError(f"{what}: {saved} in the checkpoint, {current} now")


def _require_equal_vector(what: str, saved: Any, current: Any, labels: Sequence[str]) -> None:
    if not isinstance(saved, np.ndarray) or saved.shape != current.shape:
        raise CheckpointError(f"it does not say {what} for each of {len(labels)} parameters")
    for label, before, now in zip(labels, saved.tolist(), current.tolist(), strict=True):
        if before != now:
            raise CheckpointError(f"{what} of {label!r}: {before!r} in the checkpoint, {now!r} now")


def sample_digest(sample: Sample) -> str:
    """Of the rows drawn, bit by bit and in order, and of how many were left out."""
    everything = (slice(None),)
    digest = hashlib.sha256(
        repr((sample.num_invalid, sample.valid_share, sample.is_everything)).encode()
    )
    for role, column in sample.source.columns.items():
        values = np.ascontiguousarray(column.read(everything))
        digest.update(repr((role, values.dtype.str, values.shape)).encode())
        digest.update(values.data)
    return digest.hexdigest()


def require_same_sample(saved: Mapping[str, Leaf], current: str) -> None:
    """Refuse a checkpoint of other data that have the same shapes.

    Raises
    ------
    CheckpointError
    """
    if saved.get("data.sample") != current:
        raise CheckpointError(
            "the data have changed: the same rows, drawn again, have other values than in the "
            "checkpoint"
        )
