"""Scripts in processes of their own: what ends, forks, or is launched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

HERE = Path(__file__).parent
PATHS = (HERE, HERE.parent / "examples")
TIMEOUT = 300

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

# A recorder that tells, after everything else has run, what it has seen. The
# handler is registered first, so that it runs last.
PREAMBLE = """
import atexit, json, os, sys
from recorder import Log, Recorder
recorder = Recorder()
log = Log().__enter__()
def tell():
    recorder.check()
    print(json.dumps({
        "open": recorder.open(),
        "ended": [
            [span.name, span.status.status_code.name, span.attributes.get("error.type")]
            for span in recorder.ended
        ],
        "sent": {
            point.attributes.get("error.type"): point.value
            for point in recorder.points("messaging.client.sent.messages")
        },
        "logged": log.take(),
    }), flush=True)
atexit.register(tell)
from otel_kafka_python import KafkaPythonInstrumentor
KafkaPythonInstrumentor().instrument(
    tracer_provider=recorder.tracer_provider, meter_provider=recorder.meter_provider
)
from kafka import KafkaConsumer, KafkaProducer
"""


def run(
    script: str,
    *arguments: str,
    launched: bool = False,
    options: tuple[str, ...] = (),
    paths: tuple[Path, ...] = (),
    environ: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end and return what it printed."""
    command = [sys.executable, *options, "-c", textwrap.dedent(script), *arguments]
    if launched:
        launcher = Path(sysconfig.get_path("scripts")) / "opentelemetry-instrument"
        command = [str(launcher), *command]
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join((*map(str, (*paths, *PATHS)), *inherited)),
            **(environ or {}),
        },
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # it tells where each of its threads is
        output, errors = process.communicate(timeout=TIMEOUT)
        pytest.fail(f"it did not end\n{output}\n{errors}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def run_recorded(
    script: str,
    *arguments: str,
    first: str = "",
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a script under a recorder and return what that has seen at the exit.

    Args:
        script: The script.
        arguments: Its arguments.
        first: What is to run before anything is imported.
        environ: More environment variables.
    """
    script = first + PREAMBLE + textwrap.dedent(script)
    done = run(script, *arguments, environ=environ)
    assert done.returncode == 0, done.stderr
    *children, told = map(json.loads, done.stdout.splitlines())
    told["stderr"] = done.stderr
    # The processes that it has forked, if these have ended before it.
    told["children"] = children
    return cast("dict[str, Any]", told)
