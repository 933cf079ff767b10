"""`poll`, `next` and iteration: receive spans, and who opens process spans."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opentelemetry.context import get_current
from opentelemetry.trace import SpanKind

from otel_kafka_python._client import Client, is_inner_poll, iterates_by_polls
from otel_kafka_python._messages import (
    Links,
    Record,
    account_for,
    describe,
    shared,
)
from otel_kafka_python._operation import (
    POLL,
    Facts,
    Operation,
    Telemetry,
    count_records,
)
from otel_kafka_python._processing import (
    Records,
    ScopedIterator,
    hold,
    process,
    release,
)
from otel_kafka_python._safety import call_hook, report

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class ConsumerWrappers:
    """The wrappers of KafkaConsumer's methods.

    Args:
        telemetry: What the instrumentation works with.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        # What stands on the class for `__next__`, once it is patched.
        self.next_layer: Any = None

    def poll(self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
        """Wrap `KafkaConsumer.poll` ("Receive" spans)."""
        self.release(instance)
        client = self._client_to_trace(instance)
        if client is None or client.advancing == "next":
            return wrapped(*args, **kwargs)
        started = time.time_ns()
        try:
            polled = wrapped(*args, **kwargs)
        except BaseException as error:
            self.fail(instance, client, started, error)
            raise
        try:
            if is_inner_poll(args, kwargs):
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
        self.release(instance)
        client = self._client_to_trace(instance)
        if client is None or client.advancing is not None:
            return wrapped(*args, **kwargs)
        started = time.time_ns()
        client.advancing = "next"
        try:
            record = wrapped(*args, **kwargs)
        except StopIteration:
            raise
        except BaseException as error:
            self.fail(instance, client, started, error)
            raise
        finally:
            client.advancing = None
        try:
            self.receive_one(client, started, record, measured=True)
            if self.telemetry.config.processes_next:
                hold(self.telemetry, client, record)
        except Exception:
            report("trace the receipt of a record")
        return record

    def iterate(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap `KafkaConsumer.__iter__`."""
        self.release(instance)
        plain = wrapped(*args, **kwargs)
        if not self.telemetry.active:
            return plain
        try:
            return ConsumerIterator(self, instance, plain)
        except Exception:
            report("trace an iteration")
            return plain

    def close(self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
        """Wrap `KafkaConsumer.close`."""
        self.release(instance)
        return wrapped(*args, **kwargs)

    def release(self, consumer: Any) -> None:
        """Leave the scope of the record that the last `next` has returned."""
        if self.telemetry.config.processes_next:
            release(self.telemetry.clients.get(consumer))

    def _client_to_trace(self, instance: Any) -> Client | None:
        try:
            if self.telemetry.may_begin():
                return self.telemetry.clients.get(instance)
        except Exception:
            report("trace a consumer")
        return None

    def fail(
        self, consumer: Any, client: Client, started: int, error: BaseException
    ) -> None:
        """Trace a poll, a `next` or a step of an iteration that raised."""
        client.advancing = None  # what is around it need not tell it again
        try:
            facts = self.telemetry.facts(client, POLL, None, None)
            topics = {partition.topic for partition in consumer.assignment()}
            if facts is None or (
                topics and all(map(self.telemetry.config.excludes, topics))
            ):
                return
            span = None
            if self.telemetry.config.receive_spans:
                span = self.telemetry.start_span(
                    facts, SpanKind.CLIENT, started, facts.attributes
                )
            operation = Operation(facts, span, started)
            operation.fail(error)
            operation.end()
        except Exception:
            report("trace a poll")

    def _traced(self, client: Client, polled: Any) -> dict[Any, Facts]:
        """What is known of the partitions that a poll returned, but excluded topics."""
        facts = {
            partition: self.telemetry.facts(client, POLL, *partition)
            for partition, records in polled.items()
            if records
        }
        return {each: known for each, known in facts.items() if known is not None}

    def _measure(self, client: Client, started: int, polled: Any) -> None:
        """Measure the poll that iteration makes inside itself.

        It fetches ahead, so it accounts for no message yet.
        """
        ended = time.time_ns()
        client.refresh()
        traced = self._traced(client, polled)
        if not traced:
            return
        facts = self.telemetry.facts(client, POLL, *shared(traced))
        if facts is not None:
            Operation(facts, None, started).end(ended=ended)

    def _receive_batch(self, client: Client, started: int, polled: Any) -> None:
        ended = time.time_ns()
        telemetry = self.telemetry
        traced = self._traced(client, polled)
        if not traced:
            return
        topic, partition = shared(traced)
        facts = telemetry.facts(client, POLL, topic, partition)
        if facts is None:
            return
        span = None
        if telemetry.config.receive_spans:
            attributes = facts.attributes.copy()
            links = account_for(
                telemetry.config,
                [record for each in traced for record in polled[each]],
                topic,
                partition,
                attributes,
            )
            span = telemetry.start_span(
                facts, SpanKind.CLIENT, started, attributes, links=links
            )
        Operation(facts, span, started).end(ended=ended)
        for each, of_partition in traced.items():
            count_records(of_partition, polled[each], span)
            polled[each] = Records(polled[each], telemetry, client)

    def receive_one(
        self, client: Client, started: int, record: Record, *, measured: bool
    ) -> None:
        """Trace that a single record is handed over and no loop processes it.

        Args:
            client: The consumer.
            started: When it was asked for, in nanoseconds since the epoch.
            record: The record.
            measured: Whether this is an operation of its own.
        """
        telemetry, config = self.telemetry, self.telemetry.config
        facts = telemetry.facts(client, POLL, record.topic, record.partition)
        if facts is None:
            return
        ended = time.time_ns()
        span = None
        if config.receive_spans:
            attributes = facts.attributes.copy()
            describe(config, record, attributes)
            links = Links(config, [record], record.topic, record.partition)
            span = telemetry.start_span(
                facts, SpanKind.CLIENT, started, attributes, links=links
            )
            if (
                span is not None
                and config.consume_hook is not None
                and not (measured and config.processes_next)
            ):
                call_hook("consume_hook", config.consume_hook, span, record, (), {})
        Operation(facts, span, started).end(ended=ended, measured=measured)
        count_records(facts, [record], span)


class ConsumerIterator(ScopedIterator):
    """What `iter(consumer)` gives: the consumer's own iteration, in scopes.

    It goes on after a time-out as the consumer does, and has the consumer's
    other attributes.

    Args:
        wrappers: The wrappers of the consumer's class.
        consumer: The consumer.
        plain: What its own `__iter__` returned, in general the consumer itself.
    """

    __slots__ = ("_client", "_consumer", "_next", "_polls", "_started", "_wrappers")

    def __init__(self, wrappers: ConsumerWrappers, consumer: Any, plain: Any) -> None:
        super().__init__()
        self._wrappers = wrappers
        self._consumer = consumer
        self._client = wrappers.telemetry.clients.get(consumer)
        self._polls = iterates_by_polls(consumer)
        self._started = 0
        layer = wrappers.next_layer
        found = next(
            vars(each)["__next__"]
            for each in type(plain).__mro__
            if "__next__" in vars(each)
        )
        if layer is not None and found is layer:
            # Nothing stands above our own wrapper, which has nothing to do here.
            self._next = layer.__wrapped__.__get__(plain, type(plain))
        else:
            self._next = plain.__next__

    def _advance(self) -> Record:
        client = self._client
        if client.held is not None:
            release(client)
        self._started = time.time_ns()
        client.advancing = "iteration"
        try:
            return self._next()
        except StopIteration:
            raise
        except BaseException as error:
            # Up to 2.0 there is an iteration without a poll inside.
            if client.advancing is not None:
                self._wrappers.fail(self._consumer, client, self._started, error)
            raise
        finally:
            client.advancing = None
            del self  # as in `__next__`

    def __getattr__(self, name: str) -> Any:
        # A copy that was not initialised has no consumer, and must not look for it.
        if name == "_consumer":
            raise AttributeError(name)
        return getattr(self._consumer, name)

    def _hand_over(self, record: Record, by_loop: bool) -> None:
        wrappers, telemetry = self._wrappers, self._wrappers.telemetry
        current = get_current()
        if not telemetry.may_begin(current):
            return
        client = self._client
        # After each poll inside the metadata was looked at: saves 0.2 µs a record.
        if not self._polls:
            client.refresh()
        if not (by_loop and telemetry.config.process_spans):
            wrappers.receive_one(client, self._started, record, measured=False)
            if by_loop:
                self._scope = process(telemetry, client, record, current)
            return
        scope = self._scope = process(telemetry, client, record, current)
        if not telemetry.measures:
            return
        facts = telemetry.facts(client, POLL, record.topic, record.partition)
        if facts is not None:
            count_records(facts, [record], None if scope is None else scope.span)
