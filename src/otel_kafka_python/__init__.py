"""OpenTelemetry instrumentation of kafka-python.

    from otel_kafka_python import KafkaPythonInstrumentor

    KafkaPythonInstrumentor().instrument()

or, without a change to the application, `opentelemetry-instrument python app.py`.

The modules, from the outside in; each imports only from those below it:

    _instrumentor      the instrumentor: keywords in, everything built, launcher hooks
    _patches           the table of patched methods; the only import of wrapt
    _coexistence       takes over from the contrib package
    _producer          the send wrapper: from the call to the acknowledgement
    _consumer          poll, next and iteration: receive spans
    _commits           commits of offsets
    _transactions      offsets sent to a transaction, ends of transactions
    _processing        process spans, in these modules:
      process_span     the public context manager
      iterators        hand records to a loop, and notice its end; hold those of `next`
      spans            a process span: its parent, its links, its attributes
      scopes           the context while it lasts, and how it is restored
      loops            whether a `for` statement asks, and whether it failed
    _telemetry         the state of all wrappers: settings, tracer, instruments
    _client_metrics    the clients' own metrics, observed when they are collected
    _clients           the registry of live clients, and the state kept for each
    _operation         an operation, and the one way it ends
    _span_ends         ends spans without delaying the broker's other answers
    _messages          the attributes and links that describe a span's messages
    _pipeline          the time that messages take from their pipeline's first send
    _endings           ends without a call: dropped by the collector, fork, exit
    _propagation       headers in, headers out
    _metrics           the instruments, and whether anyone collects
    _exception_events  where the exceptions of failed operations are recorded
    _attributes        pure functions from facts to attributes and span names
    _kafka             kafka-python's insides and version differences; no state
    _config            the settings; the only reader of variables and files
    _semconv           the names, and the release of the conventions they are from
    _safety            how failures of telemetry are kept from the application
    _clock             the clocks that durations are measured with
    package            the facts that OpenTelemetry's tooling reads

An operation (a send, a poll, a commit, the processing of a record) goes through these
states:

    started ──fail──▶ started, with an error ──end──▶ ended
       │                                               ▲
       ├──end──────────────────────────────────────────┤
       └──dropped──▶ deferred ──abandon────────────────┘

and the scope of a process span through these:

    entered ──leave──▶ undone
       │        └────▶ kept, while a span that the application entered in it lasts
       └──close──▶ left and ended

The words for ends mean the same everywhere:

    fail       record why an operation fails; it goes on until its end
    claim      win the right to end an operation, which only one can
    end        end the span, measure the duration, count the messages
    defer      note in a finaliser that an operation is to be abandoned
    abandon    end an operation because nothing else will any more
    leave      stop a scope from being current
    undo       restore the context that was current before a scope
    displace   leave the scope of a record of `next` when another record is asked for
    close      leave a scope, or call the hook of a receipt, and end the operation
    drop       close a scope whose iterator is finalised; defer its end in a collection
"""

from otel_kafka_python._config import ConsumeHook, ProduceHook
from otel_kafka_python._instrumentor import KafkaPythonInstrumentor
from otel_kafka_python._messages import Record
from otel_kafka_python._processing.process_span import process_span
from otel_kafka_python.package import __version__

__all__ = [
    "ConsumeHook",
    "KafkaPythonInstrumentor",
    "ProduceHook",
    "Record",
    "__version__",
    "process_span",
]
