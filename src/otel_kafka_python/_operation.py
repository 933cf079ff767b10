"""Operations: what one is made from, and the one way in which it ends.

The span and the metrics of an operation share its start and its end, so both
are given explicitly, in nanoseconds since the epoch, and both are recorded
here, by `Operation.end`.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from opentelemetry import trace
from opentelemetry._logs import LoggerProvider
from opentelemetry.context import Context, get_current
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.metrics import Histogram, MeterProvider
from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    Status,
    StatusCode,
    TracerProvider,
)

from otel_kafka_python import _client, _coexistence
from otel_kafka_python._attributes import (
    Attributes,
    client_attributes,
    legal_topic,
    operation_attributes,
    partition_id,
    peer_attributes,
    queue_seconds,
    span_name,
)
from otel_kafka_python._client import Client, Clients
from otel_kafka_python._config import Config
from otel_kafka_python._exceptions import Exceptions
from otel_kafka_python._metrics import MessageCounter, Metrics, Tally
from otel_kafka_python._propagation import SPAN_KEY, has_propagators
from otel_kafka_python._safety import report, text_of
from otel_kafka_python._semconv import (
    ERROR_TYPE,
    MESSAGING_CONSUMER_GROUP_NAME,
    MESSAGING_DESTINATION_NAME,
    MESSAGING_DESTINATION_PARTITION_ID,
    MESSAGING_KAFKA_CLUSTER_ID,
    MESSAGING_OPERATION_TYPE,
    OUTCOME_UNKNOWN,
    SCHEMA_URL,
)
from otel_kafka_python.package import __version__


class Kind(NamedTuple):
    """A kind of operation: `messaging.operation.name` and `.type` (Operation types)."""

    name: str
    type: str | None  # None of what the convention has no type for


SEND = Kind("send", "send")
POLL = Kind("poll", "receive")
PROCESS = Kind("process", "process")
COMMIT = Kind("commit", "settle")


_QUEUE_TIME_ATTRIBUTES = (
    MESSAGING_DESTINATION_NAME,
    MESSAGING_DESTINATION_PARTITION_ID,
    MESSAGING_CONSUMER_GROUP_NAME,
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is the same for every operation of a kind on one topic and partition."""

    topic: str | None
    name: str
    attributes: MappingProxyType[str, Any]  # of a span, at its creation
    told_later: Attributes  # of a span, at its end
    measured: Attributes  # of the duration
    counted: Attributes  # of the messages
    duration: Histogram | None
    messages: MessageCounter | None
    exceptions: Exceptions
    # Of its exceptions: the type of the operation, or what comes nearest to it.
    event_type: str
    tells_cluster: bool  # whether the attributes at a span's creation do
    propagates: bool  # whether the messages that are sent carry a context
    is_told_anyway: bool  # whether its end is told of where no span is recorded
    queue_time: Histogram | None = None
    by_partition: dict[int | None, tuple[Attributes, Tally | None]] = field(
        default_factory=dict
    )

    def metrics(self, partition: int | None) -> tuple[Attributes, Tally | None]:
        """The attributes of the duration, and what counts the messages.

        Args:
            partition: The partition, if it was learned later.
        """
        known = self.by_partition.get(partition)
        if known is None:
            added: Attributes = {}
            if partition is not None:
                added = {MESSAGING_DESTINATION_PARTITION_ID: partition_id(partition)}
            tally = None
            if self.messages is not None:
                tally = self.messages.tally({**self.counted, **added})
            known = self.by_partition[partition] = {**self.measured, **added}, tally
        return known


class Telemetry:
    """What all wrappers of one `instrument()` share.

    Args:
        config: The settings.
        tracer_provider: The tracer provider; the global one if None.
        meter_provider: The meter provider; the global one if None.
        logger_provider: The logger provider; the global one if None.
    """

    def __init__(
        self,
        config: Config,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        logger_provider: LoggerProvider | None = None,
    ) -> None:
        self.config = config
        self.clients = Clients()
        self.active = True
        # Whether anything is measured, as far as is known from what was done.
        self.measures = False
        self._metrics = Metrics(
            meter_provider, self._living if config.client_metrics else None
        )
        self._exceptions = Exceptions(config, logger_provider)
        self._tracer = trace.get_tracer(
            "otel_kafka_python", __version__, tracer_provider, SCHEMA_URL
        )

    def _living(self) -> list[tuple[Any, Client]]:
        return self.clients.living() if self.active else []

    def may_begin(self, context: Context | None = None) -> bool:
        """Whether operations are traced now: not uninstrumented, not suppressed.

        If they are, what finalisers have left behind is ended before one begins.

        Args:
            context: The current one, if it is known. If it is empty, nothing is
                suppressed in it, which need not be looked up then: saves 0.2 µs.
        """
        if context is None:
            context = get_current()
        if not self.active or (context and not is_instrumentation_enabled()):
            return False
        if _abandoned:  # mostly there is nothing, and a call less: saves 0.1 µs
            _end_abandoned()
        return True

    def facts(
        self, client: Client, kind: Kind, topic: Any, partition: Any
    ) -> Facts | None:
        """What is known in advance of an operation.

        Args:
            client: Who performs it.
            kind: What is done.
            topic: The topic that all messages share, or None. What an application
                calls so and is no name of a topic counts as None.
            partition: The partition that all messages share, or None; likewise.

        Returns:
            The facts, or None if the topic is excluded.
        """
        facts: Facts | None
        # Another thread may put a new one in its place as the metadata changes.
        derived = client.derived
        try:
            facts = derived[kind, topic, partition]
        except (KeyError, TypeError):
            # New, or the metadata was refreshed: seldom, and soon enough to notice
            # the contrib package if it was instrumented after us.
            _coexistence.take_over()
            name = legal_topic(topic)
            number = partition if isinstance(partition, int) else None
            excluded = name is not None and self.config.excludes(name)
            facts = None if excluded else self._build_facts(client, kind, name, number)
            # What is no name of a topic is never kept: there is no end of them.
            if name == topic and number == partition:
                derived[kind, topic, partition] = facts
        return facts

    def _build_facts(
        self, client: Client, kind: Kind, topic: str | None, partition: int | None
    ) -> Facts:
        # Offsets go to the group's coordinator, which is no partition's leader.
        leader = None
        if topic is not None and kind is not COMMIT:
            leader = client.leader(topic, partition)
        server = leader or client.bootstrap
        measured = operation_attributes(
            kind.name, kind.type, topic, partition, client.group, server
        )
        counted = {k: v for k, v in measured.items() if k != MESSAGING_OPERATION_TYPE}
        attributes, told_later = measured, {}
        of_client = client_attributes(client.client_id, client.cluster_id)
        # Of what a sender's thread can tell the calling one is relieved: saves 2 µs.
        # But what a hook has replaced is not to be replaced again.
        if kind is SEND and self.config.produce_hook is None:
            told_later = of_client
        else:
            attributes = {**measured, **of_client}
        if kind is POLL and leader is not None and leader.is_ip:
            attributes.update(peer_attributes(leader))
        duration = messages = queue_time = None
        try:
            instruments = self._metrics.instruments()
        except Exception:
            report("create the instruments")
            instruments = None
        self.measures = instruments is not None
        if instruments is not None and kind.type:
            duration = instruments.operation_duration
            if kind is PROCESS:
                duration, measured = instruments.process_duration, counted
            messages = {
                SEND: instruments.sent_messages,
                POLL: instruments.consumed_messages,
            }.get(kind)
            if kind is POLL and self.config.capture_queue_time:
                queue_time = instruments.queue_time
        return Facts(
            topic,
            span_name(kind.name, topic),
            MappingProxyType(attributes),
            told_later,
            measured,
            counted,
            duration,
            messages,
            self._exceptions,
            kind.type or "settle",
            MESSAGING_KAFKA_CLUSTER_ID in attributes,
            self.config.propagation and client.sends_headers and has_propagators(),
            duration is not None or self._exceptions.are_logged,
            queue_time,
        )

    def start_span(
        self,
        facts: Facts,
        kind: SpanKind,
        started: int,
        attributes: Mapping[str, Any],
        context: Context | None = None,
        links: Sequence[Link] = (),
    ) -> Span | None:
        """Start a span, or return None if that fails.

        Args:
            facts: What is known of its operation.
            kind: The kind of the span.
            started: When the operation started, in nanoseconds since the epoch.
            attributes: Its attributes, those of `facts` among them.
            context: The context with its parent; the current one if None.
            links: Its links.
        """
        try:
            return self._tracer.start_span(
                facts.name,
                context,
                kind,
                attributes,
                links,
                started,
                # record_exception and set_status_on_exception: by name, 0.1 µs more.
                False,
                False,
            )
        except Exception:
            report("start a span")
            return None


def is_recorded(span: Span | None) -> bool:
    """Whether a span is, or may be."""
    try:
        return span is not None and span.is_recording()
    except Exception:
        report("ask whether a span is recorded")
        return True


class Operation:
    """An operation that has started, may fail, and ends once.

    Args:
        facts: What was known of it in advance.
        span: Its span, or None where it has none and is only measured.
        started: When it started, in nanoseconds since the epoch.
    """

    __slots__ = (
        "_process",
        "_unclaimed",
        "ended",
        "error_type",
        "facts",
        "span",
        "started",
    )

    def __init__(self, facts: Facts, span: Span | None, started: int) -> None:
        self.facts = facts
        self.span = span
        self.started = started
        self._unclaimed = True
        # Whether somebody has ended it, or is about to. To ask whether `_unclaimed` is
        # gone would take an exception: saves 0.2 µs.
        self.ended = False
        self.error_type: str | None = None
        self._process = _process

    def fail(self, error: BaseException | None) -> None:
        """Record why the operation fails (Recording errors); it goes on until its end.

        Args:
            error: The exception, or None if nobody will ever know the outcome.
        """
        if self._process is not _process:
            return
        try:
            self.error_type = (
                OUTCOME_UNKNOWN if error is None else _client.error_type(error)
            )
            span = self.span
            if span is not None and span.is_recording():
                said = "the outcome is unknown" if error is None else text_of(error)
                span.set_attribute(ERROR_TYPE, self.error_type)
                span.set_status(Status(StatusCode.ERROR, said))
            if error is not None:
                facts = self.facts
                facts.exceptions.record(span, facts.event_type, error)
        except Exception:
            report("record an error")

    def claim(self) -> bool:
        """Whether nobody has ended it; the caller has to."""
        # To delete it is one step, which two threads cannot both take.
        try:
            del self._unclaimed
        except AttributeError:
            return False
        self.ended = True
        # After a fork the child has copies of what the parent has started, and
        # the parent ends them.
        return self._process is _process

    def end(
        self,
        attributes: Mapping[str, Any] | None = None,
        *,
        ended: int | None = None,
        measured: bool = True,
        partition: int | None = None,
        messages: int = 0,
    ) -> None:
        """End the span, measure the duration and count the messages, once.

        Args:
            attributes: What the span has learned since its creation.
            ended: The end, in nanoseconds since the epoch; now if None.
            measured: False if the duration belongs to an operation around it.
            partition: The partition, if it was not known in advance.
            messages: How many messages to count.
        """
        if self.claim():
            self._conclude(attributes, ended, partition, messages, measured=measured)

    def _conclude(
        self,
        attributes: Mapping[str, Any] | None = None,
        ended: int | None = None,
        partition: int | None = None,
        messages: int = 0,
        *,
        measured: bool = True,
    ) -> None:
        """End it, as `end` does; the caller has the claim to."""
        if ended is None:
            ended = time.time_ns()
        ended = max(ended, self.started)  # the clock may have been set back
        span = self.span
        if span is not None:
            try:
                try:
                    if attributes and span.is_recording():
                        span.set_attributes(attributes)
                finally:
                    span.end(ended)
            except Exception:
                report("end a span")
        if measured and self.facts.duration is not None:
            self._measure(self.facts.duration, ended, partition, messages)

    def _measure(
        self, duration: Histogram, ended: int, partition: int | None, messages: int
    ) -> None:
        facts, span = self.facts, self.span
        try:
            attributes, tally = facts.metrics(partition)
            if self.error_type is not None:
                error = {ERROR_TYPE: self.error_type}
                attributes = {**attributes, **error}
                if facts.messages is not None and tally is not None:
                    tally = facts.messages.tally({**tally.attributes, **error})
            if messages and tally is not None:
                tally.count(messages)
            context = None if span is None else Context({SPAN_KEY: span})
            seconds = (ended - self.started) / 1e9
            duration.record(seconds, attributes, context)
        except Exception:
            report("record a metric")

    def abandon(self, ended: int) -> None:
        """End an operation that nothing will end any more.

        Args:
            ended: When that was found out, in nanoseconds since the epoch.
        """
        self.end(ended=ended)


class Answered(Operation):
    """An operation that the broker's answer ends; it is the callback of a future.

    Args:
        facts: What was known of it in advance.
        span: Its span, or None if it is only measured.
        started: When it started, in nanoseconds since the epoch.
    """

    __slots__ = ()

    def raised(self, error: BaseException) -> None:
        """End it with what the call raised: nothing was handed to the client."""
        self.fail(error)
        self.end()

    def __call__(self, outcome: Any) -> None:
        """Receive the result or the exception of the future, on any thread."""
        ended = time.time_ns()
        try:
            if isinstance(outcome, BaseException):
                self._failed(outcome, ended)
            else:
                self._succeeded(outcome, ended)
        except Exception:
            report("end an operation with its answer")
        except BaseException:
            report("end an operation with its answer")
            # It would end kafka-python's sender thread. On the main thread it is
            # the user's, who wants to end the application.
            if threading.get_ident() == threading.main_thread().ident:
                raise

    def _succeeded(self, result: Any, ended: int) -> None:
        raise NotImplementedError

    def _failed(self, error: BaseException, ended: int) -> None:
        raise NotImplementedError

    def _finish(
        self,
        attributes: Attributes,
        ended: int | None,
        partition: int | None = None,
        messages: int = 0,
    ) -> None:
        """End it and let the span go; the caller has the claim to."""
        self._conclude(attributes, ended, partition, messages)
        # Up to 2.1 a future keeps its callbacks, and the application may keep it.
        self.span = None

    def abandon(self, ended: int) -> None:
        """End it without knowing what the broker would have answered."""
        if self.claim():
            self.fail(None)
            self._finish({}, ended)

    def __del__(self) -> None:
        if not self.ended:
            leave_behind(self)


def count_records(
    facts: Facts, records: Sequence[Any], span: Span | None = None
) -> None:
    """Count records of a topic and partition that are handed to the application.

    Args:
        facts: What is known of polls of the topic and partition.
        records: The records.
        span: The span that accounts for them, if there is one.
    """
    _, tally = facts.metrics(None)
    if tally is None:
        return
    tally.count(len(records))
    if facts.queue_time is None:
        return
    try:
        context = None if span is None else Context({SPAN_KEY: span})
        now = time.time_ns()
        attributes = {
            name: facts.counted[name]
            for name in _QUEUE_TIME_ATTRIBUTES
            if name in facts.counted
        }
        for record in records:
            seconds = queue_seconds(record.timestamp, now)
            if seconds is not None:
                facts.queue_time.record(seconds, attributes, context)
    except Exception:
        report("record a metric")


# What a finaliser found without an end, and when. It must not end it itself: a
# collection can strike while this thread is inside the SDK, whose locks are not
# reentrant.
_abandoned: deque[tuple[Operation, int]] = deque()

# The thread on which the garbage collector runs now.
_collecting: int | None = None


def is_collecting() -> bool:
    """Whether the garbage collector runs on this thread, and what it drops, is here."""
    return _collecting == threading.get_ident()


def _on_collection(phase: str, _info: Mapping[str, int]) -> None:
    global _collecting  # noqa: PLW0603 (there is one collector)
    _collecting = threading.get_ident() if phase == "start" else None


gc.callbacks.append(_on_collection)


# One object for each process, so that a forked child knows what is not its own.
_process = object()


def leave_behind(operation: Operation) -> None:
    """Have an operation that was dropped ended later; safe in a finaliser."""
    if not operation.ended and operation._process is _process:
        _abandoned.append((operation, time.time_ns()))


def _end_abandoned() -> None:
    while _abandoned:
        try:
            operation, ended = _abandoned.popleft()
        except IndexError:  # another thread was faster
            return
        operation.abandon(ended)


def end_all() -> None:
    """End all operations, because the interpreter exits."""
    _end_abandoned()
    gc.unfreeze()  # what is frozen is not listed
    # Asking the garbage collector for them costs nothing until now, which a
    # register of all messages in flight would.
    ended = time.time_ns()
    for thing in gc.get_objects():
        if issubclass(type(thing), Operation):
            thing.abandon(ended)


def _after_fork_in_child() -> None:
    global _process  # noqa: PLW0603 (it is the process's)
    _process = object()
    _abandoned.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
