"""The one optimizer behind every door: where to compute, and the phases there."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import scipy

from nlsq_dask._typing import Float, ModelFunction, Vector
from nlsq_dask.building import build_problem
from nlsq_dask.checkpoint.journal import find_places
from nlsq_dask.compilation import keep_compiled, require_folder
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.criterion import Criterion
from nlsq_dask.errors import FitInterrupted
from nlsq_dask.evaluate.clients import active_client, require_client
from nlsq_dask.parameters.given import BoundsLike, StartsLike
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.phases import fit_problem
from nlsq_dask.places import choose_client, open_evaluator_at, platform_at
from nlsq_dask.progress import choose_progress, require_progress, telling
from nlsq_dask.require import require_callback, shown
from nlsq_dask.resolve import GivenModel, ModelledRows, given_model, require_absent
from nlsq_dask.results.report import with_origin
from nlsq_dask.results.result import FitResult
from nlsq_dask.results.streaming import PHASE_NAMES, phase_history
from nlsq_dask.screening import NanPolicy
from nlsq_dask.sources.batches import CHUNK_ROWS, Spool
from nlsq_dask.telemetry import Callback
from nlsq_dask.warmup.normalization import ParameterNormalizer
from nlsq_dask.warn import warn_user

__all__ = [
    "AdaptiveHybridStreamingOptimizer",
    "open_spool",
    "require_config",
]


class AdaptiveHybridStreamingOptimizer:
    """A sample's optimum first, then a trust region over all rows: the fit of this package.

    `fit_dataset` and `curve_fit` are doors to it. It keeps nothing but its configuration and
    the last result.

    Parameters
    ----------
    config : HybridStreamingConfig, optional

    Examples
    --------
    >>> import jax.numpy as jnp, numpy as np
    >>> def decay(x, amplitude, rate):
    ...     return amplitude * jnp.exp(-rate * x)
    >>> x = np.linspace(0.0, 10.0, 1000)
    >>> optimizer = AdaptiveHybridStreamingOptimizer()
    >>> result = optimizer.fit((x, 2.0 * np.exp(-0.5 * x)), decay, p0=[1.0, 1.0])
    >>> bool(np.allclose(result.popt, [2.0, 0.5]))
    True
    """

    def __init__(self, config: HybridStreamingConfig | None = None) -> None:
        self._config = require_config(config)
        self._result: FitResult | None = None

    @property
    def config(self) -> HybridStreamingConfig:
        return self._config

    # -- fits

    def fit(
        self,
        data_source: Any = None,
        func: ModelFunction | None = None,
        p0: StartsLike = None,
        bounds: BoundsLike = None,
        sigma: Any = None,
        absolute_sigma: bool = False,
        callback: Callback | None = None,
        verbose: int | None = None,
        *,
        model: ModelFunction | None = None,
        x_data: Any = None,
        y_data: Any = None,
        loss: str = "linear",
        f_scale: float | str = 1.0,
        client: Any = None,
        spool: str | os.PathLike[str] | None = None,
        spool_limit_bytes: int | None = None,
        progress: bool | None = None,
    ) -> FitResult:
        """Fit a function to rows: ``fit(data, func, p0)`` or ``fit(model=, x_data=, y_data=)``.

        Parameters
        ----------
        data_source : tuple, iterator, Spool, Dataset, str, path, zarr store or Source, optional
            ``(x, y)`` or ``(x, y, sigma)`` of arrays or Dask arrays, rows first: `x` of shape
            ``(m,)`` or ``(m, variables)``. Or an iterator of such tuples, a generator for
            instance, all of whose rows are spooled and fitted; or a `Spool` of them. Or what
            `fit_dataset` takes, whose variables are arguments of `func` by name; a store of
            just ``x`` and ``y``, rows first, goes by position.
        func, model : callable
            ``func(x, p1, p2, …)`` in JAX's NumPy; `x` arrives as it is given, ``(rows,)`` or
            ``(rows, variables)``. Either name will do, but not both.
        p0 : sequence or mapping, optional
            Starts. By default the function's own, else 1 clipped into the bounds.
        bounds : ``(lower, upper)``, mapping by name or `scipy.optimize.Bounds`, optional
        sigma : scalar or ``(m,)``, optional
            Standard deviations of `y`; the name of a variable for a dataset; in each batch of an
            iterator.
        absolute_sigma : bool
            Whether `sigma` is known, or only its ratios count.
        callback : callable, optional
            Called with an `IterationRecord` after each pass; raising StopIteration ends the fit.
        verbose : {0, 1, 2}, optional
            Instead of the configuration's, for this fit.
        x_data, y_data : arrays
            In place of `data_source`. Beside a dataset, the names of its variables.
        loss, f_scale, client, progress
            As in `fit_dataset`.
        spool : str or path, optional
            Where the batches of an iterator are kept for the fit: a folder, local or by URL, that
            the workers of the client can read. By default the folder of temporary files.
        spool_limit_bytes : int, optional
            By default half of what is free on a local disk.

        Returns
        -------
        FitResult
            A fit that did not converge is returned too, and says so. Residuals of an iterator's
            rows cannot be had: ``result["fun"]`` is None.

        Raises
        ------
        ModelError, ValueError, TypeError, DataError, MemoryProjectionError
            As `fit_dataset`; for an iterator, with the number of the batch.
        WorkerError
            If a worker cannot read the spool: before the first batch is asked for.
        SpoolLimitError
            If the batches are more than the spool may hold.
        """
        require_callback(callback)
        require_client(client)
        require_progress(progress)
        self._with_verbose(verbose)
        criterion = Criterion(loss=loss, f_scale=f_scale, absolute_sigma=absolute_sigma)
        given = given_model(func, model, p0, bounds)
        if isinstance(data_source, Iterator):
            require_absent(
                "batches, which have their own", sigma=sigma, x_data=x_data, y_data=y_data
            )
            opened: AbstractContextManager[ModelledRows] = self._spooled(
                data_source, given, client, spool, spool_limit_bytes
            )
        else:
            require_absent(
                "data that are not batches", spool=spool, spool_limit_bytes=spool_limit_bytes
            )
            opened = nullcontext(given.rows_of(data_source, sigma, x_data, y_data))
        with opened as rows:
            return self.fit_rows(
                rows,
                given.space(rows),
                criterion=criterion,
                client=client,
                callback=callback,
                verbose=verbose,
                progress=progress,
            )

    @contextmanager
    def _spooled(
        self,
        batches: Iterator[Any],
        given: GivenModel,
        client: Any,
        location: str | os.PathLike[str] | None,
        limit_bytes: int | None,
    ) -> Iterator[ModelledRows]:
        """The rows of all batches, for as long as the fit needs them."""
        with open_spool(location, client=client, limit_bytes=limit_bytes) as spool:
            # What can be seen to be wrong at the first batch need not wait for the last.
            for batch in batches:
                spool.extend([batch])
                if spool.num_rows:
                    break
            first = given.rows_spooled(spool)
            build_problem(first, given.space(first), Criterion(), self._config)
            spool.extend(batches)
            yield given.rows_spooled(spool)

    def fit_rows(
        self,
        rows: ModelledRows,
        space: ParameterSpace,
        *,
        criterion: Criterion | None = None,
        nan_policy: NanPolicy = "omit",
        client: Any = None,
        callback: Callback | None = None,
        verbose: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> FitResult:
        """Check what can be checked without data, choose where to compute, and fit."""
        started = datetime.now(UTC)
        config = self._with_verbose(verbose)
        display = choose_progress(progress, config.verbose)
        callback = telling(display, callback)
        if config.compilation_cache_dir is not None:
            require_folder(config.compilation_cache_dir)
            keep_compiled(config.compilation_cache_dir)
        criterion = Criterion() if criterion is None else criterion
        places = find_places(rows.model.name, config, checkpoint)
        client = choose_client(rows.source, space.num_free, client)
        platform = functools.partial(platform_at, client)
        problem = build_problem(rows, space, criterion, config, platform)
        open_evaluator = functools.partial(open_evaluator_at, problem, config, client, display)
        trace = functools.partial(
            with_origin, problem=problem, origin=rows.origin, nan_policy=nan_policy, started=started
        )
        try:
            result = trace(
                fit_problem(problem, open_evaluator, config, nan_policy, callback, places)
            )
        except FitInterrupted as interrupt:
            interrupt.result = None if interrupt.result is None else trace(interrupt.result)
            raise
        if rows.is_temporary:
            result = replace(result, session=None)
        self._result = result
        for text in result.diagnostics["warnings"]:
            warn_user(text, scipy.optimize.OptimizeWarning)
        return result

    def _with_verbose(self, verbose: int | None) -> HybridStreamingConfig:
        return self._config if verbose is None else replace(self._config, verbose=verbose)

    def set_residual_weights(self, weights: Sequence[float]) -> None:
        """Weight the squared residuals by group from the next fit on.

        Parameters
        ----------
        weights : sequence of float
            One for each group; the group of a row is the integer in its first variable.
        """
        self._config = replace(
            self._config,
            enable_residual_weighting=True,
            residual_weights=cast(Any, weights),  # made a tuple there
        )

    # -- the last fit, in NLSQ's words

    @property
    def current_phase(self) -> int:
        """0 before a fit, 3 after: all phases run in every fit."""
        return 0 if self._result is None else len(PHASE_NAMES) - 1

    @property
    def phase_history(self) -> list[dict[str, Any]]:
        """For each phase ``phase, phase_name, seconds, iterations``; empty before a fit."""
        if self._result is None:
            return []
        return phase_history(self._result.diagnostics, self._result.history)

    @property
    def phase_status(self) -> dict[str, Any]:
        """``current_phase, phase_name, phase_history, total_phases``."""
        return {
            "current_phase": self.current_phase,
            "phase_name": PHASE_NAMES[self.current_phase],
            "phase_history": self.phase_history,
            "total_phases": len(PHASE_NAMES),
        }

    @property
    def normalizer(self) -> ParameterNormalizer | None:
        """That of the warmup, over the free parameters; None before a fit, or without a warmup."""
        described = self._diagnostics.get("warmup", {}).get("normalization")
        return None if described is None else ParameterNormalizer(**described)

    @property
    def normalized_bounds(self) -> tuple[Vector, Vector] | None:
        """The bounds in the warmup's normalized parameters."""
        normalizer = self.normalizer
        return None if normalizer is None else normalizer.bounds

    @property
    def normalization_jacobian(self) -> Float[np.ndarray, "k k"] | None:
        """``D``, the derivative of the free parameters by the normalized ones."""
        normalizer = self.normalizer
        return None if normalizer is None else np.diag(normalizer.jacobian)

    @property
    def best_params_global(self) -> Vector | None:
        """The best parameters that the last fit evaluated over all rows."""
        return None if self._result is None else self._result.popt

    @property
    def best_cost_global(self) -> float:
        """``F`` there; infinite before a fit."""
        return np.inf if self._result is None else self._result.cost

    @property
    def multistart_diagnostics(self) -> dict[str, Any] | None:
        """How the starts fared; None before a fit, or without multistart."""
        return self._diagnostics.get("multistart")

    @property
    def _diagnostics(self) -> dict[str, Any]:
        return {} if self._result is None else self._result.diagnostics


# -- what is given


def open_spool(
    location: str | os.PathLike[str] | None = None,
    *,
    client: Any = None,
    limit_bytes: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Spool:
    """A place for batches that the workers of the client, given or active, can read.

    Raises
    ------
    WorkerError
        If one of them cannot.
    """
    spool = Spool(location, limit_bytes=limit_bytes, chunk_rows=chunk_rows)
    client = active_client() if client is None else client
    if client is not None:
        from nlsq_dask.evaluate.reach import require_reach

        with ExitStack() as undo:
            undo.callback(spool.close)
            require_reach(client, spool.url, spool.storage_options)
            undo.pop_all()
    return spool


def require_config(config: HybridStreamingConfig | None) -> HybridStreamingConfig:
    if config is None:
        return HybridStreamingConfig()
    if not isinstance(config, HybridStreamingConfig):
        raise TypeError(f"`config` must be a HybridStreamingConfig, got {shown(config)}")
    return config
