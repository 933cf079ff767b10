"""Other Python clients on the other side, HTTP in between, and OpenTracing.

The clients are instrumented by OpenTelemetry's own packages, whose spans tell where a
message has come from in ways of their own.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Token
from typing import Any

import aiokafka
import confluent_kafka
import pytest
import uvicorn
from fastapi import FastAPI
from opentelemetry import baggage, context, propagate
from opentelemetry.context import Context
from opentelemetry.instrumentation.aiokafka import AIOKafkaInstrumentor
from opentelemetry.instrumentation.confluent_kafka import ConfluentKafkaInstrumentor
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.urllib import URLLibInstrumentor
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.shim.opentracing_shim import create_tracer
from opentelemetry.trace import SpanContext, SpanKind

from clients import DEADLINE, Clients, poll
from conftest import Instrument
from recorder import Recorder

Headers = list[tuple[str, bytes]]


def ids(*contexts: SpanContext | None) -> list[tuple[int, int] | None]:
    """Of which trace and which span, whether that has come from afar or not."""
    return [each and (each.trace_id, each.span_id) for each in contexts]


class Confluent:
    """confluent-kafka. What it receives is of a trace of its own, with a link."""

    receives = "{topic} process"

    def __init__(self, address: str, recorder: Recorder) -> None:
        self._config = {"bootstrap.servers": address}
        self._provider = recorder.tracer_provider

    def send(self, topic: str, headers: Headers) -> None:
        producer: Any = ConfluentKafkaInstrumentor.instrument_producer(
            confluent_kafka.Producer(self._config), self._provider
        )
        producer.produce(topic, b"value", headers=headers)
        assert producer.flush(DEADLINE) == 0

    def receive(self, topic: str) -> Headers:
        config = {"group.id": topic, "auto.offset.reset": "earliest"}
        consumer: Any = ConfluentKafkaInstrumentor.instrument_consumer(
            confluent_kafka.Consumer({**self._config, **config}), self._provider
        )
        consumer.subscribe([topic])
        message = consumer.poll(DEADLINE)
        consumer.close()
        assert message.error() is None
        headers: Headers = message.headers()
        return headers

    @staticmethod
    def origin(received: ReadableSpan) -> SpanContext | None:
        (link,) = received.links
        return link.context


class Aiokafka:
    """aiokafka. What it receives is a child of what was sent, without a link."""

    receives = "{topic} receive"

    def __init__(self, address: str, recorder: Recorder) -> None:
        self._address = address

    def send(self, topic: str, headers: Headers) -> None:
        async def send() -> None:
            servers = self._address
            async with aiokafka.AIOKafkaProducer(bootstrap_servers=servers) as producer:
                await producer.send_and_wait(topic, b"value", headers=headers)

        asyncio.run(send())

    def receive(self, topic: str) -> Headers:
        async def receive() -> Headers:
            async with aiokafka.AIOKafkaConsumer(
                topic, bootstrap_servers=self._address, auto_offset_reset="earliest"
            ) as consumer:
                record = await asyncio.wait_for(consumer.getone(), DEADLINE)
                return list(record.headers)

        return asyncio.run(receive())

    @staticmethod
    def origin(received: ReadableSpan) -> SpanContext | None:
        return received.parent


@pytest.fixture(params=[Confluent, Aiokafka])
def peer(
    request: pytest.FixtureRequest, broker: Any, recorder: Recorder
) -> Iterator[Confluent | Aiokafka]:
    AIOKafkaInstrumentor().instrument(tracer_provider=recorder.tracer_provider)
    yield request.param(broker.address, recorder)
    AIOKafkaInstrumentor().uninstrument()


def test_a_message_comes_from_a_peer_and_goes_to_a_peer_in_one_trace(
    peer: Confluent | Aiokafka,
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    try:
        peer.send(topic, [])
    finally:
        context.detach(token)
    producer = clients.producer()
    for record in clients.consumer():
        assert baggage.get_all() == {"tenant": "blue"}
        # With its headers: the peers read the first of several contexts.
        producer.send(f"{topic}-next", record.value, headers=record.headers)
        break
    producer.flush()
    headers = peer.receive(f"{topic}-next")
    assert sorted(name for name, _ in headers) == ["baggage", "traceparent"]
    assert ("baggage", b"tenant=blue") in headers

    theirs = recorder.one(f"{topic} send")
    process = recorder.one(f"process {topic}")
    send = recorder.one(f"send {topic}-next")
    received = recorder.one(peer.receives.format(topic=f"{topic}-next"))
    assert process.kind is SpanKind.CONSUMER
    assert send.kind is SpanKind.PRODUCER
    (link,) = process.links
    assert ids(process.parent, link.context) == ids(theirs.context) * 2
    assert ids(send.parent) == ids(process.context)
    assert ids(peer.origin(received)) == ids(send.context)
    assert len({span.context and span.context.trace_id for span in (theirs, send)}) == 1


def test_of_what_a_peer_forwards_with_its_headers_the_peers_context_counts(
    peer: Confluent | Aiokafka,
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    clients.send(b"value")
    headers = peer.receive(topic)
    peer.send(f"{topic}-next", headers)
    consumer = clients.consumer(f"{topic}-next")
    for records in poll(consumer).values():
        for record in records:
            assert [name for name, _ in record.headers] == ["traceparent"] * 2

    send = recorder.one(f"send {topic}")
    received = recorder.one(peer.receives.format(topic=topic))
    assert ids(peer.origin(received)) == ids(send.context)
    forwarded = recorder.one(f"{topic}-next send")
    polled = recorder.one(f"poll {topic}-next")
    process = recorder.one(f"process {topic}-next")
    links = [link.context for span in (polled, process) for link in span.links]
    assert ids(*links, process.parent) == ids(forwarded.context) * 3


def test_an_application_of_opentracing_is_in_the_trace_of_its_messages(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    tracer = create_tracer(recorder.tracer_provider)
    with tracer.start_active_span("request"):
        clients.send(b"value")
    producer = clients.producer()
    for record in clients.consumer():
        with tracer.start_active_span("work"):
            producer.send(f"{topic}-next", record.value)
        break
    producer.flush()
    names = ["request", f"send {topic}", f"process {topic}", "work"]
    chain = [recorder.one(name) for name in (*names, f"send {topic}-next")]
    assert ids(*(span.parent for span in chain)) == ids(
        None, *(span.context for span in chain[:-1])
    )


LATENCY = "kafka.pipeline.latency"


def attached(headers: Headers) -> Token[Context]:
    """Make the context of a message current, as a service of a peer's has to itself."""
    carrier = {name: value.decode() for name, value in headers}
    return context.attach(propagate.extract(carrier, Context()))


@pytest.mark.parametrize("forwards", [True, False], ids=["forwarded", "attached"])
def test_the_start_of_a_pipeline_goes_through_a_peer(
    peer: Confluent | Aiokafka,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    forwards: bool,
) -> None:
    instrument(pipeline_latency=True)
    clients.send(b"value")
    headers = peer.receive(topic)
    if forwards:
        peer.send(f"{topic}-next", headers)
    else:
        token = attached(headers)
        try:
            peer.send(f"{topic}-next", [])
        finally:
            context.detach(token)
    for _ in clients.consumer(f"{topic}-next"):
        break
    (point,) = recorder.points(LATENCY)
    assert point.count == 1
    assert point.attributes == {
        "kafka.pipeline.source": topic,
        "messaging.destination.name": f"{topic}-next",
    }


@contextmanager
def served(application: FastAPI) -> Iterator[str]:
    """Serve an application; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning"))
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_the_start_of_a_pipeline_goes_through_http(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True)
    producer = clients.producer()
    application = FastAPI()

    @application.post("/orders")
    def order() -> None:
        producer.send(f"{topic}-next", b"value").get(DEADLINE)

    FastAPIInstrumentor.instrument_app(
        application, tracer_provider=recorder.tracer_provider
    )
    urllib_instrumentor = URLLibInstrumentor()
    urllib_instrumentor.instrument(tracer_provider=recorder.tracer_provider)
    try:
        clients.send(b"value")
        with served(application) as url:
            for _ in clients.consumer():
                urllib.request.urlopen(f"{url}/orders", b"", DEADLINE).close()
                break
    finally:
        urllib_instrumentor.uninstrument()
    for _ in clients.consumer(f"{topic}-next"):
        break
    points = recorder.points(LATENCY, messaging_destination_name=f"{topic}-next")
    assert [point.attributes["kafka.pipeline.source"] for point in points] == [topic]
    send = recorder.one(f"send {topic}-next")
    first = recorder.one(f"send {topic}")
    assert send.context is not None
    assert first.context is not None
    assert send.context.trace_id == first.context.trace_id
