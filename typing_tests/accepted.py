"""Calls that every type checker accepts, and the types that it infers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span
from typing_extensions import assert_type

from otel_kafka_python import (
    ConsumeHook,
    KafkaPythonInstrumentor,
    ProduceHook,
    Record,
    __version__,
    process_span,
)


def produce_hook(span: Span, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    span.set_attribute("app.shop", "north")


def consume_hook(
    span: Span, record: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    span.set_attribute("app.offset", record.offset)


hooks: tuple[ProduceHook, ConsumeHook] = (produce_hook, consume_hook)

KafkaPythonInstrumentor().instrument()
KafkaPythonInstrumentor().instrument(
    tracer_provider=TracerProvider(),
    meter_provider=MeterProvider(),
    produce_hook=produce_hook,
    consume_hook=consume_hook,
    excluded_topics="internal-*,heartbeats",
    capture_headers=["shop", "!token"],
    propagation=True,
    process_parent="none",
    commit_spans="all",
    skip_dep_check=True,
    raise_exception_on_conflict=True,
)
KafkaPythonInstrumentor().uninstrument()


class Order(NamedTuple):
    """A record of an application's own, with more than is read."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]
    serialized_value_size: int


order = Order("orders", 0, 1, 2, None, b"value", [], 5)
record: Record = order
records: Sequence[Record] = [order]
untyped: Any = order

for given in (order, [order], (order, order), {("orders", 0): [order]}, untyped):
    with process_span(given):
        pass

with process_span(order) as span:
    assert_type(span, Span)
with process_span([order], consumer=untyped) as span:
    assert_type(span, Span)


def after(order: Order) -> int:
    # An exception goes on, so that nothing has to follow the block.
    with process_span(order):
        return order.offset


version: str = __version__
