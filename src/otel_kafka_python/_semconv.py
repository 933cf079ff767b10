"""The names this package emits, and the release of the conventions they are from.

Stable attributes come from the installed `opentelemetry-semantic-conventions`. The
messaging attributes are still in development, and that package is released later than
the specification, so they are defined here. A test compares each of them with the facts
of the release.
"""

from typing import Final

from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.exception_attributes import (
    EXCEPTION_MESSAGE,
    EXCEPTION_STACKTRACE,
    EXCEPTION_TYPE,
)
from opentelemetry.semconv.attributes.network_attributes import (
    NETWORK_PEER_ADDRESS,
    NETWORK_PEER_PORT,
)
from opentelemetry.semconv.attributes.server_attributes import (
    SERVER_ADDRESS,
    SERVER_PORT,
)

__all__ = [
    "DURATION_BUCKETS",
    "ERROR_OTHER",
    "ERROR_TYPE",
    "EXCEPTION_MESSAGE",
    "EXCEPTION_STACKTRACE",
    "EXCEPTION_TYPE",
    "KAFKA_PIPELINE",
    "KAFKA_PIPELINE_LATENCY",
    "KAFKA_PIPELINE_SOURCE",
    "KAFKA_RECORD_QUEUE_TIME",
    "KAFKA_RECORD_QUEUE_TIME_MS",
    "MESSAGING_BATCH_MESSAGE_COUNT",
    "MESSAGING_CLIENT_CONSUMED_MESSAGES",
    "MESSAGING_CLIENT_ID",
    "MESSAGING_CLIENT_OPERATION_DURATION",
    "MESSAGING_CLIENT_SENT_MESSAGES",
    "MESSAGING_CONSUMER_GROUP_NAME",
    "MESSAGING_DESTINATION_NAME",
    "MESSAGING_DESTINATION_PARTITION_ID",
    "MESSAGING_HEADER_PREFIX",
    "MESSAGING_KAFKA_CLUSTER_ID",
    "MESSAGING_KAFKA_MESSAGE_KEY",
    "MESSAGING_KAFKA_MESSAGE_TOMBSTONE",
    "MESSAGING_KAFKA_OFFSET",
    "MESSAGING_MESSAGE_BODY_SIZE",
    "MESSAGING_OPERATION_NAME",
    "MESSAGING_OPERATION_TYPE",
    "MESSAGING_PROCESS_DURATION",
    "MESSAGING_SYSTEM",
    "NETWORK_PEER_ADDRESS",
    "NETWORK_PEER_PORT",
    "OUTCOME_UNKNOWN",
    "QUEUE_TIME_BUCKETS",
    "SCHEMA_URL",
    "SERVER_ADDRESS",
    "SERVER_PORT",
]

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

MESSAGING_BATCH_MESSAGE_COUNT: Final = "messaging.batch.message_count"
MESSAGING_CLIENT_ID: Final = "messaging.client.id"
MESSAGING_CONSUMER_GROUP_NAME: Final = "messaging.consumer.group.name"
MESSAGING_DESTINATION_NAME: Final = "messaging.destination.name"
MESSAGING_DESTINATION_PARTITION_ID: Final = "messaging.destination.partition.id"
MESSAGING_KAFKA_CLUSTER_ID: Final = "messaging.kafka.cluster.id"
MESSAGING_KAFKA_MESSAGE_KEY: Final = "messaging.kafka.message.key"
MESSAGING_KAFKA_MESSAGE_TOMBSTONE: Final = "messaging.kafka.message.tombstone"
MESSAGING_KAFKA_OFFSET: Final = "messaging.kafka.offset"
MESSAGING_MESSAGE_BODY_SIZE: Final = "messaging.message.body.size"
MESSAGING_OPERATION_NAME: Final = "messaging.operation.name"
MESSAGING_OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGING_SYSTEM: Final = "messaging.system"

MESSAGING_CLIENT_CONSUMED_MESSAGES: Final = "messaging.client.consumed.messages"
MESSAGING_CLIENT_OPERATION_DURATION: Final = "messaging.client.operation.duration"
MESSAGING_CLIENT_SENT_MESSAGES: Final = "messaging.client.sent.messages"
MESSAGING_PROCESS_DURATION: Final = "messaging.process.duration"

# The advised boundaries of both histograms, in seconds.
DURATION_BUCKETS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip

# Not in the conventions: the names are those of the Java agent.
MESSAGING_HEADER_PREFIX: Final = "messaging.header."
KAFKA_RECORD_QUEUE_TIME_MS: Final = "kafka.record.queue_time_ms"

# Our own, named after the attribute above. A queue can be milliseconds or days behind.
KAFKA_RECORD_QUEUE_TIME: Final = "kafka.record.queue_time"
QUEUE_TIME_BUCKETS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 300.0, 1800.0, 7200.0, 43200.0, 86400.0,
)  # fmt: skip

# Our own, too: the entry of the baggage that has the start of a pipeline, the histogram
# of the time since, and its attribute with the topic of the first send.
KAFKA_PIPELINE: Final = "kafka.pipeline"
KAFKA_PIPELINE_LATENCY: Final = "kafka.pipeline.latency"
KAFKA_PIPELINE_SOURCE: Final = "kafka.pipeline.source"

# The conventions' value of `error.type` for an unknown error.
ERROR_OTHER: Final = "_OTHER"

# Our own value of `error.type`: the future was dropped, or the interpreter exited,
# before the broker answered.
OUTCOME_UNKNOWN: Final = "outcome_unknown"
