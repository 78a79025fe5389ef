"""Where a fit of many parameters stands, as plain arrays: what a checkpoint holds of it.

The preconditioner is not among them: it is the sample's, and is put together again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from nlsq_dask._typing import Float, Int
from nlsq_dask.config import Precision
from nlsq_dask.evaluate.base import Account
from nlsq_dask.normal_equations import CostGradient, RowSummary
from nlsq_dask.objective.matrix_free import FullProducts, SampleFit
from nlsq_dask.solvers.acceptance import Progress
from nlsq_dask.solvers.conjugate import Conjugate, Direction
from nlsq_dask.solvers.truncated_newton import NewtonState, Slope
from nlsq_dask.telemetry import IterationRecord

__all__ = ["AfterPass", "NewtonStanding"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterPass:
    """Phase 2 after a pass, before any limit of the caller's is looked at."""

    precision: Precision
    left_precision: str  # why a lower one was left, if it was
    history: tuple[IterationRecord, ...]
    accounts: tuple[Account, ...]
    offending_leaves: tuple[int, ...]  # of the last pass
    summary: RowSummary
    bins: Float[np.ndarray, "bins four"]  # at the best point
    marks: Int[np.ndarray, " bins"] | None = None  # of the rows that were read


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slope:
    params: Float[np.ndarray, " k"]
    grad: Float[np.ndarray, " k"]
    cost: float
    num_rows: int
    penalty_cost: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Conjugate:
    grad: Float[np.ndarray, " k"]
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]
    scale: Float[np.ndarray, " k"]
    step: Float[np.ndarray, " k"]
    image: Float[np.ndarray, " k"]
    direction: Float[np.ndarray, " k"]
    length: float
    first_length: float
    num_products: int
    is_done: bool
    is_cut: bool
    memory_vectors: Float[np.ndarray, "memory k"]
    memory_images: Float[np.ndarray, "memory k"]
    memory_curvatures: Float[np.ndarray, " memory"]
    lanczos: Float[np.ndarray, "lanczos two"]


@dataclass(frozen=True, kw_only=True)
class _Progress(Progress):
    smallest_ratio: float
    residual_scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class NewtonStanding(AfterPass):
    """Of truncated Newton, at a trial or amid conjugate gradients."""

    progress: _Progress
    slope: _Slope
    conjugate: _Conjugate | None
    calibration: Float[np.ndarray, " k"] | None
    sample_fit: SampleFit | None

    @classmethod
    def of(
        cls,
        state: NewtonState,
        full: FullProducts,
        sample_fit: SampleFit | None,
        **after_pass: Any,
    ) -> NewtonStanding:
        """The standing of a solve."""
        normal = state.evaluation.normal
        return cls(
            progress=_Progress(**_common(_Progress, state)),
            slope=_Slope(
                params=state.evaluation.params,
                grad=np.asarray(normal.grad),
                cost=float(normal.cost),
                num_rows=int(normal.num_rows),
                penalty_cost=state.evaluation.penalty_cost,
            ),
            conjugate=None if state.conjugate is None else _flat(state.conjugate),
            calibration=full.calibration.ratio,
            sample_fit=sample_fit,
            **after_pass,
        )

    def state(self, full: FullProducts) -> NewtonState:
        """The solve, to go on with."""
        slope = self.slope
        evaluation = Slope(
            params=slope.params,
            normal=CostGradient(
                cost=np.asarray(slope.cost), num_rows=np.asarray(slope.num_rows), grad=slope.grad
            ),
            precondition=full.precondition(slope.params, float(slope.num_rows)),
            penalty_cost=slope.penalty_cost,
        )
        return NewtonState(
            **_common(NewtonState, self.progress),
            evaluation=evaluation,
            conjugate=None if self.conjugate is None else _deep(self.conjugate),
        )


def _common(kind: type, value: Any) -> dict[str, Any]:
    """The fields of a type that a value has as well."""
    names = [field.name for field in fields(kind)]
    return {name: vars(value)[name] for name in names if name in vars(value)}


def _flat(conjugate: Conjugate) -> _Conjugate:
    k, memory = len(conjugate.grad), conjugate.memory
    known = _common(_Conjugate, conjugate)
    known["lanczos"] = np.array(conjugate.lanczos, np.float64).reshape(-1, 2)
    return _Conjugate(
        **known,
        memory_vectors=np.array([past.vector for past in memory]).reshape(-1, k),
        memory_images=np.array([past.image for past in memory]).reshape(-1, k),
        memory_curvatures=np.array([past.curvature for past in memory], np.float64),
    )


def _deep(conjugate: _Conjugate) -> Conjugate:
    known = _common(Conjugate, conjugate)
    known["lanczos"] = tuple((float(a), float(b)) for a, b in conjugate.lanczos)
    rows = zip(
        conjugate.memory_vectors,
        conjugate.memory_images,
        conjugate.memory_curvatures.tolist(),
        strict=True,
    )
    return Conjugate(**known, memory=tuple(Direction(*row) for row in rows))
