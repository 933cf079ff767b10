"""The examples: each runs as its docstring says, and makes the traces it is about."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sysconfig
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from embedded_broker import die_with_parent
from opentelemetry.exporter.otlp.proto.http.trace_exporter import DEFAULT_ENDPOINT
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer

from clients import DEADLINE

pytestmark = [pytest.mark.one_broker, pytest.mark.one_client]

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text()
TIMEOUT = 120


def docstring_of(name: str) -> str:
    source = (EXAMPLES / f"{name}.py").read_text()
    return ast.get_docstring(ast.parse(source), clean=False) or ""


def command_of(name: str) -> str:
    """The command that an example's docstring tells."""
    found = re.search(r"^    ((?:.+\\\n)*.+)", docstring_of(name), re.MULTILINE)
    assert found is not None
    return found[1]


def environ(broker: Any) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "KAFKA_BOOTSTRAP_SERVERS": broker.address,
        "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
    }


def run(name: str, broker: Any, more: Mapping[str, str] | None = None) -> str:
    """Run an example to its end and return what it printed."""
    done = subprocess.run(
        ["sh", "-c", command_of(name)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=TIMEOUT,
        env={**environ(broker), **(more or {})},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class Shown(NamedTuple):
    """A span as `show_spans` prints it."""

    number: int
    name: str
    trace: int
    parent: int | None
    links: list[int]
    attributes: dict[str, str]


def shown(printed: str) -> list[Shown]:
    lines = re.findall(
        r"^span +(\d+)  (.+?) +trace (\d+)"
        r"(?:, child of (\d+))?(?:, links to ([\d ]+))?((?:, [\w.]+=[^,\n]+)*)$",
        printed,
        re.MULTILINE,
    )
    return [
        Shown(
            int(number),
            name,
            int(trace),
            int(parent) if parent else None,
            [int(link) for link in links.split()],
            dict(re.findall(r"([\w.]+)=([^,]+)", attributes)),
        )
        for number, name, trace, parent, links, attributes in lines
    ]


def named(spans: list[Shown], name: str) -> list[Shown]:
    return [span for span in spans if span.name == name]


def one(spans: list[Shown], name: str) -> Shown:
    (span,) = named(spans, name)
    return span


def follows(process: Shown, send: Shown) -> bool:
    """Whether a process span is of what a send span has sent, in its trace."""
    return (process.trace, process.parent, process.links) == (
        send.trace,
        send.number,
        [send.number],
    )


def test_an_application_without_a_line_of_telemetry_is_traced(broker: Any) -> None:
    printed = run("zero_code", broker)
    before, said, after = printed.partition("shipping a lamp")
    assert said
    # Spans are exported at the end, or after a few seconds.
    decoder = json.JSONDecoder()
    rest = (before + after).lstrip()
    send, end = decoder.raw_decode(rest)
    process, _ = decoder.raw_decode(rest[end:].lstrip())
    assert send["name"] == "send zero-code"
    assert process["name"] == "process zero-code"
    assert process["context"]["trace_id"] == send["context"]["trace_id"]
    assert process["parent_id"] == send["context"]["span_id"]
    assert send["resource"]["attributes"]["service.name"] == "shop"
    assert (
        "opentelemetry" not in (EXAMPLES / "zero_code.py").read_text().split('"""')[2]
    )


def test_a_configuration_file_says_how_an_application_is_traced(broker: Any) -> None:
    comment = (EXAMPLES / "configuration.yaml").read_text().partition("#\n# It")[0]
    (command,) = re.findall(r"#\n((?:# {5}.*\n)+)", comment)
    done = subprocess.run(
        ["sh", "-c", command.replace("#     ", "")],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=TIMEOUT,
        env={**environ(broker), "SERVICE_NAME": "branch"},
    )
    spans = []
    rest = done.stdout.replace("shipping a lamp", "").lstrip()
    while rest:
        span, end = json.JSONDecoder().raw_decode(rest)
        spans.append(span)
        rest = rest[end:].lstrip()
    send, process = spans
    assert (send["name"], process["name"]) == ("send zero-code", "process zero-code")
    assert process["parent_id"] is None
    (link,) = process["links"]
    assert link["context"]["span_id"] == send["context"]["span_id"]
    assert "messaging.kafka.message.key" not in send["attributes"]
    assert send["resource"]["attributes"]["service.name"] == "branch"


def test_hooks_add_attributes_and_the_output_is_that_of_the_readme(broker: Any) -> None:
    (block,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    printed = run("manual_hooks", broker)
    # Spans are exported at the end, or after a few seconds.
    assert sorted(printed.splitlines()) == sorted(block.splitlines())
    spans = shown(block)
    for send, process in zip(
        named(spans, "send manual-hooks"),
        named(spans, "process manual-hooks"),
        strict=True,
    ):
        assert follows(process, send)
        assert [*send.attributes, *process.attributes] == ["app.items", "app.customer"]


def test_each_worker_has_a_span_of_its_own_and_one_fails(broker: Any) -> None:
    printed = run("worker_threads", broker)
    spans = shown(printed)
    sends = named(spans, "send worker-threads")
    processed = sorted(
        named(spans, "process worker-threads"), key=lambda span: span.links
    )
    for process, send in zip(processed, sends, strict=True):
        assert follows(process, send)
    failed = [span for span in processed if span.attributes]
    assert [span.attributes for span in failed] == [{"error.type": "ValueError"}]
    assert failed == [processed[2]]
    assert "not shipped: a broken vase" in printed
    polls = named(spans, "poll worker-threads")
    links = [link for poll in polls for link in poll.links]
    assert links == [send.number for send in sends]


def test_a_batch_has_one_span_that_links_to_each_message(broker: Any) -> None:
    printed = run("batch_insert", broker)
    assert "3 rows\n" in printed
    spans = shown(printed)
    sends = named(spans, "send batch-insert")
    assert len(sends) == 3
    batches = named(spans, "process batch-insert")
    links = [link for batch in batches for link in batch.links]
    assert links == [send.number for send in sends]
    assert [batch.parent for batch in batches] == [None] * len(batches)
    # Each is what one poll brought.
    polls = named(spans, "poll batch-insert")
    assert [batch.links for batch in batches] == [poll.links for poll in polls]
    inserts = named(spans, "INSERT")
    assert [each.parent for each in inserts] == [each.number for each in batches]


def test_the_span_of_a_record_holds_its_transaction(broker: Any) -> None:
    spans = shown(run("exactly_once", broker))
    sends = named(spans, "send exactly-once-orders")
    processed = named(spans, "process exactly-once-orders")
    for process, send in zip(processed, sends, strict=True):
        assert follows(process, send)
        within = [span for span in spans if span.parent == process.number]
        assert {span.trace for span in within} == {send.trace}
        # The acknowledgement of a send comes on another thread.
        assert sorted(span.name for span in within) == [
            "commit_transaction",
            "send exactly-once-invoices",
            "send_offsets_to_transaction exactly-once-orders",
        ]
    assert len(spans) == 10


def test_a_sampler_decides_by_topic_unless_there_is_a_parent(broker: Any) -> None:
    printed = run("sampling_by_topic", broker)
    told = {line for line in printed.splitlines() if line.endswith("sampled")}
    assert told == {"a lamp is sampled", "a click is not sampled", "a sale is sampled"}
    spans = shown(printed)
    assert len(spans) == 5
    checkout = one(spans, "checkout")
    click = one(spans, "send sampling-clicks")
    assert (click.trace, click.parent) == (checkout.trace, checkout.number)
    for topic in ("sampling-clicks", "sampling-orders"):
        assert follows(one(spans, f"process {topic}"), one(spans, f"send {topic}"))


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """What a process prints, up to a line in which there is `pattern`."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if re.search(pattern, line):
            return printed
    raise AssertionError(f"it ended with no {pattern!r}:\n{printed}")


def test_a_request_its_message_and_the_thread_are_one_trace(broker: Any) -> None:
    with subprocess.Popen(
        [*shlex.split(command_of("fastapi_service")), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        preexec_fn=die_with_parent,
        env=environ(broker),
    ) as service:
        impatience = threading.Timer(TIMEOUT, service.kill)
        impatience.start()
        try:
            started = read_until(service, "running on")
            (address,) = re.findall(r"running on (http://\S+)", started)
            request = urllib.request.Request(f"{address}/orders/lamp", method="POST")
            with urllib.request.urlopen(request, timeout=DEADLINE) as response:
                assert json.load(response).keys() == {"number"}
            printed = read_until(service, "process fastapi-service")
            service.send_signal(signal.SIGINT)
            printed += service.communicate()[0]
            assert service.returncode == 0
        finally:
            service.kill()
            impatience.cancel()
    spans = shown(printed)
    server = one(spans, "POST /orders/{item}")
    send = one(spans, "send fastapi-service")
    assert server.parent is None
    assert (send.trace, send.parent) == (server.trace, server.number)
    assert follows(one(spans, "process fastapi-service"), send)


def test_traces_and_metrics_go_to_a_collector(broker: Any) -> None:
    # A receiver of OTLP stands in for the collector, which takes minutes to build.
    with OtlpProtoTestServer() as receiver:
        endpoint = f"http://127.0.0.1:{receiver.port}"
        more = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        assert run("otlp_collector", broker, more) == "shipping a lamp\n"
        spans = receiver.drain_spans()
        metrics = receiver.drain_metrics()
    assert [each.span.name for each in spans] == [
        "send otlp-collector",
        "process otlp-collector",
    ]
    send, process = (each.span for each in spans)
    assert (process.trace_id, process.parent_span_id) == (send.trace_id, send.span_id)
    received: list[Any] = [*spans, *metrics]
    for each in received:
        assert "shop" in {a.value.string_value for a in each.resource.attributes}
    assert {each.metric.name for each in metrics} == {
        "messaging.client.operation.duration",
        "messaging.client.sent.messages",
        "messaging.client.consumed.messages",
        "messaging.process.duration",
    }


def test_the_collector_takes_what_the_application_sends() -> None:
    config = yaml.safe_load((EXAMPLES / "collector.yaml").read_text())
    protocols = config["receivers"]["otlp"]["protocols"]
    assert f"http://{protocols['http']['endpoint']}/" == DEFAULT_ENDPOINT
    # What the launcher exports to by default.
    assert protocols["grpc"]["endpoint"] == "localhost:4317"
    pipelines = config["service"].pop("pipelines")
    assert pipelines.keys() == {"traces", "metrics"}
    for pipeline in pipelines.values():
        assert pipeline["receivers"] == ["otlp"]
        for kind, parts in pipeline.items():
            assert set(parts) <= config[kind].keys()


def test_the_readme_names_every_file() -> None:
    links = set(re.findall(r"\]\((\S+?)/?\)", README))
    assert links == {
        path.name
        for path in EXAMPLES.iterdir()
        if path.name not in {"README.md", "__pycache__"}
    }


def test_every_example_of_the_table_is_run_and_is_what_its_docstring_says() -> None:
    rows = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \| (.*) \|$", README, re.MULTILINE)
    assert rows
    for name, what in rows:
        assert what == docstring_of(name).splitlines()[0]
    source = Path(__file__).read_text()
    run_here = re.findall(r'\b(?:run|command_of)\("(\w+)"', source)
    assert sorted(run_here) == sorted(name for name, _ in rows)
    others = {"embedded_broker", "show_spans"}
    assert {name for name, _ in rows} == {
        p.stem for p in EXAMPLES.glob("*.py")
    } - others
