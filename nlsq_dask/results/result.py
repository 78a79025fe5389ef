"""What a fit says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from nlsq_dask._typing import Float, ModelFunction
from nlsq_dask.results.html import to_html
from nlsq_dask.results.intervals import confidence_interval
from nlsq_dask.results.labelled import to_dataset
from nlsq_dask.results.outcome import Outcome
from nlsq_dask.results.plot import plot
from nlsq_dask.results.prediction import attached_model, predict, prediction_band, residuals
from nlsq_dask.results.residuals import Residuals
from nlsq_dask.results.saving import load, save
from nlsq_dask.results.streaming import streaming_diagnostics
from nlsq_dask.results.summary import summarise

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure, SubFigure

__all__ = ["FitResult"]

_MAX_REPR_VALUES = 20

# What NLSQ's results answer to, and the attribute that is meant.
_NLSQ_KEYS = {
    "x": "popt",
    "success": "success",
    "message": "message",
    "fun": "fun",
    "pcov": "pcov",
    "perr": "perr",
    "popt": "popt",
    "streaming_diagnostics": "streaming_diagnostics",
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FitResult(Outcome, Mapping[str, Any]):
    """Parameters, their uncertainty, and how the fit came to them.

    A mapping too: ``result["rate"]`` is a parameter, by the name that the model gives it and
    in its own shape; ``result["x"]``, ``"success"``, ``"message"``, ``"fun"``, ``"pcov"``,
    ``"perr"``, ``"popt"`` and ``"streaming_diagnostics"`` are what NLSQ calls so. Where a
    parameter has one of those names, the parameter is meant; they are attributes as well.

    Attributes
    ----------
    popt : (n,)
        All parameters, fixed ones included, in the model's order.
    p0, lower, upper : (n,)
        Where they started, and their bounds.
    pcov : (n, n) or None
        Their covariance; zero rows for fixed parameters, infinite variance for those that the
        data do not determine. None from `cg_param_threshold` free parameters on, where nothing
        of that size is formed; `perr` is None then as well.
    param_names : tuple of str
        A name for each element of `popt`; elements of array parameters are ``c[0]``, ``c[1]``, …
    status : Status
        Why the fit stopped; `success` is whether a convergence test was met.
    cost : float
        What was minimised: ``½ Σ s² ρ((r / s)²)`` with ``r = √weight (model - y) / sigma`` and
        ``s = f_scale``, and `penalty_cost`. For the linear loss ``½ Σ r²``.
    penalty_cost : float
        The part of priors and group variances.
    num_rows, num_masked : int
        Rows that counted, and rows left out.
    num_passes : int
        Passes over all data.
    bytes_read : int
        Decoded bytes read from the source, the sample included; cached chunks count once.
    optimality : float
        The largest cosine between the residuals and a column of the Jacobian.
    distance : float
        Estimated distance to the minimum, in standard errors.
    condition_number : float
        Of the Jacobian with columns of unit length.
    rank : float
        Directions among the free parameters that the data determine. Like `condition_number`,
        NaN where `pcov` is None.
    active : (n,) of bool
        Parameters that a bound holds.
    history : tuple of IterationRecord
        One for each pass.
    diagnostics : dict
        The sample, the optima that competed, the plan, memory, timings, versions.
    provenance : Provenance
        Model, data, units, ties, priors, times: what the fit was of, in words.
    model : Model, optional
        For predictions. Like `session` it is neither pickled nor saved: `with_model` attaches it.
    session : Session, optional
        The way back to the rows, for what takes more passes: a result from a file or another
        process has None.
    """

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # a mapping's would compare arrays

    # -- as a mapping

    def __getitem__(self, name: str) -> Any:
        start = 0
        for known, shape in self.shapes.items():
            size = int(np.prod(shape))
            if known == name:
                return self.popt[start : start + size].reshape(shape)[()]  # a number of a scalar
            start += size
        if name in _NLSQ_KEYS:
            return getattr(self, _NLSQ_KEYS[name])
        raise KeyError(f"{name!r} is not a parameter; there are {list(self.shapes)}")

    def __iter__(self) -> Iterator[str]:
        return iter({**_NLSQ_KEYS, **self.shapes})

    def __len__(self) -> int:
        return len({**_NLSQ_KEYS, **self.shapes})

    def _ipython_key_completions_(self) -> list[str]:
        """What IPython offers after ``result["``: parameters first."""
        return list({**self.shapes, **_NLSQ_KEYS})

    @property
    def x(self) -> Float[np.ndarray, " n"]:
        """`popt`, as SciPy's and NLSQ's results call it."""
        return self.popt

    @property
    def streaming_diagnostics(self) -> dict[str, Any]:
        """The course of the fit in NLSQ's words: timings and iterations by phase."""
        return streaming_diagnostics(self.diagnostics, self.history)

    @property
    def fun(self) -> Residuals | None:
        """``y - model`` over all rows, computed when asked for: an array to NumPy.

        None where the data cannot be read again: the result was pickled, or its batches are gone.
        """
        if self.session is None:
            return None
        return Residuals(problem=self.session.problem, params=self.popt)

    # -- how sure

    def confidence_interval(
        self,
        level: float = 0.95,
        method: Literal["asymptotic", "profile"] = "asymptotic",
        params: str | Sequence[str] | None = None,
    ) -> xr.DataArray:
        """Intervals from the standard errors, or from the profile of the cost.

        Parameters
        ----------
        level : float
            Coverage, between 0 and 1.
        method : {"asymptotic", "profile"}
            ``popt ± t perr``: immediate, and right where the model is nearly linear over the
            interval. Or the values at which the cost, minimised over all other parameters, is at
            most ``t² s² / 2`` above its minimum; this takes passes over the data. `t` is the
            quantile of Student's distribution with `dof` degrees of freedom (one less than there
            are clusters, where there are), of the normal one for absolute sigma (where s = 1);
            ``t²`` is that of F(1, `dof`).
        params : str or sequence of str, optional
            Names, of array parameters or of their elements. By default all.

        Returns
        -------
        xarray.DataArray
            Dimensions ``param`` and ``side`` (lower, upper). By profile also a coordinate
            ``status``, what is at each end, and ``attrs["num_passes"]``. An end is at the
            parameter's bound where the profile does not reach the threshold before, and infinite
            where it does not within 100 standard errors. Tied parameters have none (NaN).

        Raises
        ------
        ValueError
            If `level`, `method` or `params` is not as above; by profile, if the data do not
            determine every free parameter, the loss is robust, or the covariance a sandwich.
        SessionError
            By profile, if the result came from a file or another process.
        DataError
            By profile, if the data have changed since the fit.

        Warns
        -----
        scipy.optimize.OptimizeWarning
            If an end is infinite, or NaN because the cost is lower on the way than at `popt`.

        Notes
        -----
        A profile takes one pass, and two to four for each end of most problems.

        References
        ----------
        Venzon & Moolgavkar (1988), A method for computing profile-likelihood-based confidence
        intervals, Applied Statistics 37, 87-94.
        """
        return confidence_interval(self, level, method, params)

    # -- predictions

    def with_model(self, model: ModelFunction) -> Self:
        """The result with its model again, which files and pickles do not have.

        Raises
        ------
        ModelError
            If the function's arguments are not those that were fitted.
        """
        return replace(self, model=attached_model(self, model))

    def predict(self, ds: Any = None) -> xr.DataArray:
        """The model at the parameters found, lazily: computed by Dask, block by block.

        Parameters
        ----------
        ds : xarray.Dataset, str, path or array, optional
            Where: a dataset that has the model's variables, under the names that they had in the
            fit, or the path or URL of a store that has. By default the data that were fitted.
            After a fit of arrays, also `x` as it was given there.

        Returns
        -------
        xarray.DataArray
            float64, of Dask blocks: on the cluster where there is a client, otherwise in threads.
            Where `ds` has what was fitted, a value for each of its elements, in the same chunks;
            otherwise over the dimensions of the variables. It has the coordinates of `ds` and the
            units of what was fitted. Also rows that the fit left out have a value.

        Raises
        ------
        SessionError
            If the data are not at hand: the result came from a file, or they were batches.
        ModelError
            If the model is not at hand.
        ValueError
            If `ds` lacks a variable, or it is of times where the fit had numbers.

        Notes
        -----
        Variables broadcast by dimension name within a block. Times become numbers by the origin
        and the unit of the fit. ``result.predict(ds).to_zarr(path)`` is written by the workers.

        Examples
        --------
        >>> import jax.numpy as jnp, numpy as np, xarray as xr
        >>> from nlsq_dask import fit_dataset
        >>> t = np.linspace(0.0, 10.0, 1000)
        >>> ds = xr.Dataset({"flux": ("t", 2.0 * np.exp(-0.5 * t))}, coords={"t": t})
        >>> def decay(t, amplitude, rate):
        ...     return amplitude * jnp.exp(-rate * t)
        >>> result = fit_dataset(ds, decay)
        >>> later = xr.Dataset(coords={"t": [20.0, 30.0]})
        >>> bool(np.allclose(result.predict(later), 2.0 * np.exp([-10.0, -15.0])))
        True
        """
        return predict(self, ds)

    def residuals(self, ds: Any = None) -> xr.DataArray:
        """``y - model``, unweighted and lazy: as `predict`, for a `ds` that has what was fitted.

        Rows that the fit left out have a residual too, NaN only where `y` or a variable is NaN.
        """
        return residuals(self, ds)

    def prediction_band(self, ds: Any = None, level: float = 0.95) -> xr.Dataset:
        """How sure the model's value is, point by point and lazily.

        Parameters
        ----------
        ds
            As in `predict`.
        level : float
            Coverage at each point by itself, not of all of them together.

        Returns
        -------
        xarray.Dataset
            ``prediction``, its ``standard_error``, and ``lower`` and ``upper``, which are
            ``prediction ± t standard_error`` with `confidence_interval`'s `t`. The error is
            infinite where the model depends on a parameter that the data do not determine.

        Raises
        ------
        CovarianceError
            If no covariance was formed.
        SessionError, ModelError, ValueError
            As `predict`; if `level` is not between 0 and 1.

        Notes
        -----
        By the delta method: variance ``g pcov gᵀ`` with `g` the model's gradient by the
        parameters. This is the band of the model's mean, which lmfit calls ``eval_uncertainty``
        and Origin a confidence band. A new observation scatters about it with its own variance,
        ``reduced_chi2 * sigma**2``, to be added to the square of the standard error.
        """
        return prediction_band(self, ds, level)

    # -- to keep

    def to_dataset(self) -> xr.Dataset:
        """Everything as labelled data: parameters, covariance, statistics, history, provenance.

        Returns
        -------
        xarray.Dataset
            Along ``param`` (elements of array parameters by themselves): ``params``,
            ``standard_errors``, ``p0``, ``lower``, ``upper``, ``is_free``, ``is_tied``,
            ``active``; a coordinate ``units``, empty where not known. Along ``cov_i`` and
            ``cov_j``: ``covariance`` and ``correlation``, left out where there is no `pcov`.
            Along ``trial``: ``history_…``, of each `IterationRecord`. The statistics are
            scalars. Attributes say what was fitted, how, when and by which versions; the
            one called ``record`` is JSON and all the rest of the result.
        """
        return to_dataset(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dataset` to a netCDF4 file or a Zarr store, from which `load` makes it again.

        Parameters
        ----------
        path : str or path
            Local; ``.nc`` and ``.h5`` are written by h5netcdf, ``.zarr`` is a folder. A result
            that is there already is replaced in one step, anything else is left alone.

        Raises
        ------
        ResultFileError
            If `path` has another suffix, is a URL, or holds something else.
        """
        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: ModelFunction | None = None) -> Self:
        """The result that was saved, to the last bit, without its session.

        A file is data: nothing in it is executed, whoever wrote it.

        Parameters
        ----------
        path : str or path
        model : callable, optional
            The function that was fitted, for predictions.

        Raises
        ------
        FileNotFoundError
            If nothing is there.
        ResultFileError
            If it is not a saved result, damaged, or of another version of the format.
        ModelError
            If the arguments of `model` are not those that were fitted.
        """
        result = cls(**load(path))
        return result if model is None else result.with_model(model)

    # -- text

    def summary(self) -> str:
        """A report in plain text, in the layout of lmfit's ``fit_report``.

        First why the fit stopped; then model, statistics, parameters (value, standard error, start,
        bounds, units) and correlations; last what a reader should be warned of.
        """
        return summarise(self)

    def plot(self, figure: Figure | SubFigure | None = None) -> np.ndarray:
        """Draw data and model, residuals, their means by chunk, and convergence.

        Parameters
        ----------
        figure : matplotlib Figure or SubFigure, optional
            Where to draw. By default a new one of `matplotlib.pyplot`.

        Returns
        -------
        (2, 2) array of matplotlib Axes
            Data and residuals are of a sample, drawn again with the fit's seed: at most some
            50,000 rows of a few hundred chunks, as a density where there are more than 3,000. Over
            the variable where the model has one, else observed over predicted. The means by chunk
            are of all rows, and were collected by the passes. A result from a file or another
            process has no data: then only these means and the convergence are drawn, in (1, 2).

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install 'nlsq-dask[plot]'``.
        """
        return plot(self, figure)

    def _repr_html_(self) -> str:
        """What notebooks show: the report as tables, and how the fit converged. Reads no data."""
        return to_html(self)

    def __repr__(self) -> str:
        pairs = list(zip(self.param_names, self.popt, strict=True))
        values = ", ".join(f"{name}={value:.6g}" for name, value in pairs[:_MAX_REPR_VALUES])
        more = ", …" if len(pairs) > _MAX_REPR_VALUES else ""
        return f"<FitResult {self.status.name}: {values}{more}; {self.num_rows:,} rows>"

    def __str__(self) -> str:
        return self.summary()
