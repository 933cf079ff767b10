"""The metrics of all orders, and where the orders wait."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from story import Plan, expect, values

# Each topic, and the service behind it.
HOPS = {"orders": "payments", "payments": "shipping"}
PROCESSING = "messaging.process.duration process"
WAITING = "kafka.record.queue_time"
LATENCY = "kafka.pipeline.latency"


@dataclass
class Measured:
    """A metric of a service, over all its series. Histograms are in seconds.

    `buckets` has the number of measurements between two bounds.
    """

    count: float = 0
    total: float = 0
    lowest: float = math.inf
    highest: float = 0
    buckets: Counter[tuple[float, float]] = field(default_factory=Counter)

    @property
    def mean(self) -> float:
        return self.total / self.count

    def __add__(self, other: Measured) -> Measured:
        buckets = Counter(self.buckets)
        buckets.update(other.buckets)  # `+` would drop those that are empty
        return Measured(
            self.count + other.count,
            self.total + other.total,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            buckets,
        )

    def quantile(self, share: float) -> float:
        """Estimate the value that a share of the measurements does not exceed.

        Like Prometheus, this assumes an even distribution within a bucket.
        """
        wanted = share * sum(self.buckets.values())
        for (above, upto), count in sorted(self.buckets.items()):
            if count >= wanted:
                low, high = max(above, self.lowest), min(upto, self.highest)
                return low + (high - low) * wanted / count
            wanted -= count
        return self.highest


Metrics = dict[str, dict[str, Measured]]
"""By service, then by metric and operation, with "failed" for failures."""


class Reader:
    """Reads the metrics that an OTLP receiver has recorded. The last point counts."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str, frozenset[tuple[str, Any]]], Measured] = {}

    def take(self, received: Iterable[Any]) -> None:
        for each in received:
            resource = values(each.resource.attributes)
            kind = each.metric.WhichOneof("data")
            for point in getattr(each.metric, kind).data_points:
                attributes = values(point.attributes)
                operation = attributes.get("messaging.operation.name", "")
                failed = "failed" if "error.type" in attributes else ""
                name = " ".join(filter(None, (each.metric.name, operation, failed)))
                # Several processes may be the same service.
                process = ("process", resource["service.instance.id"])
                series = frozenset({*attributes.items(), process})
                self._last[resource["service.name"], name, series] = (
                    _histogram(point)
                    if kind == "histogram"
                    else Measured(point.as_int or point.as_double)
                )

    def metrics(self) -> Metrics:
        found: Metrics = {}
        for (service, name, _), one in self._last.items():
            of_service = found.setdefault(service, {})
            of_service[name] = of_service.get(name, Measured()) + one
        return found


def _histogram(point: Any) -> Measured:
    bounds = [0.0, *point.explicit_bounds, math.inf]
    pairs = pairwise(bounds)
    buckets = dict(zip(pairs, point.bucket_counts, strict=True))
    return Measured(point.count, point.sum, point.min, point.max, Counter(buckets))


def check_rush(metrics: Metrics, plan: Plan) -> None:
    """Check that the orders before the checkout are shipped."""
    shipped = metrics.get("shipping", {}).get(PROCESSING, Measured()).count
    expect(shipped == plan.rush, f"{shipped:g} of {plan.rush} orders are shipped")


def check(metrics: Metrics, plan: Plan) -> None:
    """Check the metrics, as `story.check` checks the traces."""
    expected = {
        ("orders", "messaging.client.sent.messages send"): plan.delivered,
        ("orders", "messaging.client.sent.messages send failed"): plan.refused,
        ("payments", "messaging.client.consumed.messages poll"): plan.delivered,
        ("payments", "messaging.client.sent.messages send"): plan.paid,
        ("payments", PROCESSING): plan.paid,
        ("payments", f"{PROCESSING} failed"): plan.declined,
        ("payments", WAITING): plan.delivered,
        ("shipping", "messaging.client.consumed.messages poll"): plan.paid,
        ("shipping", PROCESSING): plan.paid,
        ("shipping", WAITING): plan.paid,
        ("shipping", LATENCY): plan.paid,
    }
    for (service, name), count in expected.items():
        measured = metrics.get(service, {}).get(name, Measured())
        expect(
            measured.count == count,
            f"{name} of {service} is {measured.count:g}, not {count}",
        )


@dataclass
class Hop:
    """A topic and the service behind it, with the times of waiting and processing."""

    topic: str
    service: str
    waiting: Measured
    processing: Measured


def hops(metrics: Metrics) -> list[Hop]:
    """The hops of the pipeline, in their order."""
    found = []
    for topic, service in HOPS.items():
        measured = metrics[service]
        failed = measured.get(f"{PROCESSING} failed", Measured())
        processing = measured[PROCESSING] + failed
        found.append(Hop(topic, service, measured[WAITING], processing))
    return found


def latency(metrics: Metrics) -> Measured:
    """The latency of orders from their send to the end of their shipping."""
    return metrics["shipping"][LATENCY]


def slowest(found: list[Hop]) -> Hop:
    """The hop that delays the pipeline most: messages wait the longest for it."""
    return max(found, key=lambda hop: hop.waiting.quantile(0.5))
