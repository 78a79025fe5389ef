"""Where a fit writes its checkpoints, and what it is resumed from."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nlsq_dask._version import __version__
from nlsq_dask.checkpoint.file import (
    Sections,
    local_path,
    read_checkpoint,
    require_writable,
    write_checkpoint,
)
from nlsq_dask.checkpoint.flat import Leaf
from nlsq_dask.checkpoint.identity import identify, require_same, require_same_sample, sample_digest
from nlsq_dask.checkpoint.snapshot import Snapshot, from_sections, to_sections
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import CheckpointError, WorkerError
from nlsq_dask.problem import Problem
from nlsq_dask.sample import Sample

__all__ = ["Journal", "Places", "find_places", "open_journal"]

_LOGGER = logging.getLogger("nlsq_dask")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where checkpoints are written, and the one to go on from, already read."""

    path: Path | None = None
    resumed_from: Path | None = None
    saved: Sections = field(default_factory=dict)


class Journal:
    """The checkpoints of one fit. Without a path, nothing is written."""

    def __init__(
        self,
        *,
        path: Path | None,
        resumed_from: Path | None,
        resumed: Snapshot | None,
        identity: Mapping[str, Leaf],
        saved_identity: Mapping[str, Leaf],
    ) -> None:
        self.path = path
        self.resumed_from = resumed_from
        self.resumed = resumed
        self._identity = dict(identity)
        self._saved_identity = saved_identity
        self._has_written = False

    @property
    def is_used(self) -> bool:
        return self.path is not None or self.resumed_from is not None

    def meet_sample(self, sample: Sample) -> None:
        """Hold the rows drawn to those of the checkpoint.

        Raises
        ------
        CheckpointError
            If they differ.
        """
        if not self.is_used:
            return
        digest = sample_digest(sample)
        self._identity["data.sample"] = digest
        if self.resumed_from is not None:
            with _of_another_fit(self.resumed_from):
                require_same_sample(self._saved_identity, digest)

    def save(self, snapshot: Snapshot, about: Mapping[str, str]) -> None:
        """Replace the checkpoint, if one is kept.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        if self.path is None:
            return
        sections: Sections = {"identity": self._identity, "about": {**_versions(), **about}}
        write_checkpoint(self.path, sections | to_sections(snapshot))
        self._has_written = True
        _LOGGER.debug("Wrote the checkpoint %s.", self.path)

    @property
    def written(self) -> Path | None:
        """The checkpoint to go on from: written by this fit, or the one that it went on from."""
        return self.path if self._has_written else self.resumed_from

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Say from where to go on after what the fit itself is not to blame for."""
        try:
            yield
        except WorkerError as error:
            if self.written is None:
                raise
            raise WorkerError(str(error), self.written) from error
        except (OSError, MemoryError) as error:
            if self.written is not None:
                error.add_note(f"resume_from_checkpoint={str(self.written)!r} goes on from there")
            raise

    def describe(self) -> dict[str, str | None]:
        """For the result: what is written, and what was read."""
        paths = {"path": self.path, "resumed_from": self.resumed_from}
        return {name: None if path is None else str(path) for name, path in paths.items()}


def find_places(
    model: str, config: HybridStreamingConfig, checkpoint: str | os.PathLike[str] | None
) -> Places:
    """See that checkpoints can be written, and read the one to resume; before any work.

    Parameters
    ----------
    model : str
        Its name, for a file in a folder.
    config : HybridStreamingConfig
    checkpoint : path, optional

    Raises
    ------
    CheckpointError
        If there is no place to write, or the one to resume cannot be used.
    """
    resume_from = config.resume_from_checkpoint
    resumed_from = (
        None if resume_from is None else local_path("resume_from_checkpoint", resume_from)
    )
    path = _place(model, config, checkpoint, resumed_from)
    saved = {} if resumed_from is None else read_checkpoint(resumed_from)
    if path is not None:
        require_writable("checkpoint" if checkpoint is not None else "checkpoint_dir", path)
    return Places(path=path, resumed_from=resumed_from, saved=saved)


def open_journal(
    problem: Problem, config: HybridStreamingConfig, nan_policy: str, places: Places
) -> Journal:
    """Hold the checkpoint to resume to this fit.

    Raises
    ------
    CheckpointError
        If it is of another fit.
    """
    path, resumed_from, saved = places.path, places.resumed_from, places.saved
    if path is None and resumed_from is None:
        return Journal(path=None, resumed_from=None, resumed=None, identity={}, saved_identity={})
    identity = identify(problem, config, nan_policy)
    resumed = None
    if resumed_from is not None:
        with _of_another_fit(resumed_from):
            require_same(saved.get("identity", {}), identity, problem.space.labels)
        with _unusable(resumed_from):
            resumed = from_sections(saved, problem, config)
    return Journal(
        path=path,
        resumed_from=resumed_from,
        resumed=resumed,
        identity=identity,
        saved_identity=saved.get("identity", {}),
    )


def _place(
    model: str,
    config: HybridStreamingConfig,
    checkpoint: str | os.PathLike[str] | None,
    resumed_from: Path | None,
) -> Path | None:
    if checkpoint is not None:
        path = local_path("checkpoint", checkpoint)
        if not config.enable_checkpoints:
            raise CheckpointError(
                "`checkpoint` must be left out where the configuration has "
                f"`enable_checkpoints=False`, got {str(path)!r}"
            )
        return path
    if not config.enable_checkpoints:
        return None
    if resumed_from is not None or config.checkpoint_dir is None:
        return resumed_from
    return _open_folder(config.checkpoint_dir) / _name(model)


def _open_folder(folder: str) -> Path:
    path = local_path("checkpoint_dir", folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"`checkpoint_dir` must be a folder, or the name of a new one, got {folder!r}: "
            f"{type(error).__name__}: {error.strerror}"
        ) from error
    return path


def _name(model: str) -> str:
    """A file for each fit: by the model's name and the time."""
    started = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%fZ")
    return f"{re.sub(r'[^A-Za-z0-9_]+', '', model) or 'model'}-{started}.h5"


def _versions() -> dict[str, str]:
    return {
        "nlsq_dask": __version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "written": datetime.datetime.now(datetime.UTC).isoformat(),
    }


@contextmanager
def _of_another_fit(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"The checkpoint {str(path)!r} is of another fit: {error}") from None


@contextmanager
def _unusable(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"The checkpoint {str(path)!r} cannot be used: {error}") from None
