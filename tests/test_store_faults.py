"""Stores that fail for a moment, for good, or unseen: the same bits, or an error with the cause."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

import problems
from endpoints import KEY, SECRET, serve_files, serve_s3, upload
from faulty_proxy import KINDS, Faults, serve_faulty
from nlsq_dask import Chunk, HybridStreamingConfig, fit_dataset
from nlsq_dask.errors import (
    CheckpointError,
    DataChangedError,
    StoreDamagedError,
    StoreDeniedError,
    StoreLockedError,
    StoreNotFoundError,
    StoreUnreachableError,
    WorkerError,
)
from nlsq_dask.evaluate import cluster
from nlsq_dask.evaluate.marks import add_marks, differing_leaves, fold_marks
from nlsq_dask.sources import retrying
from nlsq_dask.sources.marks import mark_of
from nlsq_dask.sources.rereading import read_in_pieces
from nlsq_dask.sources.retrying import reading_log
from nlsq_dask.sources.stores import open_store
from nlsq_dask.sources.transport import reported
from nlsq_dask.sources.xarray import column_of

NUM_ROWS, CHUNK_ROWS = 120_000, 10_000
NUM_CHUNKS = NUM_ROWS // CHUNK_ROWS
NOT_KEPT = HybridStreamingConfig(cache_bytes=0, chunk_size=CHUNK_ROWS)
FSSPEC = {"max_concurrency": 4}  # an option that obstore does not have
TRANSPORTS = {"obstore": {}, "fsspec": FSSPEC}

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")


def rows() -> xr.Dataset:
    t, y = problems.make_decay(NUM_ROWS)
    return xr.Dataset({"t": ("row", t), "y": ("row", y)}).chunk(row=CHUNK_ROWS)


def write(path: Path, *compressors, **options) -> Path:
    """An archive whose chunks went through these codecs."""
    encoding = {name: {"compressors": list(compressors) or None} for name in ("t", "y")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        rows().to_zarr(path, encoding=encoding, **options)
    return path


CHECKED = (zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write(folder / "checked.zarr", *CHECKED)
    write(folder / "bare.zarr")
    return folder


@pytest.fixture(scope="module")
def server(folder) -> Iterator[str]:
    with serve_s3() as url:
        upload(url, folder, "bucket")
        yield url


@pytest.fixture
def proxy(server) -> Iterator[tuple[str, Faults]]:
    with serve_faulty(server) as (url, faults):
        yield url, faults


@pytest.fixture(scope="module")
def expected(folder):
    return fit(folder / "checked.zarr")


@pytest.fixture
def quick(monkeypatch) -> None:
    """Less patience, where it is of no use."""
    monkeypatch.setattr(retrying, "_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(retrying, "_PATIENCE_SECONDS", 2.0)


def fit(ds, **options):
    given = {"y": "y", "p0": problems.P0, "config": NOT_KEPT, "progress": False} | options
    return fit_dataset(ds, problems.decay, **given)


def fit_url(url: str, name: str, transport: str = "obstore", **options):
    keys = {"key": KEY, "secret": SECRET, "endpoint_url": url}
    return fit(f"s3://bucket/{name}", storage_options=keys | TRANSPORTS[transport], **options)


def assert_same_bits(actual, expected) -> None:
    assert actual.success
    np.testing.assert_array_equal(actual.popt, expected.popt)
    np.testing.assert_array_equal(actual.pcov, expected.pcov)
    assert actual.cost == expected.cost
    assert actual.num_passes == expected.num_passes


def tally(record_property, faults: Faults, *, survived: int = 0, named: int = 0) -> None:
    record_property("faults of stores that were put into requests", faults.num_faults)
    record_property("fits of failing stores that gave the same bits", survived)
    record_property("fits of failing stores that ended with a named cause", named)


# -- transient


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_same_bits_when_a_fifth_of_all_requests_fail(
    transport, proxy, expected, record_property
):
    url, faults = proxy
    faults.share = 0.2
    result = fit_url(url, "checked.zarr", transport)
    assert_same_bits(result, expected)
    assert result.diagnostics["transports"] == [transport]
    assert set(faults.done) == set(KINDS)
    assert result.diagnostics["store"]["retries"] > 0
    tally(record_property, faults, survived=1)


LONG = pytest.param("fsspec", marks=pytest.mark.slow)


@pytest.mark.cluster
@pytest.mark.parametrize("transport", ["obstore", LONG])
def test_the_same_bits_on_processes_when_a_fifth_of_all_requests_fail(
    transport, proxy, expected, client, record_property
):
    url, faults = proxy
    faults.share, faults.seed = 0.2, 1
    result = fit_url(url, "checked.zarr", transport, client=client)
    assert_same_bits(result, expected)
    assert faults.num_faults > 20
    tally(record_property, faults, survived=1)


def test_without_checksums_all_that_breaks_off_is_survived(proxy, expected, record_property):
    url, faults = proxy
    faults.share, faults.kinds = 0.2, tuple(kind for kind in KINDS if kind != "garble")
    assert_same_bits(fit_url(url, "bare.zarr"), expected)
    assert set(faults.done) == set(faults.kinds)
    tally(record_property, faults, survived=1)


def test_the_checksum_of_the_service_is_one_where_fsspec_reads(proxy, expected, record_property):
    url, faults = proxy
    faults.share, faults.kinds, faults.within = 0.2, ("garble",), "/c/"
    assert_same_bits(fit_url(url, "bare.zarr", "fsspec"), expected)
    assert faults.num_faults > 5
    tally(record_property, faults, survived=1)


@pytest.mark.parametrize("kind", ["garble", "shorten", "truncate"])
def test_a_store_is_opened_though_answers_come_garbled(kind, proxy):
    """What says that there is nothing of the other format, too."""
    url, faults = proxy
    faults.share, faults.kinds, faults.most_per_path = 1.0, (kind,), 2
    keys = {"key": KEY, "secret": SECRET, "endpoint_url": url}
    assert open_store("s3://bucket/checked.zarr", keys).sizes == {"row": NUM_ROWS}
    assert faults.num_faults > 4


def test_of_many_chunks_only_those_that_failed_are_read_often(proxy, folder):
    url, faults = proxy
    keys = {"key": KEY, "secret": SECRET, "endpoint_url": url}
    column = column_of("y", open_store("s3://bucket/checked.zarr", keys)["y"].variable)
    faults.share, faults.kinds, faults.within = 0.4, ("garble", "shorten"), "/c/"
    faults.paths.clear()
    with reading_log() as log:
        values = column.read((slice(5, 115_000),))
    np.testing.assert_array_equal(values, rows()["y"].values[5:115_000])
    assert faults.num_faults > 3
    assert log.num_retries > 0
    # At once, by itself, and as often as it failed then.
    assert all(n <= 2 + faults.failed[path] for path, n in faults.paths.items())


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    chunks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_pieces_make_the_whole(shape, chunks, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape)
    ends = [np.sort(rng.choice(n + 1, 2, replace=False)).tolist() for n in shape]
    index = tuple(slice(*pair) for pair in ends)

    def read(piece):
        """Of one chunk at most, or it fails."""
        for part, length in zip(piece, chunks, strict=True):
            if part.start // length != (part.stop - 1) // length:
                raise ValueError("garbled")
        return values[piece]

    again = read_in_pieces(read, index, chunks, "'y'", ValueError("garbled"), is_far=False)
    np.testing.assert_array_equal(again, values[index])


def test_what_no_library_tries_again_the_reader_does(folder, expected, caplog, record_property):
    """Over HTTP fsspec asks once."""
    caplog.set_level(logging.INFO, "nlsq_dask")
    with serve_files(folder) as (files, _), serve_faulty(files) as (url, faults):
        faults.share, faults.within = 0.2, "/c/"
        result = fit(f"{url}/checked.zarr", storage_options={"simple_links": True})
    assert_same_bits(result, expected)
    assert result.diagnostics["transports"] == ["fsspec"]
    assert {"refuse", "reset", "truncate"} <= set(faults.done)
    assert "Reading 'y/c/" in caplog.text
    tally(record_property, faults, survived=1)


def garbled_fits(url: str, faults: Faults, expected, seeds: range, **options) -> tuple[int, int]:
    """How many fits of the archive without checksums gave the same bits, and how many an error."""
    outcomes = []
    for faults.seed in seeds:
        faults.paths.clear()
        try:
            result = fit_url(url, "bare.zarr", **options)
        except DataChangedError:
            outcomes.append(False)
        else:
            outcomes.append(result.success)
            if result.success:
                assert_same_bits(result, expected)
            else:  # numbers beyond any model
                assert "Not finite in chunks" in result.message
    return sum(outcomes), len(outcomes) - sum(outcomes)


@pytest.mark.parametrize("share", [0.005, 0.1])
def test_garbage_of_the_right_length_is_never_fitted(
    share, proxy, expected, quick, record_property
):
    url, faults = proxy
    faults.share, faults.kinds, faults.within = share, ("garble",), "/c/"
    survived, named = garbled_fits(url, faults, expected, range(2))
    assert faults.num_faults > 0
    assert named > 0 or share < 0.1
    tally(record_property, faults, survived=survived, named=named)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("archive", ["checked.zarr", "bare.zarr"])
def test_many_seeds_on_processes(
    archive, transport, seed, proxy, expected, client, record_property
):
    url, faults = proxy
    faults.share, faults.seed = 0.2, seed
    if archive == "bare.zarr" and transport == "obstore":
        faults.share, faults.kinds, faults.within = 0.02, ("garble",), "/c/"
        survived, named = garbled_fits(url, faults, expected, range(seed, seed + 1), client=client)
        tally(record_property, faults, survived=survived, named=named)
        return
    assert_same_bits(fit_url(url, archive, transport, client=client), expected)
    tally(record_property, faults, survived=1)


def test_a_transfer_that_was_garbled_later_is_read_again(proxy, expected, record_property):
    """What was seen once tells the rest."""
    url, faults = proxy

    def begin() -> None:
        faults.share, faults.kinds, faults.within = 0.1, ("garble",), "/c/"

    result = fit_url(url, "bare.zarr", callback=after_the_first_pass(begin))
    assert faults.num_faults > 0
    assert_same_bits(result, expected)
    assert result.diagnostics["store"]["retries"] >= faults.num_faults
    tally(record_property, faults, survived=1)


def test_without_fault_tolerance_nothing_is_tried_again(proxy):
    url, faults = proxy
    config = replace(NOT_KEPT, enable_fault_tolerance=False)
    faults.share, faults.kinds, faults.within = 1.0, ("garble",), "/y/c/3"
    with pytest.raises(StoreDamagedError, match="checksum"):
        fit_url(url, "checked.zarr", config=config)
    assert faults.num_faults == 1


# -- permanent


@pytest.mark.parametrize("transport", ["obstore", LONG])  # s3fs takes its time
def test_a_chunk_that_is_never_served_is_named(transport, proxy, quick, record_property):
    url, faults = proxy
    faults.share, faults.kinds, faults.within = 1.0, ("refuse",), "checked.zarr/y/c/7"
    start = time.monotonic()
    with pytest.raises(StoreUnreachableError, match=r"503|Service Unavailable") as told:
        fit_url(url, "checked.zarr", transport)
    assert time.monotonic() - start < 60
    assert "(in chunk 7)" in str(told.value)
    assert "'y' of " in str(told.value)
    assert "checked.zarr" in str(told.value)
    assert SECRET not in str(told.value)
    tally(record_property, faults, named=1)


@pytest.mark.cluster
def test_a_chunk_that_is_never_served_is_named_by_a_worker(proxy, client, record_property):
    url, faults = proxy
    faults.share, faults.kinds, faults.within = 1.0, ("reset",), "checked.zarr/y/c/7"
    config = replace(NOT_KEPT, max_retries_per_batch=0)
    with pytest.raises(StoreUnreachableError, match=r"'y' of .*\(in chunk 7\)"):
        fit_url(url, "checked.zarr", client=client, config=config)
    tally(record_property, faults, named=1)


def damage(path: Path, how: str) -> None:
    held = bytearray(path.read_bytes())
    if how == "flipped":
        held[len(held) // 2] ^= 0x10
    elif how == "cut":
        del held[len(held) // 2 :]
    elif how == "emptied":
        held.clear()
    path.write_bytes(held)


CODECS = {
    "crc32c": ((zarr.codecs.BytesCodec(), zarr.codecs.Crc32cCodec())[1:], {}),
    "zstd with its checksum": ((zarr.codecs.ZstdCodec(checksum=True),), {}),
    "blosc": ((zarr.codecs.BloscCodec(cname="lz4"),), {}),
    "gzip": ((zarr.codecs.GzipCodec(),), {}),
    "none": ((), {}),
}
WITHOUT_CHECKSUM = ("blosc", "none")


@pytest.mark.parametrize(
    ("codec", "how"),
    [
        *((codec, "flipped") for codec in CODECS if codec not in WITHOUT_CHECKSUM),
        *((codec, how) for codec in CODECS for how in ("cut", "emptied")),
    ],
)
def test_a_damaged_chunk_is_named_and_never_fitted(codec, how, tmp_path, quick, record_property):
    compressors, options = CODECS[codec]
    path = write(tmp_path / "a.zarr", *compressors, **options)
    damage(path / "y/c/5", how)
    with pytest.raises(StoreDamagedError, match=r"\[50000:60000\] of 'y' of .*a\.zarr") as told:
        fit(path)
    assert str(told.value).endswith("(in chunk 5)")
    record_property("fits of failing stores that ended with a named cause", 1)


def test_a_damaged_chunk_of_the_second_format_is_named(tmp_path, quick):
    path = write(tmp_path / "a.zarr", numcodecs.BZ2(), zarr_format=2)
    damage(path / "y/5", "flipped")
    with pytest.raises(StoreDamagedError, match=r"\[50000:60000\] of 'y' of .*\(in chunk 5\)"):
        fit(path)


def test_a_damaged_chunk_in_a_shard_is_named(tmp_path, quick):
    encoding = {
        name: {"chunks": (1_000,), "shards": (10_000,), "compressors": CHECKED}
        for name in ("t", "y")
    }
    rows().to_zarr(tmp_path / "a.zarr", encoding=encoding, consolidated=False)
    damage(tmp_path / "a.zarr/t/c/2", "flipped")
    with pytest.raises(StoreDamagedError, match=r"\[20000:30000\] of 't' of .*\(in chunk 2\)"):
        fit(tmp_path / "a.zarr")


@pytest.mark.cluster
@pytest.mark.parametrize("chunk", [0, 9])
def test_a_damaged_chunk_is_named_by_a_worker(chunk, folder, tmp_path, client):
    path = tmp_path / "a.zarr"
    shutil.copytree(folder / "checked.zarr", path)
    damage(path / f"t/c/{chunk}", "flipped")
    with pytest.raises(StoreDamagedError, match=rf"'t' of .*\(in chunk {chunk}\)"):
        fit(path, client=client)


# -- other data than before


def shift(path: Path, name: str = "y", chunk: int = 4) -> None:
    """Write a chunk anew, with one value changed a little."""
    array = zarr.open_array(path / name)
    part = slice(chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS)
    block = array[part]
    block[77] = np.nextafter(block[77], np.inf)
    array[part] = block


def after_the_first_pass(action):
    def call(record) -> None:
        if record.phase == 2 and record.num_passes == 1:
            action()

    return call


@pytest.mark.parametrize("name", ["t", "y"])
def test_a_chunk_that_is_written_anew_is_refused(name, folder, tmp_path, quick, record_property):
    path = tmp_path / "a.zarr"
    shutil.copytree(folder / "checked.zarr", path)
    callback = after_the_first_pass(lambda: shift(path, name))
    with pytest.raises(DataChangedError, match=r"chunk 4 of .*a\.zarr.* other values than before"):
        fit(path, callback=callback)
    record_property("fits of failing stores that ended with a named cause", 1)


def test_chunks_that_are_kept_are_those_of_the_first_pass(folder, tmp_path, expected):
    path = tmp_path / "a.zarr"
    shutil.copytree(folder / "checked.zarr", path)
    config = replace(NOT_KEPT, cache_bytes=2**30)
    callback = after_the_first_pass(lambda: shift(path))
    assert_same_bits(fit(path, config=config, callback=callback), expected)


@pytest.mark.cluster
def test_a_chunk_that_is_written_anew_is_refused_by_a_worker(folder, tmp_path, client):
    path = tmp_path / "a.zarr"
    shutil.copytree(folder / "checked.zarr", path)
    callback = after_the_first_pass(lambda: shift(path))
    config = replace(NOT_KEPT, max_retries_per_batch=0)
    with pytest.raises(DataChangedError, match="chunk 4 of "):
        fit(path, callback=callback, client=client, config=config)


def forget_marks() -> None:
    """As a worker process that was started just now."""
    from nlsq_dask.evaluate import worker

    for home in worker._HOMES.values():
        home.reader._marks[:] = 0


@pytest.mark.cluster
def test_a_worker_that_never_saw_the_chunk_before_does_not_hide_that_it_changed(
    folder, tmp_path, client
):
    path = tmp_path / "a.zarr"
    shutil.copytree(folder / "checked.zarr", path)

    def change() -> None:
        shift(path)
        client.run(forget_marks)

    with pytest.raises(DataChangedError, match=r"chunks 4 of .* other values than before"):
        fit(path, callback=after_the_first_pass(change), client=client)


@pytest.mark.cluster
def test_the_first_pass_is_held_to_what_the_sample_was_drawn_from(folder, tmp_path, client):
    path = tmp_path / "a.zarr"
    shutil.copytree(folder / "checked.zarr", path)
    told = []

    def change(record) -> None:
        if not told:
            shift(path)
            client.run(forget_marks)
        told.append(record.phase)

    config = replace(NOT_KEPT, callback_frequency=1)
    with pytest.raises(DataChangedError, match=r"chunks 4 of .* other values than before"):
        fit(path, callback=change, client=client, config=config)
    assert set(told) == {1}


@pytest.mark.cluster
def test_blocks_of_dask_that_are_computed_in_every_pass_have_to_stay_the_same(
    folder, tmp_path, client, monkeypatch
):
    path = tmp_path / "a.zarr"
    shutil.copytree(folder / "checked.zarr", path)
    monkeypatch.setattr(cluster, "_PERSIST_SHARE", 0.0)
    with pytest.raises(DataChangedError, match=r"chunks? 4 of "):
        fit(
            xr.open_zarr(path) + 0.0,
            callback=after_the_first_pass(lambda: shift(path)),
            client=client,
            config=replace(NOT_KEPT, max_retries_per_batch=0),
        )


@pytest.mark.parametrize("name", ["t", "y"])
def test_a_fit_is_not_resumed_on_other_data(name, folder, tmp_path):
    path, saved = tmp_path / "a.zarr", tmp_path / "run.h5"
    shutil.copytree(folder / "checked.zarr", path)
    fit(path, checkpoint=saved, config=replace(NOT_KEPT, max_passes=1))
    shift(path, name)
    config = replace(NOT_KEPT, resume_from_checkpoint=str(saved))
    with pytest.raises(CheckpointError, match=r"other data: chunks 4 have|sums of `y`|drawn again"):
        fit(path, config=config)


def test_a_fit_is_resumed_on_the_same_data_from_another_place(folder, tmp_path, server, expected):
    saved = tmp_path / "run.h5"
    fit(folder / "checked.zarr", checkpoint=saved, config=replace(NOT_KEPT, max_passes=1))
    config = replace(NOT_KEPT, resume_from_checkpoint=str(saved))
    assert_same_bits(fit_url(server, "bare.zarr", config=config), expected)


# -- marks


def chunk_of(values: np.ndarray) -> Chunk:
    return Chunk(x=(values,), y=values + 1, extent=np.array(values.shape))


def test_a_mark_is_of_every_value_its_place_and_its_leaf():
    rng = np.random.default_rng(0)
    values = rng.normal(size=5_000)
    mark = mark_of(chunk_of(values), 3)
    assert mark == mark_of(chunk_of(values.copy()), 3)
    assert mark != mark_of(chunk_of(values), 4)
    for place in (0, 1234, 4_999):  # the last are beyond the last block
        changed = values.copy()
        changed[place] = np.nextafter(changed[place], np.inf)
        assert mark != mark_of(chunk_of(changed), 3)
    blocks_exchanged = np.concatenate([values[512:1024], values[:512], values[1024:]])
    assert mark != mark_of(chunk_of(blocks_exchanged), 3)
    columns_exchanged = Chunk(x=(values + 1,), y=values, extent=np.array(values.shape))
    assert mark != mark_of(columns_exchanged, 3)
    shorter = replace(chunk_of(values), extent=np.array([4_999]))
    assert mark != mark_of(shorter, 3)


@given(num_leaves=st.integers(1, 5_000), parts=st.integers(1, 9), seed=st.integers(0, 99))
def test_marks_add_up_the_same_however_leaves_are_grouped(num_leaves, parts, seed):
    rng = np.random.default_rng(seed)
    marks = dict(enumerate(rng.integers(1, 2**63, num_leaves).tolist()))
    whole = fold_marks([add_marks(marks, num_leaves)], num_leaves)
    assert len(whole) <= 1024
    cut = [dict(list(marks.items())[i::parts]) for i in range(parts)]
    again = fold_marks([add_marks(part, num_leaves) for part in cut], num_leaves)
    np.testing.assert_array_equal(whole, again)
    leaf = int(rng.integers(num_leaves))
    other = fold_marks([add_marks(marks | {leaf: marks[leaf] - 1}, num_leaves)], num_leaves)
    assert np.count_nonzero(whole != other) == 1
    named = differing_leaves(whole, other, num_leaves)
    first, _, last = named.partition("-")
    assert int(first) <= leaf <= int(last or first)


# -- chunks that are not there


@pytest.mark.parametrize("way", ["path", "obstore", LONG, "cluster"])
def test_a_missing_chunk_is_its_fill_value_and_reported(way, folder, tmp_path, request):
    path = tmp_path / "incomplete.zarr"
    shutil.copytree(folder / "checked.zarr", path)
    for name in ("y/c/2", "y/c/11", "t/c/2"):
        (path / name).unlink()
    options = {"config": replace(NOT_KEPT, cache_bytes=None)}
    if way == "cluster":
        options["client"] = request.getfixturevalue("client")
    if way in ("path", "cluster"):
        result = fit(path, **options)
    else:
        with serve_s3() as url:
            upload(url, tmp_path, "bucket")
            with serve_faulty(url) as (proxied, faults):
                result = fit_url(proxied, "incomplete.zarr", way, config=NOT_KEPT)
        # Asked for like any other chunk: nothing is listed, nothing asked twice.
        asked = {path: n for path, n in faults.paths.items() if "/c/" in path}
        assert (
            asked["/bucket/incomplete.zarr/y/c/11"] <= asked["/bucket/incomplete.zarr/y/c/10"] * 2
        )
    assert result.success
    assert result.num_masked == 2 * CHUNK_ROWS
    assert result.diagnostics["store"]["missing_chunks"] == 3
    assert "y/c/11" in result.diagnostics["store"]["first_missing"]
    assert "3 chunk(s), 't/c/2' for one, are not in the store" in result.summary()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("where", ["here", "cluster"])
def test_a_store_that_is_out_of_sight_is_not_taken_for_missing_chunks(
    zarr_format, where, tmp_path, request
):
    """A disk that is not mounted, or a folder that was moved: every chunk would be a fill value."""
    path = write(tmp_path / "a.zarr", zarr_format=zarr_format)
    client = request.getfixturevalue("client") if where == "cluster" else None
    ds = xr.open_zarr(path)
    path.rename(tmp_path / "moved.zarr")
    error = WorkerError if client else StoreNotFoundError
    message = "readable from every worker" if client else "every worker has that disk"
    with pytest.raises(error, match=message):
        fit(ds, client=client)
    shutil.copytree(tmp_path / "moved.zarr", path)

    def move(record) -> None:
        shutil.rmtree(path, ignore_errors=True)

    with pytest.raises(StoreNotFoundError, match=r"there while it is read.*in chunk"):
        fit(path, client=client, callback=move, config=NOT_KEPT)


def test_an_array_that_was_removed_is_not_taken_for_missing_chunks(tmp_path):
    path = write(tmp_path / "a.zarr", zarr_format=3, consolidated=False)

    def remove(record) -> None:
        shutil.rmtree(path / "y", ignore_errors=True)

    with pytest.raises(StoreNotFoundError, match=r"'y' of .* nor what describes the array"):
        fit(path, callback=remove)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(13, "Permission denied", "/a/zarr.json"), "enter its folders"),
        (PermissionError("Access Denied"), "give credentials by `storage_options`"),
    ],
)
def test_who_is_denied_hears_by_whom(error, remedy):
    """The one has a file's name, as the system says it; the other is a service's answer."""
    with pytest.raises(StoreDeniedError, match=remedy), reported("'/a'"):
        raise error


def test_metadata_may_be_consolidated_alone(tmp_path, folder):
    path = write(tmp_path / "a.zarr", zarr_format=2, consolidated=True)
    for name in ("t/.zarray", "y/.zarray", "y/3"):
        (path / name).unlink()
    result = fit(xr.open_zarr(path, consolidated=True))
    assert result.success
    assert result.diagnostics["store"]["first_missing"] == ["y/3"]


def test_a_zip_file_is_read_by_its_path(tmp_path, folder, expected, client):
    """And one that is damaged says so, and where."""
    path = Path(shutil.make_archive(str(tmp_path / "a"), "zip", folder / "checked.zarr"))
    for where in (None, client):
        assert fit(path, client=where).popt.tobytes() == expected.popt.tobytes()
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("y/c/3").header_offset + 200
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 255
    path.write_bytes(damaged)
    for where in (None, client):
        with pytest.raises(StoreDamagedError, match=r"'y' of .*a\.zip.* cannot be decoded"):
            fit(path, client=where)


def test_nothing_is_said_of_a_whole_store(expected):
    assert expected.diagnostics["store"] == {
        "missing_chunks": 0,
        "first_missing": [],
        "retries": 0,
    }
    assert "not in the store" not in expected.summary()


def test_a_missing_chunk_of_a_sliced_dataset_is_counted_once(folder, tmp_path):
    path = tmp_path / "a.zarr"
    shutil.copytree(folder / "checked.zarr", path)
    (path / "y/c/2").unlink()
    ds = open_store(path).isel(row=slice(3_333, None))
    result = fit(ds)
    assert result.num_masked == CHUNK_ROWS
    assert result.diagnostics["store"]["first_missing"] == ["y/c/2"]


# -- HDF5


def write_hdf5(path: Path, **encoding) -> Path:
    options = {"chunksizes": (CHUNK_ROWS,)} | encoding
    rows().to_netcdf(path, engine="h5netcdf", encoding={"t": options, "y": options})
    return path


def test_a_truncated_file_is_named(tmp_path):
    path = write_hdf5(tmp_path / "run.nc")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StoreDamagedError, match=r"run\.nc.*truncated"):
        fit(path)


@pytest.mark.parametrize(
    "encoding", [{"fletcher32": True}, {"compression": "gzip"}], ids=["fletcher32", "gzip"]
)
def test_a_damaged_chunk_of_a_file_is_named(encoding, tmp_path, quick):
    path = write_hdf5(tmp_path / "run.nc", **encoding)
    with h5py.File(path) as file:
        where = file["y"].id.get_chunk_info(6)
    with open(path, "r+b") as file:
        file.seek(where.byte_offset + where.size // 2)
        file.write(bytes(64))
    with pytest.raises(StoreDamagedError, match=r"\[60000:70000\] of 'y' of .*run\.nc.*chunk 6"):
        fit(path)


HOLD = """
import sys, h5py
with h5py.File(sys.argv[1], "r+") as file:
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_file_that_is_being_written_is_named(tmp_path, expected, monkeypatch):
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    path = write_hdf5(tmp_path / "run.nc")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"held\n"
        with pytest.raises(StoreLockedError, match=r"run\.nc.*lock"):
            fit(path)
        writer.stdin.close()
    assert_same_bits(fit(path), expected)


def test_a_file_that_is_changed_in_place_is_refused(tmp_path, quick):
    path = write_hdf5(tmp_path / "run.nc")
    with h5py.File(path) as file:
        offset = file["y"].id.get_chunk_info(8).byte_offset

    def change() -> None:
        with open(path, "r+b") as file:
            file.seek(offset + 800)
            file.write(np.float64(0.123).tobytes())

    with pytest.raises(DataChangedError, match=r"chunk 8 of .*run\.nc"):
        fit(path, callback=after_the_first_pass(change))
