"""What becomes of messages: futures, spans, counters and the broker have to agree."""

from __future__ import annotations

import time
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from clients import DEADLINE
from recorder import Recorder


def until_all_have_ended(recorder: Recorder) -> None:
    """Wait for the sender's callbacks, some of which may run after a flush."""
    deadline = time.monotonic() + DEADLINE
    while recorder.open() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert recorder.open() == []


def ids(span: ReadableSpan | None) -> tuple[str, str]:
    assert span is not None
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def carried(record: Any) -> tuple[str, str] | None:
    """The ids of the span in a record's headers, of which there is one at most."""
    values = [value for name, value in record.headers if name == "traceparent"]
    if not values:
        return None
    (value,) = values
    _, trace_id, span_id, _ = value.decode().split("-")
    return trace_id, span_id


def assert_failed(span: ReadableSpan, error: BaseException, error_type: str) -> None:
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == str(error)
    assert span.attributes is not None
    assert span.attributes["error.type"] == error_type
    (event,) = span.events
    assert event.name == "exception"
    assert event.attributes is not None
    assert str(event.attributes["exception.type"]).endswith(type(error).__qualname__)
