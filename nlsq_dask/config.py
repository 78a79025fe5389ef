"""The options of a fit, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

__all__ = ["HybridStreamingConfig"]


@dataclass(frozen=True, kw_only=True)
class HybridStreamingConfig:
    """Options of the hybrid fit. Frozen; use `dataclasses.replace` to vary one.

    Parameters
    ----------
    max_warmup_iterations : int
        L-BFGS iterations on the sample, at most, from each start.
    lbfgs_history_size : int
        Pairs that L-BFGS keeps.
    num_starts : int
        Starts scattered around `p0` that are scored on the sample. The best few are refined
        there; distinct optima compete on all data in the first pass. 0 trusts `p0` alone.
    gauss_newton_max_iterations : int
        Trials over all data, at most.
    trust_region_initial : float
        First radius, as a multiple of the scaled length of the start (Moré 1978).
    distance_tol : float
        Stop once the estimated distance to the minimum is below this many standard errors,
        in every direction that the data determine.
    ftol, xtol, gtol : float, optional
        MINPACK's tests. Unset, they do not act: at many rows they are not scale-free.
    max_sample_fraction : float
        Share of the rows that the sample may hold (all of them below 50,000 rows).
    chunk_size : int, optional
        Rows that a kernel call handles at once, at most. Unset, it follows the store's chunks.
    cache_bytes : int, optional
        Decoded chunks that each process keeps between passes; 0 keeps none. Unset, up to
        40 % of the process's memory limit.
    prefetch : bool
        Read the next chunk while this one is computed.
    max_passes : int, optional
        Passes over all data, at most.
    max_seconds : float, optional
        Wall time after which no further pass is started.
    seed : int
        Seeds the sample and the starts; recorded in the result.

    Raises
    ------
    ValueError
        If a value is out of range; the message names it.
    """

    max_warmup_iterations: int = 500
    lbfgs_history_size: int = 10
    num_starts: int = 64
    gauss_newton_max_iterations: int = 100
    trust_region_initial: float = 1.0
    distance_tol: float = 1e-6
    ftol: float | None = None
    xtol: float | None = None
    gtol: float | None = None
    max_sample_fraction: float = 0.01
    chunk_size: int | None = None
    cache_bytes: int | None = None
    prefetch: bool = True
    max_passes: int | None = None
    max_seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_warmup_iterations", "num_starts", "seed"):
            self._require_int(name, minimum=0)
        for name in ("lbfgs_history_size", "gauss_newton_max_iterations"):
            self._require_int(name, minimum=1)
        for name, minimum in (("chunk_size", 1), ("cache_bytes", 0), ("max_passes", 1)):
            if getattr(self, name) is not None:
                self._require_int(name, minimum=minimum)
        for name in ("trust_region_initial", "distance_tol", "max_sample_fraction"):
            self._require_positive(name)
        for name in ("ftol", "xtol", "gtol", "max_seconds"):
            if getattr(self, name) is not None:
                self._require_positive(name)
        if self.max_sample_fraction > 1:
            raise ValueError(
                f"`max_sample_fraction` must be at most 1, got {self.max_sample_fraction!r}"
            )
        if not isinstance(self.prefetch, bool):
            raise ValueError(f"`prefetch` must be True or False, got {self.prefetch!r}")

    def _require_int(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_integer or value < minimum:
            raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value!r}")

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"`{name}` must be a positive finite number, got {value!r}")

    def as_dict(self) -> dict[str, int | float | bool | None]:
        """The options by name, for the record in a result."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
