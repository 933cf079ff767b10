"""Offsets sent to a transaction, and the ends of transactions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opentelemetry.trace import SpanKind

from otel_kafka_python import _kafka
from otel_kafka_python._clock import Clock
from otel_kafka_python._messages import shared_partition
from otel_kafka_python._operation import Kind, PendingOperation
from otel_kafka_python._safety import report
from otel_kafka_python._telemetry import Telemetry

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class TransactionWrappers:
    """The wrappers of the producer's methods that settle a transaction (2.2 and later).

    Offsets that are sent to a transaction are settled. The conventions do not cover the
    ends of transactions: these spans are our own.

    Args:
        telemetry: The telemetry that all wrappers share.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def call(
        self, method: str, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap one of `TRANSACTION_METHODS`."""
        operation = None
        try:
            if self._telemetry.may_begin():
                operation = self._start(method, instance, args, kwargs)
        except Exception:
            report("trace a transaction")
        try:
            result = wrapped(*args, **kwargs)
        except BaseException as error:
            if operation is not None:
                operation.end_with(error)
            raise
        if operation is not None:
            operation.end()
        return result

    def _start(
        self, method: str, instance: Any, args: Args, kwargs: Kwargs
    ) -> PendingOperation | None:
        telemetry = self._telemetry
        client = telemetry.clients.get(instance)
        kind, topic, partition = Kind(method, None), None, None
        if method == _kafka.SEND_OFFSETS:
            group = _kafka.transaction_group(args, kwargs)
            kind = Kind(method, "settle", group)
            given = _kafka.offsets_by_partition(_kafka.offsets_argument(args, kwargs))
            partitions = [
                each for each in given if telemetry.template(client, kind, *each)
            ]
            if given and not partitions:
                return None
            topic, partition = shared_partition(partitions)
        template = telemetry.template(client, kind, topic, partition)
        assert template is not None  # excluded topics are left out
        started = time.time_ns(), Clock.monotonic_ns()
        span = None
        if telemetry.config.commit_spans != "none":
            span = telemetry.start_span(
                template, SpanKind.CLIENT, started, template.attributes
            )
        return PendingOperation(template, span, started)
