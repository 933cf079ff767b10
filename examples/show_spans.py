"""Prints each span as one line, in the order of their ends, at the latest at exit."""

from __future__ import annotations

from collections import defaultdict
from itertools import count

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from opentelemetry.sdk.trace.sampling import Sampler

# Small numbers in order of appearance are easier to follow than ids.
_spans: defaultdict[int, int] = defaultdict(count(1).__next__)
_traces: defaultdict[int, int] = defaultdict(count(1).__next__)


def show_spans(sampler: Sampler | None = None) -> None:
    """Set a global tracer provider that prints its spans.

    Args:
        sampler: The sampler; by default the environment's, which samples everything.
    """
    provider = TracerProvider(sampler=sampler)
    # Not a SimpleSpanProcessor: that would block the producer's thread.
    exporter = ConsoleSpanExporter(formatter=_line)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def _line(span: ReadableSpan) -> str:
    assert span.context is not None
    parts = [f"trace {_traces[span.context.trace_id]}"]
    if span.parent is not None:
        parts.append(f"child of {_spans[span.parent.span_id]}")
    if span.links:
        links = (str(_spans[link.context.span_id]) for link in span.links)
        parts.append(f"links to {' '.join(links)}")
    parts += [
        f"{name}={value!s}"
        for name, value in (span.attributes or {}).items()
        if name.startswith("app.") or name == "error.type"
    ]
    number = _spans[span.context.span_id]
    return f"span {number:>2}  {span.name:<28} {', '.join(parts)}\n"
