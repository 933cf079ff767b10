"""A Kafka broker in one process, for experiments and tests.

    python examples/embedded_broker.py 9092

starts the broker on this port of the loopback interface and prints its address. Without
a port, it chooses a free one. Ctrl-C stops it. The broker is noida-db, one binary in a
wheel.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

START_TIMEOUT = 120.0
STOP_TIMEOUT = 10.0
POLL_INTERVAL = 0.01


def die_with_parent() -> None:
    """In a child on Linux: stop when the parent ends, however it ends."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class EmbeddedBroker:
    """A broker that is a context manager; `address` is its "host:port".

    Args:
        data: The directory of its data, or None for a temporary one. A broker
            continues with the data of an earlier one.
        port: The port, or 0 for a free one.
    """

    def __init__(self, data: Path | None = None, port: int = 0) -> None:
        self._data = data
        self._temporary: Path | None = None
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        if self._data is None:
            self._data = self._temporary = Path(tempfile.mkdtemp(prefix="broker-"))
        package = importlib.util.find_spec("noida_db")
        if package is None or package.origin is None:
            sys.exit("The embedded broker is missing: pip install noida-db==0.2.3")
        # The command of that name only runs this binary; we want the process.
        binary = Path(package.origin).with_name("noida-db")
        command = [str(binary), "start", "--only", "kafka", "--host", "127.0.0.1"]
        command += ["--kafka-port", str(self._port), "--data-dir", str(self._data)]
        with tempfile.TemporaryFile() as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            )
            self._port = self._read_port(output)

    def _read_port(self, output: IO[bytes]) -> int:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            alive = self._process.poll() is None and time.monotonic() < deadline
            output.seek(0)
            printed = output.read()
            if match := re.search(rb"kafka\s+127\.0\.0\.1:(\d+)\s", printed):
                return int(match[1])
            if not alive:
                self.kill()
                raise RuntimeError(f"the broker did not start: {printed.decode()}")
            time.sleep(POLL_INTERVAL)

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> EmbeddedBroker:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


if __name__ == "__main__":
    with EmbeddedBroker(port=int(sys.argv[1]) if sys.argv[1:] else 0) as broker:
        print(broker.address, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
