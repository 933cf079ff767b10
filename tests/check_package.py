"""What is released: built twice, the same to the byte, and nothing but the package.

`tox -e package`; with `-- DIRECTORY` what was checked is left there.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

from readme_renderer import markdown

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


class Links(HTMLParser):
    """Where the links and the pictures of a page lead, and the places in it."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"href", "src"}:
                self.targets.append(value or "")
            elif name == "id":
                self.places.add(f"#{value}")


def check_readme(wheel: Path) -> None:
    """On PyPI a link leads to a site, to a place in the page, or to a file of ours."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith("/METADATA")]
        metadata = email.message_from_string(archive.read(name).decode())
    rendered = markdown.render(str(metadata.get_payload()))
    assert rendered is not None
    source = metadata["Project-URL"].removeprefix("Source, ")
    links = Links()
    links.feed(rendered)
    tag = f"/v{metadata['Version']}/"
    raw = source.replace("github.com", "raw.githubusercontent.com")
    dead = []
    for target in links.targets:
        if target.startswith((f"{source}/blob/", raw)):
            path = target.partition(tag)[2].partition("#")[0]
            is_alive = bool(path) and (ROOT / path).exists()
        else:
            is_alive = target.startswith("https://") or target in links.places
        if not is_alive:
            dead.append(target)
    if dead:
        sys.exit(f"on PyPI these links of the README lead nowhere: {dead}")
    if not any(target.endswith(".svg") for target in links.targets):
        sys.exit("on PyPI the README has no picture")


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
        check_readme(wheel)
        released = [str(path) for path in first.iterdir()]
        subprocess.run(
            [sys.executable, "-m", "twine", "check", "--strict", *released], check=True
        )
        subprocess.run(
            [sys.executable, "-m", "check_wheel_contents", str(wheel)], check=True
        )
        if sys.argv[1:]:
            shutil.copytree(first, sys.argv[1])
        print(*sorted(built), "are built reproducibly and hold only the package")


if __name__ == "__main__":
    main()
