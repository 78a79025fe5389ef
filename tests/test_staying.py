"""Stores of this machine are read by the thread that wants the rows, as Zarr reads them."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore, ZipStore

from nlsq_dask.sources import staying
from nlsq_dask.sources.buffers import aligned_empty, lending
from nlsq_dask.sources.staying import can_stay, run_here
from nlsq_dask.sources.xarray import column_of

VALUES = np.random.default_rng(0).normal(size=(60, 40))
CODECS = {
    "raw": None,
    "blosc": BloscCodec(cname="lz4"),
    "zstd": ZstdCodec(),
    "several": [GzipCodec(), Crc32cCodec()],
}


@pytest.fixture(autouse=True)
def only_own_loops(monkeypatch):
    """None left by another test; those of this one are closed after it."""
    idle = []
    monkeypatch.setattr(staying, "_IDLE", idle)
    yield
    while idle:
        idle.pop().close()


async def here() -> str:
    """The thread it runs on, after a turn of the loop; what it hands to another runs there too."""
    await asyncio.sleep(0)
    inner = await asyncio.to_thread(threading.get_ident)
    assert inner == threading.get_ident()
    return threading.current_thread().name


# -- coroutines


def test_a_coroutine_and_its_threads_stay_in_the_thread():
    assert run_here(here()) == threading.current_thread().name
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
        assert reader.submit(run_here, here()).result().startswith("reader")


def test_the_caller_s_context_is_seen_and_left_alone():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(1)

    async def seen() -> tuple[int, int]:
        own = variable.get()
        variable.set(2)
        return own, await asyncio.to_thread(variable.get)

    assert run_here(seen()) == (1, 2)
    assert variable.get() == 1


def test_loops_are_used_again_and_few_are_kept(monkeypatch):
    monkeypatch.setattr(staying, "_MOST_IDLE", 2)
    for _ in range(3):
        run_here(here())
    assert len(staying._IDLE) == 1
    everyone = threading.Barrier(5)

    async def together() -> None:
        everyone.wait()

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(lambda _: run_here(together()), range(5)))
    assert len(staying._IDLE) == 2


@pytest.mark.parametrize("where", ["coroutine", "thread"])
def test_after_an_error_nothing_of_a_coroutine_is_left(where):
    others = []

    async def other() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            others.append("ended")

    def refuse() -> None:
        raise OSError("the disk is gone")

    async def failing() -> None:
        task = asyncio.create_task(other())
        await asyncio.sleep(0)
        if where == "thread":
            await asyncio.to_thread(refuse)
        refuse()
        await task

    with pytest.raises(OSError, match="the disk is gone"):
        run_here(failing())
    assert others == ["ended"]
    assert not staying._IDLE
    assert run_here(here()) == threading.current_thread().name


def test_an_interrupt_goes_through():
    async def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_here(interrupted())
    assert not staying._IDLE


def test_a_coroutine_that_waits_for_nothing_needs_no_turn_of_a_loop(monkeypatch):
    async def decoded() -> int:
        return await asyncio.to_thread(int, "7") + len(await asyncio.to_thread(str, 35))

    def no_turn(self) -> None:
        raise AssertionError("a turn of the loop")

    with monkeypatch.context() as patched:
        patched.setattr(staying._StayingLoop, "_run_once", no_turn)
        assert run_here(decoded()) == 9
    assert can_stay()


def test_what_a_coroutine_waits_for_may_come_or_fail_at_any_time():
    async def waiting() -> list[object]:
        loop, met = asyncio.get_running_loop(), []
        for number in range(3):
            future = loop.create_future()
            loop.call_soon(future.set_result, number)
            met.append(await future)
            future = loop.create_future()
            loop.call_soon(future.set_exception, OSError(number))
            try:
                await future
            except OSError as error:
                met.append(str(error))
        met.append(await asyncio.gather(asyncio.sleep(0, "a"), asyncio.to_thread(str, "b")))
        return met

    assert run_here(waiting()) == [0, "0", 1, "1", 2, "2", ["a", "b"]]
    assert can_stay()


@pytest.mark.parametrize("turns", [0, 2])
def test_after_an_error_no_loop_is_left_running(turns):
    async def failing() -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        run_here(failing())
    assert can_stay()
    assert run_here(here()) == threading.current_thread().name


def test_there_is_no_staying_in_a_running_loop():
    async def asked() -> bool:
        return can_stay()

    assert can_stay()
    assert not asyncio.run(asked())


def test_idle_loops_are_closed_when_python_ends():
    run_here(here())
    (runner,) = staying._IDLE
    loop = runner.get_loop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        staying._close_idle()
    assert loop.is_closed()
    assert not staying._IDLE


# -- stores


def store_of(kind: str, path) -> zarr.abc.store.Store:
    if kind == "folder":
        return LocalStore(path / "rows.zarr")
    if kind == "zip":
        return ZipStore(path / "rows.zip", mode="w")
    return MemoryStore()


def written(store, codec: str = "raw", **options):
    array = zarr.create_array(
        store,
        name="y",
        data=VALUES,
        chunks=(7, 40),
        compressors=CODECS[codec],
        dimension_names=["row", "column"],
        **options,
    )
    if isinstance(store, ZipStore):
        store.close()
        store = ZipStore(store.path, mode="r")
    opened = xr.open_zarr(store, chunks=None, consolidated=False)
    assert array.shape == VALUES.shape
    return column_of("y", opened.y.variable)


@pytest.fixture
def threads_of_stores(monkeypatch):
    """Threads in which stores were asked for a chunk."""
    threads = set()
    for kind in (LocalStore, MemoryStore, ZipStore):
        get = kind.get

        async def noted(self, key, *args, get=get, **options):
            if "c/" in key:
                threads.add(threading.current_thread())
            return await get(self, key, *args, **options)

        monkeypatch.setattr(kind, "get", noted)
    return threads


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["folder", "zip", "memory"])
def test_stores_of_this_machine_are_read_in_the_thread(kind, codec, tmp_path, threads_of_stores):
    column = written(store_of(kind, tmp_path), codec)
    for rows in (slice(0, 60), slice(5, 23), slice(14, 21), slice(8, 8), slice(0, 60, 3)):
        for empty in (None, aligned_empty):
            with lending(empty):
                read = column.read((rows, slice(2, 40)))
            np.testing.assert_array_equal(read, VALUES[rows, 2:40], strict=True)
    assert threads_of_stores == {threading.current_thread()}


def test_shards_are_read_in_the_thread(tmp_path, threads_of_stores):
    column = written(store_of("folder", tmp_path), "zstd", shards=(21, 40))
    threads_of_stores.clear()  # writing parts of a shard reads it
    np.testing.assert_array_equal(column.read((slice(5, 50), slice(0, 40))), VALUES[5:50])
    assert threads_of_stores == {threading.current_thread()}


def test_in_a_notebook_s_loop_zarr_s_own_thread_reads(tmp_path, threads_of_stores):
    column = written(store_of("folder", tmp_path))

    async def cell() -> np.ndarray:
        return column.read((slice(5, 23), slice(0, 40)))

    np.testing.assert_array_equal(asyncio.run(cell()), VALUES[5:23])
    assert threads_of_stores
    assert threading.current_thread() not in threads_of_stores


def test_a_store_of_another_kind_is_read_as_zarr_does(tmp_path, threads_of_stores):
    class Waiting(zarr.storage.WrapperStore):
        """It may wait for anything."""

    inner = store_of("folder", tmp_path)
    written(inner)
    opened = xr.open_zarr(Waiting(inner), chunks=None, consolidated=False)
    column = column_of("y", opened.y.variable)
    np.testing.assert_array_equal(column.read((slice(0, 60), slice(0, 40))), VALUES)
    assert threads_of_stores
    assert threading.current_thread() not in threads_of_stores
