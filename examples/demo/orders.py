"""Sends the orders of one checkout; one is larger than the broker accepts."""

import json
import os
import sys

from kafka import KafkaProducer
from kafka.errors import KafkaError
from opentelemetry import trace

MEGABYTE = 1_000_000

producer = KafkaProducer(
    bootstrap_servers=os.environ["BROKER"],
    client_id="orders",
    max_request_size=10 * MEGABYTE,
    value_serializer=lambda order: json.dumps(order).encode(),
    key_serializer=str.encode,
)
ORDERS = {
    "1001": {"item": "lamp", "price": 59},
    "1002": {"item": "desk", "price": 249},
    "1003": {"item": "sofa", "price": 1899},
    "1004": {"item": "chair", "price": 119},
    "1005": {"item": "poster", "price": 9, "image": "x" * 3 * MEGABYTE},
}

# In a web service this would be the span of the request.
with trace.get_tracer("orders").start_as_current_span("checkout"):
    sent = {
        number: producer.send("orders", order, key=number)
        for number, order in ORDERS.items()
    }
    for number, future in sent.items():
        try:
            future.get(timeout=30)
        except KafkaError as error:
            print(f"order {number} was refused: {error}", file=sys.stderr)
producer.close()
