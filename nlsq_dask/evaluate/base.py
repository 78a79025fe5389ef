"""What is asked of a pass over the data, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from nlsq_dask._typing import Float
from nlsq_dask.config import Precision
from nlsq_dask.evaluate.marks import Marks
from nlsq_dask.evaluate.tree import Bin, Bins, Node, bin_level, fold_bins, fold_nodes
from nlsq_dask.normal_equations import Sums
from nlsq_dask.sources.base import Chunk
from nlsq_dask.terms import RowTerms

__all__ = ["Account", "Evaluator", "Pass", "RangeReport", "Request", "fold_reports"]

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One trial: normal equations at `params`, and what else the same reading can give.

    Without `directions` nothing of size ``n²`` is formed: a pass gives the gradient, or the
    products of Gauss-Newton's Hessian with `vectors`.
    """

    params: Float[np.ndarray, " n"]
    terms: RowTerms
    directions: Float[np.ndarray, "n k"] | None = None
    vectors: Float[np.ndarray, "v n"] | None = None
    rivals: Float[np.ndarray, "rivals n"] | None = None  # cost only
    center: float | None = None  # of the summary of y; None leaves it out
    with_scores: bool = False  # the parts of a sandwich covariance
    precision: Precision = "float64"
    names_leaves: bool = True  # those with sums that are not finite, or rows that are refused

    @property
    def kind(self) -> str:
        """What is asked for, in words: each kind is compiled once."""
        if self.directions is not None:
            return "normal equations"
        return "gradient" if self.vectors is None else f"products with {len(self.vectors)} vectors"


@dataclass(frozen=True, kw_only=True, eq=False)
class RangeReport:
    """What one task returns: sums by node of the tree, and how it went."""

    nodes: dict[Node, Sums]
    bins: dict[Node, Bin]
    bytes_read: int
    read_seconds: float  # in the reading threads, beside the computing
    busy_seconds: float
    num_compilations: int
    peak_memory_bytes: int
    process: str
    offending_leaves: tuple[int, ...] = ()
    marks: dict[int, int] = field(default_factory=dict)  # sums, by run of leaves
    missing: frozenset[str] = frozenset()  # keys of chunks that the store does not have
    num_retries: int = 0


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a pass took, kept when its sums are gone."""

    seconds: float
    bytes_read: int
    num_tasks: int
    read_seconds: float  # in the reading threads


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """The sums over all rows, and how they came about."""

    sums: Sums
    bins: Bins
    bytes_read: int
    seconds: float
    reports: tuple[RangeReport, ...] = field(default=(), repr=False)
    marks: Marks | None = None  # of the rows that were read

    @property
    def account(self) -> Account:
        return Account(
            seconds=self.seconds,
            bytes_read=self.bytes_read,
            num_tasks=len(self.reports),
            read_seconds=sum(report.read_seconds for report in self.reports),
        )

    @property
    def offending_leaves(self) -> tuple[int, ...]:
        """Leaves with values that were refused, or where the model is not finite."""
        return tuple(leaf for report in self.reports for leaf in report.offending_leaves)


def fold_reports(reports: Sequence[RangeReport], num_leaves: int) -> tuple[Sums, Bins]:
    """The sums over all leaves, and the bins, from what the ranges returned."""
    nodes = {node: sums for report in reports for node, sums in report.nodes.items()}
    bins = {node: kept for report in reports for node, kept in report.bins.items()}
    level = bin_level(num_leaves)
    return fold_nodes(nodes, num_leaves), fold_bins(nodes, bins, num_leaves, level)


class Evaluator(Protocol):
    """Reduces all rows to a few numbers, wherever the rows are."""

    @property
    def description(self) -> str:
        """Where the work is done, for the result."""

    @property
    def keeps_rows(self) -> bool:
        """Whether all rows were read into memory beforehand, so that nothing is read again."""

    def evaluate(self, request: Request) -> Pass:
        """One pass over all rows."""

    def map_chunks(
        self, function: Callable[[int, Chunk], _Value], indices: Sequence[int]
    ) -> list[_Value]:
        """``[function(i, chunk_i), …]``, computed where the chunks are."""

    def memory(self) -> dict[str, Any]:
        """Projected bytes for one process and the limit they were held against."""

    def log_event(self, event: Mapping[str, Any]) -> None:
        """Hand a record to whoever collects them where the work is done."""

    def close(self) -> None: ...
