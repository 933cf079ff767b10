"""The figures of `compare.py` and `scaling.py` as SVG.

The same figures make the same bytes: nothing has a date, and ids are hashes of what
they are of. Text stays text, in a grey that can be read on white and on black.
"""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from report import by_variants, scopes

GREY = "#808080"
COLOURS = {
    "hand-written": "#8a9bb0",
    "contrib": "#e08a3c",
    "ours": "#2f8f9d",
    "ours, with metrics": "#7fc4cc",
}
LINES = {"sampled": COLOURS["ours"], "1 % sampled": COLOURS["contrib"]}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "otel-kafka-python",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": GREY,
    "legend.frameon": False,
}


Panel = dict[str, dict[str, tuple[float, float]]]
"""What is added and how much it varies, by workload and variant."""


def _panels(results: dict[str, Any]) -> dict[str, Panel]:
    """A panel for each way of sampling; metrics are bars of their own in it."""
    panels: dict[str, Panel] = {}
    for title, figures in by_variants(results).items():
        work, setting = title.split(", ", 1)
        sampling, _, metrics = setting.partition(", ")
        by_variant = panels.setdefault(sampling, {}).setdefault(work, {})
        for variant in figures.keys() - {"plain"}:
            figure = figures[variant][scopes(title)[-1]]
            name = f"{variant}, with {metrics}" if metrics else variant
            by_variant[name] = (figure["added"], figure["spread"])
    return panels


def bars(results: dict[str, Any]) -> str:
    """What each variant adds to a message, by workload and setting."""
    panels = _panels(results)
    heights = [sum(map(len, panel.values())) + len(panel) for panel in panels.values()]
    with mpl.rc_context(STYLE):
        height = sum(heights) * 0.11 + len(panels) * 0.5 + 0.5
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, height_ratios=heights)
        for each, (setting, panel) in zip(axes, panels.items(), strict=True):
            _draw_bars(each, panel)
            each.set_title(setting, loc="left", fontweight="bold")
        axes[-1].set_xlabel(
            "µs of CPU time added to a message (of send: in all threads)"
        )
        figure.legend(
            handles=[Patch(color=colour, label=of) for of, colour in COLOURS.items()],
            loc="outside upper center",
            ncols=len(COLOURS),
        )
        return _svg(figure)


def _draw_bars(axes: Axes, panel: Panel) -> None:
    position, ticks = 0.0, []
    for by_variant in panel.values():
        first = position
        for name, colour in COLOURS.items():
            if name not in by_variant:
                continue
            added, spread = by_variant[name]
            axes.barh(position, added, 0.9, xerr=spread, color=colour, ecolor=GREY)
            position += 1
        ticks.append((first + position - 1) / 2)
        position += 1
    axes.set_yticks(ticks, list(panel))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.02)
    axes.grid(axis="x")


def curves(scaling: dict[str, Any]) -> str:
    """What ours adds to a message, as batches, topics, clients and so on grow."""
    drawn = scaling["curves"]
    rows = -(-len(drawn) // 2)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.1 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, 2).flat
        for axes, (title, by_setting) in zip(panels, drawn.items(), strict=True):
            _draw_curve(axes, title, by_setting)
        figure.supylabel("µs of CPU time added to a message", fontsize=9)
        figure.legend(
            handles=[
                Line2D([], [], color=colour, marker="o", ms=4, label=of)
                for of, colour in LINES.items()
            ],
            loc="outside upper center",
            ncols=len(LINES),
        )
        return _svg(figure)


def _draw_curve(axes: Axes, title: str, by_setting: dict[str, Any]) -> None:
    highest = 0.0
    for setting, by_point in by_setting.items():
        ours = [figures["ours"]["thread"] for figures in by_point.values()]
        added = [each["added"] for each in ours]
        highest = max(highest, *added)
        # The points stand at equal distances: most grow by a factor.
        positions, colour = range(len(ours)), LINES[setting]
        axes.plot(positions, added, marker="o", ms=4, color=colour)
        axes.fill_between(
            positions,
            [each["added"] - each["spread"] for each in ours],
            [each["added"] + each["spread"] for each in ours],
            color=colour,
            alpha=0.25,
            linewidth=0,
        )
        axes.set_xticks(range(len(ours)), [f"{int(point):,}" for point in by_point])
    axes.set_ylim(0, 1.3 * highest)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y")


def _svg(figure: Figure) -> str:
    written = StringIO()
    figure.savefig(
        written,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None},
    )
    # A hundredth of a point is more than anyone sees; the last digits may differ
    # from one processor to another.
    rounded = re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", written.getvalue())
    return "\n".join(line.rstrip() for line in rounded.splitlines()) + "\n"
