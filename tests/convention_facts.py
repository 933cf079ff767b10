"""Reads the facts that the tests compare with out of the semantic conventions.

    python tests/convention_facts.py CHECKOUT

writes `tests/messaging-kafka-VERSION.json` from a checkout of the repository
open-telemetry/semantic-conventions at the tag of that version.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

LEVELS = ["required", "conditionally_required", "recommended", "opt_in"]
METRICS_PAGE = "docs/messaging/messaging-metrics.md"
BOUNDARIES = re.compile(
    r"^#+ Metric: `(?P<metric>[\w.]+)`"
    r"|`ExplicitBucketBoundaries`.*?`\[(?P<boundaries>[\d., ]+)\]`",
    re.MULTILINE,
)
SEVERITY = re.compile(r"severity to (\w+) \(severity number (\d+)\)")


class Model:
    """The YAML files of the conventions' model.

    Args:
        checkout: Where the repository is checked out.
    """

    def __init__(self, checkout: Path) -> None:
        self._types: dict[str, str] = {}
        self._groups: dict[str, Any] = {}
        self.refinements: list[Any] = []
        manifest = yaml.safe_load((checkout / "model" / "manifest.yaml").read_text())
        self.schema_url: str = manifest["schema_url"]
        for path in sorted((checkout / "model").rglob("*.yaml")):
            content = yaml.safe_load(path.read_text()) or {}
            if "deprecated" not in path.parts:
                self._read(content)

    def _read(self, content: dict[str, Any]) -> None:
        # The model has two formats: groups of a type, and a list for each type.
        groups = [
            *content.get("groups", ()),
            *content.get("attribute_groups", ()),
            *content.get("spans", ()),
        ]
        for group in groups:
            self._groups[group.get("id") or group["type"]] = group
        for attribute in [
            *content.get("attributes", ()),
            *(each for group in groups for each in group.get("attributes", ())),
        ]:
            name = attribute.get("id") or attribute.get("key")
            if name and "type" in attribute:
                self._types[name] = _type_of(attribute["type"])
        self.refinements += content.get("span_refinements", ())

    def of_type(self, kind: str, prefix: str) -> Iterator[tuple[str, Any]]:
        """The groups of a type whose name begins so."""
        for name, group in self._groups.items():
            if group.get("type") == kind and name.startswith(prefix):
                yield name, group

    def base(self, refinement: Any) -> Any:
        """The span that a refinement refines."""
        return self._groups[refinement["ref"]]

    def attributes(self, *groups: Any) -> dict[str, dict[str, Any]]:
        """What is said of each attribute; a later group says more than an earlier."""
        found: dict[str, dict[str, Any]] = {}
        for group in groups:
            parent = group.get("extends")
            inherited = self.attributes(self._groups[parent]) if parent else {}
            for name, said in inherited.items():
                found.setdefault(name, {}).update(said)
            for attribute in group.get("attributes", ()):
                if "ref_group" in attribute:
                    more = self.attributes(self._groups[attribute["ref_group"]])
                else:
                    more = {attribute["ref"]: attribute}
                for name, said in more.items():
                    found.setdefault(name, {}).update(said)
        return found

    def facts(self, attributes: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Type and requirement level of each, the most required first."""
        found = {
            name: {"type": self._types[name], "level": _level_of(said)}
            for name, said in attributes.items()
        }
        ordered = sorted(
            found, key=lambda name: (LEVELS.index(found[name]["level"]), name)
        )
        return {name: found[name] for name in ordered}


def _type_of(declared: Any) -> str:
    if isinstance(declared, str):
        return declared
    values = [member["value"] for member in declared["members"]]
    return "int" if all(isinstance(value, int) for value in values) else "string"


def _level_of(said: dict[str, Any]) -> str:
    level = said.get("requirement_level", "recommended")
    return level if isinstance(level, str) else str(next(iter(level)))


def spans(model: Model) -> dict[str, Any]:
    """Those of Kafka, with what a sampler is to see of each."""
    found = {}
    for refinement in model.refinements:
        if not refinement["id"].startswith("span.messaging.kafka."):
            continue
        base = model.base(refinement)
        attributes = model.attributes(base, refinement)
        found[refinement["id"]] = {
            "attributes": model.facts(attributes),
            "kind": base["kind"].upper(),
            "sampling_relevant": sorted(
                name
                for name, said in attributes.items()
                if said.get("sampling_relevant")
            ),
            "operation_type": refinement["id"].split(".")[3],
        }
    return found


def metrics(model: Model, page: str) -> dict[str, Any]:
    """Those of messaging; the page alone has their bucket boundaries."""
    boundaries = {}
    metric = ""
    for match in BOUNDARIES.finditer(page):
        if match["metric"]:
            metric = match["metric"]
        else:
            boundaries[metric] = [
                json.loads(value) for value in match["boundaries"].split(",")
            ]
    found = {}
    for name, group in model.of_type("metric", "metric.messaging."):
        found[name] = {
            "attributes": model.facts(model.attributes(group)),
            "metric": group["metric_name"],
            "instrument": group["instrument"].capitalize(),
            "unit": group["unit"],
        }
        if group["metric_name"] in boundaries:
            found[name]["bucket_boundaries"] = boundaries[group["metric_name"]]
    return found


def events(model: Model) -> dict[str, Any]:
    """Those of exceptions, with the severity that their notes ask for."""
    found = {}
    for _, group in model.of_type("event", "event.messaging."):
        match = SEVERITY.search(group["note"])
        assert match is not None, group["name"]
        found[group["name"]] = {
            "severity": match[1],
            "severity_number": int(match[2]),
            "attributes": model.facts(model.attributes(group)),
        }
    return found


def facts(checkout: Path) -> dict[str, Any]:
    """All that the tests compare with."""
    model = Model(checkout)
    version = model.schema_url.rpartition("/")[2]
    return {
        "source": f"Facts of the OpenTelemetry semantic conventions v{version}: the "
        f"messaging model, and {METRICS_PAGE} for bucket boundaries",
        "schema_url": model.schema_url,
        "span_name": "{messaging.operation.name} {messaging.destination.name}; "
        "without a destination: {messaging.operation.name}",
        "spans": spans(model),
        "metrics": metrics(model, (checkout / METRICS_PAGE).read_text()),
        "exception_events": {
            "opt_in": "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN: logs, logs/dup; without "
            "it span events",
            "note": "one of exception.type and exception.message is required, the "
            "other recommended; attributes of the span may be added",
            "events": events(model),
        },
    }


def main() -> None:
    (checkout,) = sys.argv[1:]
    found = facts(Path(checkout))
    version = found["schema_url"].rpartition("/")[2]
    path = Path(__file__).parent / f"messaging-kafka-{version}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
