"""A program for which every warning is an error, with every setting in turn."""

from __future__ import annotations

import pytest

from clients import Clients
from scripts import run

pytestmark = [pytest.mark.one_broker, pytest.mark.one_client]

PROGRAM = """
    import gc
    import sys
    import warnings

    # The client's own: it leaves sockets to the collector.
    warnings.filterwarnings("ignore", "unclosed.*socket", ResourceWarning)
    warnings.filterwarnings("ignore", module="kafka", category=DeprecationWarning)

    from kafka import KafkaConsumer, KafkaProducer

    from otel_kafka_python import KafkaPythonInstrumentor, _config, process_span
    from recorder import Recorder

    address, topic = sys.argv[1:]
    CHOICES = {"process_parent": ("message", "none"), "commit_spans": ("all", "none")}


    def value_of(name, on):
        if name.endswith("_hook"):
            return (lambda *arguments: None) if on else None
        if name in CHOICES:
            return CHOICES[name][0 if on else 1]
        if isinstance(getattr(_config.Config(), name), bool):
            return on
        return ["*", "!secret"] if name == "capture_headers" and on else "nothing-*"


    def use():
        sent = []
        with KafkaProducer(bootstrap_servers=address, linger_ms=5) as producer:
            for number in range(6):
                sent.append(
                    producer.send(
                        topic, b"value", key=b"key", headers=[("tenant", b"7")]
                    ).add_callback(lambda metadata: None)
                )
            producer.flush()
        consumer = KafkaConsumer(
            topic,
            bootstrap_servers=address,
            group_id=topic,
            auto_offset_reset="earliest",
            consumer_timeout_ms=30_000,
            max_poll_records=2,
        )
        for record in consumer:
            with process_span(record, consumer=consumer):
                break
        try:
            for record in consumer:
                raise ValueError("no such lamp")
        except ValueError:
            pass
        next(consumer)
        consumer.commit()
        consumer.commit_async().succeeded()
        for records in consumer.poll(timeout_ms=30_000).values():
            with process_span(records):
                list(records)
            for record in records:
                pass
        consumer.close()
        with KafkaProducer(
            bootstrap_servers=address, transactional_id=topic
        ) as producer:
            producer.init_transactions()
            producer.begin_transaction()
            producer.send(topic, b"value")
            producer.commit_transaction()


    for on in (True, False):
        recorder = Recorder()
        instrumentor = KafkaPythonInstrumentor()
        instrumentor.instrument(
            tracer_provider=recorder.tracer_provider,
            meter_provider=recorder.meter_provider,
            **{name: value_of(name, on) for name in _config._PARSERS},
        )
        use()
        measured = bool(recorder.points("kafka.record.queue_time"))
        names = {span.name.partition(" ")[0] for span in recorder.ended}
        print(*sorted(names), measured, recorder.open())
        instrumentor.uninstrument()
        gc.collect()
"""


def test_no_setting_has_anything_warn(clients: Clients) -> None:
    options = ["-X", "dev", "-W", "error"]
    # kafka-python 3 reads its schemas so, which Python 3.11 and 3.12 deprecate.
    for name in ("read_text", "open_text"):
        options += ["-W", f"ignore:{name} is deprecated:DeprecationWarning"]
    done = run(PROGRAM, clients.address, clients.topic, options=tuple(options))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "commit commit_transaction poll process send True []",
        "False []",
    ]
