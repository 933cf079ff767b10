"""The scope of process spans: whatever the loop, nothing leaks and nothing is lost.

Each program consumes a topic in one shape of loop. It is run without and with the
instrumentation, and has to see the same; after it the context is what it was before,
and every span that started has ended.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import gc
import itertools
import json
import operator
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kafka
import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, StaticSampler
from tqdm import tqdm

from clients import Clients, poll
from collector import collect
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor, process_span
from otel_kafka_python._processing.scopes import innermost
from recorder import Log, Recorder, attributes_of

pytestmark = pytest.mark.one_broker

COUNT = 6


class Watch:
    """What a program sees of each record, and what is current when it does."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.current: list[Any] = []

    def __call__(self, record: Any) -> None:
        """Called in the body of a loop."""
        self.seen.append((record.topic, record.offset, record.value))
        span = trace.get_current_span()
        # Neither the span of another record nor one that has ended.
        offset = (getattr(span, "attributes", None) or {}).get("messaging.kafka.offset")
        self.current.append((offset == record.offset, span.is_recording()))


Program = Callable[[Clients, Watch], None]


def records_of(clients: Clients) -> Any:
    """What one poll of all records returned for the only partition."""
    consumer = clients.consumer()
    while True:
        ((_, records),) = poll(consumer).items()
        if len(records) == COUNT:
            return records
        consumer.seek_to_beginning()


def loop_with_break(clients: Clients, watch: Watch) -> None:
    for record in clients.consumer():
        watch(record)
        if record.offset == COUNT - 1:
            break


def loop_with_return(clients: Clients, watch: Watch) -> None:
    for record in clients.consumer():
        watch(record)
        if record.offset == 2:
            return


def loop_with_exception(clients: Clients, watch: Watch) -> None:
    try:
        for record in clients.consumer():
            watch(record)
            if record.offset == 2:
                raise ValueError
    except ValueError:
        watch.seen.append("caught")


def loop_with_exception_inside(clients: Clients, watch: Watch) -> None:
    for record in clients.consumer():
        try:
            watch(record)
            raise ValueError
        except ValueError:
            if record.offset == COUNT - 1:
                break
            continue


def loop_with_continue(clients: Clients, watch: Watch) -> None:
    for record in clients.finite(COUNT):
        watch(record)
        if record.offset % 2:
            continue
        watch.seen.append("even")


def loop_with_timeout(clients: Clients, watch: Watch) -> None:
    for record in clients.consumer(consumer_timeout_ms=3000):
        watch(record)
    watch.seen.append("time-out")


def loop_with_else(clients: Clients, watch: Watch) -> None:
    for record in clients.finite(COUNT):
        watch(record)
        if record.offset == COUNT:
            break
    else:
        # Whatever was current before the loop is current again.
        watch.seen.append("else")


def close_in_body(clients: Clients, watch: Watch) -> None:
    consumer = clients.consumer()
    for record in consumer:
        watch(record)
        if record.offset == 2:
            consumer.close()


def seek_in_body(clients: Clients, watch: Watch) -> None:
    consumer = clients.consumer()
    again = 2
    for record in consumer:
        watch(record)
        if record.offset == 3 and again:
            again -= 1
            consumer.seek(kafka.TopicPartition(record.topic, record.partition), 1)
        if record.offset == COUNT - 1:
            break


def second_loop(clients: Clients, watch: Watch) -> None:
    consumer = clients.consumer()
    for _ in range(3):
        for record in consumer:
            watch(record)
            if record.offset % 2:
                break


def nested_loops(clients: Clients, watch: Watch) -> None:
    inner = clients.consumer()
    for outer in clients.consumer():
        watch(outer)
        for record in inner:
            watch(record)
            if record.offset % 2:
                break
        watch(outer)
        if outer.offset == 2:
            break


def loop_in_loop_over_polled(clients: Clients, watch: Watch) -> None:
    records = records_of(clients)
    for outer in clients.consumer():
        watch(outer)
        for record in records:
            watch(record)
        watch(outer)
        break


def zipped(clients: Clients, watch: Watch) -> None:
    for first, second in zip(clients.consumer(), clients.consumer(), strict=False):
        watch.seen.append(first.offset)
        watch(second)
        if first.offset == COUNT - 1:
            break


def zipped_with_the_shorter_second(clients: Clients, watch: Watch) -> None:
    second = clients.consumer()
    for one, two in zip(clients.consumer(), itertools.islice(second, 3), strict=False):
        watch.seen.append(one.offset)
        watch(two)


def enumerated(clients: Clients, watch: Watch) -> None:
    for number, record in enumerate(clients.consumer()):
        watch(record)
        if number == COUNT - 1:
            break


def sliced(clients: Clients, watch: Watch) -> None:
    for record in itertools.islice(clients.consumer(), COUNT):
        watch(record)


def in_a_generator(clients: Clients, watch: Watch) -> None:
    def generate() -> Iterator[Any]:
        for record in clients.consumer():
            yield record
            if record.offset == COUNT - 1:
                return

    for record in generate():
        watch(record)


def in_a_generator_that_is_left(clients: Clients, watch: Watch) -> None:
    def generate() -> Iterator[Any]:
        yield from iter(clients.consumer())

    def loop() -> Iterator[Any]:
        for record in clients.consumer():
            yield record

    for record in loop():
        watch(record)
        if record.offset == 2:
            break
    for record in generate():
        watch(record)
        if record.offset == 2:
            break


def under_tqdm(clients: Clients, watch: Watch) -> None:
    for record in tqdm(clients.consumer(), disable=None, total=COUNT):
        watch(record)
        if record.offset == COUNT - 1:
            break


def under_tqdm_that_shows(clients: Clients, watch: Watch) -> None:
    with open("/dev/null", "w") as nowhere:  # noqa: PTH123 (as short as it gets)
        for record in tqdm(clients.consumer(), total=COUNT, file=nowhere):
            watch(record)
            if record.offset == COUNT - 1:
                break


def in_a_coroutine(clients: Clients, watch: Watch) -> None:
    async def consume() -> None:
        for record in clients.consumer():
            watch(record)
            await asyncio.sleep(0)
            watch(record)
            if record.offset == COUNT - 1:
                break

    asyncio.run(consume())


def in_two_tasks(clients: Clients, watch: Watch) -> None:
    async def consume() -> None:
        for record in clients.consumer():
            watch(record)
            await asyncio.sleep(0)
            watch(record)
            if record.offset == COUNT - 1:
                break

    async def both() -> None:
        await asyncio.gather(consume(), consume())

    asyncio.run(both())


def in_a_thread(clients: Clients, watch: Watch) -> None:
    thread = threading.Thread(target=loop_with_break, args=(clients, watch))
    thread.start()
    thread.join()


def in_a_copied_context(clients: Clients, watch: Watch) -> None:
    contextvars.copy_context().run(loop_with_break, clients, watch)


def over_polled(clients: Clients, watch: Watch) -> None:
    for record in records_of(clients):
        watch(record)


def over_polled_with_break(clients: Clients, watch: Watch) -> None:
    records = records_of(clients)
    for record in records:
        watch(record)
        if record.offset == 2:
            break
    watch.seen.append(len(records))


def over_polled_with_exception(clients: Clients, watch: Watch) -> None:
    try:
        for record in records_of(clients):
            watch(record)
            if record.offset == 2:
                raise ValueError
    except ValueError:
        watch.seen.append("caught")


def over_polled_items(clients: Clients, watch: Watch) -> None:
    consumer = clients.consumer()
    while len(watch.seen) < COUNT:
        for records in poll(consumer, max_records=2).values():
            for record in records:
                watch(record)


def over_polled_chained(clients: Clients, watch: Watch) -> None:
    for record in itertools.chain.from_iterable([records_of(clients)]):
        watch(record)


def with_commits(clients: Clients, watch: Watch) -> None:
    consumer = clients.consumer(group_id=f"group-{clients.topic}-{id(watch)}")
    for record in consumer:
        watch(record)
        consumer.commit()
        watch(record)
        if record.offset == COUNT - 1:
            break


PROGRAMS: list[Program] = [
    loop_with_break, loop_with_return, loop_with_exception, loop_with_exception_inside,
    loop_with_continue, loop_with_timeout, loop_with_else, close_in_body, seek_in_body,
    second_loop, nested_loops, loop_in_loop_over_polled, zipped,
    zipped_with_the_shorter_second, enumerated, sliced, in_a_generator,
    in_a_generator_that_is_left, under_tqdm, under_tqdm_that_shows, in_a_coroutine,
    in_two_tasks, in_a_thread, in_a_copied_context, over_polled, over_polled_with_break,
    over_polled_with_exception, over_polled_items, over_polled_chained, with_commits,
]  # fmt: skip


@pytest.fixture
def produced(clients: Clients) -> Clients:
    """A topic with records that carry contexts of their own."""
    producer = clients.producer()
    for number in range(COUNT):
        header = f"00-{number + 1:032x}-{number + 1:016x}-01".encode()
        producer.send(
            clients.topic, str(number).encode(), headers=[("traceparent", header)]
        )
    producer.flush()
    return clients


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_loop_sees_the_same_and_leaves_nothing(
    produced: Clients,
    instrument: Instrument,
    recorder: Recorder,
    program: Program,
) -> None:
    plain, traced = Watch(), Watch()
    program(produced, plain)
    instrument()
    before = context.get_current()
    program(produced, traced)
    assert traced.seen == plain.seen
    assert context.get_current() is before
    # In every body the record's own span was current, and had not ended.
    assert traced.current
    assert set(traced.current) == {(True, True)}
    assert recorder.open() == []


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_loop_under_a_span_gives_it_back(
    produced: Clients, instrument: Instrument, recorder: Recorder, program: Program
) -> None:
    instrument()
    watch = Watch()
    with recorder.tracer.start_as_current_span("around") as around:
        program(produced, watch)
        assert trace.get_current_span() is around
    assert set(watch.current) == {(True, True)}
    assert recorder.open() == []


def test_each_of_zipped_consumers_has_its_spans_and_no_chain_grows(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    zipped(produced, Watch())
    spans = recorder.named(f"process {topic}")
    assert len(spans) == 2 * COUNT
    by_id = {span.context.span_id: span for span in spans if span.context}
    depths = []
    for span in spans:
        depth = 0
        parent = span.parent
        while parent is not None and parent.span_id in by_id:
            depth += 1
            parent = by_id[parent.span_id].parent
        depths.append(depth)
    # The first of a pair is the message's child, the second the first one's.
    assert sorted(depths) == [0] * COUNT + [1] * COUNT


OTHERS: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "sorted": lambda records: sorted(records, key=lambda record: -record.offset),
    "listcomp": lambda records: [record for record in records],
    "setcomp": lambda records: {record.offset for record in records},
    "dictcomp": lambda records: {record.offset: record for record in records},
    "genexpr": lambda records: list(record for record in records),
    "json.dumps": lambda records: json.dumps(records, default=str),
    "json.dumps with indent": lambda records: json.dumps(
        records, default=str, indent=1
    ),
    "pickle": lambda records: pickle.loads(pickle.dumps(records)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "extend": lambda records: [].extend(records),
    "star": lambda records: [*records],
    "chain": lambda records: list(itertools.chain(records)),
    "pool.map": lambda records: _in_pool(records),
    "unpacking": lambda records: _unpack(records),
    "next": lambda records: next(iter(records)),
    "run_in_executor": lambda records: asyncio.run(_in_executor(iter(records))),
    "index": lambda records: [records[0], records[-1], records[1:3]],
    "len": len,
    "in": lambda records: object() in records,
    "max": lambda records: max(records, key=lambda record: record.offset),
    "map": lambda records: list(map(str, records)),
    "reversed": lambda records: list(reversed(records)),
    "del": lambda records: records.copy().clear(),
}


def _in_pool(records: Any) -> Any:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda record: record.offset, records))


def _unpack(records: Any) -> Any:
    first, *_ = records
    return first


async def _in_executor(iterator: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, next, iterator)


@pytest.mark.parametrize("use", OTHERS.values(), ids=OTHERS)
def test_what_is_no_loop_makes_no_process_span_and_a_loop_then_does_once(
    produced: Clients,
    instrumented: None,
    recorder: Recorder,
    topic: str,
    use: Callable[[Any], Any],
) -> None:
    records = records_of(produced)
    use(records)
    collect()
    assert recorder.named(f"process {topic}") == []
    assert trace.get_current_span() is trace.INVALID_SPAN
    for _ in range(2):
        for _record in records:
            pass
    assert len(recorder.named(f"process {topic}")) == COUNT
    assert recorder.open() == []


CONSUMED: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "listcomp": lambda consumer: [record for record in consumer],
    "genexpr": lambda consumer: list(record for record in consumer),
    "sorted": lambda consumer: sorted(consumer, key=lambda record: record.offset),
    "extend": lambda consumer: [].extend(consumer),
    "star": lambda consumer: [*consumer],
    "pool.map": _in_pool,
}


@pytest.mark.parametrize("use", CONSUMED.values(), ids=CONSUMED)
def test_a_consumer_used_so_makes_receive_spans(
    produced: Clients,
    instrumented: None,
    recorder: Recorder,
    topic: str,
    use: Callable[[Any], Any],
) -> None:
    use(produced.finite(COUNT))
    assert recorder.names() == [f"poll {topic}"] * COUNT
    assert all(len(span.links) == 1 for span in recorder.ended)
    assert recorder.count("messaging.client.consumed.messages") == COUNT


@pytest.mark.parametrize("ask", [lambda c: c, iter], ids=["consumer", "iterator"])
def test_a_pool_that_asks_for_records_has_nothing_attached(
    produced: Clients,
    instrumented: None,
    recorder: Recorder,
    topic: str,
    ask: Callable[[Any], Any],
) -> None:
    asked = ask(produced.consumer())
    with ThreadPoolExecutor(1) as pool:
        offsets = [pool.submit(next, asked).result().offset for _ in range(COUNT)]
        left = pool.submit(trace.get_current_span).result()
    assert offsets == list(range(COUNT))
    assert left is trace.INVALID_SPAN
    assert recorder.names() == [f"poll {topic}"] * COUNT


def test_an_iterator_dropped_on_another_thread_ends_its_span_and_touches_no_context(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    entered, leave = threading.Event(), threading.Event()
    kept: list[Any] = []
    currents: list[Any] = []

    def loop() -> None:
        kept.append(iter(produced.consumer()))
        for _ in kept[0]:
            break
        entered.set()
        leave.wait()
        currents.append(trace.get_current_span())

    thread = threading.Thread(target=loop)
    thread.start()
    entered.wait()
    assert recorder.open() == [f"process {topic}"]
    kept.clear()
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert recorder.open() == []
    leave.set()
    thread.join()
    # That thread keeps what it has: nobody but itself could take it back.
    assert [span.is_recording() for span in currents] == [False]


def test_a_scope_that_its_own_thread_leaves_meanwhile_raises_nothing_elsewhere(
    produced: Clients, instrumented: None, recorder: Recorder
) -> None:
    iterator: Any = iter(produced.consumer())
    for _ in iterator:
        break
    elsewhere = contextvars.copy_context()
    span = trace.get_current_span()
    # As its own thread does, between two steps of the other one.
    innermost.reset(iterator._scope._marker)
    assert elsewhere.run(next, iterator).offset == 1
    assert elsewhere.run(trace.get_current_span) is span
    assert not span.is_recording()
    context.attach(context.Context())


def test_limit_a_kept_iterator_holds_its_last_scope_until_it_goes_on(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    """A documented limit: nothing tells that its loop is over."""
    iterator = iter(produced.consumer())
    for _ in iterator:
        break
    assert trace.get_current_span().is_recording()
    next(iterator)
    assert trace.get_current_span() is trace.INVALID_SPAN
    for _ in iterator:
        break
    assert recorder.open() == [f"process {topic}"]
    del iterator
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert recorder.open() == []


def test_limit_a_loop_in_an_async_generator_holds_its_scope_until_it_goes_on(
    produced: Clients, instrumented: None, recorder: Recorder
) -> None:
    """A documented limit: its body is left and entered as its consumer will have it."""

    async def generate() -> Any:
        for record in produced.consumer():
            yield record

    async def consume() -> None:
        generator = generate()
        async for _ in generator:
            break
        assert trace.get_current_span().is_recording()
        await generator.aclose()
        assert trace.get_current_span() is trace.INVALID_SPAN

    asyncio.run(consume())
    assert recorder.open() == []


def test_a_loop_in_an_async_generator_that_is_closed_leaves_nothing_current(
    produced: Clients, instrumented: None, recorder: Recorder
) -> None:
    async def generate() -> Any:
        for record in produced.consumer():
            yield record

    async def consume() -> None:
        async with contextlib.aclosing(generate()) as records:
            async for _ in records:
                assert trace.get_current_span().is_recording()
                break
        assert trace.get_current_span() is trace.INVALID_SPAN

    asyncio.run(consume())
    assert recorder.open() == []


def test_limit_an_async_generator_that_is_dropped_is_closed_in_another_task(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    """Its span ends there, and stays current in the first task until its next loop."""

    async def generate() -> Any:
        for record in produced.consumer():
            yield record

    async def consume() -> None:
        loop = asyncio.get_running_loop()
        async for _ in generate():
            break
        span = trace.get_current_span()
        for _ in range(3):  # asyncio asks for the close, which is a task, which runs
            turn = loop.create_future()
            loop.call_soon(turn.set_result, None)
            await turn
        assert recorder.open() == []
        assert trace.get_current_span() is span
        for _ in produced.consumer():
            assert trace.get_current_span() is not span
            break
        assert trace.get_current_span() is trace.INVALID_SPAN

    asyncio.run(consume())
    first, second = recorder.named(f"process {topic}")
    assert first.parent == second.parent


def test_limit_a_loop_that_moves_to_another_task_leaves_the_first_as_it_is(
    produced: Clients, instrumented: None, recorder: Recorder
) -> None:
    """The first task's context has an ended span; a loop in it makes no child of it."""
    kept = [iter(produced.consumer())]

    async def step() -> None:
        for _ in kept[0]:
            break

    async def consume() -> None:
        await step()
        await asyncio.create_task(step())
        for _ in produced.consumer():
            span = trace.get_current_span()
            assert span.is_recording()
            parent = span.parent  # type: ignore[attr-defined]  # the SDK's
            assert parent.is_remote
            break

    asyncio.run(consume())
    kept.clear()
    assert recorder.open() == []


def test_a_consumer_shared_by_threads_under_a_lock(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    consumer, lock = produced.consumer(), threading.Lock()
    offsets, wrong = [], []

    def work() -> None:
        for _ in range(COUNT // 3):
            with lock:
                record = next(consumer)
            with process_span(record, consumer) as span:
                if trace.get_current_span() is not span:
                    wrong.append(record)
                offsets.append(record.offset)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(offsets) == list(range(COUNT))
    assert wrong == []
    assert recorder.names() == [f"poll {topic}"] * COUNT + [f"process {topic}"] * COUNT


def test_loops_of_threads_over_one_consumer_under_a_lock(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    consumer, lock = produced.consumer(), threading.Lock()
    watch = Watch()

    def work() -> None:
        for _ in range(COUNT // 3):
            with lock:
                for record in consumer:
                    watch(record)
                    break

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [offset for _, offset, _ in watch.seen] == list(range(COUNT))
    assert set(watch.current) == {(True, True)}
    assert recorder.names() == [f"process {topic}"] * COUNT


class _Generating(kafka.KafkaConsumer):  # type: ignore[misc]  # untyped
    """A subclass with an iteration of its own."""

    def __iter__(self) -> Iterator[Any]:
        for record in super().__iter__():
            yield record


class _Stepping(kafka.KafkaConsumer):  # type: ignore[misc]  # untyped
    def __next__(self) -> Any:
        return super().__next__()


@pytest.mark.parametrize("cls", [_Generating, _Stepping])
def test_loops_over_subclasses(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str, cls: type
) -> None:
    watch = Watch()
    for record in produced.consumer(cls=cls):
        watch(record)
        if record.offset == COUNT - 1:
            break
    assert set(watch.current) == {(True, True)}
    assert recorder.names() == [f"process {topic}"] * COUNT
    assert recorder.count("messaging.client.consumed.messages") == COUNT


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("method", ["__next__", "__iter__", "poll"])
def test_loops_where_the_application_has_patched_the_consumer(
    produced: Clients,
    instrument: Instrument,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    method: str,
) -> None:
    calls = []

    def patch() -> None:
        original = getattr(kafka.KafkaConsumer, method)

        def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(method)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kafka.KafkaConsumer, method, patched)

    if order == "before":
        patch()
    instrument()
    if order == "after":
        patch()
    watch = Watch()
    for record in produced.consumer():
        watch(record)
        if record.offset == COUNT - 1:
            break
    assert calls
    assert set(watch.current) == {(True, True)}
    assert recorder.names() == [f"process {topic}"] * COUNT
    assert recorder.count("messaging.client.consumed.messages") == COUNT
    monkeypatch.undo()


def test_uninstrumented_in_the_middle_of_nested_loops_nothing_stays(
    produced: Clients, instrument: Instrument, recorder: Recorder
) -> None:
    instrument()
    offsets = []
    for outer in produced.consumer():
        for inner in produced.consumer():
            offsets.append((outer.offset, inner.offset))
            if len(offsets) == 2:
                KafkaPythonInstrumentor().uninstrument()
            if inner.offset == 2:
                break
        if outer.offset == 1:
            break
    assert offsets == [(outer, inner) for outer in range(2) for inner in range(3)]
    assert recorder.open() == []


def test_process_parent_none_makes_each_process_span_a_root_that_links(
    produced: Clients, instrument: Instrument, recorder: Recorder, topic: str
) -> None:
    instrument(process_parent="none")
    with recorder.tracer.start_as_current_span("around"):
        loop_with_break(produced, Watch())
    spans = recorder.named(f"process {topic}")
    assert [span.parent for span in spans] == [None] * COUNT
    assert len({span.context.trace_id for span in spans if span.context}) == COUNT
    assert [link.context.trace_id for span in spans for link in span.links] == list(
        range(1, COUNT + 1)
    )
    assert (
        attributes_of([link for span in spans for link in span.links]) == [{}] * COUNT
    )


class Value:
    """A value that can be watched, as bytes and records cannot."""


def test_no_record_is_kept_longer_than_by_the_plain_client(
    produced: Clients, instrument: Instrument
) -> None:
    def still_alive() -> int:
        alive: weakref.WeakSet[Value] = weakref.WeakSet()

        def watched(_: bytes) -> Value:
            value = Value()
            alive.add(value)
            return value

        config = {"value_deserializer": watched, "max_poll_records": 1}
        copied: list[contextvars.Context] = []
        for record in produced.finite(COUNT, **config):
            copied.append(contextvars.copy_context())  # as a task or a timer does
            del record
        return len(alive)

    gc.disable()
    try:
        plain = still_alive()
        instrument()
        assert still_alive() <= plain
    finally:
        gc.enable()


class Keeping(kafka.KafkaConsumer):  # type: ignore[misc]  # untyped
    """Keeps its frames, as 3.0 does with the exception of a fetch that times out."""

    def __next__(self) -> Any:
        self.frame = sys._getframe()
        return super().__next__()


def test_a_scope_ends_with_its_loop_though_the_client_keeps_its_frames(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    for _ in produced.consumer(cls=Keeping):
        break
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert len(recorder.named(f"process {topic}")) == 1
    assert recorder.open() == []


def test_the_garbage_collector_ends_no_span_itself(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    """A collection can strike inside the SDK, whose locks are not reentrant."""
    ended_in_collection: list[bool] = []

    class Processor(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            ended_in_collection.append(collecting)

    collecting = False
    recorder.tracer_provider.add_span_processor(Processor())

    class Service:
        def run(self) -> Iterator[Any]:
            for record in produced.consumer():
                yield record

    service: Any = Service()
    service.stream = service.run()
    service.itself = service
    for _ in service.stream:
        break
    assert recorder.open() == [f"process {topic}"]
    del service
    collecting = True
    collect()
    collecting = False
    assert ended_in_collection == []
    assert trace.get_current_span() is trace.INVALID_SPAN
    produced.send(b"next")
    assert recorder.open() == []


@pytest.mark.cpython
def test_a_loop_that_the_garbage_collector_finds_keeps_no_record(
    produced: Clients, instrumented: None
) -> None:
    """Its operation waits for the next one, and a task may keep its context."""

    class Service:
        def run(self) -> Iterator[Any]:
            for _ in produced.consumer():
                yield contextvars.copy_context()

    service: Any = Service()
    service.stream = service.run()
    service.itself = service
    for copied in service.stream:
        scope = copied.run(innermost.get)
        break
    assert scope is not None
    assert len(scope.messages.records) == 1
    del service
    collect()
    assert scope.messages.records == ()


def test_a_pool_that_resumes_a_generator_has_nothing_attached(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    def generate() -> Generator[Any, None, None]:
        for record in produced.consumer():
            yield record.offset

    generator = generate()
    with ThreadPoolExecutor(2) as pool:
        offsets = [pool.submit(next, generator).result() for _ in range(COUNT)]
        generator.close()
        left = [pool.submit(trace.get_current_span).result() for _ in range(4)]
    assert offsets == list(range(COUNT))
    assert left == [trace.INVALID_SPAN] * 4
    assert recorder.names() == [f"poll {topic}"] * COUNT


def test_a_span_of_the_applications_that_outlasts_a_round_stays_current(
    produced: Clients, instrumented: None, recorder: Recorder
) -> None:
    span = recorder.tracer.start_span("unit of work")
    within = trace.use_span(span, end_on_exit=True)
    currents = []
    for record in produced.finite(3):
        if record.offset == 0:
            within.__enter__()
        if record.offset == 1:
            current: Any = trace.get_current_span()
            assert current.parent is span.get_span_context()
        if record.offset == 2:
            within.__exit__(None, None, None)
        currents.append(span.is_recording())
    assert currents == [True, True, False]
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert recorder.open() == []


def test_what_the_body_attached_stays_without_the_span_of_its_round(
    produced: Clients, instrumented: None, recorder: Recorder
) -> None:
    def consume() -> None:
        attached: dict[str, object] = {}
        for record in produced.finite(3):
            span: Any = trace.get_current_span()
            assert span.attributes["messaging.kafka.offset"] == record.offset
            assert span.parent.is_remote
            assert attached.items() <= context.get_current().items()
            key = context.create_key("key")
            attached[key] = record.offset
            context.attach(context.set_value(key, record.offset))
        assert context.get_current() == attached

    contextvars.copy_context().run(consume)


def test_what_the_body_attached_stays_though_one_of_its_spans_was_not_started(
    produced: Clients, instrument: Instrument, log: Log
) -> None:
    class Failing(StaticSampler):
        seen = 0

        def should_sample(self, *args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            if self.seen == 2:
                raise RuntimeError
            return super().should_sample(*args, **kwargs)

    provider = TracerProvider(Failing(Decision.DROP), shutdown_on_exit=False)
    instrument(tracer_provider=provider, receive_spans=False)
    key = context.create_key("key")

    def consume() -> None:
        rounds = 0
        for _ in zip(produced.consumer(), produced.consumer(), strict=False):
            rounds += 1
            if rounds == 2:
                break
            context.attach(context.set_value(key, 1))
        assert rounds == 2
        assert context.get_value(key) == 1

    contextvars.copy_context().run(consume)
    (message,) = log.take()
    assert message.startswith("Failed to start a span")


@pytest.mark.parametrize("span", [trace.INVALID_SPAN, None], ids=["span", "value"])
@pytest.mark.parametrize("parent", [False, True], ids=["root", "under a span"])
def test_what_the_body_attached_is_detached_after_the_loop(
    produced: Clients,
    instrumented: None,
    recorder: Recorder,
    span: trace.Span | None,
    parent: bool,
) -> None:
    """No span that has ended is current again."""
    key = context.create_key("tenant")
    around = contextlib.ExitStack()
    with around:
        if parent:
            around.enter_context(recorder.tracer.start_as_current_span("around"))
        before, tokens = {**context.get_current()}, []
        for _ in produced.finite(3):
            attached = context.set_value(key, "7")
            if span is not None:
                attached = trace.set_span_in_context(span, attached)
            tokens.append(context.attach(attached))
        for token in reversed(tokens):
            assert {**context.get_current()} == {**before, key: "7"}
            context.detach(token)
            # That of the loop's next round came upon it.
            assert trace.get_current_span().is_recording() == parent
        assert {**context.get_current()} == before
        assert context.get_value(key) is None


def test_blocks_that_the_body_enters_are_left_after_the_loop(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in produced.finite(1):
            for name in ("unit", "part"):
                stack.enter_context(recorder.tracer.start_as_current_span(name))
        assert trace.get_current_span().is_recording()
    assert trace.get_current_span() is trace.INVALID_SPAN
    with recorder.tracer.start_as_current_span("later"):
        pass
    assert recorder.one("later").parent is None
    process, unit = recorder.one(f"process {topic}"), recorder.one("unit")
    assert unit.parent == process.context
    assert recorder.one("part").parent == unit.context


def test_a_task_that_began_in_a_body_keeps_its_span(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    async def work(record: Any, span: trace.Span) -> None:
        await left.wait()
        baggage.set_baggage("copies", "what is current")
        with process_span(record):
            assert trace.get_current_span() is not span
        assert trace.get_current_span() is span
        with recorder.tracer.start_as_current_span("work"):
            pass

    async def consume() -> None:
        for record in produced.finite(1):
            task = asyncio.create_task(work(record, trace.get_current_span()))
            await asyncio.sleep(0)
            token = context.attach(context.set_value("tenant", "7"))
        context.detach(token)
        assert trace.get_current_span() is trace.INVALID_SPAN
        left.set()
        await task

    left = asyncio.Event()
    asyncio.run(consume())
    process, again = recorder.named(f"process {topic}")
    assert again.parent is not None
    assert again.parent == process.parent
    assert recorder.one("work").parent == process.context


@pytest.mark.skipif(
    getattr(sys.flags, "thread_inherit_context", False),
    reason="threads that inherit contexts cannot be told from those that carry one",
)
def test_a_pool_that_carries_a_context_of_a_body_keeps_its_span(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    for _ in produced.finite(1):
        carried = contextvars.copy_context()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(carried.run, produced.send, b"later").result()
    process = recorder.one(f"process {topic}")
    parent = recorder.named(f"send {topic}")[-1].parent
    assert parent == process.context


def test_what_a_later_loop_detaches_brings_back_no_span_of_an_earlier_one(
    produced: Clients, instrumented: None
) -> None:
    def consume() -> None:
        for _ in produced.finite(1):
            token = context.attach(context.set_value("tenant", "7"))
        for _ in produced.finite(1):
            context.detach(token)
            assert trace.get_current_span() is trace.INVALID_SPAN

    contextvars.copy_context().run(consume)


def test_scopes_that_ended_elsewhere_are_undone_with_the_one_within_them(
    produced: Clients, instrumented: None
) -> None:
    kept = [iter(produced.consumer()), iter(produced.consumer())]
    for iterator in kept:
        for _ in iterator:
            break
    del iterator
    for _ in produced.consumer():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: [next(each) for each in kept]).result()
        assert trace.get_current_span().is_recording()
        break
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_value_that_the_body_has_changed_stays_changed(
    produced: Clients, instrumented: None
) -> None:
    def consume() -> None:
        key = context.create_key("tenant")
        context.attach(context.set_value(key, "7"))
        for _ in produced.finite(1):
            context.attach(context.set_value(key, "8"))
        assert context.get_current() == {key: "8"}

    contextvars.copy_context().run(consume)


def test_a_body_that_attaches_no_value_leaves_the_very_context_around_it(
    produced: Clients, instrumented: None
) -> None:
    before = context.get_current()
    for _ in produced.finite(1):
        context.attach(trace.set_span_in_context(trace.INVALID_SPAN))
    assert context.get_current() is before


@pytest.mark.parametrize("loops", [1, 2])
def test_a_context_that_the_body_has_kept_keeps_its_span(
    produced: Clients, instrumented: None, loops: int
) -> None:
    for _ in zip(*(produced.finite(1) for _ in range(loops)), strict=False):
        kept, span = context.get_current(), trace.get_current_span()
    assert not span.is_recording()
    assert trace.get_current_span(kept) is span


def test_a_loop_in_a_copy_of_a_bodys_context_is_no_child_of_what_has_ended(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    def loop() -> None:
        for _ in produced.finite(1):
            pass

    with recorder.tracer.start_as_current_span("around") as around:
        for _ in produced.finite(1):
            copied = contextvars.copy_context()
        copied.run(loop)
    spans = recorder.named(f"process {topic}")
    parents = [span.parent for span in spans]
    assert parents == [around.get_span_context()] * 2


def fail(*_: Any) -> Any:
    raise RuntimeError


def test_where_no_context_can_be_attached_the_span_is_not_current_and_it_is_said(
    produced: Clients,
    instrumented: None,
    recorder: Recorder,
    topic: str,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(context, "attach", fail)
        for _ in produced.finite(1):
            assert trace.get_current_span() is trace.INVALID_SPAN
    (message,) = log.take()
    assert message.startswith("Failed to make a process span current")
    assert len(recorder.named(f"process {topic}")) == 1


def test_where_the_current_context_cannot_be_asked_for_that_of_a_scope_is_left(
    produced: Clients, instrumented: None, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        for _ in produced.finite(1):
            kept = context.get_current()
            patched.setattr(context, "get_current", fail)
    for attached in (None, kept):
        assert trace.get_current_span(attached) is trace.INVALID_SPAN
    messages = log.take()
    assert messages[0].startswith("Failed to restore the context after a process span")


def test_an_interrupt_in_leaving_a_scope_leaves_it_and_ends_its_span(
    produced: Clients,
    instrumented: None,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        for _ in produced.consumer():
            patched.setattr(context, "detach", interrupt)
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert recorder.open() == []


@pytest.mark.cpython
def test_what_fails_in_leaving_a_scope_that_the_garbage_collector_finds_is_said(
    produced: Clients, instrumented: None, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = [iter(produced.consumer())]
    for _ in kept[0]:
        break
    kept.append(kept)
    del kept
    with monkeypatch.context() as patched:
        patched.setattr(context, "get_current", fail)
        collect()
    (message,) = log.take()
    assert message.startswith("Failed to restore the context after a process span")
    # What is asked for next leaves it.
    for _ in produced.consumer():
        break
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_limit_an_inner_loop_that_moves_the_outer_on_has_no_current_span(
    produced: Clients, instrumented: None, recorder: Recorder
) -> None:
    """A documented limit: the outer scope ends and takes the inner with it."""
    outer = iter(produced.consumer())
    inner = produced.consumer()
    for _ in outer:
        for _inner in inner:
            next(outer)
            assert trace.get_current_span() is trace.INVALID_SPAN
            break
        break
    del outer
    assert recorder.open() == []


@pytest.mark.skipif(sys.version_info < (3, 12), reason="batched is new in 3.12")
def test_limit_of_records_in_batches_of_itertools_only_the_last_is_current(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    """A documented limit: one statement asks for several records in one step."""
    batched = vars(itertools)["batched"]
    for batch in batched(records_of(produced), 2):
        current: Any = trace.get_current_span()
        assert current.attributes["messaging.kafka.offset"] == batch[-1].offset
    assert len(recorder.named(f"process {topic}")) == COUNT


@pytest.mark.parametrize(
    "copied",
    [list, sorted, copy.copy, lambda records: records[:]],
    ids=["list", "sorted", "copy", "slice"],
)
def test_limit_a_loop_over_a_copy_of_what_poll_returned_makes_no_process_span(
    produced: Clients,
    instrumented: None,
    recorder: Recorder,
    topic: str,
    copied: Callable[[Any], Any],
) -> None:
    """A documented limit: it is a plain list."""
    for record in copied(records_of(produced)):
        assert trace.get_current_span() is trace.INVALID_SPAN
        with process_span(record):
            pass
    assert len(recorder.named(f"process {topic}")) == COUNT


def test_what_poll_returned_can_be_rebuilt_as_a_list_can(
    produced: Clients, instrumented: None
) -> None:
    @dataclasses.dataclass
    class Batch:
        records: list[Any]

    records = records_of(produced)
    assert dataclasses.asdict(Batch(records))["records"] == records
    assert type(records)(records) == records
    rebuilt = type(records)(records)
    assert [record for record in rebuilt] == records
    assert [record for record in reversed(rebuilt)] == records[::-1]


def test_the_iterator_of_what_poll_returned_copies_as_a_lists_does(
    produced: Clients, instrumented: None
) -> None:
    iterator = iter(records_of(produced))
    assert next(iterator).offset == 0
    assert next(copy.copy(iterator)).offset == 1
    assert next(pickle.loads(pickle.dumps(iterator))).offset == 1
    assert [record.offset for record in iterator] == [1, 2, 3, 4, 5]
    assert list(copy.copy(iterator)) == []


def test_records_of_two_partitions_in_one_list_have_a_span_each(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    records = records_of(produced)
    records.extend([record._replace(partition=1) for record in records])
    for _ in records:
        pass
    assert len(recorder.named(f"process {topic}")) == 2 * COUNT


def test_a_record_that_is_asked_for_without_any_python_frame_is_received(
    produced: Clients, instrumented: None, recorder: Recorder, topic: str
) -> None:
    iterator = iter(produced.consumer())
    _thread.start_new_thread(iterator.__next__, ())
    deadline = threading.Event()
    for _ in range(1000):
        if recorder.names():
            break
        deadline.wait(0.01)
    assert recorder.names() == [f"poll {topic}"]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, asyncio.CancelledError])
def test_a_hook_that_ends_the_application_leaves_nothing_open(
    produced: Clients,
    instrument: Instrument,
    recorder: Recorder,
    raised: type[BaseException],
) -> None:
    def hook(*_: Any) -> None:
        raise raised

    instrument(consume_hook=hook)
    with pytest.raises(raised):
        for _ in produced.consumer():
            pass
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert recorder.open() == []


def loop_reversed(clients: Clients, watch: Watch) -> None:
    for record in reversed(records_of(clients)):
        watch(record)


def loop_over_generator_expression(clients: Clients, watch: Watch) -> None:
    for record in (each for each in records_of(clients) if each.offset):
        watch(record)


@pytest.mark.parametrize("loop", [loop_reversed, loop_over_generator_expression])
def test_a_loop_in_another_order_or_over_some_makes_process_spans_too(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    loop: Program,
) -> None:
    clients.send(*(b"%d" % number for number in range(COUNT)))
    watch = Watch()
    loop(clients, watch)
    assert watch.current == [(True, True)] * len(watch.seen)
    spans = recorder.named(f"process {topic}")
    offsets = [span["messaging.kafka.offset"] for span in attributes_of(spans)]
    assert set(offsets) >= {offset for _, offset, _ in watch.seen}
    assert not recorder.open()


def test_what_is_reversed_ends_and_copies_as_a_lists_does(
    instrumented: None, clients: Clients
) -> None:
    clients.send(*(b"%d" % number for number in range(COUNT)))
    backwards = reversed(records_of(clients))
    assert next(backwards).offset == COUNT - 1
    assert operator.length_hint(backwards) == COUNT - 1
    assert next(copy.copy(backwards)).offset == COUNT - 2
    assert next(pickle.loads(pickle.dumps(backwards))).offset == COUNT - 2
    assert [record.offset for record in backwards] == [4, 3, 2, 1, 0]
    assert list(copy.copy(backwards)) == []
