"""Work that a loop hands to threads, with opentelemetry-instrumentation-threading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread, Timer
from typing import Any

import pytest
from opentelemetry.instrumentation.threading import ThreadingInstrumentor
from opentelemetry.sdk.trace import ReadableSpan

from clients import DEADLINE, Clients
from recorder import Recorder

pytestmark = [pytest.mark.one_broker, pytest.mark.one_client]

Work = Callable[[Any], None]


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.trace_id)


@pytest.fixture
def carried() -> Iterator[None]:
    """Have threads carry the context, as the launcher does."""
    instrumentor = ThreadingInstrumentor()
    instrumentor.instrument()
    yield
    instrumentor.uninstrument()


def to_pool(work: Work, records: Any) -> None:
    futures: list[Future[None]] = []
    with ThreadPoolExecutor(2) as pool:
        for record in records:
            futures.append(pool.submit(work, record))
    for future in futures:
        future.result(DEADLINE)


def to_threads(work: Work, records: Any) -> None:
    threads = []
    for record in records:
        threads.append(Thread(target=work, args=(record,)))
        threads[-1].start()
    for thread in threads:
        thread.join(DEADLINE)


def to_timers(work: Work, records: Any) -> None:
    timers = []
    for record in records:
        timers.append(Timer(0.01, work, (record,)))
        timers[-1].start()
    for timer in timers:
        timer.join(DEADLINE)


@pytest.mark.parametrize("hand_over", [to_pool, to_threads, to_timers])
def test_work_in_a_thread_is_in_its_messages_trace(
    carried: None,
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    hand_over: Callable[[Work, Any], None],
) -> None:
    clients.send(b"0", b"1", b"2")
    producer, shipped = clients.producer(), f"{topic}-shipped"

    def work(record: Any) -> None:
        with recorder.tracer.start_as_current_span(record.value.decode()):
            producer.send(shipped, record.value)
        producer.send(shipped, record.value)

    hand_over(work, clients.finite(3))
    producer.flush()
    processed = {trace_of(span): span for span in recorder.named(f"process {topic}")}
    assert {trace_of(span) for span in recorder.named(f"send {topic}")} == {*processed}
    assert len(processed) == 3
    for number in range(3):
        span = recorder.one(str(number))
        assert span.parent == processed[trace_of(span)].context
    # One in the work's own span, and one in none but the message's.
    sent = sorted(trace_of(span) for span in recorder.named(f"send {shipped}"))
    assert sent == sorted([*processed, *processed])
