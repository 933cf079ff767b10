"""The list of what is patched; it is applied here, and only its own layer reverted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import wrapt

from otel_kafka_python._consumer import ConsumerWrappers
from otel_kafka_python._operation import Telemetry
from otel_kafka_python._producer import ProducerWrappers

# The base of all of wrapt's proxies; before wrapt 2 it had another name.
_PROXY: Any = getattr(wrapt, "BaseObjectProxy", wrapt.ObjectProxy)


class Layer(NamedTuple):
    """A wrapper of ours on a method."""

    owner: type
    method: str
    wrapper: Any


def apply(telemetry: Telemetry) -> list[Layer]:
    """Patch the clients' classes.

    Living instances, and names imported earlier, are patched with them.

    Args:
        telemetry: What the wrappers work with.

    Returns:
        The layers that were put on, to be reverted.
    """
    from kafka import KafkaConsumer, KafkaProducer  # noqa: PLC0415 (may be missing)

    producer, consumer = ProducerWrappers(telemetry), ConsumerWrappers(telemetry)
    layers: list[Layer] = []
    try:
        for owner, method, wrapper in (
            (KafkaProducer, "send", producer.send),
            (KafkaConsumer, "poll", consumer.poll),
            (KafkaConsumer, "__iter__", consumer.iterate),
            (KafkaConsumer, "__next__", consumer.advance),
        ):
            layers.append(_wrap(owner, method, wrapper))
    except Exception:
        revert(layers)
        raise
    consumer.next_layer = layers[-1].wrapper
    return layers


def _wrap(owner: type, method: str, wrapper: Callable[..., Any]) -> Layer:
    layer = wrapt.FunctionWrapper(vars(owner)[method], wrapper)
    setattr(owner, method, layer)
    return Layer(owner, method, layer)


def revert(layers: list[Layer]) -> None:
    """Take our layers off, and nobody else's.

    A layer that someone has put another one on, which is no wrapt wrapper, stays
    where it is; since the instrumentation is no longer active, it only passes on.

    Args:
        layers: What `apply` returned.
    """
    for layer in layers:
        outermost: Any = vars(layer.owner).get(layer.method)
        # Whoever reads the attribute of the class to put it back, puts back ours
        # as bound to the class (OpenTelemetry's `unwrap` does).
        bound = isinstance(outermost, wrapt.BoundFunctionWrapper)
        unbound = outermost._self_parent if bound else outermost
        if unbound is layer.wrapper:
            setattr(layer.owner, layer.method, layer.wrapper.__wrapped__)
            continue
        above: Any = outermost
        while isinstance(above, _PROXY):
            if above.__wrapped__ is layer.wrapper:
                above.__wrapped__ = layer.wrapper.__wrapped__
                break
            above = above.__wrapped__
