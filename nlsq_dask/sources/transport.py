"""What carries the bytes of a store, what it says when it fails, and what must not be repeated.

A URL may hold a password, a query a signature, and a service's answer the request that it was
signed with. So of a failure only the first line is told, up to the service's answer, without
user names, passwords and queries of URLs; and it is told by an exception of this package, not
chained to the one that says more.
"""

from __future__ import annotations

import gzip
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nlsq_dask.errors import (
    StoreDamagedError,
    StoreDeniedError,
    StoreLockedError,
    StoreNotFoundError,
    StoreUnreachableError,
)

__all__ = [
    "at_chunk",
    "comes_at_once",
    "comes_late",
    "is_transient",
    "place_of",
    "reason_of",
    "redacted",
    "reported",
    "reported_file",
    "reported_reading",
    "transport_errors",
    "transport_of",
    "transport_of_store",
    "unwatched",
    "zarr_array_of",
]

_FROM_AFAR = {"obstore", "fsspec", "IcechunkStore"}
_ON_THIS_MACHINE = {"LocalStore", "MemoryStore", "ZipStore"}
# What each library raises that does not raise the builtins alone.
_RAISED_BY = {
    "obstore.exceptions": ("BaseError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}
_OF_STORES = (
    StoreDamagedError,
    StoreDeniedError,
    StoreLockedError,
    StoreNotFoundError,
    StoreUnreachableError,
)
_OF_BZ2 = "Invalid data stream"  # an OSError like any other
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
    array = zarr_array_of(backend)
    return _module_of(backend) if array is None else transport_of_store(array.store)


def transport_of_store(store: Any) -> str:
    """Which library reads a store of Zarr's."""
    kind = type(unwatched(store))
    name = kind.__name__
    if name in _ON_THIS_MACHINE and not kind.__module__.startswith("zarr."):
        name = f"{kind.__module__}.{name}"  # of which only the name is known
    return {"ObjectStore": "obstore", "FsspecStore": "fsspec"}.get(name, name)


def place_of(backend: Any) -> str:
    """A stored array in words that hold no secrets: its name, and its store."""
    array = zarr_array_of(backend)
    if array is not None:
        store = unwatched(array.store)
        if type(store).__name__ == "ObjectStore":
            store = store.store
        return f"{array.path!r} of {redacted(store)}"
    if hasattr(backend, "variable_name"):
        file = (
            backend.datastore._filename if hasattr(backend.datastore, "_filename") else "its file"
        )
        return f"{backend.variable_name!r} of {redacted(file)}"
    return f"an array of {_module_of(backend)}"


def _module_of(backend: Any) -> str:
    return type(backend).__module__.rpartition(".")[2].rstrip("_")


def zarr_array_of(backend: Any) -> Any:
    """The array that xarray's backend hands out; None where another library than Zarr reads it."""
    return backend.get_array() if _module_of(backend) == "zarr" else None


def unwatched(store: Any) -> Any:
    """The store that another is wrapped around while it is read."""
    return store._store if type(store).__name__ == "WatchedStore" else store


def comes_late(transport: str) -> bool:
    """Whether it is worth having many requests under way at once."""
    return transport in _FROM_AFAR


def comes_at_once(transport: str) -> bool:
    """Whether it is Zarr's and waits for nothing but this machine's disks and memory."""
    return transport in _ON_THIS_MACHINE


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
    except transport_errors() as error:
        raise _refusal_of(error, store, argument) from None


@contextmanager
def reported_reading(transport: str, place: str) -> Iterator[None]:
    """The same for rows of a store that was opened.

    Of a disk, errors that have a number are the system's own, and go through.

    Raises
    ------
    StoreDamagedError
        With the library's reason alone: what was read may still turn out to be whole.
    StoreDeniedError, StoreLockedError, StoreNotFoundError, StoreUnreachableError
        Naming `place`.
    """
    try:
        yield
    except transport_errors() as error:
        if type(error).__module__.startswith("nlsq_dask"):
            raise
        if isinstance(error, gzip.BadGzipFile) or str(error) == _OF_BZ2:
            raise StoreDamagedError(reason_of(error)) from None
        if type(error).__module__ != "builtins" or comes_late(transport):
            raise _refusal_of(error, place) from None
        refusal = _refusal_of_file(error, place, "ds")
        if refusal is None:
            raise
        if isinstance(refusal, StoreDamagedError):
            raise StoreDamagedError(reason_of(error)) from None
        raise refusal from None


@contextmanager
def at_chunk(index: int) -> Iterator[None]:
    """Say of an error in reading which chunk of the plan was read."""
    try:
        yield
    except _OF_STORES as error:
        raise type(error)(f"{error} (in chunk {index})") from None
    except OSError as error:
        error.add_note(f"while chunk {index} was read")
        raise


@contextmanager
def reported_file(path: str, argument: str) -> Iterator[None]:
    """Why an HDF5 file cannot be opened.

    Raises
    ------
    StoreLockedError, StoreDamagedError
    """
    try:
        yield
    except OSError as error:
        refusal = _refusal_of_file(error, path, argument)
        if refusal is None:
            raise
        raise refusal from None


def transport_errors() -> tuple[type[Exception], ...]:
    """What reading a store may raise, of the libraries that are loaded."""
    loaded = ((vars(sys.modules[m]), names) for m, names in _RAISED_BY.items() if m in sys.modules)
    return (OSError, *(members[name] for members, names in loaded for name in names))


def is_transient(error: Exception, transport: str) -> bool:
    """Whether asking again may help and was not done yet.

    obstore has done so for what it could not send, but not where an answer is no text, or breaks
    off while it says that something is not there. Of what fsspec reads, some libraries ask
    again, and none does for an answer that does not match its checksum.
    """
    if isinstance(error, FileNotFoundError | PermissionError) or _is_denied(error):
        return False
    if transport == "obstore":
        return "HTTP error" in str(error) and "error sending request" not in str(error)
    return transport == "fsspec"


def reason_of(error: Exception) -> str:
    """The first line, up to the service's answer; of obstore's, the request and its end."""
    line = redacted(re.split(r"[\n<{]", str(error))[0]).rstrip(" :-")
    tried = re.search(r"Error performing (\w+ \S+) in .* - (.*)", line)
    return f"{tried[1]}: {tried[2]}" if tried else line or "no answer in time"


def _is_denied(error: Exception) -> bool:
    return _DENIED.search(f"{type(error).__name__} {reason_of(error)}") is not None


def _refusal_of_file(error: Exception, place: str, argument: str) -> OSError | None:
    """What to tell of an HDF5 file; None of what the system says by its numbers.

    h5py's own errors have none, but for the one of a lock.
    """
    assert isinstance(error, OSError)  # all builtins among the errors of transports
    said = reason_of(error)
    if isinstance(error, BlockingIOError) or re.search("unable to lock|already open for", said):
        return StoreLockedError(
            f"`{argument}` must not be written to while it is fitted, and {place} is ({said}); "
            "wait until the writer has closed it"
        )
    if error.errno is not None:
        return None
    return StoreDamagedError(
        f"`{argument}` must be whole, and {place} cannot be decoded ({said}); write it again"
    )


def _refusal_of(error: Exception, store: str, argument: str = "ds") -> OSError:
    """What to tell of a store that could not be read."""
    reason = reason_of(error)
    if isinstance(error, FileNotFoundError):
        return StoreNotFoundError(
            f"`{argument}` must name a store that exists, and nothing was found at {store} "
            f"({reason}); see that bucket, path and endpoint are as meant"
        )
    if isinstance(error, PermissionError) or _is_denied(error):
        remedy = (
            'give credentials by `storage_options`, {"anon": True} for public data on S3 and '
            'Azure, {"token": "anon"} on Google Cloud'
        )
        if isinstance(error, OSError) and error.filename is not None:
            remedy = "see that this user may read it, and enter its folders"
        return StoreDeniedError(
            f"`{argument}` must be readable, and {store} was denied ({reason}); {remedy}"
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
