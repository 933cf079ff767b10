"""The figures of `compare.py` and `scaling.py` as tables, and the targets."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

_BOTH = ("thread", "process")
_TRACED = ("sampled", "1 % sampled")
_WORK = ("send", "loop")
_LATENCY = "pipeline latency, 1 % sampled, metrics"
_WIDTH = 90  # of the lines of a page


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
    *(Goal(1.5, f"send with {_LATENCY}", scope, "default") for scope in _BOTH),
    Goal(2.0, f"loop with {_LATENCY}", "thread", "default"),
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
    base = max(base, 0.001)  # what is lost in noise is no base
    what = f"{goal.workload} / {goal.variant}"
    if goal.of:
        what += f" of {goal.of}"
    return Target(
        f"{what}: {goal.scope}", goal.limit, ours["added"] / base, ours["spread"] / base
    )


def scopes(name: str) -> tuple[str, ...]:
    """Whose CPU time tells something: what is consumed, the calling thread works on."""
    return _BOTH if name.startswith("send") else _BOTH[:1]


def by_settings(results: dict[str, Any]) -> dict[str, Any]:
    """The workloads that compare ours with itself, without a setting."""
    workloads: dict[str, Any] = results["workloads"]
    return {name: each for name, each in workloads.items() if "default" in each}


def by_variants(results: dict[str, Any]) -> dict[str, Any]:
    """The workloads that compare the variants."""
    workloads: dict[str, Any] = results["workloads"]
    return {name: each for name, each in workloads.items() if "default" not in each}


class Rows(NamedTuple):
    """A table."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def costs(results: dict[str, Any]) -> Rows:
    """What each variant adds to plain, and how ours compares."""
    rows = []
    for name, figures in by_variants(results).items():
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
                        _ratio(name, figures, variant, scope)
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


def _ratio(name: str, figures: dict[str, Any], variant: str, scope: str) -> str:
    # Contrib has no spans of `poll`: what it adds there is noise.
    if variant not in figures or (variant == "contrib" and name.startswith("poll")):
        return ""
    base = figures[variant][scope]["added"]
    return "" if base <= 0 else f"{figures['ours'][scope]['added'] / base:.2f}"


def pipelines(results: dict[str, Any]) -> Rows:
    """What ours adds without and with `pipeline_latency`, in the same run."""
    return Rows(
        ("workload", "CPU time of", "without it", "with it", "ratio"),
        [
            (
                name,
                scope,
                _added(figures, "default", scope),
                _added(figures, "ours", scope),
                _ratio(name, figures, "default", scope),
            )
            for name, figures in by_settings(results).items()
            for scope in scopes(name)
        ],
    )


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


def tables(results: dict[str, Any]) -> dict[str, Rows]:
    """All tables of `compare.py`, by title."""
    return {
        "What a message costs, in microseconds": costs(results),
        "Without a pause: what a message takes, in microseconds": long_runs(results),
        "Targets: ratios of what is added": reached(results),
    }


def growth(scaling: dict[str, Any]) -> Rows:
    """What ours adds at each point of the curves."""
    rows: list[tuple[str, ...]] = []
    for title, by_setting in scaling["curves"].items():
        for point, figures in by_setting["sampled"].items():
            unsampled = by_setting.get("1 % sampled", {}).get(point, {})
            rows.append(
                (
                    title,
                    f"{int(point):,}",
                    f"{figures['plain']['thread']['microseconds']:.1f}",
                    _added(figures, "ours", "thread"),
                    _added(unsampled, "ours", "thread"),
                )
            )
    return Rows(
        ("workload", "up to", "plain takes", "ours adds, sampled", "1 % sampled"), rows
    )


def bytes_kept(scaling: dict[str, Any]) -> Rows:
    """What the package holds on to."""
    return Rows(
        ("object", "bytes for each", "bytes left when all are gone"),
        [
            (what, f"{kept['each']:,}", f"{kept['left']:,}")
            for what, kept in scaling["bytes kept"].items()
        ],
    )


def scaling_tables(scaling: dict[str, Any]) -> dict[str, Rows]:
    """All tables of `scaling.py`, by title."""
    return {
        "How the cost of a message grows, in microseconds": growth(scaling),
        "What the package keeps": bytes_kept(scaling),
    }


class Fleet(NamedTuple):
    """How a fleet is set up, and the workloads that tell what that costs."""

    what: str
    sends: str
    consumes: str


FLEETS = (
    Fleet("all traces sampled, metrics", *(f"{w}, sampled, metrics" for w in _WORK)),
    Fleet("all traces sampled", *(f"{w}, sampled" for w in _WORK)),
    Fleet(
        "all traces sampled, polls of 500, receive spans only",
        "send, sampled",
        "poll of 500, sampled",
    ),
    Fleet("1 % sampled, metrics", *(f"{w}, 1 % sampled, metrics" for w in _WORK)),
    Fleet("1 % sampled", *(f"{w}, 1 % sampled" for w in _WORK)),
    Fleet(
        "1 % sampled, polls of 500, receive spans only",
        "send, 1 % sampled",
        "poll of 500, 1 % sampled",
    ),
    Fleet("no SDK", *(f"{w}, no SDK" for w in _WORK)),
    Fleet(
        "the topics excluded",
        "send to an excluded topic, sampled",
        "loop over an excluded topic, sampled",
    ),
)


def fleets(results: dict[str, Any]) -> Rows:
    """The cores that a million messages a second take, sent and consumed."""
    return Rows(
        (
            *("setup", "a sent message adds", "a consumed message adds"),
            *("cores for kafka-python", "cores added"),
        ),
        [
            (
                fleet.what,
                *(f"{each:.1f} µs" for each in added),
                f"{sum(plain):.0f}",
                f"{sum(added):.0f}",
            )
            for fleet in FLEETS
            for plain, added in [_fleet(results, fleet)]
        ],
    )


def _fleet(results: dict[str, Any], fleet: Fleet) -> tuple[list[float], list[float]]:
    """What the client takes and ours adds, of a message sent and of one consumed."""
    figures = [
        (results["workloads"][name], scopes(name)[-1])
        for name in (fleet.sends, fleet.consumes)
    ]
    return (
        [each["plain"][scope]["microseconds"] for each, scope in figures],
        [each["ours"][scope]["added"] for each, scope in figures],
    )


def arithmetic(results: dict[str, Any]) -> str:
    """How the cores of the one that samples everything are worked out."""
    fleet = next(each for each in FLEETS if each.what == "all traces sampled")
    _, (sent, consumed) = _fleet(results, fleet)
    both = sent + consumed
    return fill(
        f"With {fleet.what}, a sent message costs {sent:.1f} µs more and a consumed"
        f" message {consumed:.1f} µs: together {both:.1f} µs. A million of each per"
        f" second take {both:.1f} seconds of CPU time per second: {both:.0f} cores of"
        " the measured kind over the fleet.",
        _WIDTH,
    )


def measured_with(results: dict[str, Any], workloads: Iterable[str] = ()) -> str:
    """On what the figures of workloads were measured."""
    versions = ", ".join(f"{name} {of}" for name, of in results["versions"].items())
    said = (
        f"Measured on {results['machine']} with Python {results['python']}, {versions}:"
        f" {results['rounds']} rounds of blocks of {results['block']} messages."
    )
    apart = results.get("measured apart", ())
    rows = ", ".join(f'"{name}"' for name in workloads if name in apart)
    if rows:
        said += (
            " These rows come from another run, and the machine may have been busy:"
            f" {rows}. Compare the figures of such a row only with each other."
        )
    return fill(said, _WIDTH)


def summary(results: dict[str, Any]) -> str:
    """The cost of a send and of a record in a loop, in a line for each setting."""
    workloads = results["workloads"]
    lines = []
    for title, setting in (
        ("With all traces sampled", "sampled"),
        ("With one percent sampled", "1 % sampled"),
        ("Without an SDK", "no SDK"),
    ):
        (sent, by_hand), (looped, looped_by_hand) = (
            [
                workloads[f"{name}, {setting}"][variant][scope]["added"]
                for variant in ("ours", "hand-written")
            ]
            for name, scope in (("send", "process"), ("loop", "thread"))
        )
        lines.append(
            f"- {title}, this package adds {sent:.0f} µs of CPU time to a send and"
            f" {looped:.0f} µs to a record in a loop. Hand-written code adds"
            f" {by_hand:.0f} µs and {looped_by_hand:.0f} µs."
        )
    return "\n".join(fill(each, _WIDTH, subsequent_indent="  ") for each in lines)


def verdict(results: dict[str, Any]) -> str:
    """How many targets are reached."""
    made = targets(results)
    missed = sum(not each.reached for each in made)
    if not missed:
        return f"All {len(made)} targets are reached."
    are = "is" if missed == 1 else "are"
    return f"{missed} of {len(made)} targets {are} missed."


def markdown(rows: Rows) -> str:
    """A table as the documentation has it."""
    ruled = ["---" if n == 0 else "--:" for n in range(len(rows.header))]
    lines = (f"| {' | '.join(cells)} |" for cells in (rows.header, ruled, *rows.rows))
    return "\n".join(lines).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def print_tables(tables: dict[str, Rows]) -> None:
    """Print what `tables` or `scaling_tables` has made."""
    console = Console()
    if not console.is_terminal:
        console.width = 140
    for title, made in tables.items():
        table = Table(title=title)
        for number, column in enumerate(made.header):
            table.add_column(column, justify="right" if number > 1 else "left")
        for row in made.rows:
            table.add_row(*row)
        if made.rows:
            console.print(table)
