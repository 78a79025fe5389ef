"""Whether the workers see a place that this process writes to."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import fsspec

from nlsq_dask.errors import WorkerError
from nlsq_dask.evaluate.workers import workers_of

__all__ = ["require_reach"]


def require_reach(client: Any, url: str, storage_options: Mapping[str, Any]) -> None:
    """See every worker read back what this process writes to `url`.

    Raises
    ------
    WorkerError
        Naming a worker that cannot, and the remedy.
    """
    workers_of(client)
    probe, written = f"{url}/probe", uuid.uuid4().hex
    with fsspec.open(probe, "wt", **storage_options) as file:
        file.write(written)
    options = dict(storage_options)
    try:
        answers: dict[str, Any] = client.run(_read_text, probe, options, on_error="return")
    finally:
        fs, path = fsspec.core.url_to_fs(probe, **options)
        fs.rm(path)
    for address, answer in answers.items():
        if answer == written:
            continue
        found = "another file" if isinstance(answer, str) else f"{type(answer).__name__}: {answer}"
        raise WorkerError(
            f"`spool` must be readable from every worker, but {address} does not see {url} "
            f"({found}); use a folder that all machines share, or the URL of an object store"
        )


def _read_text(url: str, storage_options: Mapping[str, Any]) -> str:
    with fsspec.open(url, "rt", **storage_options) as file:
        text: str = file.read()
        return text
