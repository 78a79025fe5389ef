"""Two real worker processes of one thread each, on this machine's own address."""

from __future__ import annotations

from distributed import LocalCluster


def start_workers() -> LocalCluster:
    return LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0",
    )
