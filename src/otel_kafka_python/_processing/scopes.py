"""Scopes: the context in which records are processed, and how it is restored.

The scope of a process span is the body of a loop over records, or of a
`with process_span(…)`. The span is current in its scope and nowhere else. Scopes are
left in the order in which loops end, which may differ from the order in which they
began. The application may also have made something else current in a scope:

    the application made current in it   when the scope is left
    -----------------------------------  ------------------------------------------
    nothing                              the context around it is restored
    values                               they are added to the context around it
    a span that has not ended            the current context stays as it is
    a span that has ended                it is removed, if a block bounds the scope

Code that made something current may restore the scope's context later. Therefore, that
context takes the values of the context around it when the scope is left. The contexts
of other tasks and threads are never touched: their copies of the scope stay unchanged.
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
from otel_kafka_python._propagation import SPAN_KEY
from otel_kafka_python._safety import report
from otel_kafka_python._semconv import ERROR_OTHER

# Whether a thread begins with a copy of the context in which it is started.
THREADS_INHERIT = bool(getattr(sys.flags, "thread_inherit_context", False))

# The innermost scope of this context. It is set next to every `attach` and reset first:
# it rejects the token of another context without a message, but OpenTelemetry would log
# an error.
innermost: ContextVar[Scope | None] = ContextVar("otel_kafka_python_scope")


# The scopes that `next` held in this context until another consumer was asked for more.
# Their records may still be processed.
_displaced: ContextVar[tuple[Scope, ...]] = ContextVar(
    "otel_kafka_python_displaced", default=()
)

# `reset` raises these for a token of another context, and for a used token.
_REFUSALS = (ValueError, RuntimeError)

# The key of a scope's messages in its context. With it, a send knows which messages are
# being processed, even if other spans are current in between.
_MESSAGES_KEY = otel_context.create_key("otel-kafka-python-messages")


class _LeftContext(Context):
    """The context of a scope that was left while something else was current.

    It has the values of the context around the scope. In copies that were made in the
    scope (by a task), it keeps its own values.
    """

    inside: Context

    def get(self, key: str, default: object = None) -> Any:
        return dict.get(self._here(), key, default)

    def copy(self) -> dict[str, object]:
        return dict(self._here())

    def _here(self) -> Context:
        scope, messages = innermost.get(None), self.inside[_MESSAGES_KEY]
        while scope is not None and scope.messages is not messages:
            scope = scope._outer
        return self if scope is None else self.inside


class ScopeMessages:
    """The messages that a scope accounts for, as stored in its context.

    A copy of the context (in a task or a timer) may outlive the scope by far, so the
    records themselves are released at its end.

    Args:
        records: The records.
        links: The links to the creation contexts of some of them.
        context: The context around the scope, which has the messages of the scope
            around it.
    """

    __slots__ = ("_created", "_links", "outer", "records")

    def __init__(
        self, records: Sequence[Record], links: Sequence[Link], context: Context
    ) -> None:
        self.records = records
        self.outer: Any = context.get(_MESSAGES_KEY)
        self._links = links
        self._created: frozenset[tuple[int, int]] | None = None

    def carries(self, created: SpanContext) -> bool:
        """Whether a creation context belongs to one of these records."""
        if self._created is None:
            contexts = (link.context for link in self._links)
            self._created = frozenset((one.trace_id, one.span_id) for one in contexts)
        return (created.trace_id, created.span_id) in self._created


class Scope(Operation):
    """The processing of one record or of a batch.

    Args:
        template: The template of the operation.
        span: Its span, or None if it is only measured.
        started: When it started.
    """

    __slots__ = (
        "_around",
        "_attached",
        "_entered",
        "_failed_with",
        "_ids",
        "_marker",
        "_outer",
        "_thread",
        "_token",
        "is_bounded",
        "messages",
    )

    # The contexts around it and in it, and the token that restores the former. There
    # are none if it has no span.
    _around: Context | None
    _attached: Context | None
    _token: Token[Context] | None

    def enter(self, messages: ScopeMessages, around: Context, context: Context) -> None:
        """Enter it, until `leave`.

        Args:
            messages: The records that it accounts for.
            around: The context that is current around it.
            context: The context to make current in it, without its span and its
                messages. If it has no span, nothing is made current.
        """
        self._entered = self.is_bounded = True
        self._thread = threading.get_ident() if THREADS_INHERIT else None
        self.messages = messages
        self._ids: frozenset[int] | None = None
        self._failed_with: dict[str, Any] | None = None
        self._around = self._attached = self._token = None
        outer = innermost.get(None)
        while outer is not None and outer._marker is None:
            outer = outer._outer
        self._outer: Scope | None = outer
        self._marker: Token[Scope | None] | None = innermost.set(self)
        if self.span is None:
            return
        try:
            attached = Context(
                {**context, SPAN_KEY: self.span, _MESSAGES_KEY: messages}
            )
            self._around, self._attached = around, attached
            self._token = otel_context.attach(attached)
        except Exception:
            report("make a process span current")

    def leave(self) -> None:
        """Restore the context that was current before `enter`.

        On another thread or in another context, this restores nothing.
        """
        if not self._entered:
            return
        self._entered = False
        try:
            scope, later = innermost.get(None), []
            while scope is not self:
                if scope is None:
                    return
                later.append(scope)
                scope = scope._outer
            # Scopes that were entered later (in a `zip` of consumers) are undone, too.
            if self.undo(later) and self._outer is not None:
                undo_left()
        except Exception:
            report("restore the context after a process span")

    def renew_marker(self) -> bool:
        """Whether the running code is in this scope, in the scope's own context.

        A marker can be reset only in its own context, so this resets it and sets it
        again.
        """
        if not self._entered or self.has_ended or self._marker is None:
            return False
        within = innermost.get(None)
        try:
            innermost.reset(self._marker)
        except _REFUSALS:
            return False
        # `reset` has used the token, so a new one is needed.
        self._marker = innermost.set(within)
        return True

    def undo(self, later: Sequence[Scope] = ()) -> bool:
        """Undo `enter`, if it was called in this very context.

        Args:
            later: The scopes that were entered in it and not left, the last one first.

        Returns:
            Whether `enter` was called in this context.
        """
        if self._marker is None:
            return False
        try:
            innermost.reset(self._marker)
        except _REFUSALS:
            return False
        self._marker = None
        if self._around is not None:
            try:
                restore(self._around, self._token, [*later, self])
            except Exception:
                report("restore the context after a process span")
        return True

    def _without(
        self, scopes: Sequence[Scope], current: Context, around: Context
    ) -> Context:
        """The context around scopes, with the values that were added in them."""
        messages = current.get(_MESSAGES_KEY)
        within = next((s._attached for s in scopes if s.messages is messages), None)
        if within is None:  # it was not made from the context of a scope
            return current
        span = get_current_span(current)
        if all(span is not each.span for each in scopes) and (
            # It may be the span of a block that the application has entered.
            not self.is_bounded or span.is_recording()
        ):
            return current
        added = {
            key: value
            for key, value in current.items()
            if key != SPAN_KEY and (key not in within or value is not within[key])
        }
        return Context({**around, **added}) if added else around

    def _stand_for(self, around: Context) -> None:
        """Give its context the values of the one around it, if it is restored later."""
        attached = self._attached
        if attached is not None:
            vars(attached)["inside"] = Context(attached)
            attached.__class__ = _LeftContext
            dict.clear(attached)
            dict.update(attached, around)

    def close(self, ended: int | None = None) -> None:
        """Leave the scope and end its operation.

        Args:
            ended: The end by the monotonic clock, in nanoseconds; now if None.
        """
        try:
            self.leave()
        finally:  # also after an interrupt
            if self.claim():
                self.end_claimed(ended=ended)
            self.messages.records = ()

    def drop(self, *, collected: bool) -> None:
        """Close a scope whose iterator is being finalised.

        Args:
            collected: Whether the garbage collector found it, perhaps during a call
                of the SDK.
        """
        if not collected:
            self.close()
            return
        self._entered = False
        self.messages.records = ()
        _endings.defer(self)
        try:
            if otel_context.get_current() is self._attached:
                undo_left()
        except Exception:
            report("restore the context after a process span")

    def accounts_for(self, record: Record) -> bool:
        """Whether it accounts for this very record."""
        records = self.messages.records
        if len(records) == 1:
            return records[0] is record
        if self._ids is None:
            self._ids = frozenset(map(id, records))
        return bool(records) and id(record) in self._ids

    def begin_attempt(self) -> None:
        """Record failures from now on, even with an exception that was recorded before.

        The exception that is being handled now is not recorded again.
        """
        handled = sys.exc_info()[1]
        if handled is None or vars(handled) is not self._failed_with:
            self._failed_with = None

    def fail_with(self, error: BaseException) -> None:
        """Fail with an exception, which may be passed to this more than once."""
        # Its dict identifies an exception. Another exception may get the same id later,
        # and a reference would keep the traceback, and with it the loop's iterator.
        if self._failed_with is not vars(error):
            self._failed_with = vars(error)
            self.fail(error)

    def fail_with_loop(self, error: Exception | None) -> None:
        """Fail with the exception that ends its loop.

        Args:
            error: The exception, or None if it cannot be identified. A `process_span`
                in the body may have recorded it.
        """
        if error is not None:
            self.fail_with(error)
        elif self.error_type is None:
            self.fail_as(ERROR_OTHER, "an exception ended the loop")


def restore(
    around: Context, token: Token[Context] | None, scopes: Sequence[Scope] = ()
) -> None:
    """Make the context around code current again, even if `detach` fails.

    Args:
        around: The context.
        token: The token that detaching takes to restore it.
        scopes: The scopes that are left here, the last one first. A context that the
            application made current in them may stay.
    """
    restored, replaced, is_covered = around, None, True
    try:
        replaced = otel_context.get_current()
        is_covered = replaced is not around
        for each in scopes:
            is_covered = is_covered and replaced is not each._attached
        if is_covered and scopes:
            restored = scopes[-1]._without(scopes, replaced, around)
    finally:  # also after a failure
        if is_covered:
            for each in scopes:
                each._stand_for(around)
        try:
            if restored is around and token is not None:
                otel_context.detach(token)
        finally:  # OpenTelemetry logs a failure and continues
            if otel_context.get_current() is replaced is not restored:
                otel_context.attach(restored)


def undo_left() -> Scope | None:
    """Undo the innermost scopes that were left elsewhere.

    Returns:
        The innermost scope that remains.
    """
    scope = innermost.get(None)
    while scope is not None and not scope._entered and scope.undo():
        scope = innermost.get(None)
    return scope


def displace_held() -> None:
    """Leave the scopes that `next` holds in this context, before the next record."""
    scope = innermost.get(None)
    while scope is not None and not scope.is_bounded and scope.renew_marker():
        scope.leave()
        lasting = [each for each in _displaced.get() if not each.has_ended]
        _displaced.set((*lasting, scope))
        scope = innermost.get(None)


def displaced_scope_of(record: Record) -> Scope | None:
    """The scope that accounts for a record and was displaced in this context."""
    found = (each for each in _displaced.get() if each.accounts_for(record))
    return next(found, None)


def context_around_held(context: Context) -> Context:
    """The current context, without the span of another record that `next` holds.

    Args:
        context: The current context.
    """
    scope = innermost.get(None)
    while scope is not None and not scope.is_bounded and scope._around is not None:
        context = scope._without([scope], context, scope._around)
        scope = scope._outer
    return context


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


def context_around(current: Context) -> Context:
    """The context around a scope that is about to be entered.

    Args:
        current: The current context.
    """
    if innermost.get(None) is None:
        return current
    return context_around_held(context_around_left())


def context_around_left() -> Context:
    """The current context, or the one around the scopes in it that were left.

    A copy of a context (in a task or a thread) keeps a scope current after the loop has
    continued.
    """
    scope = undo_left()
    context = otel_context.get_current()
    while scope is not None and not scope._entered:
        if context is scope._attached and scope._around is not None:
            context = scope._around
        scope = scope._outer
    return context


def context_of_thread(context: Context) -> Context:
    """The current context, or the one around the scopes that a thread has outlived.

    A thread that was started in a scope would keep it for all of its later work, which
    is not intended. A task, or a pool that carries contexts, keeps it on purpose: its
    context stays.

    Args:
        context: The current context.
    """
    scope = innermost.get(None)
    if scope is None or scope._thread == threading.get_ident():
        return context
    return context_around_left()


def scope_of(record: Record) -> Scope | None:
    """The scope around the running code that accounts for a record, or None."""
    scope = innermost.get(None)
    while scope is not None and not scope.accounts_for(record):
        scope = scope._outer
    return scope
