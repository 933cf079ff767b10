"""Exporters that block: none holds up the messages of a producer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from logging import LogRecord
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import (
    ConsoleSpanExporter,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from clients import DEADLINE, Clients
from conftest import Instrument
from otel_kafka_python import _span_ends, process_span
from pages import section
from recorder import Log
from scripts import run

MESSAGES = 21


class Hanging(SpanExporter):
    """Hangs, as a collector may, until it is told to go on."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.exported: list[str] = []
        self.threads: set[str] = set()
        self.has_one = threading.Event()
        self.has_all = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.goes_on.wait(DEADLINE)
        self.threads.add(threading.current_thread().name)
        self.exported += [span.name for span in spans]
        self.has_one.set()
        if len(self.exported) == MESSAGES:
            self.has_all.set()
        return SpanExportResult.SUCCESS


@pytest.fixture
def exporter(instrument: Instrument) -> Iterator[Hanging]:
    exporter = Hanging()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrument(tracer_provider=provider)
    yield exporter
    exporter.goes_on.set()


def test_an_exporter_that_hangs_holds_no_message_up(
    exporter: Hanging, clients: Clients, topic: str
) -> None:
    producer = clients.producer()
    futures = [producer.send(topic, b"value") for _ in range(MESSAGES)]
    assert [each.get(DEADLINE).offset for each in futures] == list(range(MESSAGES))
    assert exporter.exported == []
    exporter.goes_on.set()
    assert exporter.has_all.wait(DEADLINE)
    assert exporter.exported == [f"send {topic}"] * MESSAGES


def test_a_span_that_no_answer_ends_is_exported_at_once(
    exporter: Hanging, clients: Clients, topic: str
) -> None:
    exporter.goes_on.set()
    record = SimpleNamespace(
        topic=topic, partition=0, offset=0, timestamp=0, key=None, value=b"", headers=[]
    )
    with process_span(record):
        pass
    assert exporter.exported == [f"process {topic}"]
    assert exporter.threads == {threading.current_thread().name}


def refuse(*_: Any) -> None:
    raise RuntimeError


@pytest.mark.parametrize(
    ("name", "replacement"),
    [("Thread.start", refuse), ("main_thread", threading.Thread)],
    ids=["a thread is refused", "the main thread has ended"],
)
def test_if_no_thread_can_start_as_at_the_exit_a_span_is_exported_at_once(
    exporter: Hanging,
    clients: Clients,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    replacement: object,
) -> None:
    exporter.goes_on.set()
    monkeypatch.setattr(_span_ends, "_ender", None)
    producer = clients.producer()
    monkeypatch.setattr(f"threading.{name}", replacement)
    producer.send(topic, b"value").get(DEADLINE)
    assert exporter.has_one.wait(DEADLINE)
    assert exporter.exported == [f"send {topic}"]
    assert "otel-kafka-python-span-ends" not in exporter.threads


def test_a_span_that_ends_after_the_exit_handler_is_exported_at_once(
    exporter: Hanging, clients: Clients, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter.goes_on.set()
    ender = _span_ends._Ender()
    ender._stop()
    monkeypatch.setattr(_span_ends, "_ender", ender)
    clients.send(b"value")
    assert exporter.exported == [f"send {topic}"]
    assert "otel-kafka-python-span-ends" not in exporter.threads


def test_an_exporter_that_wants_to_exit_costs_its_span_alone(
    instrument: Instrument, clients: Clients, topic: str, log: Log
) -> None:
    exported: list[str] = []
    done = threading.Event()

    class Exiting(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            exported.append(spans[0].name)
            if len(exported) == 1:
                raise SystemExit
            done.set()
            return SpanExportResult.SUCCESS

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Exiting()))
    instrument(tracer_provider=provider)
    clients.send(b"1", b"2")
    assert done.wait(DEADLINE)
    assert exported == [f"send {topic}"] * 2
    (message,) = log.take()
    assert message.startswith("Failed to end a span")


def test_an_exporter_that_sends_by_the_same_producer_is_served(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    sent = threading.Event()

    class Sending(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            producer.send(f"{topic}-spans", spans[0].name.encode()).get(DEADLINE)
            sent.set()
            return SpanExportResult.SUCCESS

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Sending()))
    producer = clients.producer()
    instrument(tracer_provider=provider)
    assert producer.send(topic, b"value").get(DEADLINE).offset == 0
    assert sent.wait(DEADLINE)


def test_of_more_spans_than_can_wait_the_last_are_lost_and_this_is_logged(
    exporter: Hanging,
    clients: Clients,
    topic: str,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_span_ends, "_MOST_WAITING", 2)
    monkeypatch.setattr(_span_ends, "_ender", None)
    producer = clients.producer()
    for _ in range(MESSAGES):
        producer.send(topic, b"value").get(DEADLINE)
    producer.flush()
    (message,) = log.take()
    assert message.startswith("Failed to end a span")


@pytest.mark.parametrize("exporter_class", [ConsoleSpanExporter, InMemorySpanExporter])
def test_a_span_that_is_kept_in_the_process_has_ended_when_its_message_has(
    instrument: Instrument,
    clients: Clients,
    topic: str,
    exporter_class: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: list[str] = []
    plain = exporter_class.export

    def export(self: Any, spans: Sequence[ReadableSpan]) -> Any:
        exported.extend(span.name for span in spans)
        return plain(self, spans)

    monkeypatch.setattr(exporter_class, "export", export)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter_class()))
    instrument(tracer_provider=provider)
    clients.send(b"value")
    assert exported == [f"send {topic}"]


class Slow(SpanProcessor):
    """Takes its time, by a clock that only this processor moves."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.now = 0

    def on_end(self, span: ReadableSpan) -> None:
        self.now += int(self.seconds * 1e9)

    def monotonic_ns(self) -> int:
        return self.now


class Blocking(SpanProcessor):
    """Does not return until a warning tells, or the test gives up."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.was_told: list[bool] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.was_told.append(self.goes_on.wait(DEADLINE))


@pytest.mark.two_clients
def test_a_processor_that_never_returns_is_told_while_it_blocks(
    instrument: Instrument,
    clients: Clients,
    topic: str,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = Blocking()
    plain = log.emit

    def emit(record: LogRecord) -> None:
        plain(record)
        processor.goes_on.set()

    monkeypatch.setattr(log, "emit", emit)
    monkeypatch.setattr(_span_ends, "_watch", _span_ends._Watch)
    monkeypatch.setattr(_span_ends, "_LONGEST_END", 10**7)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    instrument(tracer_provider=provider)
    producer = clients.producer()
    producer.send(topic, b"value")
    producer.close()  # and its thread
    assert processor.was_told == [True]
    (message,) = log.take()
    assert message.startswith("The end of a span has delayed kafka-python by")


@pytest.mark.two_clients
@pytest.mark.parametrize(("seconds", "warnings"), [(0.9, 0), (1.5, 1)])
def test_a_processor_that_delays_other_answers_for_more_than_a_second_is_told_once(
    instrument: Instrument,
    clients: Clients,
    topic: str,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    warnings: int,
) -> None:
    processor = Slow(seconds)
    monkeypatch.setattr(_span_ends, "Clock", processor)
    monkeypatch.setattr(_span_ends, "_LONGEST_END", 10**9)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    instrument(tracer_provider=provider)
    producer = clients.producer()
    for _ in range(3):
        producer.send(topic, b"value")
    producer.close()  # and its thread
    logged = log.take()
    assert len(logged) == warnings
    for message in logged:
        assert message.startswith(
            "The end of a span has delayed kafka-python by 1.5 seconds"
        )
        assert "BatchSpanProcessor" in message
        assert "'The end of spans' on the page 'Limits'" in message
        assert "longer than a second" in section("limits", "The end of spans")


@pytest.mark.parametrize("sleeps", [True, False])
def test_the_end_of_a_span_wakes_the_watch_if_it_sleeps(
    monkeypatch: pytest.MonkeyPatch, sleeps: bool
) -> None:
    """A fake stands for the watch: whether the real one sleeps is a race."""
    watch = SimpleNamespace(begun={}, sleeps=sleeps, woken=threading.Event())
    seen: list[int] = []

    class Looking(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            seen.append(len(watch.begun))

    monkeypatch.setattr(_span_ends, "_watch", lambda: watch)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Looking())
    _span_ends.end_span(provider.get_tracer("test").start_span("span"), 1)
    assert watch.woken.is_set() == sleeps
    assert (seen, watch.begun) == ([1], {})


def test_the_watch_looks_again_until_a_processor_has_taken_longer_than_a_second(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    """Without its thread, since no test can stop that between two lines."""
    clock, longest = Slow(0), 10**9
    spans = [TracerProvider().get_tracer("test").start_span(name) for name in "ab"]

    def seconds() -> Iterator[None]:
        del watch.begun[spans[0]]  # it ends in time,
        watch.woken.set()
        yield
        watch.begun[spans[1]] = clock.now  # and this one does not
        clock.now += longest
        yield
        clock.now += 1
        yield

    second = seconds()
    sleeping = SimpleNamespace(sleep=lambda _: next(second))
    monkeypatch.setattr(_span_ends, "_start", lambda *_: True)
    monkeypatch.setattr(_span_ends, "Clock", clock)
    monkeypatch.setattr(_span_ends, "time", sleeping)
    monkeypatch.setattr(_span_ends, "_LONGEST_END", longest)
    watch = _span_ends._Watch()
    watch.begun[spans[0]] = clock.now
    watch._run()
    assert list(second) == []
    (message,) = log.take()
    assert message.startswith("The end of a span has delayed kafka-python by 1.0 sec")


def test_at_the_exit_spans_that_wait_are_exported(clients: Clients, topic: str) -> None:
    done = run(
        """
        import sys, time
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import (
            SimpleSpanProcessor, SpanExporter, SpanExportResult,
        )

        class Slow(SpanExporter):
            def export(self, spans):
                time.sleep(0.1)
                print(spans[0].name, flush=True)
                return SpanExportResult.SUCCESS

        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(Slow()))
        from otel_kafka_python import KafkaPythonInstrumentor
        KafkaPythonInstrumentor().instrument(tracer_provider=provider)
        from kafka import KafkaProducer
        producer = KafkaProducer(bootstrap_servers=sys.argv[1])
        for _ in range(5):
            producer.send(sys.argv[2], b"value")
        producer.flush()
        """,
        clients.address,
        topic,
    )
    assert done.stdout.splitlines() == [f"send {topic}"] * 5, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_exports_its_own_spans(clients: Clients, topic: str) -> None:
    """Even if another thread was about to have a span exported at the fork."""
    done = run(
        """
        import os, sys, threading
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import (
            SimpleSpanProcessor, SpanExporter, SpanExportResult,
        )

        class Printing(SpanExporter):
            def export(self, spans):
                print(os.getpid() == parent, spans[0].name, flush=True)
                exported.set()
                return SpanExportResult.SUCCESS

        parent, exported = os.getpid(), threading.Event()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(Printing()))
        from otel_kafka_python import KafkaPythonInstrumentor, _span_ends
        KafkaPythonInstrumentor().instrument(tracer_provider=provider)
        from kafka import KafkaProducer

        def send():
            producer = KafkaProducer(bootstrap_servers=sys.argv[1])
            producer.send(sys.argv[2], b"value").get(30)
            producer.close()

        send()
        exported.wait()  # a child that is forked meanwhile cannot print
        _span_ends._lock.acquire()
        child = os.fork()
        if child == 0:
            send()
        else:
            _span_ends._lock.release()
            os.waitpid(child, 0)
        """,
        clients.address,
        topic,
    )
    told = [f"True send {topic}", f"False send {topic}"]
    assert done.stdout.splitlines() == told, done.stderr


@pytest.mark.one_client
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_not_wait_at_its_exit_for_its_parents_spans() -> None:
    """Its parent's thread is not in it, and so would never be done with them."""
    done = run(
        """
        import os, signal, sys, threading
        from opentelemetry import trace
        from otel_kafka_python import _span_ends

        class Blocked(trace.NonRecordingSpan):
            def end(self, end_time=None):
                begun.set()
                goes_on.wait()

        begun, goes_on = threading.Event(), threading.Event()
        _span_ends._SECONDS_AT_EXIT = threading.TIMEOUT_MAX
        _span_ends._running().end(Blocked(trace.INVALID_SPAN_CONTEXT), 0)
        begun.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        goes_on.set()
        """,
    )
    assert done.stdout == "0\n", done.stderr
