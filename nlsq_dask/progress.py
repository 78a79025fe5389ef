"""What a fit shows of itself while it runs: how far a pass is, and a line for each trial."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

from nlsq_dask.require import shown
from nlsq_dask.telemetry import Callback, IterationRecord

__all__ = [
    "BarProgress",
    "LogProgress",
    "OnLeaves",
    "Progress",
    "choose_progress",
    "over",
    "require_progress",
    "telling",
]

OnLeaves: TypeAlias = Callable[[int], object]  # as many more are done

_LOGGER = logging.getLogger("nlsq_dask")
_SILENT_SECONDS = 2.0  # a fit that takes no longer shows nothing unless it is told to
_LOG_EVERY_SECONDS = 30.0


class Progress(Protocol):
    """Told what goes on; `advance` comes from several threads, one at a time."""

    shows_trials: bool

    def restart(self) -> None:
        """What comes now is a piece of work of its own."""

    def begin(self, title: str, num_rows: int) -> None:
        """Something that goes over so many rows."""

    def advance(self, num_rows: int) -> None:
        """As many more of them are done."""

    def end(self) -> None:
        """It is over, whether it was finished or not."""

    def tell(self, record: IterationRecord) -> None:
        """What came of it."""


class BarProgress:
    """A bar of tqdm's, in a terminal or a notebook, and anywhere a line for each trial.

    Trials are left to the log where that is shown already. Nothing appears before the work has
    taken `delay_seconds`.
    """

    shows_trials = True

    def __init__(self, delay_seconds: float = 0.0) -> None:
        self._delay_seconds = delay_seconds
        self._bar: Any = None
        self.restart()

    def restart(self) -> None:
        self._show_from = time.perf_counter() + self._delay_seconds
        self._lines: list[str] = []

    def begin(self, title: str, num_rows: int) -> None:
        self._bar = _bars()(
            total=num_rows,
            desc=title,
            unit=" rows",
            unit_scale=True,
            leave=False,
            disable=not _is_watched(),
            file=_stream(),
            delay=max(0.0, self._show_from - time.perf_counter()),
        )

    def advance(self, num_rows: int) -> None:
        self._bar.update(num_rows)

    def end(self) -> None:
        self._bar.close()

    def tell(self, record: IterationRecord) -> None:
        if record.phase == 1 or _is_logged():
            return
        self._lines.append(str(record))
        if time.perf_counter() >= self._show_from:
            for line in self._lines:
                _bars().write(line, file=_stream())
            self._lines.clear()


class LogProgress:
    """A line in the log every half minute of a long pass. Trials are logged by the fit itself."""

    shows_trials = False

    def __init__(self) -> None:
        self._title, self._num_rows, self._done = "", 0, 0
        self._started = self._logged = 0.0

    def restart(self) -> None:
        return

    def begin(self, title: str, num_rows: int) -> None:
        self._title, self._num_rows, self._done = title, num_rows, 0
        self._started = self._logged = time.perf_counter()

    def advance(self, num_rows: int) -> None:
        self._done += num_rows
        now = time.perf_counter()
        if now - self._logged < _LOG_EVERY_SECONDS or self._done >= self._num_rows:
            return
        self._logged = now
        rate = self._done / (now - self._started)
        _LOGGER.info(
            "%s: %.0f %% of %s rows, %s rows/s, about %s to go",
            self._title,
            100 * self._done / self._num_rows,
            f"{self._num_rows:,}",
            f"{rate:,.0f}",
            _spoken((self._num_rows - self._done) / rate),
        )

    def end(self) -> None:
        return

    def tell(self, record: IterationRecord) -> None:
        return


@contextmanager
def over(progress: Progress, title: str, num_rows: int, num_leaves: int) -> Iterator[OnLeaves]:
    """Show `progress` of something over so many rows; by calls with the leaves that are done."""
    leaves_done, lock = 0, threading.Lock()

    def advance(more: int) -> None:  # from several threads; in whole rows, and all of them
        nonlocal leaves_done
        with lock:
            before = num_rows * leaves_done // num_leaves
            leaves_done += more
            progress.advance(num_rows * leaves_done // num_leaves - before)

    progress.begin(title, num_rows)
    try:
        yield advance
    finally:
        progress.end()


def choose_progress(progress: bool | None, verbose: int) -> Progress:
    """Bars where someone looks on, unless they were asked for or refused; else the log.

    Raises
    ------
    TypeError
        If `progress` is neither a bool nor None.
    """
    require_progress(progress)
    if progress is None:
        is_shown = verbose > 0 and _is_watched()
        return BarProgress(delay_seconds=_SILENT_SECONDS) if is_shown else LogProgress()
    return BarProgress() if progress else LogProgress()


def require_progress(progress: Any) -> None:
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"`progress` must be True, False or None, got {shown(progress)}")


def telling(progress: Progress, callback: Callback | None) -> Callback | None:
    """A callback that shows each record before it is passed on."""
    if not progress.shows_trials:
        return callback

    def tell(record: IterationRecord) -> None:
        progress.tell(record)
        if callback is not None:
            callback(record)

    return tell


def _is_watched() -> bool:
    """Whether someone sits at a terminal or a notebook."""
    return _is_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def _is_notebook() -> bool:
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _stream() -> Any:
    """Where notebooks have no red background."""
    return sys.stdout if _is_notebook() else sys.stderr


def _is_logged() -> bool:
    return _LOGGER.hasHandlers() and _LOGGER.isEnabledFor(logging.INFO)


def _bars() -> Any:
    """Widgets in a notebook that has them; else text. `tqdm.auto` warns where it has not."""
    if _is_notebook() and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as widget

        return widget
    from tqdm import tqdm

    return tqdm


def _spoken(seconds: float) -> str:
    """A time to go, to the precision that it is known with."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
