"""A batch of records that is inserted in one span, which links to each record.

    python examples/batch_insert.py

The span of the insert is a child of the batch's span. The messages belong to several
traces, so the batch has a trace of its own.
"""

import os
import sqlite3

from kafka import KafkaConsumer, KafkaProducer
from opentelemetry.instrumentation.sqlite3 import SQLite3Instrumentor
from show_spans import show_spans

from otel_kafka_python import KafkaPythonInstrumentor, process_span

BROKER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
ORDERS = {b"1001": b"a lamp", b"1002": b"a desk", b"1003": b"a chair"}

show_spans()
KafkaPythonInstrumentor().instrument()
SQLite3Instrumentor().instrument()

producer = KafkaProducer(bootstrap_servers=BROKER)
for number, order in ORDERS.items():
    producer.send("batch-insert", order, key=number)
producer.close()

consumer = KafkaConsumer(
    "batch-insert",
    bootstrap_servers=BROKER,
    group_id="shipping",
    auto_offset_reset="earliest",
    enable_auto_commit=False,
)
database = sqlite3.connect(":memory:")
database.execute("CREATE TABLE orders (number TEXT, item TEXT)")
inserted = 0
while inserted < len(ORDERS):  # a service would continue
    polled = consumer.poll(timeout_ms=1000)
    if not polled:
        continue
    with process_span(polled, consumer):
        rows = [
            (record.key.decode(), record.value.decode())
            for records in polled.values()
            for record in records
        ]
        database.cursor().executemany("INSERT INTO orders VALUES (?, ?)", rows)
        database.commit()
    consumer.commit()
    inserted += len(rows)
consumer.close()
print(inserted, "rows")
