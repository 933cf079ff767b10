"""How a loop ended, as its iterator can tell when it is dropped.

Hypothesis makes up programs out of the statements that can end a loop or keep it from
ending. Each runs twice: with an `except` around each loop, which knows how the loop
ended, and with iterators that look for themselves.
`OTEL_KAFKA_PYTHON_LOOP_PROGRAMS=20000` tries so many, and others each time.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otel_kafka_python._processing import loops

PROGRAMS = int(os.environ.get("OTEL_KAFKA_PYTHON_LOOP_PROGRAMS", "0"))
NAMES = sys.version_info >= (3, 12)
ROUNDS = 3

# How a loop ended: what the exception is, "_OTHER" of one that is not told, or nothing.
Ending = tuple[str, str] | str | None


def described(error: BaseException) -> Ending:
    """The ending that an exception makes; a clean stop is none."""
    if not isinstance(error, Exception):
        return None
    return (type(error).__name__, str(error)) if NAMES else "_OTHER"


class Items:
    """An iterator that tells how its loop ended."""

    def __init__(self, tell: Callable[[Ending], None]) -> None:
        self._tell = tell
        self._left = ROUNDS
        self._code: CodeType | None = None
        self._asker = loops.Asker.OTHER
        self._stops = 0
        self.is_done = False

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        frame = sys._getframe(1)
        if frame.f_code is not self._code:
            code = self._code = frame.f_code
            self._asker = loops.asker_at(code, code.co_filename, frame.f_lasti)
            self._stops = loops.references_to_stops()
        if not self._left:
            self.is_done = True
            raise StopIteration
        self._left -= 1
        return self._left

    def __del__(self) -> None:
        if self.is_done:
            self._tell(None)
            return
        frame = sys._getframe().f_back
        found = loops.failure(frame, self._code, self._asker, self._stops)
        if found is None:
            self._tell(None)
        else:
            self._tell("_OTHER" if found.error is None else described(found.error))


class Program:
    """A made-up program, as text."""

    def __init__(self, draw: Any, kind: str) -> None:
        self._draw = draw
        self._kind = kind
        self._numbers = iter(range(10**6))
        self.has_stops = False
        self.lines = ["if 1:", *_indented(self._loop(2))]
        if self._pick(2):
            self.lines = ["try:", *_indented(self.lines), "except Exception: pass"]
        if self._pick(2):
            self.lines = ["while tick():", *_indented(self.lines)]

    def _pick(self, count: int) -> int:
        return int(self._draw(st.integers(0, count - 1)))

    def _block(self, depth: int, in_loop: bool) -> list[str]:
        lines: list[str] = []
        for _ in range(1 + self._pick(2)):
            lines += self._statement(depth, in_loop)
        return _indented(lines)

    def _statement(self, depth: int, in_loop: bool) -> list[str]:
        choices = [self._raise, self._simple, self._leave]
        if depth:
            choices += [self._try, self._try, self._if, self._with, self._inner]
        choice = choices[self._pick(len(choices))]
        if choice is self._leave:
            return self._leave(depth, in_loop)
        return choice(depth, in_loop)

    def _raise(self, depth: int, in_loop: bool) -> list[str]:
        number = next(self._numbers)
        raising = [
            f"raise ValueError({number})", f"raise KeyError({number}) from None",
            f"raise LookupError({number})", "raise", "assert not str(1)", "int('x')",
            "{}['k']", "None.attribute", "1 / (1 - len('1'))", "[int(x) for x in '1a']",
            "del unknown", "a, b = 1, 2, 3", "raise_it()", "again(KeyError('old'))",
            "raise SystemExit", "sys.exit(3)", "raise KeyboardInterrupt",
            *(["raise GeneratorExit"] if NAMES else []),
            *(["await failing()"] if self._kind == "coroutine" else []),
        ]  # fmt: skip
        line = raising[self._pick(len(raising))]
        self.has_stops |= "Exit" in line or "exit" in line or "Interrupt" in line
        return [line]

    def _simple(self, depth: int, in_loop: bool) -> list[str]:
        return [["pass", "x = str(1)", "[y for y in (1, 2)]"][self._pick(3)]]

    def _leave(self, depth: int, in_loop: bool) -> list[str]:
        ways = ["break", "continue"] if in_loop else []
        if self._kind not in ("module", "class"):
            ways.append("return")
        return [ways[self._pick(len(ways))]] if ways else ["pass"]

    def _try(self, depth: int, in_loop: bool) -> list[str]:
        lines = ["try:", *self._block(depth - 1, in_loop)]
        form = self._pick(4)
        if form != 1:
            caught = [
                "Exception",
                "ValueError",
                "(KeyError, TypeError)",
                "BaseException",
            ]
            named = ["", " as e"][self._pick(2)]
            lines += [f"except {caught[self._pick(4)]}{named}:"]
            lines += self._block(depth - 1, in_loop)
        if form == 2:
            lines += ["else:", *self._block(depth - 1, in_loop)]
        if form in (1, 3):
            lines += ["finally:", *self._block(depth - 1, in_loop)]
        return lines

    def _if(self, depth: int, in_loop: bool) -> list[str]:
        condition = ["item", "not item", "item % 2"][self._pick(3)]
        lines = [f"if {condition}:", *self._block(depth - 1, in_loop)]
        if self._pick(2):
            lines += ["else:", *self._block(depth - 1, in_loop)]
        return lines

    def _with(self, depth: int, in_loop: bool) -> list[str]:
        return [f"with Guard({self._pick(2)}):", *self._block(depth - 1, in_loop)]

    def _inner(self, depth: int, in_loop: bool) -> list[str]:
        head = ["for z in range(2):", "while tick():", ""][self._pick(3)]
        if not head:
            return self._loop(depth - 1)
        return [head, *self._block(depth - 1, in_loop=True)]

    def _loop(self, depth: int) -> list[str]:
        number = next(self._numbers)
        items = [
            f"items({number})", f"handed(items, {number})",
            f"(i for i in items({number}))", f"enumerate(items({number}))",
        ][self._pick(4)]  # fmt: skip
        lines = [f"for item in {items}:", *self._block(depth, in_loop=True)]
        if "enumerate" in items:
            lines.insert(1, "    item = item[0]")
        if not self._pick(3):
            # What is raised there ends no loop any more.
            lines += ["else:", "    over()", *self._block(0, in_loop=False)]
        return [f"begin({number})", f"try:{_TO_KNOW}", *_indented(lines), *_KNOWING]

    def text(self, *, knowing: bool) -> str:
        lines = self.lines
        if not knowing:
            lines = [line.replace(f"try:{_TO_KNOW}", "if 1:") for line in lines]
            lines = [line for line in lines if not line.endswith(_TO_KNOW)]
        if self._kind == "class":
            lines = ["class Body:", *_indented(lines)]
        elif self._kind != "module":
            head = "async def" if self._kind == "coroutine" else "def"
            made = ["    if 0: yield"] if self._kind == "generator" else []
            lines = [f"{head} program():", *made, *_indented(lines)]
        return "\n".join(lines)

    def run(self, *, knowing: bool) -> list[tuple[int, Ending]]:
        """Run it, and say how each loop ended, in the order of their ends."""
        run = Run(knowing)
        code = self._code(knowing=knowing)
        try:
            names = run.names()
            exec(code, names)
            if self._kind == "function":
                names["program"]()
            elif self._kind == "generator":
                for _ in names["program"]():
                    pass
            elif self._kind == "coroutine":
                names["program"]().send(None)
        except BaseException:  # a clean stop, too
            pass
        return run.endings

    def _code(self, *, knowing: bool) -> CodeType:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a `return` in `finally`, say
            return compile(self.text(knowing=knowing), "program.py", "exec")


_TO_KNOW = "  # to know"
_KNOWING = [
    f"except BaseException as error: ended(error); raise{_TO_KNOW}",
    f"finally: finish(){_TO_KNOW}",
]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


class Guard:
    """A context manager that swallows exceptions, or not."""

    def __init__(self, swallows: int) -> None:
        self._swallows = swallows

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> bool:
        return bool(self._swallows) and isinstance(error, Exception)


def again(error: Exception) -> None:
    raise error


def raise_it() -> None:
    try:
        again(TypeError("it"))
    finally:
        str(1)


async def failing() -> None:
    raise_it()


def handed(items: Callable[[int], Any], number: int) -> Iterator[int]:
    for item in items(number):
        yield item


class Run:
    """What a program is given, and how its loops ended."""

    def __init__(self, knowing: bool) -> None:
        self.endings: list[tuple[int, Ending]] = []
        self._knowing = knowing
        # Of the loops that are running: number, how it ended, whether that was told.
        self._running: list[tuple[int, list[Ending]]] = []
        self._ticks = 20

    def names(self) -> dict[str, Any]:
        return {
            "begin": self.begin, "ended": self.ended, "over": self.over,
            "finish": self.finish, "items": self.items, "tick": self.tick, "sys": sys,
            "handed": handed, "Guard": Guard, "again": again, "raise_it": raise_it,
            "failing": failing,
        }  # fmt: skip

    def tick(self) -> bool:
        self._ticks -= 1
        return self._ticks > 0

    def items(self, number: int) -> Any:
        if self._knowing:
            return iter(range(ROUNDS - 1, -1, -1))
        return Items(lambda ending: self.endings.append((number, ending)))

    def begin(self, number: int) -> None:
        if self._knowing:
            self._running.append((number, []))

    def ended(self, error: BaseException) -> None:
        self._running[-1][1].append(described(error))

    def over(self) -> None:
        if self._knowing:
            number, endings = self._running[-1]
            endings.append(None)
            self.endings.append((number, None))
            self._running[-1] = (-1, endings)

    def finish(self) -> None:
        number, endings = self._running.pop()
        if number >= 0:
            self.endings.append((number, endings[0] if endings else None))


def check(program: Program) -> None:
    expected = program.run(knowing=True)
    gc.collect(1)
    gc.disable()  # in the midst of an ending it would hide the exception
    try:
        found = program.run(knowing=False)
    finally:
        gc.enable()
    assert len(found) == len(expected)
    for index, (number, ending) in enumerate(found):
        _, known = expected[index]
        # One of several exceptions is not told, and not claimed if it may be a stop.
        is_modest = known and (ending == "_OTHER" or (not ending and program.has_stops))
        if is_modest:
            expected[index] = number, ending
    assert found == expected, program.text(knowing=False)


KINDS = ["function", "module", "class", "coroutine", "generator"]


@settings(
    max_examples=PROGRAMS or 200,
    derandomize=not PROGRAMS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_no_program_has_its_loops_end_otherwise_than_they_do(
    data: st.DataObject, kind: str
) -> None:
    program = Program(data.draw, kind)
    check(program)


def test_where_references_are_not_counted_none_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(sys, "getrefcount", raising=False)
    assert loops.references_to_stops() == 0
