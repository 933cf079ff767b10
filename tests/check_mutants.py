"""Change one thing after another in the modules that decide things; who notices?

    tox -e mutants                        # all of them: some hours
    tox -e mutants -- _endings            # of one module
    tox -e mutants -- _endings --at-most 20

A mutant that no test kills is printed. Those of `tests/mutants.json` are known, each
with the reason why no test can or need kill it; any other fails the run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = "src/otel_kafka_python"
KNOWN = ROOT / "tests" / "mutants.json"

# The tests that belong to each module.
TESTS = {
    "_propagation": ("test_headers", "test_properties", "test_send"),
    "_processing/scopes": ("test_scopes", "test_next", "test_process_span"),
    "_processing/spans": ("test_scopes", "test_process_span", "test_consume"),
    "_operation": ("test_send", "test_metrics", "test_lifecycle", "test_exceptions"),
    "_endings": ("test_lifecycle", "test_scopes"),
    "_commits": ("test_settlement",),
    "_telemetry": ("test_settings", "test_metrics", "test_consume", "test_send"),
}

CONFIG = """
[cosmic-ray]
module-path = "{module}"
timeout = {timeout}
test-command = "{command}"

[cosmic-ray.distributor]
name = "local"
"""
# A mutant may wait for ever.
TIMEOUT = 300.0


def copy_of_the_repository(target: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def survivors(copy: Path, module: str, at_most: int | None) -> Iterator[dict[str, str]]:
    """The mutants of a module that its tests let live."""
    path = f"{PACKAGE}/{module}.py"
    tests = " ".join(f"tests/{name}.py" for name in TESTS[module])
    command = f"{sys.executable} -m pytest -q -x --broker embedded {tests}"
    config, session = copy / "mutants.toml", copy / "mutants.sqlite"
    config.write_text(CONFIG.format(module=path, timeout=TIMEOUT, command=command))
    session.unlink(missing_ok=True)
    environ = {**os.environ, "PYTHONPATH": str(copy / "src"), "NO_COLOR": "1"}

    def cosmic_ray(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cosmic_ray.cli", *arguments],
            cwd=copy,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"cosmic-ray {arguments[0]}: {done.stdout}{done.stderr}")
        return done.stdout

    cosmic_ray("baseline", str(config))  # tests that fail anyway kill nothing
    cosmic_ray("init", str(config), str(session))
    if at_most is not None:
        keep_some(session, at_most)
    cosmic_ray("exec", str(config), str(session))
    for line in cosmic_ray("dump", str(session)).splitlines():
        item, result = json.loads(line)
        if result is None or result["test_outcome"] != "survived":
            continue
        (mutation,) = item["mutations"]
        first, _ = mutation["start_pos"]
        yield {
            "module": module,
            "definition": mutation["definition_name"] or "",
            "operator": mutation["operator_name"],
            "line": (copy / path).read_text().splitlines()[first - 1].strip(),
        }


def keep_some(session: Path, number: int) -> None:
    """Leave so many mutants in a session, chosen at random."""
    import sqlite3  # noqa: PLC0415 (seldom)

    with sqlite3.connect(session) as database:
        jobs = [job for (job,) in database.execute("select job_id from work_items")]
        random.shuffle(jobs)
        for table in ("mutation_specs", "work_items"):
            database.executemany(
                f"delete from {table} where job_id = ?",
                [(job,) for job in jobs[number:]],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="MODULE")
    parser.add_argument("--at-most", type=int, help="try so many of each, at random")
    arguments = parser.parse_args()
    known: list[dict[str, Any]] = json.loads(KNOWN.read_text())
    unknown = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_of_the_repository(copy)
        for module in arguments.modules:
            for mutant in survivors(copy, module, arguments.at_most):
                why = [each["why"] for each in known if mutant.items() <= each.items()]
                unknown += not why
                print(json.dumps({**mutant, "why": why[0] if why else "UNKNOWN"}))
    print(f"{unknown} mutants live that tests/mutants.json does not know")
    sys.exit(bool(unknown))


if __name__ == "__main__":
    main()
