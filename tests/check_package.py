"""What is released: built twice, the same to the byte, and nothing but the package.

tox -e package
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "otel_kafka_python"
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}

# Files in archives are as old as this: the first moment that a zip file can tell.
EPOCH = "315532800"


def build(directory: Path) -> dict[str, bytes]:
    """The name and content of the wheel and of the sdist."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(directory)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
    )
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    name, version, *_ = wheel.name.split("-")
    modules = (path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))
    expected = {module.as_posix() for module in modules}
    expected |= {f"{PACKAGE.name}/py.typed"}
    expected |= {f"{name}-{version}.dist-info/{each}" for each in METADATA}
    if names != expected:
        sys.exit(f"{wheel.name} differs from the package in {names ^ expected}")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        first, second = Path(temporary, "1"), Path(temporary, "2")
        built = build(first)
        if sorted(path.suffix for path in first.iterdir()) != [".gz", ".whl"]:
            sys.exit(f"not one wheel and one sdist: {sorted(built)}")
        if built != build(second):
            sys.exit("two builds of the same source differ")
        (wheel,) = first.glob("*.whl")
        check_wheel(wheel)
        released = [str(path) for path in first.iterdir()]
        subprocess.run(
            [sys.executable, "-m", "twine", "check", "--strict", *released], check=True
        )
        subprocess.run(
            [sys.executable, "-m", "check_wheel_contents", str(wheel)], check=True
        )
        print(*sorted(built), "are built reproducibly and hold only the package")


if __name__ == "__main__":
    main()
