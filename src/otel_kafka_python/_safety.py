"""How a failure of telemetry is kept away from the application.

The OpenTelemetry API, the SDK behind it, propagators and hooks may raise. A call to
any of them stands in a `try` whose `except` calls `report`: the failure is logged
once per kind, not once per message, and the application continues as it would without
this package.

A signal can arrive during such a call. An exception that its handler raises (for
example, for a time limit) belongs to the application, and `report` raises it again.
"""

import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType
from typing import Any

logger = logging.getLogger("otel_kafka_python")

_reported: set[object] = set()


def report(action: str) -> None:
    """Log the exception being handled, the first time that `action` fails this way.

    Args:
        action: The failed action, which completes "Failed to …".

    Raises:
        Exception: The exception of a signal handler. So a caller does everything that
            must be done before this call, or in a `finally`.
    """
    raise_signalled()
    if not is_new((action, sys.exc_info()[0])):
        return
    # The traceback is logged as text: a log handler that keeps its records would
    # otherwise keep the frames alive, and with them the iterator of an ended loop.
    # The log handler may raise, or the stack may be full; neither must be raised.
    try:
        logger.warning(
            "Failed to %s; the application is not affected, and further failures "
            "of this kind are not logged\n%s",
            action,
            traceback.format_exc(),
        )
    except Exception:
        raise_signalled()


def raise_signalled() -> None:
    """Raise the exception being handled again if a signal handler raised it.

    The traceback of such an exception has the frame of an installed handler. The search
    for that frame costs nothing while nothing fails.
    """
    # In a local variable here, the exception would be part of a reference cycle and
    # would keep the frames of its traceback, and with them the iterator of a loop.
    if _is_signalled(sys.exc_info()[1]):
        raise  # noqa: PLE0704 (the exception being handled)


def _is_signalled(error: BaseException | None) -> bool:
    handlers = set(_handlers())
    entry = None if error is None else error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code in handlers:
            return True
        entry = entry.tb_next
    return False


def _handlers() -> Iterator[CodeType]:
    """The code of the signal handlers that are installed."""
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, partial):
            handler = handler.func
        if not callable(handler):  # the system's own, or none
            continue
        function = getattr(handler, "__func__", handler)
        if not hasattr(function, "__code__"):
            function = type(handler).__call__
        code = getattr(function, "__code__", None)
        if code is not None:
            yield code


def is_new(kind: object) -> bool:
    """Whether a warning is the first of its kind. Only the first is logged."""
    if kind in _reported:
        return False
    _reported.add(kind)
    return True


def text_of(error: BaseException) -> str:
    """The message of an exception, or the name of its class if `str` raises."""
    try:
        return str(error)
    except Exception:
        raise_signalled()
        return type(error).__qualname__


def call_hook(name: str, hook: Callable[..., object], *arguments: Any) -> None:
    """Call a hook of the application; its exceptions are logged, not raised."""
    try:
        hook(*arguments)
    except Exception:
        report(f"run the {name}")
