"""Context variables that have a value for a while: what is below in the call sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["set_within"]

T = TypeVar("T")


@contextmanager
def set_within(variable: ContextVar[T | None], value: T | None) -> Iterator[None]:
    """Set it for the code within, and for the coroutines that this starts."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
