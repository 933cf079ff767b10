"""What is current for a listener that a consumer tells of a rebalance."""

from __future__ import annotations

import time
from typing import Any

import pytest
from kafka import ConsumerRebalanceListener
from opentelemetry import trace

from clients import DEADLINE, VERSION, Clients
from recorder import Recorder


class Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # untyped
    """Remembers the span that is current in each call."""

    def __init__(self) -> None:
        self.current: list[Any] = []

    def on_partitions_assigned(self, assigned: Any) -> None:
        self.current.append(trace.get_current_span())

    def on_partitions_revoked(self, revoked: Any) -> None:
        self.current.append(trace.get_current_span())


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param(
            {"net": "asyncio"},
            marks=pytest.mark.skipif(VERSION < (3, 1), reason="new in 3.1"),
        ),
    ],
    ids=["default", "asyncio"],
)
def test_a_listener_has_what_is_current_for_its_thread_or_task_and_no_process_span(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    config: dict[str, Any],
) -> None:
    clients.send(b"value")
    listener = Listener()
    consumer = clients.consumer(group_id=topic, consumer_timeout_ms=200, **config)
    consumer.unsubscribe()
    consumer.subscribe([topic], listener=listener)
    deadline = time.monotonic() + DEADLINE
    with recorder.tracer.start_as_current_span("work") as work:
        while len(listener.current) < 3:
            assert time.monotonic() < deadline
            consumer._coordinator.request_rejoin()
            for _ in consumer:
                pass
    # kafka-python 3 calls it on a thread of its own, kafka-python 2 on the caller's.
    on_own_thread = VERSION >= (3, 0) and not config
    expected = trace.INVALID_SPAN if on_own_thread else work
    assert listener.current == [expected] * len(listener.current)
