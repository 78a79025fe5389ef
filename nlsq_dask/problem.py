"""A problem: model, parameters and rows, checked once; what every process gets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.model import Model
from nlsq_dask.parameters import ParameterSpace
from nlsq_dask.plan import Plan
from nlsq_dask.sources.base import Source

__all__ = ["Problem"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Minimise ``½ Σ ((model(x, params) - y) / sigma)²`` over the rows of `source`."""

    model: Model
    space: ParameterSpace
    source: Source
    plan: Plan
    absolute_sigma: bool = False

    def directions(self, whitening: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "n k"]:
        """The columns of ``R⁻¹``, as directions among all parameters."""
        identity = np.eye(len(whitening))
        return self.space.embed(np.linalg.solve(whitening, identity))
