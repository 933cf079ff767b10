"""What instrumentation costs: plain, hand-written, contrib's and ours, in one run.

    python benchmarks/compare.py

runs blocks of messages on the embedded broker, all variants in one process and in
random order within each round, because processes of identical code differ by more than
the variants do. What a variant adds is the median of its differences to the plain
client of the same round, in CPU time of the calling thread and of the whole process.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parent.parent / "examples"),
]

from embedded_broker import EmbeddedBroker  # noqa: E402 (beside this file)
from handwritten import HandWritten  # noqa: E402
from kafka import KafkaConsumer, KafkaProducer, TopicPartition  # noqa: E402
from opentelemetry.instrumentation.kafka import KafkaInstrumentor  # noqa: E402
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased  # noqa: E402
from opentelemetry.trace import SpanKind  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from otel_kafka_python import KafkaPythonInstrumentor  # noqa: E402

VALUE = b"x" * 100
KEY = b"key-0123"
VARIANTS = ("plain", "hand-written", "contrib", "ours")


class Collected(SpanProcessor):
    """Takes finished spans and keeps them only if told to."""

    def __init__(self) -> None:
        self.kept: list[ReadableSpan] | None = None

    def on_end(self, span: ReadableSpan) -> None:
        if self.kept is not None:
            self.kept.append(span)


@dataclass
class Setting:
    """What is configured: providers, and settings of ours."""

    name: str
    tracer_provider: TracerProvider | None
    meter_provider: MeterProvider | None = None


def settings(collected: Collected) -> list[Setting]:
    sampled, unsampled = (
        TracerProvider(shutdown_on_exit=False),
        TracerProvider(ParentBased(TraceIdRatioBased(0.01)), shutdown_on_exit=False),
    )
    for provider in (sampled, unsampled):
        provider.add_span_processor(collected)
    metrics = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    return [
        Setting("sampled", sampled),
        Setting("1 % sampled", unsampled),
        Setting("no SDK", None),
        Setting("sampled, metrics", sampled, metrics),
    ]


@contextmanager
def installed(variant: str, setting: Setting) -> Iterator[None]:
    """A variant that is no code of the application's, on for a block."""
    if variant == "contrib":
        instrumentor = KafkaInstrumentor()
        instrumentor.instrument(tracer_provider=setting.tracer_provider)
    elif variant == "ours":
        instrumentor = KafkaPythonInstrumentor()
        instrumentor.instrument(
            tracer_provider=setting.tracer_provider,
            meter_provider=setting.meter_provider,
        )
    else:
        yield
        return
    try:
        yield
    finally:
        instrumentor.uninstrument()


class Workload:
    """Blocks of messages through one producer and one consumer."""

    def __init__(self, address: str, topic: str, block: int) -> None:
        self.address, self.topic, self.block = address, topic, block
        self.producer = KafkaProducer(
            bootstrap_servers=address, client_id="benchmark", linger_ms=20
        )
        self.consumer = KafkaConsumer(
            bootstrap_servers=address, client_id="benchmark", max_poll_records=block
        )
        self.partition = TopicPartition(topic, 0)
        self.consumer.assign([self.partition])

    def fill(self, setting: Setting) -> None:
        """Send what is consumed, with the headers that instrumentation writes."""
        hand = HandWritten(setting.tracer_provider, self.address)
        for _ in range(self.block):
            hand.send(self.producer, self.topic, VALUE, KEY)
        self.producer.flush()

    def send(self, hand: HandWritten | None) -> Callable[[], None]:
        topic, producer, block = f"{self.topic}-sent", self.producer, self.block

        def plain() -> None:
            for _ in range(block):
                producer.send(topic, VALUE, key=KEY)

        def by_hand() -> None:
            assert hand is not None
            for _ in range(block):
                hand.send(producer, topic, VALUE, KEY)

        return plain if hand is None else by_hand

    def loop(self, hand: HandWritten | None) -> Callable[[], None]:
        consumer, block = self.consumer, self.block

        def run() -> None:
            consumer.seek(self.partition, 0)
            records = consumer if hand is None else hand.process(consumer, consumer)
            for _ in zip(range(block), records, strict=False):
                pass

        return run

    def poll(self, hand: HandWritten | None) -> Callable[[], None]:
        consumer, block = self.consumer, self.block

        def run() -> None:
            consumer.seek(self.partition, 0)
            count = 0
            while count < block:
                start = time.time_ns()
                polled = consumer.poll(timeout_ms=1000)
                if hand is not None:
                    hand.received(polled, consumer, start)
                count += sum(map(len, polled.values()))

        return run

    def run_block(
        self, what: str, variant: str, setting: Setting
    ) -> tuple[float, float]:
        """CPU seconds of the calling thread and of the process, for each message."""
        hand = None
        if variant == "hand-written":
            hand = HandWritten(setting.tracer_provider, self.address)
        run = getattr(self, what)(hand)
        with installed(variant, setting):
            gc.collect()
            process, thread = time.process_time_ns(), time.thread_time_ns()
            run()
            thread = time.thread_time_ns() - thread
            self.producer.flush()
            process = time.process_time_ns() - process
        return thread / self.block / 1e3, process / self.block / 1e3


def check(workload: Workload, setting: Setting, collected: Collected) -> None:
    """That the variants make the same spans and headers, before anything is timed."""
    seen: dict[str, dict[str, list[Any]]] = {}
    for variant in VARIANTS[1:]:
        for what in ("send", "loop", "poll"):
            collected.kept = []
            workload.run_block(what, variant, setting)
            seen.setdefault(what, {})[variant] = sorted(
                (span.name, span.kind.name, len(span.links), set(span.attributes or ()))
                for span in collected.kept
                if span.kind is not SpanKind.INTERNAL
            )
            collected.kept = None
    for what, of_variants in seen.items():
        hand, ours = of_variants["hand-written"], of_variants["ours"]
        # Ours knows more of the cluster; nothing else may differ.
        more = {"messaging.kafka.cluster.id"}
        of_ours = [(n, k, count, names - more) for n, k, count, names in ours]
        if hand != of_ours:
            raise SystemExit(
                f"{what}: hand-written gives {hand[:1]} {len(hand)} times, "
                f"ours {of_ours[:1]} {len(of_ours)} times"
            )


def measure(workload: Workload, what: str, setting: Setting, rounds: int) -> Any:
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in random.sample(VARIANTS, len(VARIANTS)):
            times[variant].append(workload.run_block(what, variant, setting))
    result: dict[str, Any] = {}
    for variant in VARIANTS:
        for index, scope in enumerate(("thread", "process")):
            own = [each[index] for each in times[variant]]
            added = [
                each[index] - plain[index]
                for each, plain in zip(times[variant], times["plain"], strict=True)
            ]
            quartiles = statistics.quantiles(added, n=4)
            result.setdefault(variant, {})[scope] = {
                "microseconds": statistics.median(own),
                "added": statistics.median(added),
                "spread": quartiles[2] - quartiles[0],
            }
    return result


def show(results: dict[str, Any]) -> None:
    table = Table(
        title="CPU time that a message costs more than plain, in microseconds"
    )
    for column in ("workload", "scope", "plain", *VARIANTS[1:]):
        table.add_column(column, justify="left" if column == "workload" else "right")
    table.add_column("ours / hand-written", justify="right")
    table.add_column("ours / contrib", justify="right")
    for name, result in results.items():
        for scope in ("thread", "process"):
            added = {each: result[each][scope]["added"] for each in VARIANTS}
            table.add_row(
                name,
                scope,
                f"{result['plain'][scope]['microseconds']:.1f}",
                *(
                    f"{added[each]:.1f} ± {result[each][scope]['spread'] / 2:.1f}"
                    for each in VARIANTS[1:]
                ),
                f"{added['ours'] / added['hand-written']:.2f}",
                f"{added['ours'] / added['contrib']:.2f}",
            )
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=500)
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    arguments = parser.parse_args()
    collected = Collected()
    results: dict[str, Any] = {}
    with EmbeddedBroker() as broker:
        for setting in settings(collected):
            topic = f"benchmark-{setting.name.translate({32: 45, 37: 112, 44: None})}"
            workload = Workload(broker.address, topic, arguments.block)
            workload.fill(setting)
            if setting.name == "sampled":
                check(workload, setting, collected)
            for what in ("send", "loop", "poll"):
                results[f"{what}, {setting.name}"] = measure(
                    workload, what, setting, arguments.rounds
                )
            workload.producer.close()
            workload.consumer.close()
    show(results)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
