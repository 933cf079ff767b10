"""A guard on the cost of a message that no noise can trip: calls and live objects.

It counts what this package does, not how long it takes: the calls that are made by
its code, and the container objects that a message leaves alive until it is
acknowledged, or a record as long as it is kept. `cost.json` has what was reached; where
a number grows on purpose, write the new one there (the test says which), in the commit
that makes it grow.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextvars import Context
from pathlib import Path
from threading import get_ident
from types import FrameType
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import otel_kafka_python
from clients import DEADLINE, Clients, poll, poll_records
from collector import collect
from conftest import Instrument
from otel_kafka_python import process_span
from recorder import Recorder

pytestmark = pytest.mark.one_broker

RECORDED: dict[str, int] = json.loads((Path(__file__).parent / "cost.json").read_text())
PACKAGE = str(Path(otel_kafka_python.__file__).parent)
MESSAGES = 100
# What happens now and then (a refresh of the metadata, an empty poll) can only add to
# what each message costs: the least of some rounds is without it.
ROUNDS = 5
# And what a client keeps for other reasons than its messages does not show among many.
KEPT = 1000

# What each of these is set up with, and how `cost.json` calls it.
pipelines = pytest.mark.parametrize(
    ("settings", "so"),
    [({}, ""), ({"pipeline_latency": True}, " with the latency of pipelines")],
    ids=["default", "pipelines"],
)


@pytest.fixture
def clients(clients: Clients) -> Clients:
    """Clients that refresh their metadata as seldom as they do by default."""
    del clients.config["metadata_max_age_ms"]
    return clients


class CallCounter:
    """Counts the calls of our functions and those that they make, in all threads."""

    def __init__(self) -> None:
        # By thread: two that add to one number would lose calls.
        self.calls: Counter[int] = Counter()

    def _is_ours(self, frame: FrameType | None) -> bool:
        return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)

    def _is_call(self, event: str, argument: Any) -> bool:
        if event == "c_call":
            # A lock that is taken is one call. Its `__exit__` is reported everywhere,
            # its `__enter__` from 3.14 on.
            return bool(argument.__name__ != "__enter__")
        return event == "call"

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._is_ours(frame) or (event == "call" and self._is_ours(frame.f_back)):
            self.calls[get_ident()] += self._is_call(event, argument)

    def start(self) -> None:
        """Count in threads that start from now on; this one is `count`'s."""
        threading.setprofile(self.profile)

    def stop(self) -> None:
        threading.setprofile(None)

    def count(self, work: Callable[[], None]) -> int:
        """The calls for each of the `MESSAGES` messages that `work` handles."""

        def one_round() -> int:
            self.calls.clear()
            sys.setprofile(self.profile)
            try:
                work()
            finally:
                sys.setprofile(None)
            return round(self.calls.total() / MESSAGES)

        return min(one_round() for _ in range(ROUNDS))


def assert_not_grown(what: str, number: int) -> None:
    assert number <= RECORDED[what], (
        f"{what} has grown from {RECORDED[what]} to {number}: "
        "mend that, or write the new number to tests/cost.json and say why"
    )


@pipelines
def test_the_calls_of_a_send(
    instrument: Instrument,
    clients: Clients,
    topic: str,
    settings: dict[str, Any],
    so: str,
) -> None:
    instrument(**settings)
    counter = CallCounter()
    counter.start()  # before the producer starts its sender
    try:
        producer = clients.producer()
    finally:
        counter.stop()
    producer.send(topic, b"first", key=b"key")
    producer.flush()

    def work() -> None:
        acknowledged = threading.Event()  # a flush returns before the callbacks have
        for _ in range(MESSAGES):
            future = producer.send(topic, b"value", key=b"key")
        future.add_both(lambda _: acknowledged.set())
        assert acknowledged.wait(DEADLINE)

    assert_not_grown(f"calls of a send{so}", counter.count(work))


@pipelines
def test_the_calls_of_a_looped_record(
    instrument: Instrument,
    clients: Clients,
    topic: str,
    settings: dict[str, Any],
    so: str,
) -> None:
    instrument(**settings)
    clients.send(*(b"value",) * (MESSAGES * ROUNDS + 1), key=b"key")
    iterator = iter(clients.consumer())
    for _ in iterator:
        break

    def work() -> None:
        for record in iterator:
            if record.offset % MESSAGES == 0:
                break

    assert_not_grown(f"calls of a looped record{so}", CallCounter().count(work))


@pipelines
def test_the_calls_of_a_polled_record(
    instrument: Instrument,
    clients: Clients,
    topic: str,
    settings: dict[str, Any],
    so: str,
) -> None:
    instrument(**settings)
    clients.send(*(b"value",) * MESSAGES, key=b"key")
    consumer = clients.consumer()
    poll_records(consumer, MESSAGES)

    def work() -> None:
        consumer.seek_to_beginning()
        poll_records(consumer, MESSAGES)

    assert_not_grown(f"calls of a polled record{so}", CallCounter().count(work))


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_the_calls_of_a_process_span(
    instrumented: None, clients: Clients, recorder: Recorder, known: bool
) -> None:
    """It costs about the same whether its consumer is known."""
    clients.send(*(b"value",) * MESSAGES, key=b"key")
    consumer = clients.consumer()
    records = [*poll_records(consumer, MESSAGES)]

    def work() -> None:
        for record in records:
            with process_span(record, consumer if known else None):
                pass

    # The current context remembers the scopes of other tests' records of `next`.
    fresh = Context()
    count = CallCounter().count(lambda: fresh.run(work))
    assert_not_grown("calls of a process span", count)


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "unsampled"])
def test_the_objects_that_a_send_leaves_alive_until_its_acknowledgement(
    instrument: Instrument, clients: Clients, topic: str, sampled: bool
) -> None:
    def alive_per_message() -> int:
        producer = clients.producer(linger_ms=60000, batch_size=1 << 20)
        producer.send(topic, b"first", key=b"key")
        collect()
        before = len(gc.get_objects())
        futures = [producer.send(topic, b"value", key=b"key") for _ in range(KEPT)]
        collect()
        alive = len(gc.get_objects()) - before
        producer.flush()
        return round(alive / len(futures))

    plain = alive_per_message()
    provider = TracerProvider(shutdown_on_exit=False)
    if not sampled:
        provider = TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)
    instrument(tracer_provider=provider)
    what = f"objects alive of {'a sampled' if sampled else 'an unsampled'} send"
    assert_not_grown(what, alive_per_message() - plain)
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_the_objects_that_a_processed_record_leaves_alive(
    instrument: Instrument, clients: Clients
) -> None:
    clients.send(*(b"value",) * KEPT, key=b"key")

    def alive_per_message() -> int:
        consumer = clients.consumer(max_poll_records=KEPT)
        poll(consumer, max_records=1)
        consumer.seek_to_beginning()
        kept: list[Any] = []
        collect()
        before = len(gc.get_objects())
        while sum(map(len, kept)) < KEPT:
            kept += poll(consumer).values()
            for _ in kept[-1]:
                pass
        collect()
        return round((len(gc.get_objects()) - before) / KEPT)

    plain = alive_per_message()
    instrument(tracer_provider=TracerProvider(shutdown_on_exit=False))
    what = "objects alive of a processed record"
    assert_not_grown(what, alive_per_message() - plain)
