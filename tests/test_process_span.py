"""`process_span`: in loops, threads, batches, and where nothing is instrumented."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, suppress
from inspect import currentframe
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from clients import Clients, poll
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor, _config, process_span
from recorder import Log, Recorder, attributes_of
from scripts import run

pytestmark = pytest.mark.one_broker


class RefusedError(Exception):
    """What an application raises."""


def batch_of(clients: Clients, count: int, **arguments: Any) -> Any:
    """What one poll returned, of so many records."""
    clients.send(*(str(number).encode() for number in range(count)), **arguments)
    consumer = clients.consumer()
    while True:
        polled = poll(consumer)
        if sum(map(len, polled.values())) == count:
            return polled
        consumer.seek_to_beginning()


def one_of(clients: Clients) -> Any:
    ((record,),) = batch_of(clients, 1).values()
    return record


def ids(spans: list[ReadableSpan]) -> list[int]:
    return [span.context.span_id for span in spans if span.context]


def failed(span: ReadableSpan) -> bool:
    assert span.attributes is not None
    return (
        span.status.status_code is StatusCode.ERROR
        and span.attributes["error.type"] == "RefusedError"
        and [event.name for event in span.events] == ["exception"]
    )


@pytest.mark.cpython
def test_in_a_loop_it_adopts_the_loops_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    for record in clients.consumer():
        around = trace.get_current_span()
        with process_span(record) as span:
            assert span is around
        assert trace.get_current_span() is around
        assert around.is_recording()
        if record.offset == 1:
            break
    assert len(recorder.named(f"process {topic}")) == 2
    assert recorder.count("messaging.process.duration") == 2


@pytest.mark.cpython
def test_in_an_inner_loop_it_adopts_the_outer_loops_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    inner = clients.consumer()
    next(inner)
    for outer in clients.consumer():
        around = trace.get_current_span()
        for _ in inner:
            with process_span(outer) as span:
                assert span is around
            break
        break
    assert len(recorder.named(f"process {topic}")) == 2


def test_in_a_loop_the_exception_is_recorded_on_the_loops_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    for record in clients.consumer():
        try:
            with process_span(record):
                if record.offset == 0:
                    raise RefusedError("no")
        except RefusedError:
            continue
        break
    first, second = recorder.named(f"process {topic}")
    assert failed(first)
    assert first.status.description == "no"
    assert second.status.status_code is StatusCode.UNSET
    assert recorder.count("messaging.process.duration", error_type="RefusedError") == 1
    assert recorder.count("messaging.process.duration") == 2


@pytest.mark.cpython
@pytest.mark.parametrize("cached", [False, True], ids=["new", "cached"])
def test_the_exception_of_each_attempt_is_recorded_once(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, cached: bool
) -> None:
    """A new exception often has the identity of the one before."""
    clients.send(b"1")
    always = RefusedError("no")

    def attempt(record: Any, kind: type[Exception]) -> None:
        with process_span(record), process_span(record):
            raise always if cached else kind

    def consume() -> None:
        for record in clients.consumer():
            for kind in (RefusedError, KeyError, RefusedError):
                with suppress(kind, RefusedError):
                    attempt(record, kind)
            try:
                attempt(record, RefusedError)
            except RefusedError:
                with process_span(record):
                    raise

    with pytest.raises(RefusedError):
        consume()
    span = recorder.one(f"process {topic}")
    recorded = [(event.attributes or {})["exception.type"] for event in span.events]
    expected = ["RefusedError", "KeyError", "RefusedError", "RefusedError"]
    if cached:
        expected[1] = "RefusedError"
    assert [str(name).rpartition(".")[2] for name in recorded] == expected


@pytest.mark.cpython
def test_each_attempt_in_a_handler_of_another_exception_is_recorded(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    always = RefusedError("no")
    for record in clients.finite(1):
        try:
            raise KeyError
        except KeyError:
            for _ in range(2):
                with suppress(RefusedError), process_span(record):
                    raise always from None
    assert len(recorder.one(f"process {topic}").events) == 2


def test_in_a_loop_over_a_polled_batch_it_adopts_too(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    for records in batch_of(clients, 2).values():
        for record in records:
            with pytest.raises(RefusedError), process_span(record):
                raise RefusedError
    assert [failed(span) for span in recorder.named(f"process {topic}")] == [True] * 2


@pytest.mark.cpython
def test_another_record_in_a_loop_gets_a_span_of_its_own(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    (records,) = batch_of(clients, 2).values()
    for _ in records:
        with process_span(records[1]) as span:
            current = trace.get_current_span()
            assert current is span
        break
    outer, inner = recorder.named(f"process {topic}")
    assert inner.parent is not None
    assert [inner.parent.span_id] == ids([outer])
    assert [a["messaging.kafka.offset"] for a in attributes_of([outer, inner])] == [
        0,
        1,
    ]


def test_a_polled_record_taken_by_index_gets_a_span_in_the_messages_trace(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    record = one_of(clients)
    with process_span(record) as current:
        assert trace.get_current_span() is current
    assert trace.get_current_span() is trace.INVALID_SPAN
    span = recorder.one(f"process {topic}")
    send = recorder.one(f"send {topic}")
    assert span.kind is SpanKind.CONSUMER
    assert span.parent is not None
    assert [span.parent.span_id] == ids([send])
    assert [link.context.span_id for link in span.links] == ids([send])


def test_without_the_consumer_a_span_has_what_the_record_says(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    record = one_of(clients)
    with process_span(record):
        pass
    assert attributes_of([recorder.one(f"process {topic}")]) == [
        {
            "messaging.system": "kafka",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": topic,
            "messaging.destination.partition.id": "0",
            "messaging.kafka.offset": 0,
        }
    ]


def test_with_the_consumer_a_span_has_its_group_client_and_server(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=f"group-{topic}", client_id="shipping")
    record = next(consumer)
    with process_span(record, consumer=consumer):
        pass
    (attributes,) = attributes_of([recorder.one(f"process {topic}")])
    host, port = clients.address.split(":")
    assert attributes["messaging.consumer.group.name"] == f"group-{topic}"
    assert attributes["messaging.client.id"] == "shipping"
    assert attributes["server.address"] == host
    assert attributes["server.port"] == int(port)


def test_in_a_worker_thread(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    record = one_of(clients)
    left: list[Any] = []

    def work() -> None:
        with pytest.raises(RefusedError), process_span(record):
            raise RefusedError
        left.append(trace.get_current_span())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert left == [trace.INVALID_SPAN]
    span = recorder.one(f"process {topic}")
    assert failed(span)
    assert span.parent is not None


@pytest.mark.cpython
def test_a_worker_thread_of_a_loop_gets_a_span_of_its_own(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    """The loop's may have ended before the worker does."""
    clients.send(b"1")

    def work(around: Any, record: Any) -> None:
        context.attach(around)  # as an application that hands its context on
        with process_span(record):
            pass

    for record in clients.consumer():
        arguments = (context.get_current(), record)
        thread = threading.Thread(target=work, args=arguments)
        thread.start()
        thread.join()
        break
    loop, worker = recorder.named(f"process {topic}")
    assert worker.parent is not None
    assert [worker.parent.span_id] == ids([loop])


@pytest.mark.parametrize("form", ["list", "tuple", "records", "polled"])
def test_a_batch_is_one_span_with_a_link_for_each_message_and_no_messages_parent(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, form: str
) -> None:
    polled = batch_of(clients, 3, key=b"key")
    (records,) = polled.values()
    forms = {
        "list": list(records),
        "tuple": tuple(records),
        "records": records,
        "polled": polled,
    }
    with process_span(forms[form]) as current:
        assert trace.get_current_span() is current
    span = recorder.one(f"process {topic}")
    assert span.parent is None
    assert [link.context.span_id for link in span.links] == ids(
        recorder.named(f"send {topic}")
    )
    assert attributes_of(span.links) == [
        {"messaging.kafka.offset": offset} for offset in range(3)
    ]
    (attributes,) = attributes_of([span])
    assert attributes["messaging.batch.message_count"] == 3
    assert attributes["messaging.destination.partition.id"] == "0"
    assert "messaging.kafka.offset" not in attributes
    assert attributes["messaging.kafka.message.key"] == "key"


def test_a_batch_of_one_has_no_messages_parent_either_nor_its_baggage(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    polled = batch_of(clients, 1)
    context.detach(token)
    with process_span(polled):
        assert baggage.get_baggage("tenant") is None
    span = recorder.one(f"process {topic}")
    assert span.parent is None
    assert len(span.links) == 1
    (attributes,) = attributes_of([span])
    assert attributes["messaging.batch.message_count"] == 1
    assert attributes["messaging.kafka.offset"] == 0


@pytest.mark.cpython
def test_a_batch_accounts_for_its_records_only_and_until_its_end(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    (records,) = batch_of(clients, 3).values()
    with process_span(records[:2]) as batch:
        with process_span(records[0]) as span:
            assert span is batch
        with process_span(records[2]) as span:
            assert span is not batch
        copied = contextvars.copy_context()

    def loop() -> None:
        for _ in records:
            pass

    copied.run(loop)
    assert len(recorder.named(f"process {topic}")) == 2 + len(records)


def test_a_batch_that_fails_says_so(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    with pytest.raises(RefusedError), process_span(batch_of(clients, 2)):
        raise RefusedError
    assert failed(recorder.one(f"process {topic}"))
    assert recorder.count("messaging.process.duration", error_type="RefusedError") == 1


def test_loops_over_a_batch_that_is_processed_make_no_second_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    polled = batch_of(clients, 2)
    with process_span(polled) as current:
        for records in polled.values():
            for record in records:
                assert trace.get_current_span() is current
                with process_span(record) as adopted:
                    assert adopted is current
    for records in polled.values():
        for _ in records:
            assert trace.get_current_span() is trace.INVALID_SPAN
    assert len(recorder.named(f"process {topic}")) == 1


def test_a_loop_over_another_list_of_the_records_makes_no_second_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    (records,) = batch_of(clients, 2).values()
    with process_span([*records]) as current:
        for _ in records:
            assert trace.get_current_span() is current
    recorder.one(f"process {topic}")


def test_a_batch_of_a_forwarded_record_replaces_its_context(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    polled = batch_of(clients, 3)
    producer = clients.producer()
    with process_span(polled):
        for records in polled.values():
            for record in list(records):
                producer.send(f"{topic}-next", record.value, headers=record.headers)
    producer.flush()
    batch = recorder.one(f"process {topic}")
    sends = recorder.named(f"send {topic}-next")
    assert [span.kind for span in sends] == [SpanKind.PRODUCER] * 3
    assert [span.parent and span.parent.span_id for span in sends] == ids([batch]) * 3


def test_an_empty_batch_makes_nothing(
    instrumented: None, recorder: Recorder, topic: str
) -> None:
    empties: list[Any] = [[], {}, ()]
    for empty in empties:
        with process_span(empty) as span:
            assert span is trace.INVALID_SPAN
    assert recorder.started == []


def test_excluded_records_are_left_out(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(excluded_topics=topic)
    polled = batch_of(clients, 2)
    with process_span(polled) as span:
        assert span is trace.INVALID_SPAN
        assert trace.get_current_span() is trace.INVALID_SPAN
    ((record, _),) = polled.values()
    with process_span(record) as span:
        assert span is trace.INVALID_SPAN
    assert recorder.started == []


def test_without_process_spans_it_only_measures(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(process_spans=False)
    record = one_of(clients)
    with pytest.raises(RefusedError), process_span(record) as span:
        assert span is trace.INVALID_SPAN
        raise RefusedError
    assert recorder.named(f"process {topic}") == []
    assert recorder.count("messaging.process.duration", error_type="RefusedError") == 1


def test_suppressed_it_makes_nothing(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    record = one_of(clients)
    with suppress_instrumentation(), process_span(record) as span:
        assert span is trace.INVALID_SPAN
    assert recorder.named(f"process {topic}") == []


def test_a_generator_that_is_closed_has_not_failed(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    record = one_of(clients)

    def work() -> Generator[None, None, None]:
        with process_span(record):
            yield

    generator = work()
    next(generator)
    generator.close()
    assert recorder.one(f"process {topic}").status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt, SystemExit, asyncio.CancelledError]
)
def test_a_clean_stop_in_it_is_no_failure(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    stop: type[BaseException],
) -> None:
    record = one_of(clients)
    with pytest.raises(stop), process_span(record):
        raise stop
    span = recorder.one(f"process {topic}")
    assert span.status.status_code is StatusCode.UNSET
    assert "error.type" not in attributes_of([span])[0]
    assert span.events == ()
    assert recorder.count("messaging.process.duration") == 1


def no_record(topic: str) -> Any:
    """A record without an offset's neighbours."""
    return SimpleNamespace(offset=1, topic=topic)


TAKES = (
    "process_span() takes a record, a sequence of records, or the dict that poll() "
    f"returned, but got %s ({__file__}, line %d); it makes no span"
)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (None, "None"),
        (1, "int"),
        ("", "str"),
        ("abc", "str"),
        (b"abc", "bytes"),
        (object(), "object"),
        ([1], "list of int"),
        (["abc", "def"], "list of str"),
        ({"a": 1}, "dict of int"),
        ({"a": ["b"]}, "dict of str"),
        (no_record("orders"), "SimpleNamespace"),
        ([no_record("orders")], "list of SimpleNamespace"),
    ],
)
def test_what_is_no_record_is_one_warning_that_says_what_and_where(
    instrumented: None, recorder: Recorder, log: Log, wrong: Any, named: str
) -> None:
    for _ in range(2):
        with process_span(wrong) as span:
            line = currentframe().f_lineno - 1  # type: ignore[union-attr]
            assert span is trace.INVALID_SPAN
    assert recorder.started == []
    assert log.take() == [TAKES % (named, line)]


def test_records_that_cannot_be_read_make_no_span(
    instrumented: None, recorder: Recorder, log: Log
) -> None:
    class Closed(list[Any]):
        def __iter__(self) -> Any:
            raise RuntimeError

    with process_span(Closed([1])) as span:
        assert span is trace.INVALID_SPAN
    assert recorder.started == []
    (message,) = log.take()
    assert message.startswith("Failed to explain what process_span was given")


def test_each_place_that_passes_no_record_is_said(instrumented: None, log: Log) -> None:
    wrong: Any = None
    with process_span(wrong):
        first = currentframe().f_lineno - 1  # type: ignore[union-attr]
    with ExitStack() as stack:
        stack.enter_context(process_span(wrong))
        second = currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert log.take() == [TAKES % ("None", first), TAKES % ("None", second)]


def test_a_value_is_not_told_by_the_warning(instrumented: None, log: Log) -> None:
    secret: Any = "a value that somebody passed instead of its record"
    with process_span(secret):
        pass
    (line,) = log.take()
    assert secret not in line


def test_an_iterator_is_refused_and_not_read(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, log: Log
) -> None:
    clients.send(b"1", b"2")
    consumer = clients.finite(2)
    first = next(consumer)
    rest: Any = (record for record in [first])
    recorder.started.clear()
    for wrong, named in ((rest, "generator"), (consumer, "Finite")):
        with process_span(wrong) as span:
            line = currentframe().f_lineno - 1  # type: ignore[union-attr]
            assert span is trace.INVALID_SPAN
        assert log.take() == [TAKES % (named, line)]
    assert recorder.started == []
    assert list(rest) == [first]
    assert [record.value for record in consumer] == [b"2"]


def test_whatever_holds_records_is_a_batch(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    ((_, records),) = batch_of(clients, 2).items()
    held = dict(enumerate(records))
    for batch in (tuple(records), deque(records), held.values()):
        with process_span(batch):  # type: ignore[arg-type]  # of the last one
            pass
    for attributes in attributes_of(recorder.named(f"process {topic}")):
        assert attributes["messaging.batch.message_count"] == 2


def test_after_uninstrument_it_is_as_if_never_instrumented(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument()
    record = one_of(clients)
    KafkaPythonInstrumentor().uninstrument()
    with process_span(record):
        pass
    assert recorder.named(f"process {topic}") == []


def test_a_process_that_is_not_instrumented_uses_the_global_providers(
    instrumented: None, clients: Clients, topic: str
) -> None:
    clients.send(b"1")
    done = run(
        """
        import sys
        from opentelemetry import metrics, trace
        from recorder import Recorder
        from otel_kafka_python import process_span
        from kafka import KafkaConsumer
        consumer = KafkaConsumer(
            sys.argv[2], bootstrap_servers=sys.argv[1], auto_offset_reset="earliest"
        )
        record = next(consumer)
        with process_span(record):  # nothing is set yet
            pass
        recorder = Recorder()
        trace.set_tracer_provider(recorder.tracer_provider)
        metrics.set_meter_provider(recorder.meter_provider)
        with process_span(record):
            pass
        print(recorder.one(f"process {sys.argv[2]}").parent is not None)
        print(recorder.count("messaging.process.duration"))
        consumer.close()
        """,
        clients.address,
        topic,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["True", "1"]


@pytest.mark.cpython
def test_in_another_task_it_adopts_nothing(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    async def handle(record: Any) -> None:
        with pytest.raises(RefusedError), process_span(record) as span:
            assert span.is_recording()
            await asyncio.sleep(0)
            raise RefusedError

    async def consume(records: Any) -> None:
        tasks = []
        for record in records:
            tasks.append(asyncio.create_task(handle(record)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    (records,) = batch_of(clients, 2).values()
    asyncio.run(consume(records))
    spans = recorder.named(f"process {topic}")
    assert [failed(span) for span in spans] == [False, True, False, True]


def test_without_process_spans_it_measures_a_loops_record_once(
    instrument: Instrument, clients: Clients, recorder: Recorder, log: Log
) -> None:
    instrument(process_spans=False)
    clients.send(b"1")
    before = context.get_current()
    for record in clients.finite(1):
        with pytest.raises(RefusedError), process_span(record):
            assert context.get_current() is before
            raise RefusedError
    assert log.take() == []
    duration = "messaging.process.duration"
    assert recorder.count(duration) == 1
    assert recorder.count(duration, error_type="RefusedError") == 1


def test_nested_on_one_record_it_records_an_exception_once(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    record = one_of(clients)
    with pytest.raises(RefusedError), process_span(record), process_span(record):
        raise RefusedError
    assert failed(recorder.one(f"process {topic}"))


def test_one_context_manager_can_be_entered_again(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    record = one_of(clients)
    manager = process_span(record)
    with manager, manager:
        pass
    with manager:
        pass
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert recorder.open() == []
    assert len(recorder.named(f"process {topic}")) == 2


def test_a_large_batch_forwarded_is_known_to_be_processed(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    polled = batch_of(clients, 200)  # more than is linked to
    ((first, *_),) = polled.values()
    recorder.ended.clear()
    with process_span(polled) as span:
        clients.send(b"forwarded", headers=first.headers)
    sent = recorder.one(f"send {topic}")
    assert sent.parent is not None
    assert sent.parent.span_id == span.get_span_context().span_id
    assert sent.links == ()


def test_what_is_instrumented_meanwhile_is_what_counts(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without an instrumentation it reads the settings; one may come just then."""
    clients.send(b"1")
    ((record,),) = poll(clients.consumer()).values()
    load = _config.load

    def load_meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(_config, "load", load)
        instrument()
        return load(*arguments)

    monkeypatch.setattr(_config, "load", load_meanwhile)
    with process_span(record):
        pass
    with process_span(record):
        pass
    assert recorder.named(f"process {topic}") != []
