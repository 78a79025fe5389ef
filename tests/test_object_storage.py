"""Archives in object storage: the bits of a local one, errors that say what to do, no secrets."""

from __future__ import annotations

import base64
import logging
import os
import pickle
import socket
import time
import warnings
from pathlib import Path

import boto3
import cloudpickle
import numpy as np
import pytest
import xarray as xr
import zarr
from botocore import UNSIGNED
from botocore.config import Config
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

import problems
from endpoints import KEY, SECRET, create_bucket, serve_files, serve_s3, upload
from nlsq_dask import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig, fit_dataset
from nlsq_dask.errors import (
    StoreDeniedError,
    StoreNotFoundError,
    StoreUnreachableError,
    WorkerError,
)
from nlsq_dask.evaluate.worker import HomeSpec
from nlsq_dask.sources import objects, stores
from nlsq_dask.sources.batches import Spool
from nlsq_dask.sources.columns import LazyColumn
from nlsq_dask.sources.objects import build_object_store
from nlsq_dask.sources.stores import open_store
from nlsq_dask.sources.transport import redacted
from nlsq_dask.sources.xarray import column_of

NUM_ROWS, CHUNK_ROWS = 300_000, 10_000
FSSPEC = {"max_concurrency": 4}  # an option that obstore does not have

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An archive of each kind."""
    folder = tmp_path_factory.mktemp("objects")
    t, y = problems.make_decay(NUM_ROWS)
    ds = xr.Dataset({"t": ("row", t), "y": ("row", y)}).chunk(row=CHUNK_ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        ds.to_zarr(folder / "a.zarr")
        ds.isel(row=slice(20_000)).to_zarr(folder / "plain.zarr", consolidated=False)
        ds.isel(row=slice(20_000)).to_zarr(folder / "two.zarr", zarr_format=2)
    return folder


@pytest.fixture(scope="module")
def endpoint(folder):
    with serve_s3() as url:
        upload(url, folder, "bucket")
        upload(url, folder, "public", is_public=True)
        yield url


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    """Those of whoever runs the tests are not theirs."""
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def keys(endpoint: str) -> dict:
    return {"key": KEY, "secret": SECRET, "endpoint_url": endpoint}


def fit(ds, **options):
    return fit_dataset(ds, problems.decay, y="y", p0=problems.P0, **options)


@pytest.fixture(scope="module")
def expected(folder):
    result = fit(folder / "a.zarr")
    assert result.diagnostics["transports"] == ["LocalStore"]
    return result


def assert_same_bits(actual, expected):
    assert actual.success
    np.testing.assert_array_equal(actual.popt, expected.popt)
    np.testing.assert_array_equal(actual.pcov, expected.pcov)
    assert actual.cost == expected.cost


def object_store(endpoint: str, path: str = "bucket/a.zarr") -> zarr.storage.ObjectStore:
    config = {"access_key_id": KEY, "secret_access_key": SECRET, "endpoint": endpoint}
    store = S3Store.from_url(f"s3://{path}", config=config, client_options={"allow_http": True})
    return zarr.storage.ObjectStore(store, read_only=True)


def fsspec_store(endpoint: str) -> zarr.storage.FsspecStore:
    return zarr.storage.FsspecStore.from_url(
        "s3://bucket/a.zarr", storage_options=keys(endpoint), read_only=True
    )


# -- the same bits

WAYS = {
    "obstore": (lambda e: ("s3://bucket/a.zarr", keys(e)), "obstore"),
    "fsspec": (lambda e: ("s3://bucket/a.zarr", keys(e) | FSSPEC), "fsspec"),
    "obstore's store": (lambda e: (object_store(e), None), "obstore"),
    "fsspec's store": (lambda e: (fsspec_store(e), None), "fsspec"),
    "Dask over obstore": (lambda e: (xr.open_zarr(object_store(e)), None), "obstore"),
    "Dask over fsspec": (
        lambda e: (xr.open_zarr("s3://bucket/a.zarr", storage_options=keys(e)), None),
        "fsspec",
    ),
    "public": (
        lambda e: ("s3://public/a.zarr", {"anon": True, "client_kwargs": {"endpoint_url": e}}),
        "obstore",
    ),
}


@pytest.mark.cluster
@pytest.mark.parametrize("way", WAYS)
def test_same_bits_as_from_the_disk_on_processes(way, endpoint, expected, client):
    opened, transport = WAYS[way]
    ds, options = opened(endpoint)
    result = fit(ds, storage_options=options, client=client)
    assert_same_bits(result, expected)
    assert result.diagnostics["transports"] == [transport]
    assert "store read by the workers" in result.diagnostics["evaluator"]


@pytest.mark.parametrize("way", ["obstore", "fsspec"])
def test_same_bits_as_from_the_disk_in_threads(way, endpoint, expected):
    opened, _ = WAYS[way]
    ds, options = opened(endpoint)
    assert_same_bits(fit(ds, storage_options=options), expected)


@pytest.mark.cluster
def test_a_fit_from_the_disk_is_resumed_from_the_object_store(
    endpoint, folder, expected, client, tmp_path
):
    saved = tmp_path / "run.h5"
    fit(folder / "a.zarr", checkpoint=saved, config=HybridStreamingConfig(max_passes=1))
    config = HybridStreamingConfig(resume_from_checkpoint=saved)
    options = keys(endpoint)
    result = fit("s3://bucket/a.zarr", storage_options=options, config=config, client=client)
    assert_same_bits(result, expected)


def test_batches_are_spooled_to_an_object_store(endpoint, folder, expected):
    ds = xr.open_zarr(folder / "a.zarr")
    t, y = ds["t"].values, ds["y"].values
    optimizer = AdaptiveHybridStreamingOptimizer()
    with Spool("s3://bucket/spools", storage_options=keys(endpoint)) as spool:
        spool.extend((t[i : i + 50_000], y[i : i + 50_000]) for i in range(0, NUM_ROWS, 50_000))
        result = optimizer.fit(spool, problems.decay, p0=list(problems.P0.values()))
        assert result.diagnostics["transports"] == ["obstore"]
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-9)


# -- which transport, with which options

TOKEN = {"type": "service_account", "private_key": "-"}
OBSTORE = {
    "keys": (
        "s3://b/p/x.zarr",
        {"key": "k", "secret": "s", "token": "t", "endpoint_url": "https://e"},
        S3Store,
        {"endpoint": "https://e"},
    ),
    "keys of the client": (
        "s3a://b/p/x.zarr",
        {
            "client_kwargs": {
                "aws_access_key_id": "k",
                "aws_secret_access_key": "s",
                "endpoint_url": "https://e",
                "region_name": "eu-west-1",
            }
        },
        S3Store,
        {"endpoint": "https://e", "region": "eu-west-1"},
    ),
    "requester pays": (
        "s3://b/p/x.zarr",
        {"anon": True, "requester_pays": True, "endpoint_url": "https://e", "profile": None},
        S3Store,
        {"endpoint": "https://e", "skip_signature": "true", "request_payer": "true"},
    ),
    "google, anonymous": (
        "gs://b/p/x.zarr",
        {"token": "anon"},
        GCSStore,
        {"skip_signature": "true"},
    ),
    "google, endpoint": (
        "gcs://b/p/x.zarr",
        {"token": "anon", "endpoint_url": "http://e"},
        GCSStore,
        {"skip_signature": "true", "base_url": "http://e"},
    ),
    "azure, key": (
        "az://b/p/x.zarr",
        {"account_name": "n", "account_key": "azk=", "anon": True},
        AzureStore,
        {"account_name": "n", "account_key": "azk="},
    ),
    "azure, signature": (
        "abfs://b/p/x.zarr",
        {"account_name": "n", "sas_token": "?sv=1&sig=2"},
        AzureStore,
        {"account_name": "n", "sas_key": "sv=1&sig=2"},
    ),
    "azure, account in the URL": (
        "abfss://b@n.dfs.core.windows.net/p/x.zarr",
        {"tenant_id": "t", "client_id": "c", "client_secret": "s"},
        AzureStore,
        {"account_name": "n", "tenant_id": "t", "client_id": "c", "client_secret": "s"},
    ),
    "azure, anonymous": (
        "az://b/p/x.zarr",
        {"account_name": "n", "anon": True},
        AzureStore,
        {"account_name": "n", "skip_signature": "true"},
    ),
}


@pytest.mark.parametrize("case", OBSTORE)
def test_options_that_obstore_has_are_translated(case):
    url, options, kind, config = OBSTORE[case]
    store = build_object_store(url, options).store
    assert isinstance(store, kind)
    assert store.prefix == "p/x.zarr"
    place = {"bucket": "b"} if kind is not AzureStore else {"container_name": "b"}
    assert store.config == config | place
    again = pickle.loads(pickle.dumps(store))
    assert (again.config, again.prefix) == (store.config, store.prefix)
    assert again.retry_config == store.retry_config


def test_keys_that_are_given_do_not_mix_with_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another-account")
    store = build_object_store(
        "s3://b/x.zarr", {"key": "k", "secret": "s", "endpoint_url": "https://e"}
    )
    given = pickle.loads(pickle.dumps(store)).store.credential_provider()
    assert (given["access_key_id"], given["secret_access_key"]) == ("k", "s")
    assert given["token"] is None


def test_a_key_of_google_is_a_file_or_what_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "key.json").write_text('{"type": "authorized_user"}')
    monkeypatch.chdir(tmp_path)  # workers have folders of their own
    config = objects._google_token("key.json")
    assert config == {"application_credentials": str(tmp_path / "key.json")}
    assert objects._google_token(TOKEN) == {
        "service_account_key": '{"type": "service_account", "private_key": "-"}'
    }


def test_headers_go_with_every_request():
    store = build_object_store("https://e/x.zarr", {"headers": {"X-Key": "1"}}).store
    assert isinstance(store, HTTPStore)
    assert store.client_options["default_headers"] == {"x-key": b"1"}


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://b/x.zarr", FSSPEC),
        ("s3://b/x.zarr", {"client_kwargs": {"verify": "ca.pem"}}),
        ("s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/b/x.zarr", {"anon": True}),
        ("gs://b/x.zarr", {"project": "p"}),
        ("gs://b/x.zarr", {"token": "browser"}),
        ("az://b/x.zarr", {"connection_string": "c"}),
        ("https://h/x.zarr", {"simple_links": True}),
        ("https://h/x.zarr", {"client_kwargs": {"trust_env": True}}),
        ("memory://x.zarr", {}),
        ("simplecache::s3://b/x.zarr", {}),
    ],
    ids=str,
)
def test_what_obstore_does_not_have_is_for_fsspec(url, options):
    assert build_object_store(url, options) is None


def test_without_obstore_all_is_for_fsspec(monkeypatch):
    monkeypatch.setattr(objects.importlib.util, "find_spec", lambda name: None)
    assert build_object_store("s3://b/x.zarr", {"anon": True}) is None


# -- credentials and places that are found


def write_profile(monkeypatch, tmp_path, endpoint, secret=SECRET):
    files = {
        "AWS_SHARED_CREDENTIALS_FILE": f"[lab]\naws_access_key_id = {KEY}\n"
        f"aws_secret_access_key = {secret}\n",
        "AWS_CONFIG_FILE": f"[profile lab]\nregion = eu-west-1\nendpoint_url = {endpoint}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setenv(name, str(tmp_path / name))
    return {name: str(tmp_path / name) for name in files}


def set_environment(values):
    os.environ.update(values)


@pytest.mark.cluster
def test_a_profile_says_keys_and_endpoint_to_every_process(
    monkeypatch, tmp_path, endpoint, expected, client
):
    client.run(set_environment, write_profile(monkeypatch, tmp_path, endpoint))
    result = fit("s3://bucket/a.zarr", storage_options={"profile": "lab"}, client=client)
    assert_same_bits(result, expected)
    assert result.diagnostics["transports"] == ["obstore"]


def test_what_is_found_does_not_travel(monkeypatch, tmp_path, endpoint):
    write_profile(monkeypatch, tmp_path, endpoint)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    ds = open_store("s3://bucket/a.zarr")
    assert ds["y"][:5].values.shape == (5,)
    pickled = cloudpickle.dumps(column_of("y", ds["y"].variable))
    assert SECRET.encode() not in pickled
    assert KEY.encode() not in pickled


def test_the_region_of_a_bucket_is_asked_for(endpoint, monkeypatch):
    anyone = Config(signature_version=UNSIGNED)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=anyone)
    create_bucket(endpoint, "western", "us-west-2")
    with pytest.raises(StoreNotFoundError, match="nowhere"):
        objects._region_of(client, "nowhere")
    # Without an endpoint, that of AWS, which is not there to be asked.
    asked = []
    monkeypatch.setattr(
        objects, "_region_of", lambda aws, bucket: asked.append(aws.meta.endpoint_url) or bucket
    )
    store = build_object_store("s3://western/x.zarr", {"anon": True}).store
    assert store.config == {"bucket": "western", "region": "western", "skip_signature": "true"}
    assert asked == ["https://s3.amazonaws.com"]
    said = {"anon": True, "client_kwargs": {"region_name": "eu-west-1"}}
    assert build_object_store("s3://western/x.zarr", said).store.config["region"] == "eu-west-1"
    assert len(asked) == 1
    monkeypatch.undo()
    assert objects._region_of(client, "western") == "us-west-2"


# -- errors

REFUSED = {
    "no such bucket": ("s3://nowhere/a.zarr", {}, StoreNotFoundError, "nowhere"),
    "no such key": ("s3://bucket/b.zarr", {}, StoreNotFoundError, "b.zarr"),
    "anonymous": (
        "s3://bucket/a.zarr",
        {"key": None, "secret": None, "anon": True},
        StoreDeniedError,
        "403",
        "storage_options",
    ),
    "no credentials": (
        "s3://bucket/a.zarr",
        {"key": None, "secret": None},
        StoreDeniedError,
        "`profile`",
        '{"anon": True}',
    ),
    "half a key": ("s3://bucket/a.zarr", {"secret": None}, ValueError, "`key` and `secret`"),
    "no such profile": (
        "s3://bucket/a.zarr",
        {"key": None, "secret": None, "profile": "lab"},
        ValueError,
        "'lab'",
    ),
    "an array": ("s3://bucket/a.zarr/y", {}, ValueError, "Zarr group", "array"),
    "no bucket": ("s3:///a.zarr", {}, ValueError, "bucket"),
    "an endpoint without protocol": (
        "s3://bucket/a.zarr",
        {"endpoint_url": "127.0.0.1"},
        ValueError,
        "http://",
    ),
    "an unknown option": ("s3://bucket/a.zarr", {"endpoint": "e"}, ValueError, "'endpoint'"),
    "dead endpoint": (
        "s3://bucket/a.zarr",
        {"endpoint_url": "http://127.0.0.1:9"},
        StoreUnreachableError,
        "127.0.0.1:9",
        "endpoint",
    ),
    "HDF5": ("s3://bucket/a.nc", {}, ValueError, "HDF5", "VirtualiZarr"),
    "a query": ("s3://bucket/a.zarr?X-Amz-Signature=1", {}, ValueError, "query"),
    "a password": (f"s3://{KEY}:{SECRET}@bucket/a.zarr", {}, ValueError, "`storage_options`"),
    "a missing package": ("gs://bucket/a.zarr", {"project": "p"}, ImportError, "gcsfs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_say_what_was_asked_and_what_to_do(case, endpoint):
    url, options, kind, *words = REFUSED[case]
    with pytest.raises(kind) as raised:
        fit(url, storage_options=keys(endpoint) | options)
    for word in ("`" if "package" in case else "", *words):
        assert word in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("case", ["no such bucket", "no such key", "anonymous", "dead endpoint"])
def test_fsspec_is_refused_in_the_same_words(case, endpoint):
    url, options, kind, *_ = REFUSED[case]
    with pytest.raises(kind):
        fit(url, storage_options=keys(endpoint) | options | FSSPEC)


def test_without_boto3_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(ImportError, match=r"nlsq-dask\[cloud\]"):
        fit("s3://bucket/a.zarr")


@pytest.mark.parametrize("options", [{}, FSSPEC], ids=["obstore", "fsspec"])
def test_an_endpoint_that_never_answers_is_given_up(options, monkeypatch):
    assert objects._STALL_SECONDS + objects._RETRY_SECONDS <= 40
    monkeypatch.setattr(objects, "_STALL_SECONDS", 1)
    monkeypatch.setattr(objects, "_RETRY_SECONDS", 1)
    monkeypatch.setattr(stores, "_ANSWER_SECONDS", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(100)
        start = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StoreUnreachableError):
            open_store("s3://bucket/a.zarr", keys(url) | options)
        assert time.monotonic() - start < 10


@pytest.mark.cluster
def test_a_worker_that_may_not_read_says_so(monkeypatch, tmp_path, endpoint, client):
    """The client has the profile, the workers have not."""
    places = write_profile(monkeypatch, tmp_path, endpoint)
    client.run(set_environment, {name: str(tmp_path / "none") for name in places})
    with pytest.raises(WorkerError, match="readable from every worker"):
        fit("s3://bucket/a.zarr", storage_options={"profile": "lab"}, client=client)


# -- HTTP


@pytest.mark.parametrize("options", [None, {"simple_links": True}], ids=["obstore", "fsspec"])
def test_a_folder_over_http(options, folder, expected):
    with serve_files(folder) as (url, _):
        result = fit(f"{url}/a.zarr", storage_options=options)
    assert_same_bits(result, expected)
    assert result.diagnostics["transports"] == ["obstore" if options is None else "fsspec"]


@pytest.mark.parametrize("options", [None, {"simple_links": True}], ids=["obstore", "fsspec"])
def test_a_password_in_the_url_is_sent_as_a_header(options, folder):
    coded = base64.b64encode(f"user:{SECRET}".encode()).decode()
    with serve_files(folder, authorization=f"Basic {coded}") as (url, _):
        with_password = url.replace("://", f"://user:{SECRET}@")
        assert open_store(f"{with_password}/a.zarr", options).sizes == {"row": NUM_ROWS}
        with pytest.raises(StoreDeniedError):
            open_store(f"{url}/a.zarr", options)


@pytest.mark.slow
def test_http_cannot_list(folder):
    with serve_files(folder) as (url, _):
        with pytest.raises(StoreUnreachableError, match="consolidated"):
            open_store(f"{url}/plain.zarr")
        assert open_store(f"{url}/plain.zarr", {"simple_links": True}).sizes == {"row": 20_000}


@pytest.mark.parametrize("name", ["a.zarr", "two.zarr"])
def test_a_service_that_denies_what_does_not_exist(name, folder):
    with serve_files(folder, missing=403) as (url, _):
        ds = open_store(f"{url}/{name}")
        assert np.isfinite(ds["y"].values).all()
        with pytest.raises(StoreDeniedError):
            open_store(f"{url}/nothing.zarr")


# -- requests


def test_chunks_of_a_leaf_are_asked_for_together(folder):
    with serve_files(folder, latency_seconds=0.1) as (url, traffic):
        column = column_of("y", open_store(f"{url}/a.zarr")["y"].variable)
        traffic.most_at_once = 0
        column.read((slice(0, 10 * CHUNK_ROWS),))
    assert 5 <= traffic.most_at_once <= zarr.config.get("async.concurrency")


def test_the_columns_of_a_worker_share_one_connection_pool(endpoint):
    ds = open_store("s3://bucket/a.zarr", keys(endpoint))
    columns = tuple(column_of(name, ds[name].variable) for name in ("t", "y"))
    there = cloudpickle.loads(cloudpickle.dumps(columns))
    first, second = (opened(column)._store.store for column in there)  # each is watched
    assert first is second


def opened(column: LazyColumn):
    array = column.variable._data
    while hasattr(array, "array"):
        array = array.array
    return array.get_array().store


@pytest.mark.cluster
def test_metadata_are_read_once_and_by_the_client(folder, client):
    with serve_files(folder) as (url, traffic):
        open_store(f"{url}/a.zarr")
        opening = sum(traffic.paths.values())
        traffic.paths.clear()
        result = fit(f"{url}/a.zarr", client=client, config=HybridStreamingConfig(cache_bytes=0))
        chunks = {path: n for path, n in traffic.paths.items() if "/c/" in path}
        metadata = sum(traffic.paths.values()) - sum(chunks.values())
    assert result.num_passes > 1
    assert metadata == opening
    assert len(chunks) == 2 * NUM_ROWS // CHUNK_ROWS
    # In each pass once; for the sample, and by the workers' probe and compilation, once more.
    assert max(chunks.values()) <= result.num_passes + 5


# -- secrets


def keys_of_tasks(dask_scheduler):
    """Of all tasks lately, those that are gone among them."""
    return [str(entry[0]) for entry in dask_scheduler.transition_log]


def log_all_to(folder):
    handler = logging.FileHandler(folder / f"{os.getpid()}.log")
    handler.set_name("all")
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)
    logging.getLogger("nlsq_dask").debug("all of it")


def log_as_before():
    root = logging.getLogger()
    (handler,) = (each for each in root.handlers if each.get_name() == "all")
    root.removeHandler(handler)
    root.setLevel(logging.WARNING)


@pytest.mark.cluster
@pytest.mark.parametrize("options", [{}, FSSPEC], ids=["obstore", "fsspec"])
def test_secrets_are_nowhere(options, endpoint, client, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    given = keys(endpoint) | options
    saved = tmp_path / "run.h5"
    client.run(log_all_to, tmp_path)
    try:
        result = fit("s3://bucket/a.zarr", storage_options=given, client=client, checkpoint=saved)
    finally:
        client.run(log_as_before)
    source = result.session.problem.source
    tasks = client.run_on_scheduler(keys_of_tasks)
    logs = [path.read_bytes() for path in tmp_path.glob("*.log")]
    said = {
        "log": caplog.text.encode(),
        "workers' logs": b"".join(logs) + repr(client.get_worker_logs()).encode(),
        "scheduler's log": repr(client.get_scheduler_logs()).encode(),
        "keys": repr(tasks).encode(),
        "result": pickle.dumps(result),
        "checkpoint": saved.read_bytes(),
        "diagnostics": repr(result.diagnostics).encode(),
        "summary": result.summary().encode(),
        "source": (repr(source) + str(source)).encode(),
    }
    assert any("nlsq-pass" in key for key in tasks)
    assert len(logs) == 2
    assert all(b"all of it" in log for log in logs)
    for where, content in said.items():
        assert SECRET.encode() not in content, where
    assert SECRET.encode() in cloudpickle.dumps(source)  # it would have been found


@pytest.mark.cluster
def test_a_failing_worker_does_not_log_the_key(folder, client):
    """Dask logs the arguments of what fails."""
    with serve_s3() as gone:
        upload(gone, folder / "two.zarr", "bucket")
        ds = open_store("s3://bucket", keys(gone))
    with pytest.raises(WorkerError, match="readable from every worker") as raised:
        fit(ds, client=client)
    assert SECRET not in str(raised.value)
    assert SECRET not in repr(client.get_worker_logs())
    assert "HomeSpec" in repr(client.get_worker_logs())
    # Dask cuts what it logs at 1,000 characters; a key may come before.
    spec = HomeSpec(
        token="problem",
        payload=SECRET.encode(),
        cache_bytes=0,
        prefetch=True,
        precision="float64",
        compilation_cache_dir=None,
    )
    assert SECRET not in repr(spec)


@pytest.mark.parametrize("options", [{}, {"simple_links": True}], ids=["obstore", "fsspec"])
def test_a_password_of_a_url_is_not_in_errors_or_sources(options, folder, caplog):
    caplog.set_level(logging.DEBUG)
    with serve_files(folder) as (url, _):
        secretly = url.replace("://", f"://user:{SECRET}@")
        ds = open_store(f"{secretly}/a.zarr", options)
        column = column_of("y", ds["y"].variable)
        column.read((slice(0, 5),))
        said = [repr(ds), str(ds.encoding), repr(column), repr(opened(column))]
        for name in ("nothing.zarr", f"a.zarr?X-Amz-Signature={SECRET}", "plain.zarr/y"):
            with pytest.raises((StoreNotFoundError, ValueError)) as raised:
                open_store(f"{secretly}/{name}", options)
            said += [str(raised.value), repr(raised.value.__cause__)]
            assert raised.value.__suppress_context__ or raised.value.__context__ is None
    with pytest.raises(StoreUnreachableError) as raised:
        open_store(f"{secretly}/a.zarr", options)
    assert SECRET not in "".join([*said, str(raised.value), caplog.text])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://user:p@ss@host/x?sig=abc&v=1, sorry", "at https://host/x?…, sorry"),
        ("https://token@host/x", "https://host/x"),
        ("('s3://key:secret@bucket/x')", "('s3://bucket/x')"),
        ("abfs://container@account/x", "abfs://container@account/x"),
        ("why? because", "why? because"),
    ],
)
def test_redacted(text, shown):
    assert redacted(text) == shown
