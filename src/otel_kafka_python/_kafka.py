"""kafka-python's insides, and what differs between its versions.

This is the only module that touches anything private of kafka-python. Nothing
in it asks the network or a name server: what the client has not learned yet is
None. kafka-python is imported when it is first needed, because the launcher
loads our entry points where it is not installed, too.
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

# Before this version of the broker's protocol records have no headers, and
# `send` refuses them.
_FIRST_VERSION_WITH_HEADERS = (0, 11)

# Where the names that kafka-python gives to the broker's errors are not, or not
# in all of its versions, those of the Kafka protocol.
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

# The methods by which a batch of messages completes their futures, in all versions.
_BATCH_ENDS = ("done", "_complete_future")

# What a consumer's coordinator commits offsets by, in all versions up to 3.0, and
# what it reads committed ones by.
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
# From 3.0 on these are coroutines, and what is auto-committed before a rebalance goes
# through no other.
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


class Settings(NamedTuple):
    """The part of a client's configuration that its telemetry carries."""

    client_id: str | None
    group: str | None
    bootstrap: Server | None
    cluster: Callable[[], Any]  # gives its ClusterMetadata, or None
    is_answered: bool  # whether brokers acknowledge what it sends
    # Whether its `send` runs serialisers or a partitioner of the application's.
    is_extended: bool


def settings(instance: Any) -> Settings:
    """The configuration of a producer, a consumer, or a consumer's coordinator."""
    config = instance.config
    # The producer has its cluster's metadata, the consumer that of its client.
    cluster = getattr(instance, "_metadata", None)
    network = getattr(instance, "_client", None)
    if cluster is None:
        cluster = getattr(network, "cluster", None)
    if "bootstrap_servers" not in config:  # a coordinator, which has fewer settings
        # Since 3.0 the client has a manager that has the settings.
        manager: Any = getattr(network, "_manager", network)
        config = {**manager.config, **config}
    return Settings(
        client_id=plain(config.get("client_id")),
        group=plain(config.get("group_id")),
        bootstrap=parse_bootstrap_servers(config.get("bootstrap_servers")),
        cluster=(lambda: None) if cluster is None else weakref.ref(cluster),
        is_answered=config.get("acks") != 0,
        is_extended=(
            config.get("key_serializer") is not None
            or config.get("value_serializer") is not None
            or not type(config.get("partitioner")).__module__.startswith("kafka.")
        ),
    )


def sends_headers(instance: Any) -> bool:
    """Whether the broker of a client takes records with headers."""
    version = instance.config.get("api_version")
    return not isinstance(version, tuple) or version >= _FIRST_VERSION_WITH_HEADERS


def last_refresh(cluster: Any) -> object:
    """When a client's metadata was refreshed; None if that is not known."""
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


def parse_bootstrap_servers(servers: Any) -> Server | None:
    """The first of the configured bootstrap servers.

    Args:
        servers: As kafka-python takes it: "host:port", several of these with
            commas, or a collection of such, each perhaps behind "PROTOCOL://",
            an IPv6 address in brackets.
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
    """A str of no subclass, which in a metric would be an attribute of its own."""
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
    """A partition as an int of no subclass, or None where it is no number.

    kafka-python takes whatever is equal to the number of a partition: True is 1, and
    an enumeration, a float or an integer of numpy's is as good as an int.
    """
    if isinstance(partition, int):
        return int.__int__(partition)
    try:
        number = int(partition)
        return number if number == partition else None
    except Exception:  # a class of the application's may raise whatever it likes
        raise_signalled()
        return None


class SendArguments(NamedTuple):
    """The arguments of a call of `send`, None where it was given none."""

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
    """Bind the arguments of a call of `send`, whose parameters begin so everywhere."""
    return SendArguments(topic, key, headers, partition)


def send_headers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The headers that a call of `send` was given, or None."""
    return argument(args, kwargs, _HEADERS_POSITION, "headers")


def with_headers(
    args: tuple[Any, ...], kwargs: dict[str, Any], headers: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `send` with other headers, wherever these were."""
    at = _HEADERS_POSITION
    if len(args) > at:
        return (*args[:at], headers, *args[at + 1 :]), kwargs
    return args, {**kwargs, "headers": headers}


def offsets_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The offsets that a commit, or what sends them to a transaction, was given."""
    return argument(args, kwargs, 0, "offsets")


def iterates_by_polls(consumer: Any) -> bool:
    """Whether iteration polls inside; `legacy_iterator` (2.0 and ng) does not."""
    return not consumer.config.get("legacy_iterator")


def record_future_class() -> type:
    """The class of the futures that `send` returns."""
    from kafka.producer.future import FutureRecordMetadata  # noqa: PLC0415

    return FutureRecordMetadata  # type: ignore[no-any-return]  # untyped


def when_done(future: Any, callback: Callable[[Any], None]) -> None:
    """Call back once with the result or the exception of a future.

    A future that is done already calls back at once. What stands on the class of
    `send`'s futures for the application's callbacks is passed by.
    """
    _adder()(future, callback, callback)


@cache
def _adder() -> Callable[[Any, Any, Any], object]:
    """What adds a callback and an errback to a future."""
    from kafka.future import Future  # noqa: PLC0415 (see the top)

    def add(future: Any, callback: Any, errback: Any) -> None:
        Future.add_callback(future, callback)
        Future.add_errback(future, errback)

    # From 3.0 on with one lock.
    return getattr(Future, "_add_cb_eb", add)


class PendingSend(NamedTuple):
    """What is known of a message before the broker has acknowledged it."""

    # Of a future that had failed before `send` returned it, it may be anything that
    # the application gave.
    partition: Any
    size: int  # of the serialised value in bytes, -1 if it is null
    # Of a future that had failed before `send` returned it: the client has refused it.
    error: BaseException | None
    batch: Any  # the future of the batch that the message is in


def pending_send(future: Any) -> PendingSend:
    """What the future that `send` has returned knows of its message."""
    batch = future._produce_future
    _, partition = batch.topic_partition
    error = future.exception if future.is_done and not batch.is_done else None
    failed = isinstance(error, BaseException)
    return PendingSend(partition, future.args[4], error if failed else None, batch)


class FailedSend(NamedTuple):
    """How far a message has come that is not delivered."""

    was_sent: bool  # to a broker, or may have been
    is_answered: bool  # by the partition's leader, with the error


def failed_send(error: BaseException, result: Any) -> FailedSend:
    """How far a message had come whose future fails now, on this thread.

    Args:
        error: The exception that it fails with.
        result: The future of its batch, if `send` has only just returned: the batch
            may have failed on another thread meanwhile.
    """
    batch = _failing_batch()
    # Since 2.2 a batch that the client gives up, for whatever reason, is in a state of
    # its own, and has the offset -1.
    if batch is None:
        aborted = (getattr(result, "value", None) or (None,))[0] == -1
        was_sent = not aborted
    else:
        state = getattr(batch, "final_state", None)
        aborted = getattr(state, "name", None) == "ABORTED"
        was_sent = batch.drained is not None
    return FailedSend(was_sent, is_answered=not aborted and is_answer(error))


def _failing_batch() -> Any:
    """The batch of the producer's that fails now, on this thread, if it can be found.

    Nothing leads from a future to its batch: it is looked for among the callers.
    """
    from kafka.producer.record_accumulator import ProducerBatch  # noqa: PLC0415

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _BATCH_ENDS:
            caller = frame.f_locals.get("self")
            if isinstance(caller, ProducerBatch):
                return caller
        frame = frame.f_back
    return None


def coordinator_class() -> type | None:
    """The class by which consumers commit, or None if it is not one that is known."""
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
    """Whether a call of `commit_offsets_async` is by the client itself."""
    callback = argument(args, kwargs, 1, "callback")
    # By what it is, because what the application passes may compare in its own way.
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
    """The offsets that are to be committed, by topic and partition.

    Args:
        offsets: A dict of OffsetAndMetadata by TopicPartition. Of anything else,
            which kafka-python refuses, there are none.
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
    """Whether it is a "producer" or a "consumer"; None of what is neither."""
    from kafka import KafkaConsumer, KafkaProducer  # noqa: PLC0415 (see the top)

    if isinstance(instance, KafkaProducer):
        return "producer"
    return "consumer" if isinstance(instance, KafkaConsumer) else None


class ClientMetric(NamedTuple):
    """A value of a metric that a client keeps itself."""

    value: float
    tags: dict[str, str]  # `topic`, `partition`, `node-id`, where it is of one


def client_metrics(instance: Any, kind: str, name: str) -> list[ClientMetric]:
    """The values of one metric of a producer or consumer.

    Args:
        instance: The client.
        kind: "producer" or "consumer".
        name: The metric's name, as kafka-python has it.
    """
    found = []
    topics: dict[str, str] | None = None
    # None where the client was told to keep none (3.0 and later).
    for metric, keeper in (instance.metrics(raw=True) or {}).items():
        if metric.name != name or not metric.group.startswith(kind):
            continue
        tags = {}
        if topic := metric.tags.get("topic"):
            if topics is None:
                topics = _topics_by_tag(instance)
            tags["topic"] = topics.get(topic, topic)
        # Of a node or a topic the group is named, too.
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
    """The topics by their tags, in which kafka-python has replaced each dot.

    A tag that several topics share is left out.
    """
    topics = {partition.topic for partition in list(_assigned(consumer))}
    tags = {topic: topic.replace(".", "_") for topic in topics}
    shared = Counter(tags.values())
    return {tag: topic for topic, tag in tags.items() if shared[tag] == 1}


def _assigned(consumer: Any) -> dict[Any, Any]:
    assigned: dict[Any, Any] = consumer._subscription.assignment
    return assigned


def record_lags(consumer: Any) -> list[ClientMetric]:
    """How many records each partition has that the consumer has not been given.

    As far as the last fetch has told: no request is made. A consumer that is closed
    has none, as it has none of its own metrics any more.
    """
    lags: list[ClientMetric] = []
    if consumer._closed:
        return lags
    for (topic, partition), state in list(_assigned(consumer).items()):
        # Up to 2.0 it is an int.
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
    group = getattr(group, "group_id", group)  # since 3.0 it may be more than a name
    return plain(group) if isinstance(group, str) else None


def error_type(error: BaseException) -> str:
    """Kafka's name of an error where it has one, else the name of its class."""
    code = _error_code(error)
    if code is not None:
        # A code that kafka-python does not know has a class with no name of its own.
        name = _KAFKA_ERROR_NAMES.get(code) or vars(type(error)).get("message")
        if isinstance(name, str):
            return name
    return type(error).__qualname__


def is_answer(error: BaseException) -> bool:
    """Whether an error that ended a send or a commit is the broker's own answer.

    Up to 2.1 a batch that expires in the client fails with the broker's error
    for a time-out, so that one says nothing of where it is from.
    """
    return _error_code(error) not in (None, _REQUEST_TIMED_OUT)


def _error_code(error: BaseException) -> int | None:
    """The number that the Kafka protocol has for an error, if it has one."""
    from kafka.errors import BrokerResponseError  # noqa: PLC0415 (see the top)

    code = error.errno if isinstance(error, BrokerResponseError) else None
    return code if isinstance(code, int) else None
