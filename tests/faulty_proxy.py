"""An HTTP proxy that fails a seeded share of requests, as networks and services do.

What happens to a request follows from the seed, its path and how often that path was asked for:
the same faults in every run, whatever the order of threads and processes.
"""

from __future__ import annotations

import functools
import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

# "truncate" breaks off in the middle of what was announced; "shorten" announces less, as a cache
# in between may that was itself cut short; "garble" has the right length.
KINDS = ("refuse", "reset", "truncate", "shorten", "delay", "garble")
OF_BODIES = ("truncate", "shorten", "garble")
_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>busy</Message></Error>"


@dataclass
class Faults:
    """Which requests fail, how, and how many of each kind did."""

    share: float = 0.0
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    within: str = ""  # the part of a path that only the requests to be failed have
    most_per_path: int | None = None
    delay_seconds: float = 0.2
    done: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    paths: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)  # by path
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_faults(self) -> int:
        return sum(self.done.values())

    def draw(self, method: str, path: str) -> str:
        """What to do to this request; empty if nothing."""
        with self._lock:
            self.num_requests += 1
            self.paths[path] += 1
            rng = random.Random(f"{self.seed} {method} {path} {self.paths[path]}")
            if self.within not in path or rng.random() >= self.share:
                return ""
            if self.most_per_path is not None and self.failed[path] >= self.most_per_path:
                return ""
            kinds = [kind for kind in self.kinds if method == "GET" or kind not in OF_BODIES]
            if not kinds:
                return ""
            kind = rng.choice(kinds)
            self.done[kind] += 1
            self.failed[path] += 1
            return kind


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def __init__(self, *args, upstream: str, faults: Faults):
        self._upstream, self._faults = upstream, faults
        super().__init__(*args)

    def do_GET(self) -> None:
        self._forward()

    def do_HEAD(self) -> None:
        self._forward()

    def do_PUT(self) -> None:
        self._forward()

    def _forward(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        given = self.rfile.read(length) if length else None
        kind = self._faults.draw(self.command, self.path)
        if kind == "reset":
            self._reset()
            return
        if kind == "refuse":
            self._answer(503, [("Content-Type", "application/xml")], _BUSY)
            return
        if kind == "delay":
            time.sleep(self._faults.delay_seconds)
        status, headers, body = self._ask(given)
        if kind == "garble":
            body = random.Random(f"{self._faults.seed} {self.path} {kind}").randbytes(len(body))
        elif kind == "shorten":
            body = body[: len(body) // 2]
        self._answer(status, headers, body, cut=kind == "truncate")

    def _ask(self, given: bytes | None) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.request(self.command, self.path, given, dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        own = {"connection", "transfer-encoding"} | (
            set() if self.command == "HEAD" else {"content-length"}
        )
        for name, value in headers:
            if name.lower() not in own:
                self.send_header(name, value)
        if self.command == "HEAD":
            self.end_headers()
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """Close so that the other end is told of a reset, not of an orderly end."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *args) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def shutdown_request(self, request) -> None:
        """Without the orderly goodbye that would come before a reset."""
        request.close()

    def handle_error(self, request, client_address) -> None:
        """Clients hang up when they give up: no news."""


@contextmanager
def serve_faulty(upstream: str, **options: object) -> Iterator[tuple[str, Faults]]:
    """The URL of a proxy in front of the server at the URL `upstream`, and its faults."""
    faults = Faults(**options)
    handler = functools.partial(_Proxy, upstream=urlsplit(upstream).netloc, faults=faults)
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", faults
        finally:
            server.shutdown()
            thread.join()
