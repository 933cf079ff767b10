"""`poll`, `next` and iteration: receive spans, and the start of process spans."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.context import Context, get_current
from opentelemetry.trace import Span, SpanKind

from otel_kafka_python._attributes import queue_seconds, queue_time_attributes
from otel_kafka_python._clients import Client, Step
from otel_kafka_python._clock import Clock, Moment, moment_at
from otel_kafka_python._kafka import assigned_topics, iterates_by_polls
from otel_kafka_python._messages import (
    Links,
    Record,
    account_for,
    describe,
    shared_partition,
)
from otel_kafka_python._operation import (
    POLL,
    Operation,
    OperationTemplate,
    Receipt,
)
from otel_kafka_python._pipeline import Arrival, Handover, start_in
from otel_kafka_python._processing.iterators import HeldScopes, Records, ScopedIterator
from otel_kafka_python._processing.spans import open_unless_in_scope
from otel_kafka_python._propagation import SPAN_KEY, extract
from otel_kafka_python._safety import report
from otel_kafka_python._telemetry import Telemetry

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class ConsumerWrappers:
    """The wrappers of KafkaConsumer's methods.

    Args:
        telemetry: The telemetry that all wrappers share.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self.held = HeldScopes()
        self.processes_next = telemetry.config.processes_next
        # Whether the last record's telemetry may end only when more is asked for.
        self.keeps_last_open = (
            self.processes_next
            or telemetry.consume_hook is not None
            or telemetry.config.pipeline_latency
        )
        telemetry.on_stop(self.held.close_all)
        telemetry.on_stop(self._close_receipts)

    def poll(self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
        """Wrap `KafkaConsumer.poll` ("Receive" spans)."""
        self._on_asked(instance)
        client = self._client_to_trace(instance)
        if client is None or client.step is Step.NEXT:
            return wrapped(*args, **kwargs)
        is_inner = client.step is not None
        started = time.time_ns(), Clock.monotonic_ns()
        client.asked += 1
        try:
            polled = wrapped(*args, **kwargs)
        except Exception as error:
            if is_inner:
                client.step = Step.FAILED
            self.trace_failure(instance, client, started, error)
            raise
        try:
            if is_inner:
                self._measure(client, started, polled)
            else:
                self._receive_batch(client, started, polled)
        except Exception:
            report("trace a poll")
        return polled

    def advance(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap `KafkaConsumer.__next__` when it is called directly."""
        self._on_asked(instance)
        client = self._client_to_trace(instance)
        if client is None or client.step is not None:
            return wrapped(*args, **kwargs)
        started = time.time_ns(), Clock.monotonic_ns()
        client.asked += 1
        client.step = Step.NEXT
        try:
            record = wrapped(*args, **kwargs)
        except StopIteration:
            raise
        except Exception as error:
            self.trace_failure(instance, client, started, error)
            raise
        finally:
            client.step = None
        try:
            self.receive_one(client, started, record, measured=True)
            if self.processes_next:
                self.held.hold(self.telemetry, client, record)
        except Exception:
            report("trace the receipt of a record")
        return record

    def iterate(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap `KafkaConsumer.__iter__`."""
        self._on_asked(instance)
        plain = wrapped(*args, **kwargs)
        if not self.telemetry.active:
            return plain
        try:
            return ConsumerIterator(self, instance, plain)
        except Exception:
            report("trace an iteration")
            return plain

    def close(self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
        """Wrap `KafkaConsumer.close`, if it `keeps_last_open`."""
        self.close_last(self.telemetry.clients.get(instance))
        return wrapped(*args, **kwargs)

    def _on_asked(self, consumer: Any) -> None:
        if self.keeps_last_open:
            self.on_asked(self.telemetry.clients.get(consumer))

    def on_asked(self, client: Client) -> None:
        """Close the last record of a consumer that is asked for more.

        The scopes of other consumers' records are left.
        """
        self.close_last(client)
        if self.processes_next:
            self.held.displace()

    def close_last(self, client: Client) -> None:
        """Close everything that waits for the end of the last record's processing."""
        client.handovers = []
        if self.processes_next:
            self.held.close(client)
        client.close_receipt()

    def _close_receipts(self) -> None:
        for _, client in self.telemetry.clients.living():
            client.close_receipt()

    def _client_to_trace(self, instance: Any) -> Client | None:
        try:
            if self.telemetry.may_begin():
                return self.telemetry.clients.get(instance)
        except Exception:
            report("trace a consumer")
        return None

    def trace_failure(
        self, consumer: Any, client: Client, started: Moment, error: Exception
    ) -> None:
        """Trace a poll, a `next` or a step of an iteration that raised.

        A KeyboardInterrupt, a GreenletExit and others that are not an Exception are a
        clean stop and do not fail it.
        """
        try:
            template = self.telemetry.template(client, POLL, None, None)
            topics = assigned_topics(consumer)
            if template is None or (
                topics and all(map(self.telemetry.config.excludes, topics))
            ):
                return
            span = None
            if self.telemetry.config.receive_spans:
                span = self.telemetry.start_span(
                    template, SpanKind.CLIENT, started, template.attributes
                )
            operation = Operation(template, span, started)
            try:
                operation.fail(error)
            finally:  # also after an interrupt
                operation.end()
        except Exception:
            report("trace a poll")

    def _traced(self, client: Client, polled: Any) -> dict[Any, OperationTemplate]:
        """The templates of the polled partitions, without excluded topics."""
        templates = {
            partition: self.telemetry.template(client, POLL, *partition)
            for partition, records in polled.items()
            if records
        }
        return {each: known for each, known in templates.items() if known is not None}

    def _measure(self, client: Client, started: Moment, polled: Any) -> None:
        """Measure a poll that a step of an iteration makes.

        It fetches ahead, so it accounts for no message yet.
        """
        ended = Clock.monotonic_ns()
        client.refresh()
        traced = self._traced(client, polled)
        if not traced:
            return
        template = self.telemetry.template(client, POLL, *shared_partition(traced))
        assert template is not None  # excluded topics are left out
        client.polled = started, ended
        Operation(template, None, started).end(ended=ended)

    def _receive_batch(self, client: Client, started: Moment, polled: Any) -> None:
        ended = Clock.monotonic_ns()
        telemetry = self.telemetry
        traced = self._traced(client, polled)
        if not traced:
            return
        topic, partition = shared_partition(traced)
        template = telemetry.template(client, POLL, topic, partition)
        assert template is not None  # excluded topics are left out
        span = None
        if telemetry.config.receive_spans:
            attributes = template.attributes.copy()
            links = account_for(
                telemetry.config,
                [record for each in traced for record in polled[each]],
                topic,
                partition,
                attributes,
            )
            span = telemetry.start_span(
                template, SpanKind.CLIENT, started, attributes, links=links
            )
        Operation(template, span, started).end(ended=ended)
        for each, partition_template in traced.items():
            if telemetry.config.client_metrics:
                client.remember(polled[each][-1])
            _count_records(partition_template, polled[each], span)
            records = Records(polled[each], telemetry, client)
            if partition_template.destination is not None:
                records.handover = _keep_handover(
                    client, partition_template, polled[each], span
                )
            polled[each] = records

    def receive_one(
        self,
        client: Client,
        started: Moment,
        record: Record,
        *,
        measured: bool,
        ended: int | None = None,
    ) -> None:
        """Trace the handover of a single record that no loop processes.

        Args:
            client: The consumer.
            started: When the application asked for it.
            record: The record.
            measured: Whether this is an operation of its own.
            ended: When the measured poll that brought it ended; now if None.
        """
        telemetry, config = self.telemetry, self.telemetry.config
        template = telemetry.template(client, POLL, record.topic, record.partition)
        if template is None:
            return
        if ended is None:
            ended = Clock.monotonic_ns()
        if config.client_metrics:
            client.remember(record)
        span = None
        if config.receive_spans:
            attributes = template.attributes.copy()
            describe(config, record, attributes)
            links = Links(config, [record], record.topic, record.partition)
            span = telemetry.start_span(
                template, SpanKind.CLIENT, started, attributes, links=links
            )
        hook = telemetry.consume_hook
        # A process span that `next` opens calls the hook itself.
        if span is None or hook is None or (measured and self.processes_next):
            Operation(template, span, started).end(ended=ended, measured=measured)
        else:
            receipt = Receipt(
                template,
                span,
                started,
                ended,
                measured=measured,
                record=record,
                hook=hook,
            )
            if config.process_spans:
                client.receipt = receipt
            else:
                receipt.close()
        _count_records(template, [record], span)
        if template.destination is not None:
            _keep_handover(client, template, [record], span)


class ConsumerIterator(ScopedIterator):
    """The result of `iter(consumer)`: the consumer's own iteration, in scopes.

    It continues after a time-out as the consumer does, and has the consumer's other
    attributes.

    Args:
        wrappers: The wrappers of the consumer's class.
        consumer: The consumer.
        plain: The result of its own `__iter__`, usually the consumer itself.
    """

    __slots__ = ("_began", "_client", "_consumer", "_next", "_polls", "_wrappers")

    def __init__(self, wrappers: ConsumerWrappers, consumer: Any, plain: Any) -> None:
        super().__init__()
        self._wrappers = wrappers
        self._consumer = consumer
        self._client = wrappers.telemetry.clients.get(consumer)
        self._polls = iterates_by_polls(consumer)
        self._began = 0
        found = next(
            vars(each)["__next__"]
            for each in type(plain).__mro__
            if "__next__" in vars(each)
        )
        if getattr(found, "_self_wrapper", None) == wrappers.advance:
            # Our own wrapper is the outermost and has nothing to do here.
            self._next: Callable[[], Record] = found.__wrapped__.__get__(
                plain, type(plain)
            )
        else:
            self._next = plain.__next__

    def _advance(self, began: int | None) -> Record:
        client = self._client
        if self._wrappers.keeps_last_open:
            self._wrappers.on_asked(client)
        self._began = Clock.monotonic_ns() if began is None else began
        client.asked += 1
        around, client.step = client.step, Step.ITERATION
        try:
            return self._next()
        except StopIteration:
            raise
        except Exception as error:
            # Up to 2.0, an iteration may have no poll inside.
            if client.step is not Step.FAILED:
                started = moment_at(self._began)
                self._wrappers.trace_failure(self._consumer, client, started, error)
            raise
        finally:
            client.step = around
            del self  # as in `__next__`

    def __getattr__(self, name: str) -> Any:
        # A copy that was not initialised has no consumer. Looking for it would not end.
        if name == "_consumer":
            raise AttributeError(name)
        return getattr(self._consumer, name)

    def _hand_over(self, record: Record, by_loop: bool) -> None:
        wrappers, telemetry = self._wrappers, self._wrappers.telemetry
        current = get_current()
        if not telemetry.may_begin(current):
            return
        client = self._client
        # A poll inside has already looked at the metadata.
        if not self._polls:
            client.refresh()
        if not (by_loop and telemetry.config.process_spans):
            started, ended = client.polled or (moment_at(self._began), None)
            wrappers.receive_one(client, started, record, measured=False, ended=ended)
            if by_loop:
                self._scope = open_unless_in_scope(telemetry, client, record, current)
            return
        scope = self._scope = open_unless_in_scope(telemetry, client, record, current)
        observed = telemetry.config.client_metrics
        if not (telemetry.measures or observed):
            return
        template = telemetry.template(client, POLL, record.topic, record.partition)
        if template is not None:
            if observed:
                client.remember(record)
            _count_records(template, [record], None if scope is None else scope.span)


def _count_records(
    template: OperationTemplate, records: Sequence[Any], span: Span | None = None
) -> None:
    """Count records of a topic and partition that are handed to the application.

    Args:
        template: The template of polls of the topic and partition.
        records: The records.
        span: The span that accounts for them, if there is one.
    """
    _, tally = template.metrics(None)
    if tally is None:
        return
    tally.count(len(records))
    if template.queue_time is None:
        return
    try:
        context = None if span is None else Context({SPAN_KEY: span})
        now = time.time_ns()
        attributes = queue_time_attributes(template.count_attributes)
        for record in records:
            seconds = queue_seconds(record.timestamp, now)
            if seconds is not None:
                template.queue_time.record(seconds, attributes, context)
    except Exception:
        report("record a metric")


def _keep_handover(
    client: Client,
    template: OperationTemplate,
    records: Sequence[Record],
    span: Span | None,
) -> Handover | None:
    """Prepare to measure the pipelines of records that are not processed.

    Args:
        client: The consumer, which keeps the result until it is asked for more.
        template: The template of polls of their topic and partition.
        records: The records that are handed to the application.
        span: The span that accounts for them, if there is one.
    """
    destination, now = template.destination, time.time_ns()
    arrivals: dict[int, Arrival] = {}
    try:
        for record in records:
            context, _ = extract(record.headers)
            if destination is None or not context:
                continue
            arrival = destination.arrival(start_in(context, now))
            if arrival is not None:
                arrivals[id(record.headers)] = arrival
    except Exception:
        report("see when the pipelines of records began")
    if not arrivals:
        return None
    headers = [record.headers for record in records]
    handover = Handover(arrivals, headers, now, span)
    client.handovers.append(handover)
    return handover
