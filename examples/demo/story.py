"""What the demo expects to see, what it saw, and where the time went."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

ERROR = 2  # opentelemetry.proto.trace.v1.Status.StatusCode.STATUS_CODE_ERROR
DECLINED = "CardDeclinedError"  # as `payments.py` raises it


@dataclass
class Span:
    """A span as it came by OTLP; times are in nanoseconds since the epoch."""

    name: str
    service: str
    span_id: bytes
    parent_id: bytes
    trace_id: bytes
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any]
    links: list[tuple[bytes, bytes]]
    exceptions: list[dict[str, Any]]
    children: list[Span] = field(default_factory=list)

    @property
    def duration(self) -> int:
        return self.end - self.start

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Span]]:
        """This span and all below it, each with its depth, in the order of time."""
        yield depth, self
        for child in sorted(self.children, key=lambda child: child.start):
            yield from child.walk(depth + 1)

    def child(self, name: str) -> Span:
        """The only child of a name."""
        (found,) = [child for child in self.children if child.name == name]
        return found


def read(received: Iterable[Any]) -> list[Span]:
    """Take spans from what an OTLP receiver has recorded."""
    spans = []
    for each in received:
        span = each.span
        resource = _values(each.resource.attributes)
        spans.append(
            Span(
                span.name,
                resource["service.name"],
                span.span_id,
                span.parent_span_id,
                span.trace_id,
                span.start_time_unix_nano,
                span.end_time_unix_nano,
                span.status.code == ERROR,
                _values(span.attributes),
                [(link.trace_id, link.span_id) for link in span.links],
                [
                    _values(event.attributes)
                    for event in span.events
                    if event.name == "exception"
                ],
            )
        )
    return spans


def _values(attributes: Iterable[Any]) -> dict[str, Any]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value"))
        for each in attributes
    }


def tree(spans: list[Span]) -> Span | None:
    """The checkout with all spans of its trace below it, or None if it is not there."""
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        span.children = []
    for span in spans:
        if span.parent_id in by_id:
            by_id[span.parent_id].children.append(span)
    return next((span for span in spans if span.name == "checkout"), None)


def polls(spans: list[Span], trace_id: bytes) -> list[Span]:
    """The polls, each a trace of its own, that link to messages of a trace."""
    return [
        span
        for span in spans
        if span.name == "poll payments"
        and any(trace_id == linked for linked, _ in span.links)
    ]


class UnexpectedError(Exception):
    """The telemetry is not what it should be."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise UnexpectedError(what)


def check(spans: list[Span], orders: int, refused: int, declined: int) -> Span:
    """Hold what was seen against the story.

    Args:
        spans: All spans that have come.
        orders: How many orders were sent.
        refused: How many of them are too large for the broker.
        declined: How many of them the bank declines to pay.

    Returns:
        The checkout, the root of the trace.

    Raises:
        UnexpectedError: Something is missing or wrong; it says what.
    """
    root = tree(spans)
    if root is None:
        raise UnexpectedError("there is no span of the checkout")
    sends = [span for span in root.children if span.name == "send orders"]
    expect(len(sends) == orders, f"{len(sends)} of {orders} sends")
    failed = [span for span in sends if span.failed]
    expect(len(failed) == refused, f"{len(failed)} of {refused} refused sends")
    for send in failed:
        expect(not send.children, "a refused order was processed")
        error_type = send.attributes.get("error.type")
        expect(error_type == "MESSAGE_TOO_LARGE", f"error.type is {error_type}")
    delivered = [send for send in sends if not send.failed]
    payments = [send for send in delivered if check_payment(send)]
    unpaid = len(delivered) - len(payments)
    expect(unpaid == declined, f"{unpaid} of {declined} declined payments")
    linked = {link for poll in polls(spans, root.trace_id) for link in poll.links}
    for send in payments:
        names = [span.name for _, span in send.walk()]
        chain = ["send orders", "process orders", "send payments", "process payments"]
        expect(names == [*chain, "INSERT"], f"an order's spans are {names}")
        services = [span.service for _, span in send.walk()]
        passed = ["orders", "payments", "payments", "shipping", "shipping"]
        expect(services == passed, f"an order's services are {services}")
        payment = send.child("process orders").child("send payments")
        expect(
            (payment.trace_id, payment.span_id) in linked,
            "no poll links to a payment",
        )
    return root


def check_payment(send: Span) -> bool:
    """Hold what the payments service did with an order against the story.

    Returns:
        Whether the order was paid.
    """
    names = [span.name for _, span in send.walk()]
    expect(
        names[:2] == ["send orders", "process orders"], f"an order's spans are {names}"
    )
    process = send.child("process orders")
    if not process.failed:
        return True
    expect(not process.children, "a declined order went on")
    # Up to Python 3.11 a loop cannot name the exception.
    error_type = process.attributes.get("error.type")
    named = error_type == DECLINED and bool(process.exceptions)
    expect(named or error_type == "_OTHER", f"a payment's error.type is {error_type}")
    return False


@dataclass
class Measured:
    """A metric of a service, over all its topics: how many, and their sum."""

    count: float = 0
    total: float = 0

    @property
    def mean(self) -> float:
        return self.total / self.count


Metrics = dict[str, dict[str, Measured]]
"""By service, and by the metric and the operation, which may have failed."""


def read_metrics(received: Iterable[Any]) -> Metrics:
    """Take metrics from what an OTLP receiver has recorded; the last of each counts."""
    last: dict[tuple[str, str, frozenset[tuple[str, Any]]], Measured] = {}
    for each in received:
        service = _values(each.resource.attributes)["service.name"]
        kind = each.metric.WhichOneof("data")
        for point in getattr(each.metric, kind).data_points:
            attributes = _values(point.attributes)
            operation = attributes.get("messaging.operation.name", "")
            failed = "failed" if "error.type" in attributes else ""
            name = " ".join(filter(None, (each.metric.name, operation, failed)))
            last[service, name, frozenset(attributes.items())] = (
                Measured(point.count, point.sum)
                if kind == "histogram"
                else Measured(point.as_int or point.as_double)
            )
    found: Metrics = {}
    for (service, name, _), one in last.items():
        measured = found.setdefault(service, {}).setdefault(name, Measured())
        measured.count += one.count
        measured.total += one.total
    return found


def check_metrics(metrics: Metrics, orders: int, refused: int, declined: int) -> None:
    """Hold the metrics against the story, as `check` does the traces."""
    delivered = orders - refused
    paid = delivered - declined
    expected = {
        ("orders", "messaging.client.sent.messages send"): delivered,
        ("orders", "messaging.client.sent.messages send failed"): refused,
        ("payments", "messaging.client.consumed.messages poll"): delivered,
        ("payments", "messaging.client.sent.messages send"): paid,
        ("payments", "messaging.process.duration process"): paid,
        ("payments", "messaging.process.duration process failed"): declined,
        ("shipping", "messaging.client.consumed.messages poll"): paid,
        ("shipping", "kafka.record.queue_time"): paid,
    }
    for (service, name), count in expected.items():
        measured = metrics.get(service, {}).get(name, Measured())
        expect(
            measured.count == count,
            f"{name} of {service} is {measured.count:g}, not {count}",
        )


@dataclass
class Stage:
    """A part of an order's way; how long it took is in nanoseconds."""

    what: str
    where: str
    duration: int


def stages(send: Span) -> list[Stage]:
    """Where the time of one order went, from its send to the end of its shipping."""
    found = []
    for topic in ("orders", "payments"):
        process = send.child(f"process {topic}")
        found += [
            Stage("waiting for acknowledgements", topic, send.duration),
            Stage("waiting in topics", topic, max(0, process.start - send.end)),
        ]
        within = 0
        for child in process.children:
            if child.name == "send payments":
                send, within = child, child.duration
        found.append(
            Stage("being processed", process.service, process.duration - within)
        )
    return found


def is_shipped(send: Span) -> bool:
    return any(span.name == "process payments" for _, span in send.walk())


def bottleneck(root: Span) -> tuple[Span, list[Stage], Stage]:
    """The slowest order, the stages of its way, and the longest processing.

    An order that waits in a topic waits for those before it, so that it is the
    service behind the topic that is slow, not the broker.
    """
    shipped = [send for send in root.children if is_shipped(send)]
    slowest = max(shipped, key=lambda send: max(s.end for _, s in send.walk()))
    found = stages(slowest)
    processing = [stage for stage in found if stage.what == "being processed"]
    return slowest, found, max(processing, key=lambda stage: stage.duration)
