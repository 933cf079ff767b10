"""The client's I/O as a task of asyncio, which kafka-python has from 3.1 on.

It chooses that by itself inside a running event loop, and runs it in a loop of its own:
what is called blocks as ever. Each task of that loop keeps a copy of the context that
is current where it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from kafka import KafkaProducer
from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan

from clients import DEADLINE, VERSION, Clients, committable
from conftest import Instrument
from deliveries import until_all_have_ended
from recorder import Recorder

pytestmark = pytest.mark.skipif(
    VERSION < (3, 1), reason="kafka-python has asyncio from 3.1 on"
)


@pytest.fixture
def clients(broker: Any, topic: str) -> Iterator[Clients]:
    made = Clients(broker.address, topic, net="asyncio")
    yield made
    made.close()


def id_of(span: Any) -> int:
    return span.get_span_context().span_id  # type: ignore[no-any-return]  # any span


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent and span.parent.span_id


def test_inside_an_event_loop_asyncio_is_chosen(broker: Any) -> None:
    async def main() -> str:
        with KafkaProducer(bootstrap_servers=broker.address) as producer:
            return type(producer._net).__name__

    assert asyncio.run(main()) == "AsyncioBackend"


def test_tasks_that_send_have_each_their_own_trace(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    current: list[Any] = []

    async def order(number: int) -> None:
        with recorder.tracer.start_as_current_span(f"order {number}") as span:
            future = producer.send(topic, b"%d" % number)
            future.add_callback(lambda _: current.append(trace.get_current_span()))
            await asyncio.sleep(0)
            assert trace.get_current_span() is span
            await asyncio.to_thread(future.get, DEADLINE)

    async def main() -> None:
        await asyncio.gather(*map(order, range(3)))
        assert trace.get_current_span() is trace.INVALID_SPAN

    asyncio.run(main())
    until_all_have_ended(recorder)
    sends = recorder.named(f"send {topic}")
    orders = [recorder.one(f"order {number}") for number in range(3)]
    assert set(map(parent_of, sends)) == set(map(id_of, orders))
    assert set(map(id_of, current)) == set(map(id_of, orders))
    assert all("messaging.kafka.offset" in (send.attributes or {}) for send in sends)


def test_records_and_commits_are_traced_and_no_context_stays(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2", b"3")
    consumer = clients.consumer(group_id=topic)

    async def main() -> None:
        for number, record in enumerate(consumer):
            with recorder.tracer.start_as_current_span("ship"):
                await asyncio.sleep(0)
            if number == 0:
                consumer.commit(committable(topic, record.offset + 1))
            elif number == 1:
                await asyncio.to_thread(next, consumer)
                break
        assert trace.get_current_span() is trace.INVALID_SPAN

    asyncio.run(main())
    assert context.get_current() == {}
    sends = recorder.named(f"send {topic}")
    processes = recorder.named(f"process {topic}")
    assert list(map(parent_of, processes)) == list(map(id_of, sends[:2]))
    ships = recorder.named("ship")
    assert list(map(parent_of, ships)) == list(map(id_of, processes))
    commit = recorder.one(f"commit {topic}")
    assert parent_of(commit) == id_of(processes[0])
    assert parent_of(recorder.one(f"poll {topic}")) == id_of(processes[1])
    assert recorder.open() == []


def test_an_asynchronous_and_an_automatic_commit(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="all")
    clients.send(b"1", b"2")
    consumer = clients.consumer(
        group_id=topic, enable_auto_commit=True, auto_commit_interval_ms=3600_000
    )

    async def main() -> None:
        for number, record in enumerate(consumer):
            if number == 0:
                consumer.commit_async(committable(topic, record.offset + 1))
            else:
                break
        await asyncio.to_thread(consumer.close)

    asyncio.run(main())
    until_all_have_ended(recorder)
    first, _ = recorder.named(f"process {topic}")
    asked, automatic = recorder.named(f"commit {topic}")
    assert parent_of(asked) == id_of(first)
    assert parent_of(automatic) is None


def test_a_transaction(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    async def main() -> None:
        producer = clients.producer(transactional_id=topic)
        producer.init_transactions()
        with recorder.tracer.start_as_current_span("work"):
            producer.begin_transaction()
            producer.send(topic, b"value")
            producer.send_offsets_to_transaction(committable(topic, 3), "group")
            await asyncio.to_thread(producer.commit_transaction)

    asyncio.run(main())
    until_all_have_ended(recorder)
    work = id_of(recorder.one("work"))
    for name in (
        f"send {topic}",
        f"send_offsets_to_transaction {topic}",
        "commit_transaction",
    ):
        assert parent_of(recorder.one(name)) == work
