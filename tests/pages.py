"""The README and the documentation as the tests read them: blocks and tables."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = {
    path.stem: path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


class Block(NamedTuple):
    """A block of code."""

    page: str
    language: str
    code: str


BLOCKS = [
    Block(page, language, textwrap.dedent(code))
    for page, text in PAGES.items()
    for _, language, code in re.findall(
        r"^( *)```(\S*).*?\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE
    )
    if not language.startswith("{")  # a directive of Sphinx's
]


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return PAGES[page].split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the table under a heading."""
    rows = re.findall(r"^\|(.*)\|$", section(page, heading), re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows[2:]]


def code_in(cell: str) -> list[str]:
    """What a cell has as code."""
    return re.findall(r"`(.+?)`", cell)


def error_types() -> dict[str, str]:
    """The `error.type` of each of kafka-python's exceptions, by its class's name."""
    rows = [(value, classes) for value, _, classes in table("errors", "Kafka errors")]
    rows += [(row[0], row[0]) for row in table("errors", "kafka-python errors")]
    return {
        name: code_in(value)[0] for value, classes in rows for name in code_in(classes)
    }
