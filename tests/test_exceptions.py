"""Exceptions: events of spans, log events, or both."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
from opentelemetry._logs import LogRecord, NoOpLogger
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode, TraceFlags

from clients import VERSION, Clients, committable, poll
from conftest import Instrument
from otel_kafka_python import _config, process_span
from recorder import Log, Recorder

SIGNAL = "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN"


class Broken(ValueError):  # noqa: N818 (its name is what is looked at)
    """What the application raises."""


def fail_to_send(clients: Clients) -> None:
    def serialise(value: object) -> bytes:
        raise Broken("cannot be sent")

    producer = clients.producer(value_serializer=serialise)
    with pytest.raises(Broken):
        producer.send(clients.topic, b"value")


def fail_to_poll(clients: Clients) -> None:
    def deserialise(value: object) -> bytes:
        raise Broken("cannot be read")

    clients.send(b"value")
    consumer = clients.consumer(value_deserializer=deserialise)
    # kafka-python may have wrapped it.
    with pytest.raises(Exception, match=r"cannot be read|eserializ"):
        poll(consumer)


def fail_to_process(clients: Clients) -> None:
    clients.send(b"value")
    with pytest.raises(Broken):  # noqa: SIM117 (the inner one lets it through)
        with process_span(next(clients.consumer())):
            raise Broken("cannot be processed")


def fail_to_commit(clients: Clients) -> None:
    clients.send(b"value")
    consumer = clients.consumer(group_id=clients.topic)
    poll(consumer)
    consumer._coordinator.reset_generation()
    with pytest.raises(Exception, match=r"."):
        consumer.commit(committable(clients.topic, 1))


WAYS: dict[str, Callable[[Clients], None]] = {
    "send": fail_to_send,
    "receive": fail_to_poll,
    "process": fail_to_process,
    "settle": fail_to_commit,
}


@pytest.mark.parametrize(
    ("value", "on_spans", "as_logs"),
    [(None, True, False), ("logs", False, True), ("logs/dup", True, True)],
)
@pytest.mark.parametrize("operation", WAYS)
def test_an_exception_is_an_event_of_the_span_or_a_log_event(
    monkeypatch: pytest.MonkeyPatch,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    operation: str,
    value: str | None,
    on_spans: bool,
    as_logs: bool,
) -> None:
    if value is not None:
        monkeypatch.setenv(SIGNAL, value)
    instrument()
    WAYS[operation](clients)
    (span,) = [s for s in recorder.ended if s.status.status_code is StatusCode.ERROR]
    assert [event.name for event in span.events] == ["exception"] * on_spans
    assert len(recorder.events()) == as_logs
    for event in recorder.events():
        # The recorder holds name, severity and attributes against the convention.
        assert event.event_name == f"messaging.{operation}.exception"
        assert span.context is not None
        assert (event.trace_id, event.span_id) == (
            span.context.trace_id,
            span.context.span_id,
        )
        assert event.attributes is not None
        assert event.attributes["exception.message"] == span.status.description
        if operation in {"send", "process"}:
            assert event.attributes["exception.type"] == "test_exceptions.Broken"
        stack = event.attributes["exception.stacktrace"]
        assert isinstance(stack, str)
        assert stack.startswith("Traceback")
        if "exception" in signature(LogRecord.__init__).parameters:
            assert event.exception is not None
            assert str(event.exception) == span.status.description


def test_a_log_event_is_there_for_what_is_not_sampled_too(
    monkeypatch: pytest.MonkeyPatch,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
) -> None:
    monkeypatch.setenv(SIGNAL, "logs")
    instrument(tracer_provider=TracerProvider(ALWAYS_OFF, shutdown_on_exit=False))
    fail_to_send(clients)
    (event,) = recorder.events()
    assert event.trace_flags is not None
    assert not event.trace_flags & TraceFlags.SAMPLED
    assert event.trace_id


@pytest.mark.parametrize("metrics", [True, False])
def test_a_log_event_is_there_for_what_has_no_span(
    monkeypatch: pytest.MonkeyPatch,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    metrics: bool,
) -> None:
    monkeypatch.setenv(SIGNAL, "logs")
    instrument(send_spans=False, metrics=metrics)
    with recorder.tracer.start_as_current_span("request") as request:
        fail_to_send(clients)
    (event,) = recorder.events()
    assert event.span_id == request.get_span_context().span_id


@pytest.mark.skipif(VERSION < (2, 2), reason="there are no transactions")
def test_the_log_event_of_a_transaction_is_one_of_settlement(
    monkeypatch: pytest.MonkeyPatch,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
) -> None:
    monkeypatch.setenv(SIGNAL, "logs")
    instrument()
    with pytest.raises(Exception, match=r"."):
        clients.producer().commit_transaction()  # none was begun
    (event,) = recorder.events()
    assert event.event_name == "messaging.settle.exception"


class Mute(Exception):  # noqa: N818 (its name is what is looked at)
    """Cannot be shown, nor can an exception that has it as its argument."""

    def __str__(self) -> str:
        raise RuntimeError("from __str__")


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Mute, "test_exceptions.Mute"), (ValueError, "ValueError")],
)
def test_an_exception_that_cannot_say_what_it_is_makes_a_log_event(
    monkeypatch: pytest.MonkeyPatch,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    kind: type[Exception],
    name: str,
) -> None:
    monkeypatch.setenv(SIGNAL, "logs")
    instrument()
    clients.send(b"value")
    with pytest.raises(kind), process_span(next(clients.consumer())):
        raise kind(Mute())
    (event,) = recorder.events()
    assert event.attributes is not None
    assert event.attributes["exception.type"] == name
    assert event.attributes["exception.message"] == kind.__qualname__


@pytest.mark.skipif(
    "exception" not in signature(LogRecord.__init__).parameters,
    reason="log records take no exceptions",
)
def test_a_log_event_has_the_exception_itself_instead_of_its_attributes(
    monkeypatch: pytest.MonkeyPatch,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
) -> None:
    emitted: list[LogRecord] = []

    class Keeping(NoOpLogger):
        def emit(self, *args: Any, **kwargs: Any) -> None:
            emitted.extend(args)

    monkeypatch.setenv(SIGNAL, "logs")
    monkeypatch.setattr(
        recorder.logger_provider, "get_logger", lambda *_, **__: Keeping("keeping")
    )
    instrument()
    fail_to_send(clients)
    (event,) = emitted
    assert isinstance(event.exception, Broken)
    assert not event.attributes


def test_a_logger_that_fails_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    log: Log,
) -> None:
    class Failing(NoOpLogger):
        def emit(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("from a logger")

    monkeypatch.setenv(SIGNAL, "logs/dup")
    monkeypatch.setattr(
        recorder.logger_provider, "get_logger", lambda *_, **__: Failing("failing")
    )
    instrument()
    fail_to_send(clients)
    fail_to_send(clients)
    (message,) = log.take()
    assert message.startswith("Failed to record an error")
    assert recorder.open() == []


@pytest.mark.parametrize(
    ("value", "on_spans", "as_logs"),
    [
        ("", True, False),
        ("logs", False, True),
        (" LOGS/dup ", True, True),
        ("logs,logs/dup", True, True),
    ],
)
def test_the_variable_is_a_list_and_dup_wins(
    value: str, on_spans: bool, as_logs: bool
) -> None:
    config = _config.load({}, {SIGNAL: value})
    assert (config.span_exceptions, config.log_exceptions) == (on_spans, as_logs)


def test_what_the_variable_does_not_know_is_named(log: Log) -> None:
    config = _config.load({}, {SIGNAL: "spans,logs"})
    assert (config.span_exceptions, config.log_exceptions) == (False, True)
    (message,) = log.take()
    assert SIGNAL in message
    assert message.endswith("spans is ignored")
