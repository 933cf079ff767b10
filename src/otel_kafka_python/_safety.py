"""How a failure of telemetry is kept away from the application.

Whatever this package calls that is not kafka-python (the OpenTelemetry API and
the SDK behind it, propagators, hooks) may raise. Such a call stands in a `try`
whose `except` calls `report`: the failure is logged once for each kind, not
once for each message, and the application goes on as without this package.

A signal can strike in there, too. What its handler raises (a time limit, say) is
the application's own, and `report` raises it on.
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
    """Log the exception being handled, the first time that `action` fails so.

    Args:
        action: What was being done, as the end of "Failed to …".

    Raises:
        Exception: What a signal handler has raised. So what is to be done in any
            case has to be done before, or in a `finally`.
    """
    raise_signalled()
    if not is_new((action, sys.exc_info()[0])):
        return
    # As text: a log handler that keeps its records would otherwise keep the frames
    # of the traceback alive, and with them the iterator of a loop that has ended.
    # That a log handler raises, or the stack is full, is no reason to raise either.
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
    """Raise the exception being handled on if a signal handler has raised it.

    Then its traceback has the frame of a handler, which is looked for among those
    that are installed: that costs nothing while nothing fails.
    """
    error = sys.exc_info()[1]
    if error is None:
        return
    handlers = set(_handlers())
    entry = error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code in handlers:
            raise error
        entry = entry.tb_next


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
    """Whether a warning of this kind is the first, which is the only one logged."""
    if kind in _reported:
        return False
    _reported.add(kind)
    return True


def text_of(error: BaseException) -> str:
    """What an exception says, or its class where it cannot."""
    try:
        return str(error)
    except Exception:
        raise_signalled()
        return type(error).__qualname__


def call_hook(name: str, hook: Callable[..., object], *arguments: Any) -> None:
    """Call a hook of the application's; what it raises is logged, not raised."""
    try:
        hook(*arguments)
    except Exception:
        report(f"run the {name}")
