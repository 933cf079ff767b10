"""Whether a `for` statement is asking for the next record.

A pull API has no callback: only the loop that asks for the next record shows
how long the one before it was being processed. An iterator is asked in many
other ways (`list`, `sorted`, a comprehension, `next` in a thread pool) by whom
no record is processed, and which would leave a context attached behind them. So
the iterator looks at the instruction that asks it, in the frame that calls it.

The answer needs CPython's bytecode. It is tried on a few shapes of loops before
it is believed; where it cannot be had, no loop is seen.
"""

from __future__ import annotations

import dis
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum, auto
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, FrameType

from otel_kafka_python._safety import raise_signalled

_COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>"})
_DELEGATIONS = frozenset({"SEND", "YIELD_FROM"})
_YIELDS = _DELEGATIONS | {"YIELD_VALUE"}
_APPENDS = frozenset(
    {"LIST_APPEND", "SET_ADD", "MAP_ADD", "LIST_EXTEND", "SET_UPDATE", "DICT_UPDATE"}
)
# What stands between the last instruction of a loop's body and the first after
# it; several in a row where the loop is the end of another loop's body.
_LOOP_ENDS = frozenset(
    {"JUMP_BACKWARD", "END_FOR", "POP_ITER", "END_ASYNC_FOR", "NOP", "EXTENDED_ARG"}
)

_STANDARD_LIBRARY = str(Path(dis.__file__).parent) + os.sep
_THIRD_PARTY = ("site-packages", "dist-packages")


class Asker(Enum):
    """What kind of instruction asks for the next item."""

    LOOP = auto()
    # A generator's loop that yields, a generator expression's too, or its `yield
    # from`: nothing but a loop over the generator bounds what happens to an item.
    GENERATOR = auto()
    OTHER = auto()


def is_loop(frame: FrameType | None) -> bool:
    """Whether a `for` statement is what now asks for the next item.

    `enumerate`, `zip` and other iterators written in C are seen as the `for`
    that they stand in, and so is a generator that hands the items on.

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
    """What the instruction at `offset` of `code` is, as far as that is known.

    Args:
        code: The code.
        filename: Its file, which the equality of code objects leaves out.
        offset: The offset of the instruction, as `f_lasti` gives it.
    """
    if not _is_trusted() or _is_library(filename):
        return Asker.OTHER
    return _read(code, offset)


def _is_library(filename: str) -> bool:
    # The loops of the standard library copy, write or hand on what they are
    # given (json with an indent, multiprocessing's pools); they process nothing.
    if filename.startswith("<frozen "):
        return True
    return filename.startswith(_STANDARD_LIBRARY) and not any(
        part in filename for part in _THIRD_PARTY
    )


def _read(code: CodeType, offset: int) -> Asker:
    is_generator = bool(code.co_flags & inspect.CO_GENERATOR)
    if code.co_name in _COMPREHENSIONS or (
        code.co_name == "<genexpr>" and not is_generator  # but an asynchronous one
    ):
        return Asker.OTHER
    instructions = list(dis.get_instructions(code))
    index = _index_of(instructions, offset)
    asking = instructions[index]
    if asking.opname in _DELEGATIONS:
        return Asker.GENERATOR
    # Since 3.14 `any` and `all` of a generator expression loop inline. They test an
    # item, where a statement stores it.
    if asking.opname != "FOR_ITER" or instructions[index + 1].opname == "TO_BOOL":
        return Asker.OTHER
    # Since 3.12 a comprehension stands inline in the code around it. It differs
    # from a statement in that each round of its loop ends with an append.
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
    # The offset may be that of an inline cache behind the instruction, or of an
    # EXTENDED_ARG before it.
    index = max(i for i, each in enumerate(instructions) if each.offset <= offset)
    while instructions[index].opname == "EXTENDED_ARG":
        index += 1
    return index


def _last_of_body(instructions: list[dis.Instruction], back: int) -> str:
    """What a loop's body ends with, before the jump `back` to the loop's start."""
    for index in range(back - 1, 0, -1):
        name = instructions[index].opname
        before = instructions[index - 1].opname
        if name == "POP_TOP" and before == "END_FOR":
            continue
        if name not in _LOOP_ENDS:
            return name
    return ""


class _Probe:
    """Three items, and whether each time it was a loop that asked."""

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
    """Whether this interpreter's bytecode is understood, found out by trying.

    An interpreter without reference counts would not drop an iterator at the end
    of its loop, so on no other than CPython would the end be seen.
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
    # What is no syntax before Python 3.15 has to be compiled to be tried.
    for unpacking in ("[*i for i in it]", "{*i for i in it}", "{**{i: 1} for i in it}"):
        probe = _Probe()
        with suppress(SyntaxError):
            eval(unpacking, {"it": probe})  # noqa: S307 (it is one of these)
            probes.append(probe)
    return [answer for probe in probes for answer in probe.answers]
