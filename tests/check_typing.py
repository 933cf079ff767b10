"""The public types, as three type checkers see them: `tox -e typing`.

Each of them accepts every line of `typing_tests/accepted.py`, and refuses of
`typing_tests/refused.py` the lines that say so and no others.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ACCEPTED, REFUSED = (
    ROOT / "typing_tests" / name for name in ("accepted.py", "refused.py")
)

BIN = Path(sys.executable).parent
CHECKERS = {
    "mypy": [f"{BIN}/mypy", "--no-pretty", "--show-absolute-path"],
    "pyright": [f"{BIN}/pyright", "--pythonpath", sys.executable],
    "pyrefly": [
        *(f"{BIN}/pyrefly", "check", "--output-format", "min-text"),
        *("--python-interpreter-path", sys.executable),
    ],
}
# A place in a file, before or after the word.
ERROR = re.compile(
    r"(?:(\w+\.py):(\d+)(?::\d+)?(?: -|:) error|ERROR \S*?(\w+\.py):(\d+))"
)


def errors(command: list[str]) -> tuple[set[tuple[str, int]], str]:
    """The files and lines of the errors that a checker reports, and what it says."""
    done = subprocess.run(
        [*command, str(ACCEPTED), str(REFUSED)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    found = [[each for each in groups if each] for groups in ERROR.findall(done.stdout)]
    return {(name, int(line)) for name, line in found}, done.stdout + done.stderr


def main() -> None:
    expected = {
        (REFUSED.name, number)
        for number, line in enumerate(REFUSED.read_text().splitlines(), 1)
        if line.endswith("# refused")
    }
    wrong = False
    for name, command in CHECKERS.items():
        found, said = errors(command)
        if found == expected:
            print(f"{name} refuses {len(found)} lines and accepts all others")
            continue
        wrong = True
        print(said)
        for missed in sorted(expected - found):
            print(f"{name} should refuse, and accepts: {missed}")
        for refused in sorted(found - expected):
            print(f"{name} should accept, and refuses: {refused}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
