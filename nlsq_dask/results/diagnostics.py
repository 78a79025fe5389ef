"""What users are told to check, checked: numbers, and a sentence for each that is worrying."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nlsq_dask._typing import Float, Vector

__all__ = ["Checks", "check_fit", "describe_bins", "runs_of"]

_WORRYING_CONDITION = 1e8
_WORRYING_CORRELATION = 0.95
_WORRYING_MEAN = 5.0  # standard errors of the mean of the residuals
_MAX_PAIRS = 10
_MIN_BINS = 8  # fewer say nothing about their own scatter
_MANY_SIGMAS = 6.0
_MAX_RUNS = 64
_MIN_RUN = 16  # rows
_UNEVENLY_MASKED = 0.5
_FEW_CLUSTERS = 20


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Numbers that tell whether a fit can be trusted."""

    cost_reduction: float  # share of the cost at `p0` that is gone, on the sample
    gradient_cosines: dict[str, float]  # residuals against each column of J
    condition_number: float
    rank: float
    correlated_pairs: list[tuple[str, str, float]]
    residual_mean: float  # weighted
    residual_variance: float
    overdispersion: float  # variance of chunk means over that of independent residuals

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_bins(bins: Float[np.ndarray, "bins 4"], num_leaves: int) -> dict[str, Any]:
    """Rows, rows left out, mean and variance of the weighted residuals, by chunk.

    Archives of more than 1,024 leaves are summarised in at most as many runs of equal length.
    """
    rows, masked, first, second = bins.T
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mean = np.where(rows > 0, first / rows, np.nan)
        variance = np.where(rows > 0, second / rows - mean**2, np.nan)
    return {
        "leaves_per_bin": 1 << max(0, (-(-num_leaves // len(bins)) - 1).bit_length()),
        "num_rows": rows.astype(np.int64),
        "num_masked": masked.astype(np.int64),
        "residual_mean": mean,
        "residual_variance": variance,
    }


def overdispersion(bins: Float[np.ndarray, "bins 4"]) -> tuple[float, float]:
    """Scatter of chunk means over what independent rows would give, and its noise.

    ``Σ n_b (r̄_b - r̄)² / (s² (B - 1))`` is about 1 for independent residuals, with a standard
    deviation of ``√(2 / (B - 1))``.
    """
    kept = bins[bins[:, 0] > 1]
    if len(kept) < _MIN_BINS:
        return np.nan, np.nan
    rows, _, first, second = kept.T
    mean = first.sum() / rows.sum()
    variance = second.sum() / rows.sum() - mean**2
    if variance <= 0:
        return np.nan, np.nan
    between = float(np.sum(rows * (first / rows - mean) ** 2)) / (len(kept) - 1)
    return between / variance, float(np.sqrt(2 / (len(kept) - 1)))


def runs_of(residuals: Vector) -> Float[np.ndarray, "runs 4"]:
    """Residuals in their order, cut into runs: bins for data too few to be in many chunks."""
    num_runs = min(_MAX_RUNS, len(residuals) // _MIN_RUN)
    if num_runs < 1:
        return np.zeros((0, 4))
    parts = np.array_split(residuals, num_runs)
    return np.array([[len(part), 0, part.sum(), np.sum(part**2)] for part in parts], np.float64)


def correlated_pairs(
    covariance: Float[np.ndarray, "n n"], names: tuple[str, ...]
) -> list[tuple[str, str, float]]:
    """Pairs of parameters whose estimates are nearly one, the worst first."""
    errors = np.sqrt(np.diag(covariance))
    usable = np.flatnonzero(np.isfinite(errors) & (errors > 0))
    correlation = covariance[np.ix_(usable, usable)] / np.outer(errors[usable], errors[usable])
    i, j = np.triu_indices(len(usable), 1)
    strength = np.abs(correlation[i, j])
    order = np.argsort(-strength, kind="stable")
    order = order[strength[order] > _WORRYING_CORRELATION][:_MAX_PAIRS]
    return [
        (names[usable[i[o]]], names[usable[j[o]]], float(correlation[i[o], j[o]])) for o in order
    ]


def check_fit(
    *,
    start_cost: float,
    end_cost: float,
    cosines: dict[str, float],
    condition_number: float,
    rank: float,
    covariance: Float[np.ndarray, "n n"] | None,
    names: tuple[str, ...],
    bins: Float[np.ndarray, "bins 4"],
    runs: Float[np.ndarray, "runs 4"],
    is_linear_loss: bool,
    is_rounding: bool,
    num_clusters: int,
) -> tuple[Checks, list[str]]:
    """The checks, and sentences on what worries.

    `runs` stand in for `bins` where chunks are too few to say how their means scatter. Residuals
    that are rounding worry nobody.
    """
    rows, masked, first, second = bins.sum(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):  # residuals may be beyond any square
        mean = first / rows if rows else np.nan
        variance = second / rows - mean**2 if rows else np.nan
        scatter, noise = overdispersion(runs if len(runs) else bins)
        reduction = 1 - end_cost / start_cost if start_cost > 0 else 0.0
    checks = Checks(
        cost_reduction=reduction,
        gradient_cosines=cosines,
        condition_number=condition_number,
        rank=rank,
        correlated_pairs=[] if covariance is None else correlated_pairs(covariance, names),
        residual_mean=float(mean),
        residual_variance=float(variance),
        overdispersion=scatter,
    )
    texts = [*_about_parameters(checks), *_about_masks(bins, masked, rows)]
    is_off = variance > 0 and abs(mean) > _WORRYING_MEAN * np.sqrt(variance / rows)
    if is_linear_loss and is_off and not is_rounding:
        texts.append(
            f"the residuals' mean is {mean:.3g}, {abs(mean) / np.sqrt(variance / rows):.1f} of its "
            "standard errors from zero: the model may lack an offset"
        )
    if scatter > 1 + _MANY_SIGMAS * noise and not num_clusters and not is_rounding:
        texts.append(
            f"the residuals' means by chunk scatter {scatter:.1f} times as much as independent "
            "residuals would: neighbouring residuals depend on each other or the model misses a "
            f"trend, and standard errors are too small, by a factor of up to {np.sqrt(scatter):.1f}"
            "; `cluster=` gives standard errors that allow for it"
        )
    if 0 < num_clusters < _FEW_CLUSTERS:
        texts.append(
            f"{num_clusters} clusters are few for clustered standard errors, which tend to be too "
            f"small below some {_FEW_CLUSTERS}"
        )
    return checks, texts


def _about_parameters(checks: Checks) -> list[str]:
    texts = []
    if checks.cost_reduction < 0:
        texts.append("the cost on the sample is higher than at `p0`: the fit went astray")
    if checks.condition_number > _WORRYING_CONDITION:
        texts.append(
            f"the condition number of the scaled Jacobian is {checks.condition_number:.1e}: some "
            "parameters can hardly be told apart"
        )
    if checks.correlated_pairs:
        first, second, value = checks.correlated_pairs[0]
        more = len(checks.correlated_pairs) - 1
        others = f", and {more} more pair(s)" if more else ""
        if abs(value) > 0.999:
            texts.append(
                f"the estimates of {first} and {second} are correlated by {value:.5f}{others}: "
                "the data hardly tell them apart"
            )
    return texts


def _about_masks(bins: Float[np.ndarray, "bins 4"], masked: float, rows: float) -> list[str]:
    total = bins[:, 0] + bins[:, 1]
    shares: Vector = bins[:, 1] / np.where(total > 0, total, 1)
    overall = masked / max(masked + rows, 1.0)
    empty = int(np.sum((bins[:, 0] == 0) & (total > 0)))
    if empty and overall < _UNEVENLY_MASKED and len(bins) >= _MIN_BINS and shares.max() == 1.0:
        return [f"{empty} of {len(bins)} chunks have no row that counts"]
    return []
