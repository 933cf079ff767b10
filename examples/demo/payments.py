"""Charges orders in a loop and sends the paid ones on; it is slow on purpose."""

import contextlib
import json
import os
import sys
import time
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from ready import Ready

SECONDS_PER_PAYMENT = 0.08
CREDIT = 1000


class CardDeclinedError(Exception):
    """The bank does not pay."""


def charge(order: dict[str, Any]) -> None:
    time.sleep(SECONDS_PER_PAYMENT)  # the bank takes its time
    if order["price"] > CREDIT:
        raise CardDeclinedError(f"the card does not cover {order['price']} euros")


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
    while True:
        try:
            for record in consumer:
                order = record.value
                charge(order)
                producer.send("payments", {**order, "paid": True}, key=record.key)
                producer.flush()
        except CardDeclinedError as error:
            print(f"an order is not paid: {error}", file=sys.stderr)
producer.close()
consumer.close()
