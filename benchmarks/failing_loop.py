"""What it costs that a loop's body raises, however many objects are alive.

    python benchmarks/failing_loop.py

Each loop ends with its first record, by a `break` or by an exception. Only the youngest
objects are searched for the exception, so a million others must not show.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from embedded_broker import EmbeddedBroker
from kafka import KafkaConsumer, KafkaProducer
from opentelemetry.sdk.trace import TracerProvider

from otel_kafka_python import KafkaPythonInstrumentor

TOPIC = "orders"
# In milliseconds: what a failing loop may cost more than one that is left.
LIMIT = 0.5


def ended(consumer: Any, *, by_exception: bool) -> float:
    """How long the end of a loop takes, in milliseconds."""
    began = 0.0
    try:
        for _ in consumer:
            began = time.perf_counter()
            if by_exception:
                raise ValueError
            break
    except ValueError:
        pass
    return (time.perf_counter() - began) * 1000


def measure(consumer: Any, rounds: int) -> tuple[float, float]:
    """The median of an end by `break` and of one by an exception."""
    left, failed = [], []
    for _ in range(rounds):
        left.append(ended(consumer, by_exception=False))
        failed.append(ended(consumer, by_exception=True))
    return statistics.median(left), statistics.median(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--objects", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with EmbeddedBroker() as broker:
        producer = KafkaProducer(bootstrap_servers=broker.address)
        for number in range(4 * arguments.rounds):
            producer.send(TOPIC, b"%d" % number)
        producer.close()
        KafkaPythonInstrumentor().instrument(
            tracer_provider=TracerProvider(shutdown_on_exit=False)
        )
        consumer = KafkaConsumer(
            TOPIC,
            bootstrap_servers=broker.address,
            auto_offset_reset="earliest",
            consumer_timeout_ms=60_000,
        )
        few = measure(consumer, arguments.rounds)
        objects: list[list[Any]] = [[] for _ in range(arguments.objects)]
        gc.collect()
        many = measure(consumer, arguments.rounds)
        consumer.close()
    print(f"{'live objects':>14} {'break, ms':>10} {'exception, ms':>14}")
    print(f"{'few':>14} {few[0]:10.3f} {few[1]:14.3f}")
    print(f"{len(objects):14,} {many[0]:10.3f} {many[1]:14.3f}")
    return int(many[1] - many[0] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
