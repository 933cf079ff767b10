"""kafka-python's insides, and the differences between its versions.

This is the only module that uses private parts of kafka-python. It makes no network
call and no name look-up: facts that the client does not know yet are None. It imports
kafka-python on first use, because the launcher loads our entry points even if
kafka-python is not installed.
"""

from __future__ import annotations

import ipaddress
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import FrameType, MethodType
from typing import Any, NamedTuple

from otel_kafka_python._safety import raise_signalled

_DEFAULT_PORT = 9092

# Before this version of the broker's protocol, records have no headers, and `send`
# rejects them.
_FIRST_VERSION_WITH_HEADERS = (0, 11)

# The names of the Kafka protocol for errors that kafka-python, or some version of it,
# names differently.
_KAFKA_ERROR_NAMES = {
    -1: "UNKNOWN_SERVER_ERROR",
    6: "NOT_LEADER_OR_FOLLOWER",
    10: "MESSAGE_TOO_LARGE",
    13: "NETWORK_EXCEPTION",
    14: "COORDINATOR_LOAD_IN_PROGRESS",
    15: "COORDINATOR_NOT_AVAILABLE",
    16: "NOT_COORDINATOR",
    17: "INVALID_TOPIC_EXCEPTION",
    39: "INVALID_REPLICA_ASSIGNMENT",
}
_REQUEST_TIMED_OUT = 7

# The methods by which a batch completes the futures of its messages, in all versions.
_BATCH_ENDS = ("done", "_complete_future")

# The methods by which a consumer's coordinator commits offsets, in all versions up to
# 3.0, and by which it reads committed offsets.
COMMIT_SYNC = "commit_offsets_sync"
COMMIT_ASYNC = "commit_offsets_async"
REQUEST_ASYNC = "_do_commit_offsets_async"
AUTO_COMMIT_SYNC = "_maybe_auto_commit_offsets_sync"
_AUTO_COMMIT_CALLBACK = "_commit_offsets_async_on_complete"
_COMMITS = (
    COMMIT_SYNC,
    COMMIT_ASYNC,
    REQUEST_ASYNC,
    AUTO_COMMIT_SYNC,
    _AUTO_COMMIT_CALLBACK,
)
FETCH_COMMITTED = "fetch_committed_offsets"
# Coroutines of 3.0 and later. The auto-commit before a rebalance uses only these.
COMMIT_COROUTINE = "_commit_offsets_sync_async"
FETCH_COMMITTED_COROUTINE = "fetch_committed_offsets_async"


class Server(NamedTuple):
    """A broker, as the client addresses it."""

    address: str
    port: int

    @property
    def is_ip(self) -> bool:
        """Whether the address is an IP literal rather than a name."""
        try:
            ipaddress.ip_address(self.address)
        except ValueError:
            return False
        return True


class ClientConfig(NamedTuple):
    """The part of a client's configuration that its telemetry uses."""

    client_id: str | None = None
    group: str | None = None
    bootstrap: Server | None = None
    cluster: Callable[[], Any] = lambda: None  # returns its ClusterMetadata, or None
    is_acknowledged: bool = True  # whether brokers acknowledge its messages
    # Whether its `send` runs serialisers or a partitioner of the application.
    runs_application_code: bool = False


def _config(instance: Any) -> dict[str, Any]:
    """The configuration, which an instance lacks if its `__init__` never ran."""
    config: dict[str, Any] = getattr(instance, "config", {})
    return config


def client_config(instance: Any) -> ClientConfig:
    """The configuration of a producer, a consumer, or a consumer's coordinator."""
    config = _config(instance)
    # A producer has the cluster's metadata itself; a consumer's network client has it.
    cluster = getattr(instance, "_metadata", None)
    network = getattr(instance, "_client", None)
    if cluster is None:
        cluster = getattr(network, "cluster", None)
    if "bootstrap_servers" not in config:  # a coordinator, which has fewer entries
        # From 3.0, the entries are those of the network client's manager.
        manager: Any = getattr(network, "_manager", network)
        config = {**_config(manager), **config}
    return ClientConfig(
        client_id=plain(config.get("client_id")),
        group=plain(config.get("group_id")),
        bootstrap=first_bootstrap_server(config.get("bootstrap_servers")),
        cluster=(lambda: None) if cluster is None else weakref.ref(cluster),
        is_acknowledged=config.get("acks") != 0,
        runs_application_code=(
            config.get("key_serializer") is not None
            or config.get("value_serializer") is not None
            or not type(config.get("partitioner")).__module__.startswith("kafka.")
        ),
    )


def sends_headers(instance: Any) -> bool:
    """Whether the broker of a client supports records with headers."""
    version = _config(instance).get("api_version")
    return not isinstance(version, tuple) or version >= _FIRST_VERSION_WITH_HEADERS


def last_refresh(cluster: Any) -> object:
    """The time of the last metadata refresh of a client; None if it is unknown."""
    try:
        return cluster._last_successful_refresh_ms
    except AttributeError:  # there is no cluster, or it keeps no such time
        return None


def cluster_id(cluster: Any) -> str | None:
    """The id of a cluster from its metadata (2.1 and later)."""
    found = getattr(cluster, "cluster_id", None)
    return found if isinstance(found, str) else None


def leader(cluster: Any, topic: str, partition: int | None) -> Server | None:
    """The leader of a partition, if the metadata of the cluster knows it."""
    if cluster is None or partition is None:
        return None
    from kafka.structs import TopicPartition  # noqa: PLC0415 (see the top)

    node = cluster.leader_for_partition(TopicPartition(topic, partition))
    broker = None if node in (None, -1) else cluster.broker_metadata(node)
    return Server(broker.host, broker.port) if broker else None


def first_bootstrap_server(servers: Any) -> Server | None:
    """The first of the configured bootstrap servers.

    Args:
        servers: The value that kafka-python takes: "host:port", several of these
            separated by commas, or a collection of them. Each may begin with
            "PROTOCOL://", and an IPv6 address is in brackets.
    """
    entries = servers.split(",") if isinstance(servers, str) else servers
    for entry in entries or ():
        address = re.sub("^.*://", "", entry.strip())
        bracketed = re.fullmatch(r"\[(.+)\](?::(\d+))?", address)
        named = re.fullmatch(r"([^:]+)(?::(\d+))?", address)
        if match := bracketed or named:
            return Server(match[1], int(match[2] or _DEFAULT_PORT))
        return Server(address, _DEFAULT_PORT)
    return None


def plain(text: Any) -> Any:
    """A plain str: a str of a subclass would create a time series of its own."""
    return str.__str__(text) if isinstance(text, str) else text


# The position of `headers` among the arguments of `send`, in every version.
_HEADERS_POSITION = 3

# The producer's methods that settle a transaction (2.2 and later).
SEND_OFFSETS = "send_offsets_to_transaction"
TRANSACTION_METHODS = (SEND_OFFSETS, "commit_transaction", "abort_transaction")


def argument(
    args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str
) -> Any:
    """The argument of a call for a parameter, or None."""
    return args[position] if len(args) > position else kwargs.get(name)


def partition_number(partition: Any) -> int | None:
    """A partition as a plain int, or None if it is not a number.

    kafka-python accepts anything that equals the number of a partition: True, a member
    of an enumeration, a float or an integer of NumPy.
    """
    if isinstance(partition, int):
        return int.__int__(partition)
    try:
        number = int(partition)
        return number if number == partition else None
    except Exception:  # a class of the application may raise any exception
        raise_signalled()
        return None


class SendArguments(NamedTuple):
    """The arguments of a call of `send`; None for those that are missing."""

    topic: Any
    key: Any
    headers: Any
    partition: Any


def send_arguments(
    topic: Any = None,
    value: object = None,  # noqa: ARG001 (as `send` takes it)
    key: Any = None,
    headers: Any = None,
    partition: Any = None,
    *_: object,
    **__: object,
) -> SendArguments:
    """Bind the arguments of `send`, whose parameters begin this way in each version."""
    return SendArguments(topic, key, headers, partition)


def send_headers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The headers that a call of `send` was given, or None."""
    return argument(args, kwargs, _HEADERS_POSITION, "headers")


def with_headers(
    args: tuple[Any, ...], kwargs: dict[str, Any], headers: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `send` with other headers, by position or by name."""
    at = _HEADERS_POSITION
    if len(args) > at:
        return (*args[:at], headers, *args[at + 1 :]), kwargs
    return args, {**kwargs, "headers": headers}


def offsets_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The offsets that a commit or `send_offsets_to_transaction` was given."""
    return argument(args, kwargs, 0, "offsets")


def iterates_by_polls(consumer: Any) -> bool:
    """Whether iteration polls inside; `legacy_iterator` (2.0 and ng) does not."""
    return not _config(consumer).get("legacy_iterator")


def assigned_topics(consumer: Any) -> set[str]:
    """The topics of the partitions that a consumer has."""
    if not hasattr(consumer, "config"):  # its `__init__` never ran
        return set()
    return {partition.topic for partition in consumer.assignment()}


def record_future_class() -> type:
    """The class of the futures that `send` returns."""
    from kafka.producer.future import FutureRecordMetadata  # noqa: PLC0415

    return FutureRecordMetadata  # type: ignore[no-any-return]  # untyped


def when_done(future: Any, callback: Callable[[Any], None]) -> None:
    """Call back once with the result or the exception of a future.

    If the future is already done, this calls back at once. The future itself would log
    what the callback raises, even the exception of a signal handler.
    """
    if future.is_done:
        callback(future.value if future.exception is None else future.exception)
    else:
        # This bypasses our wrappers for the application's callbacks.
        _adder()(future, callback, callback)


class _CalledOnce:
    """A callback that is released by its call.

    Up to 2.1, a future keeps its callbacks as long as the application keeps the future.
    The finaliser of an operation would run later, on the application's thread, where an
    exception that a signal handler raises in it is lost.
    """

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[Any], None]) -> None:
        self._callback = callback

    def __call__(self, outcome: Any) -> None:
        callback = self._callback
        del self._callback
        callback(outcome)


@cache
def _adder() -> Callable[[Any, Any, Any], object]:
    """The function that adds a callback and an errback to a future."""
    from kafka.future import Future  # noqa: PLC0415 (see the top)

    keeps_callbacks = Future().success(None)._callbacks is not None

    def add(future: Any, callback: Any, errback: Any) -> None:
        if keeps_callbacks:
            callback = errback = _CalledOnce(callback)
        Future.add_callback(future, callback)
        Future.add_errback(future, errback)

    # From 3.0, with one lock.
    return getattr(Future, "_add_cb_eb", add)


class PendingSend(NamedTuple):
    """The known facts about a message before the broker acknowledges it."""

    # If the future failed before `send` returned it, this may be any value that the
    # application passed.
    partition: Any
    size: int  # of the serialised value in bytes, -1 if it is null
    # Set if the future failed before `send` returned it: the client rejected it.
    error: BaseException | None
    batch: Any  # the future of the batch that the message is in


def pending_send(future: Any) -> PendingSend:
    """The facts about a message that the future of its `send` has."""
    batch = future._produce_future
    _, partition = batch.topic_partition
    error = future.exception if future.is_done and not batch.is_done else None
    failed = isinstance(error, BaseException)
    return PendingSend(partition, future.args[4], error if failed else None, batch)


class FailedSend(NamedTuple):
    """How far an undelivered message came."""

    was_sent: bool  # to a broker, or may have been
    is_answered: bool  # by the partition's leader, with the error


def failed_send(error: BaseException, result: Any) -> FailedSend:
    """How far a message came whose future fails now, on this thread.

    Args:
        error: The exception that it fails with.
        result: The future of its batch, if `send` has just returned. The batch may have
            failed on another thread meanwhile.
    """
    batch = _failing_batch()
    # From 2.2, a batch that the client gives up has a state of its own, and the
    # offset -1.
    if batch is None:
        aborted = (getattr(result, "value", None) or (None,))[0] == -1
        was_sent = not aborted
    else:
        state = getattr(batch, "final_state", None)
        aborted = getattr(state, "name", None) == "ABORTED"
        was_sent = batch.drained is not None
    return FailedSend(was_sent, is_answered=not aborted and is_answer(error))


def _failing_batch() -> Any:
    """The producer's batch that fails now, on this thread, if it can be found.

    A future has no reference to its batch, so the batch is looked for in the callers'
    frames.
    """
    from kafka.producer.record_accumulator import ProducerBatch  # noqa: PLC0415

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _BATCH_ENDS and isinstance(
            batch := frame.f_locals.get("self"), ProducerBatch
        ):
            return batch
        frame = frame.f_back
    return None


def coordinator_class() -> type | None:
    """The class by which consumers commit, or None if it lacks a known method."""
    try:
        from kafka.coordinator.consumer import ConsumerCoordinator  # noqa: PLC0415
    except ImportError:
        return None
    if all(hasattr(ConsumerCoordinator, name) for name in _COMMITS):
        return ConsumerCoordinator  # type: ignore[no-any-return]  # untyped
    return None


def is_auto_commit(
    coordinator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the client itself calls `commit_offsets_async`."""
    callback = argument(args, kwargs, 1, "callback")
    # `==` is avoided, because an object of the application may define it.
    return (
        isinstance(callback, MethodType)
        and callback.__self__ is coordinator
        and callback.__name__ == _AUTO_COMMIT_CALLBACK
    )


def coordinator_broker(coordinator: Any) -> Server | None:
    """The broker that coordinates the group, if it is known."""
    node = getattr(coordinator, "coordinator_id", None)
    if node is None:
        return None
    broker = coordinator._client.cluster.broker_metadata(node)
    return Server(broker.host, broker.port) if broker else None


def offsets_by_partition(offsets: Any) -> dict[tuple[str, int], int]:
    """The offsets to commit, by topic and partition.

    Args:
        offsets: A dict of OffsetAndMetadata by TopicPartition. Anything else counts as
            empty: kafka-python rejects it.
    """
    if not isinstance(offsets, Mapping):
        return {}
    try:
        return {
            (topic, partition): int(committed.offset)
            for (topic, partition), committed in offsets.items()
        }
    except (AttributeError, TypeError, ValueError):
        return {}


def kind_of(instance: Any) -> str | None:
    """Return "producer" or "consumer", or None for anything else."""
    from kafka import KafkaConsumer, KafkaProducer  # noqa: PLC0415 (see the top)

    if isinstance(instance, KafkaProducer):
        return "producer"
    return "consumer" if isinstance(instance, KafkaConsumer) else None


class ClientMetric(NamedTuple):
    """A value of one of a client's own metrics."""

    value: float
    tags: dict[str, str]  # `topic`, `partition` and `node-id`, where they apply


def client_metrics(instance: Any, kind: str, name: str) -> list[ClientMetric]:
    """The values of one metric of a producer or consumer.

    Args:
        instance: The client.
        kind: "producer" or "consumer".
        name: The metric's name in kafka-python.
    """
    found = []
    topics: dict[str, str] | None = None
    # None if the client keeps no metrics (3.0 and later).
    for metric, keeper in (instance.metrics(raw=True) or {}).items():
        if metric.name != name or not metric.group.startswith(kind):
            continue
        tags = {}
        if topic := metric.tags.get("topic"):
            if topics is None:
                topics = _topics_by_tag(instance)
            tags["topic"] = topics.get(topic, topic)
        # A metric of a node or a topic has its name in the group.
        _, _, of_node = metric.group.partition("-node-metrics.")
        _, _, of_topic = metric.group.partition("-topic-metrics.")
        if of_node:
            tags["node-id"] = of_node
        if of_topic:
            tags["topic"] = of_topic
        value = keeper.value()
        if isinstance(value, (int, float)):
            found.append(ClientMetric(value, tags))
    return found


def _topics_by_tag(consumer: Any) -> dict[str, str]:
    """The topics by their tags, in which kafka-python replaces each dot.

    Tags that several topics share are left out.
    """
    topics = {partition.topic for partition in list(_assigned(consumer))}
    tags = {topic: topic.replace(".", "_") for topic in topics}
    shared = Counter(tags.values())
    return {tag: topic for topic, tag in tags.items() if shared[tag] == 1}


def _assigned(consumer: Any) -> dict[Any, Any]:
    assigned: dict[Any, Any] = consumer._subscription.assignment
    return assigned


def record_lags(consumer: Any) -> list[ClientMetric]:
    """The number of records of each partition that the consumer has yet to get.

    The numbers are from the last fetch: this makes no request. A closed consumer has no
    lags, just as it has no metrics of its own.
    """
    lags: list[ClientMetric] = []
    if consumer._closed:
        return lags
    for (topic, partition), state in list(_assigned(consumer).items()):
        # Up to 2.0, the position is an int.
        position = getattr(state._position, "offset", state._position)
        if position is not None and state.highwater is not None:
            tags = {"topic": topic, "partition": str(partition)}
            lags.append(ClientMetric(max(0, state.highwater - position), tags))
    return lags


def transaction_group(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The group whose offsets `send_offsets_to_transaction` is called with."""
    group = argument(args, kwargs, 1, "consumer_group_id")
    if group is None:
        group = argument(args, kwargs, 1, "group_metadata")
    group = getattr(group, "group_id", group)  # from 3.0, it may be more than a name
    return plain(group) if isinstance(group, str) else None


def error_type(error: BaseException) -> str:
    """Kafka's name of an error if it has one, else the name of its class."""
    code = _error_code(error)
    if code is not None:
        # For a code that kafka-python does not know, it makes a class without a name.
        name = _KAFKA_ERROR_NAMES.get(code) or vars(type(error)).get("message")
        if isinstance(name, str):
            return name
    return type(error).__qualname__


def is_answer(error: BaseException | None) -> bool:
    """Whether an error that ended a send or a commit is the broker's own answer.

    Up to 2.1, a batch that expires in the client fails with the broker's error for a
    time-out, so the origin of that error is unknown.
    """
    return _error_code(error) not in (None, _REQUEST_TIMED_OUT)


def _error_code(error: BaseException | None) -> int | None:
    """The number of an error in the Kafka protocol, if it has one."""
    from kafka.errors import BrokerResponseError  # noqa: PLC0415 (see the top)

    code = error.errno if isinstance(error, BrokerResponseError) else None
    return code if isinstance(code, int) else None
