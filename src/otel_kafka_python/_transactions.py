"""Offsets that are sent to a transaction, and the ends of transactions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opentelemetry.trace import SpanKind

from otel_kafka_python import _kafka
from otel_kafka_python._attributes import Attributes, group_attributes
from otel_kafka_python._operation import COMMIT, Kind, Operation
from otel_kafka_python._safety import report
from otel_kafka_python._telemetry import Telemetry

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class TransactionWrappers:
    """The wrappers of the producer's methods that settle a transaction (2.2 and later).

    The convention says nothing of transactions: these spans are our own.

    Args:
        telemetry: What the instrumentation works with.
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
                operation.fail(error)
                operation.end()
            raise
        if operation is not None:
            operation.end()
        return result

    def _start(
        self, method: str, instance: Any, args: Args, kwargs: Kwargs
    ) -> Operation | None:
        telemetry = self._telemetry
        if telemetry.config.commit_spans == "none":
            return None
        client = telemetry.clients.get(instance)
        attributes: Attributes = {}
        if method == _kafka.SEND_OFFSETS:
            offsets = _kafka.offsets_argument(args, kwargs)
            partitions = _kafka.offsets_by_partition(offsets)
            if partitions and not any(
                telemetry.template(client, COMMIT, *each) for each in partitions
            ):
                return None
            attributes = group_attributes(_kafka.transaction_group(args, kwargs))
        template = telemetry.template(client, Kind(method, None), None, None)
        if template is None:
            return None
        started = time.time_ns()
        span = telemetry.start_span(
            template, SpanKind.CLIENT, started, template.attributes | attributes
        )
        return Operation(template, span, started)
