"""Instrumentation from code, with hooks that add business attributes.

    python examples/manual_hooks.py

The value of a message is never recorded. A hook can record parts of it.
"""

import json
import os
from itertools import islice
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from opentelemetry.trace import Span
from show_spans import show_spans

from otel_kafka_python import KafkaPythonInstrumentor

BROKER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")


def produce_hook(span: Span, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Add to a send span; `args` and `kwargs` are those of `producer.send`."""
    span.set_attribute("app.items", len(kwargs["value"]["items"]))


def consume_hook(
    span: Span, record: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Add attributes to the span of a record."""
    span.set_attribute("app.customer", json.loads(record.value)["customer"])


show_spans()
KafkaPythonInstrumentor().instrument(
    produce_hook=produce_hook,
    consume_hook=consume_hook,
    excluded_topics="heartbeats,internal-*",
)

producer = KafkaProducer(
    bootstrap_servers=BROKER, value_serializer=lambda order: json.dumps(order).encode()
)
producer.send("heartbeats", value={"alive": True})
producer.send("manual-hooks", value={"customer": "Ada", "items": ["lamp", "desk"]})
producer.send("manual-hooks", value={"customer": "Bob", "items": ["chair"]})
producer.close()

consumer = KafkaConsumer(
    "manual-hooks",
    bootstrap_servers=BROKER,
    group_id="shipping",
    auto_offset_reset="earliest",
)
for record in islice(consumer, 2):  # a service would continue
    print("shipping", *json.loads(record.value)["items"])
consumer.close()
