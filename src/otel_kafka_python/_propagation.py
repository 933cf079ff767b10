"""Headers in, headers out: creation contexts read from and written to records."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry import baggage, propagate
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.textmap import Getter, TextMapPropagator
from opentelemetry.trace import (
    INVALID_SPAN,
    NonRecordingSpan,
    Span,
    SpanContext,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from otel_kafka_python._safety import report
from otel_kafka_python._semconv import KAFKA_PIPELINE

Header = tuple[str, bytes]

EMPTY = Context()

# The key of the span in a context. Building a context with this key takes half the time
# of `set_span_in_context`, which copies the context.
(SPAN_KEY,) = set_span_in_context(INVALID_SPAN, EMPTY)

# The key of the baggage in a context.
(BAGGAGE_KEY,) = baggage.set_baggage("entry", "value", EMPTY)

# The propagators of Jaeger and OpenTracing write a header for each entry of the
# baggage. Their `fields` do not include these headers.
_BAGGAGE_PREFIXES = ("uberctx-", "ot-baggage-")

# With the default propagators, nearly all messages carry only a `traceparent` in its
# usual form and, with `pipeline_latency`, baggage with nothing but the start of a
# pipeline. Both are written and read here, which saves 3 µs per message, and more with
# baggage. The propagators handle everything else.
_DEFAULT_PROPAGATORS = [TraceContextTextMapPropagator, W3CBaggagePropagator]
_TRACEPARENT = "traceparent"
_BAGGAGE = "baggage"
_START_PREFIX = f"{KAFKA_PIPELINE}=".encode()
_USUAL = re.compile(
    rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
)
_START = r"[0-9]{1,15}-[a-zA-Z0-9._-]{1,249}"
_START_ALONE = re.compile(re.escape(_START_PREFIX) + f"({_START})".encode())
_START_TO_WRITE = re.compile(_START)
_FLAGS = {f"{flags:02x}".encode(): TraceFlags(flags) for flags in range(256)}


@dataclass(frozen=True, slots=True)
class _Known:
    """Facts about the configured propagators, which are slow to ask."""

    propagator: TextMapPropagator | None
    names: frozenset[str]  # the headers that they write, in lower case
    are_default: bool


_known = _Known(None, frozenset(), are_default=False)


def _propagators() -> _Known:
    global _known  # noqa: PLW0603 (a cache of one entry)
    propagator = propagate.get_global_textmap()
    if _known.propagator is not propagator:
        parts = getattr(propagator, "_propagators", ())
        _known = _Known(
            propagator,
            frozenset(name.lower() for name in propagator.fields),
            type(propagator) is CompositePropagator
            and list(map(type, parts)) == _DEFAULT_PROPAGATORS,
        )
    return _known


class _HeaderGetter(Getter[Mapping[str, Any]]):
    """Reads header values that are UTF-8; other values count as absent.

    An exact match of the name takes precedence over a match in another case:
    propagators of other languages write `X-B3-TraceId`, and Python's `x-b3-traceid`.
    """

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        value = carrier.get(key)
        if not value:
            folded = key.lower()
            for name, found in carrier.items():
                if isinstance(name, str) and name.lower() == folded:
                    value = found or value
        if not value:
            return None
        try:
            return [value.decode()]
        except (UnicodeDecodeError, AttributeError):
            return None

    def keys(self, carrier: Mapping[str, Any]) -> list[str]:
        return list(carrier)


_GETTER = _HeaderGetter()


def extract(headers: Any) -> tuple[Context, SpanContext | None]:
    """The context that the headers of a record carry, and its creation context.

    Args:
        headers: A record's headers, a list of `(str, bytes)`. If several have the same
            name, the last one counts.

    Returns:
        A context with only the values that the configured propagators found, which is
        empty if there are none or if they cannot be read; and the message's creation
        context, if there is one.
    """
    context, created = _read(headers)
    if context is None:
        context = EMPTY
        if created is not None:
            context = Context({SPAN_KEY: NonRecordingSpan(created)})
    return context, created


def creation_context(headers: Any) -> SpanContext | None:
    """The message's creation context, if the headers of a record carry one."""
    return _read(headers)[1]


def _read(headers: Any) -> tuple[Context | None, SpanContext | None]:
    """Like `extract`, but the context is None if it has only the creation context."""
    if not headers:
        return None, None
    try:
        # A dict keeps the last value of a name.
        carrier = dict(headers)
        value = carrier.get(_TRACEPARENT)
        usual = start = None
        if type(value) is bytes and "tracestate" not in carrier:
            if _BAGGAGE in carrier:
                start = _start_alone(carrier[_BAGGAGE])
            if _BAGGAGE not in carrier or start is not None:
                usual = _USUAL.fullmatch(value)
        if usual is not None and _propagators().are_default:
            trace_id, span_id, flags = usual.groups()
            trace, span, is_remote = int(trace_id, 16), int(span_id, 16), True
            created = SpanContext(trace, span, is_remote, _FLAGS[flags])
            if start is None:
                return None, created
            entries = {KAFKA_PIPELINE: start}
            carried = {SPAN_KEY: NonRecordingSpan(created), BAGGAGE_KEY: entries}
            return Context(carried), created
        context = propagate.extract(carrier, Context(), getter=_GETTER)
        found = get_current_span(context).get_span_context()
    except Exception:
        report("extract a context from headers")
        return None, None
    return context, found if found.is_valid else None


def _start_alone(value: Any) -> str | None:
    """The start of a pipeline, if the value of a baggage header has nothing else."""
    found = _START_ALONE.fullmatch(value) if type(value) is bytes else None
    return None if found is None else found[1].decode()


def same_span(one: SpanContext | None, other: SpanContext | None) -> bool:
    """Whether two span contexts exist and identify the same span."""
    return (
        one is not None
        and other is not None
        and one.trace_id == other.trace_id
        and one.span_id == other.span_id
    )


def has_propagators() -> bool:
    """Whether a propagator that writes headers is configured."""
    return bool(_propagators().names)


def may_carry_context(headers: Any) -> bool:
    """Whether the headers of a send are a list with a field of a propagator."""
    if not isinstance(headers, list):
        return False
    names = [_name(header) for header in headers]
    return None not in names and not _propagators().names.isdisjoint(names)


def inject(headers: Any, context: Context, span: Span | None = None) -> Any:
    """The headers of a record with a context written to them.

    Args:
        headers: The headers that the application passed to `send`. Lists are copied;
            anything else but None is returned, because kafka-python rejects it.
        context: The context to propagate.
        span: The span to propagate in it, if it is not there already.

    Returns:
        New headers, in which the output of the propagators replaces all of their
        fields; or `headers` itself if they produced nothing.
    """
    if headers is not None and not isinstance(headers, list):
        return headers
    written = None
    if span is not None and _propagators().are_default:
        trace_id, span_id, _, flags, state, is_valid = span.get_span_context()
        entries = baggage.get_all(context) if context else {}
        start = _start_to_write(entries) if entries else b""
        if is_valid and not state and start is not None:
            value = b"00-%032x-%016x-%02x" % (trace_id, span_id, flags)
            written = [(_TRACEPARENT, value)]
            if start:
                written.append((_BAGGAGE, start))
    if written is None:
        written = _write(
            context if span is None else set_span_in_context(span, context)
        )
    if not written:
        return headers
    if headers is None:
        return written
    return _replaced(headers, written, _propagators().names)


def _start_to_write(entries: Mapping[str, Any]) -> bytes | None:
    """The baggage header, if the only entry is the start of a pipeline."""
    start = entries.get(KAFKA_PIPELINE)
    if len(entries) > 1 or type(start) is not str:
        return None
    if _START_TO_WRITE.fullmatch(start) is None:
        return None
    return _START_PREFIX + start.encode()


def inject_baggage(headers: list[Header], context: Context) -> list[Header]:
    """The headers of a record with the baggage of a context, otherwise unchanged.

    Args:
        headers: The headers that the application passed to `send`.
        context: The context with the baggage.
    """
    written = _write(Context({BAGGAGE_KEY: context[BAGGAGE_KEY]}))
    return _replaced(headers, written, frozenset()) if written else headers


def _replaced(
    headers: list[Header], written: list[Header], names: frozenset[str]
) -> list[Header]:
    """A copy of headers in which the written ones replace those of some names."""
    stale = names.union(name.lower() for name, _ in written)
    kept = [header for header in headers if _name(header) not in stale]
    if type(headers) is list:
        return kept + written
    # Some versions of kafka-python reject a subclass of list, and some accept it. The
    # copy is of the same class, so that this does not change.
    copied = copy.copy(headers)
    copied[:] = kept + written
    return copied


def _write(context: Context) -> list[Header]:
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    return [(name, value.encode()) for name, value in carrier.items()]


def is_propagated(name: str) -> bool:
    """Whether a header of this name is written by a propagator.

    Baggage is never captured, even if no configured propagator writes it.
    """
    folded = name.lower()
    return (
        folded in _propagators().names
        or folded == _BAGGAGE
        or folded.startswith(_BAGGAGE_PREFIXES)
    )


def _name(header: Any) -> str | None:
    """The name of a header in lower case, or None if it is not a header."""
    # The application may pass something else. kafka-python then raises its own error.
    if isinstance(header, tuple) and len(header) == 2:  # noqa: PLR2004 (a pair)
        name, value = header
        if isinstance(name, str) and isinstance(value, bytes):
            return name.lower()
    return None
