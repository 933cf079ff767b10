"""Takes the pictures of the demo's trace: its own, and that of Jaeger's page.

    PYTHONPATH=examples:tests python docs/pictures.py

writes `docs/demo.svg` and `docs/jaeger.png`. It needs Jaeger 2 and Chromium, and what
the demo needs. The releases of Jaeger contain its page. For a binary that Go has built,
`--page` names the directory of the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedded_broker import POLL_INTERVAL, START_TIMEOUT, die_with_parent

from apache_broker import free_ports

DOCS = Path(__file__).parent
DEMO = DOCS.parent / "examples" / "demo"
WIDTH, HEIGHT = 1366, 800
# How much time passes for the page, in milliseconds, before its picture is taken.
PATIENCE = 20_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("background-networking", "component-update", "extensions", "gpu", "sync")


def configuration(ports: list[int], page: Path | None) -> dict[str, Any]:
    """Jaeger in one process, with its traces in memory."""
    otlp, query, grpc = (f"127.0.0.1:{port}" for port in ports)
    memory = {"memory": {"max_traces": 10_000}}
    query_service: dict[str, Any] = {
        "storage": {"traces": "memory"},
        "http": {"endpoint": query},
        "grpc": {"endpoint": grpc},
    }
    if page is not None:
        query_service["ui"] = {"assets_path": str(page)}
    pipeline = {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}
    return {
        "extensions": {
            "jaeger_storage": {"backends": {"memory": memory}},
            "jaeger_query": query_service,
        },
        "receivers": {"otlp": {"protocols": {"http": {"endpoint": otlp}}}},
        "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
        "service": {
            "extensions": ["jaeger_storage", "jaeger_query"],
            "pipelines": {"traces": pipeline},
            "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "error"}},
        },
    }


def read(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


@contextmanager
def jaeger(program: str, page: Path | None) -> Iterator[tuple[str, str]]:
    """Have Jaeger run, and give the URLs that it takes traces and shows them at."""
    otlp, query, _ = ports = free_ports(3)
    shown = f"http://127.0.0.1:{query}"
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "jaeger.yaml"
        # JSON is YAML, too.
        config.write_text(json.dumps(configuration(ports, page)))
        process = subprocess.Popen(
            [program, "--config", config],
            preexec_fn=die_with_parent,
            env={**os.environ, "OTEL_TRACES_SAMPLER": "always_off"},  # of its own
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while True:
                try:
                    read(f"{shown}/api/services")
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise
                time.sleep(POLL_INTERVAL)
            yield f"http://127.0.0.1:{otlp}", shown
        finally:
            process.terminate()
            process.wait()


def take(url: str, picture: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"None of these is found: {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",  # it opens nothing but a page of this machine
                "--no-first-run",
                "--hide-scrollbars",
                "--log-level=3",
                *(f"--disable-{each}" for each in QUIET),
                f"--user-data-dir={profile}",
                f"--window-size={WIDTH},{HEIGHT}",
                f"--virtual-time-budget={PATIENCE}",
                f"--screenshot={picture.absolute()}",
                url,
            ],
            check=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jaeger", default="jaeger", help="Jaeger's program")
    parser.add_argument("--page", type=Path, help="the directory of Jaeger's page")
    arguments = parser.parse_args()
    with jaeger(arguments.jaeger, arguments.page) as (otlp, shown):
        own = ("--svg", DOCS / "demo.svg")
        subprocess.run([sys.executable, DEMO, "--otlp", otlp, *own], check=True)
        wanted = urllib.parse.urlencode({"service": "orders", "operation": "checkout"})
        (trace,) = read(f"{shown}/api/traces?{wanted}")["data"]
        take(f"{shown}/trace/{trace['traceID']}", DOCS / "jaeger.png")


if __name__ == "__main__":
    main()
