"""How a failure of telemetry is kept away from the application.

Whatever this package calls that is not kafka-python (the OpenTelemetry API and
the SDK behind it, propagators, hooks) may raise. Such a call stands in a `try`
whose `except` calls `report`: the failure is logged once for each kind, not
once for each message, and the application goes on as without this package.
"""

import logging
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

logger = logging.getLogger("otel_kafka_python")

_reported: set[object] = set()


def report(action: str) -> None:
    """Log the exception being handled, the first time that `action` fails so.

    Args:
        action: What was being done, as the end of "Failed to …".
    """
    if not is_new((action, sys.exc_info()[0])):
        return
    # As text: a log handler that keeps its records would otherwise keep the frames
    # of the traceback alive, and with them the iterator of a loop that has ended.
    # That a log handler raises, or the stack is full, is no reason to raise either.
    with suppress(Exception):
        logger.warning(
            "Failed to %s; the application is not affected, and further failures "
            "of this kind are not logged\n%s",
            action,
            traceback.format_exc(),
        )


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
        return type(error).__qualname__


def call_hook(name: str, hook: Callable[..., object], *arguments: Any) -> None:
    """Call a hook of the application's; what it raises is logged, not raised."""
    try:
        hook(*arguments)
    except Exception:
        report(f"run the {name}")
