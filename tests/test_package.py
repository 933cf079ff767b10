"""The distribution: what other tools read of it."""

from __future__ import annotations

import ast
import re
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import otel_kafka_python
from otel_kafka_python import KafkaPythonInstrumentor, package
from otel_kafka_python._instrumentor import begin_launch, take_over

SOURCE = Path(otel_kafka_python.__file__).parent
ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

# Who may import whom: each only what stands after it. Modules on one line do not
# import each other.
LEVELS = [
    {"__init__"},
    {"_instrumentor"},
    {"_patches", "_coexistence"},
    {"_producer", "_consumer", "_commits", "_transactions"},
    {"_processing"},
    {"_telemetry"},
    {"_client_metrics"},
    {"_clients"},
    {"_operation"},
    {"_span_ends", "_messages", "_pipeline"},
    {"_endings"},
    {"_propagation", "_metrics"},
    {"_exception_events"},
    {"_attributes"},
    {"_kafka"},
    {"_config"},
    {"_semconv", "_safety", "_clock"},
    {"package"},
]
PROCESSING = [
    {"__init__"},
    {"process_span"},
    {"iterators"},
    {"spans"},
    {"scopes"},
    {"loops"},
]


def test_the_extras_agree_with_the_package() -> None:
    requires = distribution("otel-kafka-python").requires or []
    extras: dict[str, set[str]] = {"instruments": set(), "instruments-any": set()}
    for line in requires:
        requirement = Requirement(line)
        for name, found in extras.items():
            marker = requirement.marker
            if marker and "extra" in str(marker) and marker.evaluate({"extra": name}):
                found.add(f"{requirement.name}{requirement.specifier}")
    assert extras["instruments"] == set(package._instruments) == set()
    assert extras["instruments-any"] == {
        f"{requirement.name}{requirement.specifier}"
        for requirement in map(Requirement, package._instruments_any)
    }


def test_the_entry_points_are_ours() -> None:
    (instrumentor,) = entry_points(
        group="opentelemetry_instrumentor", name="kafka_python"
    )
    assert instrumentor.load() is KafkaPythonInstrumentor
    (pre,) = entry_points(group="opentelemetry_pre_instrument", name="kafka_python")
    assert pre.load() is begin_launch
    (post,) = entry_points(group="opentelemetry_post_instrument", name="kafka_python")
    assert post.load() is take_over


def test_the_version_is_one() -> None:
    assert distribution("otel-kafka-python").version == otel_kafka_python.__version__


def test_it_does_not_depend_on_the_sdk() -> None:
    names = {
        Requirement(line).name
        for line in distribution("otel-kafka-python").requires or []
        if "extra" not in line
    }
    assert names == {
        "opentelemetry-api",
        "opentelemetry-instrumentation",
        "opentelemetry-semantic-conventions",
        "wrapt",
    }


def test_the_lowest_versions_that_it_allows_are_those_that_are_tested() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    (group,) = re.findall(r"^lowest = \[(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    tested = dict(re.findall(r'"([\w-]+)==(.+?)"', group))
    required = distribution("otel-kafka-python").requires or []
    kafka_python, _ = package._instruments_any
    for line in [kafka_python, *(line for line in required if "extra" not in line)]:
        requirement = Requirement(line)
        (lowest,) = [s.version for s in requirement.specifier if s.operator == ">="]
        assert tested[requirement.name] == lowest


def test_it_is_typed() -> None:
    assert (SOURCE / "py.typed").exists()


def _imports(path: Path, package: str) -> set[str]:
    """The modules of a package of ours that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == package:
                found |= {alias.name for alias in node.names}
            elif node.module.startswith(f"{package}."):
                found.add(node.module.removeprefix(f"{package}.").split(".")[0])
    return found


def _below(levels: list[set[str]], name: str) -> set[str]:
    (level,) = [i for i, names in enumerate(levels) if name in names]
    return set().union(*levels[level + 1 :])


@pytest.mark.parametrize(
    "path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.stem
)
def test_every_import_is_one_way_down_the_map(path: Path) -> None:
    assert _imports(path, "otel_kafka_python") <= _below(LEVELS, path.stem)


@pytest.mark.parametrize(
    "path", sorted((SOURCE / "_processing").glob("*.py")), ids=lambda path: path.stem
)
def test_every_import_of_the_sub_package_is_one_way_down(path: Path) -> None:
    package = "otel_kafka_python._processing"
    assert _imports(path, package) <= _below(PROCESSING, path.stem)
    allowed = _below(LEVELS, "_processing") | {"_processing"}
    assert _imports(path, "otel_kafka_python") <= allowed


def _module_map() -> str:
    docstring = otel_kafka_python.__doc__ or ""
    return docstring.partition("only from those below it:\n\n")[2].partition("\n\n")[0]


def _is_sorted_by(levels: list[set[str]], names: list[str]) -> bool:
    level = {name: i for i, each in enumerate(levels) for name in each}
    return names == sorted(names, key=lambda name: level[name])


def test_the_map_in_the_docstring_is_the_map() -> None:
    documented = re.findall(r"^    (\w+) {2,}\S", _module_map(), re.MULTILINE)
    assert set(documented) == set().union(*LEVELS) - {"__init__"}
    assert _is_sorted_by(LEVELS, documented)
    documented = re.findall(r"^      (\w+) {2,}\S", _module_map(), re.MULTILINE)
    assert set(documented) == set().union(*PROCESSING) - {"__init__"}
    assert _is_sorted_by(PROCESSING, documented)


def test_the_map_has_every_module() -> None:
    names = re.findall(r"^ +(\w+) {2,}\S", _module_map(), re.MULTILINE)
    modules = {path.stem for path in SOURCE.rglob("*.py")} - {"__init__"}
    assert set(names) == {"_processing", *modules}


def test_the_map_for_contributors_is_that_of_the_docstring() -> None:
    rows = re.findall(r"^    ( *\w+ {2,}\S.*)$", _module_map(), re.MULTILINE)
    assert "```\n" + "\n".join(rows) + "\n```" in CONTRIBUTING


def test_only_one_module_imports_wrapt_and_only_one_reads_the_environment() -> None:
    sources = {path.stem: path.read_text() for path in SOURCE.glob("*.py")}
    assert [n for n, text in sources.items() if "import wrapt" in text] == ["_patches"]
    assert [n for n, text in sources.items() if "os.environ" in text] == ["_config"]
