"""Services that consume, transform and produce stay in the trace of their messages."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry import baggage, context

from clients import Clients, poll
from recorder import Recorder
from scripts import run

STEPS = 3


def transform_in_loop(clients: Clients, topics: tuple[str, str], forward: bool) -> None:
    producer = clients.producer()
    consumer = clients.consumer(topics[0], group_id=f"group-{topics[0]}")
    for record in consumer:
        headers = record.headers if forward else None
        producer.send(topics[1], record.value, headers=headers)
        producer.flush()
        consumer.commit()
        break


def transform_polled(clients: Clients, topics: tuple[str, str], forward: bool) -> None:
    producer = clients.producer()
    consumer = clients.consumer(topics[0], group_id=f"group-{topics[0]}")
    for records in poll(consumer).values():
        for record in records:
            headers = record.headers if forward else None
            producer.send(topics[1], record.value, headers=headers)
    producer.flush()
    consumer.commit()


@pytest.mark.parametrize("forward", [False, True], ids=["new headers", "forwarded"])
@pytest.mark.parametrize("transform", [transform_in_loop, transform_polled])
def test_three_services_in_a_row_are_one_trace_and_none_is_skipped(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    transform: Any,
    forward: bool,
) -> None:
    clients.send(b"value")
    for step in range(STEPS):
        source = topic if step == 0 else f"{topic}-{step}"
        transform(clients, (source, f"{topic}-{step + 1}"), forward)
    for _ in clients.consumer(f"{topic}-{STEPS}"):
        break

    chain = [
        span
        for span in sorted(recorder.ended, key=lambda span: span.start_time or 0)
        if span.name.startswith(("send", "process"))
    ]
    assert [span.name.replace(topic, "") for span in chain] == [
        "send ", "process ",
        "send -1", "process -1",
        "send -2", "process -2",
        "send -3", "process -3",
    ]  # fmt: skip
    parents = [span.parent and span.parent.span_id for span in chain]
    assert parents == [
        None,
        *(span.context.span_id for span in chain[:-1] if span.context),
    ]
    assert len({span.context.trace_id for span in chain if span.context}) == 1


SERVICE = """
    import sys
    from kafka import KafkaConsumer, KafkaProducer
    from opentelemetry import baggage
    address, source, target = sys.argv[1:]
    producer = KafkaProducer(bootstrap_servers=address)
    consumer = KafkaConsumer(
        source, bootstrap_servers=address, group_id=source,
        auto_offset_reset="earliest", enable_auto_commit=False,
    )
    for record in consumer:
        print(baggage.get_all())
        producer.send(target, record.value)
        producer.flush()
        consumer.commit()
        break
    producer.close()
    consumer.close()
"""


@pytest.mark.one_client
def test_services_in_processes_of_their_own_are_one_trace_and_see_its_baggage(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    try:
        with recorder.tracer.start_as_current_span("request"):
            clients.send(b"value")
    finally:
        context.detach(token)
    for step in range(STEPS):
        source = topic if step == 0 else f"{topic}-{step}"
        done = run(
            SERVICE,
            clients.address,
            source,
            f"{topic}-{step + 1}",
            launched=True,
            environ={
                "OTEL_TRACES_EXPORTER": "none",
                "OTEL_METRICS_EXPORTER": "none",
                "OTEL_LOGS_EXPORTER": "none",
                "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
            },
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "{'tenant': 'blue'}\n"
    received = next(clients.consumer(f"{topic}-{STEPS}"))
    carried, (name, traceparent) = sorted(received.headers)
    assert carried == ("baggage", b"tenant=blue")
    assert name == "traceparent"
    request = recorder.one("request").context
    assert request is not None
    assert traceparent.decode().split("-")[1] == f"{request.trace_id:032x}"
