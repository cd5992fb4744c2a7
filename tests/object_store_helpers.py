"""A real S3 server on the loopback interface, a proxy before it that can spoil any request, and a store in memory that
dies or fails at any operation."""

from __future__ import annotations

import http.client
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest

from burnish.policy.checkpoint.objects import Objects, Patience
from tests.checkpoint_helpers import PowerCut

SECRET = "wJalrXUtnFEMI"

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIDTEST",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}

BUCKET = "checkpoints"

HURRY = Patience(request_seconds=5.0, tries=4, pause_seconds=0.002)


class Request(NamedTuple):
    """A request as the proxy sees it."""

    number: int
    """Counted from 0 since the rule was set."""
    method: str
    path: str
    """With its query."""


Rule = Callable[[Request], str]
"""What becomes of a request: "pass"; "503 SlowDown" (refused); "lost" (done, without an answer); "hang"; "weak" (done
without its condition)."""


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `target`, as `rule` says."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.released, self.hanging = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self.set(lambda request: "pass")

    def set(self, rule: Rule) -> None:
        """From the next request on; they are counted anew."""
        self.rule, self.seen, self._numbers = rule, [], itertools.count()
        self.released.clear()
        self.hanging.clear()

    def decide(self, method: str, path: str) -> str:
        with self._lock:
            request = Request(next(self._numbers), method, path)
            self.seen.append(request)
            return self.rule(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or has given up is what the tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        verdict = self.server.decide(self.command, self.path)
        if verdict == "hang":
            self.server.hanging.set()
            self.server.released.wait(30)
            self.close_connection = True
            return
        if verdict[0].isdigit():
            status, _, code = verdict.partition(" ")
            self._answer(int(status), {}, f"<Error><Code>{code}</Code></Error>".encode())
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        if verdict == "weak":
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        upstream = http.client.HTTPConnection(*self.server.target, timeout=20)
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if verdict == "lost":
            self.close_connection = True
            return
        self._answer(answer.status, dict(answer.getheaders()), data)

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Stores(NamedTuple):
    """The server behind the proxy."""

    proxy: Proxy
    server: str

    def prefix(self) -> str:
        """A url that no other test writes to."""
        return f"s3://{BUCKET}/run-{next(_prefixes)}"

    def objects(self, url: str, patience: Patience = HURRY, *, kind: type[Objects] = Objects, direct: bool = False):
        """The objects below `url`, through the proxy or straight."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", self.server if direct else self.proxy.url)
            return kind(url, patience)


_prefixes = itertools.count()


@contextmanager
def open_stores() -> Iterator[Stores]:
    """moto's S3 with an empty bucket, on a free port of 127.0.0.1."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    target = server.get_host_and_port()
    made = http.client.HTTPConnection(*target, timeout=20)
    made.request("PUT", f"/{BUCKET}")
    assert made.getresponse().status == 200
    made.close()
    proxy = Proxy(target)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            yield Stores(proxy, f"http://{target[0]}:{target[1]}")
    finally:
        proxy.released.set()
        proxy.shutdown()
        proxy.server_close()
        server.stop()


class MemoryObjects(Objects):
    """A store in this process. Operations that change it are counted from 0.

    `cut_at=7`: the machine dies before the operation 7, or with `after`, once it is done. `fail_from=7`: from that
    operation on nothing works, reading included, until `fail_from` is None again.
    """

    def __init__(self, store: Any = None, *, cut_at: int | None = None, after: bool = False) -> None:
        from obstore.store import MemoryStore

        self.url, self.patience = "memory://", Patience(tries=1)
        self._store = store or MemoryStore()
        self.cut_at, self.after, self.fail_from = cut_at, after, None
        self.operations, self._dead = 0, False
        self._lock = threading.Lock()

    @property
    def store(self) -> Any:
        """What is left of it when the machine is gone."""
        return self._store

    def copy(self) -> Any:
        """Another store that holds the same."""
        other = MemoryObjects()
        for name in self.tree(""):
            other.put(name, bytes(self.read(name)))
        return other.store

    def _changed(self, work: Callable[[], None]) -> None:
        with self._lock:
            now = self.operations == self.cut_at
            self._dead = self._dead or (now and not self.after)
            if self._dead:
                raise PowerCut
            self.operations += 1
            if self.fail_from is None or self.operations <= self.fail_from:
                work()
            else:
                raise ConnectionError(5, "the store is away", self.url)
            if now:
                self._dead = True
                raise PowerCut

    def _patiently(self, name: str, request: Callable[[], Any], tries: int | None = None) -> Any:
        if self.fail_from is not None and self.operations > self.fail_from:
            raise ConnectionError(5, "the store is away", self.url)
        return super()._patiently(name, request, tries)

    def put(self, name: str, data: bytes | memoryview, *, tries: int | None = None) -> None:
        self._changed(lambda: super(MemoryObjects, self).put(name, data, tries=tries))

    def create(self, name: str, data: bytes) -> None:
        self._changed(lambda: super(MemoryObjects, self).create(name, data))

    def remove(self, names: Any) -> None:
        """One after the other: a store may have deleted half of a list when the machine dies."""
        for name in names:
            self._changed(lambda name=name: super(MemoryObjects, self).remove([name]))
