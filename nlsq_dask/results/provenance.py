"""What a fit was of, in words: model, data, options, versions and times, kept with its result."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import platform
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from nlsq_dask._typing import ModelFunction, Shape
from nlsq_dask._version import __version__
from nlsq_dask.model import Model
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.problem import Problem
from nlsq_dask.results.units import infer_units
from nlsq_dask.sources.origin import DataRecord

__all__ = ["Provenance", "package_versions", "source_text", "trace_provenance"]

_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "dask", "distributed", "xarray", "zarr", "h5py")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Text and numbers alone: what a reader needs to know, and to give the model its data again.

    Attributes
    ----------
    model : str
        Its qualified name.
    model_source : str
        Its text, where Python can find it.
    stack_axis : int or None
        The axis of the variables, where the model takes them as one array.
    data : DataRecord
        Where the rows came from, and the names and units of their variables.
    units : dict
        Of each parameter, by name, as far as they follow from those of the data.
    ties : dict
        By parameter, the text of the function that gives it.
    priors : dict
        By element of `popt`, mean and width.
    nan_policy : str
        What was to be done with rows that are not finite.
    started, ended : str
        UTC, by ISO 8601.
    """

    model: str = ""
    model_source: str = ""
    stack_axis: int | None = None
    data: DataRecord = field(default_factory=DataRecord)
    units: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    priors: dict[str, tuple[float, float]] = field(default_factory=dict)
    nan_policy: str = ""
    started: str = ""
    ended: str = ""


def trace_provenance(
    problem: Problem, data: DataRecord, *, nan_policy: str, started: datetime
) -> Provenance:
    """What is known at the end of a fit that began at `started`."""
    model, space = problem.model, problem.space
    return Provenance(
        model=_qualified_name(model.function),
        model_source=source_text(model.function),
        stack_axis=model.stack_axis,
        data=data,
        units=_units(model, space, data),
        ties={tie.parameter: source_text(tie.function) for tie in space.ties},
        priors=_priors(problem),
        nan_policy=nan_policy,
        started=started.isoformat(timespec="seconds"),
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def source_text(function: ModelFunction) -> str:
    """The text that defines a function, or its type; empty where Python cannot find it."""
    with contextlib.suppress(OSError, TypeError):
        return textwrap.dedent(inspect.getsource(_defined(function))).rstrip()
    return ""


@functools.cache
def package_versions() -> Mapping[str, str]:
    """Of this package, of Python, and of what computes and reads."""
    others = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"nlsq_dask": __version__, "python": platform.python_version(), **others}


def _qualified_name(function: ModelFunction) -> str:
    named = _defined(function)
    return f"{named.__module__}.{named.__qualname__}"


def _defined(function: Any) -> Any:
    """What has a definition: the function itself, or the class of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function)


def _units(model: Model, space: ParameterSpace, data: DataRecord) -> dict[str, str]:
    known = [data.y.units, *(variable.units for variable in data.x)]
    shapes: tuple[Shape, ...] = space.shapes
    return infer_units(model, shapes, known[0], known[1:]) if any(known) else {}


def _priors(problem: Problem) -> dict[str, tuple[float, float]]:
    penalties, labels = problem.penalties, np.array(problem.space.labels)
    rows = (labels[penalties.prior_index], penalties.prior_mean, penalties.prior_width)
    return {str(name): (float(mean), float(width)) for name, mean, width in zip(*rows, strict=True)}
