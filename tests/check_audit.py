"""No known vulnerability in what an application gets with the package.

    tox -e audit

Where the service that knows them cannot be reached, or does not know the packages,
that is said and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def installed(name: str, found: dict[str, str]) -> None:
    """Add the distribution and all that it needs to `found`: name to version."""
    if name in found:
        return
    found[name] = distribution(name).version
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            installed(requirement.name, found)


def main() -> None:
    found: dict[str, str] = {}
    installed("otel-kafka-python", found)
    del found["otel-kafka-python"]  # the version at hand is not released
    pins = "".join(f"{name}=={version}\n" for name, version in found.items())
    print(pins, end="")
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary, "requirements.txt")
        requirements.write_text(pins)
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip"]
        command += ["--progress-spinner=off", "--format=json"]
        done = subprocess.run(
            [*command, "-r", str(requirements)],
            check=False,
            capture_output=True,
            text=True,
        )
    print(done.stderr, end="")
    if not done.stdout and "connect" in done.stderr.lower():
        print("AUDIT SKIPPED: the service that knows vulnerabilities is out of reach")
        return
    answers = json.loads(done.stdout)["dependencies"]
    vulnerable = [each for each in answers if each.get("vulns")]
    if vulnerable:
        sys.exit(f"known vulnerabilities: {json.dumps(vulnerable, indent=2)}")
    # pip-audit itself calls it a success where nothing is known about anything.
    if skipped := [each["name"] for each in answers if "skip_reason" in each]:
        print("AUDIT SKIPPED: the service knows nothing about", *skipped)
        return
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
