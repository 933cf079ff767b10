"""The time that messages take from the first send of their pipeline.

The start of a pipeline travels as one entry of the W3C baggage: `kafka.pipeline`, with
the milliseconds since the epoch and the topic of the first send, as in
`1700000000000-orders`. None of its characters is a delimiter or needs an escape, so the
propagators of all languages pass it on unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from opentelemetry import baggage
from opentelemetry.context import Context
from opentelemetry.metrics import Histogram
from opentelemetry.trace import INVALID_SPAN, Span

from otel_kafka_python import _endings
from otel_kafka_python._attributes import Attributes, pipeline_attributes
from otel_kafka_python._propagation import (
    BAGGAGE_KEY,
    SPAN_KEY,
    extract,
    inject_baggage,
    may_carry_context,
)
from otel_kafka_python._safety import report
from otel_kafka_python._semconv import ERROR_OTHER, KAFKA_PIPELINE

_ENTRY = re.compile(r"([0-9]{1,15})-([a-zA-Z0-9._-]{1,249})")
_MS = 1_000_000  # in nanoseconds

# A clock may be behind by as much as Kafka lets a timestamp be ahead. A time further in
# the future, or older than the maximal age, is not a valid start.
_MAX_AHEAD = 3600 * 1000 * _MS
_MAX_AGE = 30 * 24 * 3600 * 1000 * _MS

# The first topics come from other services, so their number needs a limit.
_MAX_SOURCES = 100


class Start(NamedTuple):
    """The first send of a pipeline."""

    began: int  # in nanoseconds since the epoch
    topic: str


def start_in(context: Context, now: int) -> Start | None:
    """The start in the baggage of a context, if there is a valid one.

    Args:
        context: The context.
        now: Nanoseconds since the epoch.
    """
    entry = None
    try:
        if context:
            entry = baggage.get_baggage(KAFKA_PIPELINE, context)
    except Exception:
        report("read the start of a pipeline")
    found = _ENTRY.fullmatch(entry) if isinstance(entry, str) else None
    if found is None:
        return None
    start = Start(int(found[1]) * _MS, found[2])
    return start if -_MAX_AHEAD <= now - start.began <= _MAX_AGE else None


def context_with_start(start: Start, context: Context) -> Context:
    """The context, with a start in its baggage."""
    try:
        entry = f"{start.began // _MS}-{start.topic}"
        entries = {**baggage.get_all(context), KAFKA_PIPELINE: entry}
    except Exception:
        report("carry the start of a pipeline")
        return context
    return Context({**context, BAGGAGE_KEY: entries})


def context_to_send(
    headers: Any, context: Context, processed: Start | None, topic: str, now: int
) -> Context:
    """The context that a message takes along, with the start of its pipeline.

    Args:
        headers: The headers that the application passed to `send`. Those of a
            forwarded record have its start.
        context: The context in which the message is sent.
        processed: The start of the record that is being processed without a span, so
            that no context has it.
        topic: The message's topic, in which a pipeline starts if none has started.
        now: Nanoseconds since the epoch.
    """
    if may_carry_context(headers):
        forwarded = start_in(extract(headers)[0], now)
        if forwarded is not None:
            return context_with_start(forwarded, context)
    if start_in(context, now) is not None:
        return context
    return context_with_start(processed or Start(now, topic), context)


def headers_with_start(headers: Any, context: Context, now: int) -> Any:
    """Headers that keep their creation context, with the start of their pipeline.

    Args:
        headers: The headers that the application passed to `send`.
        context: The context that `context_to_send` returned.
        now: Nanoseconds since the epoch.
    """
    carried, _ = extract(headers)
    start = start_in(context, now)
    if start is None or start_in(carried, now) is not None:
        return headers
    return inject_baggage(headers, context_with_start(start, carried))


class Sources:
    """The first topics of the known pipelines, as values of an attribute."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def name(self, topic: str) -> str:
        """The topic, or `_OTHER` once there are too many different ones."""
        if topic not in self._known:
            if len(self._known) >= _MAX_SOURCES:
                return ERROR_OTHER
            self._known.add(topic)
        return topic


class Arrival(NamedTuple):
    """A message whose time in the pipeline is measured when its processing ends."""

    histogram: Histogram
    began: int
    attributes: Attributes

    def measure(self, ended: int, context: Context | None) -> None:
        """Measure its time in the pipeline.

        Args:
            ended: When its processing ended, in nanoseconds since the epoch.
            context: The context with the span for the exemplar.
        """
        seconds = max(0, ended - self.began) / 1e9
        self.histogram.record(seconds, self.attributes, context)


class Destination:
    """A topic and a group, at which the times of pipelines are measured.

    Args:
        histogram: The histogram; None if nobody collects it.
        attributes: The attributes of the counted records.
        sources: The known topics of first sends.
    """

    __slots__ = ("_attributes", "_by_source", "_histogram", "_sources")

    def __init__(
        self, histogram: Histogram | None, attributes: Attributes, sources: Sources
    ) -> None:
        self._histogram = histogram
        self._attributes = attributes
        self._sources = sources
        self._by_source: dict[str, Attributes] = {}

    def arrival(self, start: Start | None) -> Arrival | None:
        """The arrival of a message of a pipeline, if it is measured."""
        if start is None or self._histogram is None:
            return None
        source = self._sources.name(start.topic)
        attributes = self._by_source.get(source)
        if attributes is None:
            attributes = pipeline_attributes(source, self._attributes)
            self._by_source[source] = attributes
        return Arrival(self._histogram, start.began, attributes)


def measure(arrivals: Collection[Arrival], ended: int, context: Context | None) -> None:
    """Measure the time in the pipeline of messages whose processing has ended.

    Args:
        arrivals: The messages.
        ended: When it ended, in nanoseconds since the epoch.
        context: The context with the span for the exemplar; the current one if None.
    """
    try:
        for arrival in arrivals:
            arrival.measure(ended, context)
    except Exception:
        report("record a metric")


# The records that were handed over and not processed, by the identity of their headers.
# Each has the arrivals of all records that were handed over together.
_unprocessed: dict[int, dict[int, Arrival]] = {}


def forget_handover(headers: object) -> None:
    """Note that a record is processed: its handover does not end its pipeline.

    Args:
        headers: The record's headers.
    """
    arrivals = _unprocessed.pop(id(headers), None)
    if arrivals is not None:
        arrivals.pop(id(headers), None)


class Handover(_endings.Endable):
    """Records that were handed to the application together.

    The consumer keeps this object until it is asked for more records, and so does the
    list that may be looped over. Records that are not processed by then arrived when
    they were handed over.

    Args:
        arrivals: The arrivals of the records, by the identity of the headers of each.
        headers: The headers. They are kept so that their identities stay theirs, even
            if the application drops the records.
        at: When they were handed over, in nanoseconds since the epoch.
        span: The span that accounts for them, if there is one.
    """

    __slots__ = ("_arrivals", "_at", "_headers", "_span")

    def __init__(
        self,
        arrivals: Mapping[int, Arrival],
        headers: Sequence[object],
        at: int,
        span: Span | None,
    ) -> None:
        self.begun_in, self.has_ended = _endings.this_process, False
        self._headers = headers
        self._arrivals = dict(arrivals)
        self._at = at
        self._span = span
        _unprocessed.update(dict.fromkeys(self._arrivals, self._arrivals))

    def abandon(self, ended: int) -> None:  # noqa: ARG002 (as overridden)
        """Measure the records that were not processed."""
        if self.begun_in is not _endings.this_process:
            return
        self._forget()
        arrivals, self._arrivals = self._arrivals, {}
        self.has_ended = True
        span = INVALID_SPAN if self._span is None else self._span
        measure(arrivals.values(), self._at, Context({SPAN_KEY: span}))

    def _forget(self) -> None:
        for identity in list(self._arrivals):
            if _unprocessed.get(identity) is self._arrivals:
                del _unprocessed[identity]

    def __del__(self) -> None:
        # An interrupt may have left it half made.
        if getattr(self, "_arrivals", None):
            self._forget()
            _endings.defer(self)
