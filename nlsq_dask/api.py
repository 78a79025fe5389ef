"""The front door."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nlsq_dask._typing import ModelFunction, Vector
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.criterion import Criterion
from nlsq_dask.errors import ConvergenceError
from nlsq_dask.evaluate.clients import require_client
from nlsq_dask.optimizer import AdaptiveHybridStreamingOptimizer, require_config
from nlsq_dask.parameters.given import (
    BoundsLike,
    StartsLike,
    build_parameter_space,
    claimed_names,
    held_names,
)
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.progress import require_progress
from nlsq_dask.require import require_callback, require_choice, require_flag, require_integer
from nlsq_dask.resolve import DatasetLike, resolve_arrays, resolve_dataset
from nlsq_dask.results.result import FitResult
from nlsq_dask.screening import NanPolicy
from nlsq_dask.sources.arrays import build_array_source, require_finite
from nlsq_dask.status import Status
from nlsq_dask.telemetry import Callback

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["curve_fit", "fit_dataset", "with_scipy_options"]


def fit_dataset(
    ds: DatasetLike,
    model: ModelFunction,
    *,
    y: str | xr.DataArray | None = None,
    x: str | Sequence[str] | None = None,
    p0: StartsLike = None,
    bounds: BoundsLike = None,
    fixed: Iterable[str] = (),
    ties: Mapping[str, Callable[..., Any]] | None = None,
    priors: Mapping[str, Any] | None = None,
    sigma: str | xr.DataArray | float | None = None,
    absolute_sigma: bool = False,
    where: str | xr.DataArray | None = None,
    nan_policy: NanPolicy = "omit",
    loss: str = "linear",
    f_scale: float | str = 1.0,
    covariance: str = "auto",
    cluster: str | xr.DataArray | None = None,
    time_units: str | None = None,
    jac: ModelFunction | None = None,
    client: Any = None,
    config: HybridStreamingConfig | None = None,
    callback: Callback | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> FitResult:
    r"""Fit one model to a whole dataset, however large, in passes over its chunks.

    Minimises ``F = ½ Σ s² ρ((r / s)²)``, ``r = (model(x, params) - y) / sigma``, ``s = f_scale``,
    over all rows, within `bounds`; ``½ Σ r²`` for the linear loss.

    Parameters
    ----------
    ds : xarray.Dataset, str, path, zarr store or Source
        The data: a dataset (in memory, lazily opened or of Dask arrays), the path of a Zarr or
        HDF5/netCDF4 store, the URL of a Zarr store, or any `Source`.
    model : callable
        ``model(x1, …, p1, p2, …)``, elementwise and traceable by JAX. Arguments that name a
        variable, coordinate or dimension of `ds` are independent variables and come first;
        the others are parameters. Variables arrive as float64 arrays that broadcast against
        each other, and against the result, by dimension name: 1-d where all share one
        dimension.
    y : str or DataArray, optional
        What is fitted. By default the only numeric data variable left over.
    x : str or sequence of str, optional
        The independent variables, where names do not say it.
    p0 : mapping or sequence, optional
        Starts by parameter name, or one for each parameter; an array makes an array parameter.
        By default the model's own keyword defaults, else 1 clipped into the bounds.
    bounds : mapping, ``(lower, upper)`` or `scipy.optimize.Bounds`, optional
        ``{"rate": (0, 5)}``, with None for no bound, or SciPy's sequences.
    fixed : iterable of str
        Parameters held at their start.
    ties : mapping, optional
        Parameters that are functions of others, ``{"b": lambda a: 2 * a}``: the arguments name
        them, the body is JAX's NumPy.
    priors : mapping, optional
        ``{"rate": (mean, width)}``: Gaussian, added to the cost as ``½ ((rate - mean) / width)²``
        and honoured by the covariance. They need ``absolute_sigma=True``.
    sigma : str, DataArray or float, optional
        Standard deviation of `y`, in its units: another attribute `units` is warned of. A number
        is that of every row.
    absolute_sigma : bool
        Whether `sigma` is known; if not, only its ratios count, and the covariance is scaled by
        the residuals' variance.
    where : str or DataArray of bool, optional
        Rows to fit.
    nan_policy : {"omit", "raise"}
        Rows with a value that is not finite are left out and counted, or refused.
    loss : {"linear", "soft_l1", "huber", "cauchy", "arctan"}
        How much a large residual costs: see `nlsq_dask.losses` for which to take.
    f_scale : float or "mad"
        Residuals well below it count as with the linear loss, in units of r. "mad" estimates it
        from the sample, 1.4826 times the median absolute residual, before the first pass.
    covariance : {"auto", "classical", "HC0", "HC1"}
        ``s² (JᵀJ)⁻¹``, or the sandwich, right for residuals of unequal variance (White 1980; HC1
        times m/(m - k)), at one more pass. By default HC1 for robust losses, else classical.
    cluster : str or DataArray, optional
        Labels of rows that may depend on each other, a coordinate of `y` for instance: the
        sandwich is summed over them first, at one more pass.
    time_units : str, optional
        CF units for variables of times, ``"hours since 2000-01-01"``; by default days since the
        first value. Durations are in days. See ``result.diagnostics["time_axes"]``.
    jac : callable, optional
        ``jac(x1, …, p1, …)``: the derivative of `model` by its parameters, as a sequence with one
        array for each or one array with the parameters on its last axis. By default automatic.
    client : distributed.Client, optional
        The cluster. By default the active client, unless the data are arrays of this process or
        a pass is too little work to send; else threads of this process. None is ever started.
    config : HybridStreamingConfig, optional
    callback : callable, optional
        Called with an `IterationRecord` after each pass (``phase`` 2) and, before that, every
        `callback_frequency` iterations of the warmup (``phase`` 1). Raising StopIteration ends the
        fit, in the warmup after a first pass.
    progress : bool, optional
        Whether to show a bar for each pass and a line for each trial. By default in a terminal
        or a notebook, once a fit takes more than two seconds; the log (``nlsq_dask``) has the
        lines in any case, and how far a long pass is every half minute.
    checkpoint : str or path, optional
        A local file that is replaced, in one step, after the warmup and after each pass. It is
        only written: ``config.resume_from_checkpoint`` goes on from one, to the same bits.
    storage_options : mapping, optional
        For a URL, in fsspec's names: ``{"anon": True}``, ``{"profile": "lab"}``,
        ``{"key": …, "secret": …, "endpoint_url": …}``. obstore reads where it has all that are
        given, fsspec otherwise; see ``result.diagnostics["transports"]``.

    Returns
    -------
    FitResult
        A fit that did not converge is returned too, and says so.

    Raises
    ------
    ModelError, ValueError, TypeError
        If an argument is not as required: before any work is submitted, except for what only
        the data can show.
    DataError
        If no row can be fitted.
    StoreNotFoundError, StoreDeniedError, StoreUnreachableError
        If there is no store, or it may not or cannot be read.
    CheckpointError
        If checkpoints cannot be written, or the one to resume is damaged or of another fit.
    MemoryProjectionError
        If the plan does not fit a worker's memory.
    WorkerError
        If a cluster cannot run the fit or not go on with it, with the checkpoint to go on from.
    FitInterrupted
        When interrupted from the keyboard: a KeyboardInterrupt with what the fit has come to, and
        the checkpoint to go on from. The cluster's work is cancelled.

    Notes
    -----
    Each trial of the parameters is one pass over the data. A task sends back about
    ``8 (k² + k)`` bytes for each of a few nodes of the summation tree, for `k` free parameters.
    A chunk-stratified random sample of at most 1 % of the rows finds the start.

    Examples
    --------
    >>> import jax.numpy as jnp, numpy as np, xarray as xr
    >>> t = np.linspace(0, 10, 1000)
    >>> ds = xr.Dataset({"flux": ("t", 2.0 * np.exp(-0.5 * t) + 0.1)}, coords={"t": t})
    >>> def decay(t, amplitude, rate, offset=0.0):
    ...     return amplitude * jnp.exp(-rate * t) + offset
    >>> result = fit_dataset(ds, decay)
    >>> bool(np.allclose(result.popt, [2.0, 0.5, 0.1]))
    True
    """
    optimizer = AdaptiveHybridStreamingOptimizer(config)
    require_choice("nan_policy", nan_policy, ("omit", "raise"))
    criterion = Criterion(
        loss=loss,
        f_scale=f_scale,
        absolute_sigma=absolute_sigma,
        priors=priors,
        covariance=covariance,
        is_clustered=cluster is not None,
    )
    require_callback(callback)
    require_progress(progress)
    require_client(client)
    fixed = held_names(fixed)
    rows = resolve_dataset(
        ds,
        model,
        y=y,
        x=x,
        sigma=sigma,
        where=where,
        cluster=cluster,
        time_units=time_units,
        jac=jac,
        claimed=claimed_names(p0, bounds, fixed) | claimed_names(ties, priors),
        has_all_starts=p0 is not None and not isinstance(p0, Mapping),
        storage_options=storage_options,
    )
    space = build_parameter_space(
        rows.model.parameters, rows.model.defaults, p0, bounds, fixed, ties
    )
    return optimizer.fit_rows(
        rows,
        space,
        criterion=criterion,
        nan_policy=nan_policy,
        client=client,
        callback=callback,
        progress=progress,
        checkpoint=checkpoint,
    )


def curve_fit(
    f: ModelFunction,
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool | None = None,
    bounds: BoundsLike = (-np.inf, np.inf),
    method: str | None = None,
    jac: ModelFunction | None = None,
    *,
    full_output: bool = False,
    nan_policy: str | None = None,
    client: Any = None,
    config: HybridStreamingConfig | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Fit a function to data, with the contract of `scipy.optimize.curve_fit`.

    Parameters
    ----------
    f : callable
        ``f(x, p1, p2, …)`` in JAX's NumPy; `x` of shape ``(m,)`` or ``(variables, m)``.
    xdata : array or Dask array of shape ``(m,)`` or ``(variables, m)``
        Or a sequence of Dask arrays, one for each variable.
    ydata : array or Dask array of shape ``(m,)``
    p0 : sequence, optional
        Starts. By default 1, or a point between the bounds.
    sigma : scalar or ``(m,)``, optional
        Standard deviations of `ydata`.
    absolute_sigma : bool
        Whether `sigma` is known, or only its ratios count.
    check_finite : bool, optional
        Whether a value that is not finite is an error. By default True, or False if
        `nan_policy` is given.
    bounds : 2-tuple or `scipy.optimize.Bounds`
    method : {"lm", "trf", "dogbox", "hybrid_streaming"}, optional
        All are one solver here; "lm" refuses bounds, as in SciPy.
    jac : callable, optional
        ``jac(x, p1, …)`` of shape ``(m, n)``. By default automatic.
    full_output : bool
        Return also the `FitResult`, its message and an integer flag, in SciPy's places.
    nan_policy : {"raise", "omit"}, optional
    client : distributed.Client, optional
    config : HybridStreamingConfig, optional
    progress : bool, optional
        As in `fit_dataset`.
    **kwargs
        ``loss``, ``f_scale``, ``ftol``, ``xtol``, ``gtol``, ``max_nfev`` (or ``maxfev``).

    Returns
    -------
    popt : (n,)
    pcov : (n, n)
        None from `cg_param_threshold` parameters on.
    infodict, mesg, ier
        Only with `full_output`: ``infodict["result"]`` is the `FitResult`.

    Raises
    ------
    ValueError
        If the data hold NaN where they are checked, arrays or bounds do not match.
    RuntimeError
        If the fit does not converge (`ConvergenceError`).
    TypeError
        If there are fewer rows than parameters with "lm", as in SciPy.

    Warns
    -----
    scipy.optimize.OptimizeWarning
        If the covariance could not be estimated.
    """
    # SciPy scales the Jacobian by the loss and inverts that, without a sandwich.
    robust = {name: kwargs.pop(name) for name in ("loss", "f_scale") if name in kwargs}
    criterion = Criterion(**robust, absolute_sigma=absolute_sigma, covariance="classical")
    optimizer = AdaptiveHybridStreamingOptimizer(with_scipy_options(require_config(config), kwargs))
    require_client(client)
    require_progress(progress)
    require_flag("full_output", full_output)
    if check_finite is not None:
        require_flag("check_finite", check_finite)
    require_choice("nan_policy", nan_policy, (None, "raise", "omit"))
    source = build_array_source(xdata, ydata, sigma)
    rows = resolve_arrays(
        source,
        f,
        p0=p0,
        bounds=bounds,
        stack_axis=0 if np.ndim(xdata) != 1 else None,
        jac=jac,
        argument="f",
    )
    space = build_parameter_space(rows.model.parameters, {}, p0, bounds, start_within=_scipy_start)
    method = _require_method(method, space)
    if method == "lm" and space.size > source.num_rows:
        raise TypeError(
            f"Improper input: func input vector length N={space.size} must not exceed func "
            f"output vector length M={source.num_rows}"
        )
    refuses = nan_policy is None if check_finite is None else check_finite
    if refuses:
        require_finite(source)
    policy: NanPolicy = "raise" if refuses or nan_policy == "raise" else "omit"
    result = optimizer.fit_rows(
        rows, space, criterion=criterion, nan_policy=policy, client=client, progress=progress
    )
    if not result.success and result.status is not Status.UNIDENTIFIED:
        raise ConvergenceError(f"Optimal parameters not found: {result.message}")
    if result.status is Status.UNIDENTIFIED and result.pcov is not None:
        result.pcov[:] = np.inf  # as SciPy has it
    if not full_output:
        return result.popt, result.pcov
    information = {"nfev": result.num_passes, "result": result}
    return result.popt, result.pcov, information, result.message, 1 if result.success else 4


def _scipy_start(lower: Vector, upper: Vector) -> Vector:
    """Where SciPy's `curve_fit` starts without `p0`."""
    has_lower, has_upper = np.isfinite(lower), np.isfinite(upper)
    start = np.ones(len(lower))
    start = np.where(has_lower & ~has_upper, lower + 1.0, start)
    start = np.where(has_upper & ~has_lower, upper - 1.0, start)
    both = has_lower & has_upper
    return np.where(both, 0.5 * (np.where(both, lower, 0) + np.where(both, upper, 0)), start)


_OF_OTHER_ALGORITHMS = {"diag", "epsfcn", "factor", "tr_options", "tr_solver", "x_scale"}


def with_scipy_options(
    config: HybridStreamingConfig, options: dict[str, Any]
) -> HybridStreamingConfig:
    """The configuration with SciPy's options in it, those of them that are not None."""
    names = {"ftol": "ftol", "xtol": "xtol", "gtol": "gtol"}
    trials = ("max_nfev", "maxfev")
    names |= dict.fromkeys(trials, "gauss_newton_max_iterations")
    unknown = sorted(set(options) - set(names))
    if unknown and set(unknown) <= _OF_OTHER_ALGORITHMS:
        raise TypeError(
            f"curve_fit() got {unknown}, which tune SciPy's own algorithms: leave them out, steps "
            "are scaled and solved another way here"
        )
    if unknown:
        raise TypeError(
            f"curve_fit() got unexpected arguments {unknown}; beside those of its signature it "
            f"takes {sorted([*names, 'loss', 'f_scale'])}"
        )
    limits = [name for name in trials if options.get(name) is not None]
    if len(limits) > 1:
        raise TypeError(
            f"`max_nfev` and `maxfev` are two names of one limit, got {options['max_nfev']!r} and "
            f"{options['maxfev']!r}"
        )
    for name in limits:
        require_integer(name, options[name], 1)
    given = {names[name]: value for name, value in options.items() if value is not None}
    return replace(config, **given)


def _require_method(method: str | None, space: ParameterSpace) -> str:
    is_bounded = bool(np.isfinite(space.lower).any() or np.isfinite(space.upper).any())
    if method is None:
        return "trf" if is_bounded else "lm"
    require_choice("method", method, ("lm", "trf", "dogbox", "hybrid_streaming"))
    if method == "lm" and is_bounded:
        raise ValueError(
            "Method 'lm' only works for unconstrained problems. Use 'trf' or 'dogbox'."
        )
    return method
