"""What a user calls data and a model, as rows and a model of them. Nothing is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from nlsq_dask._typing import ModelFunction
from nlsq_dask.errors import ModelError
from nlsq_dask.model import Model, build_model, parameter_names, require_jac, unwrap_jit
from nlsq_dask.parameters.given import (
    BoundsLike,
    StartsLike,
    build_parameter_space,
    claimed_names,
    count_parameters,
)
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.require import require_path, shown
from nlsq_dask.sources.arrays import build_row_source
from nlsq_dask.sources.base import Source
from nlsq_dask.sources.batches import Spool
from nlsq_dask.sources.grid import GridSource
from nlsq_dask.sources.origin import (
    Origin,
    describe_store,
    origin_of_dataset,
    origin_of_source,
    units_of,
)
from nlsq_dask.warn import warn_user

if TYPE_CHECKING:
    import xarray as xr
    from zarr.abc.store import Store as ZarrStore

__all__ = [
    "DatasetLike",
    "GivenModel",
    "ModelledRows",
    "given_model",
    "require_absent",
    "resolve_arrays",
    "resolve_dataset",
]

DatasetLike: TypeAlias = "xr.Dataset | str | os.PathLike[str] | ZarrStore | Source"


# By the name of a type, which may be of a package that is not loaded.
_REMEDIES = {
    "DataArray": "; pass `da.to_dataset(name=…)`, or call `da.nlsq.fit`",
    "DataFrame": "; pass `df.to_xarray()`, or arrays to `curve_fit`",
    "list": "; of several files, pass what `xarray.open_mfdataset` opens",
    "tuple": "; of several files, pass what `xarray.open_mfdataset` opens",
    "ndarray": "; pass arrays to `curve_fit`",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelledRows:
    """Rows, the model of them, and where they came from."""

    source: Source
    model: Model
    origin: Origin
    num_clusters: int = 0
    is_temporary: bool = False  # gone after the fit, so that nothing can be read again


def resolve_dataset(
    ds: DatasetLike,
    function: ModelFunction,
    *,
    y: str | xr.DataArray | None = None,
    x: str | Sequence[str] | None = None,
    sigma: str | xr.DataArray | float | None = None,
    where: str | xr.DataArray | None = None,
    cluster: str | xr.DataArray | None = None,
    time_units: str | None = None,
    jac: ModelFunction | None = None,
    claimed: Collection[str] = (),
    has_all_starts: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> ModelledRows:
    """Rows of a dataset, a store or a source, whose variables are arguments by name.

    `claimed` are names that are parameters, whatever `ds` has. An argument that is neither
    variable nor claimed, without a default, is refused where it may be a variable misspelt;
    with `has_all_starts`, where `p0` counts the parameters, it is none.

    Raises
    ------
    ModelError, ValueError, TypeError
        If an argument is not as `fit_dataset` requires.
    StoreNotFoundError
        If there is no store.
    """
    _require_storage_options(storage_options, ds)
    given = _open(ds, storage_options)
    if _is_dataset(given):
        from nlsq_dask.sources.xarray import (
            DatasetRoles,
            build_dataset_source,
            known_names,
            pick_y,
        )

        model = build_model(function, known_names(given), x, claimed, jac)
        if x is None and not has_all_starts:
            _require_variables(model, known_names(given), claimed)
        roles = DatasetRoles(x=model.variables, y=y, sigma=sigma, where=where, cluster=cluster)
        source, axes, num_clusters = build_dataset_source(given, roles, time_units)
        y_array = pick_y(given, roles)
        # What was computed has the attributes of what it was computed from.
        if isinstance(sigma, str):
            _compare_units(y_array, given[sigma])
        origin = origin_of_dataset(given, y_array, axes, vars(roles), _described(ds))
        return ModelledRows(source=source, model=model, origin=origin, num_clusters=num_clusters)
    if isinstance(given, Source):
        require_absent(
            "a Source, which has its own",
            y=y,
            sigma=sigma,
            where=where,
            cluster=cluster,
            time_units=time_units,
        )
        model = build_model(
            function, given.variables, given.variables if x is None else x, claimed, jac
        )
        return ModelledRows(source=given, model=model, origin=origin_of_source(given))
    raise TypeError(
        "`ds` must be an xarray.Dataset, the path or URL of a store, or a Source, "
        f"got {type(given).__name__}{_REMEDIES.get(type(given).__name__, '')}"
    )


def _require_variables(model: Model, known: Collection[str], claimed: Collection[str]) -> None:
    """See that what becomes a parameter because `ds` does not have it is meant to be one."""
    unsaid = [
        name for name in model.parameters if name not in model.defaults and name not in claimed
    ]
    if not unsaid:
        return
    remedy = "as a parameter it needs a start, by `p0` or a default"
    plain = {_plain(name): name for name in known}
    for name in unsaid:
        if _plain(name) in plain:
            raise ModelError(
                f"`model` argument {name!r} must be a variable of `ds` or a parameter, and `ds` "
                f"has {plain[_plain(name)]!r}; write it so, or {remedy}"
            )
    if known and not model.variables:
        raise ModelError(
            f"`model` must take a variable of `ds`, {shown(sorted(known))}, got the arguments "
            f"{list(model.parameters)}; where {unsaid[0]!r} is none, {remedy}"
        )


def _compare_units(y: xr.DataArray, sigma: xr.DataArray) -> None:
    """Two names may be of one unit, so other ones are no error."""
    units = [units_of(array.attrs) for array in (y, sigma)]
    if all(units) and units[0] != units[1]:
        warn_user(
            f"`sigma` should have the units of `y`, {units[0]!r}, got {units[1]!r}: its numbers "
            "are taken as they are; if those are two names of one unit, all is well"
        )


def _plain(name: str) -> str:
    return name.casefold().replace("_", "")


def resolve_arrays(
    source: GridSource,
    function: ModelFunction,
    *,
    p0: StartsLike,
    bounds: BoundsLike,
    stack_axis: int | None,
    jac: ModelFunction | None = None,
    is_temporary: bool = False,
    description: str = "",
    argument: str = "model",
) -> ModelledRows:
    """SciPy's reading of a signature: the first argument is `x`, the rest are parameters.

    Parameters
    ----------
    source : GridSource
    function : callable
        ``function(x, p1, p2, …)``, or ``function(x, *p)``.
    p0, bounds
        They say how many parameters there are where the signature does not.
    stack_axis : int, optional
        The axis of `x` along which the variables lie; None for one variable, as it is.
    jac : callable, optional
    is_temporary : bool
        Whether the rows are gone after the fit.
    description : str
        Of the data, for the result.
    argument : str
        What the caller calls the function.
    """
    function = unwrap_jit(function)
    names, has_varargs, defaults = parameter_names(function, argument)
    parameters = names[1:]
    if has_varargs:
        count = count_parameters(p0, bounds)
        if count is None:
            raise ValueError(
                f"Unable to determine number of fit parameters. `p0` must be given where "
                f"`{argument}` takes any number of them, got neither `p0` nor `bounds` as long"
            )
        parameters = tuple(f"p{i}" for i in range(count))
    elif len(names) < 2:
        raise ValueError(
            f"Unable to determine number of fit parameters. `{argument}` must take the data and "
            f"at least one parameter, got arguments {list(names)}"
        )
    model = Model(
        function=function,
        variables=source.variables,
        parameters=parameters,
        defaults={name: defaults[name] for name in parameters if name in defaults},
        jac=require_jac(jac),
        stack_axis=stack_axis,
    )
    return ModelledRows(
        source=source,
        model=model,
        origin=origin_of_source(source, description),
        is_temporary=is_temporary,
    )


@dataclass(frozen=True, eq=False)
class GivenModel:
    """A function and what was said of its parameters, to be met with rows."""

    function: ModelFunction
    p0: StartsLike
    bounds: BoundsLike
    argument: str = "model"

    def space(self, rows: ModelledRows) -> ParameterSpace:
        model = rows.model
        return build_parameter_space(model.parameters, model.defaults, self.p0, self.bounds)

    def rows_of(self, data: Any, sigma: Any, x_data: Any, y_data: Any) -> ModelledRows:
        if data is None or isinstance(data, tuple | list):
            x, y, sigma = _arrays(data, sigma, x_data, y_data)
            return self._of_arrays(*build_row_source(x, y, sigma))
        if isinstance(data, Spool):
            require_absent("a spool, which has its own", sigma=sigma, x_data=x_data, y_data=y_data)
            return self.rows_spooled(data)
        if not (_is_store(data) or _is_dataset(data) or isinstance(data, Source)):
            raise TypeError(
                "`data_source` must be (x, y), an iterator of batches, an xarray.Dataset, the "
                f"path or URL of a store, or a Source, got {type(data).__name__}"
            )
        ds = _open(data, argument="data_source")
        if x_data is None and y_data is None and _is_row_store(ds, self.function):
            from nlsq_dask.sources.xarray import build_stored_source

            return self._of_arrays(*build_stored_source(ds, sigma), description=_described(data))
        return resolve_dataset(
            ds,
            self.function,
            y=y_data,
            x=x_data,
            sigma=sigma,
            claimed=claimed_names(self.p0, self.bounds),
        )

    def rows_spooled(self, spool: Spool) -> ModelledRows:
        return self._of_arrays(*spool.source(), is_temporary=True)

    def _of_arrays(
        self,
        source: GridSource,
        is_stacked: bool,
        is_temporary: bool = False,
        description: str = "",
    ) -> ModelledRows:
        return resolve_arrays(
            source,
            self.function,
            p0=self.p0,
            bounds=self.bounds,
            stack_axis=-1 if is_stacked else None,
            is_temporary=is_temporary,
            description=description,
            argument=self.argument,
        )


def _described(ds: Any) -> str:
    """The path or URL of a store; nothing of other data, which describe themselves."""
    return describe_store(ds) if _is_store(ds) else ""


def _require_storage_options(options: object, ds: object) -> None:
    if options is None:
        return
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        # Values are not shown: they may be credentials.
        found = f" with the keys {shown(list(options))}" if isinstance(options, Mapping) else ""
        raise TypeError(
            "`storage_options` must be a mapping of fsspec's names to values, "
            f"got {type(options).__name__}{found}"
        )
    if not _is_store(ds):
        raise ValueError(
            "`storage_options` must go with a path or URL, got another kind of `ds`, "
            f"{type(ds).__name__}"
        )


def given_model(
    func: ModelFunction | None, model: ModelFunction | None, p0: StartsLike, bounds: BoundsLike
) -> GivenModel:
    """The function that is given by one of two names.

    Raises
    ------
    TypeError, ModelError
        If it is by both or none, or is no function whose arguments can be read.
    """
    if func is not None and model is not None:
        raise TypeError("`func` or `model` must be given, and not both, got both")
    name, function = ("func", func) if model is None else ("model", model)
    if function is None:
        raise TypeError("`func` or `model` must be given, got neither")
    parameter_names(unwrap_jit(function), name)  # before any batch is asked for
    return GivenModel(function, p0, bounds, name)


def _open(ds: Any, storage_options: Mapping[str, Any] | None = None, argument: str = "ds") -> Any:
    """The dataset in a store; what is none as it is."""
    if not _is_store(ds):
        return ds
    if isinstance(ds, str | os.PathLike):
        require_path(argument, ds)
    from nlsq_dask.sources.stores import open_store

    return open_store(ds, storage_options, argument)


def _is_store(ds: object) -> bool:
    """A path, a URL or a store of Zarr's, of which there is none before Zarr is loaded."""
    zarr_store = sys.modules.get("zarr.abc.store")
    is_zarr = zarr_store is not None and isinstance(ds, zarr_store.Store)
    return is_zarr or isinstance(ds, str | os.PathLike)


def _is_dataset(ds: object) -> bool:
    xarray = sys.modules.get("xarray")
    return xarray is not None and isinstance(ds, xarray.Dataset)


def _is_row_store(ds: Any, function: ModelFunction) -> bool:
    """Whether a dataset is just ``x`` and ``y``, of rows first, rather than names to fit by."""
    if not _is_dataset(ds) or not {"x", "y"} <= set(ds.variables):
        return False
    from nlsq_dask.sources.xarray import known_names

    names, _, _ = parameter_names(function)
    is_stacked = ds["x"].ndim == 2 and ds["y"].dims == ds["x"].dims[:1]
    return is_stacked or not known_names(ds).intersection(names)


def _arrays(data: Any, sigma: Any, x_data: Any, y_data: Any) -> tuple[Any, Any, Any]:
    """``x, y, sigma`` of one of the two ways to give them."""
    if data is None:
        if x_data is None or y_data is None:
            raise TypeError("`fit` must be given `data_source`, or both `x_data` and `y_data`")
        return x_data, y_data, sigma
    if x_data is not None or y_data is not None:
        raise TypeError("`x_data` and `y_data` must not be given beside arrays in `data_source`")
    if len(data) not in (2, 3):
        raise ValueError(f"`data_source` must be (x, y) or (x, y, sigma), got {len(data)} parts")
    if len(data) == 2:
        return data[0], data[1], sigma
    if sigma is not None:
        raise ValueError("`sigma` must be given once, got it also as the third of `data_source`")
    return data[0], data[1], data[2]


def require_absent(kind: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"`{name}` must not be given with {kind}, got {shown(value)}")
