"""Options from a TOML or JSON file: data, of which nothing is executed, within limits."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_options"]

_MAX_BYTES = 2**20


def read_options(path: Path) -> Any:
    """What a file ending in ``.json`` holds as JSON, and any other as TOML.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not a file, too large, nested too deeply, or malformed.
    """
    # A pipe would be waited for, a device may have no end.
    if path.exists() and not path.is_file():
        raise ValueError("it must be a file, got a folder, a pipe or a device")
    with open(path, "rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it must have at most {_MAX_BYTES:,} bytes, got more")
    text = content.decode("utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_once)
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it must not be nested as deeply as it is") from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Names with their values; JSON's rules leave open which of two values counts."""
    options: dict[str, Any] = {}
    for name, value in pairs:
        if name in options:
            raise ValueError(f"it must give {name[:100]!r} once, got it twice")
        options[name] = value
    return options
