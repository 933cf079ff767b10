"""Chaos on ourselves: each call into OpenTelemetry raises, and nobody notices.

The calls are found in the source, so that none can be forgotten. Each raises in turn,
every time that it is made, while a service does all that a service does; what the
service sees is compared with what it sees without any instrumentation.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import gc
import importlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic
from opentelemetry import _logs, baggage, context, metrics, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import otel_kafka_python
from clients import DEADLINE, Clients, committable, poll, poll_records
from collector import collect
from otel_kafka_python import (
    KafkaPythonInstrumentor,
    _propagation,
    process_span,
)
from otel_kafka_python._processing import process_span as process_span_module
from recorder import Log, Recorder, RecordingSampler

pytestmark = pytest.mark.one_broker

# The classes of the API that an SDK, or a vendor, implements.
IMPLEMENTED = (
    trace.TracerProvider,
    trace.Tracer,
    trace.Span,
    metrics.MeterProvider,
    metrics.Meter,
    metrics.Counter,
    metrics.Histogram,
    _logs.LoggerProvider,
    _logs.Logger,
    TextMapPropagator,
)
METHODS = {
    name: cls
    for cls in IMPLEMENTED
    for name in vars(cls)
    # What a meter says of itself has the names of too much else.
    if not name.startswith("_") and name not in {"name", "version", "schema_url"}
}

# A dict, in which nobody's code runs.
HARMLESS = {"Context"}

# The fields of links and of span contexts, the API's own classes that nobody else
# implements, the base class of the instrumentor with what it calls itself, and the
# reader of the configuration file, which the launcher asks before anything is traced.
NO_CHAOS = {
    "load_config_file",
    *("context", "instrument", "is_valid", "span_id", "trace_id"),
    *("trace_flags", "trace_state", "__len__", "get_dependency_conflicts"),
}

# What has methods of the same names, and is no implementation of these classes.
OURS = {
    "Operation(template, None, started)",
    "Operation(template, span, started)",
    "_reported",
    "tracebacks",
    "template.exceptions",
    "operation",
    "self",
    "self._known",
    "self._processed",
    "self.telemetry",
    "telemetry",
}


class Site(NamedTuple):
    """A call into OpenTelemetry in the source of the package."""

    module: ModuleType
    function: str
    owner: str  # the expression before the dot; "" of a name that was imported
    name: str
    first_line: int
    last_line: int

    @property
    def is_implemented(self) -> bool:
        """Whether an SDK runs in it."""
        owner = vars(self.module).get(self.owner)
        return bool(self.owner) and not isinstance(owner, ModuleType)

    def patched(self) -> Iterator[tuple[Any, str]]:
        """Where the function that it calls stands."""
        if not self.owner:
            yield self.module, self.name
        elif not self.is_implemented:
            yield vars(self.module)[self.owner], self.name
        else:
            pending: list[type] = [METHODS[self.name]]
            for cls in pending:
                pending += cls.__subclasses__()
                if self.name in vars(cls):
                    yield cls, self.name


def sites_of(module: ModuleType) -> Iterator[Site]:
    """All calls of a module into OpenTelemetry that are not made at its import."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").split(".")[0] == "opentelemetry"
        for alias in node.names
    }

    def walk(node: ast.AST, function: str | None) -> Iterator[Site]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        called = node.func if isinstance(node, ast.Call) else node
        owner = name = ""
        if isinstance(node, ast.Call) and isinstance(called, ast.Name):
            name = called.id if called.id in imported else ""
        elif isinstance(called, ast.Attribute):
            owner = ast.unparse(called.value)
            found = METHODS.get(called.attr)
            if isinstance(node, ast.Call):
                known = owner in imported or (found and owner not in OURS)
            else:
                known = isinstance(vars(found or object).get(called.attr), property)
            name = called.attr if known else ""
        if name and function and name not in HARMLESS:
            assert isinstance(node, ast.expr)
            last = node.end_lineno or node.lineno
            yield Site(module, function, owner, name, node.lineno, last)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    return walk(tree, None)


PACKAGE = Path(otel_kafka_python.__file__).parent
# Modules whose calls have tests of their own: what is observed of the clients, and
# what ends spans on a thread of ours.
ELSEWHERE = {"_client_metrics", "_span_ends"}
SITES = [
    site
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem not in {*ELSEWHERE, "__init__"}
    for site in sites_of(
        importlib.import_module(
            ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        )
    )
    # When an SDK collects, no application waits, and this is a plain value.
    if site.name not in {"Observation", *NO_CHAOS}
]


def name_of(site: Site) -> str:
    module = site.module.__name__.rpartition(".")[2]
    same = [each for each in SITES if each[:2] == site[:2] and each.name == site.name]
    number = f"-{same.index(site) + 1}" if len(same) > 1 else ""
    return f"{module}.{site.function}: {site.name}{number}"


class TimeLimit(Exception):  # noqa: N818 (a limit, as libraries name it)
    """What a handler of a signal raises."""


def raise_limit(*_: object) -> None:
    raise TimeLimit


class Chaos:
    """Raises in a call, as long as it lasts.

    Args:
        error: What is raised; a `TimeLimit` by a handler of a signal.
        times: How often at the most.
        on_main: Whether only on the main thread, or only on others; None: on all.
    """

    def __init__(
        self,
        error: type[BaseException],
        *,
        times: float = float("inf"),
        on_main: bool | None = None,
    ) -> None:
        self._error = error
        self._times = times
        self._on_main = on_main
        self.struck = 0
        self.in_callback = False

    def strike(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if self._on_main in {None, is_main} and self.struck < self._times:
            self.struck += 1
            callers = (frame for frame, _ in traceback.walk_stack(None))
            names = {frame.f_globals["__name__"] for frame in callers}
            self.in_callback = "kafka.future" in names
            if self._error is TimeLimit:
                signal.raise_signal(signal.SIGUSR1)
            raise self._error("chaos")

    def around(self, original: Any, site: Site | None) -> Any:
        """What calls the original, but for where it raises."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if site is None:
                self.strike()
            else:
                caller = sys._getframe(1)
                if (
                    caller.f_code.co_filename == site.module.__file__
                    and site.first_line <= caller.f_lineno <= site.last_line
                ):
                    self.strike()
            return original(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def at(self, *owners: tuple[Any, str], site: Site | None = None) -> Iterator[None]:
        """Raise in these attributes; of a site only where that calls them."""
        with pytest.MonkeyPatch.context() as patch:
            # Kept from an earlier time, they would not be asked for.
            unknown = _propagation._Known(None, frozenset(), are_default=False)
            patch.setattr(_propagation, "_known", unknown)
            for owner, name in owners:
                original = vars(owner)[name]
                replaced: Any
                if isinstance(original, property):
                    replaced = property(self.around(original.fget, site))
                else:
                    replaced = self.around(original, site)
                patch.setattr(owner, name, replaced)
            yield


@contextlib.contextmanager
def at(site: Site, chaos: Chaos) -> Iterator[None]:
    with chaos.at(*site.patched(), site=site):
        yield


Step = Callable[["Service", list[Any]], None]


def bytes_of(value: Any) -> Any:
    return value


class Service:
    """Clients that do all that is traced, again and again, and tell what they see.

    Args:
        clients: Makes its clients.
        topic: A prefix for the topics that it works with.
    """

    def __init__(self, clients: Clients, topic: str) -> None:
        self._clients, self._topic = clients, topic
        self.source, self.target = f"{topic}-source", f"{topic}-target"
        admin = KafkaAdminClient(bootstrap_servers=clients.address)
        limited = {"max.message.bytes": "2000"}
        admin.create_topics(
            [
                NewTopic(self.source, 1, 1),
                NewTopic(self.target, 1, 1, topic_configs=limited),
            ]
        )
        admin.close()
        self.partition = TopicPartition(self.source, 0)
        # What the broker refuses would be the end of an idempotent producer.
        plain: dict[str, Any] = {"enable_idempotence": False}
        if "enable_idempotence" not in KafkaProducer.DEFAULT_CONFIG:
            plain = {}
        # A serialiser of the application's, so that the send span is current for it.
        plain["value_serializer"] = bytes_of
        self.producer = clients.producer(**plain)
        self.transactional = self._transactional()
        for number in range(3):
            headers = [("traceparent", f"00-{7:032x}-{number + 1:016x}-01".encode())]
            if number:  # the propagators read the baggage of the second only
                start = b"kafka.pipeline=%d-orders" % (time.time() * 1000)
                more = b"customer=7," if number == 1 else b""
                headers.append(("baggage", more + start))
            self.producer.send(self.source, b"%d" % number, b"key", headers)
        self.producer.flush()
        self.consumer = self._consumer()
        self.reader = clients.consumer("unused")
        self.reader.unsubscribe()
        self.reader.assign([TopicPartition(self.target, 0)])

    def _transactional(self) -> Any:
        if not hasattr(KafkaProducer, "begin_transaction"):
            return None
        producer = self._clients.producer(transactional_id=self._topic)
        producer.init_transactions()
        return producer

    def _consumer(self) -> Any:
        # Its own partitions, so that nothing waits for a group.
        consumer = self._clients.consumer("unused", group_id=self._topic)
        consumer.unsubscribe()
        consumer.assign([self.partition])
        return consumer

    def forget_consumer(self) -> None:
        """Go on with another: an interrupt in a callback has kafka-python's lose track.

        It waits for ever for an answer that has come with the one it was called for.
        """
        self.consumer = self._consumer()

    def story(self, *steps: Step) -> list[Any]:
        """What it sees of one time; of all steps, if it is not told which."""
        told = []
        (target,) = self.reader.assignment()
        self.producer.flush()
        self.reader.seek(target, self.reader.end_offsets([target])[target])
        for step in steps or self.STEPS:
            seen: list[Any] = []
            try:
                step(self, seen)
            except BaseException as error:
                # Up to 2.3 a future whose callback is interrupted at once, whoever's
                # it is, raises what its lock has to say of that.
                hidden = isinstance(error.__context__, KeyboardInterrupt | TimeLimit)
                seen.append(type(error.__context__ if hidden else error))
            told.append((step.__name__, seen))
        return told

    def _told(self, record: Any) -> Any:
        """What there is of a record; of its headers those that are not ours."""
        written = {"traceparent", "baggage"}
        headers = [each for each in record.headers if each[0] not in written]
        return record.key, record.value, headers

    def sends(self, seen: list[Any]) -> None:
        for number in range(3):
            self._send(seen, self.producer, b"%d" % number, headers=[("own", b"1")])

    def sends_with_a_context(self, seen: list[Any]) -> None:
        foreign = [("traceparent", f"00-{8:032x}-{9:016x}-01".encode())]
        for _ in range(2):
            self._send(seen, self.producer, b"kept", headers=foreign)

    def sends_with_baggage(self, seen: list[Any]) -> None:
        token = context.attach(baggage.set_baggage("customer", "7"))
        try:
            for _ in range(2):
                self._send(seen, self.producer, b"with baggage")
        finally:
            context.detach(token)

    def sends_what_the_broker_refuses(self, seen: list[Any]) -> None:
        for _ in range(2):
            self._send(seen, self.producer, bytes(3000))

    def sends_what_the_client_refuses(self, seen: list[Any]) -> None:
        for _ in range(2):
            try:
                self.producer.send(self.target, object())
            except Exception as error:
                seen.append(type(error))

    def _send(
        self, seen: list[Any], producer: Any, value: bytes, **arguments: Any
    ) -> None:
        called = threading.Event()
        outcomes: list[Any] = []

        def call_back(outcome: Any) -> None:
            outcomes.append(outcome)
            called.set()

        future = producer.send(self.target, value, key=b"key", **arguments)
        future.add_callback(call_back)
        future.add_errback(call_back)
        outcome: Any
        try:
            outcome = future.get(DEADLINE)
        except Exception as error:
            outcome = error
        # The callback is called beside us; one that is added now, at once.
        assert called.wait(DEADLINE)
        future.add_callback(call_back)
        future.add_errback(call_back)
        told = getattr(outcome, "topic", type(outcome))
        seen.append((told, [each is outcome for each in outcomes]))

    def reads_what_was_sent(self, seen: list[Any]) -> None:
        (partition,) = self.reader.assignment()
        end = self.reader.end_offsets([partition])[partition]
        deadline = time.monotonic() + DEADLINE
        while self.reader.position(partition) < end:
            assert time.monotonic() < deadline
            for records in self.reader.poll(timeout_ms=100).values():
                seen += map(self._told, records.copy())

    def loops(self, seen: list[Any]) -> None:
        self.consumer.seek(self.partition, 0)
        for record in self.consumer:
            seen.append(self._told(record))
            self._send(seen, self.producer, record.value, headers=record.headers)
            if record.offset == 1:
                break

    def loops_and_fails(self, seen: list[Any]) -> None:
        for _ in range(2):
            self.consumer.seek(self.partition, 0)
            for record in self.consumer:
                try:
                    with process_span(record):
                        seen.append(self._told(record))
                        raise ValueError("the application's")
                except ValueError as error:
                    seen.append(str(error))
                if record.offset == 1:
                    break

    def loops_over_a_batch(self, seen: list[Any]) -> None:
        for _ in range(2):
            self.consumer.seek(self.partition, 0)
            for record in self.consumer:
                with process_span([record]):
                    seen.append(self._told(record))
                break

    def leaves_a_span_current(self, seen: list[Any]) -> None:
        token = context.attach(context.get_current())
        try:
            for _ in range(2):
                self.consumer.seek(self.partition, 0)
                for record in self.consumer:
                    seen.append(self._told(record))
                    left = context.set_value("left", object())
                    context.attach(trace.set_span_in_context(trace.INVALID_SPAN, left))
                    break
        finally:
            context.detach(token)

    def forgets_a_loop(self, seen: list[Any]) -> None:
        def forget() -> None:
            iterator = iter(self.consumer)
            for record in iterator:
                seen.append(self._told(record))
                break
            cycle: list[Any] = [iterator]
            cycle.append(cycle)

        for _ in range(2):
            self.consumer.seek(self.partition, 0)
            gc.disable()  # not before it is one
            forget()
            gc.enable()
            collect(0)

    def asks_for_the_next(self, seen: list[Any]) -> None:
        self.consumer.seek(self.partition, 0)
        for _ in range(3):
            seen.append(self._told(next(self.consumer)))

    def asks_for_the_next_in_a_block(self, seen: list[Any]) -> None:
        around = trace.NonRecordingSpan(trace.SpanContext(5, 6, is_remote=False))
        for _ in range(2):
            self.consumer.seek(self.partition, 0)
            seen.append(self._told(next(self.consumer)))
            with trace.use_span(around):
                seen.append(self._told(next(self.consumer)))
            seen.append(self._told(next(self.consumer)))

    def polls(self, seen: list[Any]) -> None:
        for _ in range(2):
            self.consumer.seek(self.partition, 0)
            seen += map(self._told, poll_records(self.consumer, 3))

    def polls_and_loops(self, seen: list[Any]) -> None:
        self.consumer.seek(self.partition, 0)
        around = trace.NonRecordingSpan(trace.SpanContext(5, 6, is_remote=False))
        with trace.use_span(around):
            for record in poll(self.consumer)[self.partition]:
                seen.append(self._told(record))
                with process_span(record):
                    seen.append(record.offset)
                if record.offset == 1:
                    break

    def polls_and_processes_a_batch(self, seen: list[Any]) -> None:
        self.consumer.seek(self.partition, 0)
        records = poll_records(self.consumer, 3)
        for _ in range(2):
            try:
                with process_span(records, consumer=self.consumer):
                    seen += map(self._told, records)
                    raise ValueError("the application's")
            except ValueError as error:
                seen.append(str(error))

    def polls_in_vain(self, seen: list[Any]) -> None:
        for _ in range(2):
            try:
                self.consumer.poll(timeout_ms=-1)
            except Exception as error:
                seen.append(type(error))

    def commits(self, seen: list[Any]) -> None:
        for offset in (1, 2):
            offsets = committable(self.source, offset)
            seen.append(self.consumer.commit(offsets))
            seen.append(self.consumer.committed(self.partition))
        try:
            self.consumer.commit("nonsense")
        except Exception as error:
            seen.append(type(error))

    def commits_without_waiting(self, seen: list[Any]) -> None:
        for offset in (1, 2):
            committed: queue.SimpleQueue[Any] = queue.SimpleQueue()
            offsets = committable(self.source, offset)
            future = self.consumer.commit_async(
                offsets, callback=lambda *outcome, put=committed.put: put(outcome)
            )
            deadline = time.monotonic() + DEADLINE
            while committed.empty():
                assert time.monotonic() < deadline
                self.consumer.poll(timeout_ms=10)
            of_offsets, result = committed.get()
            seen.append((of_offsets == offsets, type(result), future.succeeded()))

    def transacts(self, seen: list[Any]) -> None:
        producer = self.transactional
        if producer is None:
            return
        for end in (producer.commit_transaction, producer.abort_transaction):
            producer.begin_transaction()
            try:
                self._send(seen, producer, b"transaction")
                offsets = committable(self.source, 1)
                seen.append(producer.send_offsets_to_transaction(offsets, "group"))
                seen.append(end())
            except BaseException:
                # That of 2.3 may wait for ever for an abort of what was interrupted.
                self.transactional = self._transactional()
                raise
            try:
                end()
            except Exception as error:
                seen.append(type(error))

    STEPS: tuple[Step, ...] = (
        sends,
        sends_with_a_context,
        sends_with_baggage,
        sends_what_the_broker_refuses,
        sends_what_the_client_refuses,
        loops,
        loops_and_fails,
        loops_over_a_batch,
        leaves_a_span_current,
        forgets_a_loop,
        asks_for_the_next,
        asks_for_the_next_in_a_block,
        polls,
        polls_and_loops,
        polls_and_processes_a_batch,
        polls_in_vain,
        commits,
        commits_without_waiting,
        transacts,
        reads_what_was_sent,
    )


@pytest.fixture(scope="module")
def service(broker: Any) -> Iterator[Service]:
    clients = Clients(broker.address, "")
    yield Service(clients, f"chaos-{uuid.uuid4().hex[:12]}")
    clients.close()


@pytest.fixture(scope="module")
def plain(service: Service) -> list[Any]:
    """What it sees where nothing is instrumented."""
    service.story()  # which lets kafka-python learn what it has to
    return service.story()


def settings(recorder: Recorder) -> list[dict[str, Any]]:
    """Between them they make every call."""
    return [
        {
            "tracer_provider": recorder.tracer_provider,
            "meter_provider": recorder.meter_provider,
            "logger_provider": recorder.logger_provider,
            "capture_headers": "*",
            "capture_queue_time": True,
            "pipeline_latency": True,
            "commit_spans": "all",
            "next_process_spans": True,
        },
        {
            "tracer_provider": recorder.tracer_provider,
            "process_parent": "none",
            "pipeline_latency": True,
        },
    ]


@pytest.fixture(autouse=True)
def _signals_are_handled() -> Iterator[None]:
    handler = signal.signal(signal.SIGUSR1, raise_limit)
    yield
    signal.signal(signal.SIGUSR1, handler)


@pytest.fixture(autouse=True)
def _exceptions_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN", "logs/dup")


@contextlib.contextmanager
def instrumented(**settings: Any) -> Iterator[None]:
    instrumentor = KafkaPythonInstrumentor()
    # What `process_span` works with may be left from before it was instrumented.
    process_span_module.use(None)
    instrumentor.instrument(**settings)
    try:
        yield
    finally:
        instrumentor.uninstrument()


def first_lines(log: Log) -> list[str]:
    return [message.splitlines()[0] for message in log.take()]


class ChaosError(Exception):
    """What is raised in OpenTelemetry's name."""


def test_the_service_sees_the_same_with_and_without_instrumentation(
    service: Service, plain: list[Any]
) -> None:
    recorder = Recorder()
    for each in settings(recorder):
        with instrumented(**each):
            assert service.story() == plain
    assert recorder.open() == []
    # It makes every kind of span.
    kinds = {name.split()[0] for name in recorder.names()}
    assert kinds >= {"send", "poll", "process", "commit"}


def test_no_call_into_opentelemetry_is_missing_from_the_list(
    service: Service, plain: list[Any]
) -> None:
    """What the interpreter sees of a service at work, the source has told."""
    sites = {
        (site.module.__file__, line)
        for site in SITES
        for line in range(site.first_line, site.last_line + 1)
    }
    unknown: set[tuple[str, int, str]] = set()
    known: set[tuple[str, int, str]] = set()

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        called, caller = frame.f_code, frame.f_back
        if event != "call" or caller is None:
            return
        path = Path(caller.f_code.co_filename)
        if path.stem in ELSEWHERE:
            return
        if path.parent == PACKAGE and f"{os.sep}opentelemetry{os.sep}" in (
            called.co_filename
        ):
            place = str(path), caller.f_lineno
            (known if place in sites else unknown).add((*place, called.co_name))

    for each in settings(Recorder()):
        previous = sys.getprofile()
        sys.setprofile(profile)
        try:
            with instrumented(**each):
                assert service.story() == plain
        finally:
            sys.setprofile(previous)
    unknown = {
        where
        for where in unknown
        # Whether the contrib package is there is asked of that, not of OpenTelemetry.
        if where[2] not in NO_CHAOS and Path(where[0]).stem != "_coexistence"
    }
    assert unknown == set()
    assert len(known) > len(SITES) / 2


@pytest.mark.parametrize("site", SITES, ids=name_of)
def test_a_call_that_raises_changes_nothing_and_is_logged_once(
    service: Service, plain: list[Any], site: Site, log: Log
) -> None:
    recorder = Recorder()
    chaos = Chaos(ChaosError)
    here = contextvars.copy_context()
    before = context.get_current()
    for each in settings(recorder):
        with at(site, chaos), instrumented(**each):
            assert here.run(service.story) == plain
        if chaos.struck:
            break
    assert chaos.struck > 1
    logged = first_lines(log)
    assert logged
    assert len(set(logged)) == len(logged)
    assert here.run(context.get_current) == before
    # A call that should have ended a span is the only one that leaves it open.
    assert site.name == "end" or recorder.open() == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, TimeLimit])
@pytest.mark.parametrize("site", SITES, ids=name_of)
def test_an_interrupt_in_a_call_reaches_the_application_and_breaks_nothing(
    service: Service,
    plain: list[Any],
    site: Site,
    interrupt: type[BaseException],
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder()
    here = contextvars.copy_context()
    before = context.get_current()
    struck = 0
    ignored: list[Any] = []
    monkeypatch.setattr(
        sys, "unraisablehook", lambda unraisable: ignored.append(unraisable.exc_type)
    )

    def story() -> list[Any]:
        """Interrupted in each of its steps, if it makes the call there."""
        nonlocal struck
        told = []
        for step in service.STEPS:
            chaos = Chaos(interrupt, times=1, on_main=True)
            with at(site, chaos):
                ((name, seen),) = service.story(step)
            struck += chaos.struck
            # What is raised in a finaliser (that of a loop's iterator, as the loop
            # is left) Python ignores, and nobody can change that.
            interrupts = [each for each in [*seen, *ignored] if each is interrupt]
            ignored.clear()
            if chaos.in_callback:
                service.forget_consumer()
            # kafka-python logs an Exception out of a callback.
            if interrupt is KeyboardInterrupt or not chaos.in_callback:
                assert len(interrupts) == chaos.struck, name
            told.append((name, seen))
        return told

    for each in settings(recorder):
        chaos = Chaos(interrupt, times=1)
        with at(site, chaos):
            try:
                KafkaPythonInstrumentor().instrument(**each)
            except interrupt:
                KafkaPythonInstrumentor().instrument(**each)
        struck += chaos.struck
        try:
            here.run(story)
            assert here.run(service.story) == plain
        finally:
            KafkaPythonInstrumentor().uninstrument()
        if struck:
            break
    log.take()
    assert struck
    assert here.run(context.get_current) == before


@pytest.mark.parametrize(
    "site", [site for site in SITES if site.is_implemented], ids=name_of
)
def test_no_call_ends_the_senders_thread(
    service: Service, plain: list[Any], site: Site, log: Log
) -> None:
    """As a span processor could that ends the program on a thread of its own."""
    chaos = Chaos(SystemExit, on_main=False)
    recorder = Recorder()
    with at(site, chaos), instrumented(**settings(recorder)[0]):
        # It sends on after every failure.
        assert service.story() == plain
    logged = first_lines(log)
    assert bool(chaos.struck) == bool(logged)
    assert len(set(logged)) == len(logged)
    # At least what says how a delivery has ended is called there.
    assert chaos.struck or site.function not in {"fail", "end"}


# What stands behind the calls: the parts of an SDK that others may have written.
BEHIND: dict[str, tuple[tuple[Any, str], ...]] = {
    "sampler": ((RecordingSampler, "should_sample"),),
    "processor's start": ((Recorder, "on_start"),),
    "processor's end": ((Recorder, "on_end"),),
    "propagator's inject": ((TraceContextTextMapPropagator, "inject"),),
    "propagator's extract": ((TraceContextTextMapPropagator, "extract"),),
    "propagator's fields": ((TraceContextTextMapPropagator, "fields"),),
    "baggage propagator's inject": ((W3CBaggagePropagator, "inject"),),
    "baggage propagator's extract": ((W3CBaggagePropagator, "extract"),),
    "runtime context": (
        (ContextVarsRuntimeContext, "attach"),
        (ContextVarsRuntimeContext, "detach"),
        (ContextVarsRuntimeContext, "get_current"),
    ),
    "runtime context's attach": ((ContextVarsRuntimeContext, "attach"),),
    "runtime context's get_current": ((ContextVarsRuntimeContext, "get_current"),),
}


@pytest.mark.parametrize("part", BEHIND)
def test_a_part_behind_the_api_that_raises_changes_nothing_and_is_logged_once(
    service: Service, part: str, log: Log
) -> None:
    chaos = Chaos(ChaosError)
    recorder = Recorder()
    here = contextvars.copy_context()
    with chaos.at(*BEHIND[part]):
        # The service, too, makes spans current, and that fails with or without us.
        expected = here.run(service.story)
    chaos.struck = 0
    with instrumented(**settings(recorder)[0]), chaos.at(*BEHIND[part]):
        assert here.run(service.story) == expected
    assert chaos.struck > 1
    logged = first_lines(log)
    assert logged
    assert len(set(logged)) == len(logged)


def test_where_no_context_can_be_detached_that_around_a_scope_is_restored(
    service: Service, plain: list[Any], log: Log
) -> None:
    """OpenTelemetry logs that itself, each time."""
    chaos = Chaos(ChaosError)
    here = contextvars.copy_context()
    before = context.get_current()
    expected = [told for told in plain if told[0] in {"loops", "loops_over_a_batch"}]
    with (
        instrumented(tracer_provider=Recorder().tracer_provider),
        chaos.at((ContextVarsRuntimeContext, "detach")),
    ):
        told = here.run(service.story, Service.loops, Service.loops_over_a_batch)
    assert told == expected
    assert here.run(context.get_current) == before
    assert chaos.struck > 1
    assert set(first_lines(log)) == {"Failed to detach context"}
