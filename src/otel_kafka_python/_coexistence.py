"""Takes over from OpenTelemetry's contrib package for kafka-python if that is active.

Together, the two packages would trace every message twice.
"""

from __future__ import annotations

import sys

from otel_kafka_python._safety import logger, report

_CONTRIB_MODULE = "opentelemetry.instrumentation.kafka"


def take_over() -> None:
    """Uninstrument the contrib package if it is active."""
    try:
        # It cannot be active unless it has been imported.
        instrumentor_class = getattr(
            sys.modules.get(_CONTRIB_MODULE), "KafkaInstrumentor", None
        )
        if instrumentor_class is None:
            return
        instrumentor = instrumentor_class()
        if not instrumentor.is_instrumented_by_opentelemetry:
            return
        instrumentor.uninstrument()
    except Exception:
        report("take over from opentelemetry-instrumentation-kafka-python")
        return
    logger.warning(
        "opentelemetry-instrumentation-kafka-python was active too, and every message "
        "would have been traced twice; otel-kafka-python has taken over. To avoid this "
        "warning, uninstall opentelemetry-instrumentation-kafka-python or set "
        "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=kafka; to keep the other package, set "
        "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=kafka_python"
    )
