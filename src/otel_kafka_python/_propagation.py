"""Headers in, headers out: creation contexts read from and written to records."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter, TextMapPropagator
from opentelemetry.trace import SpanContext

Header = tuple[str, bytes]

_EMPTY = Context()

# Of a header for each entry of the baggage (Jaeger's, OpenTracing's) the propagators'
# fields say nothing.
_BAGGAGE_PREFIXES = ("uberctx-", "ot-baggage-")


class _HeaderGetter(Getter[Mapping[str, Any]]):
    """Reads header values that are UTF-8; any other is as good as absent."""

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        value = carrier.get(key)
        if not value:
            return None
        try:
            return [value.decode()]
        except (UnicodeDecodeError, AttributeError):
            return None

    def keys(self, carrier: Mapping[str, Any]) -> list[str]:
        return list(carrier)


_GETTER = _HeaderGetter()


def extract(headers: Any) -> Context:
    """The context that the headers of a record carry.

    Args:
        headers: A record's headers, a list of `(str, bytes)`. Of several with
            one name the last counts.

    Returns:
        A context with what the configured propagators found and nothing else;
        an empty one when there is nothing, or nothing that can be read.
    """
    if not headers:
        return _EMPTY
    # A dict keeps the last value of a name.
    return propagate.extract(dict(headers), Context(), getter=_GETTER)


def creation_context(context: Context) -> SpanContext | None:
    """The message's creation context, if the extracted context has one."""
    found = trace.get_current_span(context).get_span_context()
    return found if found.is_valid else None


def has_propagators() -> bool:
    """Whether any propagator is configured that writes headers."""
    return bool(_fields())


def may_carry_context(headers: Any) -> bool:
    """Whether the headers of a send are a list with a field of a propagator."""
    if not headers or not isinstance(headers, list):
        return False
    names = [_name(header) for header in headers]
    return None not in names and not _fields().isdisjoint(names)


def inject(headers: Any, context: Context) -> Any:
    """The headers of a record with `context` written to them.

    Args:
        headers: What the application gave to `send`. Only None and lists are
            written to, as a copy; kafka-python refuses anything else itself.
        context: The context to propagate.

    Returns:
        New headers, in which all fields of the propagators have given way to
        what they produced; or `headers` itself when they produced nothing.
    """
    if headers is not None and not isinstance(headers, list):
        return headers
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    if not carrier:
        return headers
    written: list[Any] = [(name, value.encode()) for name, value in carrier.items()]
    if headers is None:
        return written
    stale = _fields() | carrier.keys()
    kept = [header for header in headers if _name(header) not in stale]
    if type(headers) is list:
        return kept + written
    # Some versions of kafka-python refuse a subclass of list and some take it:
    # the copy is of the same class, so that they go on to do so.
    copied = copy.copy(headers)
    copied[:] = kept + written
    return copied


def is_propagated(name: str) -> bool:
    """Whether a header of this name is written by the configured propagators."""
    return name in _fields() or name.startswith(_BAGGAGE_PREFIXES)


def _name(header: Any) -> str | None:
    # The application may pass what is no header at all; that is for
    # kafka-python to say.
    if isinstance(header, tuple) and len(header) == 2:  # noqa: PLR2004 (a pair)
        name, value = header
        if isinstance(name, str) and isinstance(value, bytes):
            return name
    return None


_known_fields: tuple[TextMapPropagator | None, frozenset[str]] = (None, frozenset())


def _fields() -> frozenset[str]:
    """The fields of the configured propagators, kept because they are slow to ask."""
    global _known_fields  # noqa: PLW0603 (a cache of one entry)
    propagator = propagate.get_global_textmap()
    known, fields = _known_fields
    if known is not propagator:
        fields = frozenset(propagator.fields)
        _known_fields = (propagator, fields)
    return fields
