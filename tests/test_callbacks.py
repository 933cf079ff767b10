"""What the application adds to the future of a send runs in its own context."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

import pytest
from kafka.future import Future
from kafka.producer.future import FutureRecordMetadata
from opentelemetry import baggage, context, trace
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
from opentelemetry.instrumentation.utils import suppress_instrumentation

from clients import DEADLINE, Clients
from collector import collect
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor
from recorder import Log, Recorder

pytestmark = pytest.mark.one_broker


def unsent() -> FutureRecordMetadata:
    """A future that the test completes: no broker does so at a known moment."""
    return FutureRecordMetadata(Future(), 0, 0, None, -1, 1, -1)


METHODS = ["add_callback", "add_errback", "add_both"]


class Call:
    """A callback that remembers how it was called, and in which context."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.happened = threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        span = trace.get_current_span()
        self.calls.append((args, kwargs, getattr(span, "name", None)))
        self.thread = threading.current_thread()
        self.happened.set()


@pytest.mark.parametrize("method", ["add_callback", "add_both"])
def test_a_callback_on_the_senders_thread_has_the_context_it_was_added_in(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    method: str,
) -> None:
    producer = clients.producer(linger_ms=300)
    call = Call()
    with recorder.tracer.start_as_current_span("request"):
        future = producer.send(topic, b"value")
        added = getattr(future, method)(call, 1, more=2)
    assert added is future
    assert call.happened.wait(DEADLINE)
    metadata = future.get(DEADLINE)
    assert call.calls == [((1, metadata), {"more": 2}, "request")]
    assert call.thread is not threading.current_thread()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("succeeds", [True, False], ids=["succeeds", "fails"])
def test_a_callback_on_a_future_that_is_done_runs_at_once_in_the_same_way(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    method: str,
    succeeds: bool,
) -> None:
    future = unsent()
    outcome = object() if succeeds else RuntimeError("failed")
    (future.success if succeeds else future.failure)(outcome)
    call = Call()
    with recorder.tracer.start_as_current_span("request"):
        getattr(future, method)(call, "first")
    runs = {"add_callback": succeeds, "add_errback": not succeeds, "add_both": True}
    expected: list[Any] = [(("first", outcome), {}, "request")] if runs[method] else []
    assert call.calls == expected


def test_an_errback_has_the_context_it_was_added_in(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    future = unsent()
    call = Call()
    with recorder.tracer.start_as_current_span("request"):
        future.add_errback(call)
    error = RuntimeError("failed")
    future.failure(error)
    assert call.calls == [((error,), {}, "request")]
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_each_callback_has_its_own_context_and_the_order_is_as_before(
    instrumented: None, clients: Clients, topic: str
) -> None:
    future = unsent()
    seen: list[Any] = []
    for number in range(3):
        token = context.attach(baggage.set_baggage("number", number))
        future.add_callback(
            lambda _, number=number: seen.append(
                (number, baggage.get_baggage("number"))
            )
        )
        context.detach(token)
    future.success(None)
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_a_callback_by_keyword_is_as_one_by_position(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    future = unsent()
    call = Call()
    with recorder.tracer.start_as_current_span("request"):
        future.add_callback(f=call, more=1)
    future.success("done")
    assert call.calls == [(("done",), {"more": 1}, "request")]


def test_a_callback_that_raises_is_logged_as_ever_and_those_after_it_run(
    instrument: Instrument,
    clients: Clients,
    topic: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def outcome() -> list[Any]:
        def fail(_: Any) -> None:
            raise RuntimeError("from a callback")

        caplog.clear()
        future = unsent()
        call = Call()
        future.add_callback(fail)
        future.add_callback("not callable")
        future.add_callback(call)
        with caplog.at_level(logging.ERROR, "kafka"):
            future.success(1)
        logged = [
            (record.getMessage(), record.exc_info and record.exc_info[0])
            for record in caplog.records
        ]
        with pytest.raises(TypeError):
            future.add_callback()
        return [logged, [args for args, _, _ in call.calls]]

    plain = outcome()
    instrument()
    assert outcome() == plain


def test_what_a_callback_leaves_current_is_not_the_next_ones(
    instrumented: None, clients: Clients
) -> None:
    future = unsent()
    future.add_callback(lambda _: context.attach(baggage.set_baggage("left", "behind")))
    future.success(None)
    assert baggage.get_baggage("left") is None


@pytest.mark.one_client
@pytest.mark.parametrize(
    ("detaching", "logged"),
    [
        (context, "Failed to leave the context of a producer's code"),
        (ContextVarsRuntimeContext, "Failed to detach context"),
    ],
    ids=["the function", "the runtime context"],
)
def test_where_detaching_fails_the_context_from_before_is_restored(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    detaching: Any,
    logged: str,
) -> None:
    def fail(*_: Any) -> None:
        raise LookupError

    producer = clients.producer(value_serializer=bytes)
    future = unsent()
    future.add_callback(Call())
    with recorder.tracer.start_as_current_span("request") as request:
        monkeypatch.setattr(detaching, "detach", fail)
        producer.send(topic, b"value")
        assert trace.get_current_span() is request
        future.success(None)
        assert trace.get_current_span() is request
        monkeypatch.undo()
    assert {each.split(";")[0] for each in log.take()} == {logged}


def test_suppression_goes_with_the_callback(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(linger_ms=300)
    done = threading.Event()

    def send_again(_: Any) -> None:
        producer.send(f"{topic}-again", b"value")
        done.set()

    with suppress_instrumentation():
        # The topic's metadata must be there: the sender must not wait for itself.
        producer.send(f"{topic}-again", b"first").get(DEADLINE)
        producer.send(topic, b"value").add_callback(send_again)
    assert done.wait(DEADLINE)
    producer.flush()
    assert recorder.started == []


def test_a_message_that_a_callback_sends_is_in_the_trace(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(linger_ms=300)
    done = threading.Event()

    def send_again(_: Any) -> None:
        producer.send(f"{topic}-again", b"value")
        done.set()

    producer.send(f"{topic}-again", b"first").get(DEADLINE)
    with recorder.tracer.start_as_current_span("request"):
        producer.send(topic, b"value").add_callback(send_again)
    assert done.wait(DEADLINE)
    producer.flush()
    _, again = recorder.named(f"send {topic}-again")
    assert again.parent == recorder.one("request").context


def test_uninstrumented_a_callback_is_passed_as_it_is(
    instrument: Instrument, clients: Clients
) -> None:
    future = unsent()
    instrument()
    add = future.add_callback
    KafkaPythonInstrumentor().uninstrument()
    call = Call()
    add(call)
    assert call in future._callbacks
    assert "add_callback" not in vars(FutureRecordMetadata)


@pytest.mark.cpython
def test_a_future_that_is_done_keeps_no_context(instrumented: None) -> None:
    class Kept:
        pass

    kept = Kept()
    dropped = weakref.ref(kept)
    future = unsent()
    token = context.attach(context.set_value("kept", kept))
    future.add_callback(lambda _: None)
    context.detach(token)
    future.success(None)
    del kept, token
    collect()
    assert dropped() is None
