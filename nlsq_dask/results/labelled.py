"""A fit as a dataset with labels, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from nlsq_dask.checkpoint.flat import flatten, read_fields
from nlsq_dask.errors import CheckpointError, ResultFileError
from nlsq_dask.parameters.labels import labels_of
from nlsq_dask.results.outcome import STATISTICS, Outcome
from nlsq_dask.results.plain import from_text, to_text, typed
from nlsq_dask.results.provenance import Provenance
from nlsq_dask.results.stored import Stored
from nlsq_dask.telemetry import IterationRecord

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["ARRAYS", "ATTRIBUTES", "FORMAT", "FORMAT_VERSION", "from_stored", "to_dataset"]

FORMAT = "nlsq_dask result"
FORMAT_VERSION = "1.1"

# Fields of the result that are variables along `param`, and what they are.
_BY_PARAMETER = {
    "popt": "parameters found",
    "p0": "where they started",
    "lower": "lower bounds",
    "upper": "upper bounds",
    "is_free": "whether it was fitted",
    "is_tied": "whether it is a function of others",
    "active": "whether a bound holds it",
}
_RENAMED = {"popt": "params", "pcov": "covariance"}
_SCALARS = (
    "cost penalty_cost num_rows num_masked total_sum_of_squares num_passes bytes_read optimality "
    "distance condition_number rank absolute_sigma f_scale num_clusters"
)
_TEXTS = ("status", "details", "loss", "covariance_kind")
_FIELDS = (*_BY_PARAMETER, "pcov", *_SCALARS.split(" "), *_TEXTS, "history")

# What of a file is needed to have the result again; the rest follows from it.
ATTRIBUTES = ("format", "format_version", "record", *_TEXTS)
_LEAVES = {
    **{_RENAMED.get(name, name): name for name in (*_BY_PARAMETER, "pcov", *_SCALARS.split(" "))},
    **{f"history_{field.name}": f"history.{field.name}" for field in fields(IterationRecord)},
}
ARRAYS = tuple(_LEAVES)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What of a result is no variable of the dataset: one attribute, as JSON."""

    shapes: dict[str, tuple[int, ...]]
    provenance: Provenance
    diagnostics: dict[str, Any]


def to_dataset(fit: Outcome) -> xr.Dataset:
    """What `FitResult.to_dataset` documents."""
    import xarray as xr

    leaves = flatten(fit, only=_FIELDS)
    texts = {name: str(leaves.pop(name)) for name in _TEXTS}
    variables: dict[str, Any] = {}
    for name, leaf in leaves.items():
        stem, _, column = name.partition(".")
        axes = ("trial", "param")[: np.ndim(leaf)] if column else _axes_of(stem)
        text = _BY_PARAMETER.get(stem) or STATISTICS.get(stem)
        attributes = {"long_name": text} if text else {}
        variables[_variable_of(name)] = (axes, leaf, attributes)
    if fit.pcov is not None:
        errors = np.sqrt(np.diag(fit.pcov))
        variables["standard_errors"] = ("param", errors, {"long_name": "standard errors"})
        variables["correlation"] = (("cov_i", "cov_j"), fit.correlation.values)
    for name in (name for name in STATISTICS if name not in leaves):
        variables[name] = ((), getattr(fit, name), {"long_name": STATISTICS[name]})
    return xr.Dataset(variables, _coordinates(fit), {**texts, **_attributes(fit)})


def _axes_of(field: str) -> tuple[str, ...]:
    if field == "pcov":
        return ("cov_i", "cov_j")
    return ("param",) if field in _BY_PARAMETER else ()


def _variable_of(leaf: str) -> str:
    """The variable that a field of the result, or of its history, is in."""
    return _RENAMED.get(leaf, leaf.replace(".", "_"))


def _coordinates(fit: Outcome) -> dict[str, Any]:
    names = list(fit.param_names)
    units = [fit.provenance.units.get(name.partition("[")[0], "") for name in fit.param_names]
    coordinates: dict[str, Any] = {"param": names, "units": ("param", units)}
    return coordinates if fit.pcov is None else {**coordinates, "cov_i": names, "cov_j": names}


def _attributes(fit: Outcome) -> dict[str, Any]:
    """For whoever looks, and the rest of the result for whoever loads it."""
    provenance, said = fit.provenance, fit.diagnostics
    data, config = provenance.data, said.get("config", {})
    record = _Record(shapes=fit.shapes, provenance=provenance, diagnostics=fit.diagnostics)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "title": f"Fit of {provenance.model} to {data.description}",
        "success": str(fit.success).lower(),
        "message": fit.message,
        "model": provenance.model,
        "model_source": provenance.model_source,
        "data": data.description,
        "y": data.y.name,
        "y_units": data.y.units,
        "x": ", ".join(variable.name for variable in data.x),
        "x_units": ", ".join(variable.time_units or variable.units for variable in data.x),
        "sigma": data.sigma,
        "where": data.where,
        "cluster": data.cluster,
        "fixed": ", ".join(np.array(fit.param_names)[~(fit.is_free | fit.is_tied)]),
        "ties": json.dumps(provenance.ties, ensure_ascii=False),
        "priors": json.dumps(provenance.priors, ensure_ascii=False),
        "nan_policy": provenance.nan_policy,
        "started": provenance.started,
        "ended": provenance.ended,
        "seed": int(config.get("seed", 0)),
        "evaluator": str(said.get("evaluator", "")),
        "warnings": "\n".join(said.get("warnings", ())),
        "notes": "\n".join(said.get("notes", ())),
        "plan": json.dumps(said.get("plan", {})),
        "config": json.dumps(config),
        "versions": json.dumps(said.get("versions", {})),
        "record": to_text(record),
    }


# -- back


def from_stored(stored: Stored) -> dict[str, Any]:
    """The fields of the result that `to_dataset` laid out.

    Raises
    ------
    ResultFileError
        If it is of another format, something is missing, or parts do not belong together.
    """
    _require_format(stored.attributes)
    try:
        record = typed(_Record, from_text(stored.attributes["record"]))
        num_params = sum(math.prod(shape) for shape in record.shapes.values())
        found = read_fields(Outcome, _leaves(stored), {"n": num_params}, only=_FIELDS)
        names = labels_of(record.shapes.items())
    except (CheckpointError, KeyError, ValueError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ResultFileError(f"the saved result cannot be used: {text}") from None
    return {**found, **vars(record), "param_names": names}


def _require_format(attributes: Mapping[str, str]) -> None:
    if attributes.get("format") != FORMAT:
        raise ResultFileError("it must be a saved result, and says that it is none")
    version = attributes.get("format_version")
    if version != FORMAT_VERSION:
        raise ResultFileError(
            f"it must have format {FORMAT_VERSION} for this version of the package, got "
            f"{version!r:.100}"
        )


def _leaves(stored: Stored) -> dict[str, Any]:
    """The fields' values, under the names that `flatten` gives them."""
    leaves: dict[str, Any] = {name: stored.attributes[name] for name in _TEXTS}
    return leaves | {_LEAVES[name]: array for name, array in stored.arrays.items()}
