"""Ends without a call: dropped by the collector, forked, at the exit.

A finaliser must not end an operation itself: a collection can run while this thread is
inside the SDK, whose locks are not reentrant. So it defers the operation. The next
operation that begins, or the interpreter's exit, abandons it.

A forked child abandons no operation of its parent. Modules that have a lock or a thread
replace it in the child.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from functools import partial
from typing import Any, cast

from otel_kafka_python._clock import Clock

# One object per process: a forked child recognises operations of its parent by it.
this_process = object()


class Endable:
    """Something that has begun in this process and ends once."""

    __slots__ = ("begun_in", "has_ended")

    # Whether a caller has ended it, or is about to.
    has_ended: bool
    # The process that it began in, which is the one that ends it.
    begun_in: object

    def abandon(self, ended: int) -> None:
        """End it because nothing else will any more.

        This does nothing if it has ended, or if it began in another process.

        Args:
            ended: When this was detected, by the monotonic clock, in nanoseconds.
        """
        raise NotImplementedError


# The operations that were dropped before their end, and when.
deferred: deque[tuple[Endable, int]] = deque()

# Has one entry while the garbage collector runs.
_collections: dict[object, object] = {}


class _Phases:
    """The phases of a collection, as attributes that add or remove the entry.

    None of this runs Python code. The first Python code after a signal runs the
    signal's handler, and an exception that the handler raises in a callback of the
    collector would be lost.
    """

    start = property(None, _collections.__setitem__)
    stop = property(None, cast("Any", _collections.pop))


# PyPy's collector has no callbacks. Without reference counts, only it finalises.
_collector_tells = hasattr(gc, "callbacks")
if _collector_tells:  # pragma: no branch (PyPy is not measured)
    gc.callbacks.append(partial(setattr, _Phases()))


def is_collecting() -> bool:
    """Whether the garbage collector runs now, or may run if that is unknown."""
    return bool(_collections) or not _collector_tells


def defer(operation: Endable) -> None:
    """Have a dropped operation abandoned later; safe in a finaliser."""
    deferred.append((operation, Clock.monotonic_ns()))


def abandon_deferred() -> None:
    """Abandon the operations that finalisers have deferred."""
    while deferred:
        try:
            operation, ended = deferred.popleft()
        except IndexError:  # pragma: no cover (another thread was faster)
            return
        operation.abandon(ended)


def abandon_all() -> None:
    """Abandon all operations, because the interpreter exits."""
    abandon_deferred()
    if hasattr(gc, "unfreeze"):
        gc.unfreeze()  # the collector does not list frozen objects
    # A register of all messages in flight would cost something for each message. The
    # search among the garbage collector's objects costs nothing before the exit.
    ended = Clock.monotonic_ns()
    for thing in gc.get_objects():
        if issubclass(type(thing), Endable):
            thing.abandon(ended)


def _after_fork_in_child() -> None:
    global this_process  # noqa: PLW0603 (it is the process's)
    this_process = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
