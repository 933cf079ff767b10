"""The instrumentor, and the entry points that the launcher calls."""

from __future__ import annotations

import atexit
from collections.abc import Collection, Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any, NoReturn

from opentelemetry._logs import LoggerProvider
from opentelemetry.instrumentation.dependencies import (
    DependencyConflict,
    get_dependency_conflicts,
)
from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
    BaseInstrumentor,
)
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider

from otel_kafka_python import _coexistence, _config, _endings, _patches
from otel_kafka_python._config import (
    CommitSpans,
    ConsumeHook,
    ProcessParent,
    ProduceHook,
)
from otel_kafka_python._patches import Layer
from otel_kafka_python._processing import process_span
from otel_kafka_python._safety import report
from otel_kafka_python._telemetry import Telemetry
from otel_kafka_python.package import _instruments_any


class KafkaPythonInstrumentor(BaseInstrumentor):  # type: ignore[misc]  # untyped
    """Traces and measures kafka-python's producers and consumers.

    A singleton, like every instrumentor: each call of the class returns the same object
    and runs `__init__` again, which therefore sets nothing.
    """

    # The SDK converts the settings in its configuration file to this class.
    configuration = _config.FileSettings

    _telemetry: Telemetry | None = None
    _layers: list[Layer] = []  # noqa: RUF012 (replaced, never changed)
    # Whether the next call of `instrument` is the launcher's.
    _is_launched = False

    def instrumentation_dependencies(self) -> Collection[str]:
        """The requirement on the installed distribution of `kafka`."""
        for requirement in _instruments_any:
            try:
                distribution(requirement.split(" ", 1)[0])
            except PackageNotFoundError:
                continue
            return (requirement,)
        return _instruments_any[:1]

    def _check_dependency_conflicts(self) -> DependencyConflict | None:
        # As the launcher does: the message then names every supported distribution.
        conflict = get_dependency_conflicts((), _instruments_any)
        # A frozen application may have the package without its metadata.
        if conflict is not None and not conflict.found_any and _is_importable("kafka"):
            return None
        return conflict

    def instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        logger_provider: LoggerProvider | None = None,
        produce_hook: ProduceHook | None = None,
        consume_hook: ConsumeHook | None = None,
        excluded_topics: str | Iterable[str] | None = None,
        propagation: bool | None = None,
        propagation_excluded_topics: str | Iterable[str] | None = None,
        send_spans: bool | None = None,
        receive_spans: bool | None = None,
        process_spans: bool | None = None,
        process_parent: ProcessParent | None = None,
        commit_spans: CommitSpans | None = None,
        capture_message_key: bool | None = None,
        capture_message_size: bool | None = None,
        capture_headers: str | Iterable[str] | None = None,
        capture_queue_time: bool | None = None,
        next_process_spans: bool | None = None,
        metrics: bool | None = None,
        client_metrics: bool | None = None,
        pipeline_latency: bool | None = None,
        skip_dep_check: bool = False,
        raise_exception_on_conflict: bool = False,
        **unknown: NoReturn,
    ) -> None:
        """Trace all producers and consumers, including existing ones.

        This does not import kafka: the clients are patched when the program imports it,
        or now if it has been imported.

        A keyword that is not given is read from its environment variable, which is
        `OTEL_PYTHON_KAFKA_` and the keyword in capitals. Invalid values are logged once
        and the default is used. A second call only logs a warning. Set the providers
        first: at exit, open spans then end before the providers shut down.

        Args:
            tracer_provider: The provider for spans; the global one by default.
            meter_provider: The provider for metrics; the global one by default.
            logger_provider: The provider for exceptions as log events, if
                `OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN` enables them; the global one by
                default.
            produce_hook: Called as `produce_hook(span, args, kwargs)` with each
                send span, after its creation and before the headers are built.
            consume_hook: Called as `consume_hook(span, record, args, kwargs)` once
                for each record, with the span of that single record.
            excluded_topics: Globs of topics without spans, metrics and headers.
                Default: "__consumer_offsets" and "__transaction_state", which Kafka
                itself writes to.
            propagation: Whether sent messages carry the context. Default: true.
            propagation_excluded_topics: Globs of topics whose messages carry no
                context, for consumers that cannot handle headers. Default: none.
            send_spans: Whether `send` makes spans. Default: true.
            receive_spans: Whether `poll` and `next` make spans. Default: true.
            process_spans: Whether loops over records make spans. Default: true.
            process_parent: "message": a process span is a child of the message's
                creation context, unless another span is current. "none": it is the
                root of its own trace and only links. Default: "message".
            commit_spans: "manual": `commit`, `commit_async` and transactions make
                spans. "all": auto-commits that move an offset do, too. "none": none of
                them do. Default: "manual".
            capture_message_key: Whether spans have their message's key.
                Default: true.
            capture_message_size: Whether spans have the size of their message's
                serialised value, in bytes. Default: false.
            capture_headers: Globs of the names of headers that spans have as
                `messaging.header.<name>`, always a list of str. A glob that begins
                with `!` excludes. Default: none.
            capture_queue_time: Whether process spans and a histogram have the time
                from a record's timestamp to its handover. Default: false.
            next_process_spans: Whether `next(consumer)` makes a process span that
                is current until the consumer is asked for more or is closed.
                Default: false.
            metrics: Whether the metrics of the conventions and of queue time are
                recorded. Default: true.
            client_metrics: Whether kafka-python's own metrics and the consumers' lag
                are exported, too. Default: false.
            pipeline_latency: Whether a histogram records the time from the first send
                of a pipeline to the end of each processing. The start travels as
                baggage, which other calls also carry. Default: false.
            skip_dep_check: Whether to instrument any installed version of kafka-python.
                Default: false.
            raise_exception_on_conflict: Whether an unsupported version raises an
                exception instead of logging an error. Default: false.
            **unknown: Any other keyword is ignored with one warning. Type checkers
                reject it.
        """
        launched, self._is_launched = self._is_launched, False
        # The SDK has already applied its configuration file by then.
        if launched and (
            self.is_instrumented_by_opentelemetry or _config.disabled_in_file()
        ):
            return
        super().instrument(
            tracer_provider=tracer_provider,
            meter_provider=meter_provider,
            logger_provider=logger_provider,
            produce_hook=produce_hook,
            consume_hook=consume_hook,
            excluded_topics=excluded_topics,
            propagation=propagation,
            propagation_excluded_topics=propagation_excluded_topics,
            send_spans=send_spans,
            receive_spans=receive_spans,
            process_spans=process_spans,
            process_parent=process_parent,
            commit_spans=commit_spans,
            capture_message_key=capture_message_key,
            capture_message_size=capture_message_size,
            capture_headers=capture_headers,
            capture_queue_time=capture_queue_time,
            next_process_spans=next_process_spans,
            metrics=metrics,
            client_metrics=client_metrics,
            pipeline_latency=pipeline_latency,
            skip_dep_check=skip_dep_check,
            raise_exception_on_conflict=raise_exception_on_conflict,
            **unknown,
        )
        # The base class considers it done, even if it failed.
        if self._telemetry is None:
            self._is_instrumented_by_opentelemetry = False

    def _instrument(self, **kwargs: Any) -> None:
        # An exception here would prevent the launcher from loading the remaining
        # instrumentations.
        try:
            self._build(**kwargs)
        except Exception:
            self._uninstrument()
            report("instrument kafka-python")

    def _build(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        logger_provider: LoggerProvider | None = None,
        **settings: Any,
    ) -> None:
        config = _config.load(settings)
        _coexistence.take_over()
        telemetry = Telemetry(
            config,
            tracer_provider,
            meter_provider,
            logger_provider,
            on_new_client=_coexistence.take_over,
        )
        self._telemetry = telemetry
        process_span.use(telemetry)
        _patches.when_imported(partial(self._patch, telemetry))
        # Exit handlers run last in, first out: this one runs before the handler of a
        # provider that was set earlier.
        atexit.unregister(_endings.abandon_all)
        atexit.register(_endings.abandon_all)

    def _patch(self, telemetry: Telemetry) -> None:
        """Patch the clients' classes, now that the program has imported kafka."""
        if telemetry is not self._telemetry:  # it has been uninstrumented
            return
        try:
            self._layers = _patches.apply(telemetry)
        except Exception:
            self._uninstrument()
            self._is_instrumented_by_opentelemetry = False
            report("instrument kafka-python")

    def _uninstrument(self, **kwargs: Any) -> None:  # noqa: ARG002 (as overridden)
        if self._telemetry is not None:
            self._telemetry.stop()
            self._telemetry = None
        process_span.use(None)
        _patches.revert(self._layers)
        self._layers = []


def _is_importable(name: str) -> bool:
    """Whether a package of this name exists; this does not import it."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def begin_launch() -> None:
    """Note that the launcher is about to load every instrumentation."""
    KafkaPythonInstrumentor()._is_launched = True


def take_over() -> None:
    """Take over from the contrib package after the launcher has loaded everything.

    If that package was loaded after this one, its wrappers are the outermost.
    """
    KafkaPythonInstrumentor()._is_launched = False
    if KafkaPythonInstrumentor().is_instrumented_by_opentelemetry:
        _coexistence.take_over()
