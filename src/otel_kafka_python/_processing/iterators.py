"""The iterators between a loop and its records; the held record of `next`."""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

from opentelemetry import context as otel_context

from otel_kafka_python import _endings
from otel_kafka_python._clients import Client
from otel_kafka_python._clock import Clock
from otel_kafka_python._messages import Record
from otel_kafka_python._pipeline import Handover
from otel_kafka_python._processing.loops import (
    Asker,
    asker_at,
    failure,
    is_loop,
    references_to_stops,
)
from otel_kafka_python._processing.scopes import Scope, displace_held, undo_left
from otel_kafka_python._processing.spans import open_unless_in_scope
from otel_kafka_python._safety import report
from otel_kafka_python._telemetry import Telemetry


class ScopedIterator:
    """An iterator over records that opens a scope for each one that a loop asks for.

    It must not be part of a reference cycle: its finaliser notices the end of the loop.
    """

    __slots__ = ("_asked_at", "_asked_in", "_asker", "_scope", "_stops")

    def __init__(self) -> None:
        self._scope: Scope | None = None
        self._asked_in: CodeType | None = None
        self._asked_at = -1
        self._asker = Asker.OTHER
        self._stops = 0

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        scope, ended = self._scope, None
        if scope is not None:
            # First, because an interrupt here leaves the scope to the finaliser.
            ended = Clock.monotonic_ns()
            self._scope = None
            scope.close(ended)
        try:
            record = self._advance(ended)
            try:
                self._hand_over(record, self._is_asked_by_loop())
            except Exception:
                report("trace the processing of a record")
            return record
        finally:
            # An exception that is kept also keeps its frames, and kafka-python 3.0
            # keeps the exceptions of waits that time out. None may keep this object.
            del self

    def _is_asked_by_loop(self) -> bool:
        # The frame that called `__next__`. A loop asks from the same place each time,
        # so the last answer nearly always applies.
        try:
            frame: FrameType = sys._getframe(2)
        except (AttributeError, ValueError):
            # The interpreter shows no frames, or no Python code asked.
            return False
        code, offset = frame.f_code, frame.f_lasti
        if code is not self._asked_in or offset != self._asked_at:
            self._asked_in, self._asked_at = code, offset
            self._asker = asker_at(code, code.co_filename, offset)
            self._stops = references_to_stops()
        if self._asker is Asker.LOOP:
            return True
        return self._asker is Asker.GENERATOR and is_loop(frame.f_back)

    def _advance(self, began: int | None) -> Record:
        """Return the next record, or raise StopIteration.

        Args:
            began: When the loop asked for it, by the monotonic clock, in nanoseconds;
                now if None.
        """
        raise NotImplementedError

    def _hand_over(self, record: Record, by_loop: bool) -> None:
        """Trace that a record is handed over, and keep the scope to close later."""
        raise NotImplementedError

    def __del__(self) -> None:
        scope = getattr(self, "_scope", None)  # a copy may lack it
        if scope is not None:
            collected = _endings.is_collecting()
            if not collected:
                self._fail(scope, sys._getframe().f_back)
            scope.drop(collected=collected)

    def _fail(self, scope: Scope, frame: FrameType | None) -> None:
        """Fail with the exception that ends the loop, if one does."""
        try:
            failed = failure(frame, self._asked_in, self._asker, self._stops)
            if failed is not None:
                scope.fail_with_loop(failed.error)
        except Exception:
            report("see how a loop ended")


class Records(list[Record]):
    """The records of a partition as `poll` returned them.

    A list in every respect, except that a loop over it makes a process span for each
    record. Copies and pickles of it are plain lists. An instance that other code
    creates behaves as a plain list.

    Args:
        records: The records.
        telemetry: The telemetry that all wrappers share.
        client: The consumer.
    """

    __slots__ = ("_processed", "client", "handover", "telemetry")

    # Kept as long as a loop over the records is possible, if pipelines are measured.
    handover: Handover | None

    def __init__(
        self,
        records: Iterable[Record] = (),
        telemetry: Telemetry | None = None,
        client: Client | None = None,
    ) -> None:
        super().__init__(records)
        self.telemetry = telemetry
        self.client = client
        # The records that a process span has accounted for.
        self._processed: set[tuple[str, int, int]] = set()

    def __iter__(self) -> Iterator[Record]:
        if self.telemetry is None or self.client is None:
            return super().__iter__()
        return RecordsIterator(self, super().__iter__(), self.telemetry, self.client)

    def __reversed__(self) -> Iterator[Record]:
        plain = super().__reversed__()
        if self.telemetry is None or self.client is None:
            return plain
        return RecordsIterator(self, plain, self.telemetry, self.client)

    def __reduce_ex__(self, protocol: object) -> Any:
        return list, (self.copy(),)

    def note_processed(self, record: Record) -> bool:
        """Note that a process span accounts for a record; false if one did already."""
        # The application may add records of other partitions to a list.
        position = (record.topic, record.partition, record.offset)
        if position in self._processed:
            return False
        self._processed.add(position)
        return True


class RecordsIterator(ScopedIterator):
    """An iterator over `Records`.

    Args:
        records: The records.
        plain: A plain list's iterator over them, forwards or backwards.
        telemetry: The telemetry that all wrappers share.
        client: The consumer.
    """

    __slots__ = ("_client", "_plain", "_records", "_telemetry")

    def __init__(
        self,
        records: Records,
        plain: Iterator[Record],
        telemetry: Telemetry,
        client: Client,
    ) -> None:
        super().__init__()
        self._telemetry = telemetry
        self._client = client
        self._records = records
        self._plain = plain

    def __reduce__(self) -> Any:
        # As a plain list's iterator at the same position.
        reduced: Any = self._plain.__reduce__()
        if len(reduced) < 3:  # noqa: PLR2004 (it has no position at its end)
            return reduced
        return (reduced[0], (self._records.copy(),), *reduced[2:])

    def __length_hint__(self) -> int:
        return operator.length_hint(self._plain)

    def _advance(self, began: int | None) -> Record:  # noqa: ARG002 (as overridden)
        return next(self._plain)

    def _hand_over(self, record: Record, by_loop: bool) -> None:
        telemetry = self._telemetry
        if not by_loop:
            return
        current = otel_context.get_current()
        if telemetry.may_begin(current) and self._records.note_processed(record):
            self._scope = open_unless_in_scope(telemetry, self._client, record, current)


class HeldScope:
    """A scope that lasts until its consumer is asked for more, or is closed.

    Args:
        scope: The scope of the record that `next` returned.
    """

    __slots__ = ("_is_closed", "_scope")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._is_closed = False

    def close(self) -> None:
        """Close the scope."""
        self._is_closed = True
        self._scope.close()

    def __del__(self) -> None:
        if not self._is_closed:
            self._scope.drop(collected=_endings.is_collecting())


class HeldScopes:
    """The scope of each consumer's last record of `next`."""

    def __init__(self) -> None:
        self._by_client: weakref.WeakKeyDictionary[Client, HeldScope] = (
            weakref.WeakKeyDictionary()
        )

    def hold(self, telemetry: Telemetry, client: Client, record: Record) -> None:
        """Enter the processing of a record that `next` returns."""
        scope = open_unless_in_scope(
            telemetry, client, record, otel_context.get_current()
        )
        if scope is not None:
            scope.is_bounded = False
            self._by_client[client] = HeldScope(scope)

    def close(self, client: Client) -> None:
        """Close the scope of a consumer's record, if there is one."""
        held = self._by_client.pop(client, None)
        if held is not None:
            held.close()
        try:
            # A scope that was closed elsewhere can be undone here.
            undo_left()
        except Exception:
            report("restore the context after a process span")

    def displace(self) -> None:
        """Leave the scopes of this context before the next record."""
        try:
            displace_held()
        except Exception:
            report("restore the context after a process span")

    def close_all(self) -> None:
        """Close the scopes of all consumers' records."""
        for client in list(self._by_client):
            self.close(client)
