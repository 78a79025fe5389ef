"""Functions that travel to other processes by value, whole modules of the user's included."""

from __future__ import annotations

import contextlib
import inspect
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

__all__ = ["module_by_value", "pickled_by_value"]

_PACKAGE_FOLDER = Path(__file__).parent
_INSTALLED = ("stdlib", "purelib", "platlib")
_REGISTRY = threading.RLock()  # of cloudpickle, which all threads have in common


def _is_users_own(module: ModuleType) -> bool:
    """Whether a module is neither installed, nor this package, nor run as a script."""
    file: str | None = vars(module).get("__file__")
    if not file or module.__name__ == "__main__":
        return False
    folders: list[str | Path] = [
        _PACKAGE_FOLDER,
        *(sysconfig.get_path(name) for name in _INSTALLED),
    ]
    return not any(Path(file).resolve().is_relative_to(Path(f).resolve()) for f in folders)


@contextlib.contextmanager
def pickled_by_value(function: Any) -> Iterator[None]:
    """Pickle a function by value even where its module could be imported here.

    The user's own modules are not on the workers; installed packages are, and go by name.
    """
    module = inspect.getmodule(function) if function is not None else None
    if module is None or not _is_users_own(module):
        yield
        return
    with module_by_value(module):
        yield


@contextlib.contextmanager
def module_by_value(module: ModuleType) -> Iterator[None]:
    """Pickle what is of a module by value; other threads wait until it goes by name again."""
    with _REGISTRY:
        if module.__name__ in cloudpickle.list_registry_pickle_by_value():
            yield
            return
        cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            cloudpickle.unregister_pickle_by_value(module)
