"""What becomes of messages: futures, spans, counters and the broker have to agree."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from kafka import TopicPartition
from kafka.errors import KafkaError
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Link, StatusCode

from clients import DEADLINE, Clients
from pages import error_types
from recorder import Recorder


def until_all_have_ended(recorder: Recorder) -> None:
    """Wait for the sender's callbacks, some of which may run after a flush."""
    deadline = time.monotonic() + DEADLINE
    while recorder.open() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert recorder.open() == []


def ids(owner: ReadableSpan | Link | None) -> tuple[str, str]:
    """Of a span, or of what a link links to, as headers have them."""
    assert owner is not None
    assert owner.context is not None
    return f"{owner.context.trace_id:032x}", f"{owner.context.span_id:016x}"


def carried(record: Any) -> tuple[str, str] | None:
    """The ids of the span in a record's headers, of which there is one at most."""
    values = [value for name, value in record.headers if name == "traceparent"]
    if not values:
        return None
    (value,) = values
    _, trace_id, span_id, _ = value.decode().split("-")
    return trace_id, span_id


def assert_failed(span: ReadableSpan, error: BaseException, error_type: str) -> None:
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == str(error)
    assert span.attributes is not None
    assert span.attributes["error.type"] == error_type
    (event,) = span.events
    assert event.name == "exception"
    assert event.attributes is not None
    assert str(event.attributes["exception.type"]).endswith(type(error).__qualname__)


def send_each(producer: Any, topic: str, keys: Iterable[str]) -> dict[str, Any]:
    """Send a message of each key; by key, the future, or what `send` has raised."""
    sent: dict[str, Any] = {}
    for key in keys:
        try:
            sent[key] = producer.send(topic, b"value", key=key.encode())
        except Exception as error:
            sent[key] = error
    return sent


def send_until_one_arrives(producer: Any, topic: str, sent: dict[str, Any]) -> str:
    """Send one message after the other until one is delivered, and return its key."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        (key,) = one = send_each(producer, topic, [f"single-{len(sent)}"])
        sent |= one
        try:
            if not isinstance(one[key], BaseException):
                one[key].get(DEADLINE)
                return key
        except KafkaError:
            continue
    pytest.fail("no message arrives")


def partitions_of(consumer: Any, topic: str) -> list[TopicPartition]:
    """The partitions of a topic, once the broker tells of them.

    One that is just back may know of no broker yet, not even of itself.
    """
    deadline = time.monotonic() + DEADLINE
    while not (numbers := consumer.partitions_for_topic(topic)):
        assert time.monotonic() < deadline
    return [TopicPartition(topic, number) for number in numbers]


def held_records(clients: Clients, topic: str) -> list[Any]:
    """All records of a topic that the broker holds, read without being traced."""
    with suppress_instrumentation():
        consumer = clients.consumer(topic)
        consumer.unsubscribe()
        partitions = partitions_of(consumer, topic)
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        records: list[Any] = []
        deadline = time.monotonic() + DEADLINE
        while any(consumer.position(each) < ends[each] for each in partitions):
            assert time.monotonic() < deadline
            for partition, batch in consumer.poll(timeout_ms=1000).items():
                # What is written meanwhile is left out.
                records += [each for each in batch if each.offset < ends[partition]]
    assert len(records) == sum(ends.values())
    return records


class Outcomes(NamedTuple):
    """What has become of messages, by their keys."""

    delivered: set[str]
    failed: dict[str, str]  # with the type of the error
    raised: dict[str, str]  # by `send`, which has not taken them

    @property
    def errors(self) -> set[str]:
        return {*self.failed.values(), *self.raised.values()}


def assert_the_truth(
    recorder: Recorder, topic: str, sent: Mapping[str, Any], records: Sequence[Any]
) -> Outcomes:
    """Hold what was said of all messages of a topic against what became of them.

    A message whose future has failed may have been written all the same, and a
    producer that is not idempotent may write one twice. Neither is known to the
    client, so its spans say nothing of it; the records then carry the one span's ids.

    Args:
        recorder: What was said.
        topic: To which nothing else was sent.
        sent: What `send_each` gave, of futures that have ended.
        records: All that the broker holds of the topic.
    """
    spans = {
        str((span.attributes or {})["messaging.kafka.message.key"]): span
        for span in recorder.named(f"send {topic}")
    }
    assert len(spans) == len(recorder.named(f"send {topic}"))
    assert spans.keys() == sent.keys()

    places: dict[str, set[tuple[int, int]]] = {}
    for record in records:
        key = record.key.decode()
        assert carried(record) == ids(spans[key])
        places.setdefault(key, set()).add((record.partition, record.offset))

    outcomes = Outcomes(set(), {}, {})
    documented = error_types()
    for key, future in sent.items():
        span = spans[key]
        error = future if isinstance(future, BaseException) else future.exception
        if error is not None:
            error_type = documented[type(error).__name__]
            assert_failed(span, error, error_type)
            assert "messaging.kafka.offset" not in (span.attributes or {})
            of_its_kind = outcomes.raised if error is future else outcomes.failed
            of_its_kind[key] = error_type
            continue
        assert future.succeeded()
        attributes: dict[str, Any] = dict(span.attributes or {})
        assert span.status.status_code is StatusCode.UNSET
        assert span.events == ()
        assert "error.type" not in attributes
        place = future.value.partition, future.value.offset
        assert place in places[key]
        assert (
            int(attributes["messaging.destination.partition.id"]),
            attributes["messaging.kafka.offset"],
        ) == place
        outcomes.delivered.add(key)
    assert not outcomes.raised.keys() & places.keys()

    taken = Counter[str | None](outcomes.failed.values())
    taken[None] = len(outcomes.delivered)
    # Those count that have failed after they were sent. A message that was written was.
    written = Counter[str | None](
        error_type for key, error_type in outcomes.failed.items() if key in places
    )
    written[None] = len(outcomes.delivered)
    sent_messages = counted(recorder, "messaging.client.sent.messages", topic)
    assert written <= sent_messages <= taken
    assert counted(
        recorder, "messaging.client.operation.duration", topic
    ) == taken + Counter[str | None](outcomes.raised.values())
    return outcomes


def counted(recorder: Recorder, name: str, topic: str) -> Counter[str | None]:
    """What a metric says of sends to a topic, by the type of their error."""
    found = Counter[str | None]()
    for point in recorder.points(
        name, messaging_destination_name=topic, messaging_operation_name="send"
    ):
        value = point.value if hasattr(point, "value") else point.count
        found[point.attributes.get("error.type")] += value
    return found
