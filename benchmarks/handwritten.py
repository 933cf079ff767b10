"""Instrumentation as a careful engineer would write it into an application.

The least code that gives the spans and the headers that this package gives: a span
with its attributes at its creation, the context in the headers, callbacks that end it;
and for what is consumed a link, a parent, a span that is current in the body.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from opentelemetry import context, propagate, trace
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import (
    Link,
    SpanKind,
    Status,
    StatusCode,
    TracerProvider,
    set_span_in_context,
)

SYSTEM = {"messaging.system": "kafka"}


class HeaderGetter(Getter[dict[str, bytes]]):
    def get(self, carrier: dict[str, bytes], key: str) -> list[str] | None:
        value = carrier.get(key)
        return [value.decode()] if value else None

    def keys(self, carrier: dict[str, bytes]) -> list[str]:
        return list(carrier)


GETTER = HeaderGetter()


class HandWritten:
    """It reads the cluster's id where kafka-python keeps it: nothing public tells it.

    Args:
        provider: Makes the spans.
        server: The address and the port of the broker.
    """

    def __init__(self, provider: TracerProvider | None, server: str) -> None:
        self.tracer = trace.get_tracer("hand-written", tracer_provider=provider)
        self.host, port = server.split(":")
        self.port = int(port)

    def send(
        self,
        producer: Any,
        topic: str,
        value: bytes,
        key: bytes | None,
        headers: list[tuple[str, bytes]] | None = None,
    ) -> Any:
        attributes: dict[str, Any] = {
            **SYSTEM,
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": topic,
            "messaging.client.id": producer.config["client_id"],
            "messaging.kafka.cluster.id": producer._metadata.cluster_id,
            "server.address": self.host,
            "server.port": self.port,
        }
        if key is not None:
            attributes["messaging.kafka.message.key"] = key.decode()
        span = self.tracer.start_span(
            f"send {topic}", kind=SpanKind.PRODUCER, attributes=attributes
        )
        carrier: dict[str, str] = {}
        propagate.inject(carrier, set_span_in_context(span))
        written = [(name, text.encode()) for name, text in carrier.items()]
        if headers:
            written = headers + written
        try:
            future = producer.send(topic, value, key=key, headers=written)
        except Exception as error:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(Status(StatusCode.ERROR, str(error)))
            span.record_exception(error)
            span.end()
            raise

        def acknowledged(metadata: Any) -> None:
            span.set_attribute(
                "messaging.destination.partition.id", str(metadata.partition)
            )
            span.set_attribute("messaging.kafka.offset", metadata.offset)
            span.set_attribute("network.peer.address", self.host)
            span.set_attribute("network.peer.port", self.port)
            span.end()

        def failed(error: BaseException) -> None:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(Status(StatusCode.ERROR, str(error)))
            span.record_exception(error)
            span.end()

        future.add_callback(acknowledged)
        future.add_errback(failed)
        return future

    def process(self, records: Iterable[Any], consumer: Any) -> Iterator[Any]:
        """The records, each with its span current until the next is asked for."""
        for record in records:
            extracted = propagate.extract(dict(record.headers), getter=GETTER)
            created = trace.get_current_span(extracted).get_span_context()
            attributes: dict[str, Any] = {
                **SYSTEM,
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": record.topic,
                "messaging.destination.partition.id": str(record.partition),
                "messaging.client.id": consumer.config["client_id"],
                "messaging.kafka.cluster.id": consumer._client.cluster.cluster_id,
                "messaging.kafka.offset": record.offset,
                "server.address": self.host,
                "server.port": self.port,
            }
            if record.key is not None:
                attributes["messaging.kafka.message.key"] = record.key.decode()
            span = self.tracer.start_span(
                f"process {record.topic}",
                context=extracted,
                kind=SpanKind.CONSUMER,
                attributes=attributes,
                links=[Link(created)] if created.is_valid else None,
            )
            token = context.attach(set_span_in_context(span, extracted))
            try:
                yield record
            finally:
                context.detach(token)
                span.end()

    def taken(self, records: Iterable[Any], consumer: Any) -> Iterator[Any]:
        """The records, each with a receive span of its own."""
        iterator = iter(records)
        while True:
            start = time.time_ns()
            try:
                record = next(iterator)
            except StopIteration:
                return
            extracted = propagate.extract(dict(record.headers), getter=GETTER)
            created = trace.get_current_span(extracted).get_span_context()
            attributes: dict[str, Any] = {
                **SYSTEM,
                "messaging.operation.name": "poll",
                "messaging.operation.type": "receive",
                "messaging.destination.name": record.topic,
                "messaging.destination.partition.id": str(record.partition),
                "messaging.client.id": consumer.config["client_id"],
                "messaging.kafka.cluster.id": consumer._client.cluster.cluster_id,
                "messaging.kafka.offset": record.offset,
                "server.address": self.host,
                "server.port": self.port,
                "network.peer.address": self.host,
                "network.peer.port": self.port,
            }
            if record.key is not None:
                attributes["messaging.kafka.message.key"] = record.key.decode()
            self.tracer.start_span(
                f"poll {record.topic}",
                kind=SpanKind.CLIENT,
                attributes=attributes,
                links=[Link(created)] if created.is_valid else None,
                start_time=start,
            ).end()
            yield record

    def received(self, polled: dict[Any, list[Any]], consumer: Any, start: int) -> None:
        """A receive span for what a poll has returned."""
        records = [record for batch in polled.values() for record in batch]
        if not records:
            return
        attributes: dict[str, Any] = {
            **SYSTEM,
            "messaging.operation.name": "poll",
            "messaging.operation.type": "receive",
            "messaging.destination.name": records[0].topic,
            "messaging.destination.partition.id": str(records[0].partition),
            "messaging.batch.message_count": len(records),
            "messaging.client.id": consumer.config["client_id"],
            "messaging.kafka.cluster.id": consumer._client.cluster.cluster_id,
            "server.address": self.host,
            "server.port": self.port,
            "network.peer.address": self.host,
            "network.peer.port": self.port,
        }
        # What is the same for all messages stands on the span.
        key = records[0].key
        is_shared = all(record.key == key for record in records)
        if is_shared and key is not None:
            attributes["messaging.kafka.message.key"] = key.decode()
        links = []
        for record in records:
            extracted = propagate.extract(dict(record.headers), getter=GETTER)
            created = trace.get_current_span(extracted).get_span_context()
            about: dict[str, Any] = {"messaging.kafka.offset": record.offset}
            if record.key is not None and not is_shared:
                about["messaging.kafka.message.key"] = record.key.decode()
            if len(records) == 1:
                attributes.update(about)
                about = {}
            if created.is_valid:
                links.append(Link(created, about))
        self.tracer.start_span(
            f"poll {records[0].topic}",
            kind=SpanKind.CLIENT,
            attributes=attributes,
            links=links,
            start_time=start,
        ).end()
