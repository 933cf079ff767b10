"""Holds spans, links and metrics against the facts of the convention.

Whatever the tests produce goes through here: the recorder that they share calls
`check_spans` and `check_metrics` with all that it has seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry._logs import LogRecord
from opentelemetry.sdk.metrics.export import Metric, Sum
from opentelemetry.trace import SpanKind, StatusCode

from otel_kafka_python._semconv import QUEUE_TIME_BUCKETS

FACTS = json.loads((Path(__file__).parent / "messaging-kafka-1.44.0.json").read_text())
SCHEMA_URL: str = FACTS["schema_url"]
SCOPE = "otel_kafka_python"

# What an application's hook sets on our spans, in these tests.
APPLICATION = "app."

# What our own spans and metrics beyond the convention are, as they are documented: the
# ends of transactions, of which the convention says nothing, and what the Java agent
# has, too.
TRANSACTION_ENDS = {"commit_transaction", "abort_transaction"}
HEADER = "messaging.header."
OWN_ATTRIBUTES = {
    "kafka.record.queue_time_ms": {"type": "int", "level": "opt_in"},
}
OWN_METRICS: dict[str, Any] = {
    "kafka.record.queue_time": {
        "unit": "s",
        "instrument": "Histogram",
        "bucket_boundaries": list(QUEUE_TIME_BUCKETS),
        "attributes": {
            "messaging.destination.name": {"type": "string", "level": "required"},
            "messaging.destination.partition.id": {
                "type": "string",
                "level": "required",
            },
            "messaging.consumer.group.name": {"type": "string", "level": "recommended"},
        },
    },
    "kafka.pipeline.latency": {
        "unit": "s",
        "instrument": "Histogram",
        "bucket_boundaries": list(QUEUE_TIME_BUCKETS),
        "attributes": {
            "kafka.pipeline.source": {"type": "string", "level": "required"},
            "messaging.destination.name": {"type": "string", "level": "required"},
            "messaging.consumer.group.name": {"type": "string", "level": "recommended"},
        },
    },
}

OWN_NAMES = {
    *OWN_ATTRIBUTES,
    *OWN_METRICS,
    *(
        name
        for metric in OWN_METRICS.values()
        for name in metric["attributes"]
        if name.startswith("kafka.")
    ),
}

# Of one message: what a link of a batch may carry.
OF_ONE_MESSAGE = {
    "messaging.kafka.offset",
    "messaging.kafka.message.key",
    "messaging.kafka.message.tombstone",
    "messaging.message.body.size",
    "messaging.destination.name",
    "messaging.destination.partition.id",
}

# Recommended for sampling "if provided at all", and provided at creation where they
# are known by then: the partition of a send is chosen later.
LEARNED_LATER = {("send", "messaging.destination.partition.id")}

TYPES = {"string": str, "int": int, "boolean": bool, "double": float}

# The facts of a span by its kind and the type of its operation.
BY_KIND = {
    (span["kind"], span["operation_type"]): span for span in FACTS["spans"].values()
}
# kafka-python's own, named after the Java client's: test_own_metrics has more of them.
CLIENT_METRIC = re.compile(r"kafka\.(producer|consumer)\.\w+")
CLIENT_ATTRIBUTES = {
    name: {"type": "string", "level": "recommended"}
    for name in (
        *("client-id", "messaging.kafka.cluster.id"),
        *("topic", "partition", "node-id", "messaging.consumer.group.name"),
    )
}
TIME_LAG = "kafka.consumer.time_lag"
BY_METRIC = {
    **{metric["metric"]: metric for metric in FACTS["metrics"].values()},
    **OWN_METRICS,
}
EVENTS: dict[str, Any] = FACTS["exception_events"]["events"]


@dataclass
class Seen:
    """A span as the convention sees it, wherever it was read from."""

    name: str
    kind: SpanKind
    status: StatusCode
    attributes: Mapping[str, Any]
    links: list[Mapping[str, Any]]
    schema_url: str | None = SCHEMA_URL
    # What a sampler saw, where there was one to see it.
    created: Mapping[str, Any] | None = None
    violations: list[str] = field(default_factory=list)

    def wrong(self, what: str) -> None:
        self.violations.append(f"{self.kind.name} {self.name!r}: {what}")


class ViolationError(AssertionError):
    """Something is not as the convention has it."""


def _raise_all(violations: list[str]) -> None:
    if violations:
        raise ViolationError("\n".join(sorted(set(violations))))


def check_spans(spans: Iterable[Seen]) -> None:
    """Hold spans of ours against the convention.

    Raises:
        ViolationError: What is wrong, all of it.
    """
    _raise_all([each for span in spans for each in _check_span(span)])


def _check_span(span: Seen) -> list[str]:
    attributes = span.attributes
    operation_type = attributes.get("messaging.operation.type")
    if attributes.get("messaging.operation.name") in TRANSACTION_ENDS:
        if operation_type is not None:
            span.wrong("the end of a transaction has no operation type")
        operation_type = "settle"
    facts = BY_KIND.get((span.kind.name, operation_type))
    if facts is None:
        span.wrong("the convention has no span of this kind and operation type")
        return span.violations
    _check_shape(span)
    allowed = facts["attributes"]
    if operation_type == "process":
        allowed = {**allowed, **OWN_ATTRIBUTES}
    _check_attributes(span, attributes, allowed)
    for link in span.links:
        allowed = {
            name: FACTS_OF_ATTRIBUTES[name] for name in OF_ONE_MESSAGE & set(link)
        }
        _check_attributes(span, link, allowed)
    if span.created is not None:
        for name in set(facts["sampling_relevant"]) & set(attributes):
            later = (attributes.get("messaging.operation.name"), name) in LEARNED_LATER
            if not later and span.created.get(name) != attributes[name]:
                span.wrong(f"a sampler did not see {name}")
    return span.violations


def _check_shape(span: Seen) -> None:
    attributes = span.attributes
    operation = attributes.get("messaging.operation.name")
    topic = attributes.get("messaging.destination.name")
    if span.schema_url != SCHEMA_URL:
        span.wrong(f"its schema is {span.schema_url}")
    if span.name != (operation if topic is None else f"{operation} {topic}"):
        span.wrong("this is not the name of its operation and destination")
    if attributes.get("messaging.system") != "kafka":
        span.wrong("its system is not kafka")
    if (span.status is StatusCode.ERROR) != ("error.type" in attributes):
        span.wrong("status and error.type do not agree")
    if span.status is StatusCode.OK:
        span.wrong("success leaves the status unset")
    if attributes.get("messaging.kafka.message.tombstone", True) is not True:
        span.wrong("a tombstone that is false is left out")


def _check_attributes(
    span: Seen, attributes: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    for name, fact in facts.items():
        if fact["level"] == "required" and name not in attributes:
            span.wrong(f"{name} is required")
    for name, value in attributes.items():
        if name.startswith(APPLICATION):
            continue
        if name.startswith(HEADER):
            if not _is_list_of_str(value):
                span.wrong(f"{name} is {value!r}, but should be a list of str")
        elif name not in facts:
            span.wrong(f"{name} is none of its attributes")
        elif type(value) is not TYPES[facts[name]["type"]]:
            span.wrong(f"{name} is {value!r}, but should be {facts[name]['type']}")


def _is_list_of_str(value: Any) -> bool:
    # As the SDK keeps lists.
    return isinstance(value, tuple) and all(type(each) is str for each in value)


FACTS_OF_ATTRIBUTES = {
    name: {**fact, "level": "recommended"}
    for span in FACTS["spans"].values()
    for name, fact in span["attributes"].items()
}


def check_metrics(metrics: Iterable[Metric]) -> None:
    """Hold metrics of ours against the convention.

    Raises:
        ViolationError: What is wrong, all of it.
    """
    _raise_all([each for metric in metrics for each in _check_metric(metric)])


def _check_metric(metric: Metric) -> Iterable[str]:
    facts = BY_METRIC.get(metric.name)
    if CLIENT_METRIC.fullmatch(metric.name):
        unit = "s" if metric.name == TIME_LAG else ""
        facts = {"unit": unit, "instrument": "Gauge", "attributes": CLIENT_ATTRIBUTES}
    if facts is None:
        yield f"{metric.name}: the convention has no such metric"
        return
    if metric.unit != facts["unit"]:
        yield f"{metric.name}: its unit is {metric.unit}"
    if _instrument(metric) != facts["instrument"]:
        yield f"{metric.name}: it should be a {facts['instrument']}"
        return
    for point in metric.data.data_points:
        bounds = getattr(point, "explicit_bounds", None)
        if bounds is not None and list(bounds) != facts["bucket_boundaries"]:
            yield f"{metric.name}: its boundaries are {bounds}"
        yield from _check_point(metric.name, facts["attributes"], point.attributes)


def _instrument(metric: Metric) -> str:
    """The kind of instrument that such data is from, synchronous or not."""
    if isinstance(metric.data, Sum):
        return "Counter" if metric.data.is_monotonic else "UpDownCounter"
    return type(metric.data).__name__


def _check_point(
    metric: str, facts: Mapping[str, Any], attributes: Mapping[str, Any] | None
) -> Iterable[str]:
    attributes = attributes or {}
    for name, fact in facts.items():
        if fact["level"] == "required" and name not in attributes:
            yield f"{metric}: {name} is required"
    for name, value in attributes.items():
        if name not in facts:
            yield f"{metric}: {name} is none of its attributes"
        elif type(value) is not TYPES[facts[name]["type"]]:
            yield f"{metric}: {name} is {value!r}"


def check_events(records: Iterable[LogRecord]) -> None:
    """Hold log events of ours against the convention.

    Raises:
        ViolationError: What is wrong, all of it.
    """
    _raise_all([each for record in records for each in _check_event(record)])


def _check_event(record: LogRecord) -> Iterable[str]:
    name, attributes = record.event_name, record.attributes or {}
    facts = EVENTS.get(name or "")
    if facts is None:
        yield f"{name}: the convention has no such event"
        return
    severity = record.severity_number
    if severity is None or severity.value != facts["severity_number"]:
        yield f"{name}: its severity is {severity}"
    if record.severity_text != facts["severity"]:
        yield f"{name}: its severity is called {record.severity_text}"
    if not {"exception.type", "exception.message"} & set(attributes):
        yield f"{name}: neither type nor message of the exception is there"
    for attribute, value in attributes.items():
        if attribute not in facts["attributes"]:
            yield f"{name}: {attribute} is none of its attributes"
        elif type(value) is not TYPES[facts["attributes"][attribute]["type"]]:
            yield f"{name}: {attribute} is {value!r}"
