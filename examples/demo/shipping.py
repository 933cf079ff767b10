"""Takes batches of payments, writes each to a database, and commits."""

import contextlib
import json
import os
import sqlite3

from kafka import KafkaConsumer
from ready import Ready

database = sqlite3.connect(":memory:")
consumer = KafkaConsumer(
    bootstrap_servers=os.environ["BROKER"],
    client_id="shipping",
    group_id="shipping",
    auto_offset_reset="earliest",
    enable_auto_commit=False,
    value_deserializer=json.loads,
)
consumer.subscribe(["payments"], listener=Ready())

with contextlib.suppress(KeyboardInterrupt):
    cursor = database.cursor()
    cursor.execute("CREATE TABLE shipments (number TEXT, item TEXT)")
    while True:
        polled = consumer.poll(timeout_ms=200)
        for records in polled.values():
            for record in records:
                cursor.execute(
                    "INSERT INTO shipments VALUES (?, ?)",
                    (record.key.decode(), record.value["item"]),
                )
        if polled:
            database.commit()
            consumer.commit()
consumer.close()
