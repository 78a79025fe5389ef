"""``ds.nlsq`` and ``da.nlsq``: fits as methods of xarray's datasets and arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nlsq_dask._typing import ModelFunction
from nlsq_dask.api import fit_dataset
from nlsq_dask.results.result import FitResult

# Importing xarray here would call `register` before there is one.
if TYPE_CHECKING:
    import xarray as xr

__all__ = ["DataArrayAccessor", "DatasetAccessor", "register"]


def _with_options_of_fit_dataset(*left_out: str) -> Callable[[Any], Any]:
    """Let help and completion by tab show the options, which are `fit_dataset`'s own."""

    def sign(method: Any) -> Any:
        own = list(inspect.signature(method).parameters.values())[:2]
        options = inspect.signature(fit_dataset).parameters.values()
        named = [
            option
            for option in options
            if option.kind is option.KEYWORD_ONLY and option.name not in left_out
        ]
        method.__signature__ = inspect.Signature([*own, *named], return_annotation=FitResult)
        return method

    return sign


class DatasetAccessor:
    """Fits to a dataset: ``ds.nlsq.fit(model)``."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    @_with_options_of_fit_dataset("storage_options")
    def fit(self, model: ModelFunction, **options: Any) -> FitResult:
        """`fit_dataset` of this dataset, with its options, results and errors.

        Examples
        --------
        >>> import jax.numpy as jnp, numpy as np, xarray as xr, nlsq_dask
        >>> t = np.linspace(0, 10, 1000)
        >>> ds = xr.Dataset({"flux": ("t", 2.0 * np.exp(-0.5 * t))}, coords={"t": t})
        >>> def decay(t, amplitude=1.0, rate=1.0):
        ...     return amplitude * jnp.exp(-rate * t)
        >>> result = ds.nlsq.fit(decay, y="flux")
        >>> bool(np.allclose(result.popt, [2.0, 0.5]))
        True
        """
        return fit_dataset(self._ds, model, **options)


class DataArrayAccessor:
    """Fits to an array, with its coordinates as variables: ``da.nlsq.fit(model)``."""

    def __init__(self, array: xr.DataArray) -> None:
        self._array = array

    @_with_options_of_fit_dataset("y", "storage_options")
    def fit(self, model: ModelFunction, **options: Any) -> FitResult:
        """`fit_dataset` of this array as `y`, with its options, results and errors.

        `sigma`, `where` and `cluster` take arrays beside it.

        Raises
        ------
        TypeError
            If `y` is among the options.
        """
        if "y" in options:
            raise TypeError(
                "`y` must be left out: it is the array itself; fit the dataset with `ds.nlsq.fit` "
                "to choose another"
            )
        array = self._array
        name = "y" if array.name is None or array.name in array.coords else str(array.name)
        return fit_dataset(array.to_dataset(name=name), model, y=name, **options)


def register(xarray: Any) -> None:
    """Give xarray's objects the accessor ``nlsq``."""
    xarray.register_dataset_accessor("nlsq")(DatasetAccessor)
    xarray.register_dataarray_accessor("nlsq")(DataArrayAccessor)
