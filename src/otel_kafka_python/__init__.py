"""OpenTelemetry instrumentation of kafka-python.

    from otel_kafka_python import KafkaPythonInstrumentor

    KafkaPythonInstrumentor().instrument()

or, with no change to the application, `opentelemetry-instrument python app.py`.

The modules, from the outside in; each imports only from those below it:

    _instrumentor   the instrumentor: keywords in, everything built, launcher hooks
    _patches        the list of what is patched; the only import of wrapt
    _producer       send spans, from the call to the broker's acknowledgement
    _consumer       poll, next and iteration: receive spans
    _settlement     commits, offsets sent to a transaction, ends of transactions
    _processing     process spans: their parent, their scope, their end
    _messages       what a span says of the messages that it accounts for
    _operation      what operations are made from, and the one way they end
    _propagation    headers in, headers out
    _attributes     pure functions from facts to attributes and span names
    _exceptions     where the exceptions that operations fail with are recorded
    _metrics        the instruments, and whether anyone collects
    _loops          whether a `for` statement is asking for the next record
    _coexistence    what happens beside the contrib package
    _own_metrics    kafka-python's own metrics, observed when they are collected
    _client         kafka-python's insides and what differs between its versions
    _config         the settings; the only reader of environment variables
    _semconv        the names, and the release of the conventions they are from
    _safety         how failures of telemetry are kept from the application
    package         what OpenTelemetry's tooling reads
"""

from otel_kafka_python._config import ConsumeHook, ProduceHook
from otel_kafka_python._instrumentor import KafkaPythonInstrumentor
from otel_kafka_python._processing import process_span
from otel_kafka_python.package import __version__

__all__ = [
    "ConsumeHook",
    "KafkaPythonInstrumentor",
    "ProduceHook",
    "__version__",
    "process_span",
]
