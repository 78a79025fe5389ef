"""What a process may use of its machine: control groups as containers and batch jobs have them."""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import pytest
import xarray as xr

from nlsq_dask import HybridStreamingConfig, fit_dataset, machine
from nlsq_dask.errors import MemoryProjectionError
from nlsq_dask.evaluate.workers import memory_of

MANY = 2**40


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write the files of control groups, for a machine of 4 TiB and as many processors as any."""

    def write(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
        monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")

    all_of_it = SimpleNamespace(total=4 * MANY, available=3 * MANY)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: all_of_it)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    return write


SECOND_VERSION = {
    "job/step/memory.max": "max\n",
    "job/memory.max": "4000\n",
    "job/memory.current": "1500\n",
    "job/memory.stat": "anon 1000\nfile 500\ninactive_file 300\n",
    "job/cpu.max": "250000 100000\n",
}
FIRST_VERSION = {
    "memory/job/memory.limit_in_bytes": "4000\n",
    "memory/job/memory.usage_in_bytes": "1500\n",
    "memory/job/memory.stat": "inactive_file 0\ntotal_inactive_file 300\n",
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
    "cpu/job/step/cpu.cfs_quota_us": "-1\n",
    "cpu/job/step/cpu.cfs_period_us": "100000\n",
    "cpu/job/cpu.cfs_quota_us": "250000\n",
    "cpu/job/cpu.cfs_period_us": "100000\n",
}
INSIDE = {
    "memory.max": "4000\n",
    "memory.current": "1500\n",
    "memory.stat": "inactive_file 300\n",
    "cpu.max": "250000 100000\n",
}


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/job/step\n", SECOND_VERSION),
        ("2:cpu,cpuacct:/job/step\n1:memory:/job\n0::/\n", FIRST_VERSION),
        ("0::/\n", INSIDE),
        ("0::/kubepods/of/the/host\n", INSIDE),
    ],
    ids=["batch job", "first version", "container", "container that is told its path outside"],
)
def test_limits_of_control_groups_hold(own, files, groups):
    groups(own, files)
    assert machine.total_memory() == 4000
    assert machine.available_memory() == 4000 - (1500 - 300)
    assert machine.num_cpus() == 3


@pytest.mark.parametrize(
    "files", [{}, {"memory.max": "max\n", "memory.current": "7\n", "cpu.max": "max 100000\n"}]
)
def test_without_limits_there_is_all_of_the_machine(files, groups):
    groups("0::/\n", files)
    assert machine.total_memory() == 4 * MANY
    assert machine.available_memory() == 3 * MANY
    assert machine.num_cpus() == 64


def test_where_there_are_no_groups_there_is_all_of_the_machine(groups, tmp_path):
    groups("0::/\n", {})
    (tmp_path / "own").unlink()
    assert machine.available_memory() == 3 * MANY
    assert machine.num_cpus() == 64


def test_more_in_use_than_allowed_leaves_nothing(groups):
    groups("0::/\n", {"memory.max": "4000", "memory.current": "9000"})
    assert machine.available_memory() == 0


def test_a_fit_that_its_container_has_no_room_for_is_refused(groups, tmp_path):
    t = np.linspace(0, 1, 1000)
    path = tmp_path / "rows.zarr"
    xr.Dataset({"y": ("t", 2 * t)}, coords={"t": t}).to_zarr(path, consolidated=False)
    groups("0::/\n", {"memory.max": str(2**20), "memory.current": "0"})
    with pytest.raises(MemoryProjectionError, match="limited to 1 MiB"):
        fit_dataset(path, lambda t, a=1.0: a * t, y="y", config=HybridStreamingConfig(verbose=0))


def test_workers_without_a_limit_share_their_machine():
    def run(function, *arguments, workers, on_error):
        return dict.fromkeys(workers, 1200)

    workers = {
        "a": {"memory_limit": 500, "host": "first"},
        "b": {"memory_limit": 0, "host": "first"},
        "c": {"memory_limit": None, "host": "second"},
    }
    client = mock.Mock(run=run, status="running")
    client.scheduler_info.return_value = {"workers": workers}
    assert memory_of(client, workers) == [500, 600, 1200]
