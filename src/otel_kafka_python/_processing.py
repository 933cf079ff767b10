"""Process spans: their parent, their scope and their end.

The scope of a process span is the body of the loop over a record, or of a
`with process_span(…)`. While it lasts the span is current, and nowhere else.
"""

from __future__ import annotations

import gc
import operator
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from types import CodeType, FrameType, TracebackType
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Span,
    SpanContext,
    SpanKind,
    get_current_span,
    set_span_in_context,
)

from otel_kafka_python import _config
from otel_kafka_python._client import Client
from otel_kafka_python._loops import Asker, asker_at, is_loop
from otel_kafka_python._messages import (
    Record,
    account_for,
    creation_context_of,
    shared_partition,
    shared_topic,
)
from otel_kafka_python._operation import (
    PROCESS,
    Facts,
    Operation,
    Telemetry,
    end_abandoned,
    leave_behind,
)
from otel_kafka_python._safety import call_hook, report

# The innermost scope of this context. It is set beside every `attach` and reset
# first, because it refuses the token of another context in silence, where
# OpenTelemetry would log an error.
_innermost: ContextVar[Scope | None] = ContextVar("otel_kafka_python_scope")

# Under this key the context of a scope has the scope, so that a send knows which
# messages are being processed, whatever other spans are current in between.
_SCOPE_KEY = otel_context.create_key("otel-kafka-python-scope")


class Scope(Operation):
    """The processing of one record or of a batch, from its entry to its exit.

    Args:
        facts: What was known of it in advance.
        span: Its span, or None if it is only measured.
        started: When it started, in nanoseconds since the epoch.
        records: The records that it accounts for.
    """

    __slots__ = (
        "_attached",
        "_base",
        "_entered",
        "_ids",
        "_marker",
        "_outer",
        "_thread",
        "_token",
        "records",
    )

    def __init__(
        self,
        facts: Facts,
        span: Span | None,
        started: int,
        records: Sequence[Record],
    ) -> None:
        super().__init__(facts, span, started)
        self.records = records
        self._entered = False
        self._ids: frozenset[int] | None = None

    def enter(self, base: Context, outer: Scope | None, attached: Context) -> None:
        """Make `attached` current, until `leave`."""
        self._base = base
        self._outer = outer
        self._attached = attached
        self._thread = threading.get_ident()
        self._marker: Token[Scope | None] = _innermost.set(self)
        self._token = otel_context.attach(attached)
        self._entered = True

    def leave(self) -> None:
        """Restore the context that was current before `enter`, if that is to be done.

        It is not on another thread or in another context, nor where an outer scope
        that ended first has done it.
        """
        if not self._entered:
            return
        self._entered = False
        scope = _innermost.get(None)
        while scope is not None and scope is not self:
            scope = scope._outer
        if scope is None:
            return
        try:
            _innermost.reset(self._marker)
        except ValueError:  # a copy of the context that it was entered in
            return
        otel_context.detach(self._token)

    def close(self) -> None:
        """Leave the scope and end its operation."""
        self.leave()
        self.end()

    def drop(self, *, collected: bool) -> None:
        """Close a scope whose iterator is being finalised.

        Args:
            collected: Whether the garbage collector found it, perhaps in the
                midst of anything.
        """
        self.leave()
        if collected:
            leave_behind(self)
        else:
            self.end()

    def can_be_adopted(self) -> bool:
        """Whether the code that runs now is in this scope, on its own thread."""
        return (
            self._entered and not self.ended and self._thread == threading.get_ident()
        )

    def holds(self, record: Record) -> bool:
        """Whether it accounts for this very record."""
        if len(self.records) == 1:
            return self.records[0] is record
        if self._ids is None:
            self._ids = frozenset(map(id, self.records))
        return id(record) in self._ids

    def carries(self, created: SpanContext) -> bool:
        """Whether a creation context is that of a record it accounts for."""
        return any(
            same_span(creation_context_of(record), created) for record in self.records
        )


def same_span(one: SpanContext | None, other: SpanContext | None) -> bool:
    """Whether two span contexts name the same span, and one at all."""
    return (
        one is not None
        and other is not None
        and one.trace_id == other.trace_id
        and one.span_id == other.span_id
    )


def is_being_processed(created: SpanContext, context: Context) -> bool:
    """Whether a message with this creation context is being processed.

    Args:
        created: The creation context of a message that is about to be sent.
        context: The context in which it is sent.
    """
    scope = context.get(_SCOPE_KEY)
    while isinstance(scope, Scope):
        if scope.carries(created):
            return True
        scope = scope._outer
    return False


def _current() -> tuple[Context, Scope | None]:
    """The current context and the innermost scope, without those that have ended.

    A copy of a context (a task's, a thread's) keeps a scope current after the
    loop has gone on; there, what was current before it counts.
    """
    context, scope = otel_context.get_current(), _innermost.get(None)
    while scope is not None and not scope._entered:
        if context is scope._attached:
            context = scope._base
        scope = scope._outer
    return context, scope


def _scope_of(record: Record, scope: Scope | None) -> Scope | None:
    """The scope that accounts for a record, among `scope` and those around it."""
    while scope is not None and not scope.holds(record):
        scope = scope._outer
    return scope


def open_scope(
    telemetry: Telemetry, client: Client, records: Sequence[Record], *, batch: bool
) -> Scope | None:
    """Enter the processing of records ("Process" spans).

    A single record's creation context is the parent of the span if no other span
    is current.

    Args:
        telemetry: What the instrumentation works with.
        client: The consumer, or an empty one if it is not known.
        records: The records, at least one, none of an excluded topic.
        batch: Whether they are processed together, even if it is only one.

    Returns:
        The scope, which is to be closed; or None if there is nothing to do.
    """
    end_abandoned()
    config = telemetry.config
    facts = telemetry.facts(
        client, PROCESS, shared_topic(records), shared_partition(records)
    )
    if facts is None:
        return None
    started = time.time_ns()
    if not config.process_spans:
        if facts.duration is None:
            return None
        return Scope(facts, None, started, records)
    base, outer = _current()
    account = account_for(config, records, batch=batch)
    context = parent = Context({**base, **account.context})
    ambient = get_current_span(base)
    if config.process_parent == "none":
        parent = set_span_in_context(INVALID_SPAN, context)
    elif ambient.get_span_context().is_valid:
        parent = set_span_in_context(ambient, context)
    span = telemetry.start_span(
        facts,
        SpanKind.CONSUMER,
        started,
        account.attributes,
        context=parent,
        links=account.links,
    )
    scope = Scope(facts, span, started, records)
    if span is not None:
        context = otel_context.set_value(_SCOPE_KEY, scope, context)
        scope.enter(base, outer, set_span_in_context(span, context))
        if config.consume_hook is not None and not batch:
            call_hook("consume_hook", config.consume_hook, span, records[0], (), {})
    return scope


class ScopedIterator:
    """An iterator over records that opens a scope for each that a loop asks for.

    It must not be part of a reference cycle: that it is dropped is how the end of
    the loop is noticed.
    """

    __slots__ = ("_asked_at", "_asked_in", "_asker", "_scope")

    def __init__(self) -> None:
        self._scope: Scope | None = None
        self._asked_in: CodeType | None = None
        self._asked_at = -1
        self._asker = Asker.OTHER

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        scope = self._scope
        if scope is not None:
            self._scope = None
            scope.close()
        record = self._advance()
        try:
            self._scope = self._hand_over(record, self._is_asked_by_loop())
        except Exception:
            report("trace the processing of a record")
        return record

    def _is_asked_by_loop(self) -> bool:
        # The frame that called `__next__`. A loop asks from one place again and
        # again, so the last answer nearly always holds.
        frame: FrameType = sys._getframe(2)
        if frame.f_code is not self._asked_in or frame.f_lasti != self._asked_at:
            self._asked_in, self._asked_at = frame.f_code, frame.f_lasti
            self._asker = asker_at(frame.f_code, frame.f_lasti)
        if self._asker is Asker.DELEGATION:
            return is_loop(frame.f_back)
        return self._asker is Asker.LOOP

    def _advance(self) -> Record:
        """Return the next record, or raise StopIteration."""
        raise NotImplementedError

    def _hand_over(self, record: Record, by_loop: bool) -> Scope | None:
        """Trace that a record is handed over; return the scope to close."""
        raise NotImplementedError

    def __del__(self) -> None:
        # During a collection the object counts as finalised already.
        if self._scope is not None:
            self._scope.drop(collected=gc.is_finalized(self))


class Records(list[Record]):
    """The records of a partition as `poll` returned them.

    A list in every respect, but a loop over it makes a process span for each
    record. Copies and pickles of it are plain lists.
    """

    __slots__ = ("_client", "_processed", "_telemetry")

    def __init__(
        self, telemetry: Telemetry, client: Client, records: Sequence[Record]
    ) -> None:
        super().__init__(records)
        self._telemetry = telemetry
        self._client = client
        # The offsets of those that a process span has accounted for.
        self._processed: set[int] = set()

    def __iter__(self) -> Iterator[Record]:
        return RecordsIterator(self)

    def __reduce_ex__(self, protocol: object) -> Any:
        return list, (self.copy(),)

    def take(self, record: Record) -> bool:
        """Whether no process span has accounted for a record; now one does."""
        if record.offset in self._processed:
            return False
        self._processed.add(record.offset)
        return True


class RecordsIterator(ScopedIterator):
    """The iterator of `Records`."""

    __slots__ = ("_plain", "_records")

    def __init__(self, records: Records) -> None:
        super().__init__()
        self._records = records
        self._plain = list.__iter__(records)

    def __length_hint__(self) -> int:
        return operator.length_hint(self._plain)

    def _advance(self) -> Record:
        return next(self._plain)

    def _hand_over(self, record: Record, by_loop: bool) -> Scope | None:
        records = self._records
        telemetry = records._telemetry
        if not by_loop or not telemetry.is_enabled() or not records.take(record):
            return None
        return process(telemetry, records._client, record)


def process(telemetry: Telemetry, client: Client, record: Record) -> Scope | None:
    """Enter the processing of one record, unless a scope accounts for it already."""
    if _scope_of(record, _innermost.get(None)) is not None:
        return None
    return open_scope(telemetry, client, [record], batch=False)


# The one that `instrument()` has set up, or the global providers' where nothing
# was instrumented.
_telemetry: Telemetry | None = None


def use(telemetry: Telemetry | None) -> None:
    """Have `process_span` work with what `instrument()` has set up."""
    global _telemetry  # noqa: PLW0603 (there is one instrumentation)
    _telemetry = telemetry


def process_span(
    records: Record | Sequence[Record] | Mapping[Any, Sequence[Record]],
    consumer: Any = None,
) -> ProcessSpan:
    """Trace the processing of a record, or of several as one batch.

    Inside a loop over the record it adopts the loop's span, so that an exception
    is recorded there; anywhere else (a worker thread, a record taken from what
    `poll` returned, a batch, a process that is not instrumented) it makes a span
    of its own.

    Args:
        records: A record, a sequence of records, or what `poll` returned.
        consumer: Where they are from. A record says neither its group nor its
            client nor its server: with the consumer the span has these, too.

    Returns:
        A context manager that gives the span, current within it. An exception
        that leaves it is recorded and goes on.
    """
    return ProcessSpan(records, consumer)


class ProcessSpan:
    """What `process_span` returns."""

    def __init__(self, records: Any, consumer: Any) -> None:
        self._given = records
        self._consumer = consumer
        self._scope: Scope | None = None
        self._adopted = False

    def __enter__(self) -> Span:
        try:
            self._open()
        except Exception:
            report("trace the processing of a record")
        scope = self._scope
        return INVALID_SPAN if scope is None or scope.span is None else scope.span

    def _open(self) -> None:
        global _telemetry  # noqa: PLW0603 (there is one instrumentation)
        if _telemetry is None:
            _telemetry = Telemetry(_config.load({}))
        telemetry = _telemetry
        if not telemetry.is_enabled():
            return
        given = self._given
        batch = not hasattr(given, "offset")
        if not batch:
            adopted = _scope_of(given, _innermost.get(None))
            if adopted is not None and adopted.can_be_adopted():
                self._scope, self._adopted = adopted, True
                return
        client = (
            Client() if self._consumer is None else telemetry.client(self._consumer)
        )
        records = [
            record
            for record in _flatten(given)
            if telemetry.facts(client, PROCESS, record.topic, record.partition)
        ]
        if records:
            self._scope = open_scope(telemetry, client, records, batch=batch)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            return
        # GeneratorExit says that a generator is closed, not that it failed.
        if error is not None and not isinstance(error, GeneratorExit):
            scope.fail(error)
        if not self._adopted:
            scope.close()


def _flatten(given: Any) -> list[Record]:
    if hasattr(given, "offset"):
        return [given]
    lists = given.values() if isinstance(given, Mapping) else [given]
    records: list[Record] = []
    for each in lists:
        if isinstance(each, Records):
            for record in each.copy():
                each.take(record)
        records.extend(each)
    return records
