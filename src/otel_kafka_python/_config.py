"""The settings: one frozen object, read once from keywords and the environment.

This is the only module that reads environment variables.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Any

from opentelemetry.trace import Span

from otel_kafka_python._safety import logger

ProduceHook = Callable[[Span, tuple[Any, ...], dict[str, Any]], object]
"""Called as `produce_hook(span, args, kwargs)`, with the arguments of `send`."""

ConsumeHook = Callable[[Span, Any, tuple[Any, ...], dict[str, Any]], object]
"""Called as `consume_hook(span, record, args, kwargs)`; the span is of the record."""

_VARIABLE_PREFIX = "OTEL_PYTHON_KAFKA_"
_LINK_LIMIT_VARIABLE = "OTEL_SPAN_LINK_COUNT_LIMIT"
_DEFAULT_LINK_LIMIT = 128
_EXCEPTION_SIGNAL_VARIABLE = "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN"


@dataclass(frozen=True, slots=True)
class Config:
    """What `instrument()` was asked for. The defaults suit a production service.

    Each field but the hooks is a keyword of `instrument()` and an environment
    variable: `send_spans` is `OTEL_PYTHON_KAFKA_SEND_SPANS`.
    """

    produce_hook: ProduceHook | None = None
    consume_hook: ConsumeHook | None = None
    excluded_topics: tuple[str, ...] = ()
    propagation: bool = True
    send_spans: bool = True
    receive_spans: bool = True
    process_spans: bool = True
    process_parent: str = "message"
    commit_spans: str = "manual"
    capture_message_key: bool = True
    capture_message_size: bool = False
    capture_headers: tuple[str, ...] = ()
    capture_queue_time: bool = False
    next_process_spans: bool = False
    client_metrics: bool = False
    # The SDK keeps the newest links up to its own limit; building more is waste.
    link_limit: int = _DEFAULT_LINK_LIMIT
    # Whether exceptions are recorded as events of their spans, and as log events.
    span_exceptions: bool = True
    log_exceptions: bool = False

    def excludes(self, topic: str) -> bool:
        """Whether `topic` matches one of the globs of `excluded_topics`."""
        return _matches(self.excluded_topics, topic)

    @property
    def processes_next(self) -> bool:
        """Whether `next` makes process spans."""
        return self.next_process_spans and self.process_spans

    def captures(self, header: str) -> bool:
        """Whether `header` matches a glob of `capture_headers` and none with `!`."""
        return _captures(self.capture_headers, header)


# Asked for each header of each message.
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
    """Build the settings; a keyword wins over its environment variable.

    Args:
        keywords: What `instrument()` was called with; None is "not given".
        environ: The environment variables.

    Returns:
        The settings. A malformed or unknown one is left at its default, with one
        warning that names it; nothing is raised.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    settings: dict[str, Any] = {
        "link_limit": _link_limit(environ),
        **_exception_signal(environ),
    }
    for name, parse in _PARSERS.items():
        variable = _VARIABLE_PREFIX + name.upper()
        if name in given:
            source, value = f"the keyword {name}", given.pop(name)
        elif parse is not _hook and environ.get(variable, "").strip():
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
                shown(getattr(Config(), name)),
            )
    for name in given:
        logger.warning("instrument() has no keyword %s; it is ignored", name)
    return Config(**settings)


def shown(default: object) -> str:
    """The default of a setting, as a text says it."""
    return "none" if default in (None, ()) else str(default)


def _hook(value: object) -> Callable[..., object]:
    if not callable(value):
        raise ValueError("a callable")  # noqa: TRY004 (as for all malformed settings)
    return value


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise ValueError("true or false")


def _one_of(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if isinstance(value, str) and value.strip().lower() in choices:
            return value.strip().lower()
        raise ValueError(" or ".join(choices))

    return parse


def _globs(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(glob.strip() for glob in value.split(",") if glob.strip())
    if isinstance(value, Iterable):
        globs = tuple(value)
        if all(isinstance(glob, str) for glob in globs):
            return globs
    raise ValueError("globs: comma-separated, or a list of str")


def _link_limit(environ: Mapping[str, str]) -> int:
    # The SDK's own variable: the SDK itself reports a malformed one.
    value = environ.get(_LINK_LIMIT_VARIABLE, "").strip()
    return int(value) if value.isdecimal() else _DEFAULT_LINK_LIMIT


def _exception_signal(environ: Mapping[str, str]) -> dict[str, bool]:
    """Where exceptions go (Recording exceptions); `logs/dup` is in both."""
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


_PARSERS: dict[str, Callable[[object], object]] = {
    "produce_hook": _hook,
    "consume_hook": _hook,
    "excluded_topics": _globs,
    "propagation": _boolean,
    "send_spans": _boolean,
    "receive_spans": _boolean,
    "process_spans": _boolean,
    "process_parent": _one_of("message", "none"),
    "commit_spans": _one_of("manual", "all", "none"),
    "capture_message_key": _boolean,
    "capture_message_size": _boolean,
    "capture_headers": _globs,
    "capture_queue_time": _boolean,
    "next_process_spans": _boolean,
    "client_metrics": _boolean,
}
