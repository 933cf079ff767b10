"""Apache Kafka: Maven gets it, Java 17 runs it."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from embedded_broker import POLL_INTERVAL, START_TIMEOUT, die_with_parent

if sys.platform != "win32":
    import fcntl

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
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka-tools</artifactId>
      <version>{KAFKA_VERSION}</version>
      <exclusions>
        <exclusion><groupId>*</groupId><artifactId>*</artifactId></exclusion>
      </exclusions>
    </dependency>
  </dependencies>
</project>
"""

PROPERTIES = """\
process.roles=broker,controller
node.id={number}
controller.quorum.voters={voters}
listeners={protocol}://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners={protocol}://127.0.0.1:{advertised}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT
inter.broker.listener.name={protocol}
log.dirs={data}
num.partitions=1
group.initial.rebalance.delay.ms=0
min.insync.replicas={majority}
offsets.topic.num.partitions=1
offsets.topic.replication.factor={count}
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor={count}
transaction.state.log.min.isr={majority}
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


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A directory of the cache, which is made the first time.

    Args:
        name: Its name there, with the version of what is in it.
        make: Makes a directory at a path.
    """
    kept = cache() / name
    with (cache() / f"{name}.lock").open("w") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)  # a run beside this one may be making it
        if not kept.is_dir():
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                output = Path(scratch) / name
                make(output)
                output.rename(kept)
    return kept


def libraries() -> Path:
    """The directory with Kafka's jars, which Maven fills the first time."""
    return made_once(f"kafka-with-tools-{KAFKA_VERSION}", _get_jars)


def _get_jars(output: Path) -> None:
    pom = output.with_name("pom.xml")
    pom.write_text(POM)
    command = ["mvn", "-q", "-B", "-f", str(pom)]
    command += ["dependency:copy-dependencies", f"-DoutputDirectory={output}"]
    subprocess.run(command, check=True, timeout=600)


def described_lags(address: str, group: str) -> dict[tuple[str, str], int]:
    """The lag of a group by topic and partition, as Kafka's own tool describes it."""
    command = ["java", "-cp", f"{libraries()}/*"]
    command += ["org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"]
    command += ["--bootstrap-server", address, "--describe", "--group", group]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    heading, *rows = (line.split() for line in printed.splitlines() if line.strip())
    described = [dict(zip(heading, row, strict=True)) for row in rows]
    return {(row["TOPIC"], row["PARTITION"]): int(row["LAG"]) for row in described}


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


class Node:
    """One of the brokers: a process, and what it has stored, which outlives that.

    Args:
        directory: Where its properties, its log and its data are.
        port: Where it listens.
    """

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self._directory / "log").read_text()

    def format(self, cluster_id: str, users: Mapping[str, str], text: str) -> None:
        """Write its properties and prepare its storage."""
        self._directory.mkdir()
        properties = self._directory / "server.properties"
        properties.write_text(text)
        command = ["java", "-cp", f"{libraries()}/*", "kafka.tools.StorageTool"]
        command += ["format", "-t", cluster_id, "-c", str(properties)]
        for name, password in users.items():
            scram = f"SCRAM-SHA-256=[name={name},password={password}]"
            command += ["--add-scram", scram]
        subprocess.run(command, check=True, capture_output=True)

    def start(self) -> None:
        """Start it, perhaps again, and wait until it listens."""
        self.launch()
        if not self.listens():
            raise RuntimeError(f"Apache Kafka did not start:\n{self.log}")

    def launch(self) -> None:
        """Start its process, and do not wait."""
        command = ["java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        command += ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        command += ["-cp", f"{libraries()}/*", "kafka.Kafka", "server.properties"]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._directory,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )

    def listens(self) -> bool:
        """Wait until it listens; whether it does."""
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.1).close()
            except OSError:
                time.sleep(POLL_INTERVAL)
            else:
                return True
        return False

    def freeze(self) -> None:
        """Have it neither run nor end: its connections stay, and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # until all its threads have

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash would, also if it is frozen or has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class ApacheBroker:
    """One broker or more, each of them a controller, too; a context manager.

    Args:
        count: How many brokers.
        advertised_port: The port that clients are told, if it is that of a proxy.
        protocol: How clients talk to it, PLAINTEXT or SASL_SSL.
        properties: More lines of each broker's properties.
        users: The passwords of those who can log in by SCRAM, by their names.
    """

    def __init__(
        self,
        count: int = 1,
        *,
        advertised_port: int | None = None,
        protocol: str = "PLAINTEXT",
        properties: str = "",
        users: Mapping[str, str] | None = None,
    ) -> None:
        self.nodes: list[Node] = []
        self._count = count
        self._advertised_port = advertised_port
        self._protocol = protocol
        self._properties = properties
        self._users = users or {}
        self._directory = Path()

    @property
    def address(self) -> str:
        return ",".join(node.address for node in self.nodes)

    def node_at(self, port: int) -> Node:
        (node,) = (node for node in self.nodes if node.port == port)
        return node

    def start(self) -> None:
        reason = why_unavailable()
        if reason is not None:
            raise RuntimeError(f"Apache Kafka cannot be run: {reason}")
        for _ in range(ATTEMPTS):
            self._make_nodes()
            for node in self.nodes:
                node.launch()
            if all(node.listens() for node in self.nodes):
                return
            log = "".join(node.log for node in self.nodes)
            self.stop()
        raise RuntimeError(f"Apache Kafka did not start:\n{log}")

    def _make_nodes(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="apache-kafka-"))
        # It must not begin with a dash, which would make it an option.
        cluster = b"\0" + uuid.uuid4().bytes[1:]
        cluster_id = base64.urlsafe_b64encode(cluster)[:22].decode()
        numbers = range(1, self._count + 1)
        ports = free_ports(2 * self._count)
        controllers = dict(zip(numbers, ports[self._count :], strict=True))
        voters = ",".join(f"{n}@127.0.0.1:{port}" for n, port in controllers.items())
        self.nodes = []
        for number, port in zip(numbers, ports, strict=False):
            node = Node(self._directory / str(number), port)
            node.format(
                cluster_id,
                self._users,
                PROPERTIES.format(
                    number=number,
                    voters=voters,
                    protocol=self._protocol,
                    port=port,
                    controller=controllers[number],
                    advertised=self._advertised_port or port,
                    data=self._directory / str(number) / "data",
                    count=self._count,
                    majority=self._count // 2 + 1,
                )
                + self._properties,
            )
            self.nodes.append(node)

    def stop(self) -> None:
        """End it; what it has stored is deleted, so there is nothing to save."""
        for node in self.nodes:
            node.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> ApacheBroker:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


if __name__ == "__main__":
    # For tests that run elsewhere: it lasts as long as its standard input.
    with ApacheBroker() as broker:
        print(broker.address, flush=True)
        sys.stdin.read()
