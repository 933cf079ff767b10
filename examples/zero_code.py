r"""An application without telemetry code, traced by the launcher.

    opentelemetry-instrument --service_name shop --traces_exporter console \
        --metrics_exporter none --logs_exporter none python examples/zero_code.py

prints the send span and the process span, which are in the same trace. Without the
options, traces and metrics go to localhost:4317 by OTLP, or to the endpoint that
OpenTelemetry's variables name.
"""

import os
from itertools import islice

from kafka import KafkaConsumer, KafkaProducer

BROKER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")

producer = KafkaProducer(bootstrap_servers=BROKER)
producer.send("zero-code", b"a lamp", key=b"1001")
producer.close()

consumer = KafkaConsumer(
    "zero-code",
    bootstrap_servers=BROKER,
    group_id="shipping",
    auto_offset_reset="earliest",
)
for record in islice(consumer, 1):  # a service would continue
    print("shipping", record.value.decode())
consumer.close()
