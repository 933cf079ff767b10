"""Sends many small orders; the sampler keeps a few of their traces."""

import json
import os

from kafka import KafkaProducer

producer = KafkaProducer(
    bootstrap_servers=os.environ["BROKER"],
    client_id="orders",
    value_serializer=lambda order: json.dumps(order).encode(),
    key_serializer=str.encode,
)
for number in range(int(os.environ["ORDERS"])):
    producer.send("orders", {"item": "postcard", "price": 2}, key=str(number))
producer.close()
