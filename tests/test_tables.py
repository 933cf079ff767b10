"""The tables of the README and the documentation: they are what the code has."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

import kafka.errors
import pytest
import yaml
from kafka import KafkaConsumer
from opentelemetry.instrumentation.kafka import KafkaInstrumentor
from opentelemetry.instrumentation.kafka import package as contrib_package
from opentelemetry.sdk.trace import ReadableSpan

from clients import (
    DEADLINE,
    IS_NG,
    VERSION,
    Clients,
    committable,
    poll,
    sends_large,
    take,
)
from conformance import (
    EVENTS,
    OWN_NAMES,
    TRANSACTION_ENDS,
    TYPES,
)
from conftest import Instrument
from otel_kafka_python import _config, _kafka, _semconv, process_span
from otel_kafka_python._client_metrics import NAMES
from pages import PAGES, ROOT, code_in, error_types, table
from recorder import Recorder, attributes_of

TOO_LARGE = 3_000_000


def refuse(value: bytes) -> None:
    raise ValueError(value)


def fail(attempt: Callable[[], Any]) -> None:
    with pytest.raises(Exception, match=r".*"):
        attempt()


def send(clients: Clients) -> None:
    hasty = clients.producer(max_block_ms=500)
    fail(lambda: hasty.send("no topic!", b"value"))
    producer = clients.producer(max_request_size=2 * TOO_LARGE)
    for key in (b"one", b"two"):
        producer.send(clients.topic, b"value", key=key, headers=[("shop", b"north")])
    producer.send(clients.topic, None, key=b"tombstone")
    refused = producer.send(clients.topic, os.urandom(TOO_LARGE))
    fail(lambda: refused.get(DEADLINE))
    producer.flush()


def receive(clients: Clients) -> None:
    polled = poll(clients.consumer(client_id=None))
    with process_span(polled):
        pass
    for _ in take(clients.finite(3), 3):
        pass
    fail(lambda: poll(clients.consumer(value_deserializer=refuse)))


def process(clients: Clients) -> None:
    for record in clients.finite(3, group_id=clients.topic):
        with pytest.raises(ValueError, match="from the body"), process_span(record):
            raise ValueError("from the body")


def commit(clients: Clients) -> None:
    consumer = clients.consumer(group_id=f"{clients.topic}-commits")
    poll(consumer)
    consumer.commit()
    consumer._coordinator.reset_generation()  # as when it was put out of its group
    fail(lambda: consumer.commit(committable(clients.topic, 1)))


def transact(clients: Clients) -> None:
    if VERSION < (2, 2):
        return
    producer = clients.producer(transactional_id=clients.topic)
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(clients.topic, b"value")
    producer.send_offsets_to_transaction(committable(clients.topic, 3), "group")
    producer.commit_transaction()
    producer.begin_transaction()
    producer.abort_transaction()
    fail(producer.commit_transaction)


@pytest.fixture
def everything(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> list[ReadableSpan]:
    """The spans of all that there is a span of, with all that can be asked for."""
    instrument(
        capture_headers="*",
        capture_message_size=True,
        capture_queue_time=True,
        pipeline_latency=True,
    )
    for work in (send, receive, process, commit, transact):
        work(clients)
    return recorder.ended


TRANSACTIONS = {*TRANSACTION_ENDS, "send_offsets_to_transaction"}


def operation(span: ReadableSpan) -> str:
    return str((span.attributes or {})["messaging.operation.name"])


@sends_large
@pytest.mark.one_broker
def test_the_spans_are_those_of_the_table(everything: list[ReadableSpan]) -> None:
    documented = set()
    for does, name, kind, _, _ in table("README", "Spans"):
        names = [each.split()[0] for each in code_in(name)]
        if not names:
            names = re.findall(r"(\w+)\(", does)
        documented |= {(each, kind) for each in names}
    if VERSION < (2, 2):
        documented = {each for each in documented if each[0] not in TRANSACTIONS}
    assert documented == {(operation(span), span.kind.name) for span in everything}


COLUMNS = {
    "send": {"send"},
    "poll": {"poll"},
    "process": {"process"},
    "commit": {"commit"},
    "transaction": TRANSACTIONS,
}
# Before 2.1 the metadata has no cluster's id.
UNKNOWN = {"messaging.kafka.cluster.id"} if VERSION < (2, 1) else set()


@sends_large
@pytest.mark.one_broker
def test_the_spans_have_the_attributes_of_the_table(
    everything: list[ReadableSpan],
) -> None:
    rows = {code_in(name)[0]: rest for name, *rest in table("spans", "Attributes")}
    rows["messaging.header.shop"] = rows.pop("messaging.header.<name>")
    assert set(map(operation, everything)) <= set().union(*COLUMNS.values())
    for index, (column, operations) in enumerate(COLUMNS.items(), 1):
        seen = [
            set(attributes)
            for span, attributes in zip(
                everything, attributes_of(everything), strict=True
            )
            if operation(span) in operations
        ]
        if not seen:
            assert (column, VERSION < (2, 2)) == ("transaction", True)
            continue
        documented = {name for name, cells in rows.items() if cells[index]}
        assert documented - UNKNOWN == set().union(*seen) - UNKNOWN
        always = {name for name, cells in rows.items() if cells[index] == "always"}
        assert always <= set.intersection(*seen)
    types = {name: TYPES.get(cells[0], tuple) for name, cells in rows.items()}
    for attributes in attributes_of(everything):
        assert {name: type(value) for name, value in attributes.items()} == {
            name: types[name] for name in attributes
        }


METRICS = {
    "operation duration": "messaging.client.operation.duration",
    "process duration": "messaging.process.duration",
    "sent": "messaging.client.sent.messages",
    "consumed": "messaging.client.consumed.messages",
    "queue time": "kafka.record.queue_time",
    "pipeline latency": "kafka.pipeline.latency",
}


@sends_large
@pytest.mark.one_broker
def test_the_metrics_are_those_of_the_tables(
    everything: list[ReadableSpan], recorder: Recorder
) -> None:
    metrics = {metric.name: metric for metric in recorder.metrics()}
    kinds = {"histogram": "explicit_bounds", "counter": "is_monotonic"}
    for name, kind, unit, _ in table("README", "Metrics"):
        metric = metrics.pop(code_in(name)[0])
        assert metric.unit == unit
        (point, *_) = metric.data.data_points
        assert hasattr(point, kinds[kind]) or hasattr(metric.data, kinds[kind])
    assert metrics == {}
    rows = {code_in(name)[0]: rest for name, *rest in table("metrics", "Attributes")}
    for index, name in enumerate(METRICS.values()):
        seen = [set(point.attributes) for point in recorder.points(name)]
        assert {each for each, cells in rows.items() if cells[index]} == set().union(
            *seen
        )
        always = {each for each, cells in rows.items() if cells[index] == "always"}
        assert always <= set.intersection(*seen)


def test_the_additions_to_the_conventions_are_those_of_the_table() -> None:
    rows = table("conformance", "Additions")
    assert {name for cell, *_ in rows for name in code_in(cell)} == {
        *OWN_NAMES,
        *(f"kafka.{kind}.*" for kind in NAMES),
    }
    defaults = _config.Config()
    assert not any(getattr(defaults, code_in(cell)[0]) for *_, cell in rows)


# No operation of ours is the creation of a message.
EMITTED = {n: event for n, event in EVENTS.items() if n != "messaging.create.exception"}


def test_the_log_events_are_those_of_the_table() -> None:
    assert {
        code_in(name)[0]: severity for name, severity, _ in table("spans", "Exceptions")
    } == {name: event["severity"] for name, event in EMITTED.items()}


def test_the_table_of_settings_is_complete() -> None:
    documented = {}
    for names, variable, default, _ in table("settings", "All settings"):
        for name in code_in(names):
            documented[name] = (variable.strip("`"), default.strip("`"))
    for provider in ("tracer_provider", "meter_provider", "logger_provider"):
        documented.pop(provider)
    assert list(documented) == list(_config._PARSERS)
    defaults = _config.Config()
    assert documented == {
        name: (
            "" if name.endswith("_hook") else f"OTEL_PYTHON_KAFKA_{name.upper()}",
            _config.format_default(getattr(defaults, name)),
        )
        for name in _config._PARSERS
    }


PREFIXES = {"messaging", "server", "network", "kafka", "error", "exception"}


def test_the_pages_name_every_attribute_and_metric_and_no_other() -> None:
    reference = PAGES["README"] + PAGES["spans"] + PAGES["metrics"].split("## Fewer")[0]
    documented = {
        name
        for name in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:<name>)?`", reference)
        if name.split(".")[0] in PREFIXES
    }
    ours = {
        value
        for name, value in vars(_semconv).items()
        if name.isupper() and isinstance(value, str) and "." in value
    }
    assert documented == (ours | set(EMITTED)) - {_semconv.SCHEMA_URL}


def test_the_convention_is_the_one_that_is_emitted() -> None:
    assert _semconv.SCHEMA_URL.endswith("/1.44.0")
    assert "1.44.0, [requirement by requirement]" in PAGES["README"]
    assert "release 1.44.0" in PAGES["conformance"]
    assert f"`{_semconv.SCHEMA_URL}`" in PAGES["spans"]


def error_classes() -> dict[str, type[BaseException]]:
    # The one that is no error is never raised.
    return {
        name: each
        for name, each in vars(kafka.errors).items()
        if isinstance(each, type)
        and issubclass(each, BaseException)
        and each is not kafka.errors.NoError
    }


def test_every_error_of_kafka_python_is_in_a_table_with_its_error_type() -> None:
    documented = error_types()
    numbers = {
        name: int(number)
        for _, number, classes in table("errors", "Kafka errors")
        for name in code_in(classes)
    }
    for name, cls in error_classes().items():
        error = cls.__new__(cls)  # some cannot be made without arguments
        assert documented.get(name) == _kafka.error_type(error), name
        assert numbers.get(name) in (None, _kafka._error_code(error)), name


def test_what_is_met_most_is_an_error_type() -> None:
    values = {
        code_in(row[0])[0]
        for heading in ("Kafka errors", "kafka-python errors")
        for row in table("errors", heading)
    }
    met = {
        value for row in table("errors", "Common errors")
        for value in code_in(row[0])
    }  # fmt: skip
    assert met - values == {
        _semconv.OUTCOME_UNKNOWN, _semconv.ERROR_OTHER, "AssertionError", "ValueError",
        "TypeError",
    }  # fmt: skip


@pytest.mark.skipif(IS_NG, reason="the other skips itself")
@pytest.mark.one_broker
def test_the_contrib_package_emits_what_the_migration_starts_from(
    clients: Clients, recorder: Recorder, topic: str
) -> None:
    contrib = KafkaInstrumentor()
    contrib.instrument(tracer_provider=recorder.tracer_provider)
    try:
        clients.send(b"value")
        consumer: KafkaConsumer = clients.consumer()
        next(consumer)
        poll(clients.consumer())
    finally:
        contrib.uninstrument()
    spans = {span.name: span for span in recorder.ended}
    rows = {does: was for does, was, _ in table("migration", "Spans")}
    assert {
        (span.name.replace(topic, "{topic}"), span.kind.name) for span in spans.values()
    } == {
        (code_in(was)[0], was.rsplit(" ", 1)[1])
        for was in rows.values()
        if was != "none"
    }
    documented = {
        code_in(was)[0]: was
        for was, _ in table("migration", "Attributes")
        if was.startswith("`")
    }
    for span in spans.values():
        attributes = dict(span.attributes or {})
        assert set(attributes) == set(documented)
        assert attributes["messaging.system"] == "kafka"
        assert attributes["messaging.kafka.partition"] == 0
        assert json.loads(str(attributes["messaging.url"])) == clients.address
        scope = span.instrumentation_scope
        assert scope is not None
        assert f"`{scope.name}`" in PAGES["migration"]
        assert str(scope.schema_url).endswith("/1.11.0")


@pytest.mark.one_client
def test_the_contrib_package_takes_no_kafka_python_ng() -> None:
    assert [name for name in contrib_package._instruments if "-ng" in name] == []
    assert "no longer support kafka-python-ng" in PAGES["migration"]


def test_the_migration_leads_to_what_is_emitted() -> None:
    ours = {each for each in vars(_semconv).values() if isinstance(each, str)}
    for _, become in table("migration", "Attributes"):
        names = [each for each in code_in(become) if "." in each]
        assert names
        assert set(names) <= ours
    spans = {
        (name, kind)
        for _, names, kind, *_ in table("README", "Spans")
        for name in code_in(names)
    }
    for _, _, become in table("migration", "Spans"):
        name, kind = become.rsplit(", ", 1)
        assert (name.strip("`"), kind) in spans


@pytest.mark.one_client
def test_what_is_supported_is_declared_and_tested() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    environments = (ROOT / "tox.ini").read_text()
    scripts = [(ROOT / ".ci" / name).read_text() for name in ("run", "debian")]
    supported = {
        what: re.findall(r"\d+\.\d+", versions)
        for what, versions, *_ in table("README", "Support")
    }
    pythons, lines = supported["CPython"], supported["kafka-python"]
    (lowest,) = supported["OpenTelemetry"]
    assert f'requires-python = ">={pythons[0]}"' in declared
    assert (
        re.findall(r'"Programming Language :: Python :: (3\..+)"', declared) == pythons
    )
    assert f'"opentelemetry-api>={lowest},' in declared
    assert f'"opentelemetry-api=={lowest}"' in declared
    factors = re.search(r"py3\{(.+)\}-kafka\{(.+),newest\}", environments)
    assert factors is not None
    assert [f"3.{minor}" for minor in factors[1].split(",")] == pythons
    assert [".".join(line) for line in factors[2].split(",")] == lines
    tested = set(re.findall(r"py3(\d+)-(\w+)", "".join(scripts)))
    assert {f"3.{minor}" for minor, _ in tested} == set(pythons)
    clients = {f"kafka{line.replace('.', '')}" for line in lines}
    assert {client for _, client in tested} == clients | {"ng"}
    assert "\n    tests: kafka-python\n" in environments  # the newest
    assert "[testenv:pypy]" in environments
    assert re.search(r"\bpypy\b", scripts[1])


@pytest.mark.one_client
def test_the_workflows_test_what_is_said_of_them() -> None:
    workflows = ROOT / ".github" / "workflows"
    ci = yaml.safe_load((workflows / "ci.yml").read_text())
    jobs = {
        name: job.get("strategy", {}).get("matrix") for name, job in ci["jobs"].items()
    }
    interpreters = [each["python"] for each in jobs["pythons"]["include"]]
    free_threaded = [name[:-1] for name in interpreters if name.endswith("t")]
    systems = {name.partition("-")[0] for name in jobs["systems"]["os"]}
    canary = (workflows / "canary.yml").read_text()
    rows = {what: tested for what, *tested in table("README", "Support")}
    versions, changes, weekly = rows["CPython"]
    assert changes == f"each; {' and '.join(free_threaded)} without the GIL"
    assert {"3.14", "3.15"} <= set(interpreters) & set(versions.split(", "))
    assert f"pypy{rows['PyPy'][0]}" in interpreters
    assert rows["system"][:2] == ["Linux, macOS, Windows", "each"]
    assert systems == {"macos", "windows"}
    # A cron with a day of the week.
    assert re.search(r'cron: "\d+ \d+ \* \* \d"', canary)
    assert "tox -e canary" in canary
    assert rows["kafka-python"][2] == "the main branch"
    assert rows["OpenTelemetry"][2] == "the main branches"
    assert weekly == ""
