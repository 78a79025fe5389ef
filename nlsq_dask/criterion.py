"""What a fit minimises, beside model, rows and parameters; and which covariance it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.losses import LOSSES
from nlsq_dask.parameters.penalties import Penalties, build_priors, require_priors
from nlsq_dask.parameters.space import ParameterSpace
from nlsq_dask.problem import CovarianceKind
from nlsq_dask.require import as_number, is_scale, require_choice, require_flag, shown

__all__ = ["Criterion", "build_penalties"]

_KINDS = ("auto", "classical", "HC0", "HC1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Criterion:
    """The loss and its scale, priors, and the kind of covariance, checked once.

    Parameters
    ----------
    loss : {"linear", "soft_l1", "huber", "cauchy", "arctan"}
    f_scale : float or "mad"
        Where the loss begins to bend, in units of ``(model - y) / sigma``; "mad" takes it from
        the sample.
    absolute_sigma : bool
    priors : mapping, optional
        ``{name: (mean, width)}``.
    covariance : {"auto", "classical", "HC0", "HC1"}

    Raises
    ------
    ValueError
        If one is not as above, or there are priors without `absolute_sigma`.
    """

    loss: str = "linear"
    f_scale: float | str = 1.0
    absolute_sigma: bool = False
    priors: Mapping[str, Any] | None = None
    covariance: str = "auto"
    is_clustered: bool = False

    def __post_init__(self) -> None:
        require_choice("loss", self.loss, list(LOSSES))
        if not isinstance(self.f_scale, str) or self.f_scale != "mad":
            scale = as_number(self.f_scale)
            if scale is None or not is_scale(scale):
                raise ValueError(
                    "`f_scale` must be 'mad' or a positive number, of which the square is finite "
                    f"and not zero, got {shown(self.f_scale)}"
                )
        require_flag("absolute_sigma", self.absolute_sigma)
        require_priors(self.priors)
        if self.priors and not self.absolute_sigma:
            raise ValueError(
                "`priors` must go with `absolute_sigma=True`: they cannot be weighed against "
                "residuals of unknown scale"
            )
        require_choice("covariance", self.covariance, _KINDS)
        if self.is_clustered and self.covariance != "auto":
            raise ValueError(
                "`covariance` must be left out beside `cluster`, which is a sandwich of its own, "
                f"got {self.covariance!r}"
            )

    @property
    def known_scale(self) -> float | None:
        """The scale, or None where it is to be estimated."""
        if self.loss == "linear":
            return 1.0
        return None if isinstance(self.f_scale, str) else float(self.f_scale)

    @property
    def covariance_kind(self) -> CovarianceKind:
        """By default classical, and a sandwich for robust losses."""
        if self.is_clustered:
            return "clustered"
        if self.covariance == "HC0":
            return "HC0"
        is_robust = self.covariance == "auto" and self.loss != "linear"
        return "HC1" if is_robust or self.covariance == "HC1" else "classical"


def build_penalties(
    criterion: Criterion, space: ParameterSpace, config: HybridStreamingConfig
) -> Penalties:
    """Priors, and the variance of groups of parameters where the configuration asks for it.

    Raises
    ------
    ValueError
        If a prior or a group does not match the parameters.
    """
    index, means, widths = build_priors(space, criterion.priors)
    groups: tuple[tuple[int, int], ...] = ()
    if config.enable_group_variance_regularization:
        groups = config.group_variance_indices or ()
        beyond = [pair for pair in groups if pair[1] > space.size]
        if beyond:
            raise ValueError(
                f"`group_variance_indices` must lie within the {space.size} elements of the "
                f"parameter vector, got {beyond[0]}"
            )
    return Penalties(
        prior_index=np.asarray(index),
        prior_mean=means,
        prior_width=widths,
        groups=groups,
        group_lambda=config.group_variance_lambda,
    )
