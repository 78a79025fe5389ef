"""What is refused once rows were seen: of the model, of a sample, of all rows."""

from __future__ import annotations

from typing import Literal

import numpy as np

from nlsq_dask.errors import DataError
from nlsq_dask.evaluate.base import Pass
from nlsq_dask.model import check_elementwise
from nlsq_dask.problem import Problem
from nlsq_dask.require import is_scale
from nlsq_dask.sample import Sample

__all__ = ["NanPolicy", "screen_model", "screen_rows", "screen_sample"]

NanPolicy = Literal["omit", "raise"]

_TRIED_ROWS = 4096


def screen_model(problem: Problem, sample: Sample, seed: int) -> None:
    """See that the model is elementwise, at `p0` and beside it.

    At a start of zero a term that mixes rows may be invisible.

    Raises
    ------
    ModelError
    """
    space = problem.space
    x = [column.read((slice(0, _TRIED_ROWS),)) for column in sample.source.x]
    for params in (space.p0, space.beside(space.p0, seed)):
        parts = [np.asarray(part) for part in space.unflatten(params)]
        check_elementwise(problem.model, x, parts, problem.fingerprint)


def screen_sample(sample: Sample, nan_policy: NanPolicy) -> None:
    """See what can be seen before the first pass.

    Raises
    ------
    DataError
    """
    if sample.smallest_sigma < np.inf and not is_scale(sample.smallest_sigma):
        raise DataError(
            "`sigma` must be positive in every row, of a size whose square is a number, "
            f"got {sample.smallest_sigma!r}"
        )
    _refuse_invalid(sample.num_invalid, "a sample of", nan_policy)


def screen_rows(problem: Problem, first: Pass, nan_policy: NanPolicy) -> None:
    """See what only a pass over all rows can see.

    Raises
    ------
    DataError
        Naming the chunks.
    """
    rows, chunks = first.sums.rows, list(first.offending_leaves)
    if int(rows.num_bad_sigma):
        raise DataError(
            f"`sigma` must be positive in every row, got {int(rows.num_bad_sigma):,} rows "
            f"where it is not, in chunks {chunks}"
        )
    if int(rows.num_stray):
        variable = problem.model.variables[0]
        largest = len(problem.group_weights or ()) - 1
        raise DataError(
            f"{variable!r}, the model's first variable, must hold the number of a group in "
            f"`residual_weights`, whole and from 0 to {largest}, got "
            f"{int(rows.num_stray):,} rows where it does not, in chunks {chunks}"
        )
    _refuse_invalid(int(rows.num_invalid), "all of", nan_policy)


def _refuse_invalid(num_invalid: int, where: str, nan_policy: NanPolicy) -> None:
    if num_invalid and nan_policy == "raise":
        raise DataError(
            f"`ds` must be finite with nan_policy='raise', got {num_invalid:,} rows with "
            f"NaN or infinity in {where} the data; nan_policy='omit' leaves them out"
        )
