"""A URL of an object store, as a store of Zarr's that obstore reads; or word that fsspec must.

Options are in fsspec's names. obstore carries the bytes where it is installed, knows the protocol,
and has an exact counterpart for every option that is given (the tables below); fsspec carries them
where one of the three fails. Nothing else decides.

What S3 is not told is found as AWS' own tools find it, by boto3: credentials (environment, profile
files, single sign-on, roles), the endpoint of a profile, and otherwise the region of the bucket.
Credentials that were found do not travel: each process finds its own.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

from zarr.abc.store import Store as ZarrStore

from nlsq_dask.errors import StoreDeniedError, StoreNotFoundError
from nlsq_dask.sources.transport import redacted

__all__ = [
    "PROTOCOLS",
    "build_object_store",
    "protocol_of",
    "without_credentials",
]

Options = dict[str, Any]

_CONNECT_SECONDS = 5
_STALL_SECONDS = 15  # without a byte
_REQUEST_SECONDS = 300  # in all: a shard over a slow line
_RETRY_SECONDS = 20  # after which no request is begun again
_MAX_RETRIES = 8

# fsspec's names, and obstore's for the same thing.
_S3 = {
    "anon": "skip_signature",
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "token",
    "profile": "profile",
    "endpoint_url": "endpoint",
    "requester_pays": "request_payer",
}
_S3_CLIENT = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "token",
    "endpoint_url": "endpoint",
    "region_name": "region",
}
_GOOGLE = {"endpoint_url": "base_url"}
_AZURE = {
    "anon": "skip_signature",
    "account_name": "account_name",
    "account_key": "account_key",
    "sas_token": "sas_key",
    "tenant_id": "tenant_id",
    "client_id": "client_id",
    "client_secret": "client_secret",
}
_AZURE_CREDENTIALS = {"account_key", "sas_key", "client_secret"}


def build_object_store(url: str, options: Mapping[str, Any]) -> ZarrStore | None:
    """The store that obstore reads; None where fsspec is to read it.

    Raises
    ------
    ImportError
        If boto3 has to find what is not given, and is not installed.
    StoreDeniedError
        If there are no credentials.
    StoreNotFoundError
        If there is no such bucket.
    ValueError
        If there is no bucket in the URL, a key comes without its secret, an endpoint is no URL, or
        there is no such profile.
    """
    protocol = protocol_of(url)
    if protocol not in _SERVICES or importlib.util.find_spec("obstore") is None:
        return None
    if not urlsplit(url).netloc:
        raise ValueError(f"`ds` must be a URL with a bucket, container or host, got {url!r}")
    given = {name: value for name, value in options.items() if value is not None}
    store = _SERVICES[protocol](url, given)
    if store is None:
        return None
    from zarr.storage import ObjectStore

    return ObjectStore(store, read_only=True)


def without_credentials(url: str, options: Mapping[str, Any]) -> tuple[str, Options]:
    """The URL without user name and password, which HTTP then has as a header.

    Raises
    ------
    ValueError
        If a URL of another protocol holds a password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        if parts.password is not None:
            raise ValueError(
                f"`ds` must be a URL without credentials, got one with them, {redacted(url)}; give "
                "them by `storage_options`"
            )
        return url, dict(options)
    userinfo, at, _ = parts.netloc.rpartition("@")
    if not at:
        return url, dict(options)
    coded = base64.b64encode(unquote(userinfo).encode()).decode()
    of_client = dict(options.get("client_kwargs") or {})
    of_client["headers"] = {"Authorization": f"Basic {coded}", **(of_client.get("headers") or {})}
    return url.replace(f"{userinfo}@", "", 1), {**options, "client_kwargs": of_client}


def protocol_of(url: str) -> str:
    return url.partition("://")[0]


def _renamed(options: Mapping[str, Any], names: Mapping[str, str]) -> Options | None:
    """Options by their other names; None if one has none."""
    if not options.keys() <= names.keys():
        return None
    return {names[name]: value for name, value in options.items() if value is not None}


def _without(options: Mapping[str, Any], name: str) -> Options:
    return {key: value for key, value in options.items() if key != name}


def _transport(endpoint: str | None = None) -> Options:
    """How patiently obstore tries, and whether without encryption."""
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise ValueError(
            "`storage_options` must have an endpoint that begins with http:// or https://, got "
            f"{redacted(endpoint)!r}"
        )
    return {
        "client_options": {
            "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=_STALL_SECONDS),
            "timeout": timedelta(seconds=_REQUEST_SECONDS),
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
        },
        "retry_config": {
            "max_retries": _MAX_RETRIES,
            "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
        },
    }


# -- S3


@dataclass(frozen=True, kw_only=True)
class _GivenKeys:
    """Credentials as they were given: none of the environment mixes with them."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)

    def __call__(self) -> Options:
        return {**vars(self), "expires_at": None}


@dataclass(frozen=True)
class _FoundKeys:
    """Credentials as boto3 finds them, in the process that asks."""

    profile: str | None

    def __call__(self) -> Options:
        from obstore.auth.boto3 import Boto3CredentialProvider

        # boto3 renews what lasts for less than a quarter of an hour.
        find = Boto3CredentialProvider(_session(self.profile), ttl=timedelta(minutes=10))
        found: Options = find()
        return found


def _s3(url: str, options: Options) -> Any:
    own = _renamed(_without(options, "client_kwargs"), _S3)
    of_client = _renamed(options.get("client_kwargs", {}), _S3_CLIENT)
    bucket = urlsplit(url).netloc
    if own is None or of_client is None or bucket.startswith("arn:"):
        return None
    config = {**of_client, **own}
    profile = config.pop("profile", None)
    keys = {name: config.pop(name) for name in _KEYS if name in config}
    if "endpoint" not in config:
        config |= _located(bucket, profile, config.get("region"))
    from obstore.store import S3Store

    return S3Store.from_url(
        url,
        config=config,
        credential_provider=None if config.get("skip_signature") else _keys(keys, profile),
        **_transport(config.get("endpoint")),
    )


def _keys(given: Options, profile: str | None) -> _GivenKeys | _FoundKeys:
    if not given:
        if _session(profile).get_credentials() is None:
            raise StoreDeniedError(
                "`ds` must come with credentials, and boto3 finds none (in the environment, the "
                "profiles of ~/.aws, this machine's role); give `key` and `secret`, or a "
                '`profile`, by `storage_options`, or {"anon": True} for public data'
            )
        return _FoundKeys(profile)
    if not {"access_key_id", "secret_access_key"} <= given.keys():
        raise ValueError(
            "`storage_options` must have `key` and `secret` together, or neither, got one of them"
        )
    return _GivenKeys(**given)


def _session(profile: str | None) -> Any:
    try:
        import boto3
        from botocore.exceptions import ProfileNotFound
    except ImportError as error:
        raise ImportError(
            f"`ds` on S3 needs boto3, which finds credentials, endpoint and region where "
            f"`storage_options` does not say them ({error}); pip install 'nlsq-dask[cloud]'"
        ) from error
    try:
        return boto3.Session(profile_name=profile)
    except ProfileNotFound as error:
        raise ValueError(
            f"`storage_options` must name a profile that AWS' files have, got {profile!r}: {error}"
        ) from None


def _located(bucket: str, profile: str | None, region: str | None) -> Options:
    """The endpoint that AWS' files or environment name, or else the region of the bucket."""
    session = _session(profile)
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        signature_version=UNSIGNED,
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_STALL_SECONDS,
        retries={"total_max_attempts": 2},
    )
    client = session.client("s3", region_name=region, config=config)
    of_aws = config.merge(Config(ignore_configured_endpoint_urls=True))
    endpoint = client.meta.endpoint_url
    if endpoint != session.client("s3", region_name=region, config=of_aws).meta.endpoint_url:
        return {"endpoint": endpoint, "region": client.meta.region_name}
    return {"region": region or _region_of(client, bucket)}


def _region_of(client: Any, bucket: str) -> str:
    """Said even to those who may not read the bucket."""
    from botocore.exceptions import ClientError

    try:
        answer = client.head_bucket(Bucket=bucket)["ResponseMetadata"]
    except ClientError as error:
        answer = error.response["ResponseMetadata"]
    if answer["HTTPStatusCode"] == 404:
        raise StoreNotFoundError(f"`ds` must be in a bucket that exists, got {bucket!r}")
    region: str = answer["HTTPHeaders"].get("x-amz-bucket-region", client.meta.region_name)
    return region


# -- the others


def _google(url: str, options: Options) -> Any:
    config = _renamed(_without(options, "token"), _GOOGLE)
    token = _google_token(options.get("token"))
    if config is None or token is None:
        return None
    from obstore.store import GCSStore

    return GCSStore.from_url(
        url.replace("gcs://", "gs://", 1),
        config=config | token,
        **_transport(config.get("base_url")),
    )


def _google_token(token: Any) -> Options | None:
    """What gcsfs calls a token: a word, the path of a key, or the key."""
    if token is None:
        return {}
    if token == "anon":
        return {"skip_signature": True}
    if isinstance(token, str) and os.path.isfile(token):
        return {"application_credentials": os.path.abspath(token)}
    if isinstance(token, Mapping) and token.get("type") == "service_account":
        return {"service_account_key": json.dumps(dict(token))}
    return None


def _azure(url: str, options: Options) -> Any:
    config = _renamed(options, _AZURE)
    if config is None:
        return None
    if config.keys() & _AZURE_CREDENTIALS:
        config.pop("skip_signature", None)  # to adlfs, the last resort
    if "sas_key" in config:
        config["sas_key"] = config["sas_key"].removeprefix("?")
    from obstore.store import AzureStore

    return AzureStore.from_url(url, config=config, **_transport())


def _http(url: str, options: Options) -> Any:
    of_client = options.get("client_kwargs", {})
    if not {*options, *of_client} <= {"client_kwargs", "headers"}:
        return None
    transport = _transport(url)
    headers = {**(of_client.get("headers") or {}), **(options.get("headers") or {})}
    transport["client_options"]["default_headers"] = headers
    from obstore.store import HTTPStore

    return HTTPStore.from_url(url, **transport)


_KEYS = ("access_key_id", "secret_access_key", "token")
_SERVICES: dict[str, Callable[[str, Options], Any]] = {
    **dict.fromkeys(("s3", "s3a"), _s3),
    **dict.fromkeys(("gs", "gcs"), _google),
    **dict.fromkeys(("az", "abfs", "abfss"), _azure),
    **dict.fromkeys(("http", "https"), _http),
}
PROTOCOLS = frozenset(_SERVICES)
