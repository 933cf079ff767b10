"""Calls that every type checker refuses: each line that ends in `# refused`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opentelemetry.trace import Span

from otel_kafka_python import KafkaPythonInstrumentor, Record, process_span


def hook_without_record(span: Span) -> None: ...


def run(record: Record, records: Iterator[Record], offset: int) -> None:
    instrument = KafkaPythonInstrumentor().instrument
    instrument(sned_spans=False)  # refused
    instrument(process_parent="ambient")  # refused
    instrument(commit_spans="sometimes")  # refused
    instrument(propagation="false")  # refused
    instrument(excluded_topics=3)  # refused
    instrument(capture_headers=[1])  # refused
    instrument(produce_hook="print")  # refused
    instrument(consume_hook=hook_without_record)  # refused
    instrument(skip_dep_check="yes")  # refused
    instrument(True)  # refused

    process_span(None)  # refused
    process_span("abc")  # refused
    process_span(offset)  # refused
    process_span(records)  # refused
    process_span(record for record in [record])  # refused
    process_span([offset])  # refused
    process_span({"orders": record})  # refused
    process_span()  # refused
    process_span(record).end()  # refused

    record.offset = offset  # refused
    _: Any = record.value  # refused
