"""A pipeline that reads one topic and writes to another, exactly once.

    python examples/exactly_once.py

The sent messages and the consumed offsets are committed together. The process span of a
record contains the whole transaction. If anything raises, the service ends. The next
service aborts the open transaction with `init_transactions`.
"""

import os
from itertools import islice

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata
from show_spans import show_spans

from otel_kafka_python import KafkaPythonInstrumentor

BROKER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
ORDERS = [b"a lamp", b"a desk"]

show_spans()
KafkaPythonInstrumentor().instrument()

shop = KafkaProducer(bootstrap_servers=BROKER)
for order in ORDERS:
    shop.send("exactly-once-orders", order)
shop.close()

producer = KafkaProducer(bootstrap_servers=BROKER, transactional_id="invoicing")
producer.init_transactions()
consumer = KafkaConsumer(
    "exactly-once-orders",
    bootstrap_servers=BROKER,
    group_id="invoicing",
    auto_offset_reset="earliest",
    enable_auto_commit=False,
    isolation_level="read_committed",
)
for record in islice(consumer, len(ORDERS)):  # a service would continue
    partition = TopicPartition(record.topic, record.partition)
    done = {partition: OffsetAndMetadata(record.offset + 1, "", -1)}
    producer.begin_transaction()
    producer.send("exactly-once-invoices", b"invoice for " + record.value)
    producer.send_offsets_to_transaction(done, "invoicing")
    producer.commit_transaction()
producer.close()
consumer.close()
