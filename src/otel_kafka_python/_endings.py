"""The ends that nobody calls for: dropped by the collector, forked, at the exit.

A finaliser must not end an operation itself: a collection can strike while this
thread is inside the SDK, whose locks are not reentrant. It defers the operation,
and the next one that begins, or the interpreter's exit, abandons it.
"""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from functools import partial
from typing import Any, cast

# One object for each process, so that a forked child knows what is not its own.
process = object()


class Endable:
    """Something that has begun in this process and ends once."""

    __slots__ = ("ended", "process")

    # Whether somebody has ended it, or is about to.
    ended: bool
    # The process that it began in: a parent ends what it has begun.
    process: object

    def abandon(self, ended: int) -> None:
        """End it because nothing else will any more.

        Args:
            ended: When that was found out, by the monotonic clock, in nanoseconds.
        """
        raise NotImplementedError


# The operations that finalisers found without an end, and when.
deferred: deque[tuple[Endable, int]] = deque()

# Has an entry while the garbage collector runs.
_collections: dict[object, object] = {}


class _Phases:
    """The phases of a collection, as attributes that put the entry in or take it out.

    None of this is written in Python. A signal that comes during a collection is
    handled by the first code that is, and what its handler raises in a callback of the
    collector's would be lost.
    """

    start = property(None, _collections.__setitem__)
    stop = property(None, cast("Any", _collections.pop))


# PyPy's collector does not tell; without reference counts nothing else finalises.
_collector_tells = hasattr(gc, "callbacks")
if _collector_tells:
    gc.callbacks.append(partial(setattr, _Phases()))


def is_collecting() -> bool:
    """Whether the garbage collector runs now, as far as it tells."""
    return bool(_collections) or not _collector_tells


def defer(operation: Endable) -> None:
    """Have an operation that was dropped abandoned later; safe in a finaliser."""
    if not operation.ended and operation.process is process:
        deferred.append((operation, time.monotonic_ns()))


def abandon_deferred() -> None:
    """Abandon the operations that finalisers have deferred."""
    while deferred:
        try:
            operation, ended = deferred.popleft()
        except IndexError:  # another thread was faster
            return
        operation.abandon(ended)


def abandon_all() -> None:
    """Abandon all operations, because the interpreter exits."""
    abandon_deferred()
    if hasattr(gc, "unfreeze"):
        gc.unfreeze()  # the collector does not list frozen objects
    # Asking the garbage collector for them costs nothing until now, which a
    # register of all messages in flight would.
    ended = time.monotonic_ns()
    for thing in gc.get_objects():
        if issubclass(type(thing), Endable):
            thing.abandon(ended)


def _after_fork_in_child() -> None:
    global process  # noqa: PLW0603 (it is the process's)
    process = object()
    deferred.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
