"""The public context manager."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import FrameType, TracebackType
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.trace import INVALID_SPAN, Span

from otel_kafka_python import _config
from otel_kafka_python._messages import Record
from otel_kafka_python._operation import PROCESS
from otel_kafka_python._processing.iterators import Records
from otel_kafka_python._processing.scopes import (
    Scope,
    context_around,
    displaced_scope_of,
    scope_of,
)
from otel_kafka_python._processing.spans import (
    enter_again,
    open_batch_scope,
    open_scope,
)
from otel_kafka_python._safety import is_new, logger, raise_signalled, report
from otel_kafka_python._telemetry import Telemetry

# The telemetry of `instrument()`.
_instrumented: Telemetry | None = None


@cache
def _global_telemetry() -> Telemetry:
    """The telemetry of the global providers, if nothing is instrumented."""
    return Telemetry(_config.load({}))


def use(telemetry: Telemetry | None) -> None:
    """Set the telemetry that `process_span` uses; None for the global providers."""
    global _instrumented  # noqa: PLW0603 (there is one instrumentation)
    _instrumented = telemetry
    # The global providers may be others when nothing is instrumented any more.
    _global_telemetry.cache_clear()


def process_span(
    records: Record | Sequence[Record] | Mapping[Any, Sequence[Record]],
    consumer: Any = None,
) -> AbstractContextManager[Span]:
    """Trace the processing of a record, or of several as one batch.

    Inside a loop over the record, it uses the loop's span and records exceptions
    there. Anywhere else (a worker thread, a record that is taken from the result of
    `poll`, a batch, a process that is not instrumented), it makes a span of its own.

    Args:
        records: A record, a sequence of records, or the result of `poll`. An iterator
            is rejected: reading it here would leave nothing for the application.
        consumer: The consumer of the records. A record does not know its group, its
            client or its server; with the consumer, the span has these, too.

    Returns:
        A context manager that returns the span, which is current within it. An
        exception that leaves it is recorded and propagates.
    """
    return _ProcessSpan(records, consumer)


# The scope of an entered block, if it has one, and the call that leaves or closes it.
# There is no call if a loop closes the scope.
_Entry = tuple[Scope | None, Callable[[], None] | None]


class _ProcessSpan(AbstractContextManager[Span]):
    """The context manager that `process_span` returns."""

    def __init__(self, records: Any, consumer: Any) -> None:
        self._given = records
        self._consumer = consumer
        # One context manager may be entered several times.
        self._entries: list[_Entry] = []

    def __enter__(self) -> Span:
        entry: _Entry = None, None
        try:
            entry = self._open()
        except Exception:
            _explain(self._given)
        self._entries.append(entry)
        scope, _ = entry
        return INVALID_SPAN if scope is None or scope.span is None else scope.span

    def _open(self) -> _Entry:
        telemetry = _instrumented or _global_telemetry()
        current = otel_context.get_current()
        if not telemetry.may_begin(current):
            return None, None
        given = self._given
        batch = not hasattr(given, "offset")
        if not batch:
            adopted = scope_of(given)
            if adopted is not None and adopted.renew_marker():
                adopted.begin_attempt()
                return adopted, None
            displaced = displaced_scope_of(given)
            if displaced is not None:
                enter_again(displaced, given, context_around(current))
                return displaced, displaced.leave
        if self._consumer is None:
            client = telemetry.unknown_client()
        else:
            client = telemetry.clients.get(self._consumer)
        records = [
            record
            for record in _take(given)
            if telemetry.template(client, PROCESS, record.topic, record.partition)
        ]
        if not records:
            return None, None
        around = context_around(current)
        if batch:
            return _to_close(open_batch_scope(telemetry, client, records, around))
        if telemetry.consume_hook is not None:
            _pass_receipt(telemetry, records[0])
        return _to_close(open_scope(telemetry, client, records[0], around))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope, leave_or_close = self._entries.pop()
        if scope is None:
            return
        try:
            # SystemExit, CancelledError, GeneratorExit and others that are not an
            # Exception are a clean stop.
            if isinstance(error, Exception):
                scope.fail_with(error)
        finally:  # also after an interrupt
            if leave_or_close is not None:
                leave_or_close()


def _to_close(scope: Scope | None) -> _Entry:
    return scope, None if scope is None else scope.close


def _pass_receipt(telemetry: Telemetry, record: Record) -> None:
    """Close the receipt of a record whose hook is called with the process span."""
    for _, client in telemetry.clients.living():
        receipt = client.receipt
        if receipt is not None and receipt.record is record:
            client.receipt = None
            receipt.close(hooked=False)


def _take(given: Any) -> list[Record]:
    """The given records, which later loops over their lists do not trace again."""
    if hasattr(given, "offset"):
        return [given]
    lists = given.values() if isinstance(given, Mapping) else [given]
    records: list[Record] = []
    for each in lists:
        # Checked before anything is read: the application needs an iterator's records.
        if not _holds_records(each):
            raise TypeError
        if isinstance(each, Records):
            for record in each.copy():
                each.note_processed(record)
        records.extend(each)
    return records


def _holds_records(given: object) -> bool:
    return isinstance(given, Collection) and not isinstance(given, str | bytes)


def _refused(given: Any) -> str | None:
    """The type of an argument that `process_span` does not take, or None."""
    name = "None" if given is None else type(given).__qualname__
    if isinstance(given, Record):
        return None
    if hasattr(given, "offset"):
        return name
    for each in given.values() if isinstance(given, Mapping) else [given]:
        if not _holds_records(each):
            return name if each is given else f"{name} of {type(each).__qualname__}"
        for record in [*each]:  # a copy, because a loop over records makes spans
            if not isinstance(record, Record):
                return f"{name} of {type(record).__qualname__}"
    return None


def _explain(given: Any) -> None:
    """Warn of an argument that `process_span` does not take, or report the failure."""
    raise_signalled()
    try:
        caller: FrameType | None = None
        if hasattr(sys, "_getframe"):
            caller = sys._getframe(2)
        refused = _refused(given)
        while caller is not None and caller.f_globals.get("__name__") == "contextlib":
            caller = caller.f_back
        if refused is None or caller is None:
            report("trace the processing of a record")
            return
        place = f"{caller.f_code.co_filename}, line {caller.f_lineno}"
        if is_new((refused, place)):
            logger.warning(
                "process_span() takes a record, a sequence of records, or the dict "
                "that poll() returned, but got %s (%s); it makes no span",
                refused,
                place,
            )
    except Exception:
        report("explain what process_span was given")
