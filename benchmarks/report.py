"""The figures of `compare.py` as tables, and the targets that they are to reach."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

_BOTH = ("thread", "process")
_TRACED = ("sampled", "1 % sampled")


class Target(NamedTuple):
    """A ratio of added costs that is to be reached."""

    what: str
    limit: float
    measured: float
    # Half of the distance between the quartiles of ours, as the ratio has it.
    spread: float

    @property
    def reached(self) -> bool:
        return self.measured <= self.limit


class Goal(NamedTuple):
    """What ours of a workload is to cost at most: `limit` times what is named here."""

    limit: float
    workload: str
    scope: str
    variant: str
    of: str = ""  # another workload


# Beside these: each workload costs no more than 1.05 of the hand-written (an unsampled
# send 1.15, because the dispatch of a wrapper is in it).
GOALS = (
    Goal(0.85, "send, sampled", "thread", "contrib"),
    Goal(1.0, "send, sampled", "process", "contrib"),
    *(Goal(0.65, "send, 1 % sampled", scope, "contrib") for scope in _BOTH),
    *(Goal(0.35, "send, no SDK", scope, "contrib") for scope in _BOTH),
    Goal(0.35, "loop, no SDK", "thread", "contrib"),
    Goal(1.05, "loop, sampled", "thread", "contrib"),
    Goal(0.8, "loop, 1 % sampled", "thread", "contrib"),
    *(
        Goal(0.35, f"poll of {batch}, {each}", "thread", "contrib", f"loop, {each}")
        for batch in (10, 500)
        for each in _TRACED
    ),
    *(
        Goal(1.3, "send, sampled, metrics", scope, "ours", "send, sampled")
        for scope in _BOTH
    ),
    Goal(1.5, "loop, sampled, metrics", "thread", "ours", "loop, sampled"),
)


def targets(results: dict[str, Any]) -> list[Target]:
    """The targets, as far as the workloads that they are about were measured."""
    workloads = results["workloads"]
    by_hand = [
        Goal(
            1.15 if "send" in name and "1 %" in name else 1.05,
            name,
            scope,
            "hand-written",
        )
        for name in workloads
        for scope in scopes(name)
    ]
    return [
        _target(workloads, goal)
        for goal in (*by_hand, *GOALS)
        if goal.workload in workloads
        and goal.variant in workloads.get(goal.of or goal.workload, ())
    ]


def _target(workloads: dict[str, Any], goal: Goal) -> Target:
    ours = workloads[goal.workload]["ours"][goal.scope]
    base = workloads[goal.of or goal.workload][goal.variant][goal.scope]["added"]
    what = f"{goal.workload} / {goal.variant}"
    if goal.of:
        what += f" of {goal.of}"
    return Target(
        f"{what}: {goal.scope}", goal.limit, ours["added"] / base, ours["spread"] / base
    )


def scopes(name: str) -> tuple[str, ...]:
    """Whose CPU time tells something: what is consumed, the calling thread works on."""
    return _BOTH if name.startswith("send") else _BOTH[:1]


class Rows(NamedTuple):
    """A table."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def costs(results: dict[str, Any]) -> Rows:
    """What each variant adds to plain, and how ours compares."""
    rows = []
    for name, figures in results["workloads"].items():
        for scope in scopes(name):
            rows.append(
                (
                    name,
                    scope,
                    f"{figures['plain'][scope]['microseconds']:.1f}",
                    *(
                        _added(figures, variant, scope)
                        for variant in ("hand-written", "contrib", "ours")
                    ),
                    *(
                        _ratio(figures, variant, scope)
                        for variant in ("hand-written", "contrib")
                    ),
                )
            )
    return Rows(
        (
            *("workload", "CPU time of", "plain takes", "hand-written adds"),
            *("contrib adds", "ours adds", "ours / hand-written", "ours / contrib"),
        ),
        rows,
    )


def _added(figures: dict[str, Any], variant: str, scope: str) -> str:
    if variant not in figures:
        return ""
    figure = figures[variant][scope]
    return f"{figure['added']:.1f} ± {figure['spread']:.1f}"


def _ratio(figures: dict[str, Any], variant: str, scope: str) -> str:
    base = figures[variant][scope]["added"] if variant in figures else 0
    # Contrib has no spans of `poll`: what it adds there is noise.
    if base < 1:
        return ""
    return f"{figures['ours'][scope]['added'] / base:.2f}"


def long_runs(results: dict[str, Any]) -> Rows:
    """What a message takes and costs where nothing pauses."""
    variants = ("plain", "hand-written", "contrib", "ours")
    return Rows(
        ("workload", "CPU time of", *variants),
        [
            (
                name,
                scope,
                *(f"{figures[each][scope]['microseconds']:.1f}" for each in variants),
            )
            for name, figures in results["long runs"].items()
            for scope in _BOTH
        ],
    )


def reached(results: dict[str, Any]) -> Rows:
    """The targets and what was measured."""
    return Rows(
        ("target", "at most", "measured", ""),
        [
            (
                each.what,
                f"{each.limit:.2f}",
                f"{each.measured:.2f} ± {each.spread:.2f}",
                "reached" if each.reached else "missed",
            )
            for each in targets(results)
        ],
    )


def show(results: dict[str, Any], console: Console) -> None:
    """Print all tables."""
    for title, make in (
        ("What a message costs, in microseconds", costs),
        ("Without a pause: what a message takes, in microseconds", long_runs),
        ("Targets: ratios of what is added", reached),
    ):
        made: Rows = make(results)
        table = Table(title=title)
        for number, column in enumerate(made.header):
            table.add_column(column, justify="right" if number > 1 else "left")
        for row in made.rows:
            table.add_row(*row)
        if made.rows:
            console.print(table)
