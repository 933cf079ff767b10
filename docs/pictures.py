"""Takes the pictures of the demo: its own, and those of Jaeger's and Prometheus' pages.

    PYTHONPATH=examples:tests python docs/pictures.py

writes `docs/demo.svg`, `docs/jaeger.png` and `docs/prometheus.png`. It needs Jaeger 2,
Debian's packages `prometheus` and `chromium`, and what the demo needs. The releases of
Jaeger contain its page. For a binary that Go has built, `--page` names the directory of
the page.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from embedded_broker import POLL_INTERVAL, START_TIMEOUT, die_with_parent

from apache_broker import free_ports

DOCS = Path(__file__).parent
DEMO = DOCS.parent / "examples" / "demo"
WIDTH, HEIGHT = 1366, 820
# How much time passes for the page, in milliseconds, before its picture is taken.
PATIENCE = 20_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("background-networking", "component-update", "extensions", "gpu", "sync")


def jaeger(ports: list[int], page: Path | None) -> dict[str, Any]:
    """Jaeger in one process: traces stay in its memory, Prometheus gets the metrics."""
    otlp, metrics, query, grpc = (f"127.0.0.1:{port}" for port in ports)
    memory = {"memory": {"max_traces": 10_000}}
    query_service: dict[str, Any] = {
        "storage": {"traces": "memory"},
        "http": {"endpoint": query},
        "grpc": {"endpoint": grpc},
    }
    if page is not None:
        query_service["ui"] = {"assets_path": str(page)}
    return {
        "extensions": {
            "jaeger_storage": {"backends": {"memory": memory}},
            "jaeger_query": query_service,
        },
        "receivers": {"otlp": {"protocols": {"http": {"endpoint": otlp}}}},
        "exporters": {
            "jaeger_storage_exporter": {"trace_storage": "memory"},
            "prometheus": {"endpoint": metrics},
        },
        "service": {
            "extensions": ["jaeger_storage", "jaeger_query"],
            "pipelines": {
                "traces": {
                    "receivers": ["otlp"],
                    "exporters": ["jaeger_storage_exporter"],
                },
                "metrics": {"receivers": ["otlp"], "exporters": ["prometheus"]},
            },
            "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "error"}},
        },
    }


def prometheus(metrics: int) -> dict[str, Any]:
    target = {"targets": [f"127.0.0.1:{metrics}"]}
    scrape = {"job_name": "otel", "honor_labels": True, "static_configs": [target]}
    return {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}


def read(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


@contextmanager
def running(command: list[str | Path], ready: str) -> Iterator[None]:
    """Have a server run that answers at a URL when it is ready."""
    process = subprocess.Popen(
        command,
        preexec_fn=die_with_parent,
        env={**os.environ, "OTEL_TRACES_SAMPLER": "always_off"},  # of its own
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                urllib.request.urlopen(ready).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_INTERVAL)
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def backends(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Have both run, and give the URLs of OTLP, of Jaeger and of Prometheus."""
    otlp, metrics, query, grpc, own = free_ports(5)
    traces, graphs = f"http://127.0.0.1:{query}", f"http://127.0.0.1:{own}/classic"
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        configurations = {
            "jaeger": jaeger([otlp, metrics, query, grpc], arguments.page),
            "prometheus": prometheus(metrics),
        }
        for name, configuration in configurations.items():
            # JSON is YAML, too.
            (directory / f"{name}.yaml").write_text(json.dumps(configuration))
        command = [arguments.jaeger, "--config", directory / "jaeger.yaml"]
        stack.enter_context(running(command, f"{traces}/api/services"))
        program = arguments.prometheus
        command = [
            program,
            f"--config.file={directory / 'prometheus.yaml'}",
            f"--storage.tsdb.path={directory / 'prometheus'}",
            f"--web.local-assets={program.parents[1] / 'share' / 'prometheus' / 'web'}",
            f"--web.listen-address=127.0.0.1:{own}",
            "--log.level=error",
        ]
        stack.enter_context(running(command, f"{graphs}/graph"))
        yield f"http://127.0.0.1:{otlp}", traces, graphs


def graph_of_the_guide() -> str:
    """The parameters of Prometheus' page for the query of the guide to latency."""
    guide = (DOCS / "latency.md").read_text()
    (query,) = re.findall(r"(histogram_quantile\(.+?)\s+```", guide, re.DOTALL)
    parameters = {
        "g0.expr": " ".join(query.split()),
        "g0.tab": 0,  # the graph
        "g0.range_input": "40s",  # the orders take less
        "g0.step_input": 1,
    }
    return urllib.parse.urlencode(parameters)


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
    parser.add_argument(
        "--prometheus",
        type=Path,
        default="/usr/bin/prometheus",
        help="Prometheus' program, with its page where Debian's packages have it",
    )
    with backends(parser.parse_args()) as (otlp, traces, graphs):
        own = ("--svg", DOCS / "demo.svg")
        subprocess.run([sys.executable, DEMO, "--otlp", otlp, *own], check=True)
        take(f"{graphs}/graph?{graph_of_the_guide()}", DOCS / "prometheus.png")
        wanted = urllib.parse.urlencode({"service": "orders", "operation": "checkout"})
        (trace,) = read(f"{traces}/api/traces?{wanted}")["data"]
        take(f"{traces}/trace/{trace['traceID']}", DOCS / "jaeger.png")


if __name__ == "__main__":
    main()
