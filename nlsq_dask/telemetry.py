"""What is recorded of each pass, and now and then of the warmup."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np

from nlsq_dask._typing import Float

__all__ = ["Callback", "IterationRecord"]

_MAX_EVENT_PARAMS = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class IterationRecord:
    """One pass over the data: the point tried, and where the fit stands after it.

    In the warmup (phase 1) it is of a descent on a block of the sample, and what has no meaning
    there is NaN.
    """

    phase: int  #: 1 the warmup, 2 the passes over all data
    iteration: int  #: within its phase
    num_passes: int
    params: Float[np.ndarray, " n"]  #: the best point so far, all parameters
    cost: float  #: ½ Σ r² there
    loss: float  #: 2 cost / m
    trial_cost: float  #: at the point tried in this pass
    relative_change: float  #: of the cost, negative when it fell
    accepted: bool
    gain: float  #: actual over predicted reduction; NaN where there was none
    distance: float  #: estimated, to the minimum, in standard errors
    damping: float
    radius: float
    optimality: float
    num_active: int
    num_rows: int
    bytes_read: int
    seconds: float  #: of the pass, or since the last record of the warmup
    is_product: bool = False  #: of conjugate gradients, at the best point: no trial

    @property
    def rows_per_second(self) -> float:
        """Of a pass; NaN in the warmup, which looks at the same few rows again and again."""
        if self.phase == 1:
            return np.nan
        return self.num_rows / self.seconds if self.seconds > 0 else np.inf

    def as_event(self) -> dict[str, Any]:
        """In plain numbers and lists, as messages carry them. Long parameters are left out."""
        event: dict[str, Any] = {
            field.name: vars(self)[field.name] for field in fields(self) if field.name != "params"
        }
        if len(self.params) <= _MAX_EVENT_PARAMS:
            event["params"] = self.params.tolist()
        return event

    def __str__(self) -> str:
        if self.phase == 1:
            return (
                f"warmup, iteration {self.iteration}: loss {self.loss:.9e} "
                f"on {self.num_rows:,} rows of the sample"
            )
        verdict = "accepted" if self.accepted else "rejected"
        if self.is_product:
            verdict = "conjugate gradients"
        change = "" if np.isnan(self.relative_change) else f" ({self.relative_change:+.1e})"
        return (
            f"pass {self.num_passes}: cost {self.trial_cost:.9e}{change}, "
            f"{verdict}, {self.distance:.1e} standard errors to go, "
            f"{self.rows_per_second:,.0f} rows/s"
        )


Callback: TypeAlias = Callable[[IterationRecord], object]
