"""What carries the bytes of a store, what it says when it fails, and what must not be repeated.

A URL may hold a password, a query a signature, and a service's answer the request that it was
signed with. So of a failure only the first line is told, up to the service's answer, without
user names, passwords and queries of URLs; and it is told by an exception of this package, not
chained to the one that says more.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nlsq_dask.errors import (
    StoreDeniedError,
    StoreNotFoundError,
    StoreUnreachableError,
)

__all__ = ["comes_late", "redacted", "reported", "reported_reading", "transport_of"]

_FROM_AFAR = {"obstore", "fsspec", "IcechunkStore"}
# What each library raises that does not raise the builtins alone.
_RAISED_BY = {
    "obstore.exceptions": ("BaseError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}
_DENIED = re.compile(
    r"\b40[13](, message=| Unauthorized| Forbidden)|credentials|Access ?Denied|Anonymous caller",
    re.IGNORECASE,
)
_SECRETS = (
    (re.compile(r"(https?://)[^/\s'\"]*@"), r"\1"),
    (re.compile(r"(\w://)[^/\s'\"@]*:[^/\s'\"]*@"), r"\1"),  # container@account is no secret
    (re.compile(r"(://[^\s'\"?]*\?)[^\s'\"),]+"), r"\1…"),
)


def redacted(text: object) -> str:
    """The text without user names, passwords and queries of the URLs in it."""
    said = str(text)
    for secret, instead in _SECRETS:
        said = secret.sub(instead, said)
    return said


def transport_of(backend: Any) -> str:
    """Which library reads what xarray's backend hands out: of Zarr, by the class of the store."""
    module = type(backend).__module__.rpartition(".")[2].rstrip("_")
    if module != "zarr":
        return module
    store = type(backend.get_array().store).__name__
    return {"ObjectStore": "obstore", "FsspecStore": "fsspec"}.get(store, store)


def comes_late(transport: str) -> bool:
    """Whether it is worth having many requests under way at once."""
    return transport in _FROM_AFAR


@contextmanager
def reported(store: str, argument: str = "ds") -> Iterator[None]:
    """Failures of a transport as this package's errors; `argument` is the caller's, of the store.

    Raises
    ------
    StoreNotFoundError, StoreDeniedError, StoreUnreachableError
    """
    try:
        yield
    except (StoreNotFoundError, StoreDeniedError):
        raise
    except _errors() as error:
        raise _refusal_of(error, store, argument) from None


@contextmanager
def reported_reading() -> Iterator[None]:
    """The same for rows of a store that was opened; a file's errors are the system's own."""
    try:
        yield
    except _errors() as error:
        if type(error).__module__ == "builtins":
            raise
        raise _refusal_of(error, "its store") from None


def _errors() -> tuple[type[Exception], ...]:
    """What reading a store may raise, of the libraries that are loaded."""
    loaded = ((vars(sys.modules[m]), names) for m, names in _RAISED_BY.items() if m in sys.modules)
    return (OSError, *(members[name] for members, names in loaded for name in names))


def _reason(error: Exception) -> str:
    """The first line, up to the service's answer; of obstore's, the request and its end."""
    line = redacted(re.split(r"[\n<{]", str(error))[0]).rstrip(" :-")
    tried = re.search(r"Error performing (\w+ \S+) in .* - (.*)", line)
    return f"{tried[1]}: {tried[2]}" if tried else line or "no answer in time"


def _refusal_of(error: Exception, store: str, argument: str = "ds") -> OSError:
    """What to tell of a store that could not be read."""
    reason = _reason(error)
    if isinstance(error, FileNotFoundError):
        return StoreNotFoundError(
            f"`{argument}` must name a store that exists, and nothing was found at {store} "
            f"({reason}); see that bucket, path and endpoint are as meant"
        )
    if isinstance(error, PermissionError) or _DENIED.search(f"{type(error).__name__} {reason}"):
        return StoreDeniedError(
            f"`{argument}` must be readable, and {store} was denied ({reason}); give credentials "
            'by `storage_options`, {"anon": True} for public data on S3 and Azure, '
            '{"token": "anon"} on Google Cloud'
        )
    remedy = "see that endpoint and region are as meant, and that the service is up"
    if "PROPFIND" in reason:
        remedy = (
            "HTTP has no listing: write consolidated metadata (`zarr.consolidate_metadata`), or "
            'let fsspec read the links of an index page: `storage_options={"simple_links": True}`'
        )
    return StoreUnreachableError(
        f"`{argument}` must be reachable, and {store} was not ({type(error).__name__}: {reason}); "
        f"{remedy}"
    )
