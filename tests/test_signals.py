"""Exceptions that a signal handler raises: they are the application's own.

A limit on time is often made so. A signal strikes between any two instructions of the
main thread, those of telemetry too.
"""

from __future__ import annotations

import functools
import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

import pytest
from kafka import KafkaProducer
from opentelemetry import trace

from clients import DEADLINE, Clients
from conftest import Instrument
from otel_kafka_python import _consumer, _producer, _safety, process_span
from recorder import Log, Recorder
from scripts import run

pytestmark = [
    pytest.mark.one_broker,
    pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="signals of POSIX"),
]


class TimeLimit(Exception):  # noqa: N818 (a limit, as libraries name it)
    """What the application's handler raises."""


def raise_limit(*_: object) -> None:
    raise TimeLimit


class Handler:
    """One that is an object, and one that is its method."""

    def __call__(self, *_: object) -> None:
        raise TimeLimit

    def method(self, *_: object) -> None:
        raise TimeLimit


Handle = Callable[..., Any]


@pytest.fixture
def handle() -> Iterator[Handle]:
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda handler: signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGUSR1, before)


def strike(*_: Any, **__: Any) -> Any:
    signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize(
    "handler",
    [
        raise_limit,
        Handler(),
        Handler().method,
        functools.partial(raise_limit, 1),
        functools.partial(Handler().method, 1),
    ],
)
def test_what_any_kind_of_handler_raises_is_raised_on(
    handle: Handle, handler: Any
) -> None:
    handle(handler)
    with pytest.raises(TimeLimit):
        _safety.call_hook("hook", strike)


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.default_int_handler])
def test_what_no_handler_has_raised_is_reported(
    handle: Handle, log: Log, action: Any
) -> None:
    handle(action)
    _safety.call_hook("hook", raise_limit)
    (message,) = log.take()
    assert message.startswith("Failed to run the hook")


def test_it_passes_the_hook_of_a_send_whose_span_ends(
    handle: Handle,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    handle(raise_limit)
    instrument(produce_hook=strike)
    producer = clients.producer()
    with pytest.raises(TimeLimit):
        producer.send(topic, b"1")
    span = recorder.one(f"send {topic}")
    assert (span.attributes or {})["error.type"] == "TimeLimit"
    assert recorder.open() == []


def test_it_passes_the_end_of_a_send_that_is_acknowledged_before_it_returns(
    handle: Handle,
    instrument: Instrument,
    clients: Clients,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A future that is done logs what its new callbacks raise."""
    plain = KafkaProducer.send

    def send(*args: Any, **kwargs: Any) -> Any:
        future = plain(*args, **kwargs)
        future.get(DEADLINE)
        return future

    monkeypatch.setattr(KafkaProducer, "send", send)
    monkeypatch.setattr(_producer, "add_message", strike)
    handle(raise_limit)
    instrument()
    producer = clients.producer()
    with pytest.raises(TimeLimit):
        producer.send(topic, b"1")


def test_it_passes_the_hooks_of_a_consumer_whose_spans_end(
    handle: Handle,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    handle(raise_limit)
    instrument(consume_hook=strike)
    clients.send(b"1", b"2", b"3")
    consumer = clients.consumer()
    next(consumer)
    with pytest.raises(TimeLimit):
        next(consumer)
    with pytest.raises(TimeLimit):
        for _ in consumer:
            pytest.fail("there is a time limit")
    assert recorder.open() == []
    assert len(recorder.named(f"poll {topic}")) == 1
    assert len(recorder.named(f"process {topic}")) == 1


def test_once_it_is_handled_the_loop_that_it_has_ended_is_gone(
    handle: Handle,
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the garbage collector, which may be late, and run on another thread."""
    handle(raise_limit)
    monkeypatch.setattr(_consumer, "_count_records", strike)
    clients.send(b"1")
    consumer = clients.consumer()
    gc.disable()
    try:
        with suppress(TimeLimit):
            for _ in consumer:
                pytest.fail("there is a time limit")
        assert recorder.open() == []
        assert trace.get_current_span() is trace.INVALID_SPAN
    finally:
        gc.enable()


def test_it_passes_what_a_failing_key_and_an_odd_record_are_asked_in(
    handle: Handle, instrumented: None, clients: Clients, topic: str
) -> None:
    class Key(int):
        __int__ = strike
        __str__ = strike

    class Partition:
        __int__ = strike

    class Odd:
        offset = property(strike)

    handle(raise_limit)
    producer = clients.producer(key_serializer=lambda _: b"")
    for arguments in ({"key": Key(1)}, {"partition": Partition()}):
        with pytest.raises(TimeLimit):
            producer.send(topic, b"1", **arguments)
    with pytest.raises(TimeLimit), process_span(cast("Any", Odd())):
        pytest.fail("there is a time limit")


STORM = """
    import os, random, signal, sys
    from recorder import Recorder
    how, address, topic = sys.argv[1:]
    recorder = Recorder()
    if how == "traced":
        from otel_kafka_python import KafkaPythonInstrumentor
        KafkaPythonInstrumentor().instrument(
            tracer_provider=recorder.tracer_provider,
            meter_provider=recorder.meter_provider,
        )
    from kafka import KafkaProducer

    class TimeLimit(Exception):
        pass

    def handler(*_):
        global strikes
        strikes += 1
        raise TimeLimit

    def send_on_and_on():
        while not strikes:
            producer.send(topic, b"value")

    signal.signal(signal.SIGALRM, handler)
    reached, producers = 0, []
    for number in range(200):
        # What strikes in one of the client's locks may leave it locked: from then on
        # it would strike while that is waited for, and nowhere else.
        if number % 5 == 0:
            producer = KafkaProducer(bootstrap_servers=address)
            producer.send(topic, b"value").get(30)
            # Dropped it would close, where an exception is lost whoever raises it.
            producers.append(producer)
        strikes = 0
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-3, 3e-3), 5)
            send_on_and_on()
        except TimeLimit:
            # The second frees what waits for a lock where the first was lost.
            reached += strikes == 1
    print(reached, flush=True)
    os._exit(0)
"""


def test_as_many_reach_the_application_as_of_the_plain_client(clients: Clients) -> None:
    """Within 3 percent of the 200 that are raised in a tight loop."""

    def reached(how: str) -> int:
        # Coverage would take the signals in its own calls.
        own = {"COVERAGE_PROCESS_START": ""}
        done = run(STORM, how, clients.address, clients.topic, environ=own)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert reached("traced") >= reached("plain") - 6
