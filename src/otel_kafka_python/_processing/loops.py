"""Whether a `for` statement asks for the next record, and how it ended.

A pull API has no callback: only the loop that asks for the next record shows how long
the record before it was processed. But `list`, `sorted`, comprehensions and `next` in a
thread pool also ask for records. They process none, and would leave a context attached.
So the iterator looks at the instruction that asks for the record, in the frame that
calls it.

The answer needs CPython's bytecode. It is trusted only after a trial with a few shapes
of loops. If the trial fails, no loop is recognised.

When an exception leaves a loop's body, CPython drops the loop's iterator before it
reaches any `except`. No variable holds the exception then, but it has just left two
traces among the youngest objects of the garbage collector: an entry of its traceback,
which names the frame and the instruction, and, from Python 3.12, the exception itself
with that traceback. Without the entry, no failure is reported.
"""

from __future__ import annotations

import dis
import gc
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum, auto
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import NamedTuple

from otel_kafka_python._safety import raise_signalled

_COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>"})
_DELEGATIONS = frozenset({"SEND", "YIELD_FROM"})
_YIELDS = _DELEGATIONS | {"YIELD_VALUE"}
_APPENDS = frozenset(
    {"LIST_APPEND", "SET_ADD", "MAP_ADD", "LIST_EXTEND", "SET_UPDATE", "DICT_UPDATE"}
)
# The instructions between the last one of a loop's body and the first one after it.
# There are several in a row if the loop is the end of another loop's body.
_LOOP_ENDS = frozenset(
    {"JUMP_BACKWARD", "END_FOR", "POP_ITER", "END_ASYNC_FOR", "NOP", "EXTENDED_ARG"}
)

# These end a loop and raise nothing, so no search is needed.
_QUIET = frozenset({"FOR_ITER", "POP_ITER", "POP_TOP", "END_FOR"})
# These raise an exception again, mostly without a new entry in its traceback.
_RERAISES = frozenset({"RERAISE", "CLEANUP_THROW", "END_ASYNC_FOR"})
# The first two drop an iterator that is in a variable. An interrupt may be raised at a
# jump.
_DROPS = ("STORE", "DELETE", "JUMP")
# A generator or coroutine waits at these, and exceptions that are thrown into it are
# raised at them. On 3.10, one that waits for another is at the LOAD_CONST before its
# YIELD_FROM.
_WAITS = _YIELDS | {"RESUME", "JUMP_BACKWARD_NO_INTERRUPT", "LOAD_CONST"}
# Exceptions can be thrown into code that waits.
_CAN_WAIT = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
# The search is skipped if there are more young objects: all objects are young if the
# garbage collector is disabled.
_MOST_YOUNG = 25_000

_STANDARD_LIBRARY = str(Path(dis.__file__).parent) + os.sep
_THIRD_PARTY = ("site-packages", "dist-packages")


class Asker(Enum):
    """The kind of instruction that asks for the next item."""

    LOOP = auto()
    # A loop in a generator that yields, a generator expression, or a `yield from`: only
    # a loop over the generator shows how long an item is processed.
    GENERATOR = auto()
    OTHER = auto()


def is_loop(frame: FrameType | None) -> bool:
    """Whether a `for` statement asks for the next item.

    `enumerate`, `zip` and other iterators written in C count as the `for` statement
    that they are in. So does a generator that hands the items on.

    Args:
        frame: The frame that called the iterator's `__next__`.
    """
    while frame is not None:
        code = frame.f_code
        asker = asker_at(code, code.co_filename, frame.f_lasti)
        if asker is not Asker.GENERATOR:
            return asker is Asker.LOOP
        frame = frame.f_back
    return False


@lru_cache(maxsize=1024)
def asker_at(code: CodeType, filename: str, offset: int) -> Asker:
    """The kind of the instruction at `offset` of `code`, as far as it is known.

    Args:
        code: The code.
        filename: Its file, which comparisons of code objects ignore.
        offset: The offset of the instruction, from `f_lasti`.
    """
    if not _is_trusted() or _is_library(filename):
        return Asker.OTHER
    asker = _read(code, offset)
    # At the first failure, it would be too late: the trial makes so many objects that a
    # collection may hide the exception that is searched for.
    if asker is not Asker.OTHER and _has_few_young():
        _trial()
    return asker


def _is_library(filename: str) -> bool:
    # The loops of the standard library copy, write or hand on their items (json with an
    # indent, multiprocessing's pools); they process nothing.
    if filename.startswith("<frozen "):
        return True
    return filename.startswith(_STANDARD_LIBRARY) and not any(
        part in filename for part in _THIRD_PARTY
    )


def _read(code: CodeType, offset: int) -> Asker:
    is_generator = bool(code.co_flags & inspect.CO_GENERATOR)
    if code.co_name in _COMPREHENSIONS or (
        code.co_name == "<genexpr>" and not is_generator  # an asynchronous one
    ):
        return Asker.OTHER
    instructions = list(dis.get_instructions(code))
    index = _index_of(instructions, offset)
    asking = instructions[index]
    if asking.opname in _DELEGATIONS:
        return Asker.GENERATOR
    # From 3.14, `any` and `all` of a generator expression loop inline. They test an
    # item; a statement stores it.
    if asking.opname != "FOR_ITER" or instructions[index + 1].opname == "TO_BOOL":
        return Asker.OTHER
    # From 3.12, a comprehension is inline in the code around it. Unlike a statement's,
    # each round of its loop ends with an append.
    start = index
    while start and instructions[start - 1].opname == "EXTENDED_ARG":
        start -= 1
    targets = {instructions[start].offset, asking.offset}
    for back, each in enumerate(instructions):
        if (
            each.opname.startswith("JUMP")
            and each.argval in targets
            and _last_of_body(instructions, back) in _APPENDS
        ):
            return Asker.OTHER
    if is_generator and any(
        each.opname in _YIELDS and asking.offset < each.offset < asking.argval
        for each in instructions
    ):
        return Asker.GENERATOR
    return Asker.LOOP


def _index_of(instructions: list[dis.Instruction], offset: int) -> int:
    # The offset may be the one of an inline cache after the instruction, or of an
    # EXTENDED_ARG before it.
    index = max(i for i, each in enumerate(instructions) if each.offset <= offset)
    while instructions[index].opname == "EXTENDED_ARG":
        index += 1
    return index


def _last_of_body(instructions: list[dis.Instruction], back: int) -> str:
    """The last instruction of a loop's body, before its jump `back` to the start."""
    names = [each.opname for each in instructions[:back]]
    while names[-1] in _LOOP_ENDS or names[-2:] == ["END_FOR", "POP_TOP"]:
        names.pop()
    return names[-1]


class _Probe:
    """Three items, and whether a loop asked for each."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return self

    def __next__(self) -> tuple[int, ...]:
        frame = sys._getframe(1)
        self.answers.append(_read(frame.f_code, frame.f_lasti) is Asker.LOOP)
        if len(self.answers) == 3:  # noqa: PLR2004 (as the class says)
            raise StopIteration
        return (1, 2)


@cache
def _is_trusted() -> bool:
    """Whether this package understands the interpreter's bytecode, by a trial.

    An interpreter without reference counts does not drop an iterator at the end of its
    loop, so the end can be seen only on CPython.
    """
    if sys.implementation.name != "cpython":
        return False
    try:
        return all(_try_statements()) and not any(_try_others())
    except Exception:
        raise_signalled()
        return False


def _try_statements() -> list[bool]:
    plain, counted, nested = _Probe(), _Probe(), _Probe()
    for _item in plain:
        pass
    for _index, _item in enumerate(counted):
        [x for x in (1, 2)]
    for item in nested:
        for _x in item:
            pass
    return plain.answers + counted.answers + nested.answers


def _try_others() -> list[bool]:
    probes = [_Probe() for _ in range(8)]
    one, two, three, four, five, six, seven, eight = probes
    list(one)
    [*two]
    [item for item in three]
    {x for item in four for x in item}
    {item: 1 for item in five if item}
    list(item for item in six)
    next(seven)
    any(not item for item in eight)
    # This is a syntax error before Python 3.15, so it is compiled here.
    for unpacking in ("[*i for i in it]", "{*i for i in it}", "{**{i: 1} for i in it}"):
        probe = _Probe()
        with suppress(SyntaxError):
            eval(unpacking, {"it": probe})  # noqa: S307 (it is one of these)
            probes.append(probe)
    return [answer for probe in probes for answer in probe.answers]


class LoopFailure(NamedTuple):
    """An exception ended a loop.

    Args:
        error: The exception, or None if it cannot be identified.
    """

    error: Exception | None


def failure(
    frame: FrameType | None, asked_in: CodeType | None, asker: Asker, stops: int
) -> LoopFailure | None:
    """Find out whether an exception ends a loop whose iterator is being dropped.

    A loop that is left in another way has not failed. Neither has a loop that ends with
    KeyboardInterrupt, SystemExit or another exception that is not an `Exception`.

    Args:
        frame: The frame in which the iterator is dropped.
        asked_in: The code that asked for the last item.
        asker: The kind of instruction that asked for it.
        stops: The result of `references_to_stops` at the beginning of the loop.

    Returns:
        The failure, or None if there is none or if it is uncertain.
    """
    if asker is Asker.GENERATOR:
        # If the loop over a generator ends, the generator is closed first.
        while frame is not None and _may_be_closing(frame):
            found = _failure_in(frame, asked_in, stops)
            if found is not None:
                return found
            frame = frame.f_back
    elif frame is not None and frame.f_code is not asked_in:
        return None
    return None if frame is None else _failure_in(frame, asked_in, stops)


def references_to_stops() -> int:
    """The number of references to the exceptions that stop a program.

    Up to Python 3.11, an exception cannot be found while it is raised, but it holds its
    class, so there is one more reference. Later, the classes are immortal. Other
    interpreters count no references.
    """
    if sys.version_info >= (3, 12) or not hasattr(sys, "getrefcount"):
        return 0
    return sys.getrefcount(KeyboardInterrupt) + sys.getrefcount(SystemExit)


def _may_be_closing(frame: FrameType) -> bool:
    code = frame.f_code
    if not code.co_flags & inspect.CO_GENERATOR:
        return False
    opname = _opname(code, frame.f_lasti)
    return opname not in _QUIET and not opname.startswith(_DROPS)


@lru_cache(maxsize=1024)
def _opname(code: CodeType, offset: int) -> str:
    """The name of an instruction; RERAISE for a bare `raise`.

    This makes hardly any objects, unlike `dis.get_instructions`: a collection before
    the search would hide the exception that is searched for.
    """
    bytecode = code.co_code
    while dis.opname[bytecode[offset]] == "CACHE":
        offset -= 2
    while dis.opname[bytecode[offset]] == "EXTENDED_ARG":
        offset += 2
    name = dis.opname[bytecode[offset]]
    is_bare = name == "RAISE_VARARGS" and not bytecode[offset + 1]
    return "RERAISE" if is_bare else name


def _failure_in(
    frame: FrameType, asked_in: CodeType | None, stops: int
) -> LoopFailure | None:
    """Find out whether an exception is leaving a frame, or a block of it."""
    opname = _opname(frame.f_code, frame.f_lasti)
    if opname in _QUIET or references_to_stops() > stops:
        return None
    if not _is_searchable():
        is_asking = frame.f_code is asked_in
        return LoopFailure(None) if _is_raised(frame, opname, is_asking) else None
    finds_errors = _trial().finds_errors
    traces = _search(frame, 0)
    if not (_fitting(traces, frame, opname) if finds_errors else traces.entries):
        traces = _search_older(frame, traces)
    fitting = _fitting(traces, frame, opname)
    is_identified = len(fitting) == 1 and (finds_errors or opname in _RERAISES)
    if is_identified or (finds_errors and fitting):
        is_failure = all(isinstance(error, Exception) for error in fitting)
    else:
        is_failure = _is_other_failure(traces, fitting)
    if not is_failure:
        return None
    error = fitting[0] if is_identified and finds_errors else None
    return LoopFailure(error if isinstance(error, Exception) else None)


def _is_raised(frame: FrameType, opname: str, is_asking: bool) -> bool:
    """Whether an instruction raises an exception, without a search for it."""
    if opname in _RERAISES:
        # It may be the one that closes a generator or cancels a task.
        return not frame.f_code.co_flags & _CAN_WAIT
    if opname.startswith("CALL") and not is_asking:
        return False  # it may be the `close` of a generator
    return opname not in _WAITS and not opname.startswith(_DROPS)


def _is_other_failure(traces: _Traces, fitting: list[BaseException]) -> bool:
    """Whether an exception that is not identified is a failure without doubt."""
    # A closed generator leaves a GeneratorExit behind.
    if not all(isinstance(e, Exception | GeneratorExit) for e in traces.exceptions):
        return False
    if not traces.entries:
        return bool(fitting)
    entry = traces.entries[-1]
    return not _is_thrown_in(entry) and (
        not _trial().finds_errors or _is_raised_again(entry, traces.tracebacks)
    )


class _Traces(NamedTuple):
    """The traces of exceptions among the youngest objects, the oldest first.

    Args:
        entries: The traceback entries of a frame's last instruction.
        exceptions: All exceptions.
        tracebacks: The ids of all traceback entries.
    """

    entries: list[TracebackType]
    exceptions: list[BaseException]
    tracebacks: set[int]


def _fitting(traces: _Traces, frame: FrameType, opname: str) -> list[BaseException]:
    """The exceptions that may be leaving a frame."""
    if opname in _RERAISES:
        return [
            each
            for each in traces.exceptions
            if each.__traceback__ is not None and each.__traceback__.tb_frame is frame
        ]
    # An older exception that the program kept may be from the same place.
    entry = traces.entries[-1] if traces.entries else None
    return [each for each in traces.exceptions if entry and each.__traceback__ is entry]


def _search_older(frame: FrameType, younger: _Traces) -> _Traces:
    """Also search the objects that a collection has just made older."""
    # At most this many objects were made since the second generation's last collection.
    if gc.get_threshold()[0] * gc.get_count()[1] > _MOST_YOUNG:
        return younger
    older = _search(frame, 1)
    return _Traces(
        older.entries + younger.entries,
        older.exceptions + younger.exceptions,
        older.tracebacks | younger.tracebacks,
    )


def _search(frame: FrameType, generation: int) -> _Traces:
    offset = frame.f_lasti
    entries: list[TracebackType] = []
    exceptions: list[BaseException] = []
    tracebacks: set[int] = set()
    for each in gc.get_objects(generation):
        # Not `isinstance`, which calls `__class__` of proxies.
        kind = type(each)
        if kind is TracebackType:
            tracebacks.add(id(each))
            if each.tb_frame is frame and each.tb_lasti == offset:
                entries.append(each)
        elif issubclass(kind, BaseException):
            exceptions.append(each)
    return _Traces(entries, exceptions, tracebacks)


def _is_thrown_in(traceback: TracebackType) -> bool:
    """Whether the exception was thrown into a waiting generator or coroutine.

    This is how generators are closed and tasks are cancelled.
    """
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    return _opname(code, traceback.tb_lasti) in _WAITS


def _is_raised_again(traceback: TracebackType, young: set[int]) -> bool:
    """Whether a `raise` statement has just raised an exception that is old.

    Otherwise, the exception grew old while a `finally` or `with` block or an `except`
    was done with it, and it may be one that stops the program.

    Args:
        traceback: The outermost entry of its traceback.
        young: The ids of young traceback entries.
    """
    while traceback.tb_next is not None and id(traceback.tb_next) in young:
        traceback = traceback.tb_next
    frame, older = traceback.tb_frame, traceback.tb_next
    return _opname(frame.f_code, traceback.tb_lasti) == "RAISE_VARARGS" and (
        older is None or older.tb_frame is not frame
    )


def _is_searchable() -> bool:
    """Whether the youngest objects can be searched now, in a short time."""
    return _has_few_young() and _trial().finds_entries


def _has_few_young() -> bool:
    # A free-threaded build has no generations, so the search would list all objects.
    return "free-threading" not in sys.version and gc.get_count()[0] < _MOST_YOUNG


class _Trial(NamedTuple):
    """Whether a search among the youngest objects finds exceptions here."""

    finds_entries: bool  # of tracebacks
    finds_errors: bool  # the exceptions themselves


class _Dropped:
    """An iterator that notes the result of the search when it is dropped."""

    def __init__(self, found: list[tuple[int, list[int]]]) -> None:
        self._found = found

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return 1

    def __del__(self) -> None:
        frame = sys._getframe(1)
        traces = _search(frame, 0)
        fitting = _fitting(traces, frame, _opname(frame.f_code, frame.f_lasti))
        self._found.append((len(traces.entries), [id(error) for error in fitting]))


@cache
def _trial() -> _Trial:
    """The objects that the garbage collector shows here, by a trial."""
    # A collection during a trial spoils it.
    tried = [_try_endings() for _ in range(3)]
    return _Trial(*map(any, zip(*tried, strict=True)))


def _try_endings() -> _Trial:
    found: list[tuple[int, list[int]]] = []
    errors: list[Exception] = []  # kept, as a program may
    for fail in (_raise, _fail_in_call, _raise_again):
        try:
            fail(found)
        except (ValueError, TypeError) as error:  # noqa: PERF203 (there are three)
            errors.append(error)
    _leave(found)
    finds_errors = [fitting for _, fitting in found] == [*([id(e)] for e in errors), []]
    # They hold this frame and, through it, the frames and the iterator of the loop that
    # is being recognised.
    errors.clear()
    return _Trial([entries for entries, _ in found] == [1, 1, 0, 0], finds_errors)


def _leave(found: list[tuple[int, list[int]]]) -> None:
    for _ in _Dropped(found):
        break


def _raise(found: list[tuple[int, list[int]]]) -> None:
    for _ in _Dropped(found):
        raise ValueError


def _fail_in_call(found: list[tuple[int, list[int]]]) -> None:
    for _ in _Dropped(found):
        int("x")


def _raise_again(found: list[tuple[int, list[int]]]) -> None:
    for _ in _Dropped(found):
        try:
            int([])  # type: ignore[call-overload]  # it is to fail
        except TypeError:  # noqa: PERF203 (there is one round)
            str(found)
            raise
