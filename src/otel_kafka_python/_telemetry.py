"""The state of all wrappers: settings, tracer, instruments, operation templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from opentelemetry import trace
from opentelemetry._logs import LoggerProvider
from opentelemetry.context import Context, get_current
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.metrics import Histogram, MeterProvider
from opentelemetry.trace import Link, Span, SpanKind, TracerProvider

from otel_kafka_python import _endings, _kafka
from otel_kafka_python._attributes import (
    Attributes,
    client_attributes,
    legal_topic,
    operation_attributes,
    peer_attributes,
    span_name,
    without_operation_type,
)
from otel_kafka_python._client_metrics import observe
from otel_kafka_python._clients import Client, Clients
from otel_kafka_python._clock import Moment
from otel_kafka_python._config import Config
from otel_kafka_python._exception_events import ExceptionEvents
from otel_kafka_python._metrics import Instruments, MessageCounter, Metrics
from otel_kafka_python._operation import (
    POLL,
    PROCESS,
    SEND,
    Kind,
    OperationTemplate,
    RecordHook,
)
from otel_kafka_python._pipeline import Destination, Sources
from otel_kafka_python._propagation import has_propagators
from otel_kafka_python._safety import report
from otel_kafka_python._semconv import MESSAGING_KAFKA_CLUSTER_ID, SCHEMA_URL
from otel_kafka_python.package import __version__


class Telemetry:
    """The state that all wrappers of one `instrument()` share.

    Args:
        config: The settings.
        tracer_provider: The tracer provider; the global one if None.
        meter_provider: The meter provider; the global one if None.
        logger_provider: The logger provider; the global one if None.
        on_new_client: Called when a producer or consumer is first used.
    """

    def __init__(
        self,
        config: Config,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        logger_provider: LoggerProvider | None = None,
        on_new_client: Callable[[], object] = lambda: None,
    ) -> None:
        self.config = config
        self.consume_hook: RecordHook | None = None
        if config.consume_hook is not None:
            self.consume_hook = RecordHook(config.consume_hook)
        self.clients = Clients(on_new_client)
        self._unknown = Client()
        self._unknown_for: Instruments | None = None  # those of its templates
        self._on_stop: list[Callable[[], object]] = []
        self.active = True
        # Whether there were instruments when a template was last built.
        self.measures = False
        self._metrics = Metrics(
            meter_provider,
            partial(observe, living=self._living) if config.client_metrics else None,
            measures=config.metrics,
        )
        self._sources = Sources()
        self._exceptions = ExceptionEvents(config, logger_provider)
        self._tracer = trace.get_tracer(
            "otel_kafka_python", __version__, tracer_provider, SCHEMA_URL
        )

    def on_stop(self, callback: Callable[[], object]) -> None:
        """Register a callback for the end of the instrumentation."""
        self._on_stop.append(callback)

    def stop(self) -> None:
        """Prevent further operations."""
        self.active = False
        try:
            for callback in self._on_stop:
                callback()
        except Exception:
            report("stop the instrumentation")

    def _living(self) -> list[tuple[Any, Client]]:
        return self.clients.living() if self.active else []

    def may_begin(self, context: Context | None = None) -> bool:
        """Whether operations are traced now: not uninstrumented, not suppressed.

        If they are, this first abandons the deferred operations.

        Args:
            context: The current context, if the caller has it. An empty context
                suppresses nothing.
        """
        if context is None:
            context = get_current()
        if not self.active or (context and not is_instrumentation_enabled()):
            return False
        if _endings.deferred:
            _endings.abandon_deferred()
        return True

    def unknown_client(self) -> Client:
        """A `Client` without any known facts, with the templates that it has used.

        It has no metadata whose refresh would let a meter provider that is set late
        be noticed.
        """
        instruments = self._instruments()
        has_own_histogram = self.config.pipeline_latency and not self.config.metrics
        if instruments is not self._unknown_for or has_own_histogram:
            self._unknown_for = instruments
            self._unknown.forget()
        return self._unknown

    def template(
        self, client: Client, kind: Kind, topic: Any, partition: Any
    ) -> OperationTemplate | None:
        """The template of an operation.

        Args:
            client: The client that performs it.
            kind: The kind of operation.
            topic: The topic that all messages share, or None. Anything that is not a
                topic name counts as None.
            partition: The partition that all messages share, or None. Anything that is
                not a number counts as None.

        Returns:
            The template, or None if the topic is excluded.
        """
        # Another thread may replace the dict when the metadata changes.
        templates = client.templates
        try:
            return templates[kind, topic, partition]
        except (KeyError, TypeError):
            name = legal_topic(topic)
            number = _kafka.partition_number(partition)
            template = None
            if name is None or not self.config.excludes(name):
                template = self._build_template(client, kind, name, number)
            # Illegal names are never kept: there is no limit to their number.
            if name == topic and number == partition:
                templates[kind, topic, partition] = template
            return template

    def _build_template(
        self, client: Client, kind: Kind, topic: str | None, partition: int | None
    ) -> OperationTemplate:
        duration_attributes = operation_attributes(
            kind.name,
            kind.type,
            topic,
            partition,
            kind.group or client.group,
            client.bootstrap,
        )
        count_attributes = without_operation_type(duration_attributes)
        attributes = duration_attributes
        end_attributes: Attributes = {}
        of_client = client_attributes(client.client_id, client.cluster_id)
        # No sampler needs these, so the sender's thread sets them. This saves the
        # calling thread 2 µs. With a hook, they are set before it, so its values stay.
        if kind is SEND and self.config.produce_hook is None:
            end_attributes = of_client
        else:
            attributes = {**attributes, **of_client}
        # Records of one partition came from its leader.
        if kind is POLL and topic is not None:
            attributes.update(peer_attributes(client.leader(topic, partition)))
        if kind is PROCESS:
            duration_attributes = count_attributes
        duration, messages, queue_time = self._instruments_of(kind)
        injects = (
            self.config.propagates_to(topic)
            and client.sends_headers
            and has_propagators()
        )
        destination = None
        starts_pipeline = False
        if self.config.pipeline_latency and topic is not None:
            starts_pipeline = kind is SEND and injects
            if kind in (PROCESS, POLL):
                destination = self._destination(count_attributes)
        return OperationTemplate(
            topic=topic,
            name=span_name(kind.name, topic),
            attributes=MappingProxyType(attributes),
            end_attributes=end_attributes,
            duration_attributes=duration_attributes,
            count_attributes=count_attributes,
            duration=duration,
            messages=messages,
            exceptions=self._exceptions,
            event_type=kind.type or "settle",
            knows_cluster=MESSAGING_KAFKA_CLUSTER_ID in attributes,
            injects=injects,
            observes_end=duration is not None or self._exceptions.are_logged,
            queue_time=queue_time,
            starts_pipeline=starts_pipeline,
            destination=destination,
        )

    def _instruments_of(
        self, kind: Kind
    ) -> tuple[Histogram | None, MessageCounter | None, Histogram | None]:
        """The instruments for the duration, the messages and the queue time."""
        instruments = self._instruments()
        self.measures = instruments is not None
        if instruments is None or not kind.type:
            return None, None, None
        if kind is PROCESS:
            return instruments.process_duration, None, None
        messages = {
            SEND: instruments.sent_messages,
            POLL: instruments.consumed_messages,
        }.get(kind)
        queue_time = instruments.queue_time if self.config.capture_queue_time else None
        return instruments.operation_duration, messages, queue_time

    def _instruments(self) -> Instruments | None:
        try:
            return self._metrics.instruments()
        except Exception:
            report("create the instruments")
            return None

    def _destination(self, count_attributes: Attributes) -> Destination | None:
        try:
            histogram = self._metrics.pipeline_latency()
        except Exception:
            report("create the instruments")
            return None
        return Destination(histogram, count_attributes, self._sources)

    def start_span(
        self,
        template: OperationTemplate,
        kind: SpanKind,
        started: Moment,
        attributes: Mapping[str, Any],
        context: Context | None = None,
        links: Sequence[Link] = (),
    ) -> Span | None:
        """Start a span, or return None if that fails.

        Args:
            template: The template of its operation.
            kind: The kind of the span.
            started: When the operation started.
            attributes: Its attributes, including the template's.
            context: The context with its parent; the current one if None.
            links: Its links.
        """
        try:
            return self._tracer.start_span(
                template.name,
                context,
                kind,
                attributes,
                links,
                started[0],
                # record_exception and set_status_on_exception
                False,
                False,
            )
        except Exception:
            report("start a span")
            return None
