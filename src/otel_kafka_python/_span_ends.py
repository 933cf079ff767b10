"""How the span of an answered request ends without delaying other answers.

kafka-python calls back with the answers on its I/O thread. If a span processor exports
each span as it ends and waits for a collector that hangs, it delays all messages of the
producer until they expire. Such spans end on a thread of this package. If a custom
processor blocks, a warning says so, even if the processor never returns.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from opentelemetry.trace import Span

from otel_kafka_python._clock import Clock
from otel_kafka_python._safety import is_new, logger, report

# How long a custom processor may delay other answers, in nanoseconds.
_LONGEST_END = 1_000_000_000
# The default queue size of a BatchSpanProcessor.
_MOST_WAITING = 2048
_SECONDS_AT_EXIT = 5.0


class _Ender:
    """The thread that ends spans, and the spans that wait for it."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[Span, int]] = queue.Queue(_MOST_WAITING)
        self._takes_more = _start("otel-kafka-python-span-ends", self._run)
        # This handler is newer than the provider's, so it runs first.
        atexit.register(self._stop)

    def end(self, span: Span, ended: int) -> None:
        """End a span soon, in the order of the calls."""
        if self._takes_more:
            self._waiting.put_nowait((span, ended))
        else:
            span.end(ended)

    def _run(self) -> None:
        while True:
            span, ended = self._waiting.get()
            try:
                span.end(ended)
            except BaseException:
                report("end a span")
            self._waiting.task_done()

    def _stop(self) -> None:
        waiting = self._waiting
        with waiting.all_tasks_done:
            waiting.all_tasks_done.wait_for(
                lambda: not waiting.unfinished_tasks, _SECONDS_AT_EXIT
            )
        self._takes_more = False


class _Watch:
    """The thread that warns while a custom processor does not return.

    It wakes at most once a second, and only if spans end.
    """

    def __init__(self) -> None:
        # The spans that custom processors have now, and since when.
        self.begun: dict[Span, int] = {}
        # Whether it sleeps until it is woken. Waking it costs more than this check.
        self.sleeps = False
        self.woken = threading.Event()
        _start("otel-kafka-python-watch", self._run)

    def _run(self) -> None:
        while True:
            # An end that begins between these lines sees that this sleeps, or is seen.
            self.sleeps = True
            if not self.begun:
                self.woken.wait()
            self.woken.clear()
            self.sleeps = False
            time.sleep(_LONGEST_END / 1e9)
            began = min(self.begun.copy().values(), default=None)
            if began is None:
                continue
            elapsed = Clock.monotonic_ns() - began
            if elapsed > _LONGEST_END:
                _warn_of_delay(elapsed)
                return


_watch = cache(_Watch)
_ender: _Ender | None = None
_lock = threading.Lock()


class _Processors(NamedTuple):
    """The span processors of a provider, and how a span of it ends."""

    given: object = None  # the SDK's tuple, which adding a processor replaces
    one_exports_at_once: bool = False
    watch: _Watch | None = None  # if one is custom


# The processors of the last span.
_known = _Processors()


def end_span(span: Span, ended: int) -> None:
    """End a span, on another thread if its processors are known to block this one.

    Args:
        span: The span.
        ended: When it ended, in nanoseconds since the epoch.
    """
    global _known  # noqa: PLW0603 (a cache of one entry)
    # A span that is not recorded, or not the SDK's, has no processor.
    own: Any = getattr(span, "_span_processor", None)
    if own is None:
        span.end(ended)
        return
    known = _known
    if known.given is not own._span_processors:
        known = _known = _examine(own)
    if known.one_exports_at_once:
        _running().end(span, ended)
    elif known.watch is None:
        span.end(ended)
    else:
        _end_watched(span, ended, known.watch)


def _examine(processor: Any) -> _Processors:
    parts = [*_parts(processor)]
    return _Processors(
        processor._span_processors,
        any(map(_exports_at_once, parts)),
        _watch() if any(map(_is_custom, parts)) else None,
    )


def _end_watched(span: Span, ended: int, watch: _Watch) -> None:
    """End a span, and warn if that delays other answers."""
    began = Clock.monotonic_ns()
    watch.begun[span] = began
    if watch.sleeps:
        watch.woken.set()
    try:
        span.end(ended)
    finally:
        del watch.begun[span]
    elapsed = Clock.monotonic_ns() - began
    if elapsed > _LONGEST_END:
        _warn_of_delay(elapsed)


def _parts(processor: Any) -> Iterator[Any]:
    """The processors that a processor consists of."""
    parts = getattr(processor, "_span_processors", None)
    if parts is None:
        yield processor
    else:
        for part in parts:
            yield from _parts(part)


def _exports_at_once(processor: Any) -> bool:
    """Whether an SDK processor exports each span as it ends, out of the process."""
    sdk = sys.modules.get("opentelemetry.sdk.trace.export")
    if sdk is None or not isinstance(processor, sdk.SimpleSpanProcessor):
        return False
    # The SDK's own exporters write to memory or to the console.
    return _is_custom(getattr(processor, "span_exporter", None))


def _is_custom(part: Any) -> bool:
    """Whether a part of an SDK is not the SDK's own."""
    return not type(part).__module__.startswith("opentelemetry.sdk.")


def _warn_of_delay(elapsed: int) -> None:
    """Warn, once, that the end of a span delays other answers.

    Args:
        elapsed: How long it has taken until now, in nanoseconds.
    """
    if is_new("a delay of answers"):
        logger.warning(
            "The end of a span has delayed kafka-python by %.1f seconds, and messages "
            "may expire meanwhile; export with a BatchSpanProcessor, and let a custom "
            "span processor do slow work on another thread (see 'The end of spans' on "
            "the page 'Limits' of the documentation)",
            elapsed / 1e9,
        )


def _start(name: str, run: Callable[[], None]) -> bool:
    """Start a thread, unless this is the exit, and return whether it was started."""
    # At the exit, nothing would wait for that thread, or for a span that waits for it.
    if not threading.main_thread().is_alive():
        return False
    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError:
        return False
    return True


def _running() -> _Ender:
    global _ender  # noqa: PLW0603 (there is one thread)
    with _lock:
        if _ender is None:
            _ender = _Ender()
        return _ender


def _after_fork_in_child() -> None:
    global _ender, _known, _lock  # noqa: PLW0603 (the threads are the parent's)
    if _ender is not None:
        atexit.unregister(_ender._stop)
    _watch.cache_clear()
    _known = _Processors()
    _ender = None
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
