"""Servers on this machine: S3's protocol by moto, and files over HTTP."""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

KEY, SECRET = "AKIAEXAMPLE0000000", "xyzzy-plugh-0123456789-frobozz"


@contextmanager
def serve_s3() -> Iterator[str]:
    """The URL of an S3 endpoint, which signs for anyone and denies the anonymous.

    All endpoints of a process share their buckets, those that have stopped too.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def create_bucket(endpoint: str, bucket: str, region: str = "us-east-1"):
    """A client that may write to the new bucket."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name=region,
    )
    elsewhere = {"CreateBucketConfiguration": {"LocationConstraint": region}}
    client.create_bucket(Bucket=bucket, **(elsewhere if region != "us-east-1" else {}))
    return client


def upload(endpoint: str, folder: Path, bucket: str, *, is_public: bool = False) -> None:
    """Every file under a folder, by its path from there."""
    client = create_bucket(endpoint, bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(
                Bucket=bucket,
                Key=path.relative_to(folder).as_posix(),
                Body=path.read_bytes(),
                ACL="public-read" if is_public else "private",
            )


@dataclass
class Traffic:
    """What was asked of a server of files, and how it answers."""

    authorization: str | None = None  # required
    latency_seconds: float = 0.0
    missing: int = 404
    paths: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def request(self, path: str) -> Iterator[None]:
        with self._lock:
            self.paths[path] += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.latency_seconds)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


class _Files(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args, traffic: Traffic, **options):
        self._traffic = traffic
        super().__init__(*args, **options)

    def do_GET(self):
        with self._traffic.request(self.path):
            wanted = self._traffic.authorization
            if wanted is not None and self.headers.get("Authorization") != wanted:
                self.send_error(401)
            else:
                super().do_GET()

    def send_error(self, code, *args, **options):
        super().send_error(self._traffic.missing if code == 404 else code, *args, **options)

    def log_message(self, *args):
        pass


@contextmanager
def serve_files(folder: Path, **options: object) -> Iterator[tuple[str, Traffic]]:
    traffic = Traffic(**options)
    handler = functools.partial(_Files, directory=folder, traffic=traffic)
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", traffic
        finally:
            server.shutdown()
            thread.join()
