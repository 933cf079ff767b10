"""What is timed: blocks of messages, in each variant, on one producer and consumer.

A block's figures are CPU time for each message, in microseconds: of the thread that
calls the client, and of the whole process, in which the client's own threads work too.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from handwritten import HandWritten
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from opentelemetry import baggage, context
from opentelemetry.instrumentation.kafka import KafkaInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import NoOpTracerProvider
from opentelemetry.trace import TracerProvider as AnyTracerProvider

from otel_kafka_python import KafkaPythonInstrumentor

# A change of the classes' methods empties the interpreter's caches; in an application
# they are full again after the first messages.
WARM_UP = 100
VALUE = b"x" * 100
KEY = b"key-0123"
TOPICS = "benchmark-"  # what their names begin with
VARIANTS = ("plain", "hand-written", "contrib", "ours")
SCOPES = ("thread", "process")


class Collected(SpanProcessor):
    """Takes finished spans and keeps them only if told to."""

    def __init__(self) -> None:
        self.kept: list[ReadableSpan] | None = None

    def on_end(self, span: ReadableSpan) -> None:
        if self.kept is not None:
            self.kept.append(span)


@dataclass(frozen=True)
class Setting:
    """The providers; None for the API's proxies, which an application without an SDK
    has."""

    name: str
    tracer_provider: AnyTracerProvider | None
    meter_provider: MeterProvider | None = None


def settings(collected: Collected) -> dict[str, Setting]:
    sampled, unsampled = (
        TracerProvider(shutdown_on_exit=False),
        TracerProvider(ParentBased(TraceIdRatioBased(0.01)), shutdown_on_exit=False),
    )
    for provider in (sampled, unsampled):
        provider.add_span_processor(collected)
    metrics = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    return {
        each.name: each
        for each in (
            Setting("sampled", sampled),
            Setting("1 % sampled", unsampled),
            Setting("no SDK", None),
            Setting("no-op provider", NoOpTracerProvider()),
            Setting("sampled, metrics", sampled, metrics),
            Setting("1 % sampled, metrics", unsampled, metrics),
        )
    }


@dataclass(frozen=True)
class Case:
    """A workload and how it is configured.

    Args:
        work: The method of `Workload` that makes a block of it.
        setting: The name of its setting.
        name: How it is shown.
        key: The messages' key.
        headers: How many headers of the application's own a message has.
        batch: The most that one poll returns.
        topics: Over how many topics the messages go.
        clients: Over how many producers they go.
        keywords: Settings of ours, which the variant "default" does without.
    """

    work: str
    setting: str
    name: str = ""
    key: bytes | None = KEY
    headers: int = 0
    batch: int = 500
    topics: int = 1
    clients: int = 1
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name or self.work}, {self.setting}"


@contextmanager
def installed(variant: str, setting: Setting, case: Case) -> Iterator[None]:
    """A variant that is no code of the application's, on for a block."""
    if variant == "contrib":
        instrumentor = KafkaInstrumentor()
        instrumentor.instrument(tracer_provider=setting.tracer_provider)
    elif variant in {"ours", "default"}:
        instrumentor = KafkaPythonInstrumentor()
        instrumentor.instrument(
            tracer_provider=setting.tracer_provider,
            meter_provider=setting.meter_provider,
            **(case.keywords if variant == "ours" else {}),
        )
    else:
        yield
        return
    try:
        yield
    finally:
        instrumentor.uninstrument()


class Workload:
    """Producers and consumers, and the blocks of messages that go through them.

    What is consumed is a topic of as many messages, read from its start each time.

    Args:
        address: The broker's.
        setting: What is configured.
        case: What is done.
        block: How many messages.
    """

    def __init__(self, address: str, setting: Setting, case: Case, block: int) -> None:
        self.address, self.setting, self.case, self.block = (
            address,
            setting,
            case,
            block,
        )
        self.topic = f"{TOPICS}{random.randbytes(6).hex()}"
        self.topics = [
            self.topic,
            *(f"{self.topic}-{i}" for i in range(1, case.topics)),
        ]
        self.headers = [(f"header-{i}", b"value") for i in range(case.headers)]
        self.producers = [
            KafkaProducer(
                bootstrap_servers=address, client_id="benchmark", linger_ms=20
            )
            for _ in range(case.clients)
        ]
        self.consumer: Any = None
        if case.work == "send":
            self.learn_topics()
        else:
            self.fill()

    def fill(self) -> None:
        """Send what is consumed, with the headers that instrumentation writes."""
        count = max(self.block, WARM_UP)
        hand = HandWritten(self.setting.tracer_provider, self.address)
        self.send(hand, count)()
        filled = TopicPartition(self.topic, 0)
        self.filled = dict.fromkeys((*VARIANTS, "default"), filled)
        if self.case.keywords.get("pipeline_latency"):
            # Only with the setting do messages carry the start of their pipeline.
            self.filled["ours"] = TopicPartition(f"{self.topic}-started", 0)
            start = f"{time.time_ns() // 1_000_000}-{self.topic}"
            token = context.attach(baggage.set_baggage("kafka.pipeline", start))
            for _ in range(count):
                hand.send(self.producers[0], f"{self.topic}-started", VALUE, KEY)
            context.detach(token)
        self.flush()
        self.consumer = KafkaConsumer(
            bootstrap_servers=self.address,
            client_id="benchmark",
            max_poll_records=self.case.batch,
            # One fetch brings them all.
            max_partition_fetch_bytes=1 << 26,
        )

    def learn_topics(self) -> None:
        """Have the producer know the topics, many by each answer of the broker's."""
        with ThreadPoolExecutor(100) as pool:
            for _ in pool.map(self.producers[0].partitions_for, self.topics):
                pass

    def flush(self) -> None:
        for producer in self.producers:
            producer.flush()

    def close(self) -> None:
        for producer in self.producers:
            producer.close()
        if self.consumer is not None:
            self.consumer.close()

    def send(self, hand: HandWritten | None, count: int) -> Callable[[], None]:
        case, key = self.case, self.case.key
        many = case.topics > 1 or case.clients > 1
        producer, topic = self.producers[0], self.topic
        calls = [
            (self.producers[i % case.clients], self.topics[i % case.topics])
            for i in range(count if many else 0)
        ]
        # None where there are none: a send without headers is the usual one.
        headers = self.headers or None

        def plain() -> None:
            for _ in range(count):
                producer.send(topic, VALUE, key=key, headers=headers)

        def plain_to_many() -> None:
            for producer, topic in calls:
                producer.send(topic, VALUE, key=key, headers=headers)

        def by_hand() -> None:
            assert hand is not None
            for _ in range(count):
                hand.send(producer, topic, VALUE, key, headers)

        if hand is not None:
            return by_hand
        return plain_to_many if many else plain

    def loop(self, hand: HandWritten | None, count: int) -> Callable[[], None]:
        consumer = self.consumer

        def run() -> None:
            consumer.seek(self.partition, 0)
            records = consumer
            if hand is not None and self.case.keywords.get("process_spans", True):
                records = hand.process(consumer, consumer)
            elif hand is not None:
                records = hand.taken(consumer, consumer)
            for _ in zip(range(count), records, strict=False):
                pass

        return run

    def poll(self, hand: HandWritten | None, count: int) -> Callable[[], None]:
        consumer = self.consumer

        def run() -> None:
            consumer.seek(self.partition, 0)
            received = 0
            while received < count:
                start = time.time_ns()
                polled = consumer.poll(timeout_ms=1000)
                if hand is not None:
                    hand.received(polled, consumer, start)
                received += sum(map(len, polled.values()))

        return run

    def iterate(self, hand: HandWritten | None, count: int) -> Callable[[], None]:
        """Loop over what a poll returned."""
        consumer = self.consumer

        def run() -> None:
            consumer.seek(self.partition, 0)
            received = 0
            while received < count:
                start = time.time_ns()
                polled = consumer.poll(timeout_ms=1000)
                if hand is not None:
                    hand.received(polled, consumer, start)
                for records in polled.values():
                    each = records if hand is None else hand.process(records, consumer)
                    for _ in each:
                        received += 1

        return run

    def run(self, variant: str, count: int | None = None) -> Times:
        """Run a block in a variant."""
        count = count or self.block
        hand = None
        if self.consumer is not None:
            self.partition = self.filled[variant]
            self.consumer.assign([self.partition])
        if variant == "hand-written":
            hand = HandWritten(self.setting.tracer_provider, self.address)
        make = getattr(self, self.case.work)
        warm_up = make(hand, max(WARM_UP, self.case.topics))
        work = make(hand, count)
        with installed(variant, self.setting, self.case):
            warm_up()
            self.flush()
            gc.collect()
            process, thread = time.process_time_ns(), time.thread_time_ns()
            work()
            thread = time.thread_time_ns() - thread
            self.flush()
            process = time.process_time_ns() - process
        return Times(thread / count / 1e3, process / count / 1e3)


class Times(NamedTuple):
    """CPU time of a message, in microseconds."""

    thread: float
    process: float


Figures = dict[str, dict[str, dict[str, float]]]
"""By variant and scope: `microseconds`, `added` over plain, and `spread` of that."""


def measure(workload: Workload, variants: tuple[str, ...], rounds: int) -> Figures:
    """Run blocks of all variants, in random order within each round.

    What a variant adds is the median of its differences to the plain client of the
    same round; the spread is half of the distance between their quartiles.
    """
    times: dict[str, list[Times]] = {variant: [] for variant in variants}
    for variant in variants:  # once, so that nothing is new in what is timed
        workload.run(variant)
    for _ in range(rounds):
        for variant in random.sample(variants, len(variants)):
            times[variant].append(workload.run(variant))
    figures: Figures = {}
    for variant in variants:
        for scope in SCOPES:
            own = [getattr(each, scope) for each in times[variant]]
            plain = [getattr(each, scope) for each in times["plain"]]
            added = [one - other for one, other in zip(own, plain, strict=True)]
            low, _, high = statistics.quantiles([*added, *added[:1]], n=4)
            figures.setdefault(variant, {})[scope] = {
                "microseconds": round(statistics.median(own), 3),
                "added": round(statistics.median(added), 3),
                "spread": round((high - low) / 2, 3),
            }
    return figures
