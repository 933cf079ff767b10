"""Apache Kafka over TLS, for users who log in: no secret is told, the rest as ever."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    KafkaAdminClient,
    ResourcePattern,
    ResourceType,
)
from kafka.errors import (
    GroupAuthorizationFailedError,
    TopicAuthorizationFailedError,
)
from opentelemetry.trace import StatusCode

from apache_broker import ApacheBroker
from clients import DEADLINE, Clients, poll
from conftest import Instrument
from deliveries import assert_failed
from otel_kafka_python import KafkaPythonInstrumentor
from recorder import Recorder, attributes_of
from scripts import run

pytestmark = pytest.mark.two_clients

# Whoever has no ACL may do nothing, except for the administrator.
USERS = {"admin": "administers-4711", "orders": "sends-orders-4712"}
KEY_PASSWORD = "opens-the-key-4713"

PROPERTIES = """\
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:admin;User:ANONYMOUS
sasl.enabled.mechanisms=SCRAM-SHA-256
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-256
listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config=\\
    org.apache.kafka.common.security.scram.ScramLoginModule required \\
    username=admin password={password};
ssl.client.auth=required
ssl.keystore.type=PEM
ssl.keystore.location={keystore}
ssl.truststore.type=PEM
ssl.truststore.location={truststore}
"""


def key_pem(certificate: trustme.LeafCert, how: KeySerializationEncryption) -> bytes:
    """Its private key in the one form that Java reads."""
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with those of an authority, of the broker and of its clients."""
    directory = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "authority.pem"))
    broker, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client")
    chain = [key_pem(broker, NoEncryption())]
    chain += [pem.bytes() for pem in broker.cert_chain_pems]
    (directory / "broker.pem").write_bytes(b"".join(chain))
    (certificate,) = client.cert_chain_pems
    certificate.write_to_path(str(directory / "client.pem"))
    encryption = BestAvailableEncryption(KEY_PASSWORD.encode())
    (directory / "client.key").write_bytes(key_pem(client, encryption))
    return directory


@pytest.fixture(scope="module")
def secure_broker(runs_apache: None, certificates: Path) -> Iterator[ApacheBroker]:
    properties = PROPERTIES.format(
        password=USERS["admin"],
        keystore=certificates / "broker.pem",
        truststore=certificates / "authority.pem",
    )
    broker = ApacheBroker(protocol="SASL_SSL", properties=properties, users=USERS)
    with broker:
        yield broker


@pytest.fixture
def admin(certificates: Path) -> dict[str, Any]:
    """The configuration of clients of the administrator."""
    return {
        "security_protocol": "SASL_SSL",
        "ssl_cafile": str(certificates / "authority.pem"),
        "ssl_certfile": str(certificates / "client.pem"),
        "ssl_keyfile": str(certificates / "client.key"),
        "ssl_password": KEY_PASSWORD,
        "sasl_mechanism": "SCRAM-SHA-256",
        "sasl_plain_username": "admin",
        "sasl_plain_password": USERS["admin"],
    }


@pytest.fixture
def secure(
    secure_broker: ApacheBroker, admin: dict[str, Any], topic: str
) -> Iterator[Clients]:
    """Clients of the administrator."""
    made = Clients(secure_broker.address, topic, **admin)
    yield made
    made.close()


@pytest.fixture
def refused(
    secure_broker: ApacheBroker, admin: dict[str, Any], topic: str
) -> Iterator[Clients]:
    """Clients of a user who has no ACL yet."""
    user = {"sasl_plain_username": "orders", "sasl_plain_password": USERS["orders"]}
    made = Clients(secure_broker.address, topic, **{**admin, **user})
    yield made
    made.close()


def work(clients: Clients) -> None:
    """Send, consume, commit, and send in a transaction."""
    producer = clients.producer(client_id="orders")
    for _ in range(2):
        producer.send(clients.topic, b"value", key=b"key")
    producer.flush()
    for _ in clients.finite(1, client_id="reader"):
        pass
    member = clients.consumer(client_id="member", group_id=clients.topic)
    poll(member)
    member.commit()
    producer = clients.producer(client_id="writer", transactional_id=clients.topic)
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(clients.topic, b"value")
    producer.commit_transaction()


def traced(instrument: Instrument, clients: Clients) -> list[str]:
    """What that work records, but for times, and for what is each broker's own."""
    recorder = Recorder()
    instrument(
        tracer_provider=recorder.tracer_provider,
        meter_provider=recorder.meter_provider,
    )
    work(clients)
    KafkaPythonInstrumentor().uninstrument()
    recorder.check()
    assert recorder.open() == []
    recorded: list[Any] = [
        [
            span.name,
            span.kind.name,
            span.status.status_code.name,
            span.parent is not None,
            dict(span.attributes or {}),
            attributes_of(span.links),
        ]
        for span in sorted(recorder.ended, key=lambda span: span.start_time or 0)
    ]
    recorded += [
        [metric.name, *attributes_of([point]), getattr(point, "value", None)]
        for metric in recorder.metrics()
        for point in metric.data.data_points
    ]
    text = json.dumps(recorded, sort_keys=True, indent=1)
    _, port = clients.address.split(":")
    cluster_id = (recorder.ended[0].attributes or {})["messaging.kafka.cluster.id"]
    for own, name in ((clients.topic, "TOPIC"), (port, "PORT"), (cluster_id, "ID")):
        assert str(own) in text
        text = text.replace(str(own), name)
    return text.splitlines()


def test_over_tls_and_sasl_all_is_recorded_as_on_plain_text(
    instrument: Instrument, clients: Clients, secure: Clients
) -> None:
    assert traced(instrument, secure) == traced(instrument, clients)


TELLING = """
    import gc, json, logging, os, sys
    logging.basicConfig(level=logging.NOTSET)
    from kafka import KafkaConsumer, KafkaProducer
    from kafka.errors import KafkaError
    address, topic = sys.argv[1:]
    config = json.loads(os.environ["CONFIG"])
    producer = KafkaProducer(bootstrap_servers=address, **config)
    producer.send(topic, b"value", key=b"key", headers=[("name", b"header")])
    producer.flush()
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=address,
        group_id=topic,
        auto_offset_reset="earliest",
        **config,
    )
    for record in consumer:
        assert record.value == b"value"
        break
    consumer.commit()
    # Who may not log in, and whose messages may not be sent.
    for name in {"bootstrap_timeout_ms", "max_block_ms"}:
        if name in KafkaProducer.DEFAULT_CONFIG:
            config[name] = 3000
    password = config["sasl_plain_password"]
    for number, mistaken in enumerate([
        {"sasl_plain_password": f"{password}-mistaken"},
        {"sasl_plain_username": "orders", "sasl_plain_password": os.environ["OTHER"]},
    ]):
        try:
            other = KafkaProducer(bootstrap_servers=address, **{**config, **mistaken})
            other.send(topic, b"value").get(30)
        except KafkaError as error:
            print("refused", number, repr(error))
    for thing in gc.get_objects():
        if str(type(thing)).startswith("<class 'otel_kafka_python"):
            print("repr", repr(thing))
    consumer.close()
"""


def test_no_secret_of_the_configuration_is_in_any_output(
    secure: Clients, admin: dict[str, Any]
) -> None:
    done = run(
        TELLING,
        secure.address,
        secure.topic,
        launched=True,
        environ={
            "CONFIG": json.dumps(admin),
            "OTHER": USERS["orders"],
            "OTEL_LOG_LEVEL": "debug",
            # It would export what kafka-python itself logs.
            "OTEL_PYTHON_LOG_AUTO_INSTRUMENTATION": "false",
            "OTEL_LOGS_EXPORTER": "console",
            "OTEL_METRICS_EXPORTER": "console",
            "OTEL_TRACES_EXPORTER": "console",
            "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN": "logs/dup",
            "OTEL_PYTHON_KAFKA_CAPTURE_HEADERS": "*",
            "OTEL_PYTHON_KAFKA_CAPTURE_MESSAGE_SIZE": "true",
            "OTEL_PYTHON_KAFKA_CAPTURE_QUEUE_TIME": "true",
            "OTEL_PYTHON_KAFKA_CLIENT_METRICS": "true",
        },
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    # It has told of all that it did.
    for told in (
        f'"name": "send {secure.topic}"',
        f'"name": "commit {secure.topic}"',
        '"name": "messaging.client.sent.messages"',
        '"error.type": "TOPIC_AUTHORIZATION_FAILED"',
        '"event_name": "messaging.send.exception"',
        "refused 0",
        "refused 1",
        "repr <otel_kafka_python._clients.Client object",
        "repr Config(",
    ):
        assert told in output
    for secret in (*USERS.values(), KEY_PASSWORD):
        assert secret not in output
    # kafka-python itself logs this on the way to stderr.
    assert admin["ssl_keyfile"] not in done.stdout


def allow(clients: Clients, kind: ResourceType, operation: ACLOperation) -> None:
    """Have the administrator allow this to the user, on what has the test's name."""
    admin = KafkaAdminClient(**clients.config)
    resource = ResourcePattern(kind, clients.topic)
    allowed = ACLPermissionType.ALLOW
    admin.create_acls([ACL("User:orders", "*", operation, allowed, resource)])
    admin.close()


def error_type(thing: Any) -> str | None:
    """Of a span or a data point, None if it tells of no failure."""
    return cast("str | None", thing.attributes.get("error.type"))


def test_what_is_not_authorized_fails_and_says_so_until_it_is_allowed(
    instrumented: None,
    secure: Clients,
    refused: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    secure.create_topic(1)
    producer = refused.producer(enable_idempotence=False)

    def send() -> Any:
        future = producer.send(topic, b"value")
        producer.flush()
        return future

    futures = [send()]
    allow(secure, ResourceType.TOPIC, ACLOperation.ALL)
    deadline = time.monotonic() + DEADLINE
    while futures[-1].failed() and time.monotonic() < deadline:
        futures.append(send())
    *failures, last = futures
    *failed, sent = recorder.named(f"send {topic}")
    for future, span in zip(failures, failed, strict=True):
        assert isinstance(future.exception, TopicAuthorizationFailedError)
        assert_failed(span, future.exception, "TOPIC_AUTHORIZATION_FAILED")
    assert sent.status.status_code is StatusCode.UNSET
    assert (sent.attributes or {})["messaging.kafka.offset"] == last.value.offset == 0
    # The client knows from the metadata, and sends none of the others.
    assert {
        error_type(point): point.value
        for point in recorder.points("messaging.client.sent.messages")
    } == {None: 1}

    member = refused.consumer(group_id=topic)
    with pytest.raises(GroupAuthorizationFailedError):
        poll(member)
    allow(secure, ResourceType.GROUP, ACLOperation.ALL)
    while True:
        try:
            poll(member)
        except GroupAuthorizationFailedError:
            assert time.monotonic() < deadline
        else:
            break
    member.commit()
    failed_polls = recorder.named("poll")
    assert {error_type(span) for span in failed_polls} == {"GROUP_AUTHORIZATION_FAILED"}
    for span in recorder.one(f"poll {topic}"), recorder.one(f"commit {topic}"):
        assert span.status.status_code is StatusCode.UNSET
    assert recorder.open() == []
