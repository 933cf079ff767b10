"""The README and the documentation: every block of code runs.

A test takes its blocks by `example`; the last test fails if no test has taken one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import opentelemetry.environment_variables
import opentelemetry.instrumentation.environment_variables
import opentelemetry.instrumentation.logging.environment_variables
import opentelemetry.sdk.environment_variables
import pytest
import yaml
from kafka import KafkaConsumer
from opentelemetry import baggage, context, trace
from opentelemetry.instrumentation import auto_instrumentation
from opentelemetry.instrumentation.threading import ThreadingInstrumentor
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer
from opentelemetry.trace import get_current_span

from apache_broker import free_ports
from clients import DEADLINE, Clients, Finite, poll_records
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor, _config, _semconv
from pages import BLOCKS, PAGES, ROOT, Block, code_in, table
from recorder import Recorder
from scripts import run

pytestmark = [pytest.mark.one_broker, pytest.mark.one_client]

_taken: set[Block] = set()


def example(page: str, containing: str, language: str = "python") -> str:
    """The code of the one block of a page that contains something.

    Every process of the tests calls this for every block, while it imports this module.
    """
    (found,) = [
        block
        for block in BLOCKS
        if (block.page, block.language) == (page, language) and containing in block.code
    ]
    _taken.add(found)
    return found.code


# Programs: what is started as the page has it, in a directory of its own.

APPLICATION = example("README", "a lamp")
DISABLED = example("settings", "enabled: false", "yaml")
FIRST = example("README", "distro opentelemetry-exporter", "sh")
INSTALL = example("README", "activate", "sh")
START_BROKER = example("README", "noida-db up", "sh")
INSTALL_EXPORTER = example("README", "install opentelemetry-exporter", "sh")
CONSOLE = example("README", "console", "sh")
LAUNCH = example("README", "OTEL_SERVICE_NAME", "sh")
EXPORTS = example("README", "OTEL_EXPORTER_OTLP_ENDPOINT", "sh")
ZERO_CODE = example("setups", "EXCLUDED_TOPICS", "sh")
PRINT = example("troubleshooting", "console", "sh")
FOUND = example("troubleshooting", "entry_points", "sh")
MANUAL = example("README", "ConsoleSpanExporter")
TELEMETRY = example("setups", "telemetry.py")
POST_FORK = example("setups", "post_fork")
SHOP = example("setups", "start_response")
GUNICORN = example("setups", "gunicorn", "sh")
TASKS = example("setups", "worker_process_init")
CELERY = example("setups", "tasks worker", "sh")
CALL_TASK = example("setups", "tasks call", "sh")
POOL = example("setups", "Pool(")
DOCKERFILE = example("setups", "FROM", "dockerfile")
INSTRUMENTATION = example("setups", "kind: Instrumentation", "yaml")
DEPLOYMENT = example("setups", "kind: Deployment", "yaml")


@pytest.fixture
def receiver() -> Iterator[OtlpProtoTestServer]:
    with OtlpProtoTestServer() as server:
        yield server


class Programs:
    """A directory with programs, and how they are started in it."""

    def __init__(self, path: Path, clients: Clients, receiver: Any) -> None:
        self.path = path
        self.environ = {
            **os.environ,
            "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        self._clients = clients

    def write(self, **sources: str) -> None:
        """Write modules, with the broker of the tests and a topic of its own."""
        for name, source in sources.items():
            code = source.replace("localhost:9092", self._clients.address)
            code = code.replace('"orders"', f'"{self._clients.topic}"')
            (self.path / f"{name}.py").write_text(code)

    def run(self, command: str) -> str:
        """Run a command of the shell's to its end and return what it printed."""
        done = subprocess.run(
            ["sh", "-e", "-c", command],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.path,
            timeout=120,
            env=self.environ,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def running(self, command: str) -> Iterator[None]:
        """Have a server run, and end it as an operator would."""
        output = self.path / "output"
        with output.open("w") as file:
            server = subprocess.Popen(
                shlex.split(command),
                cwd=self.path,
                env=self.environ,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            try:
                yield
            except BaseException:
                sys.stdout.write(output.read_text())
                raise
            finally:
                server.terminate()
                try:
                    server.wait(DEADLINE)
                finally:
                    server.kill()
                    server.wait()


@pytest.fixture
def programs(
    tmp_path: Path, clients: Clients, receiver: OtlpProtoTestServer
) -> Programs:
    return Programs(tmp_path, clients, receiver)


def services(spans: Any) -> set[str]:
    return {
        attribute.value.string_value
        for each in spans
        for attribute in each.resource.attributes
        if attribute.key == "service.name"
    }


def names(spans: Any) -> list[str]:
    assert {each.scope.name for each in spans} == {"otel_kafka_python"}
    return sorted(each.span.name for each in spans)


def spans_until(receiver: OtlpProtoTestServer, *awaited: str) -> dict[str, Any]:
    """The spans by name, once those of the awaited names are there."""
    spans: dict[str, Any] = {}
    while not spans.keys() >= {*awaited}:
        span = receiver.get_span(DEADLINE)
        spans[span.span.name] = span
    return spans


# It would wait for more.
UNTIL_SHIPPED = f"{APPLICATION}    break\n"


@pytest.mark.parametrize(
    ("application", "command"),
    [(APPLICATION, EXPORTS + LAUNCH), (UNTIL_SHIPPED, ZERO_CODE)],
    ids=["README", "setups"],
)
def test_the_application_runs_under_the_launcher(
    programs: Programs,
    receiver: OtlpProtoTestServer,
    topic: str,
    application: str,
    command: str,
) -> None:
    programs.write(app=application)
    command = command.replace(
        "http://localhost:4318", f"http://127.0.0.1:{receiver.port}"
    )
    assert programs.run(command) == "shipping a lamp\n"
    spans = receiver.get_spans(2, DEADLINE)
    assert names(spans) == [f"process {topic}", f"send {topic}"]
    assert services(spans) == {"shop"}


# A virtual environment is not made, and nothing installed: this has pip look whether
# each argument is installed here, or is the address of this project's repository.
(SOURCE,) = re.findall(
    r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
)
PIP = f"""#!{sys.executable}
import sys
from importlib.metadata import distribution
assert sys.argv[1] == "install"
for name in sys.argv[2:]:
    assert name == "git+{SOURCE}" or distribution(name)
"""


def test_the_quick_start_is_pasted_in_order(
    tmp_path: Path, receiver: OtlpProtoTestServer, topic: str
) -> None:
    (tmp_path / "pip").write_text(PIP)
    (tmp_path / "pip").chmod(0o755)
    (port,) = free_ports(1)
    pasted = [
        FIRST.removesuffix(LAUNCH.splitlines(keepends=True)[-1]),
        INSTALL.partition("\n")[2],
        *(START_BROKER, CONSOLE, INSTALL_EXPORTER, EXPORTS, LAUNCH),
    ]
    # The last two stand the other way about; nothing listens on the default port here.
    positions = [PAGES["README"].index(block) for block in [*pasted[:5], LAUNCH]]
    assert positions == sorted(positions)
    script = "".join(pasted).replace("up --only", f"up --kafka-port {port} --only")
    script = script.replace(":4318", f":{receiver.port}")
    # It is the sum of two, of which the tests have one.
    script = script.replace("exporter-otlp\n", "exporter-otlp-proto-http\n")
    (tmp_path / "app.py").write_text(APPLICATION.replace("9092", str(port)))
    done = subprocess.run(
        ["sh", "-e", "-c", f"trap 'noida-db down' EXIT\n{script}"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env={
            "HOME": str(tmp_path),
            "PATH": f"{tmp_path}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("shipping a lamp") == 3  # one, and then two
    assert '"name": "send orders"' in done.stdout
    assert '"name": "process orders"' in done.stdout
    exported = names(receiver.get_spans(3, DEADLINE))
    assert exported == ["process orders", "process orders", "send orders"]


def test_the_spans_can_be_printed(programs: Programs, topic: str) -> None:
    programs.write(app=UNTIL_SHIPPED)
    printed = programs.run(PRINT)
    assert f'"name": "send {topic}"' in printed
    assert f'"name": "process {topic}"' in printed


WITHOUT_HEADERS = example("troubleshooting", "PROPAGATION_EXCLUDED", "sh")


def test_no_headers_are_put_on_the_messages_to_a_topic(
    programs: Programs, clients: Clients, topic: str
) -> None:
    setting = WITHOUT_HEADERS
    programs.write(app=UNTIL_SHIPPED)
    programs.run(setting.replace("reports", topic) + LAUNCH)
    (record,) = poll_records(clients.consumer(), 1)
    assert record.headers == []


def test_the_launcher_finds_three_entry_points(programs: Programs) -> None:
    assert programs.run(FOUND).count("EntryPoint(") == 3


def test_the_configuration_file_turns_this_package_off(tmp_path: Path) -> None:
    path = tmp_path / "configuration.yaml"
    path.write_text(f'file_format: "1.1"\n{DISABLED}')
    assert _config.disabled_in_file({"OTEL_CONFIG_FILE": str(path)})


def test_the_code_of_manual_use_runs(clients: Clients, topic: str) -> None:
    send = """
import sys
from kafka import KafkaProducer
producer = KafkaProducer(bootstrap_servers=sys.argv[1])
producer.send(sys.argv[2], b"value")
producer.send("heartbeats", b"value")
producer.close()
"""
    done = run(MANUAL + send, clients.address, topic)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"name": "send ') == 1
    assert f'"name": "send {topic}"' in done.stdout
    assert '"app.shop": "north"' in done.stdout


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed here")


def ask(request: urllib.request.Request) -> bytes:
    """Ask a server on this machine, once it listens."""
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            with urllib.request.urlopen(request) as response:
                return bytes(response.read())
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@needs("gunicorn")
@pytest.mark.parametrize("launched", [False, True], ids=["post_fork", "launcher"])
def test_gunicorns_workers_are_traced(
    programs: Programs, receiver: OtlpProtoTestServer, topic: str, launched: bool
) -> None:
    command = GUNICORN
    programs.write(shop=SHOP)
    if launched:
        command = "opentelemetry-instrument gunicorn shop:app"
        assert f"`{command}`" in PAGES["setups"].replace("\n", " ")
    else:
        programs.write(**{"gunicorn.conf": POST_FORK, "telemetry": TELEMETRY})
    (port,) = free_ports(1)
    # A worker that is still in its `post_fork` does not hear that it is to end.
    arguments = f"--bind 127.0.0.1:{port} --graceful-timeout 3"
    programs.environ["GUNICORN_CMD_ARGS"] = arguments
    with programs.running(command):
        request = urllib.request.Request(f"http://127.0.0.1:{port}")
        assert ask(request) == b"ordered\n"
        spans = receiver.get_spans(1, DEADLINE)
    assert names(spans) == [f"send {topic}"]


@needs("celery")
def test_celerys_workers_are_traced(
    programs: Programs, receiver: OtlpProtoTestServer, clients: Clients, topic: str
) -> None:
    # Files for a broker, so that none has to be there; and nothing is exported but at
    # the end.
    queue = {f"data_folder_{way}": str(programs.path) for way in ("in", "out")}
    tasks = TASKS.replace("redis://localhost:6379/0", "filesystem://")
    tasks += f"app.conf.broker_transport_options = {queue}\n"
    programs.write(telemetry=TELEMETRY, shop=SHOP, tasks=tasks)
    programs.environ["OTEL_BSP_SCHEDULE_DELAY"] = "600000"
    programs.run(CALL_TASK)
    with programs.running(CELERY):
        (record,) = poll_records(clients.consumer(), 1)
    assert record.value == b"a lamp"
    assert names(receiver.get_spans(1, DEADLINE)) == [f"send {topic}"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_pools_processes_are_traced(
    programs: Programs,
    receiver: OtlpProtoTestServer,
    clients: Clients,
    topic: str,
    method: str,
) -> None:
    clients.send(b"a lamp", b"a chair")
    pool = POOL.replace("timeout_ms=5000", f"timeout_ms={DEADLINE * 1000:.0f}")
    pool = pool.replace('"spawn"', f'"{method}"')
    programs.write(telemetry=TELEMETRY, pool=pool)
    printed = programs.run(f"{sys.executable} pool.py")
    # Two processes may print at the same time.
    shown = [printed.count(each) for each in ("shipping", "a lamp", "a chair")]
    assert shown == [2, 1, 1]
    spans = receiver.get_spans(3, DEADLINE)
    assert names(spans) == [f"poll {topic}", *[f"process {topic}"] * 2]


def test_the_site_links_to_the_repository() -> None:
    assert f"\nRepository <{SOURCE}>\n" in PAGES["index"]


def test_what_the_operator_injects_traces_the_application(
    programs: Programs, receiver: OtlpProtoTestServer, topic: str
) -> None:
    programs.write(app=UNTIL_SHIPPED)
    spec = yaml.safe_load(INSTRUMENTATION)["spec"]
    for variable in spec["python"]["env"]:
        programs.environ[variable["name"]] = variable["value"]
    programs.environ["OTEL_PROPAGATORS"] = ",".join(spec["propagators"])
    # As the operator does, which starts no launcher.
    programs.environ["PYTHONPATH"] = str(Path(auto_instrumentation.__file__).parent)
    assert programs.run("python app.py") == "shipping a lamp\n"
    spans = receiver.get_spans(2, DEADLINE)
    assert names(spans) == [f"process {topic}", f"send {topic}"]
    exported = {each.metric.name for each in receiver.drain_metrics()}
    assert "kafka.consumer.fetch_rate" in exported


def test_the_pods_template_asks_for_the_operator() -> None:
    template = yaml.safe_load(DEPLOYMENT)["spec"]["template"]
    assert template["metadata"]["annotations"] == {
        "instrumentation.opentelemetry.io/inject-python": "true"
    }
    assert "pip install kafka-python otel-kafka-python" in DOCKERFILE
    assert distribution("otel-kafka-python").version
    assert "COPY app.py" in DOCKERFILE


# Fragments: they run here, with the names that the page speaks of.


class Patient(Finite):
    """A consumer whose `poll` brings something, if its first time does not."""

    def poll(self, *args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + DEADLINE
        while True:
            polled = super().poll(*args, **kwargs)
            if polled or time.monotonic() > deadline:
                return polled


class Shop:
    """What fragments name: a consumer of three orders, and what is done with them."""

    def __init__(self, clients: Clients, recorder: Recorder) -> None:
        clients.send(b"a lamp", b"a chair", b"a table")
        recorder.started.clear()
        self.recorder = recorder
        self.topic = clients.topic
        self.consumer: KafkaConsumer = clients.consumer(
            cls=Patient, group_id=clients.topic
        )
        self.consumer.count = 3
        # The value of each order, and the span that was current.
        self.shipped: list[tuple[bytes, Any]] = []

    def ship(self, value: bytes) -> bool:
        self.shipped.append((value, get_current_span().get_span_context()))
        return True

    async def ship_later(self, value: bytes) -> None:
        self.ship(value)

    def run(self, code: str, **more: Any) -> None:
        exec(
            IMPORT + code,
            {
                "consumer": self.consumer,
                "ship": self.ship,
                "ship_later": self.ship_later,
                **more,
            },
        )

    def processed(self) -> list[Any]:
        """The process spans, one for each order in which it was shipped."""
        spans = self.recorder.named(f"process {self.topic}")
        assert [value for value, _ in self.shipped] == ORDERS
        assert [span.context for span in spans] == [each for _, each in self.shipped]
        assert self.recorder.open() == []
        return spans


ORDERS = [b"a lamp", b"a chair", b"a table"]
IMPORT = example("consuming", "import process_span")


@pytest.fixture
def shop(instrumented: None, clients: Clients, recorder: Recorder) -> Shop:
    return Shop(clients, recorder)


def fragment(page: str, containing: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("code", [example(page, containing)], ids=[page])


one_span_each = pytest.mark.parametrize(
    "code",
    [
        example("consuming", "in consumer:\n    ship("),
        example("consuming", "in consumer:\n    with process_span"),
        example("consuming", "for record in records:\n        ship("),
        example("consuming", "def valid"),
        example("consuming", "asyncio"),
    ],
    ids=["loop", "process_span", "poll", "generator", "asyncio"],
)


@one_span_each
def test_each_record_has_its_process_span_current(shop: Shop, code: str) -> None:
    shop.run(code)
    assert len(shop.processed()) == 3


@fragment("consuming", "in consumer:\n    with process_span")
def test_an_exception_is_on_the_loops_span(
    shop: Shop, recorder: Recorder, topic: str, code: str
) -> None:
    def ship(value: bytes) -> None:
        raise ValueError(value)

    with pytest.raises(ValueError, match="a lamp"):
        shop.run(code, ship=ship)
    span = recorder.one(f"process {topic}")
    assert (span.attributes or {})["error.type"] == "ValueError"


@fragment("consuming", "while True")
def test_records_of_next_have_their_process_span(shop: Shop, code: str) -> None:
    with pytest.raises(StopIteration):
        shop.run(code)
    assert len(shop.processed()) == 3
    assert len(shop.recorder.named(f"poll {shop.topic}")) == 3


@fragment("consuming", "insert(")
def test_a_batch_has_one_process_span(
    shop: Shop, recorder: Recorder, code: str
) -> None:
    inserted: list[bytes] = []
    shop.run(code, insert=inserted.extend)
    span = recorder.one(f"process {shop.topic}")
    assert len(span.links) == len(inserted) > 0
    assert (span.attributes or {})["messaging.consumer.group.name"] == shop.topic


@fragment("consuming", "ThreadPoolExecutor")
def test_threads_have_a_process_span_for_each_record(
    shop: Shop, recorder: Recorder, code: str
) -> None:
    shop.run(code)
    assert sorted(value for value, _ in shop.shipped) == sorted(ORDERS)
    spans = recorder.named(f"process {shop.topic}")
    current = {context.span_id for _, context in shop.shipped}
    assert {span.context.span_id for span in spans if span.context} == current
    assert all(span.parent is not None for span in spans)


THREADING = example("threads", "ThreadingInstrumentor")


def traces(shop: Shop) -> set[int]:
    return {
        span.context.trace_id
        for span in shop.recorder.named(f"process {shop.topic}")
        if span.context
    }


@fragment("threads", "pool.submit")
def test_work_that_a_loop_submits_is_in_the_messages_trace(
    shop: Shop, code: str
) -> None:
    exec(THREADING, {})
    try:
        shop.run(code)
    finally:
        ThreadingInstrumentor().uninstrument()
    assert sorted(value for value, _ in shop.shipped) == sorted(ORDERS)
    assert {context.trace_id for _, context in shop.shipped} == traces(shop)
    assert len(traces(shop)) == 3


SUBMITS = example("threads", "pool.submit")
COMPREHENSION = example("threads", "def work(")


def test_work_that_a_loop_submits_is_in_no_trace_without_it(shop: Shop) -> None:
    shop.run(SUBMITS)
    assert len(shop.shipped) == 3
    assert not any(context.is_valid for _, context in shop.shipped)


@fragment("threads", "Queue(")
def test_a_worker_behind_a_queue_works_in_the_messages_trace(
    shop: Shop, code: str
) -> None:
    shop.run(code)
    assert [value for value, _ in shop.shipped] == ORDERS
    assert {context.trace_id for _, context in shop.shipped} == traces(shop)
    assert len(shop.recorder.named(f"process {shop.topic}")) == 6


@fragment("threads", "KafkaConsumer(")
def test_the_examples_of_threads_run_below_its_first_lines(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    code: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clients.send(b"a lamp")
    code = f"{code}{COMPREHENSION}".replace("localhost:9092", clients.address)
    code = code.replace("timeout_ms=1000", f"timeout_ms={DEADLINE * 1000:.0f}")
    known: dict[str, Any] = {}
    exec(code.replace("orders", topic), known)
    known["consumer"].close()
    assert capsys.readouterr().out == "shipping a lamp\n"
    assert recorder.one(f"process {topic}")


@fragment("threads", "def work(")
def test_a_comprehension_over_records_has_their_process_spans(
    shop: Shop, code: str
) -> None:
    shop.run(code)
    assert len(shop.processed()) == 3


@fragment("consuming", "parcels")
def test_a_record_that_is_sent_on_stays_in_its_trace(
    shop: Shop, clients: Clients, recorder: Recorder, code: str
) -> None:
    producer, parcels = clients.producer(), f"{shop.topic}-parcels"
    shop.run(code.replace("parcels", parcels), producer=producer)
    producer.flush()
    sent = recorder.named(f"send {parcels}")
    processed = recorder.named(f"process {shop.topic}")
    assert [span.parent for span in sent] == [span.context for span in processed]
    assert [span.links for span in sent] == [(), (), ()]


@fragment("consuming", "add_callback")
def test_a_callback_is_in_the_trace_that_it_was_added_in(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, code: str
) -> None:
    seen: list[Any] = []
    log = SimpleNamespace(info=lambda *_: seen.append(get_current_span()))
    producer = clients.producer()
    known = {"producer": producer, "tracer": recorder.tracer, "log": log}
    exec(code.replace("orders", topic), known)
    producer.flush()
    checkout = recorder.one("checkout")
    assert [span.get_span_context() for span in seen] == [checkout.context]
    assert recorder.one(f"send {topic}").parent == checkout.context


@fragment("README", "def handle")
def test_the_function_of_the_readme_records_the_exception(
    shop: Shop, recorder: Recorder, topic: str, code: str
) -> None:
    def ship(value: bytes) -> None:
        raise ValueError(value)

    known: dict[str, Any] = {"ship": ship}
    exec(code, known)
    for record in shop.consumer:
        with pytest.raises(ValueError, match="a lamp"):
            known["handle"](record)
        break
    span = recorder.one(f"process {topic}")
    assert (span.attributes or {})["error.type"] == "ValueError"


@fragment("troubleshooting", "in record.headers")
def test_what_a_message_carries_can_be_seen(
    shop: Shop, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.run(code, record=next(shop.consumer))
    assert capsys.readouterr().out.startswith("traceparent b'00-")


@fragment("troubleshooting", "del orders")
def test_a_kept_iterator_holds_the_last_span_until_it_is_dropped(
    shop: Shop, recorder: Recorder, code: str
) -> None:
    looped, dropped = code.split("del orders")
    seen: list[Any] = []
    watched = f"{looped}seen.append(get_current_span())\ndel orders{dropped}"
    shop.run(watched, seen=seen, get_current_span=get_current_span)
    assert [span.get_span_context() for span in seen] == [shop.shipped[0][1]]
    assert recorder.open() == []
    assert get_current_span() is trace.INVALID_SPAN


@fragment("settings", "def consume_hook")
def test_the_hooks_are_called(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str, code: str
) -> None:
    def instrumentor() -> Any:
        return SimpleNamespace(instrument=instrument)

    exec(code, {"KafkaPythonInstrumentor": instrumentor, "time": time})
    clients.send(b"a lamp")
    for _ in clients.finite(1):
        pass
    assert (recorder.one(f"send {topic}").attributes or {})["app.shop"] == "north"
    assert "app.age" in (recorder.one(f"process {topic}").attributes or {})


@fragment("settings", "suppress_instrumentation")
def test_what_is_suppressed_is_not_traced(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, code: str
) -> None:
    producer = clients.producer()
    exec(code.replace("heartbeats", topic), {"producer": producer})
    producer.flush()
    assert recorder.started == []


@fragment("migration", "KafkaInstrumentor")
def test_the_hooks_move_as_they_are(code: str) -> None:
    def produce_hook(span: Any, args: Any, kwargs: Any) -> None: ...
    def consume_hook(span: Any, record: Any, args: Any, kwargs: Any) -> None: ...

    exec(code, {"produce_hook": produce_hook, "consume_hook": consume_hook})
    instrumentor = KafkaPythonInstrumentor()
    try:
        assert instrumentor._telemetry is not None
        config = instrumentor._telemetry.config
        assert (config.produce_hook, config.consume_hook) == (
            produce_hook,
            consume_hook,
        )
    finally:
        instrumentor.uninstrument()


LOGGING = example("logs", "LoggingInstrumentor")
LOG_IN_LOOP = example("logs", "in consumer:") + "    break\n"
SEND = 'producer.send("orders", b"a lamp").get(30)\n'
SERVED = example("logs", "KafkaConsumer(") + SEND


@pytest.mark.parametrize(
    ("code", "says", "span"),
    [
        (LOG_IN_LOOP, "shipping a lamp", "process {topic}"),
        (example("logs", "add_callback"), "delivered at offset 1", "checkout"),
        (example("logs", "ThreadPoolExecutor"), "shipping a lamp", "process {topic}"),
    ],
    ids=["loop", "callback", "thread"],
)
def test_log_lines_have_the_trace_id(
    programs: Programs,
    receiver: OtlpProtoTestServer,
    topic: str,
    code: str,
    says: str,
    span: str,
) -> None:
    span = span.format(topic=topic)
    code = code.replace("timeout_ms=1000", f"timeout_ms={DEADLINE * 1000:.0f}")
    start = "import telemetry\ntelemetry.start()\n"
    programs.write(telemetry=TELEMETRY, app=start + LOGGING + SERVED + code)
    lines = programs.run(f"{sys.executable} app.py 2>&1").splitlines()
    (line,) = [line for line in lines if says in line]
    (trace_id,) = re.findall(r"trace_id=(\w{32})", line)
    assert spans_until(receiver, span)[span].span.trace_id.hex() == trace_id


LAUNCH_WITH_IDS = example("logs", "LOG_CORRELATION", "sh")


def test_log_lines_have_the_trace_id_under_the_launcher(
    programs: Programs, receiver: OtlpProtoTestServer, topic: str
) -> None:
    programs.write(app=SERVED + LOG_IN_LOOP)
    variables = LAUNCH_WITH_IDS
    logged = programs.run(f"{variables}{LAUNCH.strip()} 2>&1")
    assert "Traceback" not in logged
    (trace_id,) = re.findall(r"trace_id=(\w{32}) .* shipping a lamp", logged)
    process = f"process {topic}"
    span = spans_until(receiver, process)[process].span
    assert span.trace_id.hex() == trace_id


FRAMEWORKS = ("fastapi", "flask", "django")
TRACES_ONLY = example("web", "OTEL_METRICS_EXPORTER", "sh")
WORKER = example("web", "KafkaConsumer(")
START_WORKER = example("web", "python worker.py", "sh")
ORDER = example("web", "curl", "sh")


@pytest.mark.parametrize(
    ("module", "code", "command", "served"),
    [
        (module, example("web", f"from {module}"), example("web", start, "sh"), served)
        for module, start, served in zip(
            FRAMEWORKS,
            ("uvicorn web:app", "--app web", "django-admin"),
            ("POST /orders/{item}", "POST /orders/<item>", "POST orders/<item>"),
            strict=True,
        )
    ],
    ids=["FastAPI", "Flask", "Django"],
)
def test_a_request_its_message_and_the_worker_are_one_trace(
    programs: Programs,
    receiver: OtlpProtoTestServer,
    topic: str,
    module: str,
    code: str,
    command: str,
    served: str,
) -> None:
    pytest.importorskip(module)
    # A group of its own: a worker that is stopped does not leave its group.
    worker = WORKER.replace('"shipping"', f'"{topic}"')
    programs.write(web=code, worker=worker)
    (port,) = free_ports(1)
    # Uvicorn kills a worker that does not answer in five seconds, however busy this is.
    programs.environ["UVICORN_TIMEOUT_WORKER_HEALTHCHECK"] = "60"
    launch = f"{TRACES_ONLY}{command}".replace("8000", str(port)).replace("\n", " ")
    launch = launch.replace("export ", "env ")
    (url,) = re.findall(r"http://\S+", ORDER)
    with programs.running(launch):
        request = urllib.request.Request(url.replace("8000", str(port)), method="POST")
        assert b'"ordered"' in ask(request)
        with programs.running(f"env {START_WORKER}"):
            spans = spans_until(receiver, served, f"send {topic}", f"process {topic}")
    chain = [spans[name] for name in (served, f"send {topic}", f"process {topic}")]
    assert [each.span.parent_span_id for each in chain] == [
        b"",
        *[each.span.span_id for each in chain[:2]],
    ]
    assert [services([each]) for each in chain] == [{"web"}, {"web"}, {"worker"}]


def test_setups_start_uvicorns_workers_as_the_guide_does() -> None:
    command = "opentelemetry-instrument uvicorn web:app --workers 2"
    assert f"`{command}`" in PAGES["setups"]
    assert command in PAGES["web"]


SAMPLER = example("sampling", "OTEL_TRACES_SAMPLER", "sh")


@pytest.mark.parametrize("ratio", [0, 1])
def test_a_sampler_keeps_a_fraction_of_traces_and_all_metrics(
    programs: Programs, receiver: OtlpProtoTestServer, topic: str, ratio: int
) -> None:
    programs.write(app=UNTIL_SHIPPED)
    programs.run(SAMPLER.replace("0.01", str(ratio)) + LAUNCH)
    spans = {each.span.name for each in receiver.drain_spans()}
    assert spans == ({f"send {topic}", f"process {topic}"} if ratio else set())
    measured = {each.metric.name for each in receiver.drain_metrics()}
    assert "messaging.client.sent.messages" in measured


ZIPKIN = example("see-traces", "peer.service", "yaml")


@pytest.mark.parametrize(
    "code",
    [example("sampling", "tail_sampling", "yaml"), ZIPKIN],
    ids=["sampling", "Zipkin"],
)
def test_the_collector_uses_what_it_configures(code: str) -> None:
    config = yaml.safe_load(code)
    (pipeline,) = config["service"]["pipelines"].values()
    assert {kind: set(parts) for kind, parts in pipeline.items()} == {
        kind: set(config[kind]) for kind in pipeline
    }


def test_the_example_of_a_collector_has_the_processor_for_zipkin() -> None:
    ours = yaml.safe_load((ROOT / "examples" / "collector.yaml").read_text())
    for kind, name in (("processors", "attributes/zipkin"), ("exporters", "zipkin")):
        assert ours[kind][name] == yaml.safe_load(ZIPKIN)[kind][name]


SEND_TEN = example("bottlenecks", "KafkaProducer(")
SLOW = example("bottlenecks", "time.sleep")
START_SLOW = example("bottlenecks", "CLIENT_METRICS", "sh")
START_SEND = example("bottlenecks", "python shop.py", "sh")
SLOW_TRACE = example("bottlenecks", "process orders", "text")


ROWS = table("bottlenecks", "2. Compare all messages")
DASHBOARD = json.loads((ROOT / "examples" / "grafana-dashboard.json").read_text())
PROMETHEUS = example("alerts", "rule_files", "yaml")
LAG = example("alerts", "max by", "promql")
FAILED = example("alerts", "offset", "promql")


def test_prometheus_scrapes_what_the_collector_serves_and_has_the_rules() -> None:
    config = yaml.safe_load(PROMETHEUS)
    collector = yaml.safe_load((ROOT / "examples" / "collector.yaml").read_text())
    ((target,),) = (
        each["targets"]
        for scrape in config["scrape_configs"]
        for each in scrape["static_configs"]
    )
    assert target == collector["exporters"]["prometheus"]["endpoint"]
    for name in config["rule_files"]:
        assert (ROOT / "examples" / name).exists()


def test_the_alerts_and_queries_of_the_guide_are_those_of_the_examples() -> None:
    rules = yaml.safe_load((ROOT / "examples" / "prometheus-rules.yaml").read_text())
    (group,) = rules["groups"]
    expressions = {rule["alert"]: rule["expr"] for rule in group["rules"]}
    rows = table("alerts", "The alerts")
    assert [code_in(alert)[0] for alert, *_ in rows] == list(expressions)
    assert " ".join(FAILED.split()) in expressions["KafkaProcessingFails"]
    shown = [each["expr"] for p in DASHBOARD["panels"] for each in p["targets"]]
    assert LAG.strip() in shown


def test_the_panels_that_are_named_exist() -> None:
    titles = {panel["title"].partition(" (")[0] for panel in DASHBOARD["panels"]}
    assert {panel for *_, panel in ROWS} <= titles


def attribute(span: Any, key: str) -> Any:
    (found,) = [each.value for each in span.attributes if each.key == key]
    return found


def test_a_slow_workers_orders_are_seen_to_wait(
    programs: Programs, receiver: OtlpProtoTestServer, topic: str
) -> None:
    programs.write(shop=SEND_TEN, worker=SLOW.replace('"warehouse"', f'"{topic}"'))
    programs.environ["OTEL_METRIC_EXPORT_INTERVAL"] = "100"
    *settings, start = START_SLOW.splitlines()
    variables = [line.removeprefix("export ") for line in settings]
    awaited = {
        *(code_in(metric)[0] for metric, *_ in ROWS),
        "kafka.consumer.records_lag",
    }
    with programs.running(" ".join(["env", *variables, start])):
        programs.run(START_SEND)
        spans = receiver.get_spans(20, DEADLINE)
        measured: set[str] = set()
        while not measured >= awaited:
            measured.add(receiver.get_metric(DEADLINE).metric.name)
    sent, processed = (
        [each.span for each in spans if each.span.name == f"{name} {topic}"]
        for name in ("send", "process")
    )
    assert len(sent) == len(processed) == 10
    waited = [attribute(span, "kafka.record.queue_time_ms") for span in processed]
    assert all(value.HasField("int_value") for value in waited)
    # Each order waits for the work on those before it.
    assert all(
        earlier.end_time_unix_nano <= later.start_time_unix_nano
        for earlier, later in pairwise(processed)
    )
    assert re.findall(r"^(\w+) +(\w+) orders", SLOW_TRACE, re.MULTILINE) == [
        ("shop", "send"),
        ("worker", "process"),
    ]


SEE_TRACES = example("see-traces", "python app.py", "sh")


def test_traces_go_to_a_backend_on_this_machine(
    programs: Programs, receiver: OtlpProtoTestServer, topic: str
) -> None:
    programs.write(app=UNTIL_SHIPPED)
    command = SEE_TRACES
    assert ":4318" in command
    programs.run(command.replace(":4318", f":{receiver.port}"))
    assert names(receiver.get_spans(2, DEADLINE)) == [
        f"process {topic}",
        f"send {topic}",
    ]


Measured = Callable[[str], dict[str, set[str]]]


@pytest.fixture
def measured(instrument: Instrument, clients: Clients) -> Measured:
    """The metrics and their attributes, as the provider of a block collects them."""

    def run(code: str) -> dict[str, set[str]]:
        reader = InMemoryMetricReader()
        known: dict[str, Any] = {"reader": reader}
        exec(code.replace("MeterProvider(", "MeterProvider([reader], "), known)
        instrument(meter_provider=known["meter_provider"], client_metrics=True)
        clients.send(b"a lamp")
        for _ in clients.finite(1, group_id=str(uuid.uuid4())):
            pass
        data = reader.get_metrics_data()
        known["meter_provider"].shutdown()
        KafkaPythonInstrumentor().uninstrument()
        assert data is not None
        return {
            metric.name: {
                name
                for point in metric.data.data_points
                for name in point.attributes or {}
            }
            for scope in data.resource_metrics[0].scope_metrics
            for metric in scope.metrics
        }

    return run


PLAIN = """
from opentelemetry.sdk.metrics import MeterProvider
meter_provider = MeterProvider()
"""


@pytest.mark.parametrize(
    ("code", "dropped"),
    [
        (
            example("metrics", "without_partition"),
            {"messaging.destination.partition.id"},
        ),
        (example("metrics", "without_server"), {"server.address", "server.port"}),
    ],
    ids=["partition", "server"],
)
def test_a_view_drops_an_attribute_and_no_other(
    measured: Measured, code: str, dropped: set[str]
) -> None:
    plain, kept = (
        {name: each for name, each in found.items() if name.startswith("messaging.")}
        for found in (measured(PLAIN), measured(code))
    )
    assert len(plain) == 4
    assert kept == {name: attributes - dropped for name, attributes in plain.items()}


@fragment("metrics", "DropAggregation")
def test_a_view_drops_metrics_of_the_client(measured: Measured, code: str) -> None:
    plain, kept = measured(PLAIN), measured(code)
    assert any(re.fullmatch(r"kafka\..*_rate", name) for name in plain)
    assert not any(re.fullmatch(r"kafka\..*_rate", name) for name in kept)
    assert any(name.startswith("kafka.") for name in kept)


# How slow pipelines are found.

LATENCY = example("latency", "PIPELINE_LATENCY", "sh")
QUERY = example("latency", "histogram_quantile", "")


def test_the_line_turns_the_latency_of_pipelines_on() -> None:
    (assignment,) = re.findall(r"^export (.+)$", LATENCY, re.MULTILINE)
    assert _config.load({}, dict([assignment.split("=")])).pipeline_latency


def test_the_query_groups_by_the_attributes_of_the_table() -> None:
    attributes = [
        code_in(name)[0] for name, _ in table("latency", "Measure the latency")
    ]
    grouped = re.search(r"by \(le, (.+?)\)", QUERY, re.DOTALL)
    assert grouped is not None
    assert re.split(r",\s+", grouped[1]) == [
        attribute.replace(".", "_") for attribute in attributes
    ]
    metric = _semconv.KAFKA_PIPELINE_LATENCY.replace(".", "_")
    assert f"({metric}_seconds_bucket[" in QUERY


def test_the_parts_of_a_hop_are_those_of_the_dashboard() -> None:
    (panel,) = (p for p in DASHBOARD["panels"] if "Share of each hop" in p["title"])
    rows = table("latency", "The share of each hop")
    for (part, shown), target in zip(rows, panel["targets"], strict=True):
        assert target["legendFormat"].endswith(f" {part}")
        *_, metric = code_in(shown)
        assert f"{metric.replace('.', '_')}_seconds_sum" in target["expr"]


@fragment("latency", "call_third_party")
def test_no_baggage_leaves_for_a_third_party(code: str) -> None:
    left: list[Any] = []
    token = context.attach(baggage.set_baggage("kafka.pipeline", "1-orders"))
    try:
        exec(code, {"call_third_party": lambda: left.append(dict(baggage.get_all()))})
    finally:
        context.detach(token)
    assert left == [{}]


# What is not run as it stands: it would install from a registry, or take too long.


@pytest.mark.parametrize(
    "line",
    [
        *(example(page, "pip install", "sh") for page in ("logs", "threads")),
        *(example("web", f"pip install {name}", "sh") for name in FRAMEWORKS),
    ],
    ids=["logs", "threads", *FRAMEWORKS],
)
def test_what_is_to_be_installed_exists(line: str) -> None:
    for name in shlex.split(line)[2:]:
        assert distribution(name).version


README_LINES = {
    line: example("README", line, "sh")
    for line in ("tox -q -e demo", "tox -q -e tests")
}


@pytest.mark.parametrize("line", README_LINES)
def test_ci_runs_the_readmes_lines(line: str) -> None:
    assert README_LINES[line].count("\n") == 1
    assert f"grep -m 1 -- '{line}' README.md" in (ROOT / ".ci" / "run").read_text()


_taken.update(block for block in BLOCKS if block.code.startswith("tox -e "))


def test_every_environment_of_tox_that_is_named_exists() -> None:
    named = set(re.findall(r"tox (?:-q )?-e (\w+)", "".join(PAGES.values())))
    sections = (ROOT / "tox.ini").read_text()
    assert named >= {"demo", "tests", "bench"}
    assert [name for name in named if f"[testenv:{name}]" not in sections] == []


def test_every_variable_that_is_named_exists() -> None:
    known = {f"{_config._VARIABLE_PREFIX}{name.upper()}" for name in _config._PARSERS}
    known.add(_config._EXCEPTION_SIGNAL_VARIABLE)
    for module in (
        opentelemetry.environment_variables,
        opentelemetry.instrumentation.environment_variables,
        opentelemetry.instrumentation.logging.environment_variables,
        opentelemetry.sdk.environment_variables,
    ):
        known |= {name for name in vars(module) if name.startswith("OTEL_")}
    named = set(re.findall(r"OTEL_\w+[A-Z]\b", "".join(PAGES.values())))
    assert named - known == set()


def test_every_block_is_run() -> None:
    assert [block for block in BLOCKS if block not in _taken] == []
