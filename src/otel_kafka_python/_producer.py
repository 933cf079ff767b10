"""Send spans: from the call of `send` to the broker's acknowledgement."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from opentelemetry.context import Context, get_current
from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    SpanKind,
    get_current_span,
    set_span_in_context,
)

from otel_kafka_python import _client
from otel_kafka_python._attributes import (
    Attributes,
    client_attributes,
    message_attributes,
    message_key,
    partition_id,
    peer_attributes,
    without_absent,
)
from otel_kafka_python._client import Client
from otel_kafka_python._operation import (
    SEND,
    Facts,
    Operation,
    Telemetry,
    end_abandoned,
    leave_behind,
)
from otel_kafka_python._processing import is_being_processed, same_span
from otel_kafka_python._propagation import (
    creation_context,
    extract,
    has_propagators,
    inject,
    may_carry_context,
)
from otel_kafka_python._safety import call_hook, report
from otel_kafka_python._semconv import MESSAGING_DESTINATION_PARTITION_ID

# The position of `headers` among the arguments of `send`, in every version.
_HEADERS = 3


class Prepared(NamedTuple):
    """A call of `send` as it is to be made, and the operation that it begins."""

    delivery: Delivery | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Delivery(Operation):
    """A message on its way to the broker; it is the callback of its future.

    Args:
        facts: What was known of it in advance.
        span: Its span, or None if it is only measured.
        started: When it started, in nanoseconds since the epoch.
        client: The producer.
    """

    __slots__ = ("_client", "_partition")

    def __init__(
        self, facts: Facts, span: Span | None, started: int, client: Client
    ) -> None:
        super().__init__(facts, span, started)
        self._client = client
        self._partition: int | None = None

    def follow(self, future: Any) -> None:
        """Wait for the outcome; it may be there already."""
        try:
            self._partition = _client.pending_partition(future)
            error = _client.failure_at_once(future)
            if error is None:
                _client.when_done(future, self)
            else:
                self._failed(error, time.time_ns(), at_once=True)
        except Exception:
            # A layer below ours may return something else than a future.
            report("follow the delivery of a message")
            if self.claim():
                self._finish({}, None, None)

    def raised(self, error: BaseException) -> None:
        """End it with what `send` raised: nothing was handed to the client."""
        self.fail(error)
        self.end()

    def __call__(self, outcome: Any) -> None:
        """Receive the RecordMetadata or the exception, on any thread."""
        ended = time.time_ns()
        try:
            if isinstance(outcome, BaseException):
                self._failed(outcome, ended, at_once=False)
            else:
                self._acknowledged(outcome, ended)
        except Exception:
            report("end a send span")
        except BaseException:
            report("end a send span")
            # It would end kafka-python's sender thread. On the main thread it is
            # the user's, who wants to end the application.
            if threading.get_ident() == threading.main_thread().ident:
                raise

    def _acknowledged(self, metadata: Any, ended: int) -> None:
        partition = metadata.partition
        attributes = {
            **self._answer_attributes(partition),
            **message_attributes(
                metadata.offset, None, metadata.serialized_value_size == -1
            ),
        }
        if self.claim():
            self._finish(attributes, ended, partition)

    def _failed(self, error: BaseException, ended: int, *, at_once: bool) -> None:
        if not self.claim():
            return
        self.fail(error)
        partition = self._partition
        if partition is None:
            attributes: Attributes = {}
        elif at_once or not _client.is_answer(error):
            attributes = {MESSAGING_DESTINATION_PARTITION_ID: partition_id(partition)}
        else:
            attributes = self._answer_attributes(partition)
        self._finish(attributes, ended, partition)

    def _finish(
        self, attributes: Attributes, ended: int | None, partition: int | None
    ) -> None:
        self.end(attributes, ended=ended, partition=partition, messages=1, claimed=True)
        # Up to 2.1 the future keeps its callbacks, and the application may keep it.
        self.span = None

    def _answer_attributes(self, partition: int) -> Attributes:
        """What the answer of a partition's leader tells."""
        client, topic = self._client, self.facts.topic
        try:
            client.refresh()  # the leader may have changed on the way
            answers = client.answers
            known: Attributes | None = answers.get((topic, partition))
            if known is None:
                leader = None if topic is None else client.leader(topic, partition)
                known = answers[topic, partition] = without_absent(
                    {
                        MESSAGING_DESTINATION_PARTITION_ID: partition_id(partition),
                        **client_attributes(None, client.cluster_id),
                        **peer_attributes(leader if leader and leader.is_ip else None),
                    }
                )
        except Exception:
            report("read the metadata of a producer")
            return {MESSAGING_DESTINATION_PARTITION_ID: partition_id(partition)}
        return known

    def abandon(self, ended: int) -> None:
        """End it without knowing whether the message has arrived."""
        if self.claim():
            self.fail(None)
            self._finish({}, ended, self._partition)

    def __del__(self) -> None:
        leave_behind(self)


class ProducerWrappers:
    """The wrappers of KafkaProducer's methods.

    Args:
        telemetry: What the instrumentation works with.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def send(
        self,
        wrapped: Callable[..., Any],
        instance: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Wrap `KafkaProducer.send` ("Send" spans)."""
        prepared = Prepared(None, args, kwargs)
        try:
            if self._telemetry.is_enabled():
                prepared = self._prepare(instance, args, kwargs)
        except Exception:
            report("trace a send")
        delivery = prepared.delivery
        try:
            future = wrapped(*prepared.args, **prepared.kwargs)
        except BaseException as error:
            if delivery is not None:
                delivery.raised(error)
            raise
        if delivery is not None:
            delivery.follow(future)
        return future

    def _prepare(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Prepared:
        end_abandoned()
        telemetry, config = self._telemetry, self._telemetry.config
        topic = _client.argument(args, kwargs, 0, "topic")
        partition = _client.argument(args, kwargs, 4, "partition")
        if topic is None:  # missing, for kafka-python to say
            return Prepared(None, args, kwargs)
        client = telemetry.client(instance)
        facts = telemetry.facts(
            client,
            SEND,
            topic if isinstance(topic, str) else "",
            partition if isinstance(partition, int) else None,
        )
        if facts is None:
            return Prepared(None, args, kwargs)
        started = time.time_ns()
        context = get_current()
        kept = self._kept_context(args, kwargs, context)
        propagates = (
            config.propagation
            and client.sends_headers
            and kept is None
            and has_propagators()
        )
        span = None
        if config.send_spans:
            key = _client.argument(args, kwargs, 2, "key")
            span = telemetry.start_span(
                facts,
                SpanKind.PRODUCER if propagates else SpanKind.CLIENT,
                started,
                message_attributes(
                    None,
                    message_key(key) if config.capture_message_key else None,
                    False,
                ),
                links=[] if kept is None else [Link(kept)],
            )
        delivery = Delivery(facts, span, started, client)
        if span is not None and config.produce_hook is not None:
            try:
                call_hook("produce_hook", config.produce_hook, span, args, kwargs)
            except BaseException as error:  # the user's, who wants to end it all
                delivery.raised(error)
                raise
        if propagates:
            if span is not None:
                context = set_span_in_context(span, context)
            try:
                args, kwargs = _with_context(args, kwargs, context)
            except Exception:
                report("inject the context into a message")
        return Prepared(delivery, args, kwargs)

    def _kept_context(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context
    ) -> SpanContext | None:
        """The creation context that the application has put on the message.

        That of a record that is being processed, or of the current span, was not
        put there on purpose: the record is forwarded, or the context was injected
        by a habit from before there was an instrumentation.
        """
        headers = _client.argument(args, kwargs, _HEADERS, "headers")
        try:
            if not may_carry_context(headers):
                return None
            carried = creation_context(extract(headers))
            if carried is None:
                return None
            current = get_current_span(context).get_span_context()
            if same_span(carried, current) or is_being_processed(carried, context):
                return None
            return carried
        except Exception:
            report("read the context of a message that is sent")
            return None


def _with_context(
    args: tuple[Any, ...], kwargs: dict[str, Any], context: Context
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `send` with `context` in the headers, wherever these were."""
    headers = _client.argument(args, kwargs, _HEADERS, "headers")
    injected = inject(headers, context)
    if injected is headers:
        return args, kwargs
    if len(args) > _HEADERS:
        return (*args[:_HEADERS], injected, *args[_HEADERS + 1 :]), kwargs
    return args, {**kwargs, "headers": injected}
