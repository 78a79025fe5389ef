"""Traces of functions, to be compared with each other."""

from __future__ import annotations

import re
from typing import TypeAlias

import numpy as np
from jax.extend.core import ClosedJaxpr

__all__ = ["Trace", "trace_of"]

Trace: TypeAlias = tuple[str, tuple[bytes, ...]]


def trace_of(closed: ClosedJaxpr) -> Trace:
    """Operations and constants; those of a pure function are the same at every call."""
    text = re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr))  # addresses differ from trace to trace
    return text, tuple(np.asarray(const).tobytes() for const in closed.consts)
