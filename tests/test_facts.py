"""Pure facts: attributes, names, addresses, errors; no broker is needed."""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from typing import Any
from uuid import UUID

import kafka.errors
import pytest

from clients import IS_NG
from conformance import OWN_NAMES
from otel_kafka_python import _kafka, _semconv
from otel_kafka_python._attributes import (
    add_message,
    legal_topic,
    message_key,
    span_name,
)
from otel_kafka_python._kafka import Server, first_bootstrap_server

CONVENTION = json.loads(
    (Path(__file__).parent / "messaging-kafka-1.44.0.json").read_text()
)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("key", "key"),
        ("", ""),
        ("two\nlines", None),
        (0, "0"),
        (-7, "-7"),
        (b"key", "key"),
        ("schlüssel".encode(), "schlüssel"),
        (b"", ""),
        (b"\x00\x01", None),
        (b"\xff", None),
        (b"two\nlines", None),
        ("\ud800", None),
        (None, None),
        (True, None),
        (1.5, "1.5"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (("a", 1), None),
        (bytearray(b"key"), "key"),
        (bytearray(b"two\nlines"), None),
        (bytearray(b"\xff"), None),
    ],
)
def test_a_key_is_recorded_only_where_it_has_one_text_form(
    key: object, text: str | None
) -> None:
    assert message_key(key) == text


class _Text(str):
    """A str of an application's own, which says something else of itself."""

    __slots__ = ()

    def __str__(self) -> str:
        return "text"


def test_what_is_a_str_to_kafka_python_is_a_plain_one() -> None:
    for text in (legal_topic(_Text("orders")), message_key(_Text("orders"))):
        assert type(text) is str
        assert text == "orders"
    assert message_key(IntEnum("Color", ["RED"]).RED) == "1"  # type: ignore[attr-defined]


def test_zero_and_empty_are_values_and_not_absence() -> None:
    assert add_message({}, 0, "") == {
        "messaging.kafka.offset": 0,
        "messaging.kafka.message.key": "",
    }


def test_an_unknown_offset_is_none() -> None:
    assert add_message({}, -1) == {}


@pytest.mark.parametrize(
    "topic", ["", "a b", "a/b", "a" * 250, "ä", "a\n", None, b"a", 1]
)
def test_an_illegal_topic_is_no_name(topic: object) -> None:
    assert legal_topic(topic) is None
    assert span_name("send", None) == "send"


@pytest.mark.parametrize("topic", ["a", "A.b_c-1", "a" * 249])
def test_a_legal_topic_is_a_name(topic: str) -> None:
    assert legal_topic(topic) == topic
    assert span_name("send", topic) == f"send {topic}"


@pytest.mark.parametrize(
    ("servers", "first"),
    [
        ("kafka:9093", Server("kafka", 9093)),
        ("kafka", Server("kafka", 9092)),
        (" one:1 , two:2", Server("one", 1)),
        (["one:1", "two:2"], Server("one", 1)),
        ({"one:1"}, Server("one", 1)),
        ("SSL://kafka:9093", Server("kafka", 9093)),
        (["SASL_SSL://[::1]:9093"], Server("::1", 9093)),
        ("[::1]", Server("::1", 9092)),
        ("fe80::1", Server("fe80::1", 9092)),
        ([], None),
        (None, None),
    ],
)
def test_the_first_bootstrap_server(servers: Any, first: Server | None) -> None:
    assert first_bootstrap_server(servers) == first


@pytest.mark.parametrize(
    ("address", "is_ip"), [("127.0.0.1", True), ("::1", True), ("localhost", False)]
)
def test_only_ip_literals_are_peers(address: str, is_ip: bool) -> None:
    assert Server(address, 1).is_ip is is_ip


# Of the Kafka protocol, by the number of the error.
KAFKA_NAMES = {
    -1: "UNKNOWN_SERVER_ERROR",
    3: "UNKNOWN_TOPIC_OR_PARTITION",
    5: "LEADER_NOT_AVAILABLE",
    6: "NOT_LEADER_OR_FOLLOWER",
    7: "REQUEST_TIMED_OUT",
    10: "MESSAGE_TOO_LARGE",
    13: "NETWORK_EXCEPTION",
    14: "COORDINATOR_LOAD_IN_PROGRESS",
    15: "COORDINATOR_NOT_AVAILABLE",
    16: "NOT_COORDINATOR",
    17: "INVALID_TOPIC_EXCEPTION",
    19: "NOT_ENOUGH_REPLICAS",
    22: "ILLEGAL_GENERATION",
    25: "UNKNOWN_MEMBER_ID",
    27: "REBALANCE_IN_PROGRESS",
    29: "TOPIC_AUTHORIZATION_FAILED",
    39: "INVALID_REPLICA_ASSIGNMENT",
}


def test_an_error_type_is_kafkas_name() -> None:
    assert {
        number: _kafka.error_type(kafka.errors.for_code(number)())
        for number in KAFKA_NAMES
    } == KAFKA_NAMES


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (kafka.errors.KafkaTimeoutError(), "KafkaTimeoutError"),
        (kafka.errors.BrokerResponseError(), "BrokerResponseError"),
        pytest.param(
            kafka.errors.for_code(9999)(),
            "UnrecognizedBrokerError",
            marks=pytest.mark.skipif(
                IS_NG, reason="to -ng, it is Kafka's unknown error"
            ),
        ),
        (OSError(5, "with a number of its own"), "OSError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_an_error_that_kafka_has_no_name_for_is_its_class(
    error: BaseException, name: str
) -> None:
    assert _kafka.error_type(error) == name


def test_every_name_is_one_of_the_convention() -> None:
    known = {
        name
        for thing in (*CONVENTION["spans"].values(), *CONVENTION["metrics"].values())
        for name in thing["attributes"]
    }
    for event in CONVENTION["exception_events"]["events"].values():
        known |= set(event["attributes"])
    metrics = {metric["metric"] for metric in CONVENTION["metrics"].values()}
    ours = {
        value
        for name, value in vars(_semconv).items()
        if name.isupper() and isinstance(value, str)
    }
    assert ours - known - metrics == {
        _semconv.SCHEMA_URL,
        _semconv.OUTCOME_UNKNOWN,
        _semconv.ERROR_OTHER,
        _semconv.MESSAGING_HEADER_PREFIX,
        _semconv.KAFKA_PIPELINE,
        *OWN_NAMES,
    }
    assert CONVENTION["schema_url"] == _semconv.SCHEMA_URL
    for metric in CONVENTION["metrics"].values():
        boundaries = metric.get("bucket_boundaries")
        assert boundaries is None or tuple(boundaries) == _semconv.DURATION_BUCKETS
