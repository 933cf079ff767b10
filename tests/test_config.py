"""Reading the settings; no broker is needed."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

import pytest
from opentelemetry.instrumentation import dependencies
from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
    BaseInstrumentor,
)

from otel_kafka_python import KafkaPythonInstrumentor, _config, _safety, _span_ends
from otel_kafka_python._config import Config, load
from otel_kafka_python._processing import process_span
from pages import section
from recorder import Log

BOOLEANS = [
    name for name in _config._PARSERS if isinstance(getattr(Config(), name), bool)
]


def test_nothing_has_to_be_set() -> None:
    assert load({}, {}) == Config()


@pytest.mark.parametrize("name", BOOLEANS)
def test_a_boolean_is_read_from_its_variable_and_its_keyword_wins(name: str) -> None:
    variable = f"OTEL_PYTHON_KAFKA_{name.upper()}"
    assert getattr(load({}, {variable: " False "}), name) is False
    assert getattr(load({name: True}, {variable: "false"}), name) is True
    assert getattr(load({name: False}, {variable: "true"}), name) is False
    assert getattr(load({name: None}, {variable: "false"}), name) is False
    assert getattr(load({}, {variable: " "}), name) is getattr(Config(), name)


@pytest.mark.parametrize(
    ("values", "read"),
    [
        (("true", "1", "on", "yes", " Yes "), True),
        (("false", "0", "off", "no", "OFF"), False),
    ],
)
def test_a_boolean_is_said_in_each_usual_way(
    values: tuple[str, ...], read: bool
) -> None:
    for value in values:
        config = load({"propagation": value}, {"OTEL_PYTHON_KAFKA_SEND_SPANS": value})
        assert (config.propagation, config.send_spans) == (read, read)


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
            "the default, true, is used instead",
        ),
        (
            {"send_spans": 3},
            {},
            "the keyword send_spans is 3, but should be true or false; "
            "the default, true, is used instead",
        ),
        (
            {"excluded_topics": [1]},
            {},
            "the keyword excluded_topics is [1], but should be globs: comma-separated, "
            "or a list of str; the default, __consumer_offsets,__transaction_state, "
            "is used instead",
        ),
        (
            {"excluded_topics": 1},
            {},
            "the keyword excluded_topics is 1, but should be globs: comma-separated, "
            "or a list of str; the default, __consumer_offsets,__transaction_state, "
            "is used instead",
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
            "instrument() has no keyword recieve_spans; it is ignored; "
            "did you mean receive_spans?",
        ),
        ({"colour": 1}, {}, "instrument() has no keyword colour; it is ignored"),
        (
            {},
            {"OTEL_PYTHON_KAFKA_SEND_SPAN": "false"},
            "OTEL_PYTHON_KAFKA_SEND_SPAN is not a variable of otel-kafka-python; "
            "it is ignored; did you mean OTEL_PYTHON_KAFKA_SEND_SPANS?",
        ),
        (
            {},
            {"OTEL_PYTHON_KAFKA_COLOUR": "red"},
            "OTEL_PYTHON_KAFKA_COLOUR is not a variable of otel-kafka-python; "
            "it is ignored",
        ),
    ],
)
def test_a_malformed_value_is_one_warning_and_the_default_stands(
    log: Log, keywords: Any, environ: Any, warning: str
) -> None:
    assert load(keywords, environ) == Config()
    assert log.take() == [warning]


def test_hooks_have_no_variable(log: Log) -> None:
    assert load({}, {"OTEL_PYTHON_KAFKA_PRODUCE_HOOK": "print"}) == Config()
    (line,) = log.take()
    assert line.startswith("OTEL_PYTHON_KAFKA_PRODUCE_HOOK is not a variable")


PROVIDERS = ["tracer_provider", "meter_provider", "logger_provider"]
# What every instrumentor takes.
CHECKS = ["skip_dep_check", "raise_exception_on_conflict"]
instrument = KafkaPythonInstrumentor.instrument


def test_the_keywords_of_instrument_are_the_settings_in_their_order() -> None:
    assert list(instrument.__kwdefaults__ or {}) == [
        *PROVIDERS, *_config._PARSERS, *CHECKS
    ]  # fmt: skip


def test_the_settings_are_the_first_fields_of_config_in_their_order() -> None:
    named = [field.name for field in fields(Config)][: len(_config._PARSERS)]
    assert named == list(_config._PARSERS)


def test_the_docstring_has_every_keyword_in_its_order_and_the_defaults() -> None:
    arguments = (inspect.getdoc(instrument) or "").partition("Args:\n")[2]
    described = dict(re.findall(r"(?m)^ {4}(\w+): ((?:.|\n {5,})+)", arguments))
    assert list(described) == list(instrument.__kwdefaults__ or {})
    for name in BOOLEANS:
        default = _config.format_default(getattr(Config(), name))
        assert described[name].endswith(f"Default: {default}."), name


def test_every_keyword_reaches_what_it_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {name: object() for name in [*PROVIDERS, *_config._PARSERS, *CHECKS]}
    taken: dict[str, object] = {}
    monkeypatch.setattr(
        BaseInstrumentor, "instrument", lambda self, **kwargs: taken.update(kwargs)
    )
    KafkaPythonInstrumentor().instrument(**given)  # type: ignore[arg-type]
    assert taken == given


@pytest.mark.parametrize(
    "warning",
    [
        "instruments any of",
        "is not a variable of otel-kafka-python",
        "instrument() has no keyword",
        "of kafka_python, which has no such setting",
        "but should be",
        "process_span() takes a record, a sequence of records, or the dict that poll()",
        "the application is not affected",
        "The end of a span has delayed kafka-python by",
    ],
)
def test_a_warning_is_explained_where_people_look_for_it(warning: str) -> None:
    modules = (_config, _safety, _span_ends, process_span, dependencies)
    source = "".join(inspect.getsource(module) for module in modules)
    joined = re.sub(r'"\s+"', "", source)
    assert warning in joined
    assert warning in section("troubleshooting", "Warnings")
