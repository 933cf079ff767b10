"""Settlement: commits, offsets sent to a transaction, ends of transactions.

Consumers commit in many ways: by `commit` and `commit_async`, on the way of a poll,
before a rebalance, at `close`. All of them meet in the consumer's coordinator, which
is what is wrapped: one span for each commit, whatever way it took.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.trace import Span, SpanKind

from otel_kafka_python import _client
from otel_kafka_python._attributes import (
    Attributes,
    add_message,
    peer_attributes,
)
from otel_kafka_python._messages import shared
from otel_kafka_python._operation import (
    COMMIT,
    Answered,
    Facts,
    Kind,
    Operation,
    Telemetry,
)
from otel_kafka_python._safety import report
from otel_kafka_python._semconv import MESSAGING_CONSUMER_GROUP_NAME

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Offsets = dict[tuple[str, int], int]


@dataclass(slots=True)
class _State:
    """What is known of the commits of one consumer."""

    # What the broker has, as far as this consumer has read or committed it.
    committed: Offsets = field(default_factory=dict)
    # Those whose request has not been made: the coordinator is still looked up, on
    # another thread perhaps, and the request is made there.
    waiting: list[LookUp] = field(default_factory=list)
    # While threads commit and wait: what each does.
    in_sync: dict[object, Any] = field(default_factory=dict)
    # The thread whose next commit is one that nobody asked for.
    auto_thread: int | None = None

    def take(self, offsets: Any) -> Settlement | None:
        """The first that waits with these very offsets; it waits no longer."""
        for entry in list(self.waiting):
            if entry.offsets is offsets and self.drop(entry):
                return entry.settlement
        return None

    def drop(self, entry: LookUp) -> bool:
        """Whether it has waited until now."""
        try:
            self.waiting.remove(entry)
        except ValueError:
            return False
        return True


class LookUp:
    """A commit whose coordinator is looked up; it is the callback of that future.

    Args:
        state: The state of the consumer's commits.
        offsets: The offsets, as the application gave them.
        settlement: The commit.
    """

    __slots__ = ("_state", "offsets", "settlement")

    def __init__(self, state: _State, offsets: Any, settlement: Settlement) -> None:
        self._state = state
        self.offsets = offsets
        self.settlement = settlement

    def __call__(self, outcome: Any) -> None:
        """Receive the coordinator or the exception: the request has been made or not.

        Once it has been made, its own answer ends the commit. Where kafka-python
        lacks what makes it, this is the answer.
        """
        if self._state.drop(self):
            self.settlement(outcome)


class Settlement(Answered):
    """A commit, until the coordinator's answer.

    Args:
        facts: What was known of it in advance.
        span: Its span, or None if it is only measured.
        started: When it started, in nanoseconds since the epoch.
        coordinator: The coordinator of the consumer.
        state: The state of the consumer's commits.
        offsets: What is committed.
    """

    __slots__ = ("_coordinator", "_offsets", "_state")

    def __init__(
        self,
        facts: Facts,
        span: Span | None,
        started: int,
        coordinator: Any,
        state: _State,
        offsets: Offsets,
    ) -> None:
        super().__init__(facts, span, started)
        self._coordinator = weakref.ref(coordinator)
        self._state = state
        self._offsets = offsets
        state.committed.update(offsets)

    def follow(self, future: Any, look_up: LookUp | None = None) -> None:
        """Wait for the answer, or first for the look-up of the coordinator."""
        try:
            _client.when_done(future, look_up or self)
        except Exception:
            report("follow a commit")
            self.end()

    def fail(self, error: BaseException | None) -> None:
        """Record why it fails: what the broker has now is not known."""
        for partition in self._offsets:
            self._state.committed.pop(partition, None)
        super().fail(error)

    def _succeeded(self, result: Any, ended: int) -> None:  # noqa: ARG002 (none)
        if self.claim():
            self._finish(self._peer(), ended)

    def _failed(self, error: BaseException, ended: int) -> None:
        if self.claim():
            self.fail(error)
            self._finish(self._peer() if _client.is_answer(error) else {}, ended)

    def _peer(self) -> Attributes:
        try:
            coordinator = self._coordinator()
            broker = None
            if coordinator is not None:
                broker = _client.coordinator_broker(coordinator)
            return peer_attributes(broker if broker and broker.is_ip else None)
        except Exception:
            report("read the coordinator of a group")
            return {}


class SettlementWrappers:
    """The wrappers of what consumers commit by.

    Where kafka-python lacks the methods of the coordinator, `commit_sync` and
    `commit_async` wrap the consumer's own `commit` and `commit_async`.

    Args:
        telemetry: What the instrumentation works with.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._states: weakref.WeakKeyDictionary[Any, _State] = (
            weakref.WeakKeyDictionary()
        )

    def commit_sync(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap a commit that waits for the answer ("Settle" spans)."""
        state = self._state(instance)
        auto = state.auto_thread == threading.get_ident()
        if auto:
            # What the application's callbacks commit in it is asked for.
            state.auto_thread = None
        settlement = self._begin(instance, state, args, kwargs, auto=auto)
        token = object()
        state.in_sync[token] = _offsets(args, kwargs)
        try:
            result = wrapped(*args, **kwargs)
        except BaseException as error:
            if settlement is not None:
                settlement(error)
            raise
        finally:
            del state.in_sync[token]
        if settlement is not None:
            settlement(None)
        return result

    def commit_async(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap a commit that returns a future ("Settle" spans)."""
        state = self._state(instance)
        auto = _client.is_auto_commit(instance, args, kwargs)
        settlement = self._begin(instance, state, args, kwargs, auto=auto)
        if settlement is None:
            return wrapped(*args, **kwargs)
        look_up = LookUp(state, _offsets(args, kwargs), settlement)
        state.waiting.append(look_up)
        try:
            future = wrapped(*args, **kwargs)
        except BaseException as error:
            state.drop(look_up)
            settlement.raised(error)
            raise
        if look_up in state.waiting:
            settlement.follow(future, look_up)
        return future

    def request_async(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap what makes the request of a `commit_async`, now or later."""
        settlement = self._state(instance).take(_offsets(args, kwargs))
        if settlement is None:
            return wrapped(*args, **kwargs)
        try:
            future = wrapped(*args, **kwargs)
        except BaseException as error:
            settlement.raised(error)
            raise
        settlement.follow(future)
        return future

    def auto_commit_sync(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap what commits at `close` and, up to 2.3, before a rebalance."""
        state = self._state(instance)
        state.auto_thread = threading.get_ident()
        try:
            return wrapped(*args, **kwargs)
        finally:
            state.auto_thread = None

    async def commit_coroutine(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap what commits before a rebalance since 3.0."""
        state = self._state(instance)
        settlement = None
        offsets = _offsets(args, kwargs)
        if all(each is not offsets for each in list(state.in_sync.values())):
            settlement = self._begin(instance, state, args, kwargs, auto=True)
        try:
            result = await wrapped(*args, **kwargs)
        except BaseException as error:
            if settlement is not None:
                settlement(error)
            raise
        if settlement is not None:
            settlement(None)
        return result

    def fetch_committed(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap what reads the committed offsets, up to 2.3."""
        committed = wrapped(*args, **kwargs)
        self._note(instance, committed)
        return committed

    async def fetch_committed_coroutine(
        self, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap what reads the committed offsets, since 3.0."""
        committed = await wrapped(*args, **kwargs)
        self._note(instance, committed)
        return committed

    def _state(self, instance: Any) -> _State:
        try:
            state = self._states.get(instance)
            if state is None:
                state = self._states[instance] = _State()
            return state
        except Exception:
            report("keep the state of a consumer's commits")
            return _State()

    def _note(self, instance: Any, committed: Any) -> None:
        try:
            self._state(instance).committed.update(
                _client.offsets_by_partition(committed)
            )
        except Exception:
            report("read committed offsets")

    def _begin(
        self, instance: Any, state: _State, args: Args, kwargs: Kwargs, *, auto: bool
    ) -> Settlement | None:
        try:
            offsets = _offsets(args, kwargs)
            if self._telemetry.may_begin():
                return self._start(instance, state, offsets, auto=auto)
            # What is suppressed moves the offsets, too.
            state.committed.update(_client.offsets_by_partition(offsets))
        except Exception:
            report("trace a commit")
        return None

    def _start(
        self, instance: Any, state: _State, given: Any, *, auto: bool
    ) -> Settlement | None:
        telemetry, config = self._telemetry, self._telemetry.config
        if auto and config.commit_spans != "all":
            return None
        client = telemetry.clients.get(instance)
        offsets = {
            partition: offset
            for partition, offset in _client.offsets_by_partition(given).items()
            if telemetry.facts(client, COMMIT, *partition) is not None
        }
        # Only a consumer's own `commit` may leave it to the client what to commit.
        if not offsets and given is not None:
            return None
        if auto and all(
            state.committed.get(partition) == offset
            for partition, offset in offsets.items()
        ):
            return None
        topic, partition = shared(offsets)
        facts = telemetry.facts(client, COMMIT, topic, partition)
        if facts is None:
            return None
        started = time.time_ns()
        span = None
        if config.commit_spans != "none":
            attributes = facts.attributes | _attributes(partition, offsets)
            span = telemetry.start_span(facts, SpanKind.CLIENT, started, attributes)
        return Settlement(facts, span, started, instance, state, offsets)


def _offsets(args: Args, kwargs: Kwargs) -> Any:
    return _client.argument(args, kwargs, 0, "offsets")


def _attributes(partition: int | None, offsets: Offsets) -> Attributes:
    """What belongs to the partition, where there is one."""
    if partition is None:
        return {}
    (offset,) = offsets.values()
    # Kafka's committed offset is that of the record to go on with; the
    # convention's, that of the last record that the commit covers.
    return add_message({}, offset - 1)


class TransactionWrappers:
    """The wrappers of the producer's methods that settle a transaction (2.2 and later).

    The convention says nothing of transactions: these spans are our own.

    Args:
        telemetry: What the instrumentation works with.
    """

    METHODS = (
        "send_offsets_to_transaction",
        "commit_transaction",
        "abort_transaction",
    )

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def call(
        self, method: str, wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """Wrap one of `METHODS`."""
        operation = None
        try:
            if self._telemetry.may_begin():
                operation = self._start(method, instance, args, kwargs)
        except Exception:
            report("trace a transaction")
        try:
            result = wrapped(*args, **kwargs)
        except BaseException as error:
            if operation is not None:
                operation.fail(error)
                operation.end()
            raise
        if operation is not None:
            operation.end()
        return result

    def _start(
        self, method: str, instance: Any, args: Args, kwargs: Kwargs
    ) -> Operation | None:
        telemetry = self._telemetry
        if telemetry.config.commit_spans == "none":
            return None
        client = telemetry.clients.get(instance)
        attributes: Attributes = {}
        if method == "send_offsets_to_transaction":
            partitions = _client.offsets_by_partition(_offsets(args, kwargs))
            if partitions and not any(
                telemetry.facts(client, COMMIT, *partition) for partition in partitions
            ):
                return None
            group = _client.transaction_group(args, kwargs)
            if group is not None:
                attributes[MESSAGING_CONSUMER_GROUP_NAME] = group
        facts = telemetry.facts(client, Kind(method, None), None, None)
        if facts is None:
            return None
        started = time.time_ns()
        span = telemetry.start_span(
            facts, SpanKind.CLIENT, started, facts.attributes | attributes
        )
        return Operation(facts, span, started)
