"""Fixtures: brokers, clients, and a recorder of all telemetry."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from embedded_broker import EmbeddedBroker
from opentelemetry import context

import apache_broker
from apache_broker import ApacheBroker
from clients import Clients
from otel_kafka_python import KafkaPythonInstrumentor, _safety, _span_ends
from recorder import Log, Recorder

# So that what it asserts says what was wrong.
pytest.register_assert_rewrite("deliveries")

_WITHOUT_APACHE = apache_broker.why_unavailable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--broker",
        action="append",
        metavar="embedded|apache|HOST:PORT",
        help="which broker to test on; may be given more than once "
        "(default: embedded, and apache where Java 17 and Maven are found)",
    )


def _brokers(config: pytest.Config) -> list[str]:
    given: list[str] = config.getoption("--broker")
    if given:
        return given
    return ["embedded"] if _WITHOUT_APACHE else ["embedded", "apache"]


_LEFT_OUT = f"Apache Kafka is left out: {_WITHOUT_APACHE or 'not asked for'}"


def pytest_report_header(config: pytest.Config) -> str:
    brokers = _brokers(config)
    left_out = "" if "apache" in brokers else f" ({_LEFT_OUT})"
    return f"brokers: {', '.join(brokers)}{left_out}"


_running = ExitStack()


@cache
def _apache() -> str:
    """The address of the Apache Kafka of this run; each test has topics of its own."""
    return _running.enter_context(ApacheBroker()).address


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Let all workers of xdist share it."""
    if "apache" in _brokers(node.config):
        node.workerinput["apache"] = _apache()


def pytest_unconfigure() -> None:
    _running.close()


def pytest_sessionfinish() -> None:
    """Save what is measured so far: xdist kills a worker that takes long to exit."""
    coverage: Any = sys.modules.get("coverage")
    measured = coverage and coverage.Coverage.current()
    if measured:
        measured.save()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "broker" in metafunc.fixturenames:
        brokers = _brokers(metafunc.config)
        if metafunc.definition.get_closest_marker("one_broker"):
            brokers = brokers[:1]
        metafunc.parametrize("broker", brokers, indirect=True, scope="session")


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A running broker; its `address` is "host:port"."""
    if request.param == "embedded":
        with EmbeddedBroker() as embedded:
            yield embedded
        return
    address = request.param
    if address == "apache":
        shared: dict[str, str] = getattr(request.config, "workerinput", {})
        address = shared.get("apache") or _apache()
    yield SimpleNamespace(address=address)


@pytest.fixture(scope="session")
def runs_apache(pytestconfig: pytest.Config) -> None:
    """For tests that start Apache Kafka themselves, which fails if it was asked for."""
    if "apache" not in _brokers(pytestconfig):
        pytest.skip(_LEFT_OUT)


@pytest.fixture
def gives_away(request: pytest.FixtureRequest, broker: Any) -> None:
    """For tests in which a member of a group goes and another takes its partitions."""
    if isinstance(broker, EmbeddedBroker):
        pytest.skip("the embedded broker gives no partitions away")


@pytest.fixture
def topic() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def clients(broker: Any, topic: str) -> Iterator[Clients]:
    made = Clients(broker.address, topic)
    yield made
    made.close()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Sees all telemetry of a test, which has to be as the convention has it."""
    recorder = Recorder()
    yield recorder
    recorder.check()


@pytest.fixture(scope="session")
def demo() -> ModuleType:
    """The demo, which starts services."""
    place = Path(__file__).parent.parent / "examples" / "demo" / "__main__.py"
    spec = importlib.util.spec_from_file_location("demo_main", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Instrument = Callable[..., None]


@pytest.fixture
def instrument(recorder: Recorder) -> Iterator[Instrument]:
    """Instruments with the recorder's providers and the settings it is called with."""
    instrumentor = KafkaPythonInstrumentor()

    def run(**settings: Any) -> None:
        instrumentor.instrument(
            **{
                "tracer_provider": recorder.tracer_provider,
                "meter_provider": recorder.meter_provider,
                "logger_provider": recorder.logger_provider,
                **settings,
            }
        )

    yield run
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()


@pytest.fixture
def instrumented(instrument: Instrument) -> None:
    instrument()


@pytest.fixture(autouse=True)
def log() -> Iterator[Log]:
    """Nothing is logged that a test does not take."""
    _safety._reported.clear()
    # A busy machine delays the end of a span, too.
    _span_ends._LONGEST_END = 10**18
    with Log() as log:
        yield log
        assert log.take() == []


@pytest.fixture(autouse=True)
def _context_is_restored() -> Iterator[None]:
    """No test, and so nothing that it calls, leaves a context behind."""
    before = context.get_current()
    yield
    assert context.get_current() == before
    # Where OpenTelemetry fails to restore it, one that only equals it is left, and the
    # next test needs more calls.
    context.attach(before)
