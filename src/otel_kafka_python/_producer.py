"""Send spans: from the call of `send` to the broker's acknowledgement."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import Token
from typing import Any, NamedTuple

from opentelemetry.context import Context, attach, detach, get_current
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
    body_size,
    client_attributes,
    message_attributes,
    message_key,
    partition_id,
    peer_attributes,
    without_absent,
)
from otel_kafka_python._client import Client
from otel_kafka_python._messages import captured_headers
from otel_kafka_python._operation import (
    SEND,
    Answered,
    Facts,
    Telemetry,
    end_abandoned,
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


class Delivery(Answered):
    """A message on its way to the broker; it is the callback of its future.

    Args:
        facts: What was known of it in advance.
        span: Its span, or None if it is only measured.
        started: When it started, in nanoseconds since the epoch.
        client: The producer.
        sized: Whether the span says how large the message's value is.
    """

    __slots__ = ("_client", "_partition", "_size", "_sized")

    def __init__(
        self,
        facts: Facts,
        span: Span | None,
        started: int,
        client: Client,
        *,
        sized: bool,
    ) -> None:
        super().__init__(facts, span, started)
        self._client = client
        self._partition: int | None = None
        self._size: int | None = None
        self._sized = sized

    def follow(self, future: Any) -> None:
        """Wait for the outcome; it may be there already."""
        try:
            self._partition, self._size = _client.pending(future)
            error = _client.failure_at_once(future)
            if error is None:
                _client.when_done(future, self)
            else:
                self._failed(error, time.time_ns(), at_once=True)
        except Exception:
            # A layer below ours may return something else than a future.
            report("follow the delivery of a message")
            if self.claim():
                self._finish({}, None, None, 1)

    def _succeeded(self, metadata: Any, ended: int) -> None:
        partition = metadata.partition
        attributes = {
            **self._answer_attributes(partition),
            **message_attributes(metadata.offset, None, self._size == -1),
        }
        if self._sized:
            attributes.update(body_size(self._size))
        if self.claim():
            self._finish(attributes, ended, partition, 1)

    def _failed(
        self, error: BaseException, ended: int, *, at_once: bool = False
    ) -> None:
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
        attributes = {**attributes, **message_attributes(None, None, self._size == -1)}
        if self._sized:
            attributes.update(body_size(self._size))
        self._finish(attributes, ended, partition, 1)

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
            self._finish({}, ended, self._partition, 1)


class _InContext:
    """A callback of the application's, and the context that it was added in."""

    __slots__ = ("_callback", "_context")

    def __init__(self, callback: Any, context: Context) -> None:
        self._callback = callback
        self._context: Context | None = context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Up to 2.0 the future keeps it, and the application may keep the future.
        context, self._context = self._context, None
        token = None
        if context is not None:
            try:
                token = attach(context)
            except Exception:
                report("enter the context of a callback")
        try:
            return self._callback(*args, **kwargs)
        finally:
            if token is not None:
                self._leave(token)

    def _leave(self, token: Token[Context]) -> None:
        try:
            detach(token)
        except Exception:
            report("leave the context of a callback")


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

    def add_callback(
        self,
        wrapped: Callable[..., Any],
        instance: Any,  # noqa: ARG002 (as wrapt calls it)
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Wrap the future's `add_callback` and `add_errback`; `add_both` calls these.

        What the application adds runs with the context that is current now, on
        whichever thread.
        """
        if self._telemetry.active:
            try:
                context = get_current()
                if args:
                    args = (_InContext(args[0], context), *args[1:])
                elif "f" in kwargs:
                    kwargs = {**kwargs, "f": _InContext(kwargs["f"], context)}
            except Exception:
                report("keep the context of a callback")
        return wrapped(*args, **kwargs)

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
            attributes = message_attributes(
                None, message_key(key) if config.capture_message_key else None
            )
            if config.capture_headers:
                headers = _client.argument(args, kwargs, _HEADERS, "headers")
                attributes.update(captured_headers(config, headers))
            span = telemetry.start_span(
                facts,
                SpanKind.PRODUCER if propagates else SpanKind.CLIENT,
                started,
                attributes,
                links=[] if kept is None else [Link(kept)],
            )
        delivery = Delivery(
            facts, span, started, client, sized=config.capture_message_size
        )
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
