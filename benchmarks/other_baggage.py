"""What other baggage costs beside the start of a pipeline.

    python benchmarks/other_baggage.py

The start alone is written and read without the propagators. With another entry, the
propagators run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import timeit

from opentelemetry import baggage
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider

from otel_kafka_python import _propagation

START = "1700000000000-orders"
NUMBER = 1000


def microseconds(entries: dict[str, str], rounds: int) -> tuple[float, float]:
    """The medians of the CPU time of writing and of reading a message's headers."""
    span = TracerProvider(shutdown_on_exit=False).get_tracer("shop").start_span("send")
    context = Context()
    for name, value in entries.items():
        context = baggage.set_baggage(name, value, context)
    headers = _propagation.inject(None, context, span)
    carried, _ = _propagation.extract(headers)
    assert dict(baggage.get_all(carried)) == entries
    write, read = (
        timeit.repeat(call, timer=time.process_time, number=NUMBER, repeat=rounds)
        for call in (
            lambda: _propagation.inject(None, context, span),
            lambda: _propagation.extract(headers),
        )
    )
    return statistics.median(write) * 1e6 / NUMBER, statistics.median(
        read
    ) * 1e6 / NUMBER


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    alone = {"kafka.pipeline": START}
    print(f"{'baggage':>23} {'write, µs':>10} {'read, µs':>9}")
    took = {}
    for name, entries in (
        ("the start alone", alone),
        ("the start and another", {**alone, "tenant": "blue"}),
    ):
        took[name] = microseconds(entries, arguments.rounds)
        print("{:>23} {:10.1f} {:9.1f}".format(name, *took[name]))
    first, second = took.values()
    return int(any(fast >= slow for fast, slow in zip(first, second, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
