"""Takes orders in a loop and sends on what is paid; it is slow on purpose."""

import contextlib
import json
import os
import time

from kafka import KafkaConsumer, KafkaProducer
from ready import Ready

SECONDS_PER_PAYMENT = 0.25

producer = KafkaProducer(
    bootstrap_servers=os.environ["BROKER"],
    client_id="payments",
    value_serializer=lambda order: json.dumps(order).encode(),
)
consumer = KafkaConsumer(
    bootstrap_servers=os.environ["BROKER"],
    client_id="payments",
    group_id="payments",
    auto_offset_reset="earliest",
    value_deserializer=json.loads,
)
consumer.subscribe(["orders"], listener=Ready())

with contextlib.suppress(KeyboardInterrupt):
    for record in consumer:
        order = record.value
        time.sleep(SECONDS_PER_PAYMENT)  # the bank takes its time
        producer.send("payments", {**order, "paid": True}, key=record.key)
        producer.flush()
producer.close()
consumer.close()
