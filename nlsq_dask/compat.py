"""NLSQ's names for tiers of size, as doors to the one engine.

``from nlsq_dask.compat import …`` in place of ``from nlsq import …`` is meant to be all that a
script needs. There are no tiers here: whatever the door, all rows are fitted at once, in passes
over chunks, and never by averaging fits of parts. Functions are written with `jax.numpy`, and
arrays of several variables have rows first: `x` of shape ``(m, variables)``.

Functions raise `ConvergenceError`, a RuntimeError, where a fit does not converge; methods of the
classes return what there is, whose ``success`` says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Self

from nlsq_dask._typing import ModelFunction
from nlsq_dask.api import with_scipy_options
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.criterion import Criterion
from nlsq_dask.errors import ConvergenceError
from nlsq_dask.evaluate.clients import require_client
from nlsq_dask.model import parameter_names, unwrap_jit
from nlsq_dask.optimizer import AdaptiveHybridStreamingOptimizer, open_spool, require_config
from nlsq_dask.parameters.given import BoundsLike, StartsLike
from nlsq_dask.require import (
    require_choice,
    require_flag,
    require_integer,
    require_positive,
    shown,
)
from nlsq_dask.results.result import FitResult
from nlsq_dask.status import Status

__all__ = [
    "AdaptiveHybridStreamingOptimizer",
    "CurveFit",
    "CurveFitResult",
    "FitOptions",
    "HybridStreamingConfig",
    "LDMemoryConfig",
    "LargeDatasetFitter",
    "StreamingConfig",
    "StreamingOptimizer",
    "curve_fit",
    "curve_fit_large",
]

_METHODS = (None, "auto", "lm", "trf", "dogbox", "hybrid_streaming")


class CurveFitResult(tuple[Any, Any]):
    """``popt, pcov`` to unpack, and by attribute or key all of the `FitResult`."""

    result: FitResult

    def __new__(cls, result: FitResult) -> Self:
        made = super().__new__(cls, (result.popt, result.pcov))
        made.result = result
        return made

    def __getnewargs__(self) -> tuple[FitResult]:
        return (self.result,)

    def __getattr__(self, name: str) -> Any:
        if name == "result":  # not there yet, while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.result, name)

    def __getitem__(self, key: Any) -> Any:
        return self.result[key] if isinstance(key, str) else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key in self.result

    def __repr__(self) -> str:
        return repr(self.result)

    def __str__(self) -> str:
        return str(self.result)


@dataclass(frozen=True, kw_only=True, eq=False)
class FitOptions:
    """What every door takes by keyword beside the model, its start and the data.

    Parameters
    ----------
    bounds : 2-tuple or `scipy.optimize.Bounds`, optional
    method : {"auto", "lm", "trf", "dogbox", "hybrid_streaming"}, optional
        All are one solver here.
    loss, f_scale
        As in `fit_dataset`.
    absolute_sigma : bool
        Whether `sigma` is known, or only its ratios count.
    show_progress : bool
        Log a line for each pass to standard error, where the program logs nowhere else.
    verbose : {0, 1, 2}, optional
        Instead of the configuration's.
    client : distributed.Client, optional
    config : HybridStreamingConfig, optional
    ftol, xtol, gtol, max_nfev, maxfev : optional
        In place of the configuration's; `max_nfev` and `maxfev` are its
        `gauss_newton_max_iterations`.
    """

    bounds: BoundsLike = None
    method: str | None = None
    loss: str = "linear"
    f_scale: float | str = 1.0
    absolute_sigma: bool = False
    show_progress: bool = False
    verbose: int | None = None
    client: Any = None
    config: HybridStreamingConfig | None = None
    ftol: float | None = None
    xtol: float | None = None
    gtol: float | None = None
    max_nfev: int | None = None
    maxfev: int | None = None

    def __post_init__(self) -> None:
        require_choice("method", self.method, _METHODS)
        Criterion(loss=self.loss, f_scale=self.f_scale, absolute_sigma=self.absolute_sigma)
        require_flag("show_progress", self.show_progress)
        require_client(self.client)
        require_config(self.config)

    def fit(
        self, data: Any, model: ModelFunction, p0: StartsLike, sigma: Any = None
    ) -> CurveFitResult:
        """The one way from any door to the engine."""
        names = ("ftol", "xtol", "gtol", "max_nfev", "maxfev")
        options = {name: getattr(self, name) for name in names}
        optimizer = AdaptiveHybridStreamingOptimizer(
            with_scipy_options(require_config(self.config), options)
        )
        result = optimizer.fit(
            data,
            model,
            p0,
            self.bounds,
            sigma,
            self.absolute_sigma,
            verbose=self.verbose,
            loss=self.loss,
            f_scale=self.f_scale,
            client=self.client,
            progress=self.show_progress,
        )
        return CurveFitResult(result)


# -- arrays


def curve_fit(
    f: ModelFunction,
    xdata: Any,
    ydata: Any,
    p0: StartsLike = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    **options: Any,
) -> CurveFitResult:
    """Fit a function to arrays: `nlsq_dask.curve_fit` with rows first and NLSQ's result.

    Parameters
    ----------
    f : callable
        ``f(x, p1, p2, …)`` in JAX's NumPy.
    xdata : (m,) or (m, variables)
    ydata : (m,)
    p0 : sequence, optional
        By default the function's own, else 1 clipped into the bounds.
    sigma : scalar or ``(m,)``, optional
        Standard deviations of `ydata`.
    absolute_sigma : bool
    **options
        `FitOptions`: ``bounds``, ``method``, ``loss``, …

    Returns
    -------
    CurveFitResult
        ``popt, pcov``, with the attributes of `FitResult`.

    Raises
    ------
    ConvergenceError
        If the fit does not converge.
    """
    asked = FitOptions(absolute_sigma=absolute_sigma, **options)
    fitted = asked.fit((xdata, ydata), f, p0, sigma)
    if not fitted.success and fitted.status is not Status.UNIDENTIFIED:
        raise ConvergenceError(f"Optimal parameters not found: {fitted.message}")
    return fitted


def curve_fit_large(
    model: ModelFunction, x: Any, y: Any, p0: StartsLike = None, **options: Any
) -> CurveFitResult:
    """`curve_fit` by another name: there are no tiers here."""
    return curve_fit(model, x, y, p0, **options)


class CurveFit:
    """A fit to arrays, to be started by `fit`; without data, a holder of options.

    Parameters
    ----------
    model : callable, optional
    x : (m,) or (m, variables), optional
    y : (m,), optional
    p0 : sequence, optional
    sigma : scalar or ``(m,)``, optional
    **options
        `FitOptions`.
    """

    def __init__(
        self,
        model: ModelFunction | None = None,
        x: Any = None,
        y: Any = None,
        p0: StartsLike = None,
        *,
        sigma: Any = None,
        **options: Any,
    ) -> None:
        self._model, self._data, self._p0, self._sigma = model, (x, y), p0, sigma
        self._given = options
        self._options = FitOptions(**options)

    def fit(self) -> CurveFitResult:
        """The fit of all rows."""
        if self._model is None or any(part is None for part in self._data):
            raise TypeError("`CurveFit` must be given `model`, `x` and `y` to `fit` them")
        return self._options.fit(self._data, self._model, self._p0, self._sigma)

    def curve_fit(self, *args: Any, **options: Any) -> CurveFitResult:
        """`curve_fit`, with this object's options where none are given."""
        return curve_fit(*args, **{**self._given, **options})


@dataclass(frozen=True, kw_only=True)
class LDMemoryConfig:
    """How much memory a `LargeDatasetFitter` may take for rows that it works on.

    Parameters
    ----------
    max_memory_gb : float
        A ceiling on the rows of a chunk, reckoned at a kibibyte for each: its data and
        derivatives, and their copies. What a process really has is respected in any case.
    min_chunk_size : int
        Rows that a chunk may have even so.
    """

    max_memory_gb: float = 8.0
    min_chunk_size: int = 100_000

    def __post_init__(self) -> None:
        require_positive("max_memory_gb", self.max_memory_gb)
        require_integer("min_chunk_size", self.min_chunk_size, 1)

    @property
    def chunk_size(self) -> int:
        """Rows of a chunk, at most."""
        return max(self.min_chunk_size, int(self.max_memory_gb * 2**20))


class LargeDatasetFitter:
    """A fit to large arrays, Dask arrays included: of all rows at once.

    Parameters
    ----------
    model : callable
    x : (m,) or (m, variables)
    y : (m,)
    p0 : sequence, optional
    memory_config : LDMemoryConfig, optional
        By default chunks are planned from the data.
    sigma : scalar or ``(m,)``, optional
    **options
        `FitOptions`.
    """

    def __init__(
        self,
        model: ModelFunction,
        x: Any,
        y: Any,
        p0: StartsLike = None,
        memory_config: LDMemoryConfig | None = None,
        *,
        sigma: Any = None,
        **options: Any,
    ) -> None:
        self._model, self._data, self._p0, self._sigma = model, (x, y), p0, sigma
        chosen = FitOptions(**options)
        if not isinstance(memory_config, LDMemoryConfig | None):
            raise TypeError(
                f"`memory_config` must be an LDMemoryConfig, got {shown(memory_config)}"
            )
        if memory_config is not None:
            config = replace(require_config(chosen.config), chunk_size=memory_config.chunk_size)
            chosen = replace(chosen, config=config)
        self._options = chosen

    def fit(self) -> CurveFitResult:
        """The fit of all rows."""
        return self._options.fit(self._data, self._model, self._p0, self._sigma)

    def fit_with_progress(self) -> CurveFitResult:
        """`fit`, with a line for each pass."""
        options = replace(self._options, show_progress=True)
        return options.fit(self._data, self._model, self._p0, self._sigma)


# -- streams


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """The configuration of a `StreamingOptimizer`.

    Parameters
    ----------
    batch_size : int
        Rows in a chunk of the spool. Batches may be of any size.
    n_epochs : int
        Accepted and without effect: the fit makes the passes it needs, a few.
    optimizer : str
        Accepted and without effect: the fit is the exact one, not that of a first-order method.
    """

    batch_size: int = 100_000
    n_epochs: int = 15
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        require_integer("batch_size", self.batch_size, 1)


class StreamingOptimizer:
    """A fit to batches that come once: all of them are kept, and fitted exactly.

    Parameters
    ----------
    model : callable
        ``model(x, p1, p2, …)`` in JAX's NumPy.
    p0 : sequence, optional
    config : StreamingConfig, optional
    spool : str or path, optional
        A folder, local or by URL, where batches are kept until `close`. The workers of the
        client must be able to read it. By default the folder of temporary files.
    spool_limit_bytes : int, optional
        By default half of what is free on a local disk.
    **options
        `FitOptions`.

    Raises
    ------
    WorkerError
        If a worker cannot read the spool.

    Examples
    --------
    >>> import jax.numpy as jnp, numpy as np
    >>> def decay(x, amplitude, rate):
    ...     return amplitude * jnp.exp(-rate * x)
    >>> with StreamingOptimizer(decay, [1.0, 1.0]) as optimizer:
    ...     for start in range(3):
    ...         x = np.linspace(start, start + 1.0, 1000)
    ...         optimizer.update(x, 2.0 * np.exp(-0.5 * x))
    ...     popt, pcov = optimizer.result()
    >>> bool(np.allclose(popt, [2.0, 0.5]))
    True
    """

    def __init__(
        self,
        model: ModelFunction,
        p0: StartsLike = None,
        config: StreamingConfig | None = None,
        *,
        spool: str | os.PathLike[str] | None = None,
        spool_limit_bytes: int | None = None,
        **options: Any,
    ) -> None:
        config = StreamingConfig() if config is None else config
        if not isinstance(config, StreamingConfig):
            raise TypeError(f"`config` must be a StreamingConfig, got {shown(config)}")
        parameter_names(unwrap_jit(model))  # before any batch is kept
        self._model, self._p0 = model, p0
        self._options = FitOptions(**options)
        self._spool = open_spool(
            spool,
            client=self._options.client,
            limit_bytes=spool_limit_bytes,
            chunk_rows=config.batch_size,
        )

    def update(self, x_batch: Any, y_batch: Any, sigma_batch: Any = None) -> None:
        """Keep a batch: all of it, or with an error none.

        Parameters
        ----------
        x_batch : (rows,) or (rows, variables)
        y_batch : (rows,)
        sigma_batch : (rows,), optional

        Raises
        ------
        ValueError
            If it is not like the first batch, or the optimizer is closed.
        SpoolLimitError
            If the spool would hold more than its limit.
        """
        self._spool.append(x_batch, y_batch, sigma_batch)

    def result(self) -> CurveFitResult:
        """The fit of all batches so far. More may follow, and another `result`."""
        return self._options.fit(self._spool, self._model, self._p0)

    def close(self) -> None:
        """Remove the spool. Closing twice does nothing."""
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
