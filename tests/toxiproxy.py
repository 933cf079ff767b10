"""Toxiproxy: a bad network before a broker; Go builds it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from embedded_broker import POLL_INTERVAL, START_TIMEOUT, die_with_parent

from apache_broker import ATTEMPTS, free_ports, made_once

TOXIPROXY_VERSION = "2.12.0"
SOURCE = "github.com/Shopify/toxiproxy/v2/cmd/server"
PROXY = "/proxies/broker"


def why_unavailable() -> str | None:
    """What is missing to build Toxiproxy, or None if nothing is."""
    return None if shutil.which("go") else "Go is not installed"


def program() -> Path:
    """Toxiproxy's server, which Go builds the first time."""
    return made_once(f"toxiproxy-{TOXIPROXY_VERSION}", _build) / "server"


def _build(output: Path) -> None:
    subprocess.run(
        ["go", "install", f"{SOURCE}@v{TOXIPROXY_VERSION}"],
        check=True,
        timeout=600,
        env={**os.environ, "GOBIN": str(output)},
    )


class Toxiproxy:
    """One proxy on the loopback interface, and its server; a context manager.

    It has its port from the start, so that a broker can be told to advertise that.
    """

    def __init__(self) -> None:
        self.address = ""
        self._api_port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        _, port = self.address.split(":")
        return int(port)

    def forward(self, address: str) -> None:
        """Have it pass everything on to "host:port"."""
        self._ask("POST", PROXY, upstream=address)

    def add(self, toxic: str, stream: str, **attributes: int) -> None:
        """Make the network worse, for the connections that there are, too.

        Args:
            toxic: What Toxiproxy calls it.
            stream: "upstream" for what clients send, "downstream" for the answers.
            attributes: The toxic's, as Toxiproxy describes them.
        """
        self._ask(
            "POST", f"{PROXY}/toxics", type=toxic, stream=stream, attributes=attributes
        )

    def cut(self) -> None:
        """Close all connections, and refuse new ones."""
        self._ask("POST", PROXY, enabled=False)

    def heal(self) -> None:
        """Have a good network again."""
        self._ask("POST", "/reset")

    def start(self) -> None:
        reason = why_unavailable()
        if reason is not None:
            raise RuntimeError(f"Toxiproxy cannot be built: {reason}")
        server = program()
        for _ in range(ATTEMPTS):
            (self._api_port,) = free_ports(1)
            command = [str(server), "-host", "127.0.0.1", "-port", str(self._api_port)]
            with tempfile.TemporaryFile() as output:
                self._process = subprocess.Popen(
                    command, stdout=output, stderr=output, preexec_fn=die_with_parent
                )
                if self._answers():
                    break
                self.stop()
                log = _read(output)
        else:
            raise RuntimeError(f"Toxiproxy did not start:\n{log}")
        nowhere = "127.0.0.1:0"
        made = self._ask(
            "POST", "/proxies", name="broker", listen="127.0.0.1:0", upstream=nowhere
        )
        self.address = made["listen"]

    def _answers(self) -> bool:
        """Wait until it answers; whether it does."""
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self._ask("GET", "/version")
            except OSError:
                time.sleep(POLL_INTERVAL)
            else:
                return True
        return False

    def _ask(self, method: str, path: str, **arguments: Any) -> Any:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._api_port, timeout=START_TIMEOUT
        )
        try:
            connection.request(method, path, json.dumps(arguments))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status >= http.client.BAD_REQUEST:
            raise RuntimeError(f"Toxiproxy refuses {path}: {body.decode()}")
        return json.loads(body or "null")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Toxiproxy:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _read(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode()
