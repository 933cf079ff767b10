"""The traces that the demo expects, the traces that it got, and where the time went."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

ERROR = 2  # opentelemetry.proto.trace.v1.Status.StatusCode.STATUS_CODE_ERROR
DECLINED = "CardDeclinedError"  # as `payments.py` raises it


class Plan(NamedTuple):
    """The numbers of orders, by their outcome.

    Args:
        rush: How many come before the checkout.
        checkout: How many the checkout has.
        refused: How many of these are too large for the broker.
        declined: How many of these the bank declines to pay.
    """

    rush: int
    checkout: int = 5
    refused: int = 1
    declined: int = 1

    @property
    def delivered(self) -> int:
        return self.rush + self.checkout - self.refused

    @property
    def paid(self) -> int:
        return self.delivered - self.declined


@dataclass
class Span:
    """A span that arrived by OTLP. Times are in nanoseconds since the epoch."""

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
    """Read the spans that an OTLP receiver has recorded."""
    spans = []
    for each in received:
        span = each.span
        resource = values(each.resource.attributes)
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
                values(span.attributes),
                [(link.trace_id, link.span_id) for link in span.links],
                [
                    values(event.attributes)
                    for event in span.events
                    if event.name == "exception"
                ],
            )
        )
    return spans


def values(attributes: Iterable[Any]) -> dict[str, Any]:
    """Convert attributes that arrived by OTLP to a dict."""
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value"))
        for each in attributes
    }


def tree(spans: list[Span]) -> Span | None:
    """The checkout with all spans of its trace below it, or None if it is missing."""
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


def check(spans: list[Span], plan: Plan) -> Span:
    """Check the checkout's trace.

    Args:
        spans: All spans that have arrived.
        plan: How many orders there are.

    Returns:
        The checkout, the root of the trace.

    Raises:
        UnexpectedError: Something is missing or wrong. The message names it.
    """
    root = tree(spans)
    if root is None:
        raise UnexpectedError("there is no span of the checkout")
    sends = [span for span in root.children if span.name == "send orders"]
    expect(len(sends) == plan.checkout, f"{len(sends)} of {plan.checkout} sends")
    failed = [span for span in sends if span.failed]
    refused = len(failed)
    expect(refused == plan.refused, f"{refused} of {plan.refused} refused sends")
    for send in failed:
        expect(not send.children, "a refused order was processed")
        error_type = send.attributes.get("error.type")
        expect(error_type == "MESSAGE_TOO_LARGE", f"error.type is {error_type}")
    delivered = [send for send in sends if not send.failed]
    payments = [send for send in delivered if check_payment(send)]
    declined = len(delivered) - len(payments)
    expect(declined == plan.declined, f"{declined} of {plan.declined} declined")
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
    """Check the spans of an order in the payments service.

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
class Stage:
    """A part of an order's path. Its duration is in nanoseconds."""

    what: str
    where: str
    duration: int


def stages(send: Span) -> list[Stage]:
    """The stages of one order, from its send to the end of its shipping."""
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


@dataclass
class Bottleneck:
    """The service that takes the longest to process an order.

    An order that waits in a topic waits for those before it, so it is the service
    behind the topic that is slow, not the broker.

    Args:
        service: Its name.
        median: The median time per order, in nanoseconds.
        orders: The number of orders in the median.
    """

    service: str
    median: float
    orders: int


def bottleneck(root: Span) -> tuple[Span, list[Stage], Bottleneck]:
    """The slowest order, its stages, and the bottleneck of all orders."""
    shipped = [send for send in root.children if is_shipped(send)]
    slowest = max(shipped, key=lambda send: max(s.end for _, s in send.walk()))
    taken: dict[str, list[int]] = {}
    for send in shipped:
        for stage in stages(send):
            if stage.what == "being processed":
                taken.setdefault(stage.where, []).append(stage.duration)
    found = [Bottleneck(where, median(t), len(t)) for where, t in taken.items()]
    return slowest, stages(slowest), max(found, key=lambda each: each.median)


def sampled(spans: list[Span]) -> int:
    """How many of the orders before the checkout are in traces."""
    return sum(span.name == "send orders" and not span.parent_id for span in spans)
