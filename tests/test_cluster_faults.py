"""Machines that come and go: the same bits, or an error that says why and from where to go on."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pytest
from distributed import Client
from distributed.protocol.pickle import dumps

import faulty_cluster as faulty
from faulty_cluster import (
    WATCHDOG_SECONDS,
    Rows,
    after_pass,
    assert_nothing_left,
    assert_same_bits,
    fit,
    kill,
    kill_all,
    nannies,
    pids,
    processes,
    until,
    within,
)
from nlsq_dask import fit_dataset
from nlsq_dask.errors import WorkerError
from nlsq_dask.evaluate import waiting, worker
from nlsq_dask.evaluate.departure import end_with_client

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "a.zarr"
    faulty.write_store(path)
    return path


@pytest.fixture
def rows(store, tmp_path) -> Rows:
    (tmp_path / "orders").mkdir()
    return Rows(store, tmp_path / "orders")


@pytest.fixture(scope="module")
def expected(store, tmp_path_factory):
    """The fit that nobody disturbs, in this process."""
    return fit(Rows(store, tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture(scope="module")
def expected_of_store(store):
    return fit(store, cache_bytes=None, prefetch=True)


@pytest.fixture(scope="module")
def restless():
    """A client of two workers that come back."""
    with nannies(2) as client:
        yield client


@pytest.fixture
def counted(record_property):
    """Count a fault, and how it ended."""

    def count(how: str, number: int = 1) -> None:
        record_property("faults of a cluster tried", number)
        record_property(f"faults of a cluster ended with {how}", number)

    return count


def assert_no_temporary_files(checkpoint: Path) -> None:
    assert not [p.name for p in checkpoint.parent.iterdir() if p.name.startswith(".")]
    beside = checkpoint.parent.glob(f"*{checkpoint.name}*")
    assert [path.name for path in beside] == [checkpoint.name]


# -- a worker dies

MOMENTS = {
    "when it is asked first": ("probe_worker", 0),
    "in the sample": ("map_chunks", 17),
    "while it compiles ahead": ("compile_ahead", 0),
    "in a pass": ("reduce_range", 17),
}
LONG = pytest.mark.slow


@pytest.mark.parametrize(
    "moment",
    ["in a pass", *(pytest.param(m, marks=LONG) for m in MOMENTS if m != "in a pass")],
)
def test_a_worker_dies(moment, rows, expected, restless, counted):
    restless.wait_for_workers(2, timeout=60)
    rows.order(*MOMENTS[moment], "kill")
    before = pids(restless)
    assert_same_bits(within(WATCHDOG_SECONDS, lambda: fit(rows, restless)), expected)
    assert len(rows.obeyed()) == 1
    assert rows.obeyed()[0] in before
    assert_nothing_left(restless)
    counted("the same bits")


@LONG
def test_all_workers_die_between_passes(store, expected_of_store, restless, counted):
    """With what they had cached, and the problem; nannies start others."""
    restless.wait_for_workers(2, timeout=60)
    died: list[int] = []

    def kill_them() -> None:
        died.extend(pids(restless))
        kill_all(died)

    options = {"cache_bytes": None, "prefetch": True, "callback": after_pass(2, kill_them)}
    actual = within(WATCHDOG_SECONDS, lambda: fit(store, restless, **options))
    assert_same_bits(actual, expected_of_store)
    assert len(died) == 2
    assert not set(died) & set(pids(restless))
    assert_nothing_left(restless)
    counted("the same bits")


def test_a_chunk_kills_whoever_reads_it(rows, restless, counted, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "run.h5"
    checkpoint.parent.mkdir()

    def poison() -> None:
        rows.order("read", 17, "killalways")

    options = {"checkpoint": checkpoint, "callback": after_pass(1, poison)}
    with pytest.raises(WorkerError, match="kept killing its worker") as caught:
        within(WATCHDOG_SECONDS, lambda: fit(rows, restless, **options))
    assert "at chunk 17 of Rows of 120,000 rows" in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    assert caught.value.checkpoint == checkpoint
    # Dask's four, and the process that was started to find the chunk.
    assert len(set(rows.obeyed())) == 5
    assert_nothing_left(restless)
    assert_no_temporary_files(checkpoint)
    counted("an error that names the cause")


# -- workers come


def test_workers_that_come_get_work(rows, expected, counted, tmp_path):
    """Of data so small that one worker had it in one piece."""
    with processes(tmp_path / "cluster", 1) as (cluster, _, workers, client):

        def start_others() -> None:
            workers.extend(cluster.start_worker() for _ in range(2))
            client.wait_for_workers(3, timeout=60)

        options = {"callback": after_pass(1, start_others)}
        assert_same_bits(within(WATCHDOG_SECONDS, lambda: fit(rows, client, **options)), expected)
        assert rows.readers() == {worker.pid for worker in workers}
        assert_nothing_left(client)
    counted("the same bits")


# -- the scheduler dies


@pytest.mark.parametrize("is_restarted", [pytest.param(False, marks=LONG), True])
def test_the_scheduler_dies(is_restarted, rows, expected, counted, tmp_path):
    """In the middle of a pass. Another on the same port knows nothing, and takes the fit on."""
    checkpoint = tmp_path / "checkpoints" / "run.h5"
    checkpoint.parent.mkdir()
    with processes(tmp_path / "cluster", 2) as (cluster, scheduler, _, client):

        def strike() -> None:
            until(lambda: bool(rows.obeyed()), 60)
            kill(scheduler)
            if is_restarted:
                cluster.start_scheduler()

        striking = threading.Thread(target=strike, daemon=True)

        def soon() -> None:
            rows.order("reduce_range", 17, "dawdle")
            striking.start()

        options = {"checkpoint": checkpoint, "callback": after_pass(2, soon)}
        with pytest.raises(WorkerError, match="the connection to it was lost") as caught:
            within(60, lambda: fit(rows, client, **options))
        striking.join(60)
        assert caught.value.checkpoint == checkpoint
        assert str(checkpoint) in str(caught.value)
        assert not [t.name for t in threading.enumerate() if t.name.startswith("nlsq")]
        assert_no_temporary_files(checkpoint)
        where = None
        if is_restarted:
            until(lambda: client.status == "running", 60)
            cluster.start_worker()
            client.wait_for_workers(1, timeout=60)
            where = client
        resume = {"resume_from_checkpoint": checkpoint}
        assert_same_bits(within(WATCHDOG_SECONDS, lambda: fit(rows, where, **resume)), expected)
        if is_restarted:
            assert_nothing_left(client)
    counted("an error that names the cause")


@LONG
@pytest.mark.parametrize("moment", ["map_chunks", "probe_worker", "compile_ahead", "between"])
def test_the_scheduler_dies_at_other_moments(moment, rows, expected, counted, tmp_path):
    impatient = dask.config.set({"distributed.comm.timeouts.connect": "3s"})
    with impatient, processes(tmp_path / "cluster", 2) as (_, scheduler, _, client):
        options = {}
        if moment == "between":
            options["callback"] = after_pass(2, lambda: kill(scheduler))
        else:
            rows.order(moment, 0, "dawdle")

        def strike() -> None:
            until(lambda: bool(rows.obeyed()), 60)
            kill(scheduler)

        if moment != "between":
            threading.Thread(target=strike, daemon=True).start()
        with pytest.raises(WorkerError, match=r"connection to it was lost|one that is clos"):
            within(WATCHDOG_SECONDS, lambda: fit(rows, client, **options))
        assert not [t.name for t in threading.enumerate() if t.name.startswith("nlsq")]
        with pytest.raises(WorkerError):
            within(WATCHDOG_SECONDS, lambda: fit(rows, client))
    counted("an error that names the cause")


@LONG
def test_the_scheduler_dies_after_the_last_pass(rows, expected, counted, tmp_path):
    """Nothing more is asked of it."""
    with processes(tmp_path / "cluster", 2) as (_, scheduler, _, client):
        last = expected.num_passes
        options = {"callback": after_pass(last, lambda: kill(scheduler))}
        assert_same_bits(within(WATCHDOG_SECONDS, lambda: fit(rows, client, **options)), expected)
    counted("the same bits")


# -- no worker is left


@LONG
def test_nobody_waits_for_ever_for_workers(rows, expected, counted, tmp_path, monkeypatch):
    checkpoint = tmp_path / "run.h5"
    monkeypatch.setattr(waiting, "_PATIENCE_SECONDS", 4.0)
    with processes(tmp_path / "cluster", 2) as (_, _, workers, client):

        def strike() -> None:
            for _ in workers:
                rows.order("reduce_range", 17, "kill")
            until(lambda: bool(rows.obeyed()), 60)
            for worker in workers:
                kill(worker)

        def arm() -> None:
            threading.Thread(target=strike, daemon=True).start()

        options = {"checkpoint": checkpoint, "callback": after_pass(1, arm)}
        with pytest.raises(WorkerError, match="and lost all; none came for 4 sec") as caught:
            within(WATCHDOG_SECONDS, lambda: fit(rows, client, **options))
        assert caught.value.checkpoint == checkpoint
        until(lambda: not faulty.left_on_scheduler(client), 20)
    resume = {"resume_from_checkpoint": checkpoint}
    assert_same_bits(fit(rows, **resume), expected)
    counted("an error that names the cause")


@LONG
def test_all_workers_die_and_others_are_started(rows, expected, counted, tmp_path):
    with processes(tmp_path / "cluster", 2) as (cluster, _, workers, client):

        def strike() -> None:
            until(lambda: bool(rows.obeyed()), 60)
            for worker in workers:
                kill(worker)
            time.sleep(3)
            for _ in range(3):
                cluster.start_worker()

        def arm() -> None:
            rows.order("reduce_range", 17, "dawdle")
            threading.Thread(target=strike, daemon=True).start()

        options = {"callback": after_pass(1, arm)}
        assert_same_bits(within(WATCHDOG_SECONDS, lambda: fit(rows, client, **options)), expected)
        client.wait_for_workers(3, timeout=60)
        assert_nothing_left(client)
    counted("the same bits")


# -- workers that neither work nor die


@LONG
@pytest.mark.parametrize("has_nanny", [True, False])
def test_a_worker_is_stopped_for_longer_than_a_pass(has_nanny, rows, expected, counted, tmp_path):
    """The scheduler misses it after a while; what it did not finish others do."""
    ttl = "15s"  # a worker that loads JAX is silent, too
    rows.order("reduce_range", 17, "stop")

    def stopped_fit(client: Client) -> None:
        assert_same_bits(within(WATCHDOG_SECONDS, lambda: fit(rows, client)), expected)
        (stopped,) = rows.obeyed()
        if not has_nanny:
            os.kill(stopped, signal.SIGCONT)
        assert_nothing_left(client)

    if has_nanny:
        with nannies(2, **{"distributed.scheduler.worker-ttl": ttl}) as client:
            stopped_fit(client)
    else:
        setting = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": ttl}
        with processes(tmp_path / "cluster", 2, **setting) as (*_, client):
            stopped_fit(client)
    counted("the same bits")


@LONG
def test_a_worker_runs_out_of_memory(rows, expected, counted):
    """Its nanny kills it at the limit."""
    with nannies(2, memory_limit="1.5GiB") as client:
        before = pids(client)
        rows.order("reduce_range", 17, "hoard")
        assert_same_bits(within(WATCHDOG_SECONDS, lambda: fit(rows, client)), expected)
        assert rows.obeyed()[0] in before
        assert rows.obeyed()[0] not in pids(client)
        assert_nothing_left(client)
    counted("the same bits")


@LONG
def test_every_worker_runs_out_of_memory(rows, counted, tmp_path):
    with nannies(2, memory_limit="1.5GiB") as client:
        rows.order("reduce_range", 17, "hoardalways")
        with pytest.raises(WorkerError, match=r"at chunks .* of Rows of .* more memory than"):
            within(WATCHDOG_SECONDS, lambda: fit(rows, client))
        assert_nothing_left(client)
    counted("an error that names the cause")


# -- a store that one worker cannot read


@LONG
@pytest.mark.parametrize("deed", ["raise", "raisealways"])
def test_a_read_fails_on_a_worker(deed, rows, expected, restless, counted, tmp_path):
    checkpoint = tmp_path / "run.h5"
    restless.wait_for_workers(2, timeout=60)

    def break_disk() -> None:
        rows.order("reduce_range", 17, deed)

    options = {"checkpoint": checkpoint, "callback": after_pass(1, break_disk)}
    if deed == "raise":
        assert_same_bits(within(WATCHDOG_SECONDS, lambda: fit(rows, restless, **options)), expected)
        counted("the same bits")
    else:
        with pytest.raises(OSError, match="a disk that fails") as caught:
            within(WATCHDOG_SECONDS, lambda: fit(rows, restless, **options))
        assert str(checkpoint) in "".join(caught.value.__notes__)
        counted("an error that names the cause")
    assert_nothing_left(restless)


@LONG
def test_one_worker_cannot_read_the_store(rows, restless, counted):
    restless.wait_for_workers(2, timeout=60)
    rows.order("probe_worker", 0, "raise")
    match = r"readable from every worker, but one could not, tcp://.*: OSError: .*disk that fails"
    with pytest.raises(WorkerError, match=match):
        within(WATCHDOG_SECONDS, lambda: fit(rows, restless))
    assert_nothing_left(restless)
    counted("an error that names the cause")


# -- the client dies


@LONG
def test_workers_let_go_of_the_fit_of_a_client_that_died(rows, store, restless, counted):
    """Of all of it: tasks, settings, problem, cached chunks. Others' fits go on."""
    address = restless.scheduler.address
    script = (
        "import sys; from pathlib import Path; from distributed import Client; "
        "import faulty_cluster as f; "
        "f.fit(Path(sys.argv[1]), Client(sys.argv[2]), cache_bytes=None, "
        "callback=f.after_pass(2, lambda: f.kill_all([f.os.getpid()])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, store, address],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        timeout=120,
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert_nothing_left(restless)
    counted("nothing left")


def test_a_worker_of_another_version_is_refused_whenever_it_comes():
    """By itself: nobody asks it when it comes in the middle of a pass."""
    spec = worker.HomeSpec(
        token="1",
        payload=b"",
        cache_bytes=0,
        prefetch=False,
        precision="float64",
        compilation_cache_dir=None,
        jaxlib="0.0.1",
    )
    with pytest.raises(WorkerError, match=r"must have the client's jaxlib, 0\.0\.1, but one"):
        worker.home_of(spec)


def test_a_scheduler_needs_nothing_of_this_package():
    """What it is sent to see to the end of a fit is read where the package cannot be imported."""
    sent = []

    class Listening:
        id = "client-1"

        def register_plugin(self, plugin, name):
            sent.append(dumps(plugin))

    end_with_client(Listening(), "nlsq-settings-1")
    script = (
        "import sys; sys.modules['nlsq_dask'] = None; "
        "import pickle; plugin = pickle.loads(sys.stdin.buffer.read()); "
        "from distributed import SchedulerPlugin; assert isinstance(plugin, SchedulerPlugin); "
        "plugin.remove_client(None, 'another')"
    )
    subprocess.run([sys.executable, "-c", script], input=sent[0], check=True, timeout=60)


# -- at any moment

SLOWLY = {"cache_bytes": None, "prefetch": True, "callback": lambda _: time.sleep(0.3)}


def fit_under(strike, store, client):
    """The fit, while a thread of its own strikes until the event that it is given is set."""
    is_over = threading.Event()
    striking = threading.Thread(target=strike, args=(is_over,), daemon=True)
    striking.start()
    try:
        return within(WATCHDOG_SECONDS, lambda: fit(store, client, **SLOWLY))
    finally:
        is_over.set()
        striking.join(30)


@LONG
@pytest.mark.parametrize("seed", range(6))
def test_workers_die_at_random_moments(seed, store, expected_of_store, restless, counted):
    """One every second or so, for as long as the fit lasts; at most three of a task's four."""
    restless.wait_for_workers(2, timeout=60)
    chance = random.Random(seed)
    killed = []

    def strike(is_over: threading.Event) -> None:
        while len(killed) < 3 and not is_over.wait(chance.uniform(0.0, 0.8)):
            if alive := sorted(pids(restless)):
                killed.append(chance.choice(alive))
                kill_all(killed[-1:])

    assert_same_bits(fit_under(strike, store, restless), expected_of_store)
    assert killed
    assert_nothing_left(restless)
    counted("the same bits", len(killed))


@LONG
@pytest.mark.parametrize("seed", range(4))
def test_workers_stutter_at_random_moments(seed, store, expected_of_store, restless, counted):
    """Stopped for up to two seconds, both at times: slower, and nothing else."""
    restless.wait_for_workers(2, timeout=60)
    chance = random.Random(seed)
    stopped = []

    def strike(is_over: threading.Event) -> None:
        alive = sorted(pids(restless))
        while not is_over.wait(chance.uniform(0.0, 0.5)):
            stopped.append(chance.sample(alive, chance.randint(1, len(alive))))
            for signum in (signal.SIGSTOP, signal.SIGCONT):
                for number in stopped[-1]:
                    os.kill(number, signum)
                if signum == signal.SIGSTOP:
                    is_over.wait(chance.uniform(0.1, 2.0))

    assert_same_bits(fit_under(strike, store, restless), expected_of_store)
    assert stopped
    assert_nothing_left(restless)
    counted("the same bits", len(stopped))


@LONG
@pytest.mark.parametrize("seed", range(8))
def test_the_scheduler_dies_at_a_random_moment(seed, store, expected_of_store, counted, tmp_path):
    """The fit ends, and names the cause; what was written of it leads to the same bits."""
    checkpoint = tmp_path / "checkpoints" / "run.h5"
    checkpoint.parent.mkdir()
    seconds = random.Random(seed).uniform(0.0, 6.0)
    impatient = dask.config.set({"distributed.comm.timeouts.connect": "3s"})
    with impatient, processes(tmp_path / "cluster", 2) as (_, scheduler, _, client):
        striking = threading.Timer(seconds, lambda: kill(scheduler))
        striking.start()
        how = "the same bits"
        try:
            run = functools.partial(fit, store, client, checkpoint=checkpoint, **SLOWLY)
            actual = within(WATCHDOG_SECONDS, run)
        except WorkerError as error:
            how, resume = "an error that names the cause", error.checkpoint
            assert resume == (checkpoint if checkpoint.exists() else None)
            actual = fit(store, resume_from_checkpoint=resume, **SLOWLY)
        striking.join(60)
        assert not [t.name for t in threading.enumerate() if t.name.startswith("nlsq")]
    assert [p.name for p in checkpoint.parent.iterdir()] in ([], [checkpoint.name])
    assert_same_bits(actual, expected_of_store)
    counted(how)


@LONG
def test_blocks_of_dask_arrays_are_computed_again(store, restless, counted):
    """Those that the workers kept in memory, too."""
    import xarray as xr

    import problems

    restless.wait_for_workers(2, timeout=60)
    ds = xr.open_zarr(store, consolidated=False) + 0.0

    def blocks_fit(**options):
        return fit_dataset(ds, problems.decay, y="y", p0=problems.P0, client=restless, **options)

    undisturbed = within(WATCHDOG_SECONDS, blocks_fit)
    strike = after_pass(1, lambda: kill_all(pids(restless)[:1]))
    assert_same_bits(within(WATCHDOG_SECONDS, lambda: blocks_fit(callback=strike)), undisturbed)
    assert_nothing_left(restless)
    counted("the same bits")
