"""A FastAPI service that produces in a request and consumes in a thread.

    uvicorn --app-dir examples fastapi_service:app

Then run `curl -X POST localhost:8000/orders/lamp` in another terminal. The request, the
message and its processing in the thread are one trace.
"""

import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from kafka import KafkaConsumer, KafkaProducer
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from show_spans import show_spans

from otel_kafka_python import KafkaPythonInstrumentor

BROKER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")

show_spans()
KafkaPythonInstrumentor().instrument()

log = logging.getLogger("uvicorn.error")  # which uvicorn shows
producer = KafkaProducer(bootstrap_servers=BROKER)
stopping = threading.Event()


def ship() -> None:
    """Process orders until the service stops; a consumer belongs to one thread."""
    consumer = KafkaConsumer(
        "fastapi-service",
        bootstrap_servers=BROKER,
        group_id="shipping",
        auto_offset_reset="earliest",
    )
    while not stopping.is_set():
        for records in consumer.poll(timeout_ms=500).values():
            for record in records:
                log.info("shipping %s", record.value.decode())
    consumer.close()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Run the consumer's thread as long as the service."""
    shipping = threading.Thread(target=ship)
    shipping.start()
    yield
    stopping.set()
    shipping.join()
    producer.close()


app = FastAPI(lifespan=lifespan)
FastAPIInstrumentor.instrument_app(app, exclude_spans=["receive", "send"])


@app.post("/orders/{item}")
def take_order(item: str) -> dict[str, int]:
    """Answer when the broker has the order. It blocks, so it is not a coroutine."""
    metadata = producer.send("fastapi-service", item.encode()).get(timeout=30)
    return {"number": metadata.offset}
