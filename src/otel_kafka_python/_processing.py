"""Process spans: their parent, their scope and their end.

The scope of a process span is the body of the loop over a record, or of a
`with process_span(…)`. While it lasts the span is current, and nowhere else.
"""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from types import CodeType, FrameType, TracebackType
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanContext,
    SpanKind,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)

from otel_kafka_python import _config
from otel_kafka_python._client import Client
from otel_kafka_python._config import Config
from otel_kafka_python._loops import Asker, asker_at, is_loop
from otel_kafka_python._messages import (
    Described,
    Record,
    account_for,
    describe,
    shared,
)
from otel_kafka_python._operation import (
    PROCESS,
    Operation,
    Telemetry,
    is_collecting,
    leave_behind,
)
from otel_kafka_python._propagation import SPAN_KEY, creation_context, extract
from otel_kafka_python._safety import call_hook, report

# The innermost scope of this context. It is set beside every `attach` and reset
# first, because it refuses the token of another context in silence, where
# OpenTelemetry would log an error.
_innermost: ContextVar[Scope | None] = ContextVar("otel_kafka_python_scope")

# Under this key the context of a scope has the messages that it accounts for, so
# that a send knows which are being processed, whatever other spans are current in
# between.
_PROCESSED_KEY = otel_context.create_key("otel-kafka-python-processed")


class Processed:
    """The messages that a scope accounts for, as its context knows them.

    A copy of the context (a task's, a timer's) may outlive the scope by far, so
    the records themselves are let go with its end.

    Args:
        records: The records.
        links: The links to the creation contexts of some of them.
        context: The context that it is entered in, which knows what the scope around
            it accounts for.
    """

    __slots__ = ("_created", "_links", "base", "left_in", "outer", "records")

    def __init__(
        self, records: Sequence[Record], links: Sequence[Link], context: Context
    ) -> None:
        self.records = records
        self.outer: Any = context.get(_PROCESSED_KEY) if context else None
        self._links = links
        # Set when the scope is left while it is covered and nothing bounds it: whoever
        # covered it restores this context, for which that around it stands.
        self.left_in: Context | None = None
        self.base: Context | None = None
        self._created: frozenset[tuple[int, int]] | None = None

    def carries(self, created: SpanContext) -> bool:
        """Whether a creation context is that of a record among these."""
        if self._created is None:
            contexts = [link.context for link in self._links]
            # Not every one of a large batch is linked to.
            if len(contexts) < len(self.records):
                found = (creation_context(record.headers) for record in self.records)
                contexts = [each for each in found if each]
            self._created = frozenset((one.trace_id, one.span_id) for one in contexts)
        return (created.trace_id, created.span_id) in self._created


class Scope(Operation):
    """The processing of one record or of a batch; it is entered at once.

    Args:
        facts: What was known of it in advance.
        span: Its span, or None if it is only measured.
        started: When it started, in nanoseconds since the epoch.
    """

    __slots__ = (
        "_attached",
        "_base",
        "_below",
        "_entered",
        "_failed_with",
        "_ids",
        "_marker",
        "_token",
        "is_bounded",
        "processed",
    )

    def enter(self, processed: Processed, base: Context, context: Context) -> None:
        """Begin, until `leave`.

        Args:
            processed: The records that it accounts for.
            base: What is current around it.
            context: What is current in it, besides its span and what it accounts for.
                Without a span nothing is made current.
        """
        # Here and not in an `__init__`, which would be a call more: saves 0.1 µs.
        self._entered = self.is_bounded = True
        self.processed = processed
        self._ids: frozenset[int] | None = None
        self._failed_with: int | None = None
        self._base: Context | None = None
        self._attached: Context | None = None
        self._token: Token[Context] | None = None
        below = _innermost.get(None)
        while below is not None and below._marker is None:
            below = below._below
        self._below: Scope | None = below
        self._marker: Token[Scope | None] | None = _innermost.set(self)
        if self.span is None:
            return
        try:
            attached = Context(
                {**context, SPAN_KEY: self.span, _PROCESSED_KEY: processed}
            )
            self._token = otel_context.attach(attached)
            self._base, self._attached = base, attached
        except Exception:
            report("make a process span current")

    def leave(self) -> None:
        """Restore the context that was current before `enter`, if that is to be done.

        It is not on another thread or in another context, nor while it is covered
        by what the application has made current in it.
        """
        if not self._entered:
            return
        self._entered = False
        scope, later = _innermost.get(None), []
        while scope is not self:
            if scope is None:
                return
            later.append(scope)
            scope = scope._below
        # Scopes that were entered later (the other consumers' of a `zip`) give way.
        if not self.is_covered(later):
            self.undo()
        elif not self.is_bounded:
            self._unlink(later)
        if self._below is not None:
            undo_left()

    def _unlink(self, later: Sequence[Scope]) -> None:
        """Be no scope of this context any more; what covers it may last for ever."""
        self.processed.left_in, self.processed.base = self._attached, self._base
        if later:
            later[-1]._below = self._below
        else:
            _innermost.set(self._below)
        self._marker = self._token = None

    def is_entered_here(self) -> bool:
        """Whether the code that runs now is in this scope, in its own context."""
        if not self._entered or self.ended or self._marker is None:
            return False
        innermost = _innermost.get(None)
        try:
            _innermost.reset(self._marker)
        except ValueError:
            return False
        # What `reset` has used up is to be had again.
        self._marker = _innermost.set(innermost)
        return True

    def is_covered(self, later: Sequence[Scope] = ()) -> bool:
        """Whether what the application has made current in it is to stay.

        That is a span that lasts. In a scope that no block bounds it is anything:
        the application may have entered a block since, and must find it so.

        Args:
            later: Scopes that were entered in it, which do not count.
        """
        try:
            current = otel_context.get_current()
            if self._attached is None or current is self._attached:
                return False
            if not self.is_bounded:
                return all(current is not each._attached for each in later)
            span = get_current_span(current)
            return (
                span is not self.span
                and all(span is not each.span for each in later)
                and span.is_recording()
            )
        except Exception:
            report("see what is current in a process span")
            return False

    def undo(self) -> bool:
        """Undo what `enter` did; not in a copy of the context that it was done in."""
        if self._marker is None:
            return False
        try:
            _innermost.reset(self._marker)
        except ValueError:
            return False
        self._marker = None
        if self._token is not None:
            try:
                otel_context.detach(self._token)
            except Exception:
                report("restore the context after a process span")
        return True

    def close(self) -> None:
        """Leave the scope and end its operation."""
        try:
            self.leave()
        finally:  # of an interrupt, too
            if self.claim():  # as `end` does, with a call less: saves 0.1 µs
                self._conclude()
            self.processed.records = ()

    def drop(self, *, collected: bool) -> None:
        """Close a scope whose iterator is being finalised.

        Args:
            collected: Whether the garbage collector found it, perhaps in the
                midst of anything.
        """
        if not collected:
            self.close()
            return
        self._entered = False
        self.processed.records = ()
        leave_behind(self)
        try:
            if otel_context.get_current() is self._attached:
                undo_left()
        except Exception:
            report("restore the context after a process span")

    def holds(self, record: Record) -> bool:
        """Whether it accounts for this very record."""
        records = self.processed.records
        if len(records) == 1:
            return records[0] is record
        if self._ids is None:
            self._ids = frozenset(map(id, records))
        return bool(records) and id(record) in self._ids

    def fail_with(self, error: BaseException) -> None:
        """Fail with an exception that may pass by here more than once."""
        if self._failed_with != id(error):
            self._failed_with = id(error)
            self.fail(error)


def undo_left() -> Scope | None:
    """Undo those of the innermost scopes that were left while they were covered.

    Returns:
        The innermost scope that remains.
    """
    scope = _innermost.get(None)
    while scope is not None and not scope._entered:
        if scope.is_covered() or not scope.undo():
            break
        scope = _innermost.get(None)
    return scope


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
    processed: Any = context.get(_PROCESSED_KEY)
    while processed is not None:
        if processed.carries(created):
            return True
        processed = processed.outer
    return False


def _base(context: Context) -> Context:
    """The current context, or what was current before the scopes that have ended.

    A copy of a context (a task's, a thread's) keeps a scope current after the
    loop has gone on.

    Args:
        context: The current context.
    """
    scope = _innermost.get(None)
    if scope is not None:
        scope = undo_left()
        context = otel_context.get_current()
    while scope is not None and not scope._entered:
        if context is scope._attached and scope._base is not None:
            context = scope._base
        scope = scope._below
    return _live(context) if context else context


def _live(context: Context) -> Context:
    """The context, or what stands for it if it is that of a scope that was left."""
    while True:
        processed: Any = context.get(_PROCESSED_KEY)
        if processed is None or processed.left_in is not context:
            return context
        context = processed.base


def _scope_of(record: Record) -> Scope | None:
    """The scope that accounts for a record, among those around what runs now."""
    scope = _innermost.get(None)
    while scope is not None and not scope.holds(record):
        scope = scope._below
    return scope


def open_scope(
    telemetry: Telemetry,
    client: Client,
    records: Sequence[Record],
    current: Context,
    *,
    batch: bool,
) -> Scope | None:
    """Enter the processing of records ("Process" spans).

    A single record's creation context is the parent of the span if no other span
    is current.

    Args:
        telemetry: What the instrumentation works with.
        client: The consumer, or an empty one if it is not known.
        records: The records, at least one, none of an excluded topic.
        current: The current context.
        batch: Whether they are processed together, even if it is only one.

    Returns:
        The scope, which is to be closed; or None if there is nothing to do.
    """
    config, record = telemetry.config, records[0]
    topic, partition = record.topic, record.partition
    if len(records) > 1:
        topic, partition = shared({(each.topic, each.partition) for each in records})
    facts = telemetry.facts(client, PROCESS, topic, partition)
    if facts is None:
        return None
    started = time.time_ns()
    # Mostly nothing is around it, and the message's own context is the parent: not to
    # call what looks for more saves 0.1 µs each.
    is_around = current or _innermost.get(None) is not None
    base = _base(current) if is_around else current
    if not config.process_spans:
        if facts.duration is None:
            return None
        scope = Scope(facts, None, started)
        scope.enter(Processed(records, (), base), base, base)
        return scope
    attributes: Mapping[str, Any]
    links: Sequence[Link]
    if batch:
        context, attributes = base, facts.attributes.copy()
        links = tuple(account_for(config, records, topic, partition, attributes))
    else:
        carried, created = extract(record.headers)
        # Where the trace is sampled, so is the span, mostly: not to defer it saves
        # 0.5 µs there, to defer it 0.7 elsewhere.
        is_sampled = created is not None and created.trace_flags & TraceFlags.SAMPLED
        if is_sampled:
            attributes = facts.attributes.copy()
            describe(config, record, attributes, started)
        else:
            attributes = Described(config, record, facts.attributes, started)
        context = Context({**base, **carried}) if base and carried else base or carried
        links = () if created is None else (Link(created),)
    is_parent_sought = base or config.process_parent == "none"
    parent = _parent(config, base, context) if is_parent_sought else context
    span = telemetry.start_span(
        facts, SpanKind.CONSUMER, started, attributes, parent, links
    )
    if (
        span is INVALID_SPAN
        and not (context or config.consume_hook)
        and not facts.is_told_anyway
    ):
        # Without an SDK there is nothing to make current then: saves half.
        return None
    scope = Scope(facts, span, started)
    try:
        scope.enter(Processed(records, links, context), base, context)
        if span is not None and config.consume_hook is not None and not batch:
            call_hook("consume_hook", config.consume_hook, span, record, (), {})
    except BaseException:  # the user's, who wants to end it all
        scope.close()
        raise
    return scope


def _parent(config: Config, base: Context, context: Context) -> Context:
    """`context`, with the span that is to be the parent of a process span in it."""
    if config.process_parent == "none":
        return set_span_in_context(INVALID_SPAN, context)
    ambient = get_current_span(base)
    if ambient.get_span_context().is_valid:
        return set_span_in_context(ambient, context)
    return context


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
        try:
            record = self._advance()
            try:
                self._hand_over(record, self._is_asked_by_loop())
            except Exception:
                report("trace the processing of a record")
            return record
        finally:
            # An exception that is kept keeps the frames it was raised under, and
            # kafka-python 3.0 keeps those of waits that time out: let none keep this.
            del self

    def _is_asked_by_loop(self) -> bool:
        # The frame that called `__next__`. A loop asks from one place again and
        # again, so the last answer nearly always holds.
        try:
            frame: FrameType = sys._getframe(2)
        except ValueError:  # nothing written in Python did
            return False
        if frame.f_code is not self._asked_in or frame.f_lasti != self._asked_at:
            self._asked_in, self._asked_at = frame.f_code, frame.f_lasti
            self._asker = asker_at(frame.f_code, frame.f_lasti)
        if self._asker is Asker.LOOP:
            return True
        return self._asker is Asker.GENERATOR and is_loop(frame.f_back)

    def _advance(self) -> Record:
        """Return the next record, or raise StopIteration."""
        raise NotImplementedError

    def _hand_over(self, record: Record, by_loop: bool) -> None:
        """Trace that a record is handed over, and keep the scope that is to close."""
        raise NotImplementedError

    def __del__(self) -> None:
        scope = getattr(self, "_scope", None)  # a copy may lack it
        if scope is not None:
            scope.drop(collected=is_collecting())


class Records(list[Record]):
    """The records of a partition as `poll` returned them.

    A list in every respect, but a loop over it makes a process span for each
    record. Copies and pickles of it are plain lists, and what others build by
    calling its class behaves as one.

    Args:
        records: The records.
        telemetry: What the instrumentation works with.
        client: The consumer.
    """

    __slots__ = ("_processed", "client", "telemetry")

    def __init__(
        self,
        records: Iterable[Record] = (),
        telemetry: Telemetry | None = None,
        client: Client | None = None,
    ) -> None:
        super().__init__(records)
        self.telemetry = telemetry
        self.client = client
        # Those that a process span has accounted for.
        self._processed: set[tuple[str, int, int]] = set()

    def __iter__(self) -> Iterator[Record]:
        if self.telemetry is None or self.client is None:
            return super().__iter__()
        return RecordsIterator(self, self.telemetry, self.client)

    def __reduce_ex__(self, protocol: object) -> Any:
        return list, (self.copy(),)

    def take(self, record: Record) -> bool:
        """Whether no process span has accounted for a record; now one does."""
        # A list can be extended by what is from another partition.
        position = (record.topic, record.partition, record.offset)
        if position in self._processed:
            return False
        self._processed.add(position)
        return True


class RecordsIterator(ScopedIterator):
    """The iterator of `Records`."""

    __slots__ = ("_client", "_plain", "_records", "_telemetry")

    def __init__(self, records: Records, telemetry: Telemetry, client: Client) -> None:
        super().__init__()
        self._telemetry = telemetry
        self._client = client
        self._records = records
        self._plain = list.__iter__(records)

    def __reduce__(self) -> Any:
        # As that of a plain list, where it stands.
        reduced: Any = self._plain.__reduce__()
        if len(reduced) < 3:  # noqa: PLR2004 (without a position: it is at its end)
            return reduced
        return (reduced[0], (self._records.copy(),), *reduced[2:])

    def __length_hint__(self) -> int:
        return operator.length_hint(self._plain)

    def _advance(self) -> Record:
        return next(self._plain)

    def _hand_over(self, record: Record, by_loop: bool) -> None:
        telemetry = self._telemetry
        if not by_loop:
            return
        current = otel_context.get_current()
        if telemetry.may_begin(current) and self._records.take(record):
            self._scope = process(telemetry, self._client, record, current)


def process(
    telemetry: Telemetry, client: Client, record: Record, current: Context
) -> Scope | None:
    """Enter the processing of one record, unless a scope accounts for it already."""
    # Mostly there is no scope at all: not to look for the record's saves 0.1 µs.
    if _innermost.get(None) is not None and _scope_of(record) is not None:
        return None
    return open_scope(telemetry, client, [record], current, batch=False)


class Held:
    """A scope that lasts until its consumer is asked for more, or is closed.

    Args:
        scope: The scope of the record that `next` has returned.
    """

    __slots__ = ("_scope",)

    def __init__(self, scope: Scope) -> None:
        self._scope: Scope | None = scope

    def close(self) -> None:
        """Close the scope, if nobody has."""
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.close()

    def __del__(self) -> None:
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.drop(collected=is_collecting())


def hold(telemetry: Telemetry, client: Client, record: Record) -> None:
    """Enter the processing of a record that `next` returns, as `next_process_spans`."""
    scope = process(telemetry, client, record, otel_context.get_current())
    if scope is not None:
        scope.is_bounded = False
        client.held = Held(scope)


def release(client: Client) -> None:
    """Leave what `hold` has entered."""
    held, client.held = client.held, None
    if held is not None:
        held.close()
    try:
        # What could not be undone then can perhaps be now.
        undo_left()
        current = otel_context.get_current()
        live = _live(current)
        if live is not current:
            otel_context.attach(live)
    except Exception:
        report("restore the context after a process span")


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
        # Of each entry that has not been left: its scope, and whether that is its own.
        self._entries: list[tuple[Scope | None, bool]] = []

    def __enter__(self) -> Span:
        entry: tuple[Scope | None, bool] = None, False
        try:
            entry = self._open()
        except Exception:
            report("trace the processing of a record")
        self._entries.append(entry)
        scope, _ = entry
        return INVALID_SPAN if scope is None or scope.span is None else scope.span

    def _open(self) -> tuple[Scope | None, bool]:
        global _telemetry  # noqa: PLW0603 (there is one instrumentation)
        if _telemetry is None:
            _telemetry = Telemetry(_config.load({}))
        telemetry = _telemetry
        current = otel_context.get_current()
        if not telemetry.may_begin(current):
            return None, False
        given = self._given
        batch = not hasattr(given, "offset")
        if not batch:
            adopted = _scope_of(given)
            if adopted is not None and adopted.is_entered_here():
                return adopted, False
        client = (
            Client()
            if self._consumer is None
            else telemetry.clients.get(self._consumer)
        )
        records = [
            record
            for record in _flatten(given)
            if telemetry.facts(client, PROCESS, record.topic, record.partition)
        ]
        if not records:
            return None, False
        return open_scope(telemetry, client, records, current, batch=batch), True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope, is_own = self._entries.pop()
        if scope is None:
            return
        try:
            # GeneratorExit says that a generator is closed, not that it failed.
            if error is not None and not isinstance(error, GeneratorExit):
                scope.fail_with(error)
        finally:  # of an interrupt, too
            if is_own:
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
