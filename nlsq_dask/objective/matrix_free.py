r"""Fits of many parameters: gradients and products, on a sample here and on all rows in passes.

The preconditioner of a pass is the sample. At the same point its Gauss-Newton Hessian, scaled up
to all rows, differs from theirs by sampling noise alone, however ill-conditioned both are: with 20
rows for each parameter the eigenvalues of M⁻¹H are between about 0.5 and 2, and a few steps of
conjugate gradients bridge the two.

    M = E ((1 - α) (m / m_s) J_sᵀC J_s + (α + ε) D) E + P,

with D the diagonal of the first term, P the penalties' Hessian and ε `regularization_factor`. A
sample of fewer than 5 k rows is shrunk towards its diagonal, α = k / (k + m_s), as in Ledoit &
Wolf (2004); a larger one is not, since α puts a floor under the small eigenvalues that H has not
(α = 0.05 took 242 passes instead of 27 for sums of 2,000 steps). Where each parameter is seen by
few rows, most of the noise is in the diagonal, and E scales it to what random vectors say of all
rows: the first pass of products takes them along.

M is never formed: each solve is one of conjugate gradients on the sample, preconditioned by its
diagonal, and within the same bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np

from nlsq_dask._typing import Bool, Float, Vector
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.evaluate.base import Request
from nlsq_dask.normal_equations import CostGradient, Sums
from nlsq_dask.objective.dense import Passes
from nlsq_dask.objective.on_sample import SampleObjective
from nlsq_dask.objective.penalised import build_penalty_products, penalised_slope
from nlsq_dask.parameters.penalties import PenaltyRows
from nlsq_dask.solvers.acceptance import Tolerances
from nlsq_dask.solvers.conjugate import Limits, begin, minimize_quadratic
from nlsq_dask.solvers.minimize import minimize
from nlsq_dask.solvers.truncated_newton import (
    NewtonState,
    Preconditioner,
    Products,
    Slope,
    TruncatedNewton,
)
from nlsq_dask.status import Status

__all__ = ["FullProducts", "SampleFit", "SampleProducts", "fit_sample"]

_INNER_PRODUCTS = 500  # on the sample, in one solve with M
_INNER_TOLERANCE = 1e-3  # of its residual: a pass costs more than a digit
_ENOUGH_ROWS = 5  # of the sample, for each parameter
_NUM_PROBES = 4  # random vectors that calibrate the preconditioner
_MAX_RATIO = 3.0  # of a parameter's diagonal over all rows to the sample's
_SAMPLE_PRODUCTS = 2000  # in each trial on the sample
_SAMPLE_TOLERANCE = 1e-2
_SAMPLE_TRIALS = 200
# Of the sample's own standard errors: its optimum is some √k of them away from that of all rows.
_SAMPLE_DISTANCE = 1e-2


class SampleProducts:
    """The sample in memory, in one block: gradients, products, and the Hessian's diagonal."""

    def __init__(self, objective: SampleObjective) -> None:
        self.objective = objective
        self.space = objective.problem.space
        with jax.enable_x64(True):
            self._chunk = jax.device_put(objective.block(0))

    @property
    def num_rows(self) -> int:
        return self.objective.num_rows

    @property
    def penalty(self) -> PenaltyRows:
        return self.objective.penalty(range(1))

    def slope(self, params: Vector) -> CostGradient:
        """Cost and gradient by all parameters, without penalties."""
        kernel = self.objective.reverse.gradient
        slope, _ = self._call(kernel, self.space.expand(params), precision="float64")
        return CostGradient(cost=slope.cost, num_rows=slope.num_rows, grad=slope.grad)

    def products(
        self, params: Vector, vectors: Float[np.ndarray, "v k"]
    ) -> Float[np.ndarray, "v k"]:
        """``JᵀC J v``, without penalties; one by one, so that one number of them compiles."""
        kernel = self.objective.reverse.products
        everything = self.space.expand(params)
        each = []
        for vector in self.space.embed(vectors.T).T:
            done, _ = self._call(kernel, everything, vector[None], precision="float64")
            each.append(done.products[0, self.space.is_free])
        return np.stack(each)

    def diagonal(self, params: Vector) -> Float[np.ndarray, " k"]:
        """Of ``JᵀC J``, estimated (see `nlsq_dask.kernels.reverse`)."""
        diagonal: Vector = self._call(self.objective.reverse.diagonal, self.space.expand(params))
        return np.asarray(diagonal[self.space.is_free])

    def _call(self, kernel: Any, *arguments: Vector, **options: str) -> Any:
        with jax.enable_x64(True):
            return jax.device_get(kernel(*arguments, self.objective.terms, self._chunk, **options))


@dataclass(frozen=True, kw_only=True, eq=False)
class _SampleHessian:
    """The sample's Hessian at a point, scaled to a number of rows; as its diagonal solves it."""

    sample: SampleProducts
    params: Float[np.ndarray, " k"]
    rows: float  # over those of the sample
    penalty: PenaltyRows

    @cached_property
    def _sample_diagonal(self) -> Float[np.ndarray, " k"]:
        return np.asarray(self.rows * self.sample.diagonal(self.params))

    @cached_property
    def data_diagonal(self) -> Float[np.ndarray, " k"]:
        """Of the rows' part, nearly.

        What the sample does not see gets what one row of it may weigh.
        """
        diagonal = self._sample_diagonal
        seen = diagonal[diagonal > 0]
        share = min(1.0, len(diagonal) / max(self.sample.num_rows, 1))
        unseen = share * float(np.median(seen)) if seen.size else 1.0
        return np.asarray(np.where(diagonal > 0, diagonal, unseen))

    @property
    def is_seen(self) -> Bool[np.ndarray, " k"]:
        return np.asarray((self._sample_diagonal > 0) | (self.penalty_diagonal > 0))

    @property
    def penalty_diagonal(self) -> Float[np.ndarray, " k"]:
        """Without what ties add to it."""
        space = self.sample.space
        return np.asarray(self.penalty.diagonal(space.size)[space.is_free])

    @cached_property
    def scale(self) -> Float[np.ndarray, " k"]:
        return np.asarray(np.sqrt(self.data_diagonal + self.penalty_diagonal))

    def data_products(self, vectors: Float[np.ndarray, "v k"]) -> Float[np.ndarray, "v k"]:
        """Of the rows' part."""
        return np.asarray(self.rows * self.sample.products(self.params, vectors))

    @cached_property
    def penalty_products(self) -> Callable[[Float[np.ndarray, "v k"]], Float[np.ndarray, "v k"]]:
        problem = self.sample.objective.problem
        return build_penalty_products(problem, self.penalty, self.params)

    def __call__(self, residual: Vector, low: Vector, high: Vector) -> Vector:
        return np.asarray(np.clip(residual / self.scale**2, low, high))


@dataclass(kw_only=True, eq=False)
class _Calibration:
    """How much larger the diagonal over all rows is than the sample's: 1 until it is known."""

    ratio: Float[np.ndarray, " k"] | None = None

    def learn(
        self, directions: Float[np.ndarray, "v k"], differences: Float[np.ndarray, "v k"]
    ) -> None:
        """From products of ``H - H_s`` with random signs, in units of its diagonal.

        What they say differs from the diagonal by what is beside it. As much as the products
        disagree on is left out, by James and Stein's factor.
        """
        each = directions * differences
        mean, noise = each.mean(axis=0), each.var(axis=0, ddof=1).sum() / len(each)
        signal = float(mean @ mean)
        kept = max(0.0, 1 - noise / signal) if signal > 0 else 0.0
        self.ratio = np.clip(1 + kept * mean, 1 / _MAX_RATIO, _MAX_RATIO)


@dataclass(frozen=True, kw_only=True, eq=False)
class _ShrunkHessian:
    """M, solved by conjugate gradients on the sample."""

    hessian: _SampleHessian
    shrinkage: float  # α
    regularization: float  # ε
    calibration: _Calibration

    @property
    def scale(self) -> Float[np.ndarray, " k"]:
        return self.hessian.scale

    @property
    def is_seen(self) -> Bool[np.ndarray, " k"]:
        return self.hessian.is_seen

    def __call__(self, residual: Vector, low: Vector, high: Vector) -> Vector:
        hessian, ratio = self.hessian, self.calibration.ratio
        root = np.ones(len(residual)) if ratio is None else np.sqrt(ratio)
        data = root**2 * hessian.data_diagonal
        added = self.shrinkage + self.regularization
        ridge = np.where(hessian.is_seen, added, 1.0) * data
        whole = (1 + self.regularization) * data + hessian.penalty_diagonal

        def product(vectors: Float[np.ndarray, "v k"]) -> Float[np.ndarray, "v k"]:
            rows = (1 - self.shrinkage) * root * hessian.data_products(root * vectors)
            return np.asarray(rows + ridge * vectors + hessian.penalty_products(vectors))

        def precondition(residual: Vector, low: Vector, high: Vector) -> Vector:
            return np.asarray(np.clip(residual / whole, low, high))

        start = begin(-residual, (low, high), np.sqrt(whole), precondition)
        limits = Limits(
            max_products=_INNER_PRODUCTS, tolerance=_INNER_TOLERANCE * start.first_length
        )
        return minimize_quadratic(product, start, precondition, limits).step


@dataclass(frozen=True)
class _SampleEvaluate:
    """``(params, vectors) -> Slope or Products`` on the sample."""

    sample: SampleProducts

    def __call__(
        self, params: Vector, vectors: Float[np.ndarray, "v k"] | None = None
    ) -> Slope | Products:
        hessian = _SampleHessian(
            sample=self.sample, params=params, rows=1.0, penalty=self.sample.penalty
        )
        if vectors is not None:
            added = hessian.penalty_products(vectors)
            return Products(products=hessian.data_products(vectors) + added)
        problem = self.sample.objective.problem
        slope = self.sample.slope(params)
        normal, cost = penalised_slope(problem, hessian.penalty, params, slope)
        return Slope(params=params, normal=normal, precondition=hessian, penalty_cost=cost)


@dataclass(frozen=True, kw_only=True)
class SampleFit:
    """The optimum of the sample that is reached from `p0`."""

    params: Float[np.ndarray, " k"]
    cost: float
    num_trials: int
    num_products: int


def fit_sample(
    sample: SampleProducts, config: HybridStreamingConfig, tolerances: Tolerances
) -> SampleFit | None:
    """Truncated Newton on the sample, from `p0`; None where the model is not finite there."""
    space = sample.space
    is_everything = sample.objective.sample.is_everything
    solver = TruncatedNewton(
        bounds=space.free_bounds,
        tolerances=Tolerances(
            distance_tol=0.1 * tolerances.distance_tol if is_everything else _SAMPLE_DISTANCE,
            max_iterations=_SAMPLE_TRIALS,
            data_square=tolerances.data_square,
        ),
        max_products=_SAMPLE_PRODUCTS,
        relative_tolerance=_SAMPLE_TOLERANCE,
        absolute_tolerance=0.0,
        initial_radius=config.trust_region_initial,
    )
    evaluate = _SampleEvaluate(sample)
    num_products = 0

    def count(state: NewtonState) -> NewtonState:
        nonlocal num_products
        num_products += state.is_multiplying
        return state

    start = evaluate(space.p0[space.is_free])
    assert isinstance(start, Slope)
    state = minimize(evaluate, solver, count(solver.init(start)), count)
    if state.status is Status.NOT_FINITE:
        return None
    return SampleFit(
        params=state.params,
        cost=state.cost,
        num_trials=state.num_trials,
        num_products=num_products,
    )


@dataclass(kw_only=True)
class FullProducts(Passes):
    """Cost and gradient, or products, over all rows: each call is one pass."""

    products_of_sample: SampleProducts
    regularization: float
    calibration: _Calibration = field(default_factory=_Calibration)
    num_rows: float = 0.0  # that count

    def precondition(self, params: Vector, num_rows: float) -> Preconditioner:
        """M at a point. Products there are asked for next."""
        self.num_rows = num_rows
        return _ShrunkHessian(
            hessian=self._sample_hessian(params, num_rows),
            shrinkage=self._shrinkage(len(params)),
            regularization=self.regularization,
            calibration=self.calibration,
        )

    def __call__(
        self,
        params: Vector,
        vectors: Float[np.ndarray, "v k"] | None = None,
        center: float | None = None,
    ) -> Slope | Products:
        """One pass; in the first, `y` is summarised."""
        if vectors is not None:
            return Products(products=self._multiply(params, vectors))
        sums = self._pass(params, None, center)
        penalty = self.problem.penalties.rows(float(sums.normal.num_rows))
        normal, cost = penalised_slope(self.problem, penalty, params, sums.slope)
        return Slope(
            params=params,
            normal=normal,
            precondition=self.precondition(params, float(normal.num_rows)),
            penalty_cost=cost,
        )

    def _pass(
        self, params: Vector, vectors: Float[np.ndarray, "v k"] | None, center: float | None = None
    ) -> Sums:
        space = self.problem.space
        request = Request(
            params=space.expand(params),
            terms=self.sample.terms,
            vectors=None if vectors is None else space.embed(vectors.T).T,
            center=center,
            precision=self.precision,
        )
        return self.evaluate(request).sums

    def _multiply(
        self, params: Vector, vectors: Float[np.ndarray, "v k"]
    ) -> Float[np.ndarray, "v k"]:
        """Products; the first pass of them also calibrates the preconditioner."""
        hessian = self._sample_hessian(params, self.num_rows)
        signs = np.zeros((0, len(params)))
        if self.calibration.ratio is None and not self.sample.sample.is_everything:
            signs = np.random.default_rng(0).choice([-1.0, 1.0], (_NUM_PROBES, len(params)))
        root = np.sqrt(hessian.data_diagonal) if len(signs) else 1.0
        sums = self._pass(params, np.concatenate([vectors, signs / root]))
        products = np.asarray(sums.products.products)[:, self.problem.space.is_free]
        if len(signs):
            differences = products[len(vectors) :] - hessian.data_products(signs / root)
            self.calibration.learn(signs, differences / root)
        return np.asarray(products[: len(vectors)] + hessian.penalty_products(vectors))

    def _shrinkage(self, num_free: int) -> float:
        rows = self.products_of_sample.num_rows
        is_enough = self.sample.sample.is_everything or rows >= _ENOUGH_ROWS * num_free
        return 0.0 if is_enough else num_free / (num_free + rows)

    def _sample_hessian(self, params: Vector, num_rows: float) -> _SampleHessian:
        sample = self.products_of_sample
        return _SampleHessian(
            sample=sample,
            params=params,
            rows=num_rows / max(sample.num_rows, 1),
            penalty=self.problem.penalties.rows(num_rows),
        )
