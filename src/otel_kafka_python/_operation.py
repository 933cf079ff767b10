"""An operation, and the one way it ends.

The span and the metrics of an operation share its start and its end, so both are given
explicitly, and `Operation.end` records them. A start is a time by both clocks, and an
end a time by the monotonic clock, in nanoseconds.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from opentelemetry.context import Context
from opentelemetry.metrics import Histogram
from opentelemetry.trace import INVALID_SPAN, Span, Status, StatusCode

from otel_kafka_python import _endings, _kafka
from otel_kafka_python._attributes import (
    Attributes,
    error_attributes,
    partition_attributes,
)
from otel_kafka_python._clock import Clock, Moment
from otel_kafka_python._endings import Endable
from otel_kafka_python._exception_events import ExceptionEvents
from otel_kafka_python._metrics import MessageCounter, Tally
from otel_kafka_python._pipeline import Destination
from otel_kafka_python._propagation import SPAN_KEY
from otel_kafka_python._safety import call_hook, report, text_of
from otel_kafka_python._semconv import OUTCOME_UNKNOWN
from otel_kafka_python._span_ends import end_span


class Kind(NamedTuple):
    """A kind of operation: `messaging.operation.name` and `.type` (Operation types)."""

    name: str
    type: str | None  # None if the conventions have no type for it
    group: str | None = None  # if it is not the client's


SEND = Kind("send", "send")
POLL = Kind("poll", "receive")
PROCESS = Kind("process", "process")
COMMIT = Kind("commit", "settle")


# Held while an operation is claimed, on interpreters without the GIL. It is reentrant,
# because an object that is dropped during a claim can claim another operation.
_claiming: threading.RLock | None = None
if not getattr(sys, "_is_gil_enabled", lambda: True)():
    _claiming = threading.RLock()


def _after_fork_in_child() -> None:
    global _claiming  # noqa: PLW0603 (another thread of the parent may hold it)
    if _claiming is not None:
        _claiming = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationTemplate:
    """The common part of all operations of a kind on one topic and partition.

    Args:
        topic: The topic, or None if they have several.
        name: The name of their spans.
        attributes: The attributes of a span at its creation.
        end_attributes: The attributes that a span gets at its end.
        duration_attributes: The attributes of the duration.
        count_attributes: The attributes of the counted messages.
        duration: The histogram of their duration; None if nobody collects it.
        messages: The counter of their messages; None if they count none.
        exceptions: Records the exceptions that they fail with.
        event_type: The operation type in the names of exception events.
        knows_cluster: Whether `attributes` has the cluster's id.
        injects: Whether the messages that are sent carry a context.
        observes_end: Whether the end matters if the span is not recorded.
        queue_time: The histogram of the time in the topic, if it is enabled.
        starts_pipeline: Whether sent messages carry the start of a pipeline.
        destination: Measures the latency of pipelines, if that is enabled.
    """

    topic: str | None
    name: str
    attributes: MappingProxyType[str, Any]
    end_attributes: Attributes
    duration_attributes: Attributes
    count_attributes: Attributes
    duration: Histogram | None
    messages: MessageCounter | None
    exceptions: ExceptionEvents
    event_type: str
    knows_cluster: bool
    injects: bool
    observes_end: bool
    queue_time: Histogram | None
    starts_pipeline: bool
    destination: Destination | None
    _by_partition: dict[int | None, tuple[Attributes, Tally | None]] = field(
        default_factory=dict
    )

    def metrics(self, partition: int | None) -> tuple[Attributes, Tally | None]:
        """The attributes of the duration, and the tally of the messages.

        Args:
            partition: The partition, if the template does not have it.
        """
        known = self._by_partition.get(partition)
        if known is None:
            added = partition_attributes(partition)
            tally = None
            if self.messages is not None:
                tally = self.messages.tally({**self.count_attributes, **added})
            known = {**self.duration_attributes, **added}, tally
            self._by_partition[partition] = known
        return known


class Operation(Endable):
    """An operation that has started, may fail, and ends once.

    Args:
        template: The template of the operation.
        span: Its span, or None if it is only measured.
        started: When it started.
    """

    __slots__ = ("_unclaimed", "error_type", "span", "started", "template")

    # The context that it is measured in if it has no span; the current one if None.
    _without_span: ClassVar[Context | None] = None
    # Whether it ends on the thread that calls back with the broker's answers.
    ends_on_io_thread: ClassVar[bool] = False

    def __init__(
        self, template: OperationTemplate, span: Span | None, started: Moment
    ) -> None:
        self.template = template
        self.span = span
        self.started = started
        self.error_type: str | None = None
        self.begun_in = _endings.this_process
        self._unclaimed = True
        # Set last: an operation that an interrupt leaves half made is never ended.
        self.has_ended = False

    def fail(self, error: BaseException | None) -> None:
        """Record why the operation fails (Recording errors); this does not end it.

        Args:
            error: The exception, or None if nobody will ever know the outcome.
        """
        if error is None:
            self.fail_as(OUTCOME_UNKNOWN, "the outcome is unknown")
            return
        try:
            self.fail_as(_kafka.error_type(error), text_of(error))
            # An interrupt, for example to end the application, is no failure that
            # anyone would investigate.
            if isinstance(error, Exception) and self.begun_in is _endings.this_process:
                template = self.template
                template.exceptions.record(self.span, template.event_type, error)
        except Exception:
            report("record an error")

    def fail_as(self, error_type: str, description: str) -> None:
        """Record that the operation fails, without an exception.

        Args:
            error_type: Its `error.type`.
            description: The description of its status.
        """
        if self.begun_in is not _endings.this_process:
            return
        self.error_type = error_type
        try:
            span = self.span
            if span is not None and span.is_recording():
                span.set_attributes(error_attributes(error_type))
                span.set_status(Status(StatusCode.ERROR, description))
        except Exception:
            report("record an error")

    def claim(self) -> bool:
        """Win the right to end it. If this returns true, the caller must end it."""
        # Under the GIL, the deletion is atomic: only one of two threads succeeds.
        lock = _claiming
        if lock is not None:
            lock.acquire()
        try:
            del self._unclaimed
        except AttributeError:
            return False
        finally:
            if lock is not None:
                lock.release()
        self.has_ended = True
        return self.begun_in is _endings.this_process

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
            attributes: The attributes that became known after the span's creation.
            ended: The end by the monotonic clock, in nanoseconds; now if None.
            measured: False if the duration belongs to an operation around it.
            partition: The partition, if it was not known in advance.
            messages: How many messages to count.
        """
        if self.claim():
            self.end_claimed(
                attributes,
                ended=ended,
                measured=measured,
                partition=partition,
                messages=messages,
            )

    def end_claimed(
        self,
        attributes: Mapping[str, Any] | None = None,
        *,
        ended: int | None = None,
        measured: bool = True,
        partition: int | None = None,
        messages: int = 0,
    ) -> None:
        """End it, as `end` does; the caller has claimed it."""
        if ended is None:
            ended = Clock.monotonic_ns()
        # The end is the start plus the elapsed time. A system clock that is set
        # meanwhile does not distort the duration.
        since_epoch, began = self.started
        elapsed = ended - began
        span = self.span
        if span is not None:
            try:
                try:
                    if attributes and span.is_recording():
                        span.set_attributes(attributes)
                finally:
                    if self.ends_on_io_thread:
                        end_span(span, since_epoch + elapsed)
                    else:
                        span.end(since_epoch + elapsed)
            except Exception:
                report("end a span")
        if measured:
            self._measure(elapsed, partition, messages)

    def _measure(self, elapsed: int, partition: int | None, messages: int) -> None:
        template, span = self.template, self.span
        if template.duration is None:
            return
        try:
            attributes, tally = template.metrics(partition)
            if self.error_type is not None:
                error = error_attributes(self.error_type)
                attributes = {**attributes, **error}
                if template.messages is not None and tally is not None:
                    tally = template.messages.tally({**tally.attributes, **error})
            if messages and tally is not None:
                tally.count(messages)
            context = self._without_span
            if span is not None:
                context = Context({SPAN_KEY: span})
            template.duration.record(elapsed / 1e9, attributes, context)
        except Exception:
            report("record a metric")

    def abandon(self, ended: int) -> None:
        """End it because nothing else will any more."""
        self.end(ended=ended)


class RecordHook:
    """The application's consume_hook, which is called once for each record.

    A record may have several process spans, or one that begins after the hook was
    called with its receive span. So the last records are remembered: each by its
    position and by its list of headers, which no other record has. A record itself
    cannot be referenced weakly, and its value may be large.

    Args:
        hook: The hook.
    """

    REMEMBERED: ClassVar[int] = 10_000

    def __init__(self, hook: Callable[..., object]) -> None:
        self._hook = hook
        # The headers are kept so that their identities stay theirs.
        self._called: dict[object, list[object]] = {}
        self._order: deque[object] = deque()

    def __call__(self, span: Span | None, record: Any) -> None:
        """Call the hook with the span of a record, unless it was called before."""
        call_hook("consume_hook", self._call_once, span, record)

    def _call_once(self, span: Span | None, record: Any) -> None:
        headers = record.headers
        known = id(headers), record.topic, record.partition, record.offset
        mark = [headers]
        # This is atomic: only one of two threads succeeds.
        if self._called.setdefault(known, mark) is not mark:
            return
        self._order.append(known)
        if len(self._order) > self.REMEMBERED:
            self._called.pop(self._order.popleft(), None)
        self._hook(span, record, (), {})


class Receipt(Operation):
    """The receipt of a single record, open until its processing begins or is ruled out.

    The consume_hook is called with the process span if there is one. Otherwise it is
    called with the span of the receipt, which must still be open.

    Args:
        template: The template of the operation.
        span: Its span.
        started: When the application asked for the record.
        received: When it was handed over, by the monotonic clock, in nanoseconds.
        measured: Whether this is an operation of its own.
        record: The record.
        hook: The consume_hook.
    """

    __slots__ = ("_hook", "_measured", "_received", "record")

    def __init__(
        self,
        template: OperationTemplate,
        span: Span,
        started: Moment,
        received: int,
        *,
        measured: bool,
        record: Any,
        hook: RecordHook,
    ) -> None:
        self._received = received
        self._measured = measured
        self.record = record
        self._hook = hook
        super().__init__(template, span, started)

    def close(self, *, hooked: bool = True) -> None:
        """Call the hook, and end it.

        Args:
            hooked: Whether the hook is called with its span.
        """
        if self.claim():
            record, self.record = self.record, None
            try:
                if hooked:
                    self._hook(self.span, record)
            finally:  # also after an interrupt
                self.end_claimed(ended=self._received, measured=self._measured)

    def abandon(self, ended: int) -> None:  # noqa: ARG002 (it has been received before)
        """End it because its consumer was dropped, or at the exit."""
        self.close()

    def __del__(self) -> None:
        _defer_unended(self)


class Failure(NamedTuple):
    """The facts that the end of a failed operation records besides the error."""

    attributes: Attributes | None = None
    partition: int | None = None  # if it was not known in advance
    messages: int = 0  # how many to count


class PendingOperation(Operation):
    """An operation that the broker's answer ends, as the callback of a future.

    Args:
        template: The template of the operation.
        span: Its span, or None if it is only measured.
        started: When it started.
    """

    __slots__ = ()

    # The thread of the answer may have inherited the span in which the client was made,
    # which must not become an exemplar. The SDK treats an empty context as no context.
    _without_span = Context({SPAN_KEY: INVALID_SPAN})
    ends_on_io_thread = True

    def end_with(self, error: BaseException) -> None:
        """End it with the exception of the call: the client has taken nothing."""
        self._end_failed(error, Clock.monotonic_ns(), was_taken=False)

    def __call__(self, outcome: Any) -> None:
        """Receive the result or the exception of the future, on any thread."""
        ended = Clock.monotonic_ns()
        try:
            if isinstance(outcome, BaseException):
                self._end_failed(outcome, ended)
            else:
                self._end_succeeded(outcome, ended)
        except Exception:
            report("end an operation with its answer")
        except BaseException:
            report("end an operation with its answer")
            # It would end kafka-python's sender thread. On the main thread, it is an
            # interrupt of the user, who wants to end the application.
            if threading.get_ident() == threading.main_thread().ident:
                raise
        finally:
            if not self.has_ended:  # the answer could not be read, and no other follows
                self.abandon(ended)

    def _end_succeeded(self, result: Any, ended: int) -> None:
        raise NotImplementedError

    def _end_failed(
        self, error: BaseException | None, ended: int, *, was_taken: bool = True
    ) -> None:
        """End it as failed, even if an interrupt strikes meanwhile.

        Args:
            error: The exception, or None if nobody will ever know the outcome.
            ended: The end by the monotonic clock, in nanoseconds.
            was_taken: Whether the client accepted it before the error.
        """
        if not self.claim():
            return
        failure = Failure(self.template.end_attributes)
        try:
            try:
                self.fail(error)
            finally:
                failure = self._failure(error, was_taken=was_taken)
        finally:
            attributes, partition, messages = failure
            self.end_claimed(
                attributes, ended=ended, partition=partition, messages=messages
            )

    def _failure(
        self,
        error: BaseException | None,  # noqa: ARG002 (it matters to subclasses)
        *,
        was_taken: bool,  # noqa: ARG002
    ) -> Failure:
        """The facts about its failure; the arguments are those of `_end_failed`."""
        return Failure()

    def abandon(self, ended: int) -> None:
        """End it without knowing the broker's answer."""
        self._end_failed(None, ended)

    def __del__(self) -> None:
        _defer_unended(self)


def _defer_unended(operation: Operation) -> None:
    try:
        has_ended = operation.has_ended
    except AttributeError:  # an interrupt left it half made
        return
    if not has_ended:
        _endings.defer(operation)


def is_recorded(span: Span | None) -> bool:
    """Whether a span is recorded, or may be."""
    try:
        return span is not None and span.is_recording()
    except Exception:
        report("ask whether a span is recorded")
        return True
