"""Jitted functions that outlive a fit: compiled once per process and model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

__all__ = ["Recent"]

_Value = TypeVar("_Value")


class Recent:
    """The values built most recently, by key. What they hold on to is bounded by their number."""

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, build: Callable[[], _Value]) -> _Value:
        """The value of the key, built if it is not there. `build` must be quick."""
        with self._lock:
            if key not in self._values:
                self._values[key] = build()
            self._values.move_to_end(key)
            while len(self._values) > self._max_values:
                self._values.popitem(last=False)
            kept: _Value = self._values[key]
            return kept

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def __len__(self) -> int:
        return len(self._values)
