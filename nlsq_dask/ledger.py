"""What a fit has found out so far, pass by pass, and its way into checkpoints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nlsq_dask.journal import Journal
from nlsq_dask.objective import FullObjective
from nlsq_dask.report import Gate, ScoresPass
from nlsq_dask.snapshot import Snapshot, Standing
from nlsq_dask.solvers.trust_region import State
from nlsq_dask.telemetry import IterationRecord
from nlsq_dask.warmup import Warmup
from nlsq_dask.warmup_state import WarmupState

__all__ = ["Ledger"]


class Ledger:
    """The one thing of a fit that changes; every entry is frozen, and saved as it is made."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.f_scale = 1.0
        self.warmup: Warmup | None = None
        self.gate: Gate | None = None
        self.left_precision = ""
        self.history: tuple[IterationRecord, ...] = ()
        self.standing: Standing | None = None  # after the last pass
        resumed = journal.resumed
        if resumed is not None:
            self.f_scale, self.warmup, self.standing = (
                resumed.f_scale,
                resumed.warmup,
                resumed.standing,
            )
        if self.standing is not None:
            self.gate, self.history = self.standing.gate, self.standing.history
            self.left_precision = self.standing.left_precision

    @property
    def is_resumed(self) -> bool:
        return self._journal.resumed is not None

    @property
    def is_warm(self) -> bool:
        """Whether an earlier process finished the warmup."""
        return self._journal.resumed is not None and self._journal.resumed.is_warm

    @property
    def warmup_state(self) -> WarmupState | None:
        """Where an earlier process left the warmup."""
        return None if self._journal.resumed is None else self._journal.resumed.warmup_state

    @property
    def checkpoint(self) -> dict[str, str | None]:
        return self._journal.describe()

    def save_warmup(self, state: WarmupState) -> None:
        """Phase 1 under way."""
        snapshot = Snapshot(f_scale=self.f_scale, warmup_state=state)
        self._journal.save(snapshot, {"phase": "warmup", "iterations": str(state.num_iterations)})

    def open_objective(self, full: FullObjective) -> FullObjective:
        """The objective with what an earlier process found out by its passes."""
        standing = self.standing
        if standing is None:
            return full
        at_best = full.problem.space.expand(standing.state.params)
        return replace(
            full,
            precision=standing.precision,
            rival_costs=standing.rival_costs,
            summary=standing.summary,
            remembered=standing.summary,
            accounts=list(standing.accounts),
            bins=[(at_best, standing.bins)],
        )

    def enter_warmup(self, warmup: Warmup | None) -> None:
        """What phase 1 came to."""
        self.warmup = warmup
        if not self.is_warm:
            self._write("warmup")

    def enter_pass(self, full: FullObjective, state: State) -> IterationRecord:
        """A pass, with the state as it is after it, whatever limit ends this process's part."""
        record = self._record(full, state)
        self.history = (*self.history, record)
        last, summary = full.last, full.summary
        assert last is not None
        assert summary is not None
        self.standing = Standing(
            state=state,
            gate=self.gate,
            rival_costs=full.rival_costs,
            precision=full.precision,
            left_precision=self.left_precision,
            history=self.history,
            accounts=tuple(full.accounts),
            offending_leaves=last.offending_leaves,
            summary=summary,
            bins=full.bins_at(state.params),
        )
        self._write("passes")
        return record

    def enter_end(self, full: FullObjective, state: State, scores: ScoresPass | None) -> None:
        """The parts of the covariance. The state stays as it is: another limit goes on from it."""
        assert self.standing is not None
        bins = full.bins_at(state.params)
        self.standing = replace(self.standing, scores=scores, bins=bins)
        self._write("finished")

    def _write(self, phase: str) -> None:
        self._journal.save(
            Snapshot(
                f_scale=self.f_scale, is_warm=True, warmup=self.warmup, standing=self.standing
            ),
            {"phase": phase, "passes": str(len(self.history))},
        )

    def _record(self, full: FullObjective, state: State) -> IterationRecord:
        last = full.last
        assert last is not None
        rows = int(last.sums.normal.num_rows)
        cost = float(last.sums.normal.cost)
        before = self.history[-1].cost if self.history else np.nan
        return IterationRecord(
            phase=2,
            iteration=full.num_passes,
            num_passes=full.num_passes,
            params=full.problem.space.expand(state.params),
            cost=state.cost,
            loss=2 * state.cost / rows if rows else np.nan,
            trial_cost=cost,
            relative_change=(cost - before) / before if before else np.nan,
            accepted=state.was_accepted,
            gain=state.gain,
            distance=float(state.remaining_distance),
            damping=state.step.damping,
            radius=state.radius,
            optimality=state.optimality,
            num_active=int(state.active.sum()),
            num_rows=rows,
            bytes_read=last.bytes_read,
            seconds=last.seconds,
        )
