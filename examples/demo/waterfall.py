"""Draws a trace as a waterfall, for the terminal and as an SVG."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from story import Metrics, Span, Stage

WIDTH = 120
# What the columns beside the bars need, and what bars need to say anything.
BESIDE_BARS = 80
SHORTEST_BAR = 10
COLOURS = {"orders": "cyan", "payments": "magenta", "shipping": "green"}


def milliseconds(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.1f} ms"


class Axis:
    """Maps times to columns of the bars."""

    def __init__(self, spans: list[Span], columns: int) -> None:
        self.columns = columns
        self.start = min(span.start for span in spans)
        self.length = max(span.end for span in spans) - self.start

    def column(self, time: int) -> int:
        return round((time - self.start) / self.length * (self.columns - 1))

    def bar(self, span: Span) -> Text:
        first, last = self.column(span.start), self.column(span.end)
        style = "bold red" if span.failed else COLOURS[span.service]
        bar = Text(" " * first)
        bar.append("━" * (last - first) if last > first else "╸", style)
        return bar


def draw(root: Span, polls: list[Span], lines: list[str], width: int) -> Group:
    """The picture: the trace, the polls that link to it, and what one sees."""
    rows = [*root.walk(), *((0, poll) for poll in polls)]
    columns = max(width - BESIDE_BARS, SHORTEST_BAR)
    axis = Axis([span for _, span in rows], columns)
    numbers: dict[bytes, str] = {}
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("span", no_wrap=True)
    table.add_column("service")
    table.add_column(f"0 … {milliseconds(axis.length)}", width=columns, no_wrap=True)
    table.add_column("took", justify="right")
    table.add_column("links to")
    for depth, span in rows:
        number = numbers.setdefault(span.span_id, str(len(numbers) + 1))
        links = [numbers.get(linked, "?") for _, linked in span.links]
        style = "bold red" if span.failed else ""
        name = f"{number:>2} {'  ' * depth}{'└ ' if depth else ''}{span.name}"
        note = Text(", ".join(links), "dim")
        if span.failed:
            note = Text(str(span.attributes["error.type"]), style)
        if span in polls and span is polls[0]:
            table.add_section()
        table.add_row(
            Text(name, style),
            Text(span.service, style or COLOURS[span.service]),
            axis.bar(span),
            Text(milliseconds(span.duration), style),
            note,
        )
    return Group(
        Panel(table, title="one checkout, three services", border_style="dim"),
        *(Text.from_markup(f" {line}") for line in lines),
    )


def explain(slowest: Span, stages: list[Stage], worst: Stage) -> list[str]:
    """A line or two that say what one sees."""
    key = slowest.attributes.get("messaging.kafka.message.key")
    total = sum(stage.duration for stage in stages)
    sums: dict[str, int] = {}
    for stage in stages:
        sums[stage.what] = sums.get(stage.what, 0) + stage.duration
    parts = ", ".join(f"{milliseconds(spent)} {what}" for what, spent in sums.items())
    return [
        f"Order {key} took {milliseconds(total)}: {parts}.",
        f"The bottleneck is [bold]{worst.where}[/]: {milliseconds(worst.duration)} "
        "for each order, and those behind it wait in the topic.",
        "[bold red]In red[/]: the broker refused an order that is too large, and the "
        "bank declined another. The services have no line for that.",
    ]


def show(root: Span, polls: list[Span], lines: list[str], svg: Path) -> None:
    """Print the picture as wide as the terminal, and write it as an SVG."""
    terminal = Console()
    if not terminal.is_terminal:
        terminal.width = WIDTH
    terminal.print(draw(root, polls, lines, terminal.width))
    paper = Console(record=True, width=WIDTH, file=io.StringIO())
    paper.print(draw(root, polls, lines, WIDTH))
    drawn = paper.export_svg(title="otel-kafka-python")
    # Without the fonts that it would fetch from elsewhere.
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    svg.parent.mkdir(parents=True, exist_ok=True)
    svg.write_text(drawn)


ROWS = {
    "messages sent": "messaging.client.sent.messages send",
    "messages refused": "messaging.client.sent.messages send failed",
    "messages consumed": "messaging.client.consumed.messages poll",
    "a failed one took": "messaging.process.duration process failed",
    "a send took": "messaging.client.operation.duration send",
    "processing one took": "messaging.process.duration process",
    "a commit took": "messaging.client.operation.duration commit",
    "waited in the topic": "kafka.record.queue_time",
}


def show_metrics(metrics: Metrics) -> None:
    """Print a small table of what each service has measured, on average."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("what the metrics say")
    for service, colour in COLOURS.items():
        table.add_column(Text(service, colour), justify="right")
    for row, name in ROWS.items():
        cells = []
        for service in COLOURS:
            measured = metrics.get(service, {}).get(name)
            if measured is None:
                cells.append("")
            elif measured.total:
                cells.append(milliseconds(measured.mean * 1e9))
            else:
                cells.append(f"{measured.count:g}")
        table.add_row(row, *cells)
    Console().print(table)
