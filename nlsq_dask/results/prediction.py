"""The model at the parameters found, as lazy labelled arrays of Dask blocks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

from nlsq_dask._typing import Float, ModelFunction, Shape
from nlsq_dask.errors import ModelError, SessionError
from nlsq_dask.model import Model, parameter_names, require_jac, unwrap_jit
from nlsq_dask.plan import choose_leaf_shape
from nlsq_dask.results.intervals import width_in_errors
from nlsq_dask.results.outcome import Outcome
from nlsq_dask.results.provenance import source_text
from nlsq_dask.results.rows import Quantity, RowTask, pickled_model, token_of
from nlsq_dask.sources.dask import is_dask_array
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.sources.origin import VariableRecord
from nlsq_dask.warn import warn_user

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["attached_model", "predict", "prediction_band", "require_model", "residuals"]

_Chunks: TypeAlias = dict[str, tuple[int, ...]]  # lengths of the blocks along each dimension

# Longer coordinates are not loaded to look labels up in.
_MAX_INDEX = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class _Place:
    """Where to predict: the model's variables, what was fitted if it is there, and the blocks."""

    ds: xr.Dataset
    variables: tuple[xr.Variable, ...]
    y: xr.Variable | None
    dims: tuple[str, ...]
    chunks: _Chunks

    @property
    def shape(self) -> Shape:
        return tuple(sum(self.chunks[dim]) for dim in self.dims)

    @property
    def coordinates(self) -> xr.Coordinates:
        """Those of the dataset along these dimensions. No index is made that is not there."""
        coords = self.ds.coords.to_dataset()
        kept = [name for name, array in coords.variables.items() if set(array.dims) <= {*self.dims}]
        return coords[kept].coords


def predict(fit: Outcome, ds: Any) -> xr.DataArray:
    """What `FitResult.predict` documents."""
    model = require_model(fit)
    place = _place(fit, ds)
    return _labelled(fit, place, _blocks(fit, model, place, "prediction", ()), "prediction")


def residuals(fit: Outcome, ds: Any) -> xr.DataArray:
    """What `FitResult.residuals` documents."""
    model = require_model(fit)
    place = _place(fit, ds)
    if place.y is None:
        raise ValueError(
            f"`ds` must have {fit.provenance.data.y.name!r}, which was fitted, got "
            f"{sorted(map(str, place.ds.variables))}"
        )
    y = _dask_array(place.y, place.chunks).astype(np.float64)
    value = _blocks(fit, model, place, "prediction", ())
    return _labelled(fit, place, y - value, "residuals")


def prediction_band(fit: Outcome, ds: Any, level: float) -> xr.Dataset:
    """What `FitResult.prediction_band` documents."""
    width = width_in_errors(fit, level)
    pcov, _ = fit.require_covariance("`prediction_band`")
    model = require_model(fit)
    place = _place(fit, ds)
    value = _blocks(fit, model, place, "prediction", ())
    error = _blocks(fit, model, place, "standard_error", _directions(pcov))
    parts = {
        "prediction": value,
        "standard_error": error,
        "lower": value - width * error,
        "upper": value + width * error,
    }
    import xarray as xr

    variables = {name: (place.dims, blocks, _units(fit)) for name, blocks in parts.items()}
    return xr.Dataset(variables, place.coordinates, {"level": level})


def _directions(pcov: Float[np.ndarray, "n n"]) -> tuple[np.ndarray, np.ndarray]:
    """``L`` with ``LᵀL = pcov``, and what the data do not determine, as directions."""
    variances = np.diag(pcov)
    known = np.flatnonzero(np.isfinite(variances) & (variances > 0))
    errors = np.sqrt(variances[known])
    scaled = pcov[np.ix_(known, known)] / np.outer(errors, errors)
    values, vectors = np.linalg.eigh(scaled)
    factor = np.zeros((len(known), len(pcov)))
    factor[:, known] = (np.sqrt(np.maximum(values, 0.0)) * vectors).T * errors
    return factor, np.eye(len(pcov))[~np.isfinite(variances)]


# -- the model


def attached_model(fit: Outcome, function: ModelFunction) -> Model:
    """A function as the model of a result.

    Raises
    ------
    ModelError
        If its arguments are not those that were fitted.
    """
    function = unwrap_jit(function)
    names, has_varargs, _ = parameter_names(function)
    provenance = fit.provenance
    variables = tuple(variable.name for variable in provenance.data.x)
    first = len(variables) if provenance.stack_axis is None else 1
    if not has_varargs and (
        len(names) != first + len(fit.shapes) or names[first:] != (*fit.shapes,)
    ):
        raise ModelError(
            f"`model` must take {first} variable(s) and then the parameters {list(fit.shapes)}, as "
            f"in the fit, got the arguments {list(names)}"
        )
    _compare_sources(provenance.model_source, source_text(function))
    return Model(
        function=function,
        variables=variables,
        parameters=tuple(fit.shapes),
        jac=require_jac(None),
        stack_axis=provenance.stack_axis,
    )


def _compare_sources(fitted: str, given: str) -> None:
    """Two texts may compute the same. Those of lambdas hold what stands around them too."""
    if fitted.startswith("def ") and given.startswith("def ") and fitted != given:
        warn_user(
            "`model` is written otherwise than the function that was fitted, which is in "
            "`result.provenance.model_source`: see that it computes the same"
        )


def require_model(fit: Outcome) -> Model:
    """The model, or an error that says how to attach it."""
    if fit.model is None:
        raise ModelError(
            "predictions need the model, which is neither saved nor pickled: give it to "
            f"`load(path, model=…)` or `with_model(…)`; it was {fit.provenance.model!r}"
        )
    return fit.model


# -- the data


def _place(fit: Outcome, ds: Any) -> _Place:
    """Resolve names, and see that what is there is what the model was fitted to."""
    ds, y = _given(fit, ds)
    records = fit.provenance.data.x
    variables = tuple(_variable(ds, record) for record in records)
    y = y if y is not None else ds.variables.get(fit.provenance.data.y.name)
    needed = [str(dim) for variable in variables for dim in variable.dims]
    if y is not None and not set(needed) <= set(y.dims):
        y = None
    fitted = [dim for dim in fit.provenance.data.dims if dim in needed]
    dims = list(dict.fromkeys([*fitted, *needed] if y is None else map(str, y.dims)))
    return _Place(
        ds=ds,
        variables=variables,
        y=y,
        dims=tuple(dims),
        chunks=_chunks(dims, [*([] if y is None else [y]), *variables]),
    )


def _given(fit: Outcome, ds: Any) -> tuple[xr.Dataset, xr.Variable | None]:
    """The dataset to predict for; and what was fitted, where that is no part of it."""
    import xarray as xr

    from nlsq_dask.sources.stores import open_store

    if ds is None:
        return _fitted_data(fit)
    if isinstance(ds, str | os.PathLike):
        return _with_indexes(open_store(ds)), None
    if isinstance(ds, xr.Dataset):
        return ds, None
    is_array = is_dask_array(ds) or isinstance(ds, np.ndarray | jax.Array)
    if is_array and fit.provenance.data.dims == ("row",):
        return xr.Dataset(_columns(fit, ds)), None
    raise TypeError(
        "`ds` must be an xarray.Dataset or the path or URL of a store; after a fit of arrays also "
        f"an array of `x`; got {type(ds).__name__}"
    )


def _fitted_data(fit: Outcome) -> tuple[xr.Dataset, xr.Variable | None]:
    if fit.session is None:
        raise SessionError(
            "`ds` must be given: this result came from a file or another process, or was fitted "
            "to batches, and does not have its data"
        )
    origin, source = fit.session.origin, fit.session.problem.source
    if origin is not None and origin.ds is not None and origin.y is not None:
        return _with_indexes(origin.ds), origin.y.variable
    if not isinstance(source, GridSource):
        raise TypeError(
            f"`ds` must be given: the fit was of a {type(source).__name__}, whose chunks have no "
            "dimensions; pass a dataset of the variables"
        )
    from nlsq_dask.sources.xarray import dataset_of

    return dataset_of(source), None


def _with_indexes(ds: xr.Dataset) -> xr.Dataset:
    """With labels to select by, which a store that was opened for its rows alone has not."""
    for dim, size in ds.sizes.items():
        if dim in ds.coords and dim not in ds.xindexes and size <= _MAX_INDEX:
            ds = ds.set_xindex([dim])
    return ds


def _columns(fit: Outcome, x: Any) -> dict[str, xr.Variable]:
    """An array of variables in the layout of the fit, one by one."""
    names = [variable.name for variable in fit.provenance.data.x]
    axis, array = fit.provenance.stack_axis, x if is_dask_array(x) else np.asarray(x)
    expected = (
        "(m,)" if axis is None else f"({len(names)}, m)" if axis == 0 else f"(m, {len(names)})"
    )
    fits = array.ndim == 1 if axis is None else array.ndim == 2 and array.shape[axis] == len(names)
    if not fits:
        raise ValueError(
            f"`ds` must be `x` of shape {expected}, as in the fit, got shape {tuple(array.shape)}"
        )
    import xarray as xr

    parts = [array] if axis is None else list(array if axis == 0 else array.T)
    return {name: xr.Variable(("row",), part) for name, part in zip(names, parts, strict=True)}


def _variable(ds: xr.Dataset, record: VariableRecord) -> xr.Variable:
    """A variable of the model, of the kind that it was of in the fit."""
    from nlsq_dask.sources.xarray import dimension_or_variable, known_names

    if record.name not in known_names(ds):
        raise ValueError(
            f"`ds` must have the model's variable {record.name!r}, got {sorted(known_names(ds))}"
        )
    variable = dimension_or_variable(ds, record.name).variable
    axis, kind = record.axis, variable.dtype.kind
    wanted = (
        "iufb"
        if axis is None
        else "m"
        if axis.origin is None
        else "M"
        if axis.calendar is None
        else "O"
    )
    if kind not in wanted:
        words = {"iufb": "numbers", "m": "durations", "M": "times of numpy", "O": "times of cftime"}
        raise ValueError(
            f"`ds` must have {words[wanted]} in {record.name!r}, as in the fit, got dtype "
            f"{variable.dtype}"
        )
    return variable


# -- blocks


def _chunks(dims: Sequence[str], variables: Sequence[xr.Variable]) -> _Chunks:
    """Blocks as Dask or the store has them; of what is in memory, as a fit would cut it."""
    from nlsq_dask.sources.xarray import column_of

    lengths: dict[str, int] = {}
    chunks: _Chunks = {}
    for variable in variables:
        sizes = dict(zip(map(str, variable.dims), variable.shape, strict=True))
        lengths = {**sizes, **lengths}
        if is_dask_array(variable._data):
            chunks = {**dict(zip(sizes, variable._data.chunks, strict=True)), **chunks}
        elif (stored := column_of("ds", variable).chunks) is not None:
            cut = zip(sizes, sizes.values(), stored, strict=True)
            chunks = {**{dim: _cut(size, step) for dim, size, step in cut}, **chunks}
    if not chunks:
        shape = tuple(lengths[dim] for dim in dims)
        steps = choose_leaf_shape(shape, None, None)
        return {dim: _cut(lengths[dim], step) for dim, step in zip(dims, steps, strict=True)}
    return {dim: chunks.get(dim, (lengths[dim],)) for dim in dims}


def _cut(length: int, step: int) -> tuple[int, ...]:
    step = max(min(step, length), 1)
    whole = (step,) * (length // step)
    return (*whole, length % step) if length % step or not whole else whole


def _blocks(
    fit: Outcome, model: Model, place: _Place, quantity: Quantity, given: Sequence[np.ndarray]
) -> Any:
    """A Dask array over the dimensions of the place.

    One task for each block of the variables; along dimensions that they do not have, the block is
    not computed again but looked at from there, without memory.
    """
    import dask.array as da

    used = [dim for dim in place.dims if any(dim in v.dims for v in place.variables)]
    payload = pickled_model(model, tuple(fit.shapes.values()))
    constants = [payload, fit.popt, *given]
    task = RowTask(
        quantity=quantity,
        token=token_of(payload),
        axes=tuple(tuple(used.index(str(d)) for d in v.dims) for v in place.variables),
        times=tuple(variable.axis for variable in fit.provenance.data.x),
        full_shape=tuple(max(place.chunks[dim], default=0) for dim in used),
    )
    pairs: list[Any] = []
    for variable, axes in zip(place.variables, task.axes, strict=True):
        pairs += [_dask_array(variable, place.chunks), axes]
    # Of one block each, along axes of their own: every task is given all of them.
    for constant in constants:
        first = len(used) + len(pairs)
        pairs += [da.from_array(constant, chunks=-1), tuple(range(first, first + constant.ndim))]
    value = da.blockwise(
        task,
        tuple(range(len(used))),
        *pairs,
        token=f"nlsq-{quantity}",
        dtype=np.float64,
        meta=np.empty((0,) * len(used)),
        concatenate=True,
    )
    if used == [*place.dims]:
        return value
    expanded = value[tuple(slice(None) if dim in used else None for dim in place.dims)]
    return da.broadcast_to(expanded, place.shape, chunks=tuple(place.chunks[d] for d in place.dims))


def _dask_array(variable: xr.Variable, chunks: Mapping[str, tuple[int, ...]]) -> Any:
    """A variable in these blocks, read where they are computed."""
    import dask.array as da

    from nlsq_dask.sources.xarray import is_loaded

    wanted = tuple(chunks[str(dim)] for dim in variable.dims)
    if is_dask_array(variable._data):
        return variable._data.rechunk(wanted)
    if is_loaded(variable):
        return da.from_array(np.asarray(variable.values), chunks=wanted)
    return variable.chunk(dict(zip(variable.dims, wanted, strict=True)))._data


# -- labels


def _labelled(fit: Outcome, place: _Place, blocks: Any, name: str) -> xr.DataArray:
    import xarray as xr

    return xr.DataArray(blocks, place.coordinates, place.dims, name, _units(fit))


def _units(fit: Outcome) -> dict[str, str]:
    units = fit.provenance.data.y.units
    return {"units": units} if units else {}
