"""What the SDK's configuration file (`OTEL_CONFIG_FILE`) says of this package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.configuration.instrumentation import configure_instrumentation
from opentelemetry.configuration.models import ExperimentalInstrumentation
from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
    BaseInstrumentor,
)

from otel_kafka_python import KafkaPythonInstrumentor, _config
from otel_kafka_python._instrumentor import begin_launch, take_over
from recorder import Log
from scripts import run

pytestmark = pytest.mark.two_clients

FILE = """
file_format: "1.1"
tracer_provider:
  processors:
    - simple: {{ exporter: {{ console: }} }}
instrumentation/development:
  python:
    kafka_python: {options}
"""
LAUNCHED = """
    from otel_kafka_python import KafkaPythonInstrumentor
    instrumentor = KafkaPythonInstrumentor()
    print(instrumentor.is_instrumented_by_opentelemetry)
    if instrumentor._telemetry is not None:
        print(instrumentor._telemetry.config.process_parent)
"""


@pytest.fixture(autouse=True)
def uninstrumented() -> Iterator[None]:
    yield
    instrumentor = KafkaPythonInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()


def configure(options: dict[str, Any]) -> None:
    """Do what the SDK does of a file that has these options."""
    configure_instrumentation(
        ExperimentalInstrumentation(python={"kafka_python": options})
    )


def configured() -> _config.Config:
    telemetry = KafkaPythonInstrumentor()._telemetry
    assert telemetry is not None
    return telemetry.config


def test_every_setting_but_the_hooks_can_stand_in_the_file() -> None:
    assert [field.name for field in fields(KafkaPythonInstrumentor.configuration)] == [
        name for name in _config._PARSERS if not name.endswith("_hook")
    ]


def test_every_setting_of_the_file_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    options = {
        field.name: object() for field in fields(KafkaPythonInstrumentor.configuration)
    }
    taken: dict[str, object] = {}
    monkeypatch.setattr(
        BaseInstrumentor, "instrument", lambda self, **kwargs: taken.update(kwargs)
    )
    configure(options)
    assert {name: taken[name] for name in options} == options


def test_the_file_wins_over_a_variable_and_leaves_others_to_theirs(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setenv("OTEL_PYTHON_KAFKA_SEND_SPANS", "false")
    monkeypatch.setenv("OTEL_PYTHON_KAFKA_RECEIVE_SPANS", "false")
    configure(
        {
            "send_spans": True,
            "process_spans": None,
            "process_parent": "none",
            "excluded_topics": ["a", "b*"],
        }
    )
    assert configured() == _config.Config(
        send_spans=True,
        receive_spans=False,
        process_parent="none",
        excluded_topics=("a", "b*"),
    )


def test_what_is_wrong_in_the_file_is_one_warning_each_and_the_rest_stands(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    configure({"send_span": False, "commit_spans": "some", "process_parent": "none"})
    assert log.take() == [
        "the configuration file sets send_span of kafka_python, which has no such "
        "setting; it is ignored; did you mean send_spans?",
        "the keyword commit_spans is 'some', but should be manual or all or none; "
        "the default, manual, is used instead",
    ]
    assert configured() == _config.Config(process_parent="none")


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ("{ process_parent: none }", "True\nnone\n"),
        ("{ enabled: false, process_parent: none }", "False\n"),
        ("{ enabled: true }", "True\nmessage\n"),
    ],
)
def test_the_launcher_does_what_the_file_says_and_warns_of_nothing(
    tmp_path: Path, options: str, printed: str
) -> None:
    path = tmp_path / "configuration.yaml"
    path.write_text(FILE.format(options=options))
    done = run(
        LAUNCHED,
        launched=True,
        environ={
            "OTEL_CONFIG_FILE": str(path),
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka,logging,threading",
        },
    )
    # The launcher passes its version to the SDK, which says that it ignores that.
    warned = [line for line in done.stderr.splitlines() if "kwargs" not in line]
    assert (done.stdout, warned) == (printed, [])


@pytest.mark.parametrize(
    ("content", "warnings"),
    [
        ('file_format: "1.1"', []),
        (FILE.format(options="{}"), []),
        ("instrumentation/development: 3", ["Failed to read the configuration file"]),
    ],
)
def test_the_launcher_instruments_unless_the_file_says_no(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: Log,
    content: str,
    warnings: list[str],
) -> None:
    path = tmp_path / "configuration.yaml"
    path.write_text(content)
    monkeypatch.setenv("OTEL_CONFIG_FILE", str(path))
    begin_launch()
    KafkaPythonInstrumentor().instrument(skip_dep_check=True)
    assert configured() == _config.Config()
    assert [line.partition(";")[0] for line in log.take()] == warnings


def test_a_call_of_the_application_is_its_own_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    path = tmp_path / "configuration.yaml"
    path.write_text(FILE.format(options="{ enabled: false }"))
    monkeypatch.setenv("OTEL_CONFIG_FILE", str(path))
    begin_launch()
    take_over()  # the launch is over, without a call: the package is disabled by name
    KafkaPythonInstrumentor().instrument()
    assert configured() == _config.Config()
    KafkaPythonInstrumentor().instrument()
    assert log.take() == ["Attempting to instrument while already instrumented"]


def test_without_the_package_that_reads_it_the_file_says_nothing(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.configuration", None)
    assert not _config.disabled_in_file({"OTEL_CONFIG_FILE": "configuration.yaml"})
    assert log.take() == []
