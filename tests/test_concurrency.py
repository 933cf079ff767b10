"""Threads, greenlets and processes: each has its own context, each span ends once.

Here, too, nothing may be logged and no context left: the fixtures `log` and
`_context_is_restored` see to that.
"""

from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import pytest
from kafka import KafkaProducer
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Span, StatusCode

from clients import DEADLINE, Clients, Waiting, poll, poll_records
from conftest import Instrument
from deliveries import carried, ids, until_all_have_ended
from otel_kafka_python import KafkaPythonInstrumentor, _operation, process_span
from recorder import Log, Recorder
from scripts import forks, needs_fork, run, run_recorded

pytestmark = pytest.mark.one_broker

THREADS, MESSAGES = 16, 50


def at_once(work: Callable[[int], Any], count: int) -> list[Any]:
    """What `work(number)` returns in as many threads, which begin together."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait(DEADLINE)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def by_offset(spans: Sequence[ReadableSpan]) -> dict[Any, ReadableSpan]:
    """Spans by their message's offset, which no two of them share."""
    found = {(each.attributes or {})["messaging.kafka.offset"]: each for each in spans}
    assert len(found) == len(spans)
    return found


def test_threads_that_share_a_producer_trace_each_message_once_and_as_their_own(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()

    def request(number: int) -> tuple[ReadableSpan, list[int]]:
        with recorder.tracer.start_as_current_span("request") as span:
            futures = [producer.send(topic, b"%d" % number) for _ in range(MESSAGES)]
            offsets = [future.get(DEADLINE).offset for future in futures]
        assert trace.get_current_span() is trace.INVALID_SPAN
        assert isinstance(span, ReadableSpan)
        return span, offsets

    requests = at_once(request, THREADS)
    until_all_have_ended(recorder)
    count = THREADS * MESSAGES
    assert sorted(chain.from_iterable(o for _, o in requests)) == list(range(count))
    spans = by_offset(recorder.named(f"send {topic}"))
    assert spans.keys() == set(range(count))
    assert recorder.count("messaging.client.sent.messages") == count
    for record in poll_records(clients.consumer(), count):
        span = spans[record.offset]
        assert carried(record) == ids(span)
        assert span.parent == requests[int(record.value)][0].context
        assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("locked", [False, True], ids=["by the GIL", "by a lock"])
def test_an_operation_is_claimed_once(
    monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    if not locked and not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("no GIL")
    monkeypatch.setattr(_operation, "_claiming", threading.RLock() if locked else None)
    template: Any = None
    operations = [_operation.Operation(template, None, (0, 0)) for _ in range(2000)]
    won = at_once(lambda _: [each.claim() for each in operations], 16)
    assert [sum(claims) for claims in zip(*won, strict=True)] == [1] * len(operations)


def test_without_the_gil_an_operation_is_claimed_under_a_lock() -> None:
    done = run(
        """
        import sys, threading
        sys._is_gil_enabled = lambda: False
        from otel_kafka_python import _operation
        operation = _operation.Operation(None, None, 0)
        won = []
        thread = threading.Thread(target=lambda: won.append(operation.claim()))
        with _operation._claiming:
            thread.start()
            thread.join(0.1)
            assert won == []
            assert operation.claim()  # as a finaliser of this thread would
        thread.join()
        assert won == [False]
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_without_the_gil_a_forked_child_claims_what_it_begins() -> None:
    done = run(
        """
        import os, signal, sys, threading
        sys._is_gil_enabled = lambda: False
        from otel_kafka_python import _operation
        holds, may_go = threading.Event(), threading.Event()
        def hold():
            with _operation._claiming:
                holds.set()
                may_go.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        holds.wait()
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if _operation.Operation(None, None, 0).claim() else 1)
        _, status = os.waitpid(child, 0)
        may_go.set()
        thread.join()
        assert status == 0, status
        """
    )
    assert done.returncode == 0, done.stderr


def test_consumers_in_threads_have_each_their_own_current_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(*(b"value",) * MESSAGES)
    sends: dict[int, Any] = by_offset(recorder.named(f"send {topic}"))
    # All of them are in the body of their loops at the same time.
    together = threading.Barrier(4)
    consumers = [
        clients.finite(MESSAGES, client_id=f"consumer-{number}") for number in range(4)
    ]

    def consume(number: int) -> list[int]:
        offsets = []
        for record in consumers[number]:
            current = trace.get_current_span()
            together.wait(DEADLINE)
            assert trace.get_current_span() is current
            span: Any = current
            assert span.attributes["messaging.client.id"] == f"consumer-{number}"
            assert span.attributes["messaging.kafka.offset"] == record.offset
            assert span.parent.span_id == sends[record.offset].context.span_id
            offsets.append(record.offset)
        assert trace.get_current_span() is trace.INVALID_SPAN
        return offsets

    assert at_once(consume, 4) == [list(range(MESSAGES))] * 4
    assert recorder.open() == []
    assert len(recorder.named(f"process {topic}")) == 4 * MESSAGES
    assert recorder.count("messaging.client.consumed.messages") == 4 * MESSAGES


def test_threads_send_on_while_the_instrumentation_comes_and_goes(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    sent = threading.Semaphore(0)
    stop = threading.Event()

    def send(_: int) -> list[int]:
        offsets = []
        while not stop.is_set():
            offsets.append(producer.send(topic, b"value").get(DEADLINE).offset)
            sent.release()
        return offsets

    def wait_for_more() -> None:
        while sent.acquire(blocking=False):
            pass
        for _ in range(2 * THREADS):
            assert sent.acquire(timeout=DEADLINE)

    def come_and_go() -> None:
        try:
            for _ in range(5):
                wait_for_more()
                instrument()
                wait_for_more()
                KafkaPythonInstrumentor().uninstrument()
        finally:
            stop.set()

    with ThreadPoolExecutor(1) as pool:
        toggling = pool.submit(come_and_go)
        offsets = list(chain.from_iterable(at_once(send, THREADS)))
        toggling.result()
    until_all_have_ended(recorder)
    assert sorted(offsets) == list(range(len(offsets)))
    spans = recorder.named(f"send {topic}")
    assert {each.status.status_code for each in spans} == {StatusCode.UNSET}
    assert recorder.count("messaging.client.sent.messages") == len(spans)
    # A message has a span if and only if it carries that span's context.
    records = poll_records(clients.consumer(), len(offsets))
    contexts = {record.offset: carried(record) for record in records}
    traced = {offset: each for offset, each in contexts.items() if each is not None}
    assert traced == {offset: ids(span) for offset, span in by_offset(spans).items()}
    assert len(traced) < len(contexts)


class Looping:
    """A loop over one record at a time, in a thread that stops in each body."""

    def __init__(self, clients: Clients) -> None:
        clients.create_topic(1)  # not every consumer waits for one that is not there
        self._clients = clients
        self._producer = clients.producer()
        self._consumer = clients.consumer(cls=Waiting)
        self._bodies: queue.Queue[tuple[bytes, Span]] = queue.Queue()
        self._go = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(1)
        self._running = self._pool.submit(self._run)
        assert self._consumer.waits.wait(DEADLINE)

    def _run(self) -> None:
        for record in self._consumer:
            span = trace.get_current_span()
            self._consumer.waits.clear()
            self._bodies.put((record.value, span))
            assert self._go.acquire(timeout=DEADLINE)
            # Whatever has been done to the instrumentation meanwhile.
            assert trace.get_current_span() is span
            if record.value == b"last":
                break
        assert trace.get_current_span() is trace.INVALID_SPAN

    def body(self, value: bytes) -> Span:
        """Send a record; what is current in the body that it is handed to."""
        self._producer.send(self._clients.topic, value)
        self._producer.flush()
        handed, span = self._bodies.get(timeout=DEADLINE)
        assert handed == value
        return span

    def wait(self) -> None:
        """Go on from the body until the loop waits for the next record."""
        self._go.release()
        assert self._consumer.waits.wait(DEADLINE)

    def end(self) -> None:
        """Leave the loop after its last body."""
        self._go.release()
        self._running.result(DEADLINE)
        self._pool.shutdown()


def test_a_loop_that_has_begun_before_the_instrumentation_goes_on_as_it_was(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    loop = Looping(clients)
    assert loop.body(b"0") is trace.INVALID_SPAN
    loop.wait()
    instrument(send_spans=False)
    assert loop.body(b"1") is trace.INVALID_SPAN
    loop.wait()
    assert loop.body(b"2") is trace.INVALID_SPAN
    KafkaPythonInstrumentor().uninstrument()
    loop.wait()
    assert loop.body(b"last") is trace.INVALID_SPAN
    loop.end()
    # It asks the consumer itself for the next record: that is a single poll. The
    # record that it waited for when the instrumentation came was asked for before.
    span = recorder.one(f"poll {topic}")
    assert (span.attributes or {})["messaging.kafka.offset"] == 2
    assert recorder.open() == []
    assert recorder.names() == [f"poll {topic}"]


def test_a_loop_that_waits_when_the_instrumentation_goes_has_no_more_spans(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(send_spans=False)
    loop = Looping(clients)
    assert loop.body(b"0").is_recording()
    loop.wait()
    assert recorder.open() == []
    KafkaPythonInstrumentor().uninstrument()
    assert loop.body(b"1") is trace.INVALID_SPAN
    loop.wait()
    # What comes anew is for the loops that begin under it.
    instrument(send_spans=False)
    assert loop.body(b"last") is trace.INVALID_SPAN
    loop.end()
    assert recorder.names() == [f"process {topic}"]


def test_a_body_keeps_its_span_when_the_instrumentation_goes(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(send_spans=False)
    loop = Looping(clients)
    span = loop.body(b"0")
    KafkaPythonInstrumentor().uninstrument()
    assert span.is_recording()
    loop.wait()
    assert not span.is_recording()
    assert loop.body(b"last") is trace.INVALID_SPAN
    loop.end()
    assert recorder.names() == [f"process {topic}"]
    assert recorder.open() == []


FORK = """
    address, topic = sys.argv[1:]

    def send(producer, name):
        return [producer.send(f"{topic}-{name}", b"x").get(30).offset for _ in range(5)]

    before = KafkaProducer(bootstrap_servers=address)
    assert send(before, "before") == [0, 1, 2, 3, 4]
    before.flush()
    waiting = KafkaProducer(bootstrap_servers=address, linger_ms=60000)
    future = waiting.send(f"{topic}-waiting", b"x")
    child = os.fork()
    if child == 0:
        # kafka-python's sender thread is not there: this one never leaves.
        lost = before.send(f"{topic}-before", b"lost")
        after = KafkaProducer(bootstrap_servers=address)
        assert send(after, "child") == [0, 1, 2, 3, 4]
        after.close()
        assert not lost.is_done
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    waiting.flush()
    assert future.get(30).offset == 0
    assert send(before, "before") == [5, 6, 7, 8, 9]
    before.close()
    waiting.close()
"""


@needs_fork
def test_a_parent_and_its_forked_child_end_each_their_own_spans(
    clients: Clients, topic: str
) -> None:
    told = run_recorded(FORK, clients.address, topic)
    assert told["open"] == []
    assert told["logged"] == []
    assert told["ended"] == [
        *[[f"send {topic}-before", "UNSET", None]] * 5,
        [f"send {topic}-waiting", "UNSET", None],
        *[[f"send {topic}-before", "UNSET", None]] * 5,
    ]
    (child,) = told["children"]
    # The copy of the parent's span is the parent's to end.
    assert child["open"] == [f"send {topic}-waiting"]
    assert child["logged"] == []
    of_parent, of_child, lost = (
        child["ended"][:5],
        child["ended"][5:10],
        child["ended"][10:],
    )
    assert of_parent == told["ended"][:5]
    assert of_child == [[f"send {topic}-child", "UNSET", None]] * 5
    ((name, status, _),) = lost
    assert (name, status) == (f"send {topic}-before", "ERROR")


Seen = tuple[list[str], set[int], list[str], list[str]]


def work(address: str, topic: str, records: Sequence[Any]) -> Seen:
    """What a worker process does with records, and what is seen of it."""
    instrumentor = KafkaPythonInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:  # a forked one inherits that
        instrumentor.uninstrument()
    recorder = Recorder()
    with Log() as log:
        instrumentor.instrument(tracer_provider=recorder.tracer_provider)
        producer = KafkaProducer(bootstrap_servers=address)
        for record in records:
            with process_span(record):
                producer.send(topic, record.value).get(DEADLINE)
        producer.close()
        traces = {each.context.trace_id for each in recorder.ended if each.context}
        return recorder.names(), traces, recorder.open(), log.take()


@forks
@pytest.mark.parametrize(
    "method",
    [
        pytest.param("fork", marks=needs_fork),
        pytest.param("forkserver", marks=needs_fork),
        pytest.param("spawn"),
    ],
)
def test_worker_processes_go_on_with_the_trace_of_the_records_that_they_get(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, method: str
) -> None:
    with recorder.tracer.start_as_current_span("request") as request:
        clients.send(b"1", b"2", b"3")
    (records,) = poll(clients.consumer()).values()
    targets = [f"{topic}-{number}" for number in range(2)]
    with multiprocessing.get_context(method).Pool(len(targets)) as pool:
        working = pool.starmap_async(
            work, [(clients.address, target, records) for target in targets]
        )
        seen = working.get(DEADLINE)
    trace_id = request.get_span_context().trace_id
    for target, (names, traces, still_open, logged) in zip(targets, seen, strict=True):
        assert names == [*[f"process {topic}"] * 3, *[f"send {target}"] * 3]
        assert traces == {trace_id}
        assert still_open == []
        assert logged == []
        received = poll_records(clients.consumer(target), 3)
        assert [record.value for record in received] == [b"1", b"2", b"3"]
    assert recorder.open() == []


GEVENT = """
    import threading
    import gevent
    from opentelemetry import trace
    address, topic = sys.argv[1:]
    producer = KafkaProducer(bootstrap_servers=address)
    # Of gevent, as all of threading is: all greenlets are there at the same time.
    together = threading.Barrier(4)

    def request(number):
        with recorder.tracer.start_as_current_span("request") as span:
            together.wait(30)
            future = producer.send(topic, b"%d" % number)
            assert trace.get_current_span() is span
            offset = future.get(30).offset
            assert trace.get_current_span() is span
        assert trace.get_current_span() is trace.INVALID_SPAN
        return offset, span.get_span_context().trace_id

    def consume(number):
        consumer = KafkaConsumer(
            topic, bootstrap_servers=address, client_id=f"consumer-{number}",
            auto_offset_reset="earliest", consumer_timeout_ms=30000,
        )
        seen = []
        for record in consumer:
            span = trace.get_current_span()
            together.wait(30)
            assert trace.get_current_span() is span
            assert span.attributes["messaging.client.id"] == f"consumer-{number}"
            assert span.attributes["messaging.kafka.offset"] == record.offset
            seen.append((record.offset, span.get_span_context().trace_id))
            if len(seen) == 4:
                break
        assert trace.get_current_span() is trace.INVALID_SPAN
        consumer.close()
        return seen

    def in_greenlets(work):
        spawned = [gevent.spawn(work, number) for number in range(4)]
        return [greenlet.get(timeout=60) for greenlet in spawned]

    sent = sorted(in_greenlets(request))
    assert len({trace_id for _, trace_id in sent}) == 4
    assert in_greenlets(consume) == [sent] * 4
    producer.close()
"""


@pytest.mark.skipif(
    importlib.util.find_spec("gevent") is None,
    reason="gevent has no wheel for this Python",
)
def test_greenlets_of_gevent_have_each_their_own_current_span(
    clients: Clients, topic: str
) -> None:
    told = run_recorded(
        GEVENT,
        clients.address,
        topic,
        first="from gevent import monkey; monkey.patch_all()\n",
    )
    assert told["open"] == []
    assert told["logged"] == []
    assert sorted(name for name, _, _ in told["ended"]) == [
        *[f"process {topic}"] * 16,
        *["request"] * 4,
        *[f"send {topic}"] * 4,
    ]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks begin late before 3.12")
def test_an_eager_task_sends_in_the_span_of_the_body_that_makes_it(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"value")
    producer = clients.producer()

    async def ship() -> None:
        producer.send(f"{topic}-next", b"value")
        await asyncio.sleep(0)

    async def process() -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(vars(asyncio)["eager_task_factory"])
        for _ in clients.consumer():
            span = trace.get_current_span()
            task = asyncio.create_task(ship())
            assert trace.get_current_span() is span
            break
        assert trace.get_current_span() is trace.INVALID_SPAN
        await task

    asyncio.run(process())
    producer.flush()
    until_all_have_ended(recorder)
    sent = recorder.one(f"send {topic}-next")
    body = recorder.one(f"process {topic}")
    assert sent.parent == body.context


@pytest.mark.skipif(sys.version_info < (3, 14), reason="concurrent.interpreters is new")
def test_limit_a_subinterpreter_is_instrumented_but_can_have_no_producer() -> None:
    done = run(
        """
        from concurrent import interpreters
        interpreter = interpreters.create()
        interpreter.exec('''if True:
            from otel_kafka_python import KafkaPythonInstrumentor
            KafkaPythonInstrumentor().instrument()
            from kafka import KafkaProducer
            try:
                KafkaProducer(bootstrap_servers="localhost:1", api_version=(2, 6))
            except RuntimeError as error:
                print(error)
        ''')
        interpreter.close()
        """
    )
    assert (done.stdout, done.stderr) == (
        "daemon threads are disabled in this interpreter\n",
        "",
    )
