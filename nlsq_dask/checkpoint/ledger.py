"""What a fit has found out so far, pass by pass, and its way into checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nlsq_dask._typing import Vector
from nlsq_dask.checkpoint.journal import Journal
from nlsq_dask.checkpoint.newton_standing import AfterPass, NewtonStanding
from nlsq_dask.checkpoint.snapshot import Snapshot, Standing
from nlsq_dask.evaluate.base import Pass
from nlsq_dask.normal_equations import CurvatureProducts
from nlsq_dask.objective.dense import FullObjective, Passes
from nlsq_dask.objective.matrix_free import FullProducts, SampleFit
from nlsq_dask.results.report import Gate, ScoresPass
from nlsq_dask.solvers.truncated_newton import NewtonState
from nlsq_dask.solvers.trust_region import State
from nlsq_dask.telemetry import IterationRecord
from nlsq_dask.warmup.search import Warmup
from nlsq_dask.warmup.state import WarmupState

__all__ = ["Ledger"]


class Ledger:
    """The one thing of a fit that changes; every entry is frozen, and saved as it is made."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.f_scale = 1.0
        self.warmup: Warmup | None = None
        self.offending_leaves: tuple[int, ...] = ()  # of the last pass
        self._gate: Gate | None = None
        self.left_precision = ""
        self.history: tuple[IterationRecord, ...] = ()
        self.standing: Standing | None = None  # after the last pass
        self.newton: NewtonStanding | None = None  # in its place, where there are many parameters
        self.sample_fit: SampleFit | None = None
        resumed = journal.resumed
        if resumed is not None:
            self.f_scale, self.warmup = resumed.f_scale, resumed.warmup
            self.standing, self.newton = resumed.standing, resumed.newton
        if self.standing is not None:
            self._gate = self.standing.gate
        if self.newton is not None:
            self.sample_fit = self.newton.sample_fit
        after_pass = self.newton if self.standing is None else self.standing
        if after_pass is not None:
            self.history = after_pass.history
            self.offending_leaves = after_pass.offending_leaves
            self.left_precision = after_pass.left_precision

    @property
    def has_gate(self) -> bool:
        """Whether the first pass has decided between the sample's optima."""
        return self._gate is not None

    @property
    def gate(self) -> Gate:
        return Gate(costs=(), switched=False) if self._gate is None else self._gate

    def enter_gate(self, gate: Gate) -> None:
        """What the first pass decided. It is saved with the next entry."""
        self._gate = gate

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
        state = standing.state
        known = _known(standing, full.problem.space.expand(state.params))
        return replace(
            full,
            rival_costs=standing.rival_costs,
            with_curvature=state.wants_curvature,
            **known,
        )

    def open_products(self, full: FullProducts) -> FullProducts:
        """The same where there are many parameters."""
        newton = self.newton
        if newton is None:
            return full
        known = _known(newton, full.problem.space.expand(newton.progress.params))
        opened = replace(full, **known)
        opened.calibration.ratio = newton.calibration
        return opened

    def enter_warmup(self, warmup: Warmup | None) -> None:
        """What phase 1 came to."""
        self.warmup = warmup
        if not self.is_warm:
            self._write("warmup")

    def enter_pass(self, full: Passes, state: State | NewtonState) -> IterationRecord:
        """A pass, with the state as it is after it, whatever limit ends this process's part."""
        last, summary = full.last, full.summary
        assert last is not None
        assert summary is not None
        record = self._record(full, last, state)
        self.history = (*self.history, record)
        self.offending_leaves = last.offending_leaves
        after_pass: dict[str, Any] = {
            "precision": full.precision,
            "left_precision": self.left_precision,
            "history": self.history,
            "accounts": tuple(full.accounts),
            "offending_leaves": last.offending_leaves,
            "summary": summary,
            "bins": full.bins_at(state.params),
            "marks": full.marks,
        }
        if isinstance(state, NewtonState):
            assert isinstance(full, FullProducts)
            self.newton = NewtonStanding.of(state, full, self.sample_fit, **after_pass)
        else:
            assert isinstance(full, FullObjective)
            self.standing = Standing(
                state=state, gate=self._gate, rival_costs=full.rival_costs, **after_pass
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
                f_scale=self.f_scale,
                is_warm=True,
                warmup=self.warmup,
                standing=self.standing,
                newton=self.newton,
            ),
            {"phase": phase, "passes": str(len(self.history))},
        )

    def _record(self, full: Passes, last: Pass, state: State | NewtonState) -> IterationRecord:
        rows = int(last.sums.normal.num_rows)
        cost = float(last.sums.normal.cost)
        before = self.history[-1].cost if self.history else np.nan
        is_product = isinstance(last.sums.normal, CurvatureProducts)
        return IterationRecord(
            phase=2,
            iteration=full.num_passes,
            num_passes=full.num_passes,
            params=full.problem.space.expand(state.params),
            cost=state.cost,
            loss=2 * state.cost / rows if rows else np.nan,
            trial_cost=cost,
            relative_change=(cost - before) / before if before else np.nan,
            accepted=state.was_accepted and not is_product,
            gain=np.nan if is_product else state.gain,
            distance=float(state.remaining_distance),
            damping=state.step.damping,
            radius=state.radius,
            optimality=state.optimality,
            num_active=int(state.active.sum()),
            num_rows=rows,
            bytes_read=last.bytes_read,
            seconds=last.seconds,
            is_product=is_product,
        )


def _known(after_pass: AfterPass, at_best: Vector) -> dict[str, Any]:
    """What an earlier process found out, as fields of `Passes`."""
    return {
        "precision": after_pass.precision,
        "summary": after_pass.summary,
        "remembered": after_pass.summary,
        "marks": after_pass.marks,
        "accounts": list(after_pass.accounts),
        "bins": [(at_best, after_pass.bins)],
    }
