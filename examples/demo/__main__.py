"""Draws the trace of a checkout through three services.

    python examples/demo

starts the embedded broker and three services, each under `opentelemetry-instrument`.
First, it sends a few hundred orders: all are measured, and few are traced. Then it
sends one checkout and draws its trace. `--otlp http://localhost:4318` also sends the
traces and metrics to a backend.
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
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


def stop(*_: object) -> None:
    """End the demo on Ctrl-C. A second Ctrl-C does not disturb the clean-up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("The demo was stopped.", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    # The imports below already take a moment.
    signal.signal(signal.SIGINT, stop)

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import measures  # noqa: E402 (beside this file)
import story  # noqa: E402
import waterfall  # noqa: E402
from embedded_broker import EmbeddedBroker, die_with_parent  # noqa: E402
from kafka.admin import KafkaAdminClient, NewTopic  # noqa: E402
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer  # noqa: E402
from relay import Relay, relay  # noqa: E402
from rich.console import Group  # noqa: E402

PATIENCE = 60.0
ORDERS = 200
SAMPLED = "0.05"


@contextlib.contextmanager
def service(
    name: str,
    broker: EmbeddedBroker,
    receiver: OtlpProtoTestServer | Relay,
    log: IO[bytes],
    *options: str,
    **environ: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service, and stop it when the demo ends."""
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
            "OTEL_RESOURCE_ATTRIBUTES": f"service.instance.id={uuid.uuid4()}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_PYTHON_KAFKA_CAPTURE_QUEUE_TIME": "true",
            "OTEL_PYTHON_KAFKA_PIPELINE_LATENCY": "true",
            # The demo exports soon. A service keeps the defaults.
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


def wait_until_done(name: str, process: subprocess.Popen[bytes]) -> None:
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise story.UnexpectedError(f"{name} did not end") from None
    if code:
        raise story.UnexpectedError(f"{name} ended with {code}")


class Telemetry:
    """The telemetry of the services, as it arrives."""

    def __init__(self, receiver: OtlpProtoTestServer) -> None:
        self._receiver = receiver
        self._measures = measures.Reader()
        self.spans: list[story.Span] = []
        self.metrics: measures.Metrics = {}

    def wait(self, check: Callable[[], Any], timeout: float) -> None:
        """Wait until the check passes. After the timeout, raise its error."""
        deadline = time.monotonic() + timeout
        while True:
            self.spans += story.read(self._receiver.drain_spans())
            self._measures.take(self._receiver.drain_metrics())
            self.metrics = self._measures.metrics()
            try:
                check()
            except story.UnexpectedError:
                if time.monotonic() > deadline:
                    raise
            else:
                return
            time.sleep(0.1)


def run(
    plan: story.Plan,
    broker: EmbeddedBroker,
    receiver: OtlpProtoTestServer,
    exporting_to: OtlpProtoTestServer | Relay,
    log: IO[bytes],
    timeout: float,
) -> Telemetry:
    """Send the orders through the services, and return their telemetry."""

    def start(
        name: str, **environ: str
    ) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return service(name, broker, exporting_to, log, **environ)

    admin = KafkaAdminClient(bootstrap_servers=broker.address)
    admin.create_topics([NewTopic(topic, 1, 1) for topic in measures.HOPS])
    admin.close()
    telemetry = Telemetry(receiver)
    with start("payments") as payments, start("shipping") as shipping:
        wait_until_ready("payments", payments)
        wait_until_ready("shipping", shipping)
        if plan.rush:
            sampler = {
                "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": SAMPLED,
            }
            of_orders = {"OTEL_SERVICE_NAME": "orders", "ORDERS": str(plan.rush)}
            with start("rush", **sampler, **of_orders) as rush:
                wait_until_done("rush", rush)
            telemetry.wait(
                lambda: measures.check_rush(telemetry.metrics, plan), timeout
            )
        with start("orders") as orders:
            wait_until_done("orders", orders)

        def check() -> None:
            story.check(telemetry.spans, plan)
            measures.check(telemetry.metrics, plan)

        telemetry.wait(check, timeout)
    return telemetry


def draw(telemetry: Telemetry, plan: story.Plan, svg: Path) -> None:
    root = story.check(telemetry.spans, plan)
    polls = story.polls(telemetry.spans, root.trace_id)
    lines = waterfall.explain(root, *story.bottleneck(root))
    hops = measures.hops(telemetry.metrics)
    latency = measures.latency(telemetry.metrics)
    sampled = story.sampled(telemetry.spans)
    all_orders = waterfall.draw_hops(hops, latency, sampled)
    waterfall.show(
        lambda width: Group(waterfall.draw(root, polls, width), lines, "", all_orders),
        waterfall.draw_metrics(telemetry.metrics),
        svg,
    )
    print(f" The picture is also in {svg}.")


def url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(
            f"{text} is not a URL like http://localhost:4318"
        )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--svg",
        type=Path,
        default=Path("build/demo.svg"),
        help="where to save the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=PATIENCE,
        help="how many seconds to wait for the traces (default: %(default)s)",
    )
    parser.add_argument(
        "--orders",
        type=int,
        default=ORDERS,
        help="how many orders to send before the checkout (default: %(default)s)",
    )
    parser.add_argument(
        "--otlp",
        type=url,
        metavar="URL",
        help="also send to this backend by OTLP over HTTP: http://localhost:4318",
    )
    arguments = parser.parse_args()
    return demonstrate(
        story.Plan(arguments.orders),
        arguments.otlp,
        arguments.svg,
        arguments.timeout,
    )


def demonstrate(
    plan: story.Plan, backend: str | None, svg: Path, timeout: float
) -> int:
    """Run everything, draw the picture and return the exit status."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        broker = stack.enter_context(EmbeddedBroker())
        receiver = stack.enter_context(OtlpProtoTestServer())
        between = None
        if backend:
            own = f"http://127.0.0.1:{receiver.port}"
            between = stack.enter_context(relay(own, backend))
        try:
            telemetry = run(plan, broker, receiver, between or receiver, log, timeout)
        except story.UnexpectedError as error:
            log.seek(0)
            print(f"The telemetry is not as expected: {error}", file=sys.stderr)
            print(log.read().decode(), file=sys.stderr)
            return 1
        draw(telemetry, plan, svg)
        if between is not None:
            for line in between.report():
                print(f" {line}")
            return 0 if between.taken else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
