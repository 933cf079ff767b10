"""The settings: one frozen object, read once from keywords and the environment.

This is the only module that reads environment variables, and the configuration file.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, make_dataclass
from difflib import get_close_matches
from fnmatch import translate
from functools import lru_cache
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_type_hints

from opentelemetry.trace import Span

from otel_kafka_python._safety import logger, report

ProduceHook = Callable[[Span, tuple[Any, ...], dict[str, Any]], object]
"""Called as `produce_hook(span, args, kwargs)`, with the arguments of `send`."""

ConsumeHook = Callable[[Span, Any, tuple[Any, ...], dict[str, Any]], object]
"""Called as `consume_hook(span, record, args, kwargs)`, with the record's span."""

_VARIABLE_PREFIX = "OTEL_PYTHON_KAFKA_"
_EXCEPTION_SIGNAL_VARIABLE = "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN"
_FILE_VARIABLE = "OTEL_CONFIG_FILE"

ProcessParent = Literal["message", "none"]
CommitSpans = Literal["manual", "all", "none"]

_TRUE = {"true", "1", "on", "yes"}
_FALSE = {"false", "0", "off", "no"}


def _hook(value: object) -> Callable[..., object]:
    if not callable(value):
        raise ValueError("a callable")  # noqa: TRY004 (as for all malformed settings)
    return value


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise ValueError("true or false")


def _one_of(choices: Any) -> Callable[[object], Any]:
    names = get_args(choices)

    def parse(value: object) -> Any:
        if isinstance(value, str) and value.strip().lower() in names:
            return value.strip().lower()
        raise ValueError(" or ".join(names))

    return parse


def _globs(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(glob.strip() for glob in value.split(",") if glob.strip())
    if isinstance(value, Iterable):
        globs = tuple(value)
        if all(isinstance(glob, str) for glob in globs):
            return globs
    raise ValueError("globs: comma-separated, or a list of str")


# A setting is a field whose annotation contains its parser.
_Flag = Annotated[bool, _boolean]
_Globs = Annotated[tuple[str, ...], _globs]


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of `instrument()`. The defaults suit a production service.

    Each setting is a keyword of `instrument()` and, except for the hooks, an
    environment variable: `send_spans` is `OTEL_PYTHON_KAFKA_SEND_SPANS`.
    """

    produce_hook: Annotated[ProduceHook | None, _hook] = None
    consume_hook: Annotated[ConsumeHook | None, _hook] = None
    # The default excludes the topics that Kafka itself writes to.
    excluded_topics: _Globs = ("__consumer_offsets", "__transaction_state")
    propagation: _Flag = True
    propagation_excluded_topics: _Globs = ()
    send_spans: _Flag = True
    receive_spans: _Flag = True
    process_spans: _Flag = True
    process_parent: Annotated[ProcessParent, _one_of(ProcessParent)] = "message"
    commit_spans: Annotated[CommitSpans, _one_of(CommitSpans)] = "manual"
    capture_message_key: _Flag = True
    capture_message_size: _Flag = False
    capture_headers: _Globs = ()
    capture_queue_time: _Flag = False
    next_process_spans: _Flag = False
    metrics: _Flag = True
    client_metrics: _Flag = False
    pipeline_latency: _Flag = False
    # Whether exceptions are recorded as span events, and as log events.
    span_exceptions: bool = True
    log_exceptions: bool = False

    def excludes(self, topic: str) -> bool:
        """Whether `topic` matches one of the globs of `excluded_topics`."""
        return _matches(self.excluded_topics, topic)

    def propagates_to(self, topic: str | None) -> bool:
        """Whether messages to `topic` carry the context."""
        return self.propagation and not (
            topic is not None and _matches(self.propagation_excluded_topics, topic)
        )

    @property
    def processes_next(self) -> bool:
        """Whether `next` makes process spans."""
        return self.next_process_spans and self.process_spans

    def captures(self, header: str) -> bool:
        """Whether `header` matches a glob of `capture_headers`, and none with `!`."""
        return _captures(self.capture_headers, header)


_HINTS = get_type_hints(Config, include_extras=True)
_PARSERS: dict[str, Callable[[object], object]] = {
    name: hint.__metadata__[0]
    for name, hint in _HINTS.items()
    if hasattr(hint, "__metadata__")
}
_VARIABLES = {
    name: _VARIABLE_PREFIX + name.upper()
    for name, parse in _PARSERS.items()
    if parse is not _hook
}


class _FoundInFile:
    """Takes all names that the SDK found: an unknown one would stop the SDK."""

    def __init__(self, **found: object) -> None:
        for name in _VARIABLES:
            setattr(self, name, found.pop(name, None))
        for name in found:
            logger.warning(
                "the configuration file sets %s of kafka_python, which has no such "
                "setting; it is ignored%s",
                name,
                _did_you_mean(name, {name: name for name in _VARIABLES}),
            )


# The settings as the SDK reads them from its configuration file and passes them on to
# `instrument()`: None where the file says nothing.
FileSettings = make_dataclass(
    "FileSettings",
    [(name, _HINTS[name] | None, None) for name in _VARIABLES],
    bases=(_FoundInFile,),
    init=False,
)


# Cached, because it is called for each header of each message.
@lru_cache(maxsize=1024)
def _captures(globs: tuple[str, ...], header: str) -> bool:
    excluded = [glob[1:] for glob in globs if glob.startswith("!")]
    included = [glob for glob in globs if not glob.startswith("!")]
    return _matches(included, header) and not _matches(excluded, header)


def _matches(globs: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(translate(glob), name) for glob in globs)


def load(
    keywords: Mapping[str, object], environ: Mapping[str, str] = os.environ
) -> Config:
    """Build the settings; a keyword takes precedence over its environment variable.

    Args:
        keywords: The keywords of `instrument()`; None means "not given".
        environ: The environment variables.

    Returns:
        The settings. An invalid value leaves the default, and an unknown name is
        ignored. Each is logged in one warning that names it. Nothing is raised.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    settings: dict[str, Any] = dict(_exception_signal(environ))
    for name, parse in _PARSERS.items():
        variable = _VARIABLES.get(name, "")
        if name in given:
            source, value = f"the keyword {name}", given.pop(name)
        elif environ.get(variable, "").strip():
            source, value = variable, environ[variable]
        else:
            continue
        try:
            settings[name] = parse(value)
        except ValueError as error:
            logger.warning(
                "%s is %r, but should be %s; the default, %s, is used instead",
                source,
                value,
                error,
                format_default(getattr(Config(), name)),
            )
    _warn_of_unknown(given, environ)
    return Config(**settings)


def _warn_of_unknown(keywords: Iterable[str], environ: Iterable[str]) -> None:
    for name in keywords:
        logger.warning(
            "instrument() has no keyword %s; it is ignored%s",
            name,
            _did_you_mean(name, {name: name for name in _PARSERS}),
        )
    for variable in sorted(environ):
        name = variable.removeprefix(_VARIABLE_PREFIX)
        if name != variable and variable not in _VARIABLES.values():
            logger.warning(
                "%s is not a variable of otel-kafka-python; it is ignored%s",
                variable,
                _did_you_mean(name.lower(), _VARIABLES),
            )


def disabled_in_file(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the SDK's configuration file says `enabled: false` of this package."""
    path = environ.get(_FILE_VARIABLE)
    if not path:
        return False
    try:
        configuration = import_module("opentelemetry.configuration")
    except ImportError:  # then the SDK has not read it either
        return False
    try:
        instrumentation = configuration.load_config_file(
            path
        ).instrumentation_development
        packages = (instrumentation and instrumentation.python) or {}
        return not packages.get("kafka_python", {}).get("enabled", True)
    except Exception:
        report("read the configuration file")
        return False


def _did_you_mean(name: str, known: Mapping[str, str]) -> str:
    nearest = get_close_matches(name, known, n=1)
    return f"; did you mean {known[nearest[0]]}?" if nearest else ""


def format_default(default: object) -> str:
    """The default of a setting, in the form that its environment variable takes."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    return "none" if default is None else str(default)


def _exception_signal(environ: Mapping[str, str]) -> dict[str, bool]:
    """Where exceptions are recorded (Recording exceptions); `logs/dup` means both."""
    value = environ.get(_EXCEPTION_SIGNAL_VARIABLE, "")
    signals = {signal.strip().lower() for signal in value.split(",")} - {""}
    if unknown := signals - {"logs", "logs/dup"}:
        logger.warning(
            "%s is %r, but should be logs or logs/dup; %s is ignored",
            _EXCEPTION_SIGNAL_VARIABLE,
            value,
            ", ".join(sorted(unknown)),
        )
    return {
        "span_exceptions": "logs/dup" in signals or "logs" not in signals,
        "log_exceptions": "logs" in signals or "logs/dup" in signals,
    }
