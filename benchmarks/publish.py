"""Write what the documentation shows of the benchmarks.

    python benchmarks/publish.py

writes the charts and the marked parts of the pages on performance from the two JSON
files in `docs/_static`; with `--measure` it first runs `compare.py` and `scaling.py`,
which write these. With `--measure GLOB` it runs only these workloads of `compare.py`,
and the pages tell their figures from the others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import chart
import compare
import report
import scaling

DOCS = Path(__file__).parent.parent / "docs"
STATIC = DOCS / "_static"
COMPARED = STATIC / "benchmarks.json"
SCALED = STATIC / "scaling.json"
END = "<!-- end -->"


class Published(NamedTuple):
    """What is made from the figures.

    Args:
        charts: The SVGs, by name of their file in `docs/_static`.
        pages: What stands in each page of `docs` between a mark and the next `END`.
    """

    charts: dict[str, str]
    pages: dict[str, dict[str, str]]


def publish(compared: dict[str, Any], scaled: dict[str, Any]) -> Published:
    """Make it."""
    table = report.markdown
    return Published(
        {
            "benchmarks.svg": chart.bars(compared),
            "scaling.svg": chart.curves(scaled),
        },
        {
            "performance.md": {
                "summary": report.summary(compared),
                "measured with": report.measured_with(
                    compared, report.by_variants(compared)
                ),
                "costs": table(report.costs(compared)),
                "long runs": table(report.long_runs(compared)),
                "fleets": table(report.fleets(compared)),
                "arithmetic": report.arithmetic(compared),
            },
            "latency.md": {
                "pipelines": table(report.pipelines(compared)),
                "pipelines measured with": report.measured_with(
                    compared, report.by_settings(compared)
                ),
            },
            "performance-appendix.md": {
                "verdict": report.verdict(compared),
                "targets": table(report.reached(compared)),
                "scaled with": report.measured_with(scaled),
                "growth": table(report.growth(scaled)),
                "bytes kept": table(report.bytes_kept(scaled)),
            },
        },
    )


def written(page: str, parts: dict[str, str]) -> str:
    """The page with all parts as they are to be."""
    for name, part in parts.items():
        start = f"<!-- {name} -->\n"
        before, after = page.split(start)
        _, rest = after.split(END, 1)
        page = f"{before}{start}\n{part}\n\n{END}{rest}"
    return page


def with_apart(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run with those of some workloads of a later one."""
    for each in ("python", "machine", "versions", "rounds", "block"):
        if whole[each] != part[each]:
            raise SystemExit(f"{each}: {part[each]} now, {whole[each]} before")
    found = {**whole["workloads"], **part["workloads"]}
    apart = {*whole.get("measured apart", ()), *part["workloads"]}
    titles = [case.title for case in compare.CASES if case.title in found]
    return {
        **whole,
        "workloads": {title: found[title] for title in titles},
        "measured apart": [title for title in titles if title in apart],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--measure",
        nargs="?",
        const="*",
        metavar="GLOB",
        help="run both before: a quarter of an hour; or only some workloads of one",
    )
    measured = parser.parse_args().measure
    if measured == "*":
        compare.main(["--json", str(COMPARED)])
        scaling.main(["--json", str(SCALED)])
    elif measured is not None:
        with TemporaryDirectory() as place:
            part = Path(place) / COMPARED.name
            compare.main(["--only", measured, "--json", str(part)])
            both = [json.loads(each.read_text()) for each in (COMPARED, part)]
        COMPARED.write_text(json.dumps(with_apart(*both), indent=1) + "\n")
    published = publish(
        json.loads(COMPARED.read_text()), json.loads(SCALED.read_text())
    )
    for name, svg in published.charts.items():
        (STATIC / name).write_text(svg)
    for name, parts in published.pages.items():
        page = DOCS / name
        page.write_text(written(page.read_text(), parts))


if __name__ == "__main__":
    main()
