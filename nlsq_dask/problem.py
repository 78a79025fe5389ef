"""A problem: model, parameters and rows, checked once; what every process gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.kernels.build import KernelSpec
from nlsq_dask.model import Model
from nlsq_dask.parameters.penalties import Penalties
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.plan import Plan
from nlsq_dask.sources.base import Source
from nlsq_dask.terms import RowTerms

__all__ = ["CovarianceKind", "Problem"]

CovarianceKind: TypeAlias = Literal["classical", "HC0", "HC1", "clustered"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Minimise ``½ Σ s² ρ((r / s)²)`` and penalties over the rows of `source`.

    ``r = √weight (model(x, params) - y) / sigma``, and `s` is `f_scale`; None where it is to be
    estimated from the sample.
    """

    model: Model
    space: ParameterSpace
    source: Source
    plan: Plan
    absolute_sigma: bool = False
    loss: str = "linear"
    f_scale: float | None = 1.0
    group_weights: tuple[float, ...] | None = None
    penalties: Penalties = field(default_factory=Penalties)
    covariance: CovarianceKind = "classical"
    num_clusters: int = 0
    fingerprint: str | None = None  # of what the model computes, ties included
    description: str = "the data"  # of what was given, for messages

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(
            model=self.model,
            space=self.space,
            loss=self.loss,
            tile_shape=self.plan.tile_shape,
            products=self.plan.strategy.products,
            fingerprint=self.fingerprint,
        )

    def terms(self, fill: Float[np.ndarray, " variables"]) -> RowTerms:
        """The kernels' arguments that are the same for all chunks."""
        return RowTerms(
            fill=fill,
            f_scale=np.asarray(1.0 if self.f_scale is None else self.f_scale, np.float64),
            group_weights=None if self.group_weights is None else np.array(self.group_weights),
        )

    def directions(self, whitening: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "n k"]:
        """The columns of ``R⁻¹``, as directions among all parameters."""
        identity = np.eye(len(whitening))
        return self.space.embed(np.linalg.solve(whitening, identity))
