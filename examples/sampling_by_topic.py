"""A sampler that decides by the topic, which spans have from their start.

    python examples/sampling_by_topic.py

Messages that a sampled trace sends stay in it, whatever their topic. What is not
sampled is measured all the same, and carries its context, so that consumers do not
sample it either; `excluded_topics` would have neither.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import islice

from kafka import KafkaConsumer, KafkaProducer
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    ParentBased,
    Sampler,
    SamplingResult,
)
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes
from show_spans import show_spans

from otel_kafka_python import KafkaPythonInstrumentor

BROKER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")


class SamplerByTopic(Sampler):
    """Leaves the decision to a sampler for each topic.

    Args:
        samplers: By topic.
        default: For all other topics, and for spans that have nothing to do with one.
    """

    def __init__(self, samplers: Mapping[object, Sampler], default: Sampler) -> None:
        self._samplers = samplers
        self._default = default

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        topic = (attributes or {}).get("messaging.destination.name")
        sampler = self._samplers.get(topic, self._default)
        return sampler.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        return "SamplerByTopic"


# TraceIdRatioBased(0.1) instead of ALWAYS_OFF would keep a tenth.
by_topic = SamplerByTopic({"sampling-clicks": ALWAYS_OFF}, default=ALWAYS_ON)
show_spans(ParentBased(root=by_topic))
KafkaPythonInstrumentor().instrument()

producer = KafkaProducer(bootstrap_servers=BROKER)
producer.send("sampling-orders", b"a lamp")
producer.send("sampling-clicks", b"a click")
with trace.get_tracer("shop").start_as_current_span("checkout"):
    producer.send("sampling-clicks", b"a sale")
producer.close()

consumer = KafkaConsumer(
    "sampling-orders",
    "sampling-clicks",
    bootstrap_servers=BROKER,
    group_id="counting",
    auto_offset_reset="earliest",
)
for record in islice(consumer, 3):  # a service would go on
    is_sampled = trace.get_current_span().is_recording()
    print(record.value.decode(), "is" if is_sampled else "is not", "sampled")
consumer.close()
