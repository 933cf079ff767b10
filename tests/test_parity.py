"""The same work gives the same spans as under the Java agent, the richest peer.

`java-agent-spans.json` is what the agent made of four sends (plain, a tombstone,
without a key, too large for the broker), one poll of three records, and each of these
in a loop.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan

from clients import VERSION, Clients, poll
from conformance import FACTS_OF_ATTRIBUTES
from recorder import Recorder

JAVA: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "java-agent-spans.json").read_text()
)["spans"]

TOO_LARGE = 3_000_000

# Attributes in which the two differ, and why.
ONLY_JAVA = {
    "thread.id": "of no meaning in another language's threads",
    "thread.name": "likewise",
    "messaging.kafka.bootstrap.servers": "the agent's own; server.address says it",
    "kafka.record.queue_time_ms": "the agent's own, experimental",
}
ONLY_OURS = {
    "server.address": "the convention recommends it, the agent has none",
    "server.port": "likewise",
    "network.peer.address": "likewise",
    "network.peer.port": "likewise",
}
OTHER_VALUES = {
    "messaging.kafka.cluster.id": "another cluster",
    "error.type": "Kafka's name of the error, not a class of Java's",
}
ONLY_OUR_LINKS = {
    "messaging.kafka.message.tombstone": "on its link, as all that is one message's",
}
# An offset of -1 is none.
NO_OFFSET = ("messaging.kafka.offset", -1)


@pytest.fixture
def ours(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> list[ReadableSpan]:
    """The spans of the same work, in the order of the agent's."""
    producer = clients.producer(client_id="jp", max_request_size=2 * TOO_LARGE)
    for value, key in ((b"v0", b"k0"), (None, b"k1"), (b"v2", None)):
        producer.send(topic, value, key=key).get(30)
    refused = producer.send(topic, os.urandom(TOO_LARGE), key=b"big")
    producer.flush()
    assert refused.failed()
    consumer = clients.consumer(client_id="jc", group_id="jgroup")
    ((_, records),) = poll(consumer).items()
    assert len(records) == 3
    for _ in records:
        pass
    consumer.commit()
    assert recorder.open() == []
    return [
        span
        for operation in ("send", "poll", "process")
        for span in recorder.named(f"{operation} {topic}")
    ]


def shape_of(spans: list[ReadableSpan], topic: str) -> list[dict[str, Any]]:
    """What the agent's file has of each span, of ours."""
    sends = {span.context.span_id for span in spans[:4] if span.context}
    return [
        {
            "name": span.name.replace(topic, "{topic}"),
            "kind": span.kind.name,
            "status": span.status.status_code.name,
            "parent": span.parent
            and ("creation context" if span.parent.span_id in sends else "another"),
            "links": [
                {
                    key: value
                    for key, value in (link.attributes or {}).items()
                    if key not in ONLY_OUR_LINKS
                }
                for link in span.links
            ],
            "attributes": {
                key: value.replace(topic, "{topic}")
                if isinstance(value, str)
                else value
                for key, value in (span.attributes or {}).items()
            },
        }
        for span in spans
    ]


def test_names_kinds_parents_and_links_are_the_same(
    ours: list[ReadableSpan], topic: str
) -> None:
    for mine, java in zip(shape_of(ours, topic), JAVA, strict=True):
        for what in ("name", "kind", "status", "parent", "links"):
            assert mine[what] == java[what], what


@pytest.mark.defect(20)
def test_attributes_are_the_same_but_for_what_is_said_to_differ(
    ours: list[ReadableSpan], topic: str
) -> None:
    for mine, java in zip(shape_of(ours, topic), JAVA, strict=True):
        theirs = {
            key: value
            for key, value in java["attributes"].items()
            if key not in ONLY_JAVA and (key, value) != NO_OFFSET
        }
        own = {
            key: value
            for key, value in mine["attributes"].items()
            if key not in ONLY_OURS
        }
        if VERSION < (2, 1):
            # kafka-python 2.0 does not know of a cluster's id.
            theirs.pop("messaging.kafka.cluster.id")
        assert {key: type(value) for key, value in own.items()} == {
            key: type(value) for key, value in theirs.items()
        }
        for key in OTHER_VALUES:
            theirs.pop(key, None)
            own.pop(key, None)
        assert own == theirs


def test_every_exception_is_needed() -> None:
    emitted = {key for span in JAVA for key in span["attributes"]}
    assert set(ONLY_JAVA) <= emitted
    assert not set(ONLY_JAVA) & set(FACTS_OF_ATTRIBUTES)
    assert not set(ONLY_OURS) & emitted
    assert set(OTHER_VALUES) <= emitted
    linked = {key for span in JAVA for link in span["links"] for key in link}
    assert not set(ONLY_OUR_LINKS) & linked
