"""Worker threads that process records, each in its own span; one record fails.

    python examples/worker_threads.py

A span is current in one thread only, so each worker opens its own with `process_span`.
"""

import os
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from show_spans import show_spans

from otel_kafka_python import KafkaPythonInstrumentor, process_span

BROKER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
ORDERS = [b"a lamp", b"a desk", b"a broken vase", b"a chair"]

show_spans()
KafkaPythonInstrumentor().instrument()

producer = KafkaProducer(bootstrap_servers=BROKER)
for order in ORDERS:
    producer.send("worker-threads", order)
producer.close()

consumer = KafkaConsumer(
    "worker-threads",
    bootstrap_servers=BROKER,
    group_id="shipping",
    auto_offset_reset="earliest",
    enable_auto_commit=False,
)


def ship(record: Any) -> None:
    """Process a record in a thread; its span records an exception."""
    with process_span(record, consumer):
        if b"broken" in record.value:
            raise ValueError(record.value.decode())


taken = 0
with ThreadPoolExecutor(max_workers=2) as workers:
    while taken < len(ORDERS):  # a service would continue
        for records in consumer.poll(timeout_ms=1000).values():
            # This comprehension hands the records on. A `for` statement over them
            # would be traced as their processing.
            shipped = [workers.submit(ship, record) for record in records]
            wait(shipped)
            for each in shipped:
                if error := each.exception():
                    print("not shipped:", error)
            taken += len(records)
        consumer.commit()
consumer.close()
