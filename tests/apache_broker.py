"""Apache Kafka: Maven gets it, Java 17 runs it."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from embedded_broker import POLL_INTERVAL, START_TIMEOUT, STOP_TIMEOUT, die_with_parent

KAFKA_VERSION = "4.1.1"
OLDEST_JAVA = 17
ATTEMPTS = 3

POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>otel-kafka-python</groupId>
  <artifactId>broker</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>{KAFKA_VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId>
      <artifactId>slf4j-simple</artifactId>
      <version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
num.partitions=1
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
"""


def why_unavailable() -> str | None:
    """What is missing to run Apache Kafka, or None if nothing is."""
    java, maven = shutil.which("java"), shutil.which("mvn")
    if java is None or maven is None:
        return "Java 17 and Maven are not installed"
    printed = subprocess.run(
        [java, "-version"], capture_output=True, text=True, check=False
    ).stderr
    found = re.search(r'version "(\d+)', printed)
    if found is None or int(found[1]) < OLDEST_JAVA:
        return f"Java is older than {OLDEST_JAVA}: {printed.splitlines()[:1]}"
    return None


def cache() -> Path:
    """The directory where what is fetched for the tests is kept."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = user / "otel-kafka-python"
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def libraries() -> Path:
    """The directory with Kafka's jars, which Maven fills the first time."""
    jars = cache() / f"kafka-{KAFKA_VERSION}"
    if not jars.is_dir():
        with tempfile.TemporaryDirectory(dir=jars.parent) as scratch:
            pom = Path(scratch) / "pom.xml"
            pom.write_text(POM)
            output = Path(scratch) / "jars"
            command = ["mvn", "-q", "-B", "-f", str(pom)]
            command += ["dependency:copy-dependencies", f"-DoutputDirectory={output}"]
            subprocess.run(command, check=True, timeout=600)
            try:
                output.rename(jars)
            except OSError:  # another run was faster
                if not jars.is_dir():
                    raise
    return jars


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that are free at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class ApacheBroker:
    """One broker that is its own controller; a context manager."""

    def __init__(self) -> None:
        self.address = ""
        self._directory = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        reason = why_unavailable()
        if reason is not None:
            raise RuntimeError(f"Apache Kafka cannot be run: {reason}")
        for _ in range(ATTEMPTS):
            self._directory = Path(tempfile.mkdtemp(prefix="apache-kafka-"))
            if self._try_to_start(*free_ports(2)):
                return
            log = (self._directory / "log").read_text()
            self.stop()
        raise RuntimeError(f"Apache Kafka did not start:\n{log}")

    def _try_to_start(self, port: int, controller: int) -> bool:
        properties = self._directory / "server.properties"
        properties.write_text(
            PROPERTIES.format(
                port=port, controller=controller, data=self._directory / "data"
            )
        )
        java = ["java", "-cp", f"{libraries()}/*"]
        # It must not begin with a dash, which would make it an option.
        cluster = b"\0" + uuid.uuid4().bytes[1:]
        cluster_id = base64.urlsafe_b64encode(cluster)[:22].decode()
        subprocess.run(
            [
                *java,
                "kafka.tools.StorageTool",
                "format",
                *("-t", cluster_id, "-c", str(properties)),
            ],
            check=True,
            capture_output=True,
        )
        options = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        options += ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [java[0], *options, *java[1:], "kafka.Kafka", str(properties)],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 0.1).close()
            except OSError:
                time.sleep(POLL_INTERVAL)
                continue
            self.address = f"127.0.0.1:{port}"
            return True
        return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> ApacheBroker:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
