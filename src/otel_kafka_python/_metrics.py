"""The instruments, and whether anyone collects what they measure."""

from __future__ import annotations

from dataclasses import dataclass

from opentelemetry.metrics import (
    Counter,
    Histogram,
    Meter,
    MeterProvider,
    get_meter_provider,
)

from otel_kafka_python._own_metrics import Living, observe
from otel_kafka_python._safety import report
from otel_kafka_python._semconv import (
    DURATION_BUCKETS,
    KAFKA_RECORD_QUEUE_TIME,
    MESSAGING_CLIENT_CONSUMED_MESSAGES,
    MESSAGING_CLIENT_OPERATION_DURATION,
    MESSAGING_CLIENT_SENT_MESSAGES,
    MESSAGING_PROCESS_DURATION,
    QUEUE_TIME_BUCKETS,
    SCHEMA_URL,
)
from otel_kafka_python.package import __version__


@dataclass(frozen=True, slots=True)
class Instruments:
    """The instruments (messaging client metrics); durations are in seconds."""

    operation_duration: Histogram
    process_duration: Histogram
    sent_messages: Counter
    consumed_messages: Counter
    queue_time: Histogram


class Metrics:
    """The instruments of a meter provider, once there is one that collects.

    Args:
        provider: The meter provider; the global one if None.
        living: Gives the clients whose own metrics are observed; None if nobody
            has asked for these.
    """

    def __init__(
        self, provider: MeterProvider | None, living: Living | None = None
    ) -> None:
        self._provider = provider
        self._living = living
        self._instruments: Instruments | None = None

    def instruments(self) -> Instruments | None:
        """The instruments, or None as long as a measurement would reach nobody.

        Asked whenever a client's metadata was refreshed, not for each message: a
        global provider that is set late is noticed then.
        """
        if self._instruments is None:
            provider = self._provider or get_meter_provider()
            # Providers and meters of the API itself record nothing: none is set
            # (yet), or the SDK is disabled. Its proxies would record once one is
            # set, but what is handed to them until then would be for nothing.
            if not _is_of_api(provider):
                meter = provider.get_meter("otel_kafka_python", __version__, SCHEMA_URL)
                if not _is_of_api(meter):
                    self._instruments = _create_instruments(meter)
                    if self._living is not None:
                        try:
                            observe(provider, meter, self._living)
                        except Exception:
                            report("observe the metrics of clients")
        return self._instruments


def _is_of_api(thing: object) -> bool:
    return type(thing).__module__.startswith("opentelemetry.metrics")


def _create_instruments(meter: Meter) -> Instruments:
    return Instruments(
        operation_duration=meter.create_histogram(
            MESSAGING_CLIENT_OPERATION_DURATION,
            "s",
            "Duration of messaging operation initiated by a producer or consumer "
            "client.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
        ),
        process_duration=meter.create_histogram(
            MESSAGING_PROCESS_DURATION,
            "s",
            "Duration of processing operation.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
        ),
        sent_messages=meter.create_counter(
            MESSAGING_CLIENT_SENT_MESSAGES,
            "{message}",
            "Number of messages producer attempted to send to the broker.",
        ),
        consumed_messages=meter.create_counter(
            MESSAGING_CLIENT_CONSUMED_MESSAGES,
            "{message}",
            "Number of messages that were delivered to the application.",
        ),
        queue_time=meter.create_histogram(
            KAFKA_RECORD_QUEUE_TIME,
            "s",
            "Time from a record's timestamp until it was handed to the application.",
            explicit_bucket_boundaries_advisory=QUEUE_TIME_BUCKETS,
        ),
    )
