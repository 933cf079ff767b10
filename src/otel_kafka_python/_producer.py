"""Send spans: from the call of `send` to the broker's acknowledgement."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextvars import Token
from typing import Any

from opentelemetry.context import Context, attach, get_current
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanContext,
    SpanKind,
    get_current_span,
    set_span_in_context,
)

from otel_kafka_python import _kafka
from otel_kafka_python._attributes import (
    Attributes,
    add_message,
    client_attributes,
    message_key,
    partition_attributes,
    peer_attributes,
)
from otel_kafka_python._clients import Client
from otel_kafka_python._clock import Clock, Moment
from otel_kafka_python._config import Config, ProduceHook
from otel_kafka_python._messages import captured_headers
from otel_kafka_python._operation import (
    SEND,
    Failure,
    OperationTemplate,
    PendingOperation,
    is_recorded,
)
from otel_kafka_python._pipeline import context_to_send, headers_with_start
from otel_kafka_python._processing.scopes import (
    THREADS_INHERIT,
    context_of_thread,
    is_being_processed,
    restore,
)
from otel_kafka_python._processing.spans import start_without_span
from otel_kafka_python._propagation import (
    creation_context,
    inject,
    may_carry_context,
    same_span,
)
from otel_kafka_python._safety import call_hook, report
from otel_kafka_python._telemetry import Telemetry

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Delivery(PendingOperation):
    """A message on its way to the broker, as the callback of its future.

    Args:
        template: The template of the operation.
        span: Its span, or None if it is only measured.
        started: When it started.
        client: The producer.
        key: The message's key, if its span does not have it yet.
    """

    __slots__ = ("_batch", "_client", "_key", "_partition", "_size")

    def __init__(
        self,
        template: OperationTemplate,
        span: Span | None,
        started: Moment,
        client: Client,
        key: object,
    ) -> None:
        self._client = client
        self._key = None if key is None else message_key(key)
        self._partition: Any = None
        self._size: int | None = None
        self._batch: Any = None
        super().__init__(template, span, started)

    def follow(self, future: Any, config: Config) -> None:
        """Wait for the outcome, which may be there already.

        Args:
            future: The future that `send` returned.
            config: The settings.
        """
        try:
            self._partition, size, error, batch = _kafka.pending_send(future)
            if size == -1 or config.capture_message_size:
                self._size = size
            if error is None:
                self._batch = batch
                _kafka.when_done(future, self)
                self._batch = None
            else:
                self.end_with(error)
        except Exception:
            # A layer below ours may return something other than a future.
            report("follow the delivery of a message")
            attributes, partition, messages = self._failure(None, was_taken=True)
            self.end(attributes, partition=partition, messages=messages)

    def _end_succeeded(self, metadata: Any, ended: int) -> None:
        partition = metadata.partition
        known = self._answer_attributes(partition)
        # If brokers do not answer, kafka-python 3 invents offsets.
        offset = metadata.offset if self._client.is_acknowledged else None
        attributes = add_message({**known}, offset, self._key, self._size)
        if self.claim():
            self.end_claimed(attributes, ended=ended, partition=partition, messages=1)

    def _failure(self, error: BaseException | None, *, was_taken: bool) -> Failure:
        partition = _kafka.partition_number(self._partition)
        was_sent, is_answered = was_taken, False
        if was_taken and error is not None:
            was_sent, is_answered = _kafka.failed_send(error, self._batch)
        if partition is not None and is_answered:
            known = self._answer_attributes(partition)
        else:
            known = self._partition_attributes(partition)
        attributes = add_message({**known}, None, self._key, self._size)
        return Failure(attributes, partition, int(was_sent))

    def _partition_attributes(self, partition: int | None) -> Attributes:
        """The attributes of all messages to a partition."""
        return {**self.template.end_attributes, **partition_attributes(partition)}

    def _answer_attributes(self, partition: int) -> Attributes:
        """The attributes of all messages that a partition's leader answered."""
        client, template = self._client, self.template
        client.refresh()  # the leader may have changed meanwhile
        key = template.topic, partition, template.knows_cluster
        known = client.answer_attributes.get(key)
        if known is None:
            known = client.answer_attributes[key] = self._leader_attributes(partition)
        return known

    def _leader_attributes(self, partition: int) -> Attributes:
        """The attributes of answered messages, with the metadata that is known now."""
        known = self._partition_attributes(partition)
        client, topic = self._client, self.template.topic
        try:
            # The cluster may have been unknown when the message was sent.
            if not self.template.knows_cluster:
                known.update(client_attributes(None, client.cluster_id))
            if topic is not None and client.is_acknowledged:
                known.update(peer_attributes(client.leader(topic, partition)))
        except Exception:
            report("read the metadata of a producer")
        return known


class _InContext:
    """A callback of the application, with the context in which it was added."""

    __slots__ = ("_callback", "_context")

    def __init__(self, callback: Any, context: Context) -> None:
        self._callback = callback
        self._context: Context | None = context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Up to 2.0, the future keeps this object. The application may keep the future.
        context, self._context = self._context, None
        attached = _attach(context)
        try:
            return self._callback(*args, **kwargs)
        finally:
            _detach(attached)


# The context before the one that is current for application code, and its token.
_Attached = tuple[Context, Token[Context]]


def _attach(context: Context | None) -> _Attached | None:
    """Make a context current, if there is one, while application code runs."""
    try:
        return None if context is None else (get_current(), attach(context))
    except Exception:
        report("enter the context of a producer's code")
        return None


def _detach(attached: _Attached | None) -> None:
    """Restore the context that was current before."""
    try:
        if attached is not None:
            restore(*attached)
    except Exception:
        report("leave the context of a producer's code")


class ProducerWrappers:
    """The wrappers of KafkaProducer's methods.

    Args:
        telemetry: The telemetry that all wrappers share.
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
        delivery = inside = attached = None
        try:
            delivery, inside, args, kwargs = self._prepare(instance, args, kwargs)
        except Exception:
            report("trace a send")
        if inside is not None:
            attached = _attach(inside)
        try:
            future = wrapped(*args, **kwargs)
        except BaseException as error:
            if delivery is not None:
                delivery.end_with(error)
            raise
        finally:
            if attached is not None:
                _detach(attached)
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
        """Wrap the future's `add_callback` and `add_errback`; `add_both` calls both.

        On any thread, the callback runs with the context that is current now.
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
    ) -> tuple[Delivery | None, Context | None, Args, Kwargs]:
        """Begin the operation of a call.

        Returns:
            The operation, if its end matters; the context for application code that
            the call runs, if it runs any; and the arguments of the call.
        """
        telemetry = self._telemetry
        config, hook = telemetry.config, telemetry.config.produce_hook
        context = get_current()
        context = context_of_thread(context) if THREADS_INHERIT else context
        # kafka-python itself raises an error for invalid arguments and a missing topic.
        try:
            topic, key, headers, partition = _kafka.send_arguments(*args, **kwargs)
        except TypeError:
            return None, None, args, kwargs
        if topic is None or not telemetry.may_begin(context):
            return None, None, args, kwargs
        client = telemetry.clients.get(instance)
        template = telemetry.template(client, SEND, topic, partition)
        if template is None:
            return None, None, args, kwargs
        started = time.time_ns(), Clock.monotonic_ns()
        kept = None if headers is None else self._kept_context(headers, context)
        injects = kept is None and template.injects
        if not config.capture_message_key:
            key = None
        span = delivery = None
        if config.send_spans:
            span = telemetry.start_span(
                template,
                SpanKind.PRODUCER if injects else SpanKind.CLIENT,
                started,
                self._attributes(template, key, headers),
                context,
                () if kept is None else (Link(kept),),
            )
        # If nobody observes the end, no callback is needed.
        if (span is not INVALID_SPAN and is_recorded(span)) or template.observes_end:
            end_key = key if hook is None else None
            delivery = Delivery(template, span, started, client, end_key)
        if hook is not None and span is not None:
            self._call_hook(hook, span, delivery, args, kwargs)
            headers = _kafka.send_headers(args, kwargs)
        # Without an SDK, there is usually nothing to inject. This saves 2 µs.
        span = None if span is INVALID_SPAN else span
        sent = context
        if template.starts_pipeline:
            sent, args, kwargs = _in_pipeline(
                template, started, args, kwargs, headers, context, kept
            )
        if injects and (sent or span is not None):
            args, kwargs = _with_context(args, kwargs, headers, sent, span)
        current = span if client.runs_application_code else None
        inside = None if current is None else set_span_in_context(current, context)
        return delivery, inside, args, kwargs

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
        except BaseException as error:  # an interrupt ends the application
            if delivery is not None:
                delivery.end_with(error)
            raise

    def _attributes(
        self, template: OperationTemplate, key: object, headers: Any
    ) -> Mapping[str, Any]:
        """The attributes of the span at its creation.

        Samplers may use them. With a hook they include the key, so that a value that
        the hook sets is not replaced later.
        """
        config = self._telemetry.config
        if not (config.capture_headers or config.produce_hook):
            return template.attributes
        attributes = template.attributes.copy()
        if config.capture_headers:
            attributes.update(captured_headers(config, headers))
        if config.produce_hook is not None and key is not None:
            add_message(attributes, None, message_key(key))
        return attributes

    def _kept_context(self, headers: Any, context: Context) -> SpanContext | None:
        """The creation context that the application put on the message on purpose.

        The context of a record that is being processed, or of the current span, does
        not count: the record is being forwarded, or the application still injects
        contexts itself, as it did before it was instrumented.
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


def _in_pipeline(
    template: OperationTemplate,
    started: Moment,
    args: Args,
    kwargs: Kwargs,
    headers: Any,
    context: Context,
    kept: SpanContext | None,
) -> tuple[Context, Args, Kwargs]:
    """The context to inject, with the start of the message's pipeline.

    If the message keeps its own creation context, nothing is injected. The returned
    arguments of `send` then have the start in their headers.
    """
    now = started[0]
    try:
        topic, processed = str(template.topic), start_without_span()
        sent = context_to_send(headers, context, processed, topic, now)
        if kept is not None:
            added = headers_with_start(headers, sent, now)
            if added is not headers:
                args, kwargs = _kafka.with_headers(args, kwargs, added)
    except Exception:
        report("carry the start of a pipeline")
        return context, args, kwargs
    return sent, args, kwargs


def _with_context(
    args: Args, kwargs: Kwargs, headers: Any, context: Context, span: Span | None
) -> tuple[Args, Kwargs]:
    """The arguments of `send` with a context in the headers."""
    try:
        injected = inject(headers, context, span)
    except Exception:
        report("inject the context into a message")
        return args, kwargs
    if injected is headers:
        return args, kwargs
    return _kafka.with_headers(args, kwargs, injected)
