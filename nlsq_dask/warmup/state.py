"""Where a warmup stands, as plain arrays: what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.solvers.lbfgs import Carry, Ending
from nlsq_dask.warmup.descents import Descent, Progress
from nlsq_dask.warmup.multistart import Round, Tournament

__all__ = ["WarmupState"]

_COUNTS = ("num_iterations", "num_clipped", "num_line_search_failures", "num_pairs")
_LOSSES = ("start_loss", "loss")
_POINTS = ("start", "end")


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmupState:
    """All that decides how a warmup goes on. Frozen; every leaf is an array or a number."""

    starts: Float[np.ndarray, "s k"]
    start_costs: Float[np.ndarray, " s"]
    progress: Progress
    tournament: Tournament | None

    @property
    def num_iterations(self) -> int:
        """Of the descents that ended."""
        return self.progress.num_iterations

    def after(self, progress: Progress) -> WarmupState:
        """The same warmup, further on."""
        return replace(self, progress=progress)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Numeric arrays by name; `from_arrays` reads them back bit for bit."""
        finished = self.progress.finished
        arrays: dict[str, np.ndarray] = {
            "starts": self.starts,
            "start_costs": self.start_costs,
            "finished/ending": np.array([d.ending for d in finished], np.int64),
        }
        for name in (*_COUNTS, *_LOSSES):
            kind = np.int64 if name in _COUNTS else np.float64
            arrays[f"finished/{name}"] = np.array([vars(d)[name] for d in finished], kind)
        for name in _POINTS:
            rows = [vars(d)[name] for d in finished]
            arrays[f"finished/{name}"] = np.array(rows, np.float64).reshape(
                len(finished), self.starts.shape[1]
            )
        if self.progress.carry is not None:
            for field in fields(Carry):
                arrays[f"carry/{field.name}"] = np.asarray(vars(self.progress.carry)[field.name])
        if self.tournament is not None:
            rounds = self.tournament.rounds
            arrays["tournament/candidates"] = self.tournament.candidates
            arrays["tournament/num_rows"] = np.array([r.num_rows for r in rounds], np.int64)
            for number, held in enumerate(rounds):
                arrays[f"tournament/costs/{number}"] = held.costs
                arrays[f"tournament/survives/{number}"] = held.survives
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Self:
        """The state of `to_arrays`.

        Raises
        ------
        KeyError
            If an array is missing.
        ValueError
            If an ending is none of those known.
        """
        read = {name: np.asarray(value) for name, value in arrays.items()}
        progress = Progress(
            finished=tuple(_descent(read, i) for i in range(len(read["finished/ending"]))),
            carry=_carry(read) if "carry/point" in read else None,
        )
        return cls(
            starts=read["starts"],
            start_costs=read["start_costs"],
            progress=progress,
            tournament=_tournament(read) if "tournament/candidates" in read else None,
        )


def _descent(read: Mapping[str, np.ndarray], index: int) -> Descent:
    values: dict[str, Any] = {name: read[f"finished/{name}"][index] for name in _POINTS}
    values |= {name: float(read[f"finished/{name}"][index]) for name in _LOSSES}
    values |= {name: int(read[f"finished/{name}"][index]) for name in _COUNTS}
    return Descent(ending=Ending(int(read["finished/ending"][index])), **values)


def _carry(read: Mapping[str, np.ndarray]) -> Carry:
    values: dict[str, Any] = {field.name: read[f"carry/{field.name}"] for field in fields(Carry)}
    # Scalars are Python's in a carry, arrays NumPy's.
    values = {name: value if value.ndim else value.item() for name, value in values.items()}
    return Carry(**{**values, "ending": Ending(values["ending"])})


def _tournament(read: Mapping[str, np.ndarray]) -> Tournament:
    rounds = tuple(
        Round(
            num_rows=int(num_rows),
            costs=read[f"tournament/costs/{number}"],
            survives=read[f"tournament/survives/{number}"],
        )
        for number, num_rows in enumerate(read["tournament/num_rows"])
    )
    return Tournament(candidates=read["tournament/candidates"], rounds=rounds)
