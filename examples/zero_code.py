"""An application that knows nothing of telemetry, and is traced.

    opentelemetry-instrument --service_name shop --traces_exporter console \\
        --metrics_exporter none --logs_exporter none python examples/zero_code.py

prints the span of the send, and that of its processing in the same trace. Without the
options, traces and metrics go by OTLP to localhost:4317, or wherever the variables of
OpenTelemetry say.
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
for record in islice(consumer, 1):  # a service would go on
    print("shipping", record.value.decode())
consumer.close()
