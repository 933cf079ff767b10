"""The facts that OpenTelemetry's tooling reads about an instrumentation package."""

__version__ = "0.1.0"

# Both distributions own the import package `kafka`, so an application has only one of
# them. Neither is required, and either is enough.
_instruments: tuple[str, ...] = ()
_instruments_any = (
    "kafka-python >= 2.0.2, < 4.0",
    "kafka-python-ng >= 2.0, < 3.0",
)

_supports_metrics = True

_semconv_status = "development"
