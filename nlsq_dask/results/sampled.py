"""Some rows of the data of a fit, and the model's values in them, to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.model import Model
from nlsq_dask.results.outcome import Outcome
from nlsq_dask.results.rows import RowTask, pickled_model, token_of
from nlsq_dask.results.session import Session
from nlsq_dask.sample import draw_sample

__all__ = ["SampledRows", "sample_rows"]

_MAX_ROWS = 50_000


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledRows:
    """Valid rows, drawn at random from evenly spread chunks."""

    x: tuple[Float[np.ndarray, " m"], ...]
    y: Float[np.ndarray, " m"]
    value: Float[np.ndarray, " m"]  # of the model
    num_rows: int  # that there are

    @property
    def is_everything(self) -> bool:
        return len(self.y) == self.num_rows


def sample_rows(fit: Outcome, session: Session, model: Model, seed: int) -> SampledRows:
    """All rows of few data, and some 50,000 of many; the same for the same seed.

    At most a few hundred chunks are read, wherever the fit reads them.
    """
    source = session.problem.source
    with session.evaluator() as evaluator:
        sample = draw_sample(
            evaluator.map_chunks,
            source.num_chunks,
            source.num_rows,
            source.variables,
            max_fraction=_MAX_ROWS / source.num_rows,
            seed=seed,
        )
    every = (slice(0, sample.num_rows),)
    x = tuple(column.read(every).astype(np.float64) for column in sample.source.x)
    y = sample.source.y.read(every).astype(np.float64)
    payload = pickled_model(model, tuple(fit.shapes.values()))
    task = RowTask(
        quantity="prediction",
        token=token_of(payload),
        axes=((0,),) * len(x),
        times=(None,) * len(x),  # they are numbers already
        full_shape=y.shape,
    )
    value = task(*x, payload, fit.popt)
    return SampledRows(x=x, y=y, value=np.broadcast_to(value, y.shape), num_rows=fit.num_rows)
