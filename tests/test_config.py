"""Reading the settings; no broker is needed."""

from __future__ import annotations

from typing import Any

import pytest

from otel_kafka_python import KafkaPythonInstrumentor, _config
from otel_kafka_python._config import Config, load
from recorder import Log

BOOLEANS = [
    "propagation",
    "send_spans",
    "receive_spans",
    "process_spans",
    "capture_message_key",
]


def test_nothing_has_to_be_set() -> None:
    assert load({}, {}) == Config()


@pytest.mark.parametrize("name", BOOLEANS)
def test_a_boolean_is_read_from_its_variable_and_its_keyword_wins(name: str) -> None:
    variable = f"OTEL_PYTHON_KAFKA_{name.upper()}"
    assert getattr(load({}, {}), name) is True
    assert getattr(load({}, {variable: " False "}), name) is False
    assert getattr(load({name: True}, {variable: "false"}), name) is True
    assert getattr(load({name: False}, {variable: "true"}), name) is False
    assert getattr(load({name: None}, {variable: "false"}), name) is False
    assert getattr(load({}, {variable: " "}), name) is True


@pytest.mark.parametrize("given", [" a , b*,", ["a", "b*"], ("a", "b*")])
def test_excluded_topics_are_globs(given: Any) -> None:
    config = load({"excluded_topics": given}, {})
    assert config.excluded_topics == ("a", "b*")
    assert [config.excludes(topic) for topic in ("a", "ab", "b", "bc", "A")] == [
        True,
        False,
        True,
        True,
        False,
    ]


def test_the_parent_of_process_spans_is_one_of_two(log: Log) -> None:
    variable = "OTEL_PYTHON_KAFKA_PROCESS_PARENT"
    assert load({}, {variable: "None"}).process_parent == "none"
    assert load({"process_parent": "message"}, {variable: "none"}) == Config()
    assert load({"process_parent": "ambient"}, {}) == Config()
    assert log.take() == [
        "the keyword process_parent is 'ambient', but should be message or none; "
        "the default, message, is used instead"
    ]


def test_excluded_topics_have_a_variable() -> None:
    config = load({}, {"OTEL_PYTHON_KAFKA_EXCLUDED_TOPICS": "a,b*"})
    assert config.excluded_topics == ("a", "b*")


@pytest.mark.parametrize(
    ("keywords", "environ", "warning"),
    [
        (
            {},
            {"OTEL_PYTHON_KAFKA_SEND_SPANS": "maybe"},
            "OTEL_PYTHON_KAFKA_SEND_SPANS is 'maybe', but should be true or false; "
            "the default, True, is used instead",
        ),
        (
            {"send_spans": 3},
            {},
            "the keyword send_spans is 3, but should be true or false; "
            "the default, True, is used instead",
        ),
        (
            {"excluded_topics": [1]},
            {},
            "the keyword excluded_topics is [1], but should be globs: comma-separated, "
            "or a list of str; the default, none, is used instead",
        ),
        (
            {"produce_hook": "print"},
            {},
            "the keyword produce_hook is 'print', but should be a callable; "
            "the default, none, is used instead",
        ),
        (
            {"recieve_spans": False},
            {},
            "instrument() has no keyword recieve_spans; it is ignored",
        ),
    ],
)
def test_a_malformed_value_is_one_warning_and_the_default_stands(
    log: Log, keywords: Any, environ: Any, warning: str
) -> None:
    assert load(keywords, environ) == Config()
    assert log.take() == [warning]


def test_hooks_have_no_variable() -> None:
    assert load({}, {"OTEL_PYTHON_KAFKA_PRODUCE_HOOK": "print"}) == Config()


@pytest.mark.parametrize(("value", "limit"), [("7", 7), ("", 128), ("many", 128)])
def test_the_limit_of_links_is_the_sdks(value: str, limit: int) -> None:
    assert load({}, {"OTEL_SPAN_LINK_COUNT_LIMIT": value}).link_limit == limit


def test_every_setting_is_a_keyword_of_instrument() -> None:
    documented = KafkaPythonInstrumentor.instrument.__kwdefaults__
    assert documented is not None
    providers = {"tracer_provider", "meter_provider", "logger_provider"}
    assert set(documented) - providers == set(_config._PARSERS)
    assert KafkaPythonInstrumentor.instrument.__doc__ is not None
    for name in documented:
        assert f"{name}:" in KafkaPythonInstrumentor.instrument.__doc__
