"""How operations end that nothing ends: dropped futures, exits, forks."""

from __future__ import annotations

import gc
import os
import signal
import sys
import textwrap
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.future import Future
from kafka.producer.future import FutureProduceResult, FutureRecordMetadata
from opentelemetry import trace
from opentelemetry.trace import StatusCode

from clients import DEADLINE, VERSION, Clients
from collector import collect
from conftest import Instrument
from otel_kafka_python import (
    KafkaPythonInstrumentor,
    _endings,
    _kafka,
    _metrics,
    process_span,
)
from otel_kafka_python._operation import PendingOperation
from recorder import Log, Recorder
from scripts import forks, needs_fork, run, run_recorded


def pending(topic: str) -> FutureRecordMetadata:
    """A future as `send` returns it, which nothing will ever complete."""
    result = FutureProduceResult(TopicPartition(topic, 7))
    return FutureRecordMetadata(result, 0, 0, None, -1, 1, -1)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer that loses its messages.

    It stands in for 3.0.12 after a broker's death, which forgets some batches and
    not others as timing will have it.
    """
    monkeypatch.setattr(
        KafkaProducer, "send", lambda self, topic, value=None, **_: pending(topic)
    )


@pytest.mark.cpython
def test_a_future_that_is_dropped_ends_its_span_with_the_next_operation(
    forgetful: None,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    instrument()
    producer = clients.producer()
    future = producer.send(topic, b"lost")
    assert recorder.open() == [f"send {topic}"]
    del future
    collect()
    # A finaliser must not call the SDK: nothing has ended yet.
    assert recorder.open() == [f"send {topic}"]
    kept = producer.send(f"{topic}-next", b"kept")
    assert recorder.open() == [f"send {topic}-next"]
    assert not kept.is_done
    span = recorder.one(f"send {topic}")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "the outcome is unknown"
    assert span.attributes is not None
    assert span.attributes["error.type"] == "outcome_unknown"
    assert span.attributes["messaging.destination.name"] == topic
    assert recorder.count(
        "messaging.client.sent.messages",
        error_type="outcome_unknown",
        messaging_destination_partition_id="7",
    ) == 1  # fmt: skip
    _endings.abandon_all()


@pytest.mark.cpython
def test_at_the_exit_a_span_ends_when_its_future_was_dropped(
    forgetful: None,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    instrument()
    future = clients.producer().send(topic, b"lost")
    del future
    collect()
    dropped = time.time_ns()
    _endings.abandon_all()
    span = recorder.one(f"send {topic}")
    assert span.end_time is not None
    assert span.end_time <= dropped


@pytest.mark.cpython
def test_what_is_still_open_is_found_and_ended_once(
    forgetful: None,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    instrument()
    producer = clients.producer()
    futures = [producer.send(topic, b"lost") for _ in range(10)]
    _endings.abandon_all()
    assert recorder.open() == []
    late = SimpleNamespace(partition=7, offset=0, serialized_value_size=1)
    for future in futures:
        future.success(late)
    futures.clear()
    collect()
    _endings.abandon_all()
    assert len(recorder.ended) == 10


@pytest.mark.cpython
class Refusing:
    """What a span's `set_attributes` becomes to raise an error."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, *_: Any) -> None:
        raise self.error


@pytest.mark.cpython
def test_a_span_that_cannot_be_told_its_error_ends_when_its_future_is_dropped(
    forgetful: None,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
) -> None:
    instrument()
    producer = clients.producer()
    future = producer.send(topic, b"lost")
    cast("Any", recorder.started[0]).set_attributes = Refusing(ValueError)
    del future
    collect()
    kept = producer.send(f"{topic}-next", b"kept")
    assert recorder.open() == [f"send {topic}-next"]
    assert not kept.is_done
    _endings.abandon_all()
    assert [message.partition(";")[0] for message in log.take()] == [
        "Failed to record an error", "Failed to end a span",
    ]  # fmt: skip


def fail_its_call(topic: str) -> Any:
    raise ValueError(topic)


def fail_at_once(topic: str) -> Any:
    """As up to 2.3, where `send` returns some of its own errors."""
    future = pending(topic)
    future.failure(ValueError())
    return future


@pytest.mark.parametrize(
    ("send", "end", "logged"),
    [
        (fail_its_call, None, 0),
        (fail_at_once, None, 0),
        (pending, lambda future: future.failure(ValueError()), 1),
        (pending, lambda _: _endings.abandon_all(), 0),
    ],
    ids=["the call", "the future", "the answer", "the exit"],
)
def test_an_interrupt_of_a_failure_leaves_no_span_open(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    log: Log,
    send: Any,
    end: Any,
    logged: int,
) -> None:
    def interrupted_send(*_: Any, **__: Any) -> Any:
        cast("Any", recorder.started[0]).set_attributes = Refusing(KeyboardInterrupt)
        return send(topic)

    monkeypatch.setattr(KafkaProducer, "send", interrupted_send)
    instrument()
    producer = clients.producer()
    kept = None
    with pytest.raises(KeyboardInterrupt):
        kept = producer.send(topic, b"value")
        end(kept)
    assert recorder.open() == []
    assert len(log.take()) == logged
    del kept
    KafkaPythonInstrumentor().uninstrument()


def test_a_failure_whose_facts_cannot_be_read_ends_its_span_with_the_error(
    forgetful: None,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    log: Log,
) -> None:
    instrument()
    future = clients.producer().send(topic, b"value")
    monkeypatch.setattr(_kafka, "failed_send", Refusing(ValueError))
    future.failure(TimeoutError())
    span = recorder.one(f"send {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "TimeoutError"
    (message,) = log.take()
    assert message.startswith("Failed to end an operation with its answer")


@pytest.mark.cpython
def test_what_an_interrupt_left_half_made_is_dropped_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    PendingOperation.__new__(PendingOperation)
    collect()
    assert raised == []


def test_an_answer_that_cannot_be_read_ends_its_span_and_raises_nothing(
    forgetful: None,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    log: Log,
) -> None:
    monkeypatch.setattr(Future, "error_on_callbacks", True)
    instrument()
    future = clients.producer().send(topic, b"value")
    future.success(object())
    (message,) = log.take()
    assert message.startswith("Failed to end an operation with its answer")
    span = recorder.one(f"send {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "outcome_unknown"


class Interrupting:
    """Metadata whose reading is interrupted."""

    @property
    def partition(self) -> Any:
        raise KeyboardInterrupt


def test_an_interrupt_in_an_answer_on_the_main_thread_is_the_applications(
    forgetful: None,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
) -> None:
    instrument()
    future = clients.producer().send(topic, b"value")
    with pytest.raises(KeyboardInterrupt):
        future.success(Interrupting())
    (message,) = log.take()
    assert message.startswith("Failed to end an operation with its answer")
    assert recorder.open() == []


@pytest.mark.cpython
def test_a_future_that_is_done_keeps_nothing_of_its_send(
    instrumented: None, clients: Clients, topic: str
) -> None:
    """Up to 2.1 it keeps its callbacks, and the application may keep it."""
    producer = clients.producer()
    futures = [producer.send(topic, b"value") for _ in range(10)]
    producer.close()  # and its thread
    assert all(future.is_done for future in futures)
    kept = [
        each for each in gc.get_objects() if issubclass(type(each), PendingOperation)
    ]
    # Those of an earlier test, which it has interrupted, may not have gone yet.
    assert [each for each in kept if each.template.topic == topic] == []


@forks
@needs_fork
def test_a_forked_child_drops_what_its_parent_has_started(
    forgetful: None,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    instrument()
    producer = clients.producer()
    futures = [producer.send(topic, b"lost")]
    child = os.fork()
    if child == 0:
        futures.clear()
        own = producer.send(topic, b"own")
        del own
        _endings.abandon_all()
        # The child has ended its own and nothing else.
        os._exit(0 if len(recorder.started) - len(recorder.ended) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert recorder.open() == [f"send {topic}"]
    _endings.abandon_all()
    assert recorder.open() == []


@forks
@needs_fork
@pytest.mark.cpython
def test_a_child_forked_in_a_loop_leaves_the_loops_span_to_its_parent(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    child = None
    for _ in clients.consumer():
        child = os.fork()
        break
    if child == 0:
        current = trace.get_current_span() is trace.INVALID_SPAN
        os._exit(0 if current and recorder.open() == [f"process {topic}"] else 1)
    assert child is not None
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert recorder.open() == []


# Up to kafka-python 2.3, the finaliser of a producer that is not closed may hang at
# the exit: the interpreter has ended the producer's thread, which may hold a lock.
WITHOUT_FINALISER = """
    import kafka
    if kafka.__version__ < "3":
        del KafkaProducer.__del__
"""

EXIT = """
    producer = KafkaProducer(bootstrap_servers=sys.argv[1], linger_ms=60000)
    kept = [producer.send(sys.argv[2], b"value") for _ in range(5)]
"""


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.cpython
def test_a_child_forked_in_a_loop_reports_no_failure_of_the_loops_span(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN", "logs")
    instrument()
    clients.send(b"1")
    for record in clients.consumer():
        child = os.fork()
        if child == 0:
            with suppress(ValueError), process_span(record):
                raise ValueError
            os._exit(len(recorder.events()))
        break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_exit_without_flush_ends_every_span(clients: Clients, topic: str) -> None:
    told = run_recorded(WITHOUT_FINALISER + EXIT, clients.address, topic)
    assert told["open"] == []
    assert len(told["ended"]) == 5
    # At its exit 2.0 aborts what it has not sent yet, and what is not answered yet.
    aborted = [each for each in told["ended"] if each[2] == "IllegalStateError"]
    assert 5 - len(aborted) <= sum(told["sent"].values()) <= 5
    assert aborted == [] or VERSION < (2, 1)
    # Whatever became of the messages, their spans say so.
    for _, status, error_type in told["ended"]:
        assert (status == "ERROR") == (error_type is not None)
    # kafka-python itself may have something to say.
    assert "otel_kafka_python" not in told["stderr"]


DEATH = """
    import sys
    from embedded_broker import EmbeddedBroker
    with EmbeddedBroker() as broker:
        producer = KafkaProducer(
            bootstrap_servers=broker.address, request_timeout_ms=1000, **{config}
        )
        producer.send("topic", b"first").get(30)
        broker.kill()
        futures = []
        for number in range(20):
            try:
                futures.append(producer.send("topic", bytes(20000)))
            except Exception as error:
                print(type(error), file=sys.stderr)
"""


def test_an_exit_after_the_brokers_death_ends_every_span() -> None:
    """3.0.12, idempotent as it is by default, never completes some futures."""
    config = {"delivery_timeout_ms": 2000} if VERSION >= (2, 2) else {}
    told = run_recorded(WITHOUT_FINALISER + DEATH.format(config=config))
    assert told["open"] == []
    assert len(told["ended"]) >= 20
    errors = [error_type for _, _, error_type in told["ended"]]
    assert errors[0] is None
    assert None not in errors[1:]


@pytest.mark.cpython
def test_a_loop_that_the_exit_interrupts_has_its_span_ended(
    clients: Clients, topic: str
) -> None:
    clients.send(b"1")
    told = run_recorded(
        """
        consumer = KafkaConsumer(
            sys.argv[2], bootstrap_servers=sys.argv[1], auto_offset_reset="earliest"
        )
        for record in consumer:
            sys.exit()
        """,
        clients.address,
        topic,
    )
    assert told["open"] == []
    assert [name for name, _, _ in told["ended"]] == [f"process {topic}"]


THREAD_IN_LOOP = """
    import threading
    inside = threading.Event()
    consumer = KafkaConsumer(
        sys.argv[2], bootstrap_servers=sys.argv[1], auto_offset_reset="earliest"
    )
    def loop():
        for record in consumer:
            inside.set()
            threading.Event().wait()
    threading.Thread(target=loop, daemon=True).start()
    inside.wait()
"""


def test_a_thread_in_its_loop_at_the_exit_has_its_span_ended(
    clients: Clients, topic: str
) -> None:
    clients.send(b"1")
    told = run_recorded(THREAD_IN_LOOP, clients.address, topic)
    assert told["open"] == []


@pytest.mark.cpython
def test_an_exit_ends_the_spans_of_frozen_objects(clients: Clients, topic: str) -> None:
    clients.send(b"1")
    frozen = THREAD_IN_LOOP + "    import gc\n    gc.freeze()\n"
    told = run_recorded(frozen, clients.address, topic)
    assert told["open"] == []


ORDER = """
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from otel_kafka_python import KafkaPythonInstrumentor
    class Order(SpanProcessor):
        def on_end(self, span):
            print("ended", flush=True)
        def shutdown(self):
            print("shut down", flush=True)
    provider = TracerProvider()
    provider.add_span_processor(Order())
    KafkaPythonInstrumentor().instrument(tracer_provider=provider)
"""


def test_an_exit_ends_the_spans_before_their_provider_shuts_down(
    clients: Clients, topic: str
) -> None:
    clients.send(b"1")
    script = "import sys\nfrom kafka import KafkaConsumer\n" + textwrap.dedent(
        ORDER + THREAD_IN_LOOP
    )
    done = run(script, clients.address, topic)
    assert done.stdout.split("\n")[:2] == ["ended", "shut down"], done.stderr


@forks
@needs_fork
def test_a_fork_while_another_thread_counts_lets_the_child_count() -> None:
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with _metrics._counting:
            held.set()
            forked.wait(DEADLINE)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(DEADLINE)
    child = os.fork()
    if child == 0:
        signal.alarm(int(DEADLINE))  # a lock that nobody releases is waited for
        _metrics.Tally({}).count(1)
        os._exit(0)
    forked.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_close_that_times_out_ends_nothing_early(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    if VERSION < (2, 1):
        pytest.skip("2.0 aborts what is outstanding")
    producer = clients.producer(linger_ms=int(DEADLINE * 1000))
    producer.send(topic, b"first").get  # noqa: B018 (it is not waited for)
    before = recorder.open()
    with pytest.raises(Exception):  # noqa: B017 (whichever it is)
        producer.close(timeout=-1)
    assert recorder.open() == before


def test_messages_in_flight_survive_uninstrument(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument()
    producer = clients.producer(linger_ms=int(DEADLINE * 1000))
    producer.send(topic, b"in flight")
    KafkaPythonInstrumentor().uninstrument()
    assert recorder.open() == [f"send {topic}"]
    producer.flush()
    assert recorder.open() == []
    assert recorder.one(f"send {topic}").status.status_code is StatusCode.UNSET


@pytest.mark.cpython
def test_an_interpreter_without_cpythons_own_functions_loses_no_more_than_loops(
    clients: Clients, topic: str
) -> None:
    clients.send(b"value")
    told = run_recorded(
        """
        from otel_kafka_python import process_span
        address, topic = sys.argv[1:]
        producer = KafkaProducer(bootstrap_servers=address)
        producer.send(topic, b"value").get(30)
        consumer = KafkaConsumer(
            topic, bootstrap_servers=address, auto_offset_reset="earliest"
        )
        for record in consumer:
            break
        with process_span(record):
            pass
        with process_span(object()):
            pass
        consumer.close()
        producer.close()
        """,
        clients.address,
        topic,
        first="import gc, sys; del gc.callbacks, gc.unfreeze, sys._getframe\n",
    )
    (refused,) = told["logged"]
    assert "Failed to trace the processing of a record" in str(refused)
    assert told["open"] == []
    assert "Exception ignored" not in told["stderr"]
    names = [name for name, *_ in told["ended"]]
    assert names == [f"send {topic}", f"poll {topic}", f"process {topic}"]
