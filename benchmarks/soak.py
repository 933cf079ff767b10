"""That nothing grows: a million messages through instrumented clients.

    python benchmarks/soak.py --messages 1000000

sends each message, loops over it, polls it with a second consumer and commits it, on
the embedded broker, everything sampled and measured, with the latency of pipelines, and
exported to nowhere. At every tenth of the way it looks at its own process. It exits
with an error if memory or live objects grow after the first tenth by more than the
tolerance below, if a span that was started has not ended, if anything was logged, or if
a thread or a file descriptor is left over. It reads `/proc`, so it runs on Linux.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from embedded_broker import EmbeddedBroker
from kafka import KafkaConsumer, KafkaProducer
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.trace import (
    ReadableSpan,
    Span,
    SpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from otel_kafka_python import KafkaPythonInstrumentor

TENTHS = 10
BLOCK = 500
TOPIC = "soak"
VALUE, KEY = b"x" * 100, b"key-0123"
EXPORT_INTERVAL_MS = 1000.0

# What may come and go after the first tenth: the allocator's arenas and the clients'
# buffers. Over a million messages this is less than ten bytes for each.
TOLERATED_MIB = 8.0
# The clients keep some samples of their own metrics for half a minute.
TOLERATED_OBJECTS = 1000


class Sample(NamedTuple):
    """What the process looks like after so many messages."""

    messages: int
    mib: float  # resident
    objects: int  # that the garbage collector knows
    threads: int
    files: int
    started: int  # spans
    ended: int


class Counted(SpanProcessor):
    """Counts spans."""

    def __init__(self) -> None:
        self.started = self.ended = 0
        self._lock = threading.Lock()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        with self._lock:
            self.started += 1

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock:
            self.ended += 1


class SpansToNowhere(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class MetricsToNowhere(MetricExporter):
    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 0, **kwargs: Any
    ) -> MetricExportResult:
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **kwargs: Any) -> None:
        pass


class Logged(logging.Handler):
    """What OpenTelemetry and this package have logged, from WARNING on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        for name in ("opentelemetry", "otel_kafka_python"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def sample(messages: int, spans: Counted) -> Sample:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        messages,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(gc.get_objects()),
        # The watch over custom span processors stays for the life of the process.
        sum(each.name != "otel-kafka-python-watch" for each in threading.enumerate()),
        len(list(Path("/proc/self/fd").iterdir())),
        spans.started,
        spans.ended,
    )


class Service:
    """A producer, a consumer that is looped over and one that polls."""

    def __init__(self, address: str) -> None:
        settings: dict[str, Any] = {
            "bootstrap_servers": address,
            "auto_offset_reset": "earliest",
            "enable_auto_commit": False,
        }
        self.producer = KafkaProducer(bootstrap_servers=address, linger_ms=20)
        self.looped, self.polled = (
            KafkaConsumer(TOPIC, group_id=group, **settings)
            for group in ("looped", "polled")
        )
        self.loops_over_polled = cycle((True, False))

    def handle(self, messages: int) -> None:
        """Have so many messages sent, and consumed twice."""
        for _ in range(messages):
            self.producer.send(TOPIC, VALUE, key=KEY)
        self.producer.flush()
        for _ in zip(range(messages), self.looped, strict=False):
            pass
        self.looped.commit()
        left, loops = messages, next(self.loops_over_polled)
        while left:
            for records in self.polled.poll(timeout_ms=1000, max_records=left).values():
                left -= len(records)
                for _ in records if loops else ():
                    pass
        self.polled.commit()

    def close(self) -> None:
        for client in (self.producer, self.looped, self.polled):
            client.close()


def soak(
    address: str, messages: int, tell: Callable[[Sample], None]
) -> tuple[Sample, list[Sample], Sample]:
    """Handle messages, and return how it was before, at every tenth, and after."""
    spans = Counted()
    before = sample(0, spans)
    tracer_provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    tracer_provider.add_span_processor(spans)
    tracer_provider.add_span_processor(BatchSpanProcessor(SpansToNowhere()))
    reader = PeriodicExportingMetricReader(MetricsToNowhere(), EXPORT_INTERVAL_MS)
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    instrumentor = KafkaPythonInstrumentor()
    instrumentor.instrument(
        tracer_provider=tracer_provider,
        meter_provider=meter_provider,
        pipeline_latency=True,
    )
    service = Service(address)
    tenths = []
    for tenth in range(1, TENTHS + 1):
        left = messages // TENTHS
        while left:
            block = min(left, BLOCK)
            service.handle(block)
            left -= block
        # A batch of spans that waits for its export is no growth.
        tracer_provider.force_flush()
        tenths.append(sample(tenth * (messages // TENTHS), spans))
        tell(tenths[-1])
    service.close()
    instrumentor.uninstrument()
    tracer_provider.shutdown()
    meter_provider.shutdown()
    del service
    return before, tenths, sample(tenths[-1].messages, spans)


def broken_claims(before: Sample, tenths: Sequence[Sample], after: Sample) -> list[str]:
    """What is not as claimed."""
    first, broken = tenths[0], []
    for each in tenths[1:]:
        grown = each.mib - first.mib
        if grown > TOLERATED_MIB:
            broken.append(
                f"{grown:.1f} MiB more after {each.messages:,} messages "
                f"than after {first.messages:,}"
            )
        created = each.objects - first.objects
        if created > TOLERATED_OBJECTS:
            broken.append(
                f"{created:,} objects more after {each.messages:,} messages "
                f"than after {first.messages:,}"
            )
    # A send, a process, and in half of the blocks another: too few would be no soak.
    if after.started < 2.5 * after.messages:
        broken.append(f"{after.started:,} spans of {after.messages:,} messages")
    if after.started != after.ended:
        broken.append(f"{after.started:,} spans have started, {after.ended:,} ended")
    if after.threads > before.threads:
        broken.append(f"{after.threads} threads, and {before.threads} at the start")
    if after.files > before.files:
        broken.append(f"{after.files} files open, and {before.files} at the start")
    return broken


COLUMNS = ("messages", "MiB", "objects", "threads", "files", "started", "ended")


def tell(each: Sample) -> None:
    cells = (f"{n:,.1f}" if isinstance(n, float) else f"{n:,}" for n in each)
    print(*(f"{cell:>12}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=1_000_000)
    arguments = parser.parse_args()
    logged = Logged()
    began = time.monotonic()
    with EmbeddedBroker() as broker:
        print(*(f"{column:>12}" for column in COLUMNS))
        before, tenths, after = soak(broker.address, arguments.messages, tell)
    seconds = time.monotonic() - began
    print(f"{before.threads} threads and {before.files} files at the start, ", end="")
    print(f"{after.threads} and {after.files} at the end; {seconds:.0f} s")
    broken = [*broken_claims(before, tenths, after), *logged.messages]
    if broken:
        sys.exit("\n".join(broken))
    print(f"no growth beyond {TOLERATED_MIB:g} MiB or {TOLERATED_OBJECTS:,} objects")


if __name__ == "__main__":
    main()
