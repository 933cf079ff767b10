"""The generator of the convention's facts; no broker is needed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from convention_facts import METRICS_PAGE, facts

pytestmark = pytest.mark.one_client

MANIFEST = "schema_url: https://example.org/schemas/7.8.9"
# Of each format that the model has.
REGISTRY = """
groups:
  - id: registry.fruit
    type: attribute_group
    attributes:
      - {id: fruit.name, type: string}
      - id: fruit.color
        type: {members: [{id: red, value: red}]}
      - id: fruit.size
        type: {members: [{id: small, value: 1}, {id: large, value: 2}]}
"""
REGISTRY_2 = """
file_format: definition/2
attributes:
  - {key: fruit.ripe, type: boolean}
"""
DEPRECATED = """
attributes:
  - {key: fruit.name, type: int}
"""
SPANS = """
attribute_groups:
  - id: fruit.common
    attributes:
      - ref: fruit.name
        requirement_level: required
      - ref: fruit.color
spans:
  - type: messaging.eat.consumer
    kind: consumer
    attributes:
      - ref_group: fruit.common
      - ref: fruit.color
        sampling_relevant: true
      - ref: fruit.ripe
        requirement_level: {conditionally_required: If it is known.}
span_refinements:
  - id: span.messaging.kafka.eat.consumer
    ref: messaging.eat.consumer
    attributes:
      - ref: fruit.ripe
        sampling_relevant: true
      - ref: fruit.size
        requirement_level: opt_in
  - id: span.messaging.other.eat.consumer
    ref: messaging.eat.consumer
"""
METRICS = """
groups:
  - id: metric.common
    type: attribute_group
    attributes:
      - ref: fruit.name
  - id: metric.messaging.eaten
    type: metric
    metric_name: messaging.eaten
    instrument: histogram
    unit: s
    extends: metric.common
    attributes:
      - ref: fruit.name
        requirement_level: required
  - id: event.messaging.eat.exception
    name: messaging.eat.exception
    type: event
    note: Set the severity to WARN (severity number 13) for it.
    attributes:
      - ref: fruit.color
"""
PAGE = """
### Metric: `messaging.eaten`

With the [`ExplicitBucketBoundaries` parameter](https://example.org) of `[ 0.5, 1 ]`.
"""


def test_the_facts_are_what_the_model_says(tmp_path: Path) -> None:
    files = {
        "model/manifest.yaml": MANIFEST,
        "model/fruit/registry.yaml": REGISTRY,
        "model/other/registry.yaml": REGISTRY_2,
        "model/fruit/deprecated/registry.yaml": DEPRECATED,
        "model/messaging/spans.yaml": SPANS,
        "model/messaging/metrics.yaml": METRICS,
        METRICS_PAGE: PAGE,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = facts(tmp_path)
    assert found["schema_url"] == "https://example.org/schemas/7.8.9"
    assert found["spans"] == {
        "span.messaging.kafka.eat.consumer": {
            "attributes": {
                "fruit.name": {"type": "string", "level": "required"},
                "fruit.ripe": {"type": "boolean", "level": "conditionally_required"},
                "fruit.color": {"type": "string", "level": "recommended"},
                "fruit.size": {"type": "int", "level": "opt_in"},
            },
            "kind": "CONSUMER",
            "sampling_relevant": ["fruit.color", "fruit.ripe"],
            "operation_type": "eat",
        }
    }
    assert found["metrics"] == {
        "metric.messaging.eaten": {
            "attributes": {"fruit.name": {"type": "string", "level": "required"}},
            "metric": "messaging.eaten",
            "instrument": "Histogram",
            "unit": "s",
            "bucket_boundaries": [0.5, 1],
        }
    }
    assert found["exception_events"]["events"] == {
        "messaging.eat.exception": {
            "severity": "WARN",
            "severity_number": 13,
            "attributes": {"fruit.color": {"type": "string", "level": "recommended"}},
        }
    }


def test_the_committed_facts_are_the_generators_output() -> None:
    checkout = os.environ.get("SEMANTIC_CONVENTIONS")
    if not checkout:
        pytest.skip(
            "SEMANTIC_CONVENTIONS names no checkout of the semantic conventions"
        )
    found = facts(Path(checkout))
    version = found["schema_url"].rpartition("/")[2]
    committed = Path(__file__).parent / f"messaging-kafka-{version}.json"
    assert committed.read_text() == json.dumps(found, indent=1) + "\n"
