"""The list of patched methods, how it is applied, and how our own layer is reverted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import wrapt

from otel_kafka_python import _kafka
from otel_kafka_python._commits import CommitWrappers
from otel_kafka_python._consumer import ConsumerWrappers
from otel_kafka_python._producer import ProducerWrappers
from otel_kafka_python._telemetry import Telemetry
from otel_kafka_python._transactions import TransactionWrappers

Wrapper = Callable[..., Any]

# The base class of wrapt's proxies, which had another name before wrapt 2.
_PROXY: Any = getattr(wrapt, "BaseObjectProxy", wrapt.ObjectProxy)


class Layer(NamedTuple):
    """One of our wrappers on a method."""

    owner: type
    method: str
    wrapper: Any
    is_own: bool  # rather than inherited


def when_imported(patch: Callable[[], None]) -> None:
    """Patch kafka when the program imports it, or now if it has been imported.

    This package must not import kafka: at its import, kafka takes sockets and the
    selector from the standard library, which the program may patch first (gevent).

    Args:
        patch: Patches the clients. It must not raise, because the exception would
            reach the program's `import`.
    """
    wrapt.register_post_import_hook(lambda _module: patch(), "kafka")


def apply(telemetry: Telemetry) -> list[Layer]:
    """Patch the clients' classes.

    Existing instances and names that were imported earlier are patched with them.

    Args:
        telemetry: The telemetry that the wrappers share.

    Returns:
        The layers that were added, for `revert`.
    """
    layers: list[Layer] = []
    try:
        for owner, method, wrapper in _targets(telemetry):
            layers.append(_wrap(owner, method, wrapper))
    except Exception:
        revert(layers)
        raise
    return layers


def _targets(telemetry: Telemetry) -> Iterator[tuple[type, str, Wrapper]]:
    """The patched methods, each with its wrapper."""
    from kafka import KafkaConsumer, KafkaProducer  # noqa: PLC0415 (may be missing)

    producer, consumer = ProducerWrappers(telemetry), ConsumerWrappers(telemetry)
    commits, transactions = CommitWrappers(telemetry), TransactionWrappers(telemetry)
    futures, coordinator = _kafka.record_future_class(), _kafka.coordinator_class()

    yield KafkaProducer, "send", producer.send
    yield futures, "add_callback", producer.add_callback
    yield futures, "add_errback", producer.add_callback

    yield KafkaConsumer, "poll", consumer.poll
    yield KafkaConsumer, "__iter__", consumer.iterate
    yield KafkaConsumer, "__next__", consumer.advance
    if consumer.keeps_last_open:
        yield KafkaConsumer, "close", consumer.close

    if coordinator is None:
        yield KafkaConsumer, "commit", commits.commit_sync
        yield KafkaConsumer, "commit_async", commits.commit_async
    else:
        yield coordinator, _kafka.COMMIT_SYNC, commits.commit_sync
        yield coordinator, _kafka.COMMIT_ASYNC, commits.commit_async
        yield coordinator, _kafka.REQUEST_ASYNC, commits.request_async
        yield coordinator, _kafka.AUTO_COMMIT_SYNC, commits.auto_commit_sync
        for method, wrapper in (
            (_kafka.FETCH_COMMITTED, commits.fetch_committed),
            (_kafka.FETCH_COMMITTED_COROUTINE, commits.fetch_committed_coroutine),
            (_kafka.COMMIT_COROUTINE, commits.commit_coroutine),
        ):
            if hasattr(coordinator, method):
                yield coordinator, method, wrapper

    for method in _kafka.TRANSACTION_METHODS:
        if hasattr(KafkaProducer, method):
            yield KafkaProducer, method, partial(transactions.call, method)


def _wrap(owner: type, method: str, wrapper: Wrapper) -> Layer:
    is_own = method in vars(owner)
    layer = wrapt.FunctionWrapper(
        vars(owner)[method] if is_own else getattr(owner, method), wrapper
    )
    setattr(owner, method, layer)
    return Layer(owner, method, layer, is_own)


def revert(layers: list[Layer]) -> None:
    """Remove our layers and no others.

    If a layer above ours is not a wrapt wrapper, ours stays in place. The
    instrumentation is no longer active, so it only passes calls on.

    Args:
        layers: The layers that `apply` returned.
    """
    for layer in layers:
        outermost: Any = vars(layer.owner).get(layer.method)
        # Code that reads the attribute of the class and restores it later, such as
        # OpenTelemetry's `unwrap`, restores our wrapper as bound to the class.
        bound = isinstance(outermost, wrapt.BoundFunctionWrapper)
        unbound = outermost._self_parent if bound else outermost
        if unbound is layer.wrapper:
            if layer.is_own:
                setattr(layer.owner, layer.method, layer.wrapper.__wrapped__)
            else:
                delattr(layer.owner, layer.method)
            continue
        above: Any = outermost
        while isinstance(above, _PROXY):
            if above.__wrapped__ is layer.wrapper:
                above.__wrapped__ = layer.wrapper.__wrapped__
                break
            above = above.__wrapped__
