"""Three services, one broker, one trace of them all.

    python examples/demo

starts the embedded broker and three services, each under `opentelemetry-instrument`,
has one checkout go through them, and draws its trace.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import story  # noqa: E402 (beside this file)
import waterfall  # noqa: E402
from embedded_broker import EmbeddedBroker, die_with_parent  # noqa: E402
from kafka.admin import KafkaAdminClient, NewTopic  # noqa: E402
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer  # noqa: E402

PATIENCE = 60.0
# How many there are, how many the broker refuses, and how many the bank declines.
ORDERS, REFUSED, DECLINED = 5, 1, 1


@contextlib.contextmanager
def service(
    name: str,
    broker: EmbeddedBroker,
    receiver: OtlpProtoTestServer,
    log: IO[bytes],
    *options: str,
    **environ: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service, and have it stop when the demo does."""
    launcher = Path(sysconfig.get_path("scripts")) / "opentelemetry-instrument"
    process = subprocess.Popen(
        [launcher, sys.executable, *options, HERE / f"{name}.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        preexec_fn=die_with_parent,
        env={
            **os.environ,
            "BROKER": broker.address,
            "OTEL_SERVICE_NAME": name,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_PYTHON_KAFKA_CAPTURE_QUEUE_TIME": "true",
            # The demo has no patience; a service keeps the defaults.
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
            **environ,
        },
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(name: str, process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    impatience = threading.Timer(PATIENCE, process.kill)
    impatience.start()
    try:
        if process.stdout.readline() != b"ready\n":
            raise story.UnexpectedError(f"{name} did not start")
    finally:
        impatience.cancel()


def collect(
    receiver: OtlpProtoTestServer, timeout: float
) -> tuple[list[story.Span], story.Span, story.Metrics]:
    """Wait until the telemetry is as it should be, or say what is wrong with it."""
    deadline = time.monotonic() + timeout
    received_spans, received_metrics = [], []
    while True:
        received_spans += receiver.drain_spans()
        received_metrics += receiver.drain_metrics()
        spans = story.read(received_spans)
        metrics = story.read_metrics(received_metrics)
        try:
            root = story.check(spans, ORDERS, REFUSED, DECLINED)
            story.check_metrics(metrics, ORDERS, REFUSED, DECLINED)
            return spans, root, metrics
        except story.UnexpectedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def run(
    log: IO[bytes], timeout: float
) -> tuple[list[story.Span], story.Span, story.Metrics]:
    with EmbeddedBroker() as broker, OtlpProtoTestServer() as receiver:
        admin = KafkaAdminClient(bootstrap_servers=broker.address)
        admin.create_topics([NewTopic(each, 1, 1) for each in ("orders", "payments")])
        admin.close()
        with (
            service("payments", broker, receiver, log) as payments,
            service("shipping", broker, receiver, log) as shipping,
        ):
            wait_until_ready("payments", payments)
            wait_until_ready("shipping", shipping)
            with service("orders", broker, receiver, log) as orders:
                orders.wait(PATIENCE)
            return collect(receiver, timeout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--svg",
        type=Path,
        default=Path("build/demo.svg"),
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=PATIENCE,
        help="how many seconds to wait for the traces (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryFile() as log:
        try:
            spans, root, metrics = run(log, arguments.timeout)
        except story.UnexpectedError as error:
            log.seek(0)
            print(f"The telemetry is not as expected: {error}", file=sys.stderr)
            print(log.read().decode(), file=sys.stderr)
            return 1
    lines = waterfall.explain(*story.bottleneck(root))
    waterfall.show(root, story.polls(spans, root.trace_id), lines, arguments.svg)
    waterfall.show_metrics(metrics)
    print(f" The same picture is in {arguments.svg}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
