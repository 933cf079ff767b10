"""Instrumenting and uninstrumenting: our layer, on and off, and no other's."""

from __future__ import annotations

import functools
import sys
import textwrap
import weakref
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import wrapt
from kafka import KafkaConsumer, KafkaProducer
from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.producer.future import FutureRecordMetadata

from clients import Clients
from collector import collect
from conftest import Instrument
from otel_kafka_python import (
    KafkaPythonInstrumentor,
    _config,
    _instrumentor,
    _patches,
)
from otel_kafka_python._processing import iterators
from otel_kafka_python.package import _instruments_any
from recorder import Log, Recorder
from scripts import run

pytestmark = pytest.mark.one_broker

PATCHED = [
    (KafkaProducer, "send"),
    (KafkaConsumer, "poll"),
    (KafkaConsumer, "__iter__"),
    (KafkaConsumer, "__next__"),
]


def methods() -> list[Any]:
    return [vars(owner)[name] for owner, name in PATCHED]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = methods()
    yield
    for owner, name in PATCHED:
        setattr(owner, name, before[PATCHED.index((owner, name))])


def test_uninstrumented_the_classes_are_as_they_were(instrument: Instrument) -> None:
    def attributes() -> list[dict[str, int]]:
        # By identity: a wrapper is equal to what it wraps.
        return [
            {name: id(value) for name, value in vars(each).items()}
            for each in (
                *(KafkaProducer, KafkaConsumer),
                *(ConsumerCoordinator, FutureRecordMetadata),
            )
        ]

    before = methods(), attributes()
    instrument(commit_spans="all", next_process_spans=True)
    assert all(a is not b for a, b in zip(methods(), before[0], strict=True))
    assert all(a != b for a, b in zip(attributes(), before[1], strict=True))
    KafkaPythonInstrumentor().uninstrument()
    assert all(a is b for a, b in zip(methods(), before[0], strict=True))
    assert attributes() == before[1]


def test_both_are_idempotent(
    instrument: Instrument, log: Log, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument()
    instrumented = methods()
    instrument()
    assert all(a is b for a, b in zip(methods(), instrumented, strict=True))
    assert log.take() == ["Attempting to instrument while already instrumented"]
    clients.send(b"1")
    assert recorder.names() == [f"send {topic}"]
    KafkaPythonInstrumentor().uninstrument()
    KafkaPythonInstrumentor().uninstrument()
    assert log.take() == ["Attempting to uninstrument while already uninstrumented"]


def test_it_can_be_instrumented_again_with_other_settings(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    instrument(send_spans=False)
    producer.send(topic, b"1").get(30)
    KafkaPythonInstrumentor().uninstrument()
    instrument()
    producer.send(topic, b"2").get(30)
    producer.flush()
    assert recorder.names() == [f"send {topic}"]


def test_living_instances_and_bound_methods_are_uninstrumented(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument()
    producer = clients.producer()
    send = producer.send
    consumer = clients.consumer()
    iterator = iter(consumer)
    KafkaPythonInstrumentor().uninstrument()
    send(topic, b"1").get(30)
    producer.send(topic, b"2").get(30)
    values = []
    for record in iterator:
        values.append((record.value, record.headers))
        if len(values) == 2:
            break
    assert values == [(b"1", []), (b"2", [])]
    assert recorder.started == []


def test_a_loop_goes_on_where_it_was_when_it_is_uninstrumented(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument()
    clients.send(b"1", b"2", b"3")
    values = []
    for record in clients.consumer():
        values.append(record.value)
        if record.offset == 0:
            KafkaPythonInstrumentor().uninstrument()
        if record.offset == 2:
            break
    assert values == [b"1", b"2", b"3"]
    assert len(recorder.named(f"process {topic}")) == 1
    assert recorder.open() == []


def wrapt_layer(owner: Any, name: str, calls: list[str]) -> None:
    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append(name)
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(owner, name, wrapper)


def plain_layer(owner: Any, name: str, calls: list[str]) -> None:
    wrapped = getattr(owner, name)

    @functools.wraps(wrapped)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return wrapped(*args, **kwargs)

    setattr(owner, name, wrapper)


@pytest.mark.defect(17)
@pytest.mark.parametrize("layer", [wrapt_layer, plain_layer])
@pytest.mark.parametrize("where", ["above", "below"])
def test_only_our_own_layer_is_taken_off(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    layer: Any,
    where: str,
) -> None:
    calls: list[str] = []
    if where == "below":
        layer(KafkaProducer, "send", calls)
    instrument()
    if where == "above":
        layer(KafkaProducer, "send", calls)
    producer = clients.producer()
    producer.send(topic, b"1").get(30)
    KafkaPythonInstrumentor().uninstrument()
    producer.send(topic, b"2").get(30)
    producer.flush()
    assert calls == ["send", "send"]
    assert recorder.names() == [f"send {topic}"]


def test_between_wrapt_layers_nothing_of_ours_remains(instrument: Instrument) -> None:
    original = vars(KafkaProducer)["send"]
    instrument()
    wrapt_layer(KafkaProducer, "send", [])
    wrapt_layer(KafkaProducer, "send", [])
    KafkaPythonInstrumentor().uninstrument()
    assert vars(KafkaProducer)["send"].__wrapped__.__wrapped__ is original


def test_a_consumer_is_not_kept_alive(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    clients.send(b"1")
    consumer = clients.consumer()
    for _ in consumer:
        break
    consumer.poll(timeout_ms=0)
    consumer.close()
    dropped = weakref.ref(consumer)
    clients._made.remove(consumer)
    del consumer
    collect()
    assert dropped() is None


def test_an_unknown_keyword_is_named_and_ignored(
    instrument: Instrument, log: Log, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(produce_spans=False)
    assert log.take() == [
        "instrument() has no keyword produce_spans; it is ignored; "
        "did you mean process_spans?"
    ]
    clients.send(b"1")
    assert recorder.names() == [f"send {topic}"]


def test_instrumenting_never_raises(
    instrument: Instrument, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(telemetry: Any) -> Any:
        raise RuntimeError("no patching today")

    monkeypatch.setattr(_patches, "apply", fail)
    instrument()
    (message,) = log.take()
    assert message.startswith("Failed to instrument kafka-python")


@pytest.mark.parametrize("failing", [(_patches, "apply"), (_config, "load")])
def test_what_has_failed_is_not_instrumented_and_can_be_tried_again(
    instrument: Instrument,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    failing: tuple[Any, str],
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("not today")

    with monkeypatch.context() as patched:
        patched.setattr(*failing, fail)
        instrument()
    (message,) = log.take()
    assert message.startswith("Failed to instrument kafka-python")
    assert not KafkaPythonInstrumentor().is_instrumented_by_opentelemetry
    instrument()
    clients.send(b"1")
    assert recorder.names() == [f"send {topic}"]


def test_uninstrumenting_reverts_whatever_fails(
    instrument: Instrument, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = methods()

    def close_all(_: object) -> Any:
        raise RuntimeError("changed during iteration")

    monkeypatch.setattr(iterators.HeldScopes, "close_all", close_all)
    instrument()
    KafkaPythonInstrumentor().uninstrument()
    (message,) = log.take()
    assert message.startswith("Failed to stop the instrumentation")
    assert all(a is b for a, b in zip(methods(), before, strict=True))


def test_patching_that_fails_half_way_leaves_nothing(
    instrument: Instrument, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap = _patches._wrap

    def fail(owner: type, method: str, wrapper: Any) -> Any:
        if method == "__next__":
            raise LookupError(method)
        return wrap(owner, method, wrapper)

    before = vars(KafkaProducer)["send"]
    monkeypatch.setattr(_patches, "_wrap", fail)
    instrument()
    log.take()
    assert vars(KafkaProducer)["send"] is before


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"kafka-python"}, _instruments_any[:1]),
        ({"kafka-python-ng"}, _instruments_any[1:]),
        ({"kafka-python", "kafka-python-ng"}, _instruments_any[:1]),
        (set(), _instruments_any[:1]),
    ],
)
def test_the_dependency_is_the_installed_distribution(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], expected: tuple[str, ...]
) -> None:
    """Of the two distributions only one can be installed at a time."""

    def distribution(name: str) -> None:
        if name not in installed:
            raise PackageNotFoundError(name)

    monkeypatch.setattr(_instrumentor, "distribution", distribution)
    assert tuple(KafkaPythonInstrumentor().instrumentation_dependencies()) == expected


MISSING = """
    import logging, sys
    logging.basicConfig()
    class Hidden:
        # Neither the package nor its distribution is there.
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "kafka":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Hidden())
    import importlib.metadata as metadata
    import opentelemetry.instrumentation.dependencies as dependencies
    original = metadata.version
    def version(name):
        if name.startswith("kafka-python"):
            found = sys.argv[1]
            if found == "missing":
                raise metadata.PackageNotFoundError(name)
            return found
        return original(name)
    dependencies.version = version
    from otel_kafka_python import KafkaPythonInstrumentor, process_span
    instrumentor = KafkaPythonInstrumentor()
    instrumentor.instrument()
    print(instrumentor.is_instrumented_by_opentelemetry)
"""


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("missing", "but none are installed"),
        ("1.4.7", "1.4.7"),
        ("4.0.0", "4.0.0"),
    ],
)
def test_a_missing_or_unsupported_kafka_python_is_said_by_hand(
    version: str, said: str
) -> None:
    """Uninstalling it is no matter for a test: the process is told that it is so."""
    done = run(MISSING, version)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"
    (line,) = done.stderr.splitlines()
    for requirement in _instruments_any:
        assert requirement in line
    assert said in line


def test_nothing_of_kafka_is_imported_before_it_is_needed() -> None:
    done = run(
        """
        import sys
        import otel_kafka_python._instrumentor as instrumentor
        instrumentor.take_over()
        print("kafka" in sys.modules)
        """
    )
    assert done.stdout == "False\n", (done.stderr, sys.version)


BEFORE_THE_IMPORT = """
    import sys
    from recorder import Recorder
    from otel_kafka_python import KafkaPythonInstrumentor, process_span
    recorder, instrumentor = Recorder(), KafkaPythonInstrumentor()

    def instrument(**settings):
        instrumentor.instrument(tracer_provider=recorder.tracer_provider, **settings)

    def is_patched(*names):
        import kafka
        return [type(vars(kafka.KafkaProducer)[name]).__name__ for name in names]

    instrument()
    assert "kafka" not in sys.modules
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("print(is_patched('send'))", "['FunctionWrapper']"),
        ("import kafka.consumer; print(is_patched('send'))", "['FunctionWrapper']"),
        (
            "from kafka.errors import KafkaError; print(is_patched('send'))",
            "['FunctionWrapper']",
        ),
        ("instrumentor.uninstrument(); print(is_patched('send'))", "['function']"),
        (
            # One layer, not one for each time that it was asked for.
            "instrumentor.uninstrument(); instrument(); print(is_patched('send'));"
            "import kafka; print(type(kafka.KafkaProducer.send.__wrapped__).__name__)",
            "['FunctionWrapper']\nfunction",
        ),
        (
            "import kafka; instrumentor.uninstrument(); print(is_patched('send'))",
            "['function']",
        ),
    ],
)
def test_it_is_patched_when_the_program_imports_it(script: str, said: str) -> None:
    done = run(textwrap.dedent(BEFORE_THE_IMPORT) + script)
    assert (done.stdout, done.stderr) == (f"{said}\n", "")


def test_an_import_that_fails_fails_as_before_and_may_succeed_later() -> None:
    done = run(
        textwrap.dedent(BEFORE_THE_IMPORT)
        + """
sys.modules["kafka.errors"] = None
try:
    import kafka
except ImportError as error:
    print(error.name)
for name in [name for name in sys.modules if name.split(".")[0] == "kafka"]:
    del sys.modules[name]
print(instrumentor.is_instrumented_by_opentelemetry, is_patched("send"))
"""
    )
    assert done.stderr == ""
    assert done.stdout == "kafka.errors\nTrue ['FunctionWrapper']\n"


def test_patching_that_fails_does_not_fail_the_import() -> None:
    done = run(
        textwrap.dedent(BEFORE_THE_IMPORT)
        + """
from otel_kafka_python import _patches
def fail(telemetry):
    raise RuntimeError("no patching today")
_patches.apply = fail
print(is_patched("send"), instrumentor.is_instrumented_by_opentelemetry)
"""
    )
    assert done.stdout == "['function'] False\n", done.stderr
    assert done.stderr.startswith("Failed to instrument kafka-python")


@pytest.mark.skipif(sys.version_info < (3, 15), reason="new in 3.15")
def test_a_lazy_import_is_patched_when_it_is_used() -> None:
    done = run(
        """
        import sys
        from otel_kafka_python import KafkaPythonInstrumentor
        KafkaPythonInstrumentor().instrument()
        lazy from kafka import KafkaProducer
        assert "kafka" not in sys.modules
        assert hasattr(KafkaProducer.send, "__wrapped__")
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_frozen_application_without_metadata_is_instrumented() -> None:
    done = run(
        """
        import importlib.metadata as metadata
        import opentelemetry.instrumentation.dependencies as dependencies
        def version(name):
            raise metadata.PackageNotFoundError(name)
        dependencies.version = version
        from otel_kafka_python import KafkaPythonInstrumentor
        KafkaPythonInstrumentor().instrument()
        import kafka
        print(type(vars(kafka.KafkaProducer)["send"]).__name__)
        """
    )
    assert (done.stdout, done.stderr) == ("FunctionWrapper\n", "")
