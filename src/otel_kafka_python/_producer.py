"""Send spans: from the call of `send` to the broker's acknowledgement."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import Token
from typing import Any

from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanContext,
    SpanKind,
    get_current_span,
)

from otel_kafka_python import _client
from otel_kafka_python._attributes import (
    Attributes,
    add_message,
    client_attributes,
    message_key,
    partition_id,
    peer_attributes,
)
from otel_kafka_python._client import Client
from otel_kafka_python._config import Config, ProduceHook
from otel_kafka_python._messages import captured_headers
from otel_kafka_python._operation import (
    SEND,
    Answered,
    Facts,
    Telemetry,
    is_recorded,
)
from otel_kafka_python._processing import is_being_processed, same_span
from otel_kafka_python._propagation import (
    creation_context,
    inject,
    may_carry_context,
)
from otel_kafka_python._safety import call_hook, report
from otel_kafka_python._semconv import MESSAGING_DESTINATION_PARTITION_ID

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# The position of `headers` among the arguments of `send`, in every version.
_HEADERS = 3


class Delivery(Answered):
    """A message on its way to the broker; it is the callback of its future.

    Args:
        facts: What was known of it in advance.
        span: Its span, or None if it is only measured.
        started: When it started, in nanoseconds since the epoch.
        client: The producer.
        key: The message's key, if its span is yet to have it.
    """

    __slots__ = ("_client", "_key", "_partition", "_size")

    def __init__(
        self,
        facts: Facts,
        span: Span | None,
        started: int,
        client: Client,
        key: object,
    ) -> None:
        super().__init__(facts, span, started)
        self._client = client
        self._key = None if key is None else message_key(key)
        self._partition: Any = None
        self._size: int | None = None

    def follow(self, future: Any, config: Config) -> None:
        """Wait for the outcome; it may be there already.

        Args:
            future: What the call has returned.
            config: The settings.
        """
        try:
            self._partition, size, error = _client.pending(future)
            if size == -1 or config.capture_message_size:
                self._size = size
            if error is None:
                _client.when_done(future, self)
            else:
                self._failed(error, time.time_ns(), at_once=True)
        except Exception:
            # A layer below ours may return something else than a future.
            report("follow the delivery of a message")
            if self.claim():
                self._finish(self._told(self.facts.told_later), None, None, 1)

    def raised(self, error: BaseException) -> None:
        """End it with what the call raised: nothing was handed to the client."""
        if self.claim():
            self.fail(error)
            self._finish(self._told(self.facts.told_later), None)

    def _succeeded(self, metadata: Any, ended: int) -> None:
        partition = metadata.partition
        known = self._of_answer(partition)
        attributes = add_message({**known}, metadata.offset, self._key, self._size)
        if self.claim():
            self._finish(attributes, ended, partition, 1)

    def _failed(
        self, error: BaseException, ended: int, *, at_once: bool = False
    ) -> None:
        if not self.claim():
            return
        self.fail(error)
        partition = self._partition if isinstance(self._partition, int) else None
        known = self.facts.told_later
        if partition is not None:
            is_answer = not at_once and _client.is_answer(error)
            known = (self._of_answer if is_answer else self._of_partition)(partition)
        self._finish(self._told(known), ended, partition, 1)

    def _told(self, known: Attributes) -> Attributes:
        """What the span of a failure says: what is known, and of the message."""
        return add_message({**known}, None, self._key, self._size)

    def _of_partition(self, partition: int) -> Attributes:
        """What is known of all messages to a partition."""
        of_partition = {MESSAGING_DESTINATION_PARTITION_ID: partition_id(partition)}
        return {**self.facts.told_later, **of_partition}

    def _of_answer(self, partition: int) -> Attributes:
        """What is known of all messages that a partition's leader has answered."""
        client, facts = self._client, self.facts
        client.refresh()  # the leader may have changed on the way
        key = facts.topic, partition, facts.tells_cluster
        known: Attributes | None = client.answers.get(key)
        if known is None:
            known = client.answers[key] = self._learn(partition)
        return known

    def _learn(self, partition: int) -> Attributes:
        """What the metadata says of all messages that a leader has answered."""
        known = self._of_partition(partition)
        client, topic = self._client, self.facts.topic
        try:
            # The cluster may not have been known when it was sent.
            if not self.facts.tells_cluster:
                known.update(client_attributes(None, client.cluster_id))
            leader = None if topic is None else client.leader(topic, partition)
            if leader is not None and leader.is_ip:
                known.update(peer_attributes(leader))
        except Exception:
            report("read the metadata of a producer")
        return known

    def abandon(self, ended: int) -> None:
        """End it without knowing whether the message has arrived."""
        if self.claim():
            self.fail(None)
            known = self._told(self.facts.told_later)
            self._finish(known, ended, self._partition, 1)


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
        args: Args,
        kwargs: Kwargs,
    ) -> Any:
        """Wrap `KafkaProducer.send` ("Send" spans)."""
        delivery = None
        try:
            delivery, args, kwargs = self._prepare(instance, args, kwargs)
        except Exception:
            report("trace a send")
        try:
            future = wrapped(*args, **kwargs)
        except BaseException as error:
            if delivery is not None:
                delivery.raised(error)
            raise
        if delivery is not None:
            delivery.follow(future, self._telemetry.config)
        return future

    def add_callback(
        self,
        wrapped: Callable[..., Any],
        instance: Any,  # noqa: ARG002 (as wrapt calls it)
        args: Args,
        kwargs: Kwargs,
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
        self, instance: Any, args: Args, kwargs: Kwargs
    ) -> tuple[Delivery | None, Args, Kwargs]:
        """The operation that a call begins, if its end tells anything, and the call."""
        telemetry = self._telemetry
        config, hook = telemetry.config, telemetry.config.produce_hook
        context = get_current()
        # What makes no sense, and a topic that is missing, kafka-python complains of.
        try:
            topic, key, headers, partition = _client.send_arguments(*args, **kwargs)
        except TypeError:
            return None, args, kwargs
        if topic is None or not telemetry.may_begin(context):
            return None, args, kwargs
        client = telemetry.clients.get(instance)
        facts = telemetry.facts(client, SEND, topic, partition)
        if facts is None:
            return None, args, kwargs
        started = time.time_ns()
        kept = None if headers is None else self._kept_context(headers, context)
        propagates = kept is None and facts.propagates
        if not config.capture_message_key:
            key = None
        span = delivery = None
        if config.send_spans:
            span = telemetry.start_span(
                facts,
                SpanKind.PRODUCER if propagates else SpanKind.CLIENT,
                started,
                (  # mostly not to copy them saves 0.2 µs
                    self._attributes(facts, key, headers)
                    if config.capture_headers or hook
                    else facts.attributes
                ),
                context,
                () if kept is None else (Link(kept),),
            )
        # An end that nobody would know of needs no callback. Not to ask a span that is
        # nothing saves 0.2 µs.
        if (span is not INVALID_SPAN and is_recorded(span)) or facts.is_told_anyway:
            told_later = key if hook is None else None
            delivery = Delivery(facts, span, started, client, told_later)
        if hook is not None and span is not None:
            self._call_hook(hook, span, delivery, args, kwargs)
            headers = _client.argument(args, kwargs, _HEADERS, "headers")
        # Without an SDK there is mostly nothing to inject: saves 2 µs.
        if span is INVALID_SPAN:
            span = None
        if propagates and (context or span is not None):
            args, kwargs = _with_context(args, kwargs, headers, context, span)
        return delivery, args, kwargs

    @staticmethod
    def _call_hook(
        hook: ProduceHook,
        span: Span,
        delivery: Delivery | None,
        args: Args,
        kwargs: Kwargs,
    ) -> None:
        try:
            call_hook("produce_hook", hook, span, args, kwargs)
        except BaseException as error:  # the user's, who wants to end it all
            if delivery is not None:
                delivery.raised(error)
            raise

    def _attributes(self, facts: Facts, key: object, headers: Any) -> Attributes:
        """What the span has at its creation.

        Samplers may decide by it, and a hook may replace it: then that is to stay.
        """
        config, attributes = self._telemetry.config, facts.attributes.copy()
        if config.capture_headers:
            attributes.update(captured_headers(config, headers))
        if config.produce_hook is not None and key is not None:
            add_message(attributes, None, message_key(key))
        return attributes

    def _kept_context(self, headers: Any, context: Context) -> SpanContext | None:
        """The creation context that the application has put on the message.

        That of a record that is being processed, or of the current span, was not
        put there on purpose: the record is forwarded, or the context was injected
        by a habit from before there was an instrumentation.
        """
        try:
            if not may_carry_context(headers):
                return None
            carried = creation_context(headers)
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
    args: Args, kwargs: Kwargs, headers: Any, context: Context, span: Span | None
) -> tuple[Args, Kwargs]:
    """The arguments of `send` with a context in the headers, wherever these were."""
    try:
        injected = inject(headers, context, span)
    except Exception:
        report("inject the context into a message")
        return args, kwargs
    if injected is headers:
        return args, kwargs
    if len(args) > _HEADERS:
        return (*args[:_HEADERS], injected, *args[_HEADERS + 1 :]), kwargs
    return args, {**kwargs, "headers": injected}
