"""Forwards the services' exports to the demo's receiver and to a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.request import ProxyHandler, Request, build_opener, urlopen

TIMEOUT = 5.0
# These headers belong to one connection.
OWN_HEADERS = frozenset({"accept-encoding", "connection", "content-length", "host"})


class Relay(ThreadingHTTPServer):
    """A server that forwards OTLP.

    Args:
        receiver: The URL of the demo's own receiver, whose answer is the relay's.
        backend: The URL of the backend.
    """

    daemon_threads = True

    def __init__(self, receiver: str, backend: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = self.server_address[1]
        self.receiver = receiver
        self.backend = backend.rstrip("/")
        self.taken: set[str] = set()
        self.failures: dict[str, str] = {}

    def report(self) -> list[str]:
        """State whether the backend has received the traces and the metrics."""
        lines = []
        for kind in ("traces", "metrics"):
            path = f"/v1/{kind}"
            if path in self.taken:
                lines.append(f"The {kind} were also sent to {self.backend}.")
            else:
                why = self.failures.get(path, "there were none")
                lines.append(f"The {kind} were not sent to {self.backend}: {why}.")
        return lines


class _Handler(BaseHTTPRequestHandler):
    server: Relay

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in OWN_HEADERS
        }
        relay = self.server
        copy = Request(relay.backend + self.path, body, headers)
        try:
            with urlopen(copy, timeout=TIMEOUT):
                relay.taken.add(self.path)
        except (OSError, HTTPException) as error:
            relay.failures[self.path] = str(error)
        local = build_opener(ProxyHandler({}))
        request = Request(relay.receiver + self.path, body, headers)
        with local.open(request, timeout=TIMEOUT) as answer:
            self.send_response(answer.status)
            content = answer.read()
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing: the demo prints a picture."""


@contextlib.contextmanager
def relay(receiver: str, backend: str) -> Iterator[Relay]:
    """Run a relay in a thread."""
    with Relay(receiver, backend) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
