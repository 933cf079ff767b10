"""Threads that begin with the context of the one that starts them.

That is an option of Python 3.14, and what free-threaded builds do without being asked.
A client's own thread then has what was current when the client was made.
"""

from __future__ import annotations

import sys

import pytest

from clients import VERSION, Clients
from scripts import run_recorded

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 14), reason="threads inherit no context before 3.14"
)

INHERIT = {"PYTHON_THREAD_INHERIT_CONTEXT": "1"}


def test_a_send_in_a_pools_worker_is_no_child_of_the_process_span_it_began_in(
    clients: Clients, topic: str
) -> None:
    clients.send(b"value")
    told = run_recorded(
        """
        from concurrent.futures import ThreadPoolExecutor
        from opentelemetry import context
        assert sys.flags.thread_inherit_context
        address, topic = sys.argv[1:]
        producer = KafkaProducer(bootstrap_servers=address)
        consumer = KafkaConsumer(
            topic, bootstrap_servers=address, auto_offset_reset="earliest"
        )
        pool = ThreadPoolExecutor(1)
        def send():
            producer.send(topic, b"more").get(30)
        for record in consumer:
            pool.submit(send).result()
            break
        assert pool.submit(context.get_current).result()  # the worker has kept it
        pool.submit(send).result()
        consumer.close()
        producer.close()
        (process,) = recorder.named(f"process {topic}")
        within, later = recorder.named(f"send {topic}")
        assert within.parent.span_id == process.context.span_id
        assert later.parent is None, later.parent
        """,
        clients.address,
        topic,
        environ=INHERIT,
    )
    assert told["logged"] == []


def test_what_has_no_span_is_measured_without_that_in_which_its_client_was_made(
    clients: Clients, topic: str
) -> None:
    told = run_recorded(
        """
        assert sys.flags.thread_inherit_context
        address, topic = sys.argv[1:]
        with recorder.tracer.start_as_current_span("start-up"):
            producer = KafkaProducer(bootstrap_servers=address)
            producer.send(topic, b"first").get(30)
        producer.send(topic, b"second").get(30)
        producer.close()
        (point,) = recorder.points("messaging.client.operation.duration")
        assert point.count == 2
        assert not point.exemplars, point.exemplars
        """,
        clients.address,
        topic,
        environ={**INHERIT, "OTEL_PYTHON_KAFKA_SEND_SPANS": "false"},
    )
    assert told["logged"] == []


@pytest.mark.skipif(VERSION < (3, 0), reason="all is on the application's thread")
def test_an_auto_commit_before_a_rebalance_is_in_no_span_of_its_clients_start(
    clients: Clients, topic: str
) -> None:
    clients.send(b"value")
    told = run_recorded(
        """
        from clients import DEADLINE
        import time
        assert sys.flags.thread_inherit_context
        address, topic = sys.argv[1:]
        with recorder.tracer.start_as_current_span("start-up"):
            consumer = KafkaConsumer(
                topic, bootstrap_servers=address, group_id=topic,
                auto_offset_reset="earliest", auto_commit_interval_ms=3600_000,
            )
        for record in consumer:
            break
        consumer._coordinator.request_rejoin()
        deadline = time.monotonic() + DEADLINE
        while not recorder.named(f"commit {topic}"):
            assert time.monotonic() < deadline
            consumer.poll(timeout_ms=100)
        (commit,) = recorder.named(f"commit {topic}")
        assert commit.parent is None, commit.parent
        consumer.close()
        """,
        clients.address,
        topic,
        environ={**INHERIT, "OTEL_PYTHON_KAFKA_COMMIT_SPANS": "all"},
    )
    assert told["logged"] == []
