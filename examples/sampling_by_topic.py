"""A sampler that decides by topic.

    python examples/sampling_by_topic.py

Send spans have the topic from their start. Messages that a sampled trace sends stay in
it, whatever their topic. Unsampled messages are still measured and carry their context,
so consumers do not sample them either. With `excluded_topics`, they would be
neither measured nor carry a context.
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
    """Delegates the decision to one sampler per topic.

    Args:
        samplers: The samplers, by topic.
        default: The sampler for all other topics, and for spans without a topic.
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


# TraceIdRatioBased(0.1) instead of ALWAYS_OFF keeps a tenth.
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
for record in islice(consumer, 3):  # a service would continue
    is_sampled = trace.get_current_span().is_recording()
    print(record.value.decode(), "is" if is_sampled else "is not", "sampled")
consumer.close()
