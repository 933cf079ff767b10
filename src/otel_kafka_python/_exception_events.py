"""Where the exceptions of failed operations are recorded.

They are events of their spans by default, as people expect, and log events if
`OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN` enables them.
"""

from __future__ import annotations

import time
from inspect import signature
from typing import Any

from opentelemetry._logs import (
    Logger,
    LoggerProvider,
    LogRecord,
    SeverityNumber,
    get_logger,
)
from opentelemetry.trace import Span, set_span_in_context

from otel_kafka_python._attributes import exception_attributes
from otel_kafka_python._config import Config
from otel_kafka_python._safety import raise_signalled
from otel_kafka_python._semconv import SCHEMA_URL
from otel_kafka_python.package import __version__

# From version 1.42 of the API, a log record takes the exception itself.
_TAKES_EXCEPTIONS = "exception" in signature(LogRecord.__init__).parameters


class ExceptionEvents:
    """Records exceptions (Recording exceptions).

    Args:
        config: The settings.
        provider: The logger provider; the global one if None.
    """

    def __init__(self, config: Config, provider: LoggerProvider | None) -> None:
        self._on_spans = config.span_exceptions
        self._logger = None
        # An unsampled span's exceptions are logged, too.
        self.are_logged = config.log_exceptions
        if config.log_exceptions:
            self._logger = get_logger(
                "otel_kafka_python", __version__, provider, SCHEMA_URL
            )

    def record(
        self, span: Span | None, operation_type: str, error: BaseException
    ) -> None:
        """Record the exception that an operation failed with.

        Args:
            span: Its span, sampled or not, or None if it has none.
            operation_type: Its `messaging.operation.type`.
            error: The exception.
        """
        try:
            if self._logger is not None:
                self._emit(self._logger, span, operation_type, error)
        finally:
            if self._on_spans and span is not None and span.is_recording():
                span.record_exception(error)

    @staticmethod
    def _emit(
        logger: Logger, span: Span | None, operation_type: str, error: BaseException
    ) -> None:
        is_process = operation_type == "process"
        severity = SeverityNumber.ERROR if is_process else SeverityNumber.WARN
        now = time.time_ns()
        logger.emit(
            LogRecord(
                timestamp=now,
                observed_timestamp=now,
                context=None if span is None else set_span_in_context(span),
                severity_text=severity.name,
                severity_number=severity,
                event_name=f"messaging.{operation_type}.exception",
                **_as_arguments(error),
            )
        )


def _as_arguments(error: BaseException) -> dict[str, Any]:
    """The exception as arguments of a log record: itself, or its attributes.

    The SDK reads the attributes from the exception itself. It calls `str` on it, and
    loses the record if `str` raises.
    """
    is_taken = _TAKES_EXCEPTIONS
    try:
        str(error)
    except Exception:
        raise_signalled()
        is_taken = False
    if is_taken:
        return {"exception": error}
    return {"attributes": exception_attributes(error)}
