"""Traces and metrics exported to a Collector by OTLP.

    OTEL_SERVICE_NAME=shop python examples/otlp_collector.py

`examples/collector.yaml` configures the Collector. The exporters send to
http://localhost:4318, or to OTEL_EXPORTER_OTLP_ENDPOINT. The launcher
`opentelemetry-instrument` needs none of this code: see `zero_code.py`.
"""

import os
from itertools import islice

from kafka import KafkaConsumer, KafkaProducer
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from otel_kafka_python import KafkaPythonInstrumentor

BROKER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")

# Both export their remaining data at exit.
tracer_provider = TracerProvider()
tracer_provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(tracer_provider)
metrics.set_meter_provider(
    MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
)
KafkaPythonInstrumentor().instrument()

producer = KafkaProducer(bootstrap_servers=BROKER)
producer.send("otlp-collector", b"a lamp")
producer.close()

consumer = KafkaConsumer(
    "otlp-collector",
    bootstrap_servers=BROKER,
    group_id="shipping",
    auto_offset_reset="earliest",
)
for record in islice(consumer, 1):  # a service would continue
    print("shipping", record.value.decode())
consumer.close()
