"""What the package adds to the start of a program that never uses Kafka.

    python benchmarks/startup.py

The program does what `opentelemetry-instrument` does before an application starts, with
this package's entry points and without them, as if it were not installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

PROGRAM = """
import sys
from opentelemetry.util import _importlib_metadata as metadata
found = metadata.entry_points
metadata.entry_points = lambda **kind: [
    each for each in found(**kind) if each.dist.name != sys.argv[1]
]
from opentelemetry.instrumentation.auto_instrumentation import initialize
initialize()
assert "kafka" not in sys.modules
assert ("otel_kafka_python" in sys.modules) == (sys.argv[1] != "otel-kafka-python")
"""
ENVIRON = {
    **os.environ,
    "OTEL_TRACES_EXPORTER": "none",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
    # The contrib package imports kafka.
    "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
}
# In milliseconds: what the package may add.
LIMIT = 30


def milliseconds(without: str) -> float:
    """The CPU time of a start without a distribution's entry points."""
    command = [sys.executable, "-c", PROGRAM, without]
    process = os.posix_spawn(sys.executable, command, ENVIRON)
    _, status, usage = os.wait4(process, 0)
    assert status == 0
    return (usage.ru_utime + usage.ru_stime) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    without, added = [], []
    for _ in range(arguments.rounds):
        without.append(milliseconds("otel-kafka-python"))
        added.append(milliseconds("") - without[-1])
    median = statistics.median(added)
    print(f"without the package: {statistics.median(without):5.0f} ms of CPU time")
    print(f"the package adds:    {median:5.0f} ms")
    return int(median > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
