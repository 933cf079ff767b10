"""What the tests see of the telemetry: every span that starts, every metric."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from opentelemetry._logs import LogRecord
from opentelemetry.context import Context
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import (
    InMemoryLogRecordExporter,
    SimpleLogRecordProcessor,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_ON,
    ParentBased,
    Sampler,
    SamplingResult,
)
from opentelemetry.trace import Link, SpanKind

from conformance import SCOPE, Seen, check_events, check_metrics, check_spans


class Creation(NamedTuple):
    """A span as a sampler sees it."""

    name: str
    kind: SpanKind
    attributes: dict[str, Any]
    links: list[Link]


class RecordingSampler(Sampler):
    """Samples as the default does and remembers what it was asked."""

    def __init__(self) -> None:
        self.creations: list[Creation] = []
        # The last of this thread, for the span that is made of it.
        self.last = threading.local()
        self._sampler = ParentBased(ALWAYS_ON)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        *more: Any,
    ) -> SamplingResult:
        assert kind is not None
        creation = Creation(name, kind, dict(attributes or {}), list(links or ()))
        self.creations.append(creation)
        self.last.creation = creation
        return self._sampler.should_sample(
            parent_context, trace_id, name, kind, attributes, links, *more
        )

    def get_description(self) -> str:
        return "RecordingSampler"


class Recorder(SpanProcessor):
    """A provider of each signal, and what came through them."""

    def __init__(self) -> None:
        self.sampler = RecordingSampler()
        self.started: list[Span] = []
        self.ended: list[ReadableSpan] = []
        self.all_ended: list[ReadableSpan] = []
        self.created: dict[int, dict[str, Any]] = {}
        self.tracer_provider = TracerProvider(
            sampler=self.sampler, shutdown_on_exit=False
        )
        self.tracer_provider.add_span_processor(self)
        self.reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self.reader], shutdown_on_exit=False)
        self.logger_provider = LoggerProvider(shutdown_on_exit=False)
        self._events = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
        self.logger_provider.add_log_record_processor(
            SimpleLogRecordProcessor(self._events)
        )
        self.tracer = self.tracer_provider.get_tracer("application")

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.started.append(span)
        if span.context is not None:
            self.created[span.context.span_id] = self.sampler.last.creation.attributes

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span)
        self.all_ended.append(span)

    def named(self, name: str) -> list[ReadableSpan]:
        """The ended spans of a name, in the order of their start."""
        spans = [span for span in self.ended if span.name == name]
        return sorted(spans, key=lambda span: span.start_time or 0)

    def one(self, name: str) -> ReadableSpan:
        """The only span of a name."""
        spans = self.named(name)
        assert len(spans) == 1, f"{len(spans)} of {name!r} in {self.names()}"
        return spans[0]

    def names(self) -> list[str]:
        return sorted(span.name for span in self.ended)

    def open(self) -> list[str]:
        """The names of the spans that have started and not ended."""
        ended = {span.context.span_id for span in self.ended if span.context}
        return [s.name for s in self.started if s.context.span_id not in ended]

    def events(self) -> list[LogRecord]:
        """The log events of ours."""
        return [
            each.log_record
            for each in self._events.get_finished_logs()
            if each.instrumentation_scope is not None
            and each.instrumentation_scope.name == SCOPE
        ]

    def check(self) -> None:
        """Hold all of ours that has come against the convention."""
        check_spans(
            Seen(
                span.name,
                span.kind,
                span.status.status_code,
                span.attributes or {},
                [link.attributes or {} for link in span.links],
                span.instrumentation_scope.schema_url,
                self.created[span.context.span_id],
            )
            for span in self.all_ended
            if span.instrumentation_scope is not None
            and span.instrumentation_scope.name == SCOPE
            and span.context is not None
        )
        check_metrics(self.metrics())
        check_events(self.events())

    def metrics(self) -> list[Metric]:
        """All metrics of ours."""
        data = self.reader.get_metrics_data()
        return [
            metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            if scope.scope.name == SCOPE
            for metric in scope.metrics
        ]

    def points(self, name: str, **attributes: Any) -> list[Any]:
        """The data points of a metric that have these attributes.

        A keyword is an attribute's name with `_` for `.`.
        """
        return [
            point
            for metric in self.metrics()
            if metric.name == name
            for point in metric.data.data_points
            if attributes.items()
            <= {
                k.replace(".", "_"): v for k, v in (point.attributes or {}).items()
            }.items()
        ]

    def count(self, name: str, **attributes: Any) -> int:
        """The messages counted, or the durations recorded."""
        points = self.points(name, **attributes)
        return sum(p.value if hasattr(p, "value") else p.count for p in points)


class Log(logging.Handler):
    """What OpenTelemetry and this package have logged, from WARNING on."""

    LOGGERS = ("opentelemetry", "otel_kafka_python")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def take(self) -> list[str]:
        """The messages since the last call: what a test expects, it takes."""
        messages = [record.getMessage() for record in self.records]
        self.records.clear()
        return messages

    def __enter__(self) -> Log:
        for name in self.LOGGERS:
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self.LOGGERS:
            logging.getLogger(name).removeHandler(self)


def attributes_of(things: Sequence[Any]) -> list[dict[str, Any]]:
    """The attributes of spans or links as dicts."""
    return [dict(thing.attributes or {}) for thing in things]
