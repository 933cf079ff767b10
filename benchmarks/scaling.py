"""How what this package adds grows: with batches, topics, clients, headers and links.

    python benchmarks/scaling.py

measures as `compare.py` does: blocks with and without the instrumentation in one
process, in random order within each round, and the median of the differences. Then it
asks `tracemalloc` what the package's code keeps for each topic and each producer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tracemalloc
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from compare import environment
from embedded_broker import EmbeddedBroker
from kafka.cluster import ClusterMetadata
from report import print_tables, scaling_tables
from workloads import (
    Case,
    Collected,
    Figures,
    Workload,
    installed,
    measure,
    settings,
)

import otel_kafka_python

LINK_LIMIT = "OTEL_SPAN_LINK_COUNT_LIMIT"
SAMPLED = ("sampled",)
BOTH = ("sampled", "1 % sampled")
# Where a round has thousands of messages there are fewer of them.
FEWEST_ROUNDS = 5
PACKAGE = str(Path(otel_kafka_python.__file__).parent / "*")


class Curve(NamedTuple):
    """What is done, and what of it grows.

    Args:
        title: How it is shown.
        work: The method of `Workload` that makes a block of it.
        over: The field of `Case` that grows, or the environment variable.
        points: Its values.
        settings: The names of the settings that it is measured in.
    """

    title: str
    work: str
    over: str
    points: tuple[int, ...]
    settings: tuple[str, ...] = BOTH


BATCHES = Curve("poll: most records", "poll", "batch", (1, 10, 100, 1000, 5000))
TOPICS = Curve("send: topics", "send", "topics", (1, 10, 100, 1000, 10_000), SAMPLED)
CURVES = (
    BATCHES,
    TOPICS,
    Curve("send: producers", "send", "clients", (1, 4, 16, 64)),
    Curve("send: headers", "send", "headers", (0, 10, 20, 30, 40, 50)),
    Curve("loop: headers", "loop", "headers", (0, 10, 20, 30, 40, 50)),
    Curve("poll of 500: most links", "poll", LINK_LIMIT, (0, 1, 10, 100, 500), SAMPLED),
)


def measure_point(
    curve: Curve, name: str, point: int, address: str, arguments: argparse.Namespace
) -> Figures:
    block, rounds = arguments.block, arguments.rounds
    if point > block:
        rounds = max(min(rounds, FEWEST_ROUNDS), rounds * block // point)
    if curve is BATCHES:
        block = max(block, point)
    variables = {LINK_LIMIT: str(point)} if curve.over == LINK_LIMIT else {}
    grown: dict[str, Any] = {} if variables else {curve.over: point}
    # The SDK reads the variable when the provider is made, we when we instrument.
    with patch.dict(os.environ, variables):
        setting = settings(Collected())[name]
        workload = Workload(address, setting, Case(curve.work, name, **grown), block)
        with remembered(workload.topics) if curve is TOPICS else nullcontext():
            figures = measure(workload, ("plain", "ours"), rounds)
    workload.close()
    print(".", end="", file=sys.stderr, flush=True)
    return figures


def remembered(topics: list[str]) -> AbstractContextManager[object]:
    """Keep kafka-python from copying the set of its topics with each send.

    Among thousands that takes, and varies by, many times what is to be measured.
    """
    known = frozenset(topics)
    return patch.object(ClusterMetadata, "topics", lambda _: known)


def bytes_kept(address: str, number: int, over: str) -> dict[str, int]:
    """What is kept for each of so many topics or clients, and when all are gone."""
    setting = settings(Collected())["sampled"]
    case = Case("send", "sampled", **{over: number})  # type: ignore[arg-type]
    workload = Workload(address, setting, case, number)
    with installed("ours", setting, case):
        tracemalloc.start()
        try:
            workload.send(None, 1)()
            first = _own_bytes(workload)
            workload.send(None, number)()
            all_of_them = _own_bytes(workload)
            workload.close()
            del workload
            left = _own_bytes()
        finally:
            tracemalloc.stop()
    return {"each": round((all_of_them - first) / (number - 1)), "left": left}


def _own_bytes(workload: Workload | None = None) -> int:
    """What the package's own code has allocated and not freed."""
    if workload is not None:
        workload.flush()
    gc.collect()
    own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, PACKAGE)])
    return sum(trace.size for trace in own.traces)


def scale(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all curves."""
    most = arguments.most
    with EmbeddedBroker() as broker:
        curves = {
            curve.title: {
                name: {
                    str(point): measure_point(
                        curve, name, point, broker.address, arguments
                    )
                    for point in curve.points
                    if point <= most
                }
                for name in curve.settings
            }
            for curve in CURVES
        }
        kept = {
            "topic": bytes_kept(broker.address, min(1000, most), "topics"),
            "producer": bytes_kept(broker.address, min(64, most), "clients"),
        }
    print(file=sys.stderr)
    return {
        **environment(),
        "rounds": arguments.rounds,
        "block": arguments.block,
        "curves": curves,
        "bytes kept": kept,
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block", type=int, default=500, help="messages of a block")
    parser.add_argument("--most", type=int, default=10_000, help="points beyond go")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    arguments = parser.parse_args(given)
    results = scale(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print_tables(scaling_tables(results))


if __name__ == "__main__":
    main()
