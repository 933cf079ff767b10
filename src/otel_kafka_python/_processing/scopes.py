"""Scopes: what is current while records are processed, and how that is undone.

The scope of a process span is the body of the loop over a record, or of a
`with process_span(…)`. While it lasts the span is current, and nowhere else. A
scope is left in the order in which loops end, which is not always the order in
which they began, and the application may have made something else current in it:

    scope                      the application made current in it   when it is left
    -------------------------  -----------------------------------  ---------------
    bounded by a block         nothing, or a span that has ended    detached
    bounded by a block         a span that lasts                    kept until that ends
    held by `next`             nothing                              detached
    held by `next`             anything                             unlinked
    of another context         anything                             untouched

An unlinked scope stays current where the application has built upon it, and the
context around it stands for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextvars import ContextVar, Token
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, get_current_span

from otel_kafka_python import _endings
from otel_kafka_python._messages import Record
from otel_kafka_python._operation import Operation
from otel_kafka_python._propagation import SPAN_KEY, creation_context
from otel_kafka_python._safety import report
from otel_kafka_python._semconv import ERROR_OTHER

# Whether a thread begins with a copy of the context that it is started in.
THREADS_INHERIT = bool(getattr(sys.flags, "thread_inherit_context", False))

# The innermost scope of this context. It is set beside every `attach` and reset
# first, because it refuses the token of another context in silence, where
# OpenTelemetry would log an error.
innermost: ContextVar[Scope | None] = ContextVar("otel_kafka_python_scope")


# Under this key the context of a scope has the messages that it accounts for, so
# that a send knows which are being processed, whatever other spans are current in
# between.
_MESSAGES_KEY = otel_context.create_key("otel-kafka-python-messages")


class ScopeMessages:
    """The messages that a scope accounts for, as its context knows them.

    A copy of the context (a task's, a timer's) may outlive the scope by far, so
    the records themselves are let go with its end.

    Args:
        records: The records.
        links: The links to the creation contexts of some of them.
        context: The context that it is entered in, which knows what the scope around
            it accounts for.
    """

    __slots__ = ("_created", "_links", "around", "left_in", "outer", "records")

    def __init__(
        self, records: Sequence[Record], links: Sequence[Link], context: Context
    ) -> None:
        self.records = records
        self.outer: Any = context.get(_MESSAGES_KEY) if context else None
        self._links = links
        # Set when the scope is left while it is covered and nothing bounds it: whoever
        # covered it restores this context, for which that around it stands.
        self.left_in: Context | None = None
        self.around: Context | None = None
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
        template: What was known of it in advance.
        span: Its span, or None if it is only measured.
        started: When it started.
    """

    __slots__ = (
        "_around",
        "_attached",
        "_below",
        "_entered",
        "_failed_with",
        "_ids",
        "_marker",
        "_thread",
        "_token",
        "is_bounded",
        "messages",
    )

    def enter(self, messages: ScopeMessages, around: Context, context: Context) -> None:
        """Begin, until `leave`.

        Args:
            messages: The records that it accounts for.
            around: The context that is current around it.
            context: What is current in it, besides its span and what it accounts for.
                Without a span nothing is made current.
        """
        self._entered = self.is_bounded = True
        self._thread = threading.get_ident() if THREADS_INHERIT else None
        self.messages = messages
        self._ids: frozenset[int] | None = None
        self._failed_with: int | None = None
        self._around: Context | None = None
        self._attached: Context | None = None
        self._token: Token[Context] | None = None
        below = innermost.get(None)
        while below is not None and below._marker is None:
            below = below._below
        self._below: Scope | None = below
        self._marker: Token[Scope | None] | None = innermost.set(self)
        if self.span is None:
            return
        try:
            attached = Context(
                {**context, SPAN_KEY: self.span, _MESSAGES_KEY: messages}
            )
            self._token = otel_context.attach(attached)
            self._around, self._attached = around, attached
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
        scope, later = innermost.get(None), []
        while scope is not self:
            if scope is None:
                return
            later.append(scope)
            scope = scope._below
        # Scopes that were entered later (the other consumers' of a `zip`) give way.
        if not self.is_covered(later):
            self.detach()
        elif not self.is_bounded:
            self._unlink(later)
        if self._below is not None:
            detach_left()

    def _unlink(self, later: Sequence[Scope]) -> None:
        """Be no scope of this context any more; what covers it may last for ever."""
        self.messages.left_in, self.messages.around = self._attached, self._around
        if later:
            later[-1]._below = self._below
        else:
            innermost.set(self._below)
        self._marker = self._token = None

    def renew_marker(self) -> bool:
        """Whether the code that runs now is in this scope, in its own context.

        Only the marker's own context lets it be reset, so that it is reset and set.
        """
        if not self._entered or self.ended or self._marker is None:
            return False
        within = innermost.get(None)
        try:
            innermost.reset(self._marker)
        except ValueError:
            return False
        # What `reset` has used up is to be had again.
        self._marker = innermost.set(within)
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

    def detach(self) -> bool:
        """Undo what `enter` did, if that was done in this very context.

        Returns:
            Whether it was.
        """
        if self._marker is None:
            return False
        try:
            innermost.reset(self._marker)
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
            self.end()
            self.messages.records = ()

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
        self.messages.records = ()
        _endings.defer(self)
        try:
            if otel_context.get_current() is self._attached:
                detach_left()
        except Exception:
            report("restore the context after a process span")

    def holds(self, record: Record) -> bool:
        """Whether it accounts for this very record."""
        records = self.messages.records
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

    def fail_with_loop(self, error: Exception | None) -> None:
        """Fail with the exception that ends its loop.

        Args:
            error: The exception, or None if it cannot be told: a `process_span` in
                the body may have seen it.
        """
        if error is not None:
            self.fail_with(error)
        elif self.error_type is None:
            self.fail_as(ERROR_OTHER, "an exception ended the loop")


def detach_left() -> Scope | None:
    """Detach those of the innermost scopes that were left while they were covered.

    Returns:
        The innermost scope that remains.
    """
    scope = innermost.get(None)
    while scope is not None and not scope._entered:
        if scope.is_covered() or not scope.detach():
            break
        scope = innermost.get(None)
    return scope


def is_being_processed(created: SpanContext, context: Context) -> bool:
    """Whether a message with this creation context is being processed.

    Args:
        created: The creation context of a message that is about to be sent.
        context: The context in which it is sent.
    """
    messages: Any = context.get(_MESSAGES_KEY)
    while messages is not None:
        if messages.carries(created):
            return True
        messages = messages.outer
    return False


def context_around_ended(context: Context) -> Context:
    """The current context, or the one around the scopes of it that have ended.

    A copy of a context (a task's, a thread's) keeps a scope current after the
    loop has gone on.

    Args:
        context: The current context.
    """
    scope = innermost.get(None)
    if scope is not None:
        scope = detach_left()
        context = otel_context.get_current()
    while scope is not None and not scope._entered:
        if context is scope._attached and scope._around is not None:
            context = scope._around
        scope = scope._below
    return context_for_left(context) if context else context


def context_of_thread(context: Context) -> Context:
    """The current context, or the one around the scopes that a thread has outlived.

    A thread that was started in a scope keeps it for whatever it does later, which
    nobody has asked for. A task, or a pool that carries contexts along, does so on
    purpose: its context stays.

    Args:
        context: The current context.
    """
    scope = innermost.get(None)
    if scope is None or scope._thread == threading.get_ident():
        return context
    return context_around_ended(context)


def context_for_left(context: Context) -> Context:
    """The context, or the one around it if it is that of a scope that was unlinked."""
    while True:
        messages: Any = context.get(_MESSAGES_KEY)
        if messages is None or messages.left_in is not context:
            return context
        context = messages.around


def scope_of(record: Record) -> Scope | None:
    """The scope that accounts for a record, among those around what runs now."""
    scope = innermost.get(None)
    while scope is not None and not scope.holds(record):
        scope = scope._below
    return scope
