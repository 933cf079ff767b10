"""`next_process_spans`: for programs whose loop is `while True: next(consumer)`."""

from __future__ import annotations

import contextvars
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
from opentelemetry import context, trace
from opentelemetry.instrumentation.utils import (
    is_instrumentation_enabled,
    suppress_instrumentation,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer

from clients import DEADLINE, IS_NG, Clients, poll, poll_records
from collector import collect
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor, process_span
from otel_kafka_python._processing import iterators
from otel_kafka_python._processing.scopes import Scope, innermost
from recorder import Log, Recorder
from scripts import run

pytestmark = pytest.mark.one_broker


def ids(spans: list[ReadableSpan]) -> list[int | None]:
    return [span.context and span.context.span_id for span in spans]


def parents(spans: list[ReadableSpan]) -> list[int | None]:
    return [span.parent and span.parent.span_id for span in spans]


def current() -> str | None:
    return getattr(trace.get_current_span(), "name", None)


@pytest.fixture
def consumer(instrument: Instrument, clients: Clients) -> Any:
    instrument(next_process_spans=True)
    clients.send(b"1", b"2", b"3")
    return clients.consumer()


@pytest.mark.parametrize("restoring", ["displace_held", "undo_left"])
def test_where_the_context_cannot_be_restored_the_next_record_comes_all_the_same(
    consumer: Any, log: Log, monkeypatch: pytest.MonkeyPatch, restoring: str
) -> None:
    def fail() -> None:
        raise RuntimeError

    assert next(consumer).offset == 0
    with monkeypatch.context() as patched:
        patched.setattr(iterators, restoring, fail)
        assert next(consumer).offset == 1
    (message,) = log.take()
    assert message.startswith("Failed to restore the context after a process span")


@pytest.mark.parametrize("under_span", [False, True])
def test_in_a_copy_of_its_context_a_record_that_is_over_is_no_parent(
    consumer: Any, clients: Clients, recorder: Recorder, topic: str, under_span: bool
) -> None:
    other = clients.consumer()
    next(consumer)
    copied = contextvars.copy_context()
    next(consumer)

    def ask() -> None:
        with (
            recorder.tracer.start_as_current_span("work")
            if under_span
            else nullcontext()
        ):
            assert next(other).offset == 0
            assert current() == f"process {topic}"
        other.close()

    copied.run(ask)
    first, last = recorder.named(f"process {topic}")
    assert (last.parent == first.parent) == (not under_span)


def test_an_excluded_record_is_not_processed(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    instrument(next_process_spans=True, excluded_topics=topic)
    clients.send(b"1")
    assert next(clients.consumer()).offset == 0
    assert current() is None


def test_a_record_is_processed_until_the_next(
    consumer: Any, recorder: Recorder, topic: str
) -> None:
    for expected in range(3):
        assert next(consumer).offset == expected
        assert current() == f"process {topic}"
        assert len(recorder.named(f"process {topic}")) == expected
        with recorder.tracer.start_as_current_span("work") as work:
            assert trace.get_current_span() is work
    consumer.close()
    assert current() is None
    sent = recorder.named(f"send {topic}")
    processed = recorder.named(f"process {topic}")
    worked = recorder.named("work")
    assert parents(processed) == ids(sent)
    assert parents(worked) == ids(processed)
    # As ever, `next` is a receive, too.
    assert len(recorder.named(f"poll {topic}")) == 3
    assert recorder.open() == []


ENDS: dict[str, Callable[[Any], Any]] = {
    "poll": lambda consumer: consumer.poll(0),
    "iteration": iter,
    "close": lambda consumer: consumer.close(),
    "uninstrument": lambda _: KafkaPythonInstrumentor().uninstrument(),
}


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_with_what_the_consumer_is_asked_next(
    consumer: Any, recorder: Recorder, topic: str, how: str
) -> None:
    next(consumer)
    assert current() == f"process {topic}"
    ENDS[how](consumer)
    assert current() is None
    assert len(recorder.named(f"process {topic}")) == 1
    assert recorder.open() == []


def test_it_ends_with_the_next_that_times_out(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(next_process_spans=True)
    clients.send(b"1")
    consumer = clients.consumer(consumer_timeout_ms=500)
    next(consumer)
    with pytest.raises(StopIteration):
        next(consumer)
    assert current() is None
    assert len(recorder.named(f"process {topic}")) == 1


def test_it_ends_with_the_consumer_that_is_dropped(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(next_process_spans=True)
    clients.send(b"1")
    consumer = clients.consumer()
    next(consumer)
    clients._made.remove(consumer)
    del consumer
    collect()
    assert current() is None
    clients.send(b"2")  # ends what finalisers have left behind
    assert len(recorder.named(f"process {topic}")) == 1


def test_it_ends_even_if_instrumentation_is_suppressed_by_then(
    consumer: Any, recorder: Recorder, topic: str
) -> None:
    next(consumer)
    with suppress_instrumentation():
        next(consumer)
        assert not is_instrumentation_enabled()
    assert len(recorder.named(f"process {topic}")) == 1
    assert recorder.open() == []
    # What the block has restored is undone as soon as the consumer is asked again.
    consumer.poll(0)
    assert current() is None


def test_a_loop_goes_on_with_its_own_spans(
    consumer: Any, recorder: Recorder, topic: str
) -> None:
    next(consumer)
    for record in consumer:
        assert current() == f"process {topic}"
        if record.offset == 2:
            break
    assert current() is None
    assert len(recorder.named(f"process {topic}")) == 3


def test_process_span_adopts_it(consumer: Any, recorder: Recorder, topic: str) -> None:
    record = next(consumer)
    with pytest.raises(ValueError, match="wrong"), process_span(record):
        raise ValueError("wrong")
    consumer.close()
    span = recorder.one(f"process {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ValueError"


def test_the_hook_is_called_once_with_the_process_span(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    seen: list[str] = []
    instrument(
        next_process_spans=True,
        consume_hook=lambda span, record, args, kwargs: seen.append(span.name),
    )
    clients.send(b"1")
    consumer = clients.consumer()
    next(consumer)
    consumer.close()
    assert seen == [f"process {topic}"]


def test_asked_from_another_thread_it_ends_and_touches_no_context(
    consumer: Any, recorder: Recorder, topic: str
) -> None:
    next(consumer)
    mine = trace.get_current_span()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next, consumer).result(DEADLINE)
        assert len(recorder.named(f"process {topic}")) == 1
        # It is current in the pool's thread now, until that consumer is asked again.
        assert pool.submit(current).result(DEADLINE) == f"process {topic}"
        assert trace.get_current_span() is mine
        next(consumer)
    consumer.close()
    assert current() is None
    assert len(recorder.named(f"process {topic}")) == 3


def test_without_process_spans_nothing_is_current(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(next_process_spans=True, process_spans=False)
    clients.send(b"1")
    next(clients.consumer())
    assert current() is None
    assert recorder.names() == [f"poll {topic}", f"send {topic}"]


def test_unless_asked_for_nothing_is_current(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    clients.send(b"1")
    next(clients.consumer())
    assert current() is None


def test_a_next_inside_a_span_leaves_nothing_behind(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    def scopes() -> set[int]:
        return {id(each) for each in gc.get_objects() if issubclass(type(each), Scope)}

    instrument(next_process_spans=True)
    clients.send(*(b"value",) * 20)
    before = scopes()
    consumer = clients.consumer()
    for _ in range(20):
        with recorder.tracer.start_as_current_span("job"):
            next(consumer)
    assert len(scopes() - before) == 1
    consumer.close()
    assert current() is None
    assert len(recorder.named(f"process {topic}")) == 20


def test_what_a_block_over_several_records_restores_is_undone(
    consumer: Any, recorder: Recorder, topic: str
) -> None:
    next(consumer)
    with recorder.tracer.start_as_current_span("block"):
        next(consumer)
    next(consumer)
    assert current() == f"process {topic}"
    consumer.close()
    assert current() is None
    first, second, third = recorder.named(f"process {topic}")
    block = recorder.one("block")
    assert parents([block, second]) == ids([first, block])
    assert parents([third]) == ids([recorder.named(f"send {topic}")[2]])


@pytest.mark.parametrize("how", ["next", "loop", "poll", "iterator"])
def test_a_held_span_is_left_when_another_consumer_is_asked_for_more(
    consumer: Any, clients: Clients, recorder: Recorder, topic: str, how: str
) -> None:
    other = clients.consumer()
    with recorder.tracer.start_as_current_span("around") as around:
        next(consumer)
        if how == "next":
            next(other)
        elif how == "loop":
            for _ in other:
                break
        elif how == "poll":
            poll(other)
        else:
            next(iter(other))
        if how != "next":
            assert trace.get_current_span() is around
        other.close()
        assert trace.get_current_span() is around
        consumer.close()
        assert trace.get_current_span() is around
    assert current() is None
    expected = ids([recorder.one("around")])
    spans = recorder.named(f"process {topic}")
    assert len(spans) == 1 + (how in {"next", "loop"})
    for span in [*spans, *recorder.named(f"poll {topic}")]:
        assert parents([span]) == expected
    assert recorder.open() == []


@pytest.mark.parametrize("covered", [False, True])
def test_a_held_span_is_no_parent_of_another_records_span(
    consumer: Any, clients: Clients, recorder: Recorder, topic: str, covered: bool
) -> None:
    records = poll_records(clients.consumer(), 3)
    first = next(consumer)
    held = trace.get_current_span()
    token = context.attach(context.set_value("tenant", "7")) if covered else None
    with process_span(records[1]):
        assert context.get_value("tenant") == ("7" if covered else None)
    assert trace.get_current_span() is held
    with process_span([records[2]]):
        pass
    with process_span(first) as adopted:
        assert adopted is held
    if token is not None:
        context.detach(token)
    consumer.close()
    sent = recorder.named(f"send {topic}")
    one, two, batch = recorder.named(f"process {topic}")
    assert parents([one, two, batch]) == [*ids(sent[:2]), None]


def test_process_span_adopts_the_span_of_a_record_though_another_is_held(
    consumer: Any, clients: Clients, recorder: Recorder, topic: str
) -> None:
    other = clients.consumer()
    first, second = next(consumer), next(other)
    outer = trace.get_current_span()
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"), process_span(first) as span:
            assert trace.get_current_span() is span
            assert span is not outer
            with process_span(first) as again:
                assert again is span
            raise ValueError("wrong")
        assert trace.get_current_span() is outer
    with process_span(second) as span:
        assert span is outer
    consumer.close()
    other.close()
    assert current() is None
    assert recorder.open() == []
    of_first, of_second = recorder.named(f"process {topic}")
    assert len(of_first.events) == 2
    assert of_second.events == ()


def test_in_a_copied_context_a_record_that_is_no_longer_held_is_processed_again(
    consumer: Any, clients: Clients, recorder: Recorder, topic: str
) -> None:
    other = clients.consumer()
    first = next(consumer)
    next(other)
    with process_span(first) as held:
        copied = contextvars.copy_context()

    def process() -> None:
        with process_span(first) as span:
            assert span is held
            scope = innermost.get()
            assert scope is not None
            # No search for another record goes round in circles.
            assert scope._outer is not scope

    copied.run(process)
    consumer.close()
    other.close()
    assert len(recorder.named(f"process {topic}")) == 2


def test_a_span_that_the_application_left_current_stays_though_it_has_ended(
    consumer: Any, recorder: Recorder
) -> None:
    """No block bounds the processing of a record, so it may be around the next one."""
    next(consumer)
    span = recorder.tracer.start_span("work")
    token = context.attach(trace.set_span_in_context(span))
    span.end()
    next(consumer)
    consumer.close()
    assert trace.get_current_span() is span
    context.detach(token)
    assert current() is None


def test_the_scope_of_a_loop_stays_when_another_consumer_is_asked_for_more(
    consumer: Any, clients: Clients
) -> None:
    other = clients.consumer()
    for _ in consumer:
        span = trace.get_current_span()
        poll(other)
        assert trace.get_current_span() is span
        break


def test_each_of_several_consumers_records_is_processed_until_its_own_next(
    consumer: Any, clients: Clients, recorder: Recorder, topic: str
) -> None:
    def scopes() -> set[int]:
        return {id(each) for each in gc.get_objects() if issubclass(type(each), Scope)}

    consumers = [consumer, clients.consumer(), clients.consumer()]
    before = scopes()
    for expected in range(3):
        spans = []
        records = []
        for each in consumers:
            records.append(next(each))
            spans.append(trace.get_current_span())
        for record, held in zip(records, spans, strict=True):
            assert record.offset == expected
            with process_span(record) as span:
                assert span is held
    del span, held
    # One that is over may stay until another one is left.
    assert len(scopes() - before) <= len(consumers) + 1
    for each in consumers:
        each.close()
    assert len(recorder.named(f"process {topic}")) == 9


ENQUEUE = """
    import sys
    from kafka import KafkaProducer
    from kq import Queue
    from opentelemetry import context, trace
    import jobs
    address, topic, _ = sys.argv[1:]
    queue = Queue(topic, KafkaProducer(bootstrap_servers=address))
    with trace.get_tracer("shop").start_as_current_span("order"):
        for number in range(2):
            queue.enqueue(jobs.ship, number)
    queue.producer.flush()
"""
WORK = """
    import sys
    from kafka import KafkaConsumer
    from kq import Worker
    from opentelemetry import context, trace
    address, topic, how = sys.argv[1:]
    consumer = KafkaConsumer(
        bootstrap_servers=address, group_id=topic, auto_offset_reset="earliest",
        consumer_timeout_ms=4000,
    )
    worker = Worker(topic, consumer)
    if how == "until nothing comes":
        try:
            worker.start()
        except StopIteration:
            pass
    else:
        # Nobody asks for the next: the last job's scope lasts as long as the consumer.
        assert worker.start(max_messages=2) == 2
        del worker  # which closes it
    assert trace.get_current_span() is trace.INVALID_SPAN
    # The worker would do it as the interpreter ends, when kafka-python's own threads
    # have gone already.
    consumer.close()
"""
JOBS = """
from opentelemetry import context, trace

def ship(number):
    with trace.get_tracer("shop").start_as_current_span(f"ship {number}"):
        pass
"""


@pytest.mark.skipif(IS_NG, reason="kq requires kafka-python itself")
@pytest.mark.parametrize("how", ["until nothing comes", "so many jobs"])
def test_a_job_queue_that_calls_next_has_its_jobs_in_the_enqueuers_trace(
    clients: Clients, topic: str, tmp_path: Any, how: str
) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    with OtlpProtoTestServer() as receiver:
        for script in (ENQUEUE, WORK):
            done = run(
                script,
                clients.address,
                topic,
                how,
                launched=True,
                paths=(tmp_path,),
                environ={
                    "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
                    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                    "OTEL_LOGS_EXPORTER": "none",
                    "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
                    "OTEL_PYTHON_KAFKA_NEXT_PROCESS_SPANS": "true",
                },
            )
            assert done.returncode == 0, done.stderr
        # An order, and of each job: enqueued, received, processed, shipped, committed.
        spans = {each.span.name: each.span for each in receiver.get_spans(11, DEADLINE)}
    order = spans["order"]
    for number in range(2):
        job = spans[f"ship {number}"]
        assert job.trace_id == order.trace_id
        assert job.parent_span_id
    assert spans[f"process {topic}"].trace_id == order.trace_id
