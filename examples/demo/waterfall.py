"""Draws a trace as a waterfall, for the terminal and as an SVG."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

from measures import Hop, Measured, Metrics, slowest
from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from story import Bottleneck, Span, Stage

WIDTH = 120
# The borders of the panel, and the space around them and around the bars.
FRAME = 6
# A column goes before the bars are shorter than this; the first of these goes first.
SHORTEST_BARS = 22
OPTIONAL = ("service", "took", "error")
BETWEEN_TICKS = 9
COLOURS = {"orders": "cyan", "payments": "magenta", "shipping": "green"}
KEY = "messaging.kafka.message.key"


def duration(nanoseconds: float) -> str:
    if nanoseconds >= 1e9:
        return f"{nanoseconds / 1e9:.1f} s"
    return f"{nanoseconds / 1e6:.1f} ms"


@dataclass
class Row:
    """A span of the picture.

    Args:
        span: The span.
        depth: Its depth in the trace.
        orders: The numbers of its orders.
        waits_since: When its message arrived in the topic, if it processes one.
    """

    span: Span
    depth: int = 0
    orders: str = ""
    waits_since: int | None = None

    @property
    def start(self) -> int:
        return self.span.start if self.waits_since is None else self.waits_since

    @property
    def style(self) -> str:
        return "bold red" if self.span.failed else COLOURS[self.span.service]

    def below(self) -> Iterator[Row]:
        """This row and those of all spans below it, in the order of time."""
        yield self
        for span in sorted(self.span.children, key=lambda child: child.start):
            order = span.attributes.get(KEY, self.orders)
            # A message may be there before its sender has the broker's answer.
            waits = span.name.startswith("process ") and self.span.end < span.start
            since = self.span.end if waits else None
            yield from Row(span, self.depth + 1, order, since).below()


def rows_of(root: Span, polls: list[Span]) -> tuple[list[Row], list[Row]]:
    """The rows of a trace, and of the polls that link to it."""
    trace = list(Row(root).below())
    orders = {row.span.span_id: row.orders for row in trace}
    linking = [
        Row(poll, orders=", ".join(orders.get(linked, "?") for _, linked in poll.links))
        for poll in polls
    ]
    return trace, linking


class Axis:
    """Maps times to columns of the bars."""

    def __init__(self, rows: list[Row], columns: int) -> None:
        self.columns = columns
        # A poll may have begun to wait long before the first of the others.
        self.start = rows[0].start
        self.length = max(row.span.end for row in rows) - self.start

    def column(self, time: int) -> int:
        since = max(0, time - self.start)
        return round(since / self.length * (self.columns - 1))

    def ticks(self) -> str:
        """Two lines: the times and their marks."""
        steps = (digit * 10**power for power in count(5) for digit in (1, 2, 5))
        fewest = self.length * BETWEEN_TICKS / self.columns
        step = next(each for each in steps if each >= fewest)
        times, line = "", "─" * self.columns
        for time in range(0, self.length, step):
            column = self.column(self.start + time)
            label = f"{time / 1e6:g} ms" if time else "0"
            if column + len(label) <= self.columns:
                times = times.ljust(column) + label
            line = f"{line[:column]}┬{line[column + 1 :]}"
        return f"{times}\n{line}"

    def bar(self, row: Row) -> Text:
        begin = self.column(row.start)
        first, last = self.column(row.span.start), self.column(row.span.end)
        bar = Text(" " * begin)
        bar.append("·" * (first - begin), "bold")
        bar.append("━" * (last - first) if last > first else "╸", row.style)
        return bar


class Column(NamedTuple):
    """A column beside the bars."""

    title: str
    cell: Callable[[Row], Text]
    justify: Literal["left", "right"] = "left"

    def width(self, rows: list[Row]) -> int:
        """The width of its content, with a space on both sides."""
        return max(len(self.title), *(self.cell(row).cell_len for row in rows)) + 2


def _name(row: Row) -> Text:
    branch = f"{' ' * row.depth}└ " if row.depth else ""
    return Text(f"{branch}{row.span.name}", "bold red" if row.span.failed else "")


COLUMNS = [
    Column("order", lambda row: Text(row.orders)),
    Column("span", _name),
    Column("service", lambda row: Text(row.span.service, row.style)),
    Column("bars", lambda _: Text()),
    Column("took", lambda row: Text(duration(row.span.duration)), "right"),
    Column("error", lambda row: Text(row.span.attributes.get("error.type", ""), "red")),
]


def draw(root: Span, polls: list[Span], width: int) -> Panel:
    """The picture: the trace, and the polls that link to it."""
    trace, linking = rows_of(root, polls)
    rows = trace + linking
    columns, optional = COLUMNS, iter(OPTIONAL)
    while (bars := width - FRAME - _beside(columns, rows)) < SHORTEST_BARS:
        dropped = next(optional, None)
        if dropped is None:
            bars = SHORTEST_BARS
            break
        columns = [column for column in columns if column.title != dropped]
    axis = Axis(rows, bars)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in columns:
        if column.title == "bars":
            table.add_column(axis.ticks(), width=bars, no_wrap=True)
        else:
            table.add_column(f"\n{column.title}", justify=column.justify, no_wrap=True)
    for row in rows:
        if linking and row is linking[0]:
            table.add_section()
        cells = [
            axis.bar(row) if column.title == "bars" else column.cell(row)
            for column in columns
        ]
        table.add_row(*cells)
    legend = "··· in the topic   ━━━ the span   [red]━━━ failed[/]"
    return Panel(
        table,
        title="one checkout, three services",
        subtitle=legend,
        border_style="dim",
    )


def _beside(columns: list[Column], rows: list[Row]) -> int:
    return sum(column.width(rows) for column in columns if column.title != "bars")


def explain(root: Span, slow: Span, stages: list[Stage], worst: Bottleneck) -> Padding:
    """A few lines that explain the trace."""
    total = sum(stage.duration for stage in stages)
    sums: dict[str, int] = {}
    for stage in stages:
        sums[stage.what] = sums.get(stage.what, 0) + stage.duration
    parts = ", ".join(f"{duration(spent)} {what}" for what, spent in sums.items())
    failed = [
        f"{escape(_error(row.span))} in {row.span.name} of order {row.orders}"
        for row in Row(root).below()
        if row.span.failed
    ]
    median = duration(worst.median)
    return _say(
        f"Order {slow.attributes.get(KEY)} took {duration(total)}: {parts}.\n"
        f"The bottleneck is [bold]{worst.service}[/]: it takes {median} per order "
        f"(median of {worst.orders}), and later orders wait in the topic.\n"
        f"[bold red]In red[/]: {'; '.join(failed)}. "
        "The services contain no code for this."
    )


def _say(text: str) -> Padding:
    return Padding(Text.from_markup(text), (0, 1))


def _error(span: Span) -> str:
    error_type = str(span.attributes["error.type"])
    for exception in span.exceptions:
        if exception["exception.type"].endswith(error_type):
            return f"{error_type}: {exception['exception.message']}"
    return error_type


def draw_hops(hops: list[Hop], latency: Measured, sampled: int) -> Group:
    """A table of the waiting and processing times of all orders, by service."""
    slow = slowest(hops)
    orders = hops[0].waiting.count
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column(f"\n{orders:g} orders")
    for what in ("in the topic", "processing"):
        for share in ("median", "99 %"):
            table.add_column(f"{what}\n{share}", justify="right")
    for hop in hops:
        quantiles = [
            _estimate(measured, share)
            for measured in (hop.waiting, hop.processing)
            for share in (0.5, 0.99)
        ]
        name = Text(f"{hop.topic} → ")
        name.append(hop.service, COLOURS[hop.service])
        table.add_row(name, *quantiles, style="bold" if hop is slow else "")
    waiting = duration(slow.waiting.quantile(0.5) * 1e9)
    processing = duration(slow.processing.mean * 1e9)
    return Group(
        table,
        _say(
            f"From send to shipping, an order takes {_estimate(latency, 0.5)} "
            f"(median; 99 %: {_estimate(latency, 0.99)}).\n"
            f"[bold]{slow.service}[/] is the bottleneck: half of the orders waited "
            f"{waiting} or longer for it, and it takes {processing} on average.\n"
            f"The metrics cover all orders. Only {sampled} of the orders before the "
            "checkout have a trace."
        ),
    )


def _estimate(measured: Measured, share: float) -> str:
    # The first bucket gives only an upper bound.
    first = min(upto for _, upto in measured.buckets)
    estimated = measured.quantile(share)
    if estimated < first:
        return f"< {first * 1e3:g} ms"
    return duration(estimated * 1e9)


def show(picture: Callable[[int], Group], below: Table, svg: Path) -> None:
    """Print a picture as wide as the terminal, and write it as an SVG.

    Args:
        picture: Draws the picture for a width in columns.
        below: The table that is only printed in the terminal.
        svg: The file of the SVG.
    """
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    terminal = Console(width=None if has_width else WIDTH)
    terminal.print(picture(terminal.width))
    terminal.print(below)
    paper = Console(record=True, width=WIDTH, file=io.StringIO())
    paper.print(picture(WIDTH))
    drawn = paper.export_svg(title="otel-kafka-python")
    # Without the fonts that it would fetch from elsewhere.
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    svg.parent.mkdir(parents=True, exist_ok=True)
    svg.write_text(drawn)


COUNTS = {
    "messages sent": "messaging.client.sent.messages send",
    "messages refused": "messaging.client.sent.messages send failed",
    "messages consumed": "messaging.client.consumed.messages poll",
    "send duration": "messaging.client.operation.duration send",
    "commit duration": "messaging.client.operation.duration commit",
}


def draw_metrics(metrics: Metrics) -> Table:
    """A small table of the averages of each service's metrics."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("all metrics")
    for service, colour in COLOURS.items():
        table.add_column(Text(service, colour), justify="right")
    for row, name in COUNTS.items():
        cells = []
        for service in COLOURS:
            measured = metrics.get(service, {}).get(name)
            if measured is None:
                cells.append("")
            elif measured.total:
                cells.append(duration(measured.mean * 1e9))
            else:
                cells.append(f"{measured.count:g}")
        table.add_row(row, *cells)
    return table
