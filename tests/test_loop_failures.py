"""A loop whose body raises: what its last process span and the metric say."""

from __future__ import annotations

import asyncio
import bdb
import gc
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
from opentelemetry.trace import StatusCode
from tqdm import tqdm

from clients import Clients, poll
from otel_kafka_python import process_span
from otel_kafka_python._processing import loops
from recorder import Log, Recorder
from scripts import run

pytestmark = pytest.mark.one_broker

NAMES = sys.version_info >= (3, 12)


class Failed(Exception):  # noqa: N818 (it is what it is)
    """What a body raises."""


@pytest.fixture(autouse=True)
def _no_collection_by_chance() -> Iterator[None]:
    """A loop that ends while another thread collects may be taken for a dropped one."""
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(100_000, *before[1:])
    yield
    gc.set_threshold(*before)


def polled(clients: Clients) -> Any:
    ((_, records),) = poll(clients.consumer()).items()
    return records


def valid(clients: Clients) -> Generator[Any, None, None]:
    for record in clients.consumer():
        yield record


def careful(clients: Clients) -> Generator[Any, None, None]:
    try:
        yield from valid(clients)
    finally:
        str(clients)


def tidy(clients: Clients) -> Iterator[Any]:
    for record in clients.consumer():
        try:
            yield record
        finally:
            str(clients)


SOURCES: dict[str, Callable[[Clients], Any]] = {
    "consumer": lambda clients: clients.consumer(),
    "polled": polled,
    "reversed": lambda clients: reversed(polled(clients)),
    "enumerate": lambda clients: enumerate(clients.consumer()),
    "zip": lambda clients: zip(clients.consumer(), range(9), strict=False),
    "tqdm": lambda clients: tqdm(clients.consumer(), disable=None),
    "generator": valid,
    "generators": careful,
    "generator with a try": tidy,
    "generator expression": lambda clients: (r for r in clients.consumer()),
}


def check_failed(recorder: Recorder, topic: str, error: Exception) -> None:
    """The only process span, and its measurement, have failed so."""
    span = recorder.one(f"process {topic}")
    assert span.status.status_code is StatusCode.ERROR
    kind = type(error).__qualname__ if NAMES else "_OTHER"
    assert span.attributes is not None
    assert span.attributes["error.type"] == kind
    assert recorder.count("messaging.process.duration", error_type=kind) == 1
    events = [event.attributes for event in span.events]
    if NAMES:
        assert span.status.description == str(error)
        assert [each["exception.message"] for each in events if each] == [str(error)]
    else:
        assert not events


def check_not_failed(recorder: Recorder, topic: str) -> None:
    span = recorder.one(f"process {topic}")
    assert span.status.status_code is StatusCode.UNSET
    assert "error.type" not in (span.attributes or {})
    assert not span.events


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_an_exception_that_ends_a_loop_is_its_spans(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    source: Callable[[Clients], Any],
) -> None:
    clients.send(b"1")
    with pytest.raises(Failed) as raised:
        for _ in source(clients):
            raise Failed("too bad")
    check_failed(recorder, topic, raised.value)


@pytest.mark.parametrize("tried", [False, True])
def test_an_old_exception_that_is_raised_again_is_an_error_like_any_other(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, tried: bool
) -> None:
    """It is not among the youngest objects: the scan is of these alone."""
    clients.send(b"1")
    done: Future[None] = Future()
    error = Failed("old")
    if tried:
        with suppress(Failed):
            raise error
    done.set_exception(error)
    gc.collect()
    with pytest.raises(Failed) as raised:
        for _ in clients.consumer():
            done.result()
    assert raised.value is error
    span = recorder.one(f"process {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "_OTHER"
    assert span.status.status_code is StatusCode.ERROR


def fail_in_call(clients: Clients) -> None:
    for _ in clients.consumer():
        int("x")


def fail_in_subscript(clients: Clients) -> None:
    for _ in clients.consumer():
        dict[str, str]()["key"]


def fail_again(clients: Clients) -> None:
    for _ in clients.consumer():
        try:
            int("x")
        except ValueError:  # noqa: TRY203 (that is what is tested)
            raise


def fail_for_another(clients: Clients) -> None:
    for _ in clients.consumer():
        try:
            int("x")
        except ValueError as error:
            raise KeyError("x") from error


def fail_in_with(clients: Clients) -> None:
    for _ in clients.consumer():
        with suppress(KeyError):
            int("x")


def fail_in_finally(clients: Clients) -> None:
    for _ in clients.consumer():
        try:
            int("x")
        finally:
            str(clients)


def fail_in_module(clients: Clients) -> None:
    exec("for _ in consumer: int('x')", {"consumer": clients.consumer()})


def fail_in_class(clients: Clients) -> None:
    class _Body:
        for _ in clients.consumer():
            int("x")


def fail_in_coroutine(clients: Clients) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        int("x")

    async def run() -> None:
        for _ in clients.consumer():
            await asyncio.sleep(0)
            await asyncio.create_task(fail())

    asyncio.run(run())


def fail_in_inner_loop(clients: Clients) -> None:
    for _ in clients.consumer():
        for text in "1x":
            int(text)


def fail_in_generator(clients: Clients) -> None:
    def parsed() -> Iterator[int]:
        for _ in clients.consumer():
            yield 1
            int("x")

    for _ in parsed():
        pass


def fail_while_traced(clients: Clients) -> None:
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        fail_in_call(clients)
    finally:
        sys.settrace(before)


def fail_while_monitored(clients: Clients) -> None:
    monitoring: Any = getattr(sys, "monitoring", None)
    if monitoring is None:
        pytest.skip("sys.monitoring is new in Python 3.12")
    tool, events = monitoring.PROFILER_ID, monitoring.events
    monitoring.use_tool_id(tool, "test")
    monitoring.register_callback(tool, events.RAISE, lambda *_: None)
    monitoring.set_events(tool, events.INSTRUCTION | events.LINE | events.RAISE)
    try:
        fail_in_call(clients)
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


def fail_while_debugged(clients: Clients) -> None:
    # As `pdb` steps through it.
    class Stepper(bdb.Bdb):
        def user_line(self, _: FrameType) -> None:
            self.set_step()

        def user_exception(self, *_: Any) -> None:
            self.set_step()

    before = sys.gettrace()
    try:
        Stepper().runcall(fail_in_call, clients)
    finally:
        sys.settrace(before)


def fail_while_measured(clients: Clients) -> None:
    coverage = pytest.importorskip("coverage")
    # This run may be measured itself. A second measurement would keep it from saving
    # its data.
    if coverage.Coverage.current() is not None:
        fail_in_call(clients)
        return
    measured = coverage.Coverage(data_file=None, branch=True)
    before = sys.gettrace()
    measured.start()
    try:
        fail_in_call(clients)
    finally:
        measured.stop()
        sys.settrace(before)


def fail_in_greenlet(clients: Clients) -> None:
    greenlet = pytest.importorskip("gevent").spawn(fail_in_call, clients)
    greenlet.get()


FAILURES = [
    fail_in_call, fail_in_subscript, fail_again, fail_for_another, fail_in_with,
    fail_in_finally, fail_in_module, fail_in_class, fail_in_coroutine,
    fail_in_inner_loop, fail_in_generator, fail_while_traced, fail_while_monitored,
    fail_while_debugged, fail_while_measured, fail_in_greenlet,
]  # fmt: skip


@pytest.mark.parametrize("fail", FAILURES)
def test_however_a_body_fails_its_span_says_so(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    fail: Callable[[Clients], None],
) -> None:
    clients.send(b"1")
    with pytest.raises((ValueError, KeyError)) as raised:
        fail(clients)
    check_failed(recorder, topic, raised.value)


def leave_by_break(clients: Clients) -> None:
    for _ in clients.consumer():
        try:
            int("x")
        except ValueError:
            break


def leave_by_return(clients: Clients) -> None:
    for _ in clients.consumer():
        try:
            int("x")
        finally:
            return  # noqa: B012 (it swallows)


def leave_by_end(clients: Clients) -> None:
    for _ in clients.finite(1):
        with suppress(ValueError):
            int("x")


def leave_by_time_out(clients: Clients) -> None:
    for _ in clients.consumer(consumer_timeout_ms=3000):
        pass


def leave_by_close(clients: Clients) -> None:
    consumer = clients.consumer()
    for _ in consumer:
        consumer.close()


def leave_by_system_exit(clients: Clients) -> None:
    for _ in clients.consumer():
        sys.exit(3)


def leave_by_raised_system_exit(clients: Clients) -> None:
    for _ in valid(clients):
        raise SystemExit


def leave_by_interrupt(clients: Clients) -> None:
    for _ in clients.consumer():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)


def cancel(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine in a task, and cancel it once it waits."""

    async def run() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(run())


def leave_by_cancellation(clients: Clients) -> None:
    async def loop() -> None:
        for _ in clients.consumer():
            await asyncio.sleep(60)

    cancel(loop)


def leave_by_closing_a_coroutine(clients: Clients) -> None:
    async def loop() -> None:
        for _ in clients.consumer():
            await asyncio.sleep(0)

    coroutine = loop()
    coroutine.send(None)
    coroutine.close()


def leave_by_closing_a_generator(clients: Clients) -> None:
    generator = careful(clients)
    for _ in generator:
        break
    generator.close()


def leave_a_tidy_generator(clients: Clients) -> None:
    for _ in tidy(clients):
        break


def leave_a_variable(clients: Clients) -> None:
    iterator = iter(clients.consumer())
    with suppress(ValueError):
        for _ in iterator:
            int("x")
    del iterator


def leave_a_cleared_container(clients: Clients) -> None:
    kept = {"iterator": iter(clients.consumer())}
    for _ in kept["iterator"]:
        break
    kept.clear()


def leave_in_another_function(clients: Clients) -> None:
    kept = [iter(clients.consumer())]
    for _ in kept[0]:
        break

    def lose() -> Any:
        return kept.pop(), int("x")

    with suppress(ValueError):
        lose()


def grow_old() -> None:
    """Let an exception wait until it is not among the youngest objects any more."""
    gc.collect()
    gc.collect(0)


def leave_by_old_exit(clients: Clients) -> None:
    for _ in clients.consumer():
        try:
            sys.exit(3)
        finally:
            grow_old()


def leave_by_old_exit_of_a_call(clients: Clients) -> None:
    for _ in clients.consumer():
        leave_by_old_exit_at_once()


def leave_by_old_exit_at_once() -> None:
    try:
        sys.exit(3)
    finally:
        grow_old()


def leave_by_old_exit_that_is_raised_again(clients: Clients) -> None:
    for _ in clients.consumer():
        try:
            sys.exit(3)
        except SystemExit as error:
            grow_old()
            raise error  # noqa: TRY201 (that is what is tested)


def leave_by_old_cancellation(clients: Clients) -> None:
    async def loop() -> None:
        for _ in clients.consumer():
            try:
                await asyncio.sleep(60)
            finally:
                grow_old()

    cancel(loop)


def leave_a_generator_that_takes_long_to_close(clients: Clients) -> None:
    def slow() -> Iterator[Any]:
        for record in clients.consumer():
            try:
                yield record
            finally:
                grow_old()

    for _ in slow():
        break


LEAVINGS = [
    leave_by_break, leave_by_return, leave_by_end, leave_by_time_out, leave_by_close,
    leave_by_system_exit, leave_by_raised_system_exit, leave_by_interrupt,
    leave_by_cancellation, leave_by_closing_a_coroutine, leave_by_closing_a_generator,
    leave_a_variable, leave_a_cleared_container, leave_in_another_function,
    leave_by_old_exit, leave_by_old_exit_of_a_call,
    leave_by_old_exit_that_is_raised_again, leave_by_old_cancellation,
    leave_a_generator_that_takes_long_to_close,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("leave", LEAVINGS)
def test_what_is_no_failure_of_the_body_is_no_error(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    leave: Callable[[Clients], None],
) -> None:
    clients.send(b"1")
    with suppress(SystemExit, KeyboardInterrupt, asyncio.CancelledError):
        leave(clients)
    gc.collect()
    check_not_failed(recorder, topic)


@pytest.mark.parametrize(
    "leave",
    [leave_by_closing_a_generator, leave_by_old_cancellation, leave_a_tidy_generator],
)
def test_where_nothing_is_searched_what_is_thrown_in_is_no_error(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    leave: Callable[[Clients], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loops, "_is_searchable", lambda: False)
    clients.send(b"1")
    with suppress(asyncio.CancelledError):
        leave(clients)
    check_not_failed(recorder, topic)


def test_where_collections_are_rare_older_objects_are_not_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    younger = loops._Traces([], [], set())
    monkeypatch.setattr(gc, "get_count", lambda: (0, 100, 0))
    assert loops._search_older(sys._getframe(), younger) is younger


@pytest.mark.parametrize("caught", [False, True])
def test_an_exception_that_process_span_has_seen_is_recorded_once(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, caught: bool
) -> None:
    clients.send(b"1")
    try:
        for record in clients.consumer():
            try:
                with process_span(record):
                    raise Failed("once")
            except Failed:
                if not caught:
                    raise
                break
    except Failed:
        pass
    span = recorder.one(f"process {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "Failed"
    assert [event.name for event in span.events] == ["exception"]


def test_nothing_of_a_failed_loop_is_kept(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    class Local:
        pass

    clients.send(b"1")
    local = Local()
    kept: list[weakref.ref[Any]] = [weakref.ref(local)]

    def fail(local: Local) -> None:
        for _ in clients.consumer():
            raise Failed(local)

    gc.disable()  # references alone are to let it go
    try:
        try:
            fail(local)
        except Failed as error:
            kept.append(weakref.ref(error))
        del local
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()
    assert recorder.one(f"process {topic}").status.status_code is StatusCode.ERROR


def test_the_iterator_is_not_kept_by_the_exception(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    try:
        for _ in clients.consumer():
            raise Failed
    except Failed:
        # Already, while the exception is being handled.
        assert not recorder.open()
    assert recorder.one(f"process {topic}").status.status_code is StatusCode.ERROR


def collector_disabled() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def collector_frozen() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


def heap_large() -> Iterator[None]:
    kept = [[] for _ in range(100_000)]  # type: ignore[var-annotated]
    gc.disable()
    kept += [[] for _ in range(100_000)]
    yield
    gc.enable()


@pytest.mark.parametrize("around", [collector_disabled, collector_frozen, heap_large])
def test_whatever_the_collector_does_the_answer_is_right_or_other(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    around: Callable[[], Iterator[None]],
) -> None:
    clients.send(b"1")
    consumer = clients.consumer()
    state = around()
    next(state)
    try:
        for _ in consumer:
            raise Failed
    except Failed:
        pass
    finally:
        next(state, None)
    span = recorder.one(f"process {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] in ("Failed", "_OTHER")
    assert span.status.status_code is StatusCode.ERROR


def test_a_kept_exception_is_not_taken_for_the_one_that_ends_the_loop(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"0", b"1", b"2")
    consumer = clients.consumer()
    kept = []
    for number in range(3):
        try:
            for _ in consumer:
                raise Failed(number)
        except Failed as error:
            kept.append(error)
    spans = recorder.named(f"process {topic}")
    said = [span.status.description for span in spans]
    assert said == (["0", "1", "2"] if NAMES else ["an exception ended the loop"] * 3)


def test_where_nothing_can_be_found_an_error_is_other(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loops, "_is_searchable", lambda: False)
    clients.send(b"1")
    with suppress(ValueError):
        fail_in_call(clients)
    span = recorder.one(f"process {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "_OTHER"


def test_what_fails_in_looking_for_it_is_logged_and_changes_nothing(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    log: Log,
) -> None:
    def fail(frame: Any, generation: int) -> Any:
        raise RuntimeError

    monkeypatch.setattr(loops, "_search", fail)
    clients.send(b"1")
    with pytest.raises(ValueError):
        fail_in_call(clients)
    check_not_failed(recorder, topic)
    (message,) = log.take()
    assert "see how a loop ended" in message


FIRST_FAILURE = """
import gc, sys
from otel_kafka_python._processing import loops

class Items:
    def __iter__(self):
        return self

    def __next__(self):
        frame = sys._getframe(1)
        self.code = frame.f_code
        assert loops.is_loop(frame)
        return 1

    def __del__(self):
        print(loops.failure(
            sys._getframe(1), self.code, loops.Asker.LOOP, loops.references_to_stops()
        ))

def fail():
    for _ in Items():
        # A collection of two generations is due after 200 more objects.
        gc.set_threshold(100_000, 1, 10)
        gc.collect()
        gc.collect(0)
        gc.collect(0)
        gc.set_threshold(gc.get_count()[0] + 200, 1, 10)
        int("x")

try:
    fail()
except ValueError:
    pass
"""


@pytest.mark.cpython
def test_the_first_failure_of_a_process_is_found_although_a_collection_is_near() -> (
    None
):
    done = run(FIRST_FAILURE)
    named = "ValueError(\"invalid literal for int() with base 10: 'x'\")"
    is_named = NAMES and "free-threading" not in sys.version
    failure = f"LoopFailure(error={named if is_named else None})\n"
    assert done.stdout == failure, done.stderr
