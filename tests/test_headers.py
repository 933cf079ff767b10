"""Headers out and in: what is written to messages, and what is read from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.propagators.b3 import B3MultiFormat, B3SingleFormat
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.jaeger import JaegerPropagator
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import (
    SpanKind,
    TraceFlags,
    format_span_id,
    format_trace_id,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from clients import DEADLINE, VERSION, Clients, poll_records, sends_large
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor, process_span
from otel_kafka_python._propagation import (
    _GETTER,
    EMPTY,
    creation_context,
    extract,
    inject,
    same_span,
)
from recorder import Log, Recorder

Headers = list[tuple[str, bytes]]

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
STALE = ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01".encode())


def sent_headers(
    clients: Clients, *args: Any, **kwargs: Any
) -> list[tuple[str, bytes]]:
    """The headers on the wire of what `send` is called with."""
    producer = clients.producer()
    producer.send(clients.topic, *args, **kwargs)
    producer.flush()
    with trace.use_span(trace.INVALID_SPAN):
        (record,) = poll_records(clients.consumer(), 1)
    headers: Headers = record.headers
    return headers


def traceparent(span: ReadableSpan) -> tuple[str, bytes]:
    found = span.context
    assert found is not None
    trace_id, span_id = format_trace_id(found.trace_id), format_span_id(found.span_id)
    # The SDK says in the flags whether the trace id is random.
    return "traceparent", f"00-{trace_id}-{span_id}-{found.trace_flags:02x}".encode()


@pytest.fixture
def propagator() -> Iterator[Any]:
    """Sets the global propagator, for the time of a test."""
    before = propagate.get_global_textmap()
    yield propagate.set_global_textmap
    propagate.set_global_textmap(before)


def test_the_context_of_the_send_span_is_the_creation_context(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    headers = sent_headers(clients, b"value", headers=[("own", b"1"), ("own", b"2")])
    span = recorder.one(f"send {topic}")
    assert headers == [("own", b"1"), ("own", b"2"), traceparent(span)]
    assert span.kind is SpanKind.PRODUCER
    assert len(span.links) == 0


@pytest.mark.defect(1)
def test_the_callers_list_is_never_changed_and_reuse_gathers_nothing(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    headers = [("own", b"1")]
    producer = clients.producer()
    for _ in range(3):
        producer.send(topic, b"value", headers=headers)
    producer.flush()
    assert headers == [("own", b"1")]
    names = [
        [name for name, _ in r.headers] for r in poll_records(clients.consumer(), 3)
    ]
    assert names == [["own", "traceparent"]] * 3


@pytest.mark.defect(4)
def test_headers_may_be_positional_and_none(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    headers = sent_headers(clients, b"value", None, None)
    assert headers == [traceparent(recorder.one(f"send {topic}"))]


class _Empty(B3MultiFormat):
    """A propagator that has nothing to say, and says it."""

    def inject(self, carrier: Any, *args: Any, **kwargs: Any) -> None:
        carrier["empty"] = ""


@pytest.mark.defect(13)
def test_an_empty_value_is_sent_as_it_is(
    propagator: Any, instrumented: None, clients: Clients
) -> None:
    propagator(_Empty())
    headers = sent_headers(clients, b"value", headers=[("own", b"")])
    assert headers == [("own", b""), ("empty", b"")]


@pytest.mark.defect(16)
@pytest.mark.parametrize(
    "headers",
    [
        (("tuple", b"1"),),
        {"dict": b"1"},
        [["pair", b"1"]],
        [(b"bytes", b"1")],
        [("text", "1")],
        [("none", None)],
        [("three", b"1", b"2")],
        ["text"],
        [1],
        "text",
        1,
    ],
    ids=repr,
)
def test_what_kafka_python_refuses_is_refused_with_its_own_error(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    headers: Any,
) -> None:
    producer = clients.producer()
    with pytest.raises(Exception) as before:
        producer.send(topic, b"value", None, headers)
    instrument()
    with pytest.raises(before.type) as after:
        producer.send(topic, b"value", None, headers)
    assert str(after.value) == str(before.value)
    span = recorder.one(f"send {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] == before.type.__qualname__


def test_a_generator_of_headers_is_not_consumed(
    instrumented: None, clients: Clients, topic: str
) -> None:
    headers = (header for header in [("own", b"1")])
    with pytest.raises((AssertionError, TypeError)):
        clients.producer().send(topic, b"value", headers=headers)
    assert list(headers) == [("own", b"1")]


class _Headers(list):  # type: ignore[type-arg]  # as an application has it
    """A subclass of list, which 2.0 refuses and later versions take."""


def test_a_subclass_of_list_is_refused_or_taken_as_before(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    headers = _Headers([("own", b"1")])
    if VERSION < (2, 1):
        with pytest.raises(AssertionError):
            sent_headers(clients, b"value", headers=headers)
        return
    sent = sent_headers(clients, b"value", headers=headers)
    assert sent == [("own", b"1"), traceparent(recorder.one(f"send {topic}"))]
    assert headers == [("own", b"1")]


@pytest.mark.defect(5)
def test_a_broker_without_headers_gets_none(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    # No broker that can be had is so old: the client is told that this one is.
    config: dict[str, Any] = {}
    if VERSION >= (3, 0):
        config["enable_idempotence"] = False
    producer = clients.producer(
        api_version=(0, 10, 2), linger_ms=int(DEADLINE * 1000), **config
    )
    producer.send(topic, b"value")
    (started,) = recorder.started
    assert started.kind is SpanKind.CLIENT
    # So would the client have refused ours.
    with pytest.raises(AssertionError):
        producer.send(topic, b"value", headers=[("own", b"1")])


def test_baggage_goes_with_the_message(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    try:
        headers = sent_headers(clients, b"value", headers=[("baggage", b"old=1")])
    finally:
        context.detach(token)
    assert headers == [
        traceparent(recorder.one(f"send {topic}")),
        ("baggage", b"tenant=blue"),
    ]


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (B3MultiFormat(), {"x-b3-traceid", "x-b3-spanid", "x-b3-sampled"}),
        (B3SingleFormat(), {"b3"}),
        (JaegerPropagator(), {"uber-trace-id"}),
    ],
    ids=["b3 multi", "b3 single", "jaeger"],
)
def test_other_propagators_are_used_both_ways(
    propagator: Any,
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    made: Any,
    names: set[str],
) -> None:
    propagator(made)
    stale = [(name, b"old") for name in made.fields]
    headers = sent_headers(clients, b"value", headers=stale)
    assert {name for name, _ in headers} == names
    sent = recorder.one(f"send {topic}")
    received = recorder.one(f"poll {topic}")
    (link,) = received.links
    assert sent.context is not None
    assert link.context.span_id == sent.context.span_id


def test_an_unsampled_trace_is_propagated(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(tracer_provider=TracerProvider(ALWAYS_OFF, shutdown_on_exit=False))
    ((name, value),) = sent_headers(clients, b"value")
    assert name == "traceparent"
    assert int(value[-2:], 16) & 1 == 0
    assert recorder.count("messaging.client.sent.messages") == 1


def test_where_the_sdk_is_disabled_the_callers_headers_stay(
    instrument: Instrument, clients: Clients
) -> None:
    instrument(tracer_provider=trace.NoOpTracerProvider())
    assert sent_headers(clients, b"value", headers=[STALE]) == [STALE]


def test_without_propagation_nothing_is_written_but_all_is_read(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(propagation=False)
    assert sent_headers(clients, b"value", headers=[STALE]) == [STALE]
    (link,) = recorder.one(f"poll {topic}").links
    assert format_trace_id(link.context.trace_id) == TRACE_ID
    # Its context is nobody's creation context.
    assert recorder.one(f"send {topic}").kind is SpanKind.CLIENT


def test_without_send_spans_what_is_current_is_propagated(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(send_spans=False)
    with recorder.tracer.start_as_current_span("request"):
        headers = sent_headers(clients, b"value")
    assert headers == [traceparent(recorder.one("request"))]
    assert recorder.named(f"send {topic}") == []
    assert recorder.count("messaging.client.sent.messages") == 1


def test_a_context_that_the_application_has_put_on_a_message_stays(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    """An outbox relay sends what another process has written down."""
    stale = [STALE, ("tracestate", b"a=1"), ("baggage", b"b=2")]
    assert sent_headers(clients, b"value", headers=stale) == stale
    span = recorder.one(f"send {topic}")
    assert span.kind is SpanKind.CLIENT
    (link,) = span.links
    assert format_trace_id(link.context.trace_id) == TRACE_ID
    assert link.context.trace_state["a"] == "1"
    assert link.attributes == {}


def test_a_context_that_is_put_on_a_message_stays_also_while_others_are_processed(
    instrumented: None, clients: Clients, topic: str
) -> None:
    clients.send(b"value")
    stale = [STALE, ("tracestate", b"a=1"), ("baggage", b"b=2")]
    for record in clients.consumer():
        for inner in clients.consumer():
            assert inner.offset == record.offset
            to = Clients(clients.address, f"{topic}-next")
            assert sent_headers(to, b"value", headers=stale) == stale
            to.close()
            break
        break


@pytest.mark.one_client
def test_a_context_that_is_put_on_a_message_stays_while_one_without_is_processed(
    instrumented: None, clients: Clients, topic: str
) -> None:
    with suppress_instrumentation():
        clients.send(b"value")
    producer = clients.producer()
    for _ in clients.consumer():
        producer.send(f"{topic}-next", b"value", headers=[STALE])
        break
    producer.flush()
    (sent,) = poll_records(clients.consumer(f"{topic}-next"), 1)
    assert sent.headers == [STALE]


def test_the_applications_own_create_span_stays_the_creation_context(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    create = recorder.tracer.start_span("create", kind=SpanKind.PRODUCER)
    create.end()
    headers = inject(None, trace.set_span_in_context(create))
    assert sent_headers(clients, b"value", headers=headers) == headers
    span = recorder.one(f"send {topic}")
    assert span.kind is SpanKind.CLIENT
    assert [link.context.span_id for link in span.links] == [
        create.get_span_context().span_id
    ]


def test_the_current_spans_own_context_gives_way(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    """A habit from before there was an instrumentation."""
    with recorder.tracer.start_as_current_span("request"):
        by_hand = inject(None, context.get_current())
        headers = sent_headers(clients, b"value", headers=by_hand)
    span = recorder.one(f"send {topic}")
    assert headers == [traceparent(span)]
    assert span.kind is SpanKind.PRODUCER
    assert len(span.links) == 0


def test_forwarded_headers_give_way_to_the_forwarding_service(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"value", headers=[("own", b"1")])
    producer = clients.producer()
    for record in clients.consumer():
        with recorder.tracer.start_as_current_span("work"):
            producer.send(f"{topic}-next", record.value, headers=record.headers)
        break
    producer.flush()
    (forwarded,) = poll_records(clients.consumer(f"{topic}-next"), 1)
    send = recorder.one(f"send {topic}-next")
    assert forwarded.headers == [("own", b"1"), traceparent(send)]
    assert send.kind is SpanKind.PRODUCER
    assert len(send.links) == 0
    first, process, work = (
        recorder.one(name) for name in (f"send {topic}", f"process {topic}", "work")
    )
    parents = [span.parent and span.parent.span_id for span in (process, work, send)]
    assert parents == [
        span.context and span.context.span_id for span in (first, process, work)
    ]


def test_a_record_gives_way_also_while_another_is_processed_within_it(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    outer, inner = poll_records(clients.consumer(), 2)
    to = Clients(clients.address, f"{topic}-next")
    with process_span(outer), process_span(inner):
        headers = sent_headers(to, b"value", headers=outer.headers)
    to.close()
    send = recorder.one(f"send {topic}-next")
    assert headers == [traceparent(send)]
    assert send.kind is SpanKind.PRODUCER


def test_forwarded_outside_of_any_process_span_a_record_keeps_its_context(
    instrumented: None, clients: Clients, topic: str
) -> None:
    """A documented limit."""
    clients.send(b"value")
    (record,) = poll_records(clients.consumer(), 1)
    producer = clients.producer()
    producer.send(f"{topic}-next", record.value, headers=record.headers)
    producer.flush()
    (forwarded,) = poll_records(clients.consumer(f"{topic}-next"), 1)
    assert forwarded.headers == record.headers


HOSTILE: dict[str, Any] = {
    "no UTF-8": [("traceparent", b"\xff\xfe00")],
    "empty": [("traceparent", b"")],
    "huge": pytest.param(
        [("traceparent", b"0" * 100_000), ("other", bytes(100_000))],
        marks=sends_large,
    ),
    "wrong version": [("traceparent", f"ff-{TRACE_ID}-b7ad6b7169203331-01".encode())],
    "no hexadecimal": [("traceparent", b"00-xyz-b7ad6b7169203331-01")],
    "the last counts": [STALE, ("traceparent", b"")],
    "no UTF-8 beside": [("tracestate", b"\xff"), ("baggage", b"\xff")],
}


@pytest.mark.defect(3)
@pytest.mark.parametrize("headers", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_lose_no_record_and_are_no_context(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    log: Log,
    topic: str,
    headers: Any,
) -> None:
    producer = clients.producer()
    producer.send(topic, b"hostile", headers=headers)
    producer.send(topic, b"next")
    producer.flush()
    instrument()
    consumer = clients.consumer()
    values = []
    for record in consumer:
        values.append(record.value)
        if len(values) == 2:
            break
    assert values == [b"hostile", b"next"]
    assert [len(span.links) for span in recorder.named(f"process {topic}")] == [0, 0]
    # Some versions of the API say themselves that a field is too long.
    assert all("exceeded the maximum length" in said for said in log.take())


@pytest.mark.parametrize(
    "headers",
    [None, [], [("traceparent", None)], [("traceparent", b"")], [("a", None)]],
    ids=repr,
)
def test_values_that_only_other_clients_write_are_no_context(headers: Any) -> None:
    """kafka-python itself cannot send them."""
    assert extract(headers) == ({}, None)


@pytest.mark.defect(2)
def test_of_duplicate_fields_the_last_counts(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    other = ("traceparent", b"00-11111111111111111111111111111111-2222222222222222-01")
    producer = clients.producer()
    producer.send(topic, b"value", headers=[other, STALE])
    producer.flush()
    instrument()
    poll_records(clients.consumer(), 1)
    (link,) = recorder.one(f"poll {topic}").links
    assert format_trace_id(link.context.trace_id) == TRACE_ID


class _Broken(B3MultiFormat):
    def inject(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("inject")

    def extract(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("extract")


@pytest.mark.defect(12)
def test_a_propagator_that_raises_harms_nobody(
    propagator: Any, instrumented: None, clients: Clients, recorder: Recorder, log: Log
) -> None:
    propagator(_Broken())
    producer = clients.producer()
    for _ in range(3):
        producer.send(clients.topic, b"value", headers=[("x-b3-traceid", b"1")])
    producer.flush()
    records = poll_records(clients.consumer(), 3)
    assert [record.headers for record in records] == [[("x-b3-traceid", b"1")]] * 3
    assert [message.split(";")[0] for message in log.take()] == [
        "Failed to extract a context from headers",
        "Failed to inject the context into a message",
    ]
    assert KafkaPythonInstrumentor().is_instrumented_by_opentelemetry


# What the default propagators write is read and written without them: each of these,
# in all combinations, is what they make of it. The first ones are the usual ones.
TRACEPARENTS = [
    f"{before}{version}-{trace_id}-{span_id}-{flags}{after}".encode()
    for before, version, trace_id, span_id, flags, after in itertools.product(
        ["", " ", "\n"],
        ["00", "01", "ff", "0"],
        ["a" * 32, "0" * 32, "a" * 31, "A" * 32],
        ["b" * 16, "0" * 16, "b" * 17],
        ["01", "00", "03", "ff", "0", "0g"],
        ["", "-x", " ", "\n"],
    )
]
BESIDE: list[list[tuple[str, Any]]] = [
    [],
    [("tracestate", b"a=1")],
    [("tracestate", b"")],
    [("baggage", b"customer=7")],
    [("baggage", b"kafka.pipeline=1700000000000-orders")],
    [("baggage", b"kafka.pipeline=1700000000000-orders,customer=7")],
    [("baggage", b"kafka.pipeline=1700000000000-orders;kept=1")],
    [("baggage", b"kafka.pipeline=1700000000000-two+orders")],
    [("baggage", b"")],
    [("baggage", None)],
    [("own", b"\xff")],
    [("traceparent", None)],
    [STALE],
]


@pytest.mark.parametrize("beside", BESIDE, ids=repr)
def test_what_is_read_is_what_the_default_propagators_find(beside: Any) -> None:
    def told(found: Context) -> Any:
        span = trace.get_current_span(found)
        # A span context is a tuple of all that there is of it.
        return tuple(span.get_span_context()), baggage.get_all(found), len(found)

    for value in (*TRACEPARENTS, b"", b"\xff"):
        headers = [("traceparent", value), *beside]
        expected = propagate.extract(dict(headers), Context(), getter=_GETTER)
        found, created = extract(headers)
        assert told(found) == told(expected), headers
        assert created == creation_context(headers), headers
        in_it = trace.get_current_span(expected).get_span_context()
        assert created == (in_it if in_it.is_valid else None), headers


ENTRIES: list[dict[str, Any]] = [
    {},
    {"customer": "7"},
    {"kafka.pipeline": "1700000000000-orders"},
    {"kafka.pipeline": "1700000000000-two orders"},
    {"kafka.pipeline": 1700000000000},
    {"kafka.pipeline": "1700000000000-orders", "customer": "7"},
]


def test_what_is_written_is_what_the_default_propagators_write() -> None:
    own = [("own", b"1"), ("traceparent", b"2"), ("baggage", b"3")]
    for trace_id, span_id, flags, state, entries in itertools.product(
        [0, 1, 2**128 - 1],
        [0, 1, 2**64 - 1],
        [0, 1, 3, 255],
        [[], [("a", "1")]],
        ENTRIES,
    ):
        span = trace.NonRecordingSpan(
            trace.SpanContext(
                trace_id,
                span_id,
                is_remote=False,
                trace_flags=trace.TraceFlags(flags),
                trace_state=trace.TraceState(state),
            )
        )
        around = Context()
        for name, value in entries.items():
            around = baggage.set_baggage(name, value, around)
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span, around))
        written = [(name, value.encode()) for name, value in carrier.items()]
        assert inject(None, around, span) == (written or None)
        # Where nothing is written, what the application has is left.
        expected = [("own", b"1"), *written] if written else own
        assert inject(own, around, span) == expected


# What the propagators of Java write, each for the same span.
SPAN_ID = "b7ad6b7169203331"
XRAY = f"Root=1-{TRACE_ID[:8]}-{TRACE_ID[8:]};Parent={SPAN_ID};Sampled=1".encode()
OF_JAVA = {
    "tracecontext": [STALE],
    "b3multi": [
        ("X-B3-TraceId", TRACE_ID.encode()),
        ("X-B3-SpanId", SPAN_ID.encode()),
        ("X-B3-Sampled", b"1"),
    ],
    "b3": [("b3", f"{TRACE_ID}-{SPAN_ID}-1".encode())],
    "jaeger": [("uber-trace-id", f"{TRACE_ID}:{SPAN_ID}:0:1".encode())],
    "xray": [("X-Amzn-Trace-Id", XRAY)],
    "ottrace": [
        ("ot-tracer-traceid", TRACE_ID[16:].encode()),
        ("ot-tracer-spanid", SPAN_ID.encode()),
        ("ot-tracer-sampled", b"true"),
    ],
}


@pytest.mark.parametrize("case", [str, str.lower, str.upper, str.title])
@pytest.mark.parametrize("name", list(OF_JAVA))
def test_names_are_found_and_give_way_whatever_their_case(
    propagator: Any, name: str, case: Callable[[str], str]
) -> None:
    """Through a proxy, or by another language, names come in another case."""
    (found,) = entry_points(group="opentelemetry_propagator", name=name) or [None]
    if found is None:
        pytest.skip("it is not installed")
    made = found.load()
    propagator(made() if isinstance(made, type) else made)
    headers = [(case(key), value) for key, value in OF_JAVA[name]]
    created = creation_context(headers)
    assert created is not None
    assert format_span_id(created.span_id) == SPAN_ID
    assert format_trace_id(created.trace_id)[16:] == TRACE_ID[16:]
    current = trace.NonRecordingSpan(
        trace.SpanContext(2**100 + 1, 1, is_remote=False, trace_flags=TraceFlags(1))
    )
    written = inject([("other", b"1"), *headers], EMPTY, current)
    names = [key.lower() for key, _ in written]
    assert len(names) == len(set(names))
    assert names[0] == "other"
    again = creation_context(written)
    assert again is not None
    assert again.span_id == 1


def test_the_exact_name_comes_first(propagator: Any) -> None:
    propagator(B3MultiFormat())
    headers = [
        *[("x-b3-traceid", TRACE_ID.encode()), ("x-b3-spanid", SPAN_ID.encode())],
        *[("X-B3-TraceId", b"1" * 32), ("X-B3-SpanId", b"1" * 16)],
    ]
    created = creation_context(headers)
    assert created is not None
    assert format_span_id(created.span_id) == SPAN_ID


def test_of_a_name_in_several_cases_an_empty_value_does_not_count() -> None:
    assert creation_context([("TraceParent", STALE[1]), ("TRACEPARENT", b"")])


def test_a_name_that_is_no_text_hides_no_context(log: Log) -> None:
    assert creation_context([(None, b"1"), ("TraceParent", STALE[1])])


class _Tenant(CompositePropagator):
    """The default propagators, and a field of the application's own."""

    def inject(self, carrier: Any, *args: Any, **kwargs: Any) -> None:
        super().inject(carrier, *args, **kwargs)
        carrier["tenant"] = "blue"


@pytest.mark.parametrize(
    "made",
    [
        _Tenant([TraceContextTextMapPropagator(), W3CBaggagePropagator()]),
        CompositePropagator([TraceContextTextMapPropagator(), B3SingleFormat()]),
        CompositePropagator([B3MultiFormat()]),
    ],
    ids=["its own", "two", "one"],
)
def test_other_propagators_together_are_used_as_they_are(
    propagator: Any, made: Any
) -> None:
    propagator(made)
    span = trace.NonRecordingSpan(trace.SpanContext(2**100, 1, is_remote=False))
    carrier: dict[str, str] = {}
    made.inject(carrier, trace.set_span_in_context(span, EMPTY))
    written = [(name, value.encode()) for name, value in carrier.items()]
    assert inject(None, EMPTY, span) == written


ONE = trace.SpanContext(1, 1, is_remote=False)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (ONE, trace.SpanContext(1, 1, is_remote=True), True),
        (ONE, trace.SpanContext(1, 2, is_remote=False), False),
        (ONE, trace.SpanContext(2, 1, is_remote=False), False),
        (None, ONE, False),
        (ONE, None, False),
        (None, None, False),
    ],
)
def test_spans_are_the_same_if_trace_and_span_are(
    one: Any, other: Any, same: bool
) -> None:
    assert same_span(one, other) is same
