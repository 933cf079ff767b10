"""That the check against the convention sees each kind of violation.

What holds is shown by all other tests: the recorder that they share runs the check.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from opentelemetry.trace import SpanKind, StatusCode

from conformance import (
    BY_KIND,
    FACTS,
    SCHEMA_URL,
    Seen,
    ViolationError,
    check_events,
    check_metrics,
    check_spans,
)
from otel_kafka_python._semconv import QUEUE_TIME_BUCKETS
from pages import PAGES

CREATED = {
    "messaging.system": "kafka",
    "messaging.operation.name": "poll",
    "messaging.operation.type": "receive",
    "messaging.destination.name": "topic",
    "messaging.destination.partition.id": "0",
    "messaging.consumer.group.name": "group",
    "server.address": "kafka",
    "server.port": 9092,
}
GOOD = Seen(
    "poll topic",
    SpanKind.CLIENT,
    StatusCode.UNSET,
    {
        **CREATED,
        "messaging.batch.message_count": 2,
        "messaging.client.id": "client",
        "app.own": object(),
    },
    [{"messaging.kafka.offset": 0, "messaging.kafka.message.key": "key"}],
    SCHEMA_URL,
    CREATED,
)


def having(**attributes: Any) -> Seen:
    """The good span with attributes changed, or left out where they are None."""
    changed = {
        **GOOD.attributes,
        **{name.replace("__", "."): value for name, value in attributes.items()},
    }
    kept = {name: value for name, value in changed.items() if value is not None}
    return replace(GOOD, attributes=kept, violations=[])


SPANS: dict[str, tuple[Seen, str]] = {
    "kind": (replace(GOOD, kind=SpanKind.PRODUCER), "no span of this kind"),
    "name": (replace(GOOD, name="receive topic"), "not the name"),
    "name with topic": (replace(GOOD, name="poll"), "not the name"),
    "operation type": (having(messaging__operation__type="settled"), "no span of this"),
    "operation type missing": (having(messaging__operation__type=None), "no span of"),
    "required": (having(messaging__operation__name=None), "name is required"),
    "system": (having(messaging__system="kafka2"), "system is not kafka"),
    "unknown attribute": (having(messaging__kafka__consumer=1), "none of its"),
    "attribute of another span": (
        replace(
            having(network__peer__address="::1"),
            kind=SpanKind.CONSUMER,
            name="process topic",
            attributes={
                **CREATED,
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "network.peer.address": "::1",
            },
            created=None,
        ),
        "network.peer.address is none of its",
    ),
    "int for str": (
        having(messaging__destination__partition__id=0),
        "should be string",
    ),
    "str for int": (having(server__port="9092"), "should be int"),
    "bool for int": (having(messaging__batch__message_count=True), "should be int"),
    "error without status": (having(error__type="Error"), "do not agree"),
    "status without error": (replace(GOOD, status=StatusCode.ERROR), "do not agree"),
    "status OK": (replace(GOOD, status=StatusCode.OK), "leaves the status unset"),
    "false tombstone": (having(messaging__kafka__message__tombstone=False), "left out"),
    "link attribute": (
        replace(GOOD, links=[{"messaging.client.id": "client"}]),
        "messaging.client.id is none of its",
    ),
    "link type": (
        replace(GOOD, links=[{"messaging.kafka.offset": "0"}]),
        "should be int",
    ),
    "not at creation": (
        replace(GOOD, created={**CREATED, "server.address": None}),
        "a sampler did not see server.address",
    ),
    "header": (having(messaging__header__color="red"), "should be a list of str"),
    "header of bytes": (
        having(messaging__header__color=(b"red",)),
        "should be a list of str",
    ),
    "own attribute of another span": (
        having(kafka__record__queue_time_ms=1),
        "queue_time_ms is none of its",
    ),
    "type of a transaction": (
        having(messaging__operation__name="commit_transaction"),
        "a transaction has no operation type",
    ),
    "schema": (replace(GOOD, schema_url=None), "its schema is None"),
}


def test_what_is_as_the_convention_has_it_passes() -> None:
    check_spans([GOOD])
    check_metrics(measure())


@pytest.mark.parametrize(("span", "says"), SPANS.values(), ids=SPANS)
def test_a_violation_of_a_span_is_seen(span: Seen, says: str) -> None:
    with pytest.raises(ViolationError, match=says):
        check_spans([replace(GOOD, violations=[]), replace(span, violations=[])])


HISTOGRAM = "messaging.process.duration"
COUNTER = "messaging.client.sent.messages"
BOUNDARIES = FACTS["metrics"][f"metric.{HISTOGRAM}"]["bucket_boundaries"]
MEASURED: dict[str, Any] = {
    "messaging.system": "kafka",
    "messaging.operation.name": "process",
}


def measure(
    name: str = HISTOGRAM,
    unit: str = "s",
    boundaries: Any = BOUNDARIES,
    attributes: Any = None,
    make: str = "histogram",
) -> list[Metric]:
    """A metric as an SDK gives it."""
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader], shutdown_on_exit=False).get_meter("test")
    attributes = attributes or MEASURED
    if make == "histogram":
        histogram = meter.create_histogram(
            name, unit, explicit_bucket_boundaries_advisory=boundaries
        )
        histogram.record(1, attributes)
    elif make == "gauge":
        meter.create_gauge(name, unit).set(1, attributes)
    elif make == "up-down counter":
        meter.create_up_down_counter(name, unit).add(1, attributes)
    else:
        meter.create_counter(name, unit).add(1, attributes)
    data = reader.get_metrics_data()
    assert data is not None
    return list(data.resource_metrics[0].scope_metrics[0].metrics)


METRICS: dict[str, tuple[Callable[[], list[Metric]], str]] = {
    "name": (lambda: measure("messaging.time"), "no such metric"),
    "unit": (lambda: measure(unit="ms"), "its unit is ms"),
    "boundaries": (lambda: measure(boundaries=[1, 2]), "its boundaries are"),
    "instrument": (
        lambda: measure(COUNTER, "{message}"),
        "should be a Counter",
    ),
    "other instrument": (lambda: measure(make="counter"), "should be a Histogram"),
    "gauge": (lambda: measure(COUNTER, "{message}", make="gauge"), "be a Counter"),
    "up-down counter": (
        lambda: measure(COUNTER, "{message}", make="up-down counter"),
        "should be a Counter",
    ),
    "counter of kafka-python's own": (
        lambda: measure(
            "kafka.consumer.fetch_rate",
            "",
            attributes={"client-id": "client"},
            make="counter",
        ),
        "should be a Gauge",
    ),
    "required": (
        lambda: measure(attributes={"messaging.system": "kafka"}),
        "messaging.operation.name is required",
    ),
    "unknown attribute": (
        lambda: measure(attributes={**MEASURED, "messaging.client.id": "client"}),
        "messaging.client.id is none of its attributes",
    ),
    "type": (
        lambda: measure(attributes={**MEASURED, "server.port": "9092"}),
        "server.port is '9092'",
    ),
}


@pytest.mark.parametrize(("metrics", "says"), METRICS.values(), ids=METRICS)
def test_a_violation_of_a_metric_is_seen(
    metrics: Callable[[], list[Metric]], says: str
) -> None:
    with pytest.raises(ViolationError, match=says):
        check_metrics(metrics())


def event(**changed: Any) -> LogRecord:
    """A log event as the convention has it, but for what is changed."""
    facts: dict[str, Any] = {
        "event_name": "messaging.send.exception",
        "severity_number": SeverityNumber.WARN,
        "severity_text": "WARN",
        "attributes": {"exception.type": "ValueError", "exception.message": "wrong"},
        **changed,
    }
    return LogRecord(**facts)


EVENTS: dict[str, tuple[LogRecord, str]] = {
    "name": (event(event_name="messaging.exception"), "has no such event"),
    "no name": (event(event_name=None), "has no such event"),
    "severity": (event(severity_number=SeverityNumber.ERROR), "its severity is"),
    "severity of processing": (
        event(event_name="messaging.process.exception"),
        "its severity is",
    ),
    "severity text": (event(severity_text="warning"), "is called warning"),
    "required": (event(attributes={}), "neither type nor message"),
    "unknown attribute": (
        event(attributes={"exception.type": "E", "exception.cause": "E"}),
        "exception.cause is none of its",
    ),
    "type": (event(attributes={"exception.type": 1}), "exception.type is 1"),
}


@pytest.mark.parametrize(("record", "says"), EVENTS.values(), ids=EVENTS)
def test_a_violation_of_a_log_event_is_seen(record: LogRecord, says: str) -> None:
    check_events([event()])
    with pytest.raises(ViolationError, match=says):
        check_events([event(), record])


def test_our_own_metric_is_as_documented() -> None:
    attributes = {
        "messaging.destination.name": "topic",
        "messaging.destination.partition.id": "0",
    }
    name = "kafka.record.queue_time"
    check_metrics(measure(name, boundaries=QUEUE_TIME_BUCKETS, attributes=attributes))
    with pytest.raises(ViolationError, match=r"partition.id is required"):
        check_metrics(
            measure(
                name,
                boundaries=QUEUE_TIME_BUCKETS,
                attributes={"messaging.destination.name": "topic"},
            )
        )


def test_all_spans_of_the_convention_are_known() -> None:
    assert len(BY_KIND) == len(FACTS["spans"])


def test_every_requirement_of_the_page_names_tests_that_exist() -> None:
    tables = PAGES["conformance"].partition("\n## Messaging spans\n")[2]
    rows = re.findall(r"^\| (?!---|requirement)(.+) \|$", tables, re.MULTILINE)
    assert len(rows) > 40
    for row in rows:
        requirement, behaviour, tests = (cell.strip() for cell in row.split(" | "))
        assert requirement
        assert behaviour
        assert re.fullmatch(r"`test_\w+`(, `test_\w+`)*", tests), row
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", PAGES["conformance"])) <= defined
