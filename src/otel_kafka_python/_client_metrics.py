"""kafka-python's own metrics, observed when they are collected.

The names are those of the OpenTelemetry Java agent for the Java client, from which
kafka-python took its metrics. All of them are gauges: kafka-python has rates, averages
and maxima. This module adds the lag of consumers, in records and in seconds. Nothing
here makes a request to the broker.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from otel_kafka_python import _kafka
from otel_kafka_python._attributes import client_metric_attributes, queue_seconds
from otel_kafka_python._clients import Client
from otel_kafka_python._kafka import ClientMetric
from otel_kafka_python._safety import report

_OF_CONNECTIONS = (
    *("connection-close-rate", "connection-count", "connection-creation-rate"),
    *("incoming-byte-rate", "outgoing-byte-rate", "network-io-rate"),
    *("request-latency-avg", "request-latency-max", "request-rate"),
    *("request-size-avg", "request-size-max", "response-rate"),
    *("throttle-time-avg", "throttle-time-max"),
    # Up to 2.3.
    *("io-ratio", "io-time-ns-avg", "io-wait-ratio", "io-wait-time-ns-avg"),
    "select-rate",
)
NAMES = {
    "producer": (
        *_OF_CONNECTIONS,
        *("batch-size-avg", "batch-size-max", "bufferpool-wait-ratio", "byte-rate"),
        *("compression-rate", "compression-rate-avg", "metadata-age"),
        *("produce-throttle-time-avg", "produce-throttle-time-max"),
        *("record-error-rate", "record-queue-time-avg", "record-queue-time-max"),
        *("record-retry-rate", "record-send-rate", "record-size-avg"),
        *("record-size-max", "records-per-request-avg", "requests-in-flight"),
    ),
    "consumer": (
        *_OF_CONNECTIONS,
        *("assigned-partitions", "bytes-consumed-rate", "commit-latency-avg"),
        *("commit-latency-max", "commit-rate", "fetch-latency-avg"),
        *("fetch-latency-max", "fetch-rate", "fetch-size-avg", "fetch-size-max"),
        *("fetch-throttle-time-avg", "fetch-throttle-time-max", "heartbeat-rate"),
        *("heartbeat-response-time-max", "join-rate", "join-time-avg"),
        *("join-time-max", "last-heartbeat-seconds-ago", "records-consumed-rate"),
        *("records-lag-max", "records-per-request-avg", "sync-rate"),
        *("sync-time-avg", "sync-time-max"),
        # Calculated here: kafka-python has only the maximum of the first.
        *("records-lag", "time-lag"),
    ),
}

# kafka-python has these in seconds, and the Java client, like kafka-python's own
# description, in milliseconds.
_IN_SECONDS = ("record-queue-time-avg", "record-queue-time-max")

_UNITS = {"time-lag": "s"}

Living = Callable[[], Iterable[tuple[Any, Client]]]


class ClientMetrics:
    """The gauges of a meter, which outlive one instrumentation.

    An SDK accepts no second callback for an instrument of the same name, and cannot
    remove one.

    Args:
        meter: Makes the gauges.
    """

    def __init__(self, meter: Meter) -> None:
        self._living: Callable[[], Living | None] = lambda: None
        for kind, names in NAMES.items():
            for name in names:
                meter.create_observable_gauge(
                    f"kafka.{kind}.{name.replace('-', '_')}",
                    [partial(self._observe, kind, name)],
                    _UNITS.get(name, ""),
                )

    def observe(self, living: Living) -> None:
        """Observe other clients from now on.

        The reference is weak, because the owner of the clients also owns the provider,
        which would otherwise never be released.
        """
        self._living = weakref.WeakMethod(living)

    def _observe(
        self, kind: str, name: str, _options: CallbackOptions
    ) -> list[Observation]:
        living = self._living()
        return [
            observation
            for instance, client in (living() if living else ())
            for observation in _observations(instance, client, kind, name)
        ]


def _observations(
    instance: Any, client: Client, kind: str, name: str
) -> list[Observation]:
    try:
        if _kafka.kind_of(instance) == kind:
            return list(_read(instance, client, kind, name))
    except Exception:
        report("read the metrics of a client")
    return []


def _read(instance: Any, client: Client, kind: str, name: str) -> Iterator[Observation]:
    if name == "records-lag":
        found = _kafka.record_lags(instance)
    elif name == "time-lag":
        found = list(_time_lags(instance, client))
    else:
        found = _kafka.client_metrics(instance, kind, name)
    # If there is one value for each topic or node, their sum would be counted twice.
    most = max((len(each.tags) for each in found), default=0)
    for each in found:
        if len(each.tags) == most and math.isfinite(each.value):
            value = each.value * 1e3 if name in _IN_SECONDS else each.value
            attributes = client_metric_attributes(
                each, client.client_id, client.cluster_id, client.group
            )
            yield Observation(value, attributes)


def _time_lags(consumer: Any, client: Client) -> Iterator[ClientMetric]:
    """The age of the last record of each partition that the application got.

    It is 0 if the consumer is up to date: it knows of no more records, and the
    application has asked for more since. Without the second condition, a consumer that
    is stuck in the last known record would seem to be up to date.
    """
    now = time.time_ns()
    for records, tags in _kafka.record_lags(consumer):
        handed = client.last_records.get((tags["topic"], int(tags["partition"])))
        if records == 0 and (handed is None or handed.asked != client.asked):
            yield ClientMetric(0.0, tags)
        elif handed is not None:
            seconds = queue_seconds(handed.timestamp, now)
            if seconds is not None:
                yield ClientMetric(seconds, tags)


_by_provider: weakref.WeakKeyDictionary[Any, ClientMetrics] = (
    weakref.WeakKeyDictionary()
)


def observe(provider: Any, meter: Meter, living: Living) -> None:
    """Observe the clients that are alive, whenever a provider collects.

    Args:
        provider: The meter provider.
        meter: The provider's meter.
        living: Gives the clients and their facts; none any more once the
            instrumentation has been taken off.
    """
    metrics = _by_provider.get(provider)
    if metrics is None:
        metrics = _by_provider[provider] = ClientMetrics(meter)
    metrics.observe(living)
