"""The instruments, and whether anyone collects their measurements."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opentelemetry.metrics import (
    CallbackOptions,
    Histogram,
    Meter,
    MeterProvider,
    Observation,
    get_meter_provider,
)

from otel_kafka_python._safety import report
from otel_kafka_python._semconv import (
    DURATION_BUCKETS,
    KAFKA_PIPELINE_LATENCY,
    KAFKA_RECORD_QUEUE_TIME,
    MESSAGING_CLIENT_CONSUMED_MESSAGES,
    MESSAGING_CLIENT_OPERATION_DURATION,
    MESSAGING_CLIENT_SENT_MESSAGES,
    MESSAGING_PROCESS_DURATION,
    QUEUE_TIME_BUCKETS,
    SCHEMA_URL,
)
from otel_kafka_python.package import __version__


class Tally:
    """The number of messages with the same attributes.

    Args:
        attributes: The attributes.
    """

    __slots__ = ("attributes", "number")

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes
        self.number = 0

    def count(self, messages: int) -> None:
        """Count more messages, on any thread."""
        with _counting:
            self.number += messages


class MessageCounter:
    """A counter that is read when the SDK collects.

    A call of the SDK for each message takes 12 µs with version 1.45, mostly for its
    attributes. A tally handles its attributes once.

    Args:
        meter: Makes the instrument.
        name: Its name.
        description: Its description.
    """

    def __init__(self, meter: Meter, name: str, description: str) -> None:
        self._tallies: dict[frozenset[tuple[str, Any]], Tally] = {}
        meter.create_observable_counter(name, [self._observe], "{message}", description)

    def tally(self, attributes: dict[str, Any]) -> Tally:
        """The tally of messages with these attributes."""
        return self._tallies.setdefault(
            frozenset(attributes.items()), Tally(attributes)
        )

    def _observe(self, _options: CallbackOptions) -> list[Observation]:
        return [
            Observation(tally.number, tally.attributes)
            for tally in list(self._tallies.values())
            if tally.number
        ]


# Held while a tally changes.
_counting = threading.Lock()
# Held while instruments are made, whichever provider makes them. A provider that uses
# an instrumented client to make them takes it again.
_making = threading.RLock()


def _after_fork_in_child() -> None:
    global _counting, _making
    _counting, _making = threading.Lock(), threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@dataclass(frozen=True, slots=True)
class Instruments:
    """The instruments (messaging client metrics); durations are in seconds."""

    operation_duration: Histogram
    process_duration: Histogram
    sent_messages: MessageCounter
    consumed_messages: MessageCounter
    queue_time: Histogram


class Metrics:
    """The instruments of a meter provider, from the moment that it collects.

    Args:
        provider: The meter provider; the global one if None.
        on_meter: Called with the provider and its meter when it collects.
        measures: Whether there are instruments at all.
    """

    def __init__(
        self,
        provider: MeterProvider | None,
        on_meter: Callable[[MeterProvider, Meter], object] | None = None,
        *,
        measures: bool = True,
    ) -> None:
        self._provider = provider
        self._measures = measures
        self._on_meter = on_meter
        self._instruments: Instruments | None = None
        self._pipeline_latency: Histogram | None = None

    def instruments(self) -> Instruments | None:
        """The instruments, or None as long as nobody collects their measurements.

        Called after each refresh of a client's metadata, not for each message. A global
        provider that is set late is noticed then.
        """
        if self._instruments is None:
            # An SDK ignores a second observable instrument of the same name. If two
            # threads made the instruments at once, the counts of one would be lost.
            with _making:
                if self._instruments is None:
                    self._instruments = self._make()
        return self._instruments

    def pipeline_latency(self) -> Histogram | None:
        """The histogram of the latency of pipelines, or None as for the instruments."""
        if self._pipeline_latency is None:
            with _making:
                meter = _meter(self._provider or get_meter_provider())
                if meter is not None and self._pipeline_latency is None:
                    self._pipeline_latency = meter.create_histogram(
                        KAFKA_PIPELINE_LATENCY,
                        "s",
                        "Time from the first send of a pipeline until a message of it "
                        "was processed.",
                        explicit_bucket_boundaries_advisory=QUEUE_TIME_BUCKETS,
                    )
        return self._pipeline_latency

    def _make(self) -> Instruments | None:
        provider = self._provider or get_meter_provider()
        meter = _meter(provider)
        if meter is None:
            return None
        instruments = None
        if self._measures:
            instruments = _create_instruments(provider, meter)
        if self._on_meter is not None:
            try:
                self._on_meter(provider, meter)
            except Exception:
                report("observe the metrics of clients")
        return instruments


def _meter(provider: MeterProvider) -> Meter | None:
    """The meter of a provider, if that collects anything."""
    # Providers and meters of the API itself record nothing: no provider is set yet, or
    # the SDK is disabled. The API's proxies begin to record when a provider is set, but
    # measurements before that would be wasted work.
    if _is_of_api(provider):
        return None
    meter = provider.get_meter("otel_kafka_python", __version__, SCHEMA_URL)
    return None if _is_of_api(meter) else meter


def _is_of_api(thing: object) -> bool:
    return type(thing).__module__.startswith("opentelemetry.metrics")


class _Counters:
    """The counters of a meter, which all instrumentations of one provider share.

    An SDK accepts no second callback for an instrument of the same name.
    """

    def __init__(self, meter: Meter) -> None:
        self.sent = MessageCounter(
            meter,
            MESSAGING_CLIENT_SENT_MESSAGES,
            "Number of messages producer attempted to send to the broker.",
        )
        self.consumed = MessageCounter(
            meter,
            MESSAGING_CLIENT_CONSUMED_MESSAGES,
            "Number of messages that were delivered to the application.",
        )


_by_provider: weakref.WeakKeyDictionary[Any, _Counters] = weakref.WeakKeyDictionary()


def _create_instruments(provider: MeterProvider, meter: Meter) -> Instruments:
    counters = _by_provider.get(provider)
    if counters is None:
        counters = _by_provider[provider] = _Counters(meter)
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
        sent_messages=counters.sent,
        consumed_messages=counters.consumed,
        queue_time=meter.create_histogram(
            KAFKA_RECORD_QUEUE_TIME,
            "s",
            "Time from a record's timestamp until it was handed to the application.",
            explicit_bucket_boundaries_advisory=QUEUE_TIME_BUCKETS,
        ),
    )
