"""Commits of offsets.

Consumers commit in many ways: by `commit` and `commit_async`, during a poll, before a
rebalance and at `close`. All of them use the consumer's coordinator. So the methods of
the coordinator are wrapped, and each commit has one span.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind

from otel_kafka_python import _kafka
from otel_kafka_python._attributes import (
    Attributes,
    add_message,
    peer_attributes,
)
from otel_kafka_python._clock import Clock, Moment
from otel_kafka_python._messages import shared_partition
from otel_kafka_python._operation import (
    COMMIT,
    Failure,
    OperationTemplate,
    PendingOperation,
)
from otel_kafka_python._safety import report
from otel_kafka_python._telemetry import Telemetry

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Offsets = dict[tuple[str, int], int]


@dataclass(slots=True)
class CommitLedger:
    """The known state of one consumer's commits."""

    # The offsets that the broker has, as far as this consumer read or committed them.
    committed: Offsets = field(default_factory=dict)
    # The commits whose request has not been made. The coordinator is still being looked
    # up, perhaps on another thread, and the request is made there.
    waiting: list[PendingCommit] = field(default_factory=list)
    # The offsets of each thread that commits and waits for the answer.
    synchronous: dict[object, Any] = field(default_factory=dict)
    # The thread whose next commit is an auto-commit.
    auto_thread: int | None = None

    def forget(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Note that the broker's offsets of these partitions are no longer known."""
        for partition in partitions:
            self.committed.pop(partition, None)

    def take(self, offsets: Any) -> Commit | None:
        """Remove and return the first waiting commit with this very offsets object."""
        return next(
            (
                entry.commit
                for entry in list(self.waiting)
                if entry.offsets is offsets and self.remove(entry)
            ),
            None,
        )

    def remove(self, entry: PendingCommit) -> bool:
        """Remove an entry, and return whether it was still waiting."""
        try:
            self.waiting.remove(entry)
        except ValueError:
            return False
        return True


class PendingCommit:
    """A commit whose coordinator is being looked up, as the callback of that future.

    Args:
        ledger: The ledger of the consumer's commits.
        offsets: The offsets, as the application gave them.
        commit: The commit.
    """

    __slots__ = ("_ledger", "commit", "offsets")

    def __init__(self, ledger: CommitLedger, offsets: Any, commit: Commit) -> None:
        self._ledger = ledger
        self.offsets = offsets
        self.commit = commit

    def __call__(self, outcome: Any) -> None:
        """Receive the result of the look-up: the coordinator or an exception.

        If the request has been made by now, its answer ends the commit. Otherwise the
        commit ends here.
        """
        if self._ledger.remove(self):
            self.commit(outcome)


class Commit(PendingOperation):
    """A commit, until the coordinator's answer.

    Args:
        template: The template of the operation.
        span: Its span, or None if it is only measured.
        started: When it started.
        coordinator: The coordinator of the consumer.
        ledger: The ledger of the consumer's commits.
        offsets: The committed offsets.
        moves: Whether the commit may change the broker's offsets.
    """

    __slots__ = ("_coordinator", "_ledger", "_moves", "_offsets")

    def __init__(
        self,
        template: OperationTemplate,
        span: Span | None,
        started: Moment,
        coordinator: Any,
        ledger: CommitLedger,
        offsets: Offsets,
        *,
        moves: bool,
    ) -> None:
        self._coordinator = weakref.ref(coordinator)
        self._ledger = ledger
        self._offsets = offsets
        self._moves = moves
        super().__init__(template, span, started)
        ledger.committed.update(offsets)

    def follow(self, future: Any, pending: PendingCommit | None = None) -> None:
        """Wait for the answer, or for the look-up of the coordinator first."""
        try:
            _kafka.when_done(future, pending or self)
        except Exception:
            report("follow a commit")
            self.end()

    def fail(self, error: BaseException | None) -> None:
        """Record why it fails; the broker's offsets are unknown from then on.

        They stay known if another commit of the same offsets came before it.
        """
        if self._moves:
            self._ledger.forget(self._offsets)
        super().fail(error)

    def _end_succeeded(self, result: Any, ended: int) -> None:  # noqa: ARG002 (none)
        self.end(self._peer_attributes(), ended=ended)

    def _failure(self, error: BaseException | None, *, was_taken: bool) -> Failure:
        is_answer = was_taken and _kafka.is_answer(error)
        return Failure(self._peer_attributes() if is_answer else None)

    def _peer_attributes(self) -> Attributes:
        try:
            return peer_attributes(_kafka.coordinator_broker(self._coordinator()))
        except Exception:
            report("read the coordinator of a group")
            return {}


class CommitWrappers:
    """The wrappers of the methods by which consumers commit.

    If kafka-python lacks these methods of the coordinator, `commit_sync` and
    `commit_async` wrap the consumer's own `commit` and `commit_async`.

    Args:
        telemetry: The telemetry that all wrappers share.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._ledgers: weakref.WeakKeyDictionary[Any, CommitLedger] = (
            weakref.WeakKeyDictionary()
        )

    def commit_sync(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap a commit that waits for the answer ("Settle" spans)."""
        ledger = self._ledger(instance)
        auto = ledger.auto_thread == threading.get_ident()
        if auto:
            # A commit by one of the application's callbacks in it is not automatic.
            ledger.auto_thread = None
        commit = self._begin(instance, ledger, args, kwargs, auto=auto)
        offsets = _kafka.offsets_argument(args, kwargs)
        token = object()
        ledger.synchronous[token] = offsets
        try:
            result = wrapped(*args, **kwargs)
        except BaseException as error:
            if commit is not None:
                commit(error)
            raise
        finally:
            del ledger.synchronous[token]
        if commit is not None:
            commit(None)
        else:  # a commit without telemetry has moved the offsets, too
            self._note(instance, offsets)
        return result

    def commit_async(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap a commit that returns a future ("Settle" spans)."""
        ledger = self._ledger(instance)
        auto = _kafka.is_auto_commit(instance, args, kwargs)
        commit = self._begin(instance, ledger, args, kwargs, auto=auto)
        if commit is None:
            return wrapped(*args, **kwargs)
        pending = PendingCommit(ledger, _kafka.offsets_argument(args, kwargs), commit)
        ledger.waiting.append(pending)
        try:
            future = wrapped(*args, **kwargs)
        except BaseException as error:
            ledger.remove(pending)
            commit.end_with(error)
            raise
        # If the request has been made, this changes nothing.
        commit.follow(future, pending)
        return future

    def request_async(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap the method that makes the request of a `commit_async`, now or later."""
        commit = self._ledger(instance).take(_kafka.offsets_argument(args, kwargs))
        if commit is None:
            return wrapped(*args, **kwargs)
        try:
            future = wrapped(*args, **kwargs)
        except BaseException as error:
            commit.end_with(error)
            raise
        commit.follow(future)
        return future

    def auto_commit_sync(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap the auto-commit at `close` and, up to 2.3, before a rebalance."""
        ledger = self._ledger(instance)
        ledger.auto_thread = threading.get_ident()
        try:
            return wrapped(*args, **kwargs)
        finally:
            ledger.auto_thread = None

    async def commit_coroutine(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap the auto-commit before a rebalance (3.0 and later)."""
        ledger = self._ledger(instance)
        commit = None
        offsets = _kafka.offsets_argument(args, kwargs)
        # A commit that waits for its answer also runs this, and has begun already.
        if all(each is not offsets for each in list(ledger.synchronous.values())):
            # The client's own thread may have inherited the span in which the client
            # was made. That span has nothing to do with this commit.
            commit = self._begin(
                instance, ledger, args, kwargs, auto=True, context=Context()
            )
        try:
            result = await wrapped(*args, **kwargs)
        except BaseException as error:
            if commit is not None:
                commit(error)
            raise
        if commit is not None:
            commit(None)
        return result

    def fetch_committed(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap the method that reads the committed offsets (up to 2.3)."""
        committed = wrapped(*args, **kwargs)
        self._note(instance, committed)
        return committed

    async def fetch_committed_coroutine(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap the coroutine that reads the committed offsets (3.0 and later)."""
        committed = await wrapped(*args, **kwargs)
        self._note(instance, committed)
        return committed

    def _ledger(self, instance: Any) -> CommitLedger:
        try:
            ledger = self._ledgers.get(instance)
            if ledger is None:
                ledger = self._ledgers[instance] = CommitLedger()
            return ledger
        except Exception:
            report("keep the ledger of a consumer's commits")
            return CommitLedger()

    def _note(self, instance: Any, committed: Any) -> None:
        try:
            self._ledger(instance).committed.update(
                _kafka.offsets_by_partition(committed)
            )
        except Exception:
            report("read committed offsets")

    def _begin(
        self,
        instance: Any,
        ledger: CommitLedger,
        args: Args,
        kwargs: Kwargs,
        *,
        auto: bool,
        context: Context | None = None,
    ) -> Commit | None:
        try:
            offsets = _kafka.offsets_argument(args, kwargs)
            if self._telemetry.may_begin(context):
                return self._start(
                    instance, ledger, offsets, auto=auto, context=context
                )
            # The broker's offsets will not be known.
            ledger.forget(_kafka.offsets_by_partition(offsets))
        except Exception:
            report("trace a commit")
        return None

    def _start(
        self,
        instance: Any,
        ledger: CommitLedger,
        given: Any,
        *,
        auto: bool,
        context: Context | None,
    ) -> Commit | None:
        telemetry, config = self._telemetry, self._telemetry.config
        client = telemetry.clients.get(instance)
        offsets = {
            partition: offset
            for partition, offset in _kafka.offsets_by_partition(given).items()
            if telemetry.template(client, COMMIT, *partition) is not None
        }
        # Only a consumer's own `commit` may let the client choose the offsets.
        if not offsets and given is not None:
            return None
        topic, partition = shared_partition(offsets)
        template = telemetry.template(client, COMMIT, topic, partition)
        assert template is not None  # excluded topics are left out
        started = time.time_ns(), Clock.monotonic_ns()
        span = None
        # Many programs commit after each poll, and most polls return nothing.
        moves = given is None or bool(offsets.items() - ledger.committed.items())
        if moves and config.commit_spans in (("all",) if auto else ("all", "manual")):
            attributes = template.attributes | _offset_attributes(partition, offsets)
            span = telemetry.start_span(
                template, SpanKind.CLIENT, started, attributes, context
            )
        return Commit(template, span, started, instance, ledger, offsets, moves=moves)


def _offset_attributes(partition: int | None, offsets: Offsets) -> Attributes:
    """The attributes of the partition, if there is exactly one."""
    if partition is None:
        return {}
    (offset,) = offsets.values()
    # Kafka's committed offset is the offset of the next record. The conventions use the
    # offset of the last record that the commit covers.
    return add_message({}, offset - 1)
