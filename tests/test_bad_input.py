"""Brokers that are not there, calls that make no sense: as without the package."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from embedded_broker import EmbeddedBroker
from kafka import KafkaConsumer, KafkaProducer
from opentelemetry.instrumentation.utils import suppress_instrumentation

from apache_broker import free_ports
from clients import DEADLINE, VERSION, Clients, poll
from conftest import Instrument
from otel_kafka_python import _kafka, process_span
from recorder import Log, Recorder, attributes_of


@pytest.mark.parametrize("client", [KafkaProducer, KafkaConsumer])
def test_a_broker_that_is_not_there_is_said_by_kafka_python(
    instrument: Instrument, recorder: Recorder, client: Any
) -> None:
    (port,) = free_ports(1)
    config = {
        "bootstrap_servers": f"127.0.0.1:{port}",
        # So long kafka-python looks for it, in one version or the other.
        **({"bootstrap_timeout_ms": 500} if VERSION >= (3, 0) else {}),
        **({"api_version_auto_timeout_ms": 500} if VERSION < (3, 0) else {}),
    }
    known = {key: value for key, value in config.items() if key in DEFAULTS[client]}
    with pytest.raises(Exception) as before:
        client(**known)
    instrument()
    with pytest.raises(before.type):
        client(**known)
    assert recorder.started == []


DEFAULTS: dict[Any, Any] = {
    client: {"bootstrap_servers", *client.DEFAULT_CONFIG}
    for client in (KafkaProducer, KafkaConsumer)
}


def test_a_broker_that_goes_away_under_a_consumer_is_no_error_of_ours(
    instrumented: None, recorder: Recorder, topic: str
) -> None:
    with EmbeddedBroker() as broker:
        clients = Clients(broker.address, topic)
        clients.send(b"1")
        consumer = clients.consumer()
        poll(consumer)
        broker.kill()
        assert consumer.poll(timeout_ms=500) == {}
        clients.close()
    assert recorder.names() == [f"poll {topic}", f"send {topic}"]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        (("topic", b"value", None, None, None, None, "too many"), {}),
        (("topic", b"value"), {"topic": "twice"}),
        (("topic", b"value"), {"unknown": 1}),
        ((None, b"value"), {}),
        ((1, b"value"), {}),
        ((["topic"], b"value"), {}),
        (("topic",), {"value": ...}),
        (("topic", b"value"), {"partition": "one"}),
        (("topic", b"value"), {"partition": [1]}),
        (("topic", b"value"), {"headers": [("traceparent", b""), "no header"]}),
        (("topic", b"value"), {"headers": [("traceparent", "text")]}),
        (("topic", b"value"), {"headers": [("traceparent", b"1", b"2")]}),
        (("topic", b"value"), {"headers": (("shop", b"1"),)}),
        (("topic", b"value"), {"headers": {"shop": b"1"}}),
        (("topic", b"value"), {"headers": [["shop", b"1"]]}),
        (("topic", b"value"), {"headers": [("shop", b"1"), (b"shop", b"1")]}),
        (("topic", b"value"), {"headers": [("shop", b"1"), ("shop", None)]}),
        (("topic", b"value"), {"headers": [(1, b"1")]}),
    ],
    ids=repr,
)
def test_a_call_that_makes_no_sense_fails_as_it_does_without(
    instrument: Instrument, clients: Clients, recorder: Recorder, args: Any, kwargs: Any
) -> None:
    producer = clients.producer()
    producer.send("topic", b"value").get(DEADLINE)
    # For topics that cannot be; of that one it knows now.
    producer.config["max_block_ms"] = 300

    def outcome() -> str:
        try:
            return repr(type(producer.send(*args, **kwargs).get(DEADLINE)))
        except Exception as error:
            return f"{type(error)}: {error}".split(" at 0x")[0]

    before, given = outcome(), repr((args, kwargs))
    instrument()
    assert outcome() == before
    assert repr((args, kwargs)) == given
    producer.flush()
    assert recorder.open() == []


def test_a_client_without_a_configuration_is_traced_with_what_there_is(
    instrument: Instrument, recorder: Recorder, topic: str
) -> None:
    """As tests of applications have it, which replace the constructor."""

    class Fake(KafkaProducer):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self._closed = True

        def __del__(self) -> None:
            pass

    instrument()
    with pytest.raises(Exception):  # noqa: B017 (whatever it is)
        Fake().send(topic, b"value")
    assert recorder.names() == [f"send {topic}"]


def test_a_client_that_cannot_be_read_is_traced_without_headers(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(client: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(_kafka, "sends_headers", fail)
    instrument()
    clients.send(b"value")
    with suppress_instrumentation():
        assert next(clients.consumer()).headers == []
    recorder.one(f"send {topic}")
    (message,) = log.take()
    assert message.startswith("Failed to read the configuration of a client")


@pytest.mark.parametrize("timestamp", [0, -1])
@pytest.mark.parametrize("way", ["record", "batch"])
def test_a_record_that_a_test_made_up_is_processed(
    instrument: Instrument, recorder: Recorder, way: str, timestamp: int
) -> None:
    instrument(capture_queue_time=True, capture_message_size=True, capture_headers="*")
    made_up: Any = SimpleNamespace(
        topic="topic",
        partition=0,
        offset=3,
        timestamp=timestamp,
        key=b"k",
        value=b"",
        headers=[],
    )
    with process_span(made_up if way == "record" else [made_up, made_up]):
        pass
    (attributes,) = attributes_of([recorder.one("process topic")])
    assert attributes["messaging.kafka.message.key"] == "k"
    has_time = "kafka.record.queue_time_ms" in attributes
    assert has_time == (way == "record" and timestamp == 0)


class Silent(KafkaProducer):  # type: ignore[misc]  # untyped
    def __del__(self) -> None:
        """Do not close what was never opened."""


def test_a_client_whose_init_never_ran_fails_as_it_does_without(
    instrument: Instrument, recorder: Recorder
) -> None:
    consumer = KafkaConsumer.__new__(KafkaConsumer)
    producer = Silent.__new__(Silent)
    uses: tuple[Callable[[], object], ...] = (
        lambda: consumer.poll(0),
        lambda: next(consumer),
        lambda: next(iter(consumer)),
        consumer.commit,
        consumer.close,
        lambda: producer.send("topic", b"value"),
    )

    def errors() -> list[str]:
        raised = []
        for use in uses:
            with pytest.raises(Exception) as error:
                use()
            raised.append(repr(error.value))
        return raised

    plain = errors()
    instrument()
    assert errors() == plain
