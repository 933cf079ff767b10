"""Prometheus, which Debian has, and an OpenTelemetry Collector, which Go builds.

    PYTHONPATH=examples python tests/backends.py

gets both into the user's cache, where tests find them; the Collector takes minutes.
What is installed already is taken as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from apache_broker import cache, made_once

COLLECTOR_VERSION = "0.148.0"
CONTRIB = "github.com/open-telemetry/opentelemetry-collector-contrib"
COLLECTOR = f"""\
dist:
  name: otelcol
  output_path: {{output}}
receivers:
  - gomod: go.opentelemetry.io/collector/receiver/otlpreceiver v{COLLECTOR_VERSION}
processors:
  - gomod: go.opentelemetry.io/collector/processor/batchprocessor v{COLLECTOR_VERSION}
  - gomod: {CONTRIB}/processor/attributesprocessor v{COLLECTOR_VERSION}
exporters:
  - gomod: go.opentelemetry.io/collector/exporter/debugexporter v{COLLECTOR_VERSION}
  - gomod: {CONTRIB}/exporter/prometheusexporter v{COLLECTOR_VERSION}
  - gomod: {CONTRIB}/exporter/zipkinexporter v{COLLECTOR_VERSION}
"""


def _unpack_prometheus(output: Path) -> None:
    scratch = output.parent
    # A fresh machine has no lists of packages. Without root, those it has must do.
    subprocess.run(["apt-get", "-q", "update"], check=False)
    subprocess.run(["apt-get", "-q", "download", "prometheus"], check=True, cwd=scratch)
    (package,) = scratch.glob("prometheus_*.deb")
    subprocess.run(["dpkg-deb", "--extract", package, output], check=True)


def _build_collector(output: Path) -> None:
    tools, sources = output.with_name("tools"), output.with_name("sources")
    builder = f"go.opentelemetry.io/collector/cmd/builder@v{COLLECTOR_VERSION}"
    environ = {**os.environ, "GOBIN": str(tools)}
    subprocess.run(["go", "install", builder], check=True, env=environ)
    config = output.with_name("builder.yaml")
    config.write_text(COLLECTOR.format(output=sources))
    command = [str(tools / "builder"), "--config", str(config)]
    subprocess.run(command, check=True)
    output.mkdir()
    (sources / "otelcol").rename(output / "otelcol")


# What makes each program, in which directory of the cache, and where it is in there.
_Recipe = tuple[str, Callable[[Path], None], str]
_PROMETHEUS = "prometheus", _unpack_prometheus
RECIPES: dict[str, _Recipe] = {
    "promtool": (*_PROMETHEUS, "usr/bin/promtool"),
    "prometheus": (*_PROMETHEUS, "usr/bin/prometheus"),
    "otelcol": (f"otelcol-{COLLECTOR_VERSION}", _build_collector, "otelcol"),
}


def found(program: str) -> str | None:
    """Where a program is, if it is installed or in the cache."""
    directory, _, place = RECIPES[program]
    return shutil.which(program) or shutil.which(cache() / directory / place)


def why_unavailable(*programs: str) -> str:
    """What is missing and how it is got; nothing if all are there."""
    missing = [program for program in programs if found(program) is None]
    if not missing:
        return ""
    return f"not found: {', '.join(missing)} (see tests/backends.py)"


def main() -> int:
    for program, (directory, make, _) in RECIPES.items():
        if found(program) is None:
            made_once(directory, make)
        print(found(program))
    return 0 if all(map(found, RECIPES)) else 1


if __name__ == "__main__":
    sys.exit(main())
