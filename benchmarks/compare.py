"""What instrumentation costs: plain, hand-written, contrib's and ours, in one run.

    python benchmarks/compare.py

runs blocks of messages on the embedded broker, all variants in one process and in
random order within each round, because processes of identical code differ by more than
the variants do. What a variant adds is the median of its differences to the plain
client of the same round, in CPU time of the calling thread and of the whole process.
Beside it each variant sends once without a pause, so that what is in flight grows old.

With `--check` it exits with an error where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from embedded_broker import EmbeddedBroker
from kafka import KafkaConsumer, TopicPartition
from opentelemetry.sdk.trace import ReadableSpan
from report import print_tables, tables, targets
from workloads import (
    KEY,
    SCOPES,
    TOPICS,
    VARIANTS,
    Case,
    Collected,
    Figures,
    Setting,
    Workload,
    measure,
    settings,
)

# The others have no metrics, exclude no topics and measure no pipelines.
OURS_ALONE = ("plain", "ours")
LONG = 50_000

_TRACED = ("sampled", "1 % sampled")
_ALL = (*_TRACED, "no SDK", "no-op provider")
_MEASURED = ("sampled, metrics", "1 % sampled, metrics")
_EXCLUDED = {"excluded_topics": f"{TOPICS}*"}
_PIPELINES = {"pipeline_latency": True}

CASES = (
    *(Case("send", each) for each in (*_ALL, *_MEASURED)),
    *(Case("send", each, "send without a key", key=None) for each in _TRACED),
    *(Case("loop", each) for each in (*_ALL, *_MEASURED)),
    *(
        Case(
            "loop",
            each,
            "loop with receive spans only",
            keywords={"process_spans": False},
        )
        for each in _TRACED
    ),
    *(
        Case("poll", each, f"poll of {batch}", batch=batch)
        for batch in (1, 10, 500)
        for each in _TRACED
    ),
    *(Case("poll", each, "poll of 500", batch=500) for each in _MEASURED),
    *(Case("iterate", each, "poll and loop") for each in (*_TRACED, _MEASURED[0])),
    Case("send", "sampled", "send to an excluded topic", keywords=_EXCLUDED),
    Case("loop", "sampled", "loop over an excluded topic", keywords=_EXCLUDED),
    *(
        Case(
            name.split()[0],
            _MEASURED[1],
            f"{name} with pipeline latency",
            keywords=_PIPELINES,
        )
        for name in ("send", "loop", "poll of 500")
    ),
)
LONG_CASES = tuple(Case("send", each) for each in _TRACED)


def check(workload: Workload, collected: Collected) -> None:
    """That the variants make the same spans and headers, before anything is timed."""
    title = workload.case.title
    spans = {
        each: _spans_of(workload, each, collected)
        for each in ("hand-written", "ours", "contrib")
    }
    said = {
        each: sorted(map(_said_by, spans[each])) for each in ("hand-written", "ours")
    }
    if said["hand-written"] != said["ours"]:
        raise SystemExit(
            f"{title}: by hand {len(said['hand-written'])} spans, the first "
            f"{said['hand-written'][:1]}; ours {len(said['ours'])}, the first "
            f"{said['ours'][:1]}"
        )
    # It has a span for each message, and none of a poll.
    messages = {"send": "PRODUCER", "loop": "CONSUMER"}.get(workload.case.work)
    if messages and len(spans["contrib"]) != len(spans["ours"]):
        raise SystemExit(f"{title}: contrib made {len(spans['contrib'])} spans")
    if messages and {span.kind.name for span in spans["contrib"]} != {messages}:
        raise SystemExit(f"{title}: contrib's spans are of another kind")


def _spans_of(
    workload: Workload, variant: str, collected: Collected
) -> list[ReadableSpan]:
    with _reading(workload) as headers:
        collected.kept = []
        workload.run(variant)
        spans, collected.kept = collected.kept, None
        if workload.case.work == "send":
            made = {span.context.span_id for span in spans if span.context}
            carried = {_span_id(next(headers)) for _ in spans}
            if carried != made:
                raise SystemExit(
                    f"{workload.case.title}: {variant} made {len(made)} spans, and of "
                    f"the contexts in the headers {len(carried & made)} are theirs"
                )
    return spans


@contextmanager
def _reading(workload: Workload) -> Iterator[Iterator[Any]]:
    """The headers of what is sent from now on."""
    consumer = KafkaConsumer(bootstrap_servers=workload.address)
    partition = TopicPartition(workload.topic, 0)
    consumer.assign([partition])
    consumer.seek(partition, consumer.end_offsets([partition])[partition])
    try:
        yield (record.headers for record in consumer)
    finally:
        consumer.close()


def _span_id(headers: list[tuple[str, bytes]]) -> int:
    ((name, value),) = headers
    assert name == "traceparent"
    return int(value.split(b"-")[2], 16)


def _said_by(span: ReadableSpan) -> tuple[Any, ...]:
    """What has to be the same; ids and, where messages are sent, offsets are not."""
    said = {**(span.attributes or {})}
    if span.kind.name == "PRODUCER":
        said["messaging.kafka.offset"] = 0
    return (
        span.name,
        span.kind.name,
        span.parent is not None,
        [sorted((link.attributes or {}).items()) for link in span.links],
        sorted(said.items()),
    )


def run_long(workload: Workload, messages: int) -> Figures:
    """Each variant once, without a pause."""
    times = {
        variant: workload.run(variant, messages)
        for variant in random.sample(VARIANTS, len(VARIANTS))
    }
    return {
        variant: {
            scope: {
                "microseconds": round(getattr(times[variant], scope), 3),
                "added": round(
                    getattr(times[variant], scope) - getattr(times["plain"], scope), 3
                ),
            }
            for scope in SCOPES
        }
        for variant in VARIANTS
    }


def environment() -> dict[str, Any]:
    """What the figures depend on, beside the machine's speed."""
    packages = ("kafka-python", "opentelemetry-sdk", "wrapt")
    others = ("opentelemetry-instrumentation-kafka-python", "otel-kafka-python")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {each: version(each) for each in (*packages, *others)},
    }


def variants_of(case: Case) -> tuple[str, ...]:
    """The variants that can do what the case is about."""
    if case.keywords is _PIPELINES:
        return (*OURS_ALONE, "default")
    if "metrics" in case.setting or case.keywords is _EXCLUDED:
        return OURS_ALONE
    return VARIANTS


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check, then time all cases that are asked for."""
    collected = Collected()
    of_name = settings(collected)
    workloads: dict[str, Figures] = {}
    long: dict[str, Figures] = {}
    with EmbeddedBroker() as broker:

        def open_workload(case: Case) -> Workload:
            setting: Setting = of_name[case.setting]
            return Workload(broker.address, setting, case, arguments.block)

        for case in CASES:
            if not fnmatch(case.title, arguments.only):
                continue
            workload = open_workload(case)
            variants = variants_of(case)
            if case.setting == "sampled" and variants is VARIANTS:
                check(workload, collected)
            workloads[case.title] = measure(workload, variants, arguments.rounds)
            workload.close()
            print(".", end="", file=sys.stderr, flush=True)
        for case in LONG_CASES if arguments.only == "*" else ():
            workload = open_workload(case)
            long[case.title] = run_long(workload, arguments.long)
            workload.close()
    print(file=sys.stderr)
    return {
        **environment(),
        "rounds": arguments.rounds,
        "block": arguments.block,
        "long": arguments.long,
        "key": KEY.decode(),
        "workloads": workloads,
        "long runs": long,
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=500, help="messages of a block")
    parser.add_argument("--long", type=int, default=LONG, help="of a run with no pause")
    parser.add_argument("--only", default="*", help="a glob of workloads")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    parser.add_argument("--check", action="store_true", help="fail on missed targets")
    arguments = parser.parse_args(given)
    results = compare(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print_tables(tables(results))
    if arguments.check and not all(each.reached for each in targets(results)):
        sys.exit(1)


if __name__ == "__main__":
    main()
