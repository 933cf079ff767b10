"""Who is taken for a `for` statement, on the Python that runs this."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import pickle
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from otel_kafka_python._processing import loops as _loops

ROUNDS = 3


class Items:
    """An iterable that remembers whether each time it was a loop that asked."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        self.answers: list[bool] = []
        self._left = rounds

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.answers.append(_loops.is_loop(sys._getframe(1)))
        if not self._left:
            raise StopIteration
        self._left -= 1
        return (1, 2)

    def __length_hint__(self) -> int:
        return self._left


def plain(items: Items) -> None:
    for _ in items:
        pass


def unpacking(items: Items) -> None:
    for _a, _b in items:
        pass


def with_else(items: Items) -> None:
    for item in items:
        if not item:
            break
    else:
        pass


def with_continue(items: Items) -> None:
    for item in items:
        if item:
            continue
        print()


def with_break(items: Items) -> None:
    for _ in items:
        break


def with_return(items: Items) -> Any:
    for item in items:
        return item
    return None


def with_try(items: Items) -> None:
    for _ in items:
        try:
            raise ValueError
        except ValueError:
            continue
        finally:
            ""


def with_with(items: Items) -> None:
    for _ in items:
        with contextlib.nullcontext():
            pass


def with_while(items: Items) -> None:
    for item in items:
        while item:
            break


def ending_with_append(items: Items) -> None:
    found = []
    for item in items:
        found.append(item)


def ending_with_display(items: Items) -> None:
    for item in items:
        [*item, item]


def ending_with_comprehension(items: Items) -> None:
    for item in items:
        [x for x in item]


def ending_with_dict_comprehension(items: Items) -> None:
    for item in items:
        {x: x for x in item}


def ending_with_nested_loop(items: Items) -> None:
    for item in items:
        for _ in item:
            pass


def nested_in_loop(items: Items) -> None:
    for _ in (1,):
        for _item in items:
            pass


def of_enumerate(items: Items) -> None:
    for _ in enumerate(items):
        pass


def of_zip(items: Items) -> None:
    for _ in zip(items, itertools.count()):
        pass


def of_islice(items: Items) -> None:
    for _ in itertools.islice(items, ROUNDS + 1):
        pass


def of_chain(items: Items) -> None:
    for _ in itertools.chain(items):
        pass


def of_map(items: Items) -> None:
    for _ in map(str, items):
        pass


def in_generator(items: Items) -> None:
    def generate() -> Iterator[Any]:
        for item in items:
            yield item

    for _ in generate():
        pass


def in_generator_before_it_yields(items: Items) -> None:
    def generate() -> Iterator[Any]:
        for _ in items:
            pass
        yield

    next(generate())


def with_async_comprehension(items: Items) -> None:
    async def loop() -> None:
        for item in items:
            found = [x async for x in _each(item)]
            assert found
            await asyncio.sleep(0)

    asyncio.run(loop())


async def _each(item: Any) -> Any:
    yield item


def of_delegation(items: Items) -> None:
    for _ in _delegate(items):
        pass


def of_generator_expression(items: Items) -> None:
    for _ in (item for item in items if item):
        pass


def of_nested_generator_expressions(items: Items) -> None:
    for _ in (x for item in (item for item in items) for x in item):
        pass


def of_delegation_twice(items: Items) -> None:
    for _ in _delegate(_delegate(items)):
        pass


def in_lambda_called(items: Items) -> None:
    (lambda: plain(items))()


def in_class_body(items: Items) -> None:
    class _Body:
        for _ in items:
            pass


def in_exec(items: Items) -> None:
    exec("for _ in items: pass", {"items": items})  # as a script runs


def in_coroutine(items: Items) -> None:
    async def run() -> None:
        for _ in items:
            await asyncio.sleep(0)

    asyncio.run(run())


def in_thread(items: Items) -> None:
    thread = threading.Thread(target=plain, args=(items,))
    thread.start()
    thread.join()


def with_match(items: Items) -> None:
    for item in items:
        match item:
            case (1, _):
                pass


def with_large_body(items: Items) -> None:
    # The jumps of such a loop need EXTENDED_ARG.
    body = "\n".join(f"    x{n} = {n} + len(item)" for n in range(3000))
    exec(f"for item in items:\n{body}", {"items": items})


def with_large_body_before(items: Items) -> None:
    body = "\n".join(f"x{n} = {n}.5" for n in range(3000))
    exec(f"{body}\nfor item in items:\n    item", {"items": items})


LOOPS = [
    plain, unpacking, with_else, with_continue, with_break, with_return, with_try,
    with_with, with_while, ending_with_append, ending_with_display,
    ending_with_comprehension, ending_with_dict_comprehension, ending_with_nested_loop,
    nested_in_loop, of_enumerate, of_zip, of_islice, of_chain, of_map, in_generator,
    in_generator_before_it_yields, with_async_comprehension,
    of_delegation, of_delegation_twice, of_generator_expression,
    of_nested_generator_expressions, in_lambda_called, in_class_body,
    in_exec, in_coroutine, in_thread, with_match,
    with_large_body, with_large_body_before,
]  # fmt: skip


async def _async_comprehension(items: Items) -> Any:
    async def each() -> Any:
        yield 1

    return [y async for _ in each() for y in items]


async def _async_generator_expression(items: Items) -> Any:
    async def same(item: Any) -> Any:
        return item

    return [each async for each in (await same(item) for item in items)]


def _as_argument(*arguments: Any) -> int:
    return len(arguments)


OTHERS: dict[str, Callable[[Items], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "sorted": sorted,
    "deque": deque,
    "join": lambda items: ",".join(map(str, items)),
    "any": lambda items: any(not item for item in items),
    "all": lambda items: all(item for item in items),
    "tuple of genexpr": lambda items: tuple(item for item in items),
    "set of genexpr": lambda items: set(item for item in items),
    "max": max,
    "extend": lambda items: [].extend(items),
    "star": lambda items: [*items],
    "call": lambda items: _as_argument(*items),
    "unpacking": lambda items: exec("a, b, c = items", {"items": items}),
    "in": lambda items: 7 in items,
    "next": lambda items: [next(items), next(items, None)],
    "listcomp": lambda items: [item for item in items],
    "listcomp with if": lambda items: [item for item in items if item],
    "listcomp with else": lambda items: [1 if item else 2 for item in items],
    "listcomp with and": lambda items: [
        i for i in items if (i and len(i) > 1) or not i
    ],
    "outer of two": lambda items: [x for item in items for x in item],
    "inner of two": lambda items: [item for _ in (1,) for item in items],
    "nested listcomp": lambda items: [[x for x in item] for item in items],
    "setcomp": lambda items: {item for item in items},
    "outer of setcomp": lambda items: {x for item in items for x in item},
    "dictcomp": lambda items: dict.fromkeys(items, 1),
    "outer of dictcomp": lambda items: {x: 1 for item in items for x in item},
    "genexpr": lambda items: list(item for item in items),
    "sum of genexpr": lambda items: sum(1 for item in items),
    "next of genexpr": lambda items: next(item for item in items),
    "listcomp of genexpr": lambda items: [x for x in (item for item in items)],
    "async genexpr": lambda items: asyncio.run(_async_generator_expression(items)),
    "async comprehension": lambda items: asyncio.run(_async_comprehension(items)),
    "yield from": lambda items: list(_delegate(items)),
    "next of yield from": lambda items: next(_delegate(items)),
    "listcomp of yield from": lambda items: [item for item in _delegate(items)],
    "list of generator": lambda items: list(_generate(items)),
    "next of generator": lambda items: next(_generate(items)),
    "pool of generator": lambda items: list(_pool_map(_generate(items))),
    "frozen library": lambda items: _Appended().extend(items),
    "pool.map": lambda items: list(_pool_map(items)),
    "run_in_executor": lambda items: asyncio.run(_in_executor(items)),
    "json": lambda items: json.dumps(list(items)),
    "json with indent": lambda items: json.dumps(_Listed(items), indent=1),
    "copy": lambda items: copy.copy(_Listed(items)),
    "pickle": lambda items: pickle.dumps(list(items)),
    "filter": lambda items: list(filter(None, items)),
    "chain": lambda items: list(itertools.chain(items, ())),
}


if sys.version_info >= (3, 15):
    for _unpacking in (
        "[*item for item in items]",
        "{*item for item in items}",
        "{**{item: 1} for item in items}",
        "list(*item for item in items)",
        "[*item for item in items if item]",
        "[*x for item in items for x in (item,)]",
    ):
        OTHERS[_unpacking] = lambda items, text=_unpacking: eval(text, {"items": items})


def _delegate(items: Any) -> Iterator[Any]:
    yield from items


def _generate(items: Any) -> Iterator[Any]:
    for item in items:
        yield item


class _Appended(MutableSequence):  # type: ignore[type-arg]  # anything
    """A sequence whose `extend` is the standard library's loop."""

    def __getitem__(self, index: Any) -> Any:
        raise IndexError

    def __setitem__(self, index: Any, value: Any) -> None:
        raise NotImplementedError

    def __delitem__(self, index: Any) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        return 0

    def insert(self, index: int, value: Any) -> None:
        pass


def _pool_map(items: Iterator[Any]) -> Iterator[Any]:
    with ThreadPoolExecutor(1) as pool:
        return pool.map(str, items)


async def _in_executor(items: Items) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, next, items)


class _Listed(list):  # type: ignore[type-arg]  # anything
    """A list that iterates over something else."""

    def __init__(self, items: Items) -> None:
        super().__init__([1])
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return self._items

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self._items),)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_for_statement_is_a_loop(loop: Callable[[Items], Any]) -> None:
    items = Items()
    loop(items)
    assert items.answers
    assert all(items.answers)


@pytest.mark.parametrize("ask", OTHERS.values(), ids=OTHERS)
def test_nothing_else_is_a_loop(ask: Callable[[Items], Any]) -> None:
    items = Items()
    with contextlib.suppress(StopIteration):
        ask(items)
    assert items.answers
    assert not any(items.answers)


def test_a_generator_is_asked_by_whoever_resumes_it() -> None:
    items = Items()
    generator = _delegate(items)
    next(generator)
    for _ in generator:
        break
    next(generator)
    assert items.answers == [False, True, False]


@contextlib.contextmanager
def _settrace() -> Iterator[None]:
    def trace(frame: Any, event: str, arg: Any) -> Any:
        frame.f_trace_opcodes = True
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def _monitoring() -> Iterator[None]:
    monitoring: Any = getattr(sys, "monitoring", None)
    if monitoring is None:
        pytest.skip("sys.monitoring is new in Python 3.12")
    tool = monitoring.PROFILER_ID
    monitoring.use_tool_id(tool, "test")
    events = monitoring.events
    monitoring.register_callback(tool, events.INSTRUCTION, lambda *_: None)
    monitoring.register_callback(tool, events.BRANCH, lambda *_: None)
    monitoring.set_events(tool, events.INSTRUCTION | events.BRANCH | events.LINE)
    try:
        yield
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


@pytest.mark.parametrize("watched", [_settrace, _monitoring])
def test_debuggers_and_coverage_change_nothing(watched: Callable[[], Any]) -> None:
    loops = [(loop, Items()) for loop in (plain, ending_with_comprehension, of_zip)]
    others = [(OTHERS[name], Items()) for name in ("listcomp", "outer of two", "list")]
    _loops.asker_at.cache_clear()
    with watched():
        for ask, items in loops + others:
            ask(items)
    assert all(answer for _, items in loops for answer in items.answers)
    assert not any(answer for _, items in others for answer in items.answers)


def test_after_many_rounds_the_answer_is_the_same() -> None:
    """CPython rewrites a loop's instructions once it is warm."""
    for _ in range(100):
        items = Items(100)
        _loops.asker_at.cache_clear()
        plain(items)
        assert all(items.answers)


def test_code_of_another_file_is_not_taken_for_it(tmp_path: Path) -> None:
    """The equality of code objects leaves their file out."""
    text = "for _ in items: pass"
    library = compile(text, str(Path(asyncio.__file__)), "exec")
    program = compile(text, str(tmp_path / "program.py"), "exec")
    assert library == program
    answers = []
    for code in (library, program, library):
        items = Items()
        exec(code, {"items": items})
        answers.append(any(items.answers))
    assert answers == [False, True, False]


def test_an_instruction_is_named_at_its_prefixes_and_caches_too() -> None:
    lines = [f"name{number} = {number}" for number in range(300)]
    code = compile("\n".join([*lines, "print(name299)"]), "", "exec")
    named = {_loops._opname(code, at) for at in range(0, len(code.co_code), 2)}
    assert "STORE_NAME" in named
    assert not named & {"EXTENDED_ARG", "CACHE"}


def test_without_a_frame_there_is_no_loop() -> None:
    assert _loops.is_loop(None) is False


def test_bytecode_that_is_not_understood_is_no_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a version of Python that is yet to come: no broker has a part in it."""

    def misread(code: CodeType, offset: int) -> Any:
        raise IndexError

    monkeypatch.setattr(_loops, "_read", misread)
    _loops._is_trusted.cache_clear()
    _loops.asker_at.cache_clear()
    items = Items()
    plain(items)
    _loops._is_trusted.cache_clear()
    _loops.asker_at.cache_clear()
    assert not any(items.answers)


def test_on_another_interpreter_nothing_is_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would not drop the iterator at the end of the loop."""
    monkeypatch.setattr(sys.implementation, "name", "pypy")
    assert _loops._is_trusted.__wrapped__() is False
