"""Whatever an application does, it does with the instrumentation as without.

Hypothesis makes up headers, calls and programs. Each runs on a client that is not
instrumented and on one that is, and what the application sees is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kafka import TopicPartition
from opentelemetry import context

from clients import DEADLINE, Clients, poll_records
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor, process_span
from recorder import Log, Recorder

pytestmark = pytest.mark.one_broker


def bounded(examples: int) -> settings:
    """The same examples in every run, none of which has to be fast."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        # The broker and the clients are meant to be shared by the examples, and a
        # broker takes as long as it takes.
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )


class Instrumentation:
    """Runs things with the instrumentation, and checks what they leave behind."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def run(self, program: Callable[[], Any]) -> Any:
        instrumentor = KafkaPythonInstrumentor()
        instrumentor.instrument(
            tracer_provider=self._recorder.tracer_provider,
            meter_provider=self._recorder.meter_provider,
            logger_provider=self._recorder.logger_provider,
        )
        before = context.get_current()
        try:
            seen = program()
        finally:
            instrumentor.uninstrument()
        assert context.get_current() == before
        # A span that ends twice would be seen twice.
        started = sorted(span.context.span_id for span in self._recorder.started)
        ended = sorted(span.context.span_id for span in self._recorder.ended)
        assert ended == started
        self._recorder.check()
        self._recorder.started.clear()
        self._recorder.ended.clear()
        self._recorder.all_ended.clear()
        return seen


@pytest.fixture
def with_it(recorder: Recorder) -> Instrumentation:
    return Instrumentation(recorder)


FIELDS = ("traceparent", "tracestate", "baggage")


class Sender:
    """Sends, and says what the application and the consumers of the topic see.

    The producer and the consumer are made once: they see the instrumentation come
    and go.
    """

    def __init__(self, clients: Clients) -> None:
        self._topic = clients.topic
        clients.send(b"first")
        self._producer = clients.producer(max_block_ms=1000)
        self._consumer = clients.consumer()
        poll_records(self._consumer, 1)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            future = self._producer.send(*args, **kwargs)
            self._producer.flush()
            sent = future.get(DEADLINE)
        except Exception as error:
            # Addresses in what it says differ from one object to the next.
            return type(error), str(error).split(" at 0x")[0]
        (record,) = poll_records(self._consumer, 1)
        assert record.offset == sent.offset
        # The propagators' own fields are the package's to write.
        own = [header for header in record.headers if header[0] not in FIELDS]
        timestamp = record.timestamp if record.timestamp < 10**6 else "now"
        return record.partition, timestamp, record.key, record.value, own


@pytest.fixture
def send(clients: Clients) -> Sender:
    return Sender(clients)


# Text of any kind; what has no UTF-8 form only kafka-python can refuse.
NAMES = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*FIELDS, "own"]),
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2),
)
VALUES = st.binary(max_size=8)
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=4)

ANYTHING = st.one_of(
    st.none(),
    st.integers(-2, 2),
    st.booleans(),
    st.text(max_size=3),
    VALUES,
    st.builds(bytearray, VALUES),
    st.just(()),
)
NO_HEADERS = st.one_of(
    ANYTHING,
    st.dictionaries(st.text(max_size=3), VALUES, max_size=2),
    st.lists(HEADERS, max_size=2).map(tuple),
    st.lists(
        st.one_of(
            ANYTHING,
            st.tuples(ANYTHING, ANYTHING),
            st.tuples(NAMES, ANYTHING),
            st.tuples(NAMES, VALUES, VALUES),
            st.tuples(NAMES, VALUES).map(list),
            st.tuples(NAMES, VALUES),
        ),
        max_size=3,
    ),
)


@bounded(150)
@given(headers=st.one_of(HEADERS, NO_HEADERS))
def test_any_headers_arrive_or_are_refused_as_without(
    send: Sender, with_it: Instrumentation, topic: str, headers: Any
) -> None:
    before = repr(headers)
    arguments = (topic, b"value"), {"headers": headers}
    assert with_it.run(lambda: send(*arguments)) == send(*arguments)
    assert repr(headers) == before


VALID = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def capturing(instrument: Instrument) -> None:
    instrument(capture_headers="*")


@bounded(300)
@given(
    headers=st.lists(
        st.tuples(NAMES, st.one_of(st.none(), st.just(VALID), VALUES)), max_size=4
    )
)
def test_any_headers_that_a_record_may_have_are_read_or_passed_by(
    capturing: None, recorder: Recorder, log: Log, headers: Any
) -> None:
    """Those that only other clients can send, too: the record is made up."""
    record = SimpleNamespace(
        topic="topic",
        partition=0,
        offset=0,
        key=None,
        serialized_value_size=1,
        headers=headers.copy(),
    )
    with process_span(record):
        pass
    assert record.headers == headers
    span = recorder.ended[-1]
    assert span.name == "process topic"
    is_linked = dict(headers).get("traceparent") == VALID
    assert len(span.links) == is_linked
    assert (span.parent is not None) == is_linked
    # What the API itself has to say of a field does not count.
    assert not [said for said in log.take() if said.startswith("Failed to")]


@bounded(100)
@given(
    positional=st.integers(1, 6),
    given_by_keyword=st.sets(st.sampled_from(range(6))),
    order=st.randoms(use_true_random=False),
    value=st.one_of(st.none(), VALUES),
    key=st.one_of(st.none(), VALUES),
    headers=st.one_of(
        st.none(), st.lists(st.tuples(st.text(max_size=8), VALUES), max_size=2)
    ),
    partition=st.sampled_from([None, 0, 1, -1]),
    timestamp=st.one_of(st.none(), st.integers(1, 10**6 - 1)),
)
def test_any_mixture_of_positional_and_keyword_arguments_sends_the_same(
    send: Sender,
    with_it: Instrumentation,
    topic: str,
    positional: int,
    given_by_keyword: set[int],
    order: Any,
    value: bytes | None,
    key: bytes | None,
    headers: Any,
    partition: int | None,
    timestamp: int | None,
) -> None:
    values = {
        "topic": topic,
        "value": value,
        "key": key,
        "headers": headers,
        "partition": partition,
        "timestamp_ms": timestamp,
    }
    args = tuple(values.values())[:positional]
    keywords = [
        (name, values[name])
        for i, name in enumerate(values)
        if i >= positional and i in given_by_keyword
    ]
    order.shuffle(keywords)
    kwargs = dict(keywords)
    assert with_it.run(lambda: send(args, kwargs)) == send(args, kwargs)


class Loop(NamedTuple):
    """A `for` statement over the consumer, or over what the last poll returned."""

    source: str
    rounds: int
    body: tuple[Any, ...]
    end: str


RECORDS = 12

CALLS = st.one_of(
    st.tuples(st.just("poll"), st.integers(1, 4)),
    st.tuples(st.just("next"), st.just(0)),
    st.tuples(st.just("seek"), st.integers(0, RECORDS)),
    st.tuples(st.sampled_from(["pause", "resume", "position", "close"]), st.just(0)),
)


def loops(body: Any) -> Any:
    return st.builds(
        Loop,
        source=st.sampled_from(["consumer", "polled"]),
        rounds=st.integers(1, 4),
        body=st.lists(body, max_size=3).map(tuple),
        end=st.sampled_from(["break", "raise", "return"]),
    )


PROGRAMS = st.lists(
    st.recursive(CALLS, loops, max_leaves=5) | loops(CALLS), min_size=1, max_size=6
)


class Stopped(Exception):  # noqa: N818 (it is no error)
    """What the body of a loop raises."""


class Machine:
    """Runs a program with a consumer, and notes what the program sees."""

    def __init__(self, clients: Clients) -> None:
        self.partition = TopicPartition(clients.topic, 0)
        # No group, which only costs time.
        self.consumer = clients.consumer()
        self.seen: list[Any] = []
        self.polled: Any = []
        self.paused = self.closed = False
        # So that the partition is assigned before it is paused or sought.
        poll_records(self.consumer, 1)
        self.consumer.seek(self.partition, 0)

    def run(self, program: Any) -> list[Any]:
        try:
            for step in program:
                self.step(step)
        finally:
            self.consumer.close()
        return self.seen

    def step(self, step: Any) -> None:
        try:
            if isinstance(step, Loop):
                self.loop(step)
            else:
                self.call(*step)
        except Exception as error:
            self.seen.append((type(error), str(error)))

    def loop(self, loop: Loop) -> None:
        source = self.consumer if loop.source == "consumer" else self.polled
        rounds = 0
        self.give_up_if_no_more()
        for record in source:
            self.seen.append((record.offset, record.value))
            for step in loop.body:
                self.step(step)
            rounds += 1
            if rounds == loop.rounds:
                if loop.end == "break":
                    break
                if loop.end == "raise":
                    raise Stopped
                return
            self.give_up_if_no_more()
        self.seen.append(rounds)

    def call(self, name: str, argument: int) -> None:
        if name == "poll":
            self.seen.append(("poll", [r.offset for r in self.poll(argument)]))
        elif name == "next":
            self.give_up_if_no_more()
            record = next(self.consumer)
            self.seen.append(("next", record.offset, record.value))
        elif name == "seek":
            self.consumer.seek(self.partition, argument)
        elif name == "pause":
            self.consumer.pause(self.partition)
            self.paused = True
        elif name == "resume":
            self.consumer.resume(self.partition)
            self.paused = False
        elif name == "position":
            self.seen.append(("position", self.consumer.position(self.partition)))
        else:
            self.consumer.close()
            self.closed = True

    def poll(self, most: int) -> Any:
        """What a poll brings, where anything can come: a plain one may come early."""
        deadline = time.monotonic() + DEADLINE
        while True:
            polled = self.consumer.poll(timeout_ms=200, max_records=most)
            self.polled = next(iter(polled.values()), [])
            if self.polled or not self.is_more() or time.monotonic() > deadline:
                return self.polled

    def give_up_if_no_more(self) -> None:
        """Have iteration wait for what comes, however long, and for nothing else."""
        milliseconds = DEADLINE * 1000 if self.is_more() else 20
        self.consumer.config["consumer_timeout_ms"] = milliseconds

    def is_more(self) -> bool:
        return (
            not self.paused
            and not self.closed
            and self.consumer.position(self.partition) < RECORDS
        )


@pytest.fixture
def filled(clients: Clients) -> Clients:
    clients.send(*(b"%d" % i for i in range(RECORDS)))
    return clients


@bounded(30)
@given(program=PROGRAMS)
def test_any_program_sees_the_same(
    filled: Clients, with_it: Instrumentation, program: Any
) -> None:
    def run() -> list[Any]:
        return Machine(filled).run(program)

    assert with_it.run(run) == run()
