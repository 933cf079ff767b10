"""The benchmarks run, and the documentation shows the figures that they have left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare import CASES, LONG_CASES
from other_baggage import START, microseconds
from publish import COMPARED, DOCS, SCALED, STATIC, publish, with_apart, written
from report import GOALS, fleets, measured_with
from scaling import CURVES

from scripts import run

pytestmark = [pytest.mark.one_broker, pytest.mark.one_client]

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RENEW = "write it anew: tox -e bench -- publish.py"

compared = json.loads(COMPARED.read_text())
scaled = json.loads(SCALED.read_text())


def test_the_pages_show_the_figures() -> None:
    for name, parts in publish(compared, scaled).pages.items():
        page = (DOCS / name).read_text()
        assert written(page, parts) == page, RENEW


def test_the_charts_show_the_figures() -> None:
    for name, svg in publish(compared, scaled).charts.items():
        assert (STATIC / name).read_text() == svg, RENEW


def titles(results: dict[str, Any]) -> list[list[str]]:
    return [[*results[each]] for each in ("workloads", "long runs")]


ALL_TITLES = [[case.title for case in cases] for cases in (CASES, LONG_CASES)]


def points(results: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    return {
        title: {name: [*map(int, by_point)] for name, by_point in by_setting.items()}
        for title, by_setting in results["curves"].items()
    }


def points_up_to(most: int) -> dict[str, dict[str, list[int]]]:
    return {
        curve.title: {
            name: [each for each in curve.points if each <= most]
            for name in curve.settings
        }
        for curve in CURVES
    }


def test_the_figures_are_of_everything_that_is_measured() -> None:
    assert titles(compared) == ALL_TITLES
    assert points(scaled) == points_up_to(10_000)
    measured = {*ALL_TITLES[0]}
    assert {goal.workload for goal in GOALS} <= measured
    assert {goal.of for goal in GOALS} - {""} <= measured


def test_figures_of_a_later_run_are_told_from_the_others() -> None:
    whole = {**compared, "workloads": dict(compared["workloads"])}
    whole.pop("measured apart", None)
    first, *_, last = whole["workloads"]
    assert "another run" not in measured_with(whole, [first, last])
    later: dict[str, Any] = {"plain": {}, "ours": {}}
    made = with_apart(whole, {**whole, "workloads": {last: later}})
    made = with_apart(made, {**whole, "workloads": {first: later}})
    assert [*made["workloads"]] == [*whole["workloads"]]
    assert made["workloads"] == {**whole["workloads"], first: later, last: later}
    said = measured_with(made, [first, last]).replace("\n", " ")
    assert (
        f'another run, and the machine may have been busy: "{first}", "{last}"' in said
    )
    assert "another run" not in measured_with(made, [*whole["workloads"]][1:-1])
    with pytest.raises(SystemExit, match=r"python: 2\.7 now"):
        with_apart(whole, {**whole, "python": "2.7"})


def test_a_microsecond_of_a_message_is_a_core_of_the_fleet() -> None:
    def figures(plain: float, added: float) -> dict[str, Any]:
        of_scope = {"microseconds": plain, "added": added}
        of_variant = {"thread": of_scope, "process": of_scope}
        return {"plain": of_variant, "ours": of_variant}

    workloads = {case.title: figures(1, 1) for case in CASES}
    workloads["send, 1 % sampled"] = figures(20, 16.4)
    workloads["loop, 1 % sampled"] = figures(9, 4.2)
    rows = {row[0]: row[1:] for row in fleets({"workloads": workloads}).rows}
    assert rows["1 % sampled"] == ("16.4 µs", "4.2 µs", "29", "21")


def test_the_benchmarks_run(tmp_path: Path) -> None:
    made = {}
    for name, *more in (("compare", "--long", "100"), ("scaling", "--most", "10")):
        file = tmp_path / name
        few = ("--rounds", "1", "--block", "10", "--json", str(file), *more)
        done = run(f"import {name}; {name}.main()", *few, paths=(BENCHMARKS,))
        assert done.returncode == 0, done.stderr
        made[name] = json.loads(file.read_text())
    assert titles(made["compare"]) == ALL_TITLES
    assert points(made["scaling"]) == points_up_to(10)
    published = publish(made["compare"], made["scaling"])
    assert all(published.charts.values())
    assert all(part for page in published.pages.values() for part in page.values())


def test_the_cost_of_baggage_is_measured_beside_the_start_and_without() -> None:
    start = {"kafka.pipeline": START}
    for entries in (start, {**start, "tenant": "blue"}):
        assert min(microseconds(entries, 1)) > 0
