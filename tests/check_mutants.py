"""Change one thing after another in the modules that decide things; who notices?

    tox -e mutants                            # all of them
    tox -e mutants -- _endings                # of one module
    tox -e mutants -- _endings --at-most 20   # some of them, at random

A mutant is a module with one change: a condition is true or false, a comparison turned
round, a statement gone, a handler that catches nothing. The tests of the module that
execute the changed line are run, the quickest first, and then those that start
processes, until one fails. A mutant that no test kills is printed. Those of
`tests/mutants.json` are known, each with the reason why no test can or need kill it;
any other fails the run, and so does an entry that fits none.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "src/otel_kafka_python"
KNOWN = ROOT / "tests" / "mutants.json"

# The tests that belong to each module.
TESTS = {
    "_propagation": ("headers", "send", "pipeline_latency", "captures", "bad_input"),
    "_processing/scopes": (
        *("scopes", "next", "process_span", "lifecycle", "headers", "send"),
        *("consume", "loop_failures"),
    ),
    "_processing/spans": (
        *("scopes", "process_span", "consume", "pipeline_latency", "next", "settings"),
        *("captures", "headers"),
    ),
    "_operation": (
        *("send", "metrics", "lifecycle", "exceptions", "next", "settlement"),
        *("settings", "span_ends", "transactions", "concurrency"),
    ),
    "_endings": ("lifecycle", "scopes"),
    "_commits": ("settlement",),
    "_transactions": ("transactions",),
    "_telemetry": (
        *("settings", "metrics", "consume", "send", "pipeline_latency", "captures"),
        *("own_metrics", "exceptions", "instrumentor", "transactions", "bad_input"),
    ),
}

# What takes long to import and does not import the package. Each run forks from a
# process that has it.
IMPORTS = (
    "clients",
    "opentelemetry.instrumentation.instrumentor",
    "opentelemetry.sdk._logs.export",
    "opentelemetry.sdk.metrics.export",
    "opentelemetry.sdk.trace.export",
)

# How many seconds of tests a mutant gets at first. Those that live and are not listed
# get all of its module's.
QUICK = 8.0

# Parts of a module that decide nothing; annotations are never evaluated.
NO_DECISIONS = {"annotation", "decorator_list", "returns"}

TURNED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
}
SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}


@dataclass
class Mutant:
    """A module with one change."""

    module: str
    definition: str
    line: str
    change: str
    numbers: range  # of the changed lines
    source: str

    def facts(self) -> dict[str, str]:
        return {
            "module": self.module,
            "definition": self.definition,
            "line": self.line,
            "change": self.change,
        }


def changed(  # noqa: C901, PLR0912 (it is a table)
    node: ast.AST, role: str, parent: ast.AST
) -> Iterator[Any]:
    """What can stand for a node: other nodes, or a list of statements.

    Args:
        node: The node.
        role: The name of its parent's field.
        parent: Its parent.
    """
    is_value = role not in ("test", "ifs", "values")
    if isinstance(parent, ast.BoolOp) and role == "values":
        yield ast.Constant(isinstance(parent.op, ast.And))  # as if it were not there
    elif role in ("test", "ifs"):
        if not isinstance(parent, ast.While):  # it would never end
            yield ast.Constant(value=True)
        yield ast.Constant(value=False)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(value=not node.value)
    match node:
        case ast.Compare(left, [op], right):
            if is_value or len(TURNED[type(op)]) > 1:
                for turned in TURNED[type(op)]:
                    yield ast.Compare(left, [turned()], right)
        case ast.Constant(int(number)) if type(number) is int:
            yield ast.Constant(number + 1)
        case ast.BinOp(left, op, right) if type(op) in SWAPPED:
            yield ast.BinOp(left, SWAPPED[type(op)](), right)
        case ast.Call(function, arguments, keywords):
            for each in keywords:
                kept = [other for other in keywords if other is not each]
                yield ast.Call(function, arguments, kept)
        case ast.Return(value) if value and not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case (
            ast.Assign([ast.Attribute() | ast.Subscript(), *_])
            | ast.AugAssign()
            | ast.Delete()
            | ast.Raise()
        ):
            yield ast.Pass()
        case ast.AnnAssign(ast.Attribute(), value=ast.expr()):
            yield ast.Pass()
        case ast.Expr(value) if not isinstance(value, ast.Constant):
            yield ast.Pass()
        case ast.Try(body, handlers, orelse, [_, *_] as last):
            tried = [ast.Try(body, handlers, orelse, [])] if handlers else body
            yield [*tried, *last]
        case ast.ExceptHandler(ast.expr() as caught, name, body):
            yield ast.ExceptHandler(ast.Tuple([], ast.Load()), name, body)
            if ast.unparse(caught) == "BaseException":
                yield ast.ExceptHandler(ast.Name("Exception", ast.Load()), name, body)


def places(
    parent: ast.AST, names: tuple[str, ...] = (), first: int = 0
) -> Iterator[tuple[ast.AST, str, int | None, Any, tuple[str, ...], int]]:
    """Each node's place, the names of the definitions, its statement's first line."""
    for role, value in ast.iter_fields(parent):
        if role in NO_DECISIONS:
            continue
        for number, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST) or isinstance(node, ast.Assert):
                continue
            index = number if isinstance(value, list) else None
            start = node.lineno if isinstance(node, ast.stmt) else first
            yield parent, role, index, node, names, start
            inner = names
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = *names, node.name
            yield from places(node, inner, start)


def mutants_of(module: str) -> Iterator[Mutant]:
    source = (ROOT / PACKAGE / f"{module}.py").read_text()
    tree = ast.parse(source)
    lines = source.splitlines()
    for parent, role, index, node, names, first in list(places(tree)):
        siblings = getattr(parent, role)
        for new in changed(node, role, parent):
            if index is None:
                setattr(parent, role, new)
            else:
                put = new if isinstance(new, list) else [new]
                setattr(parent, role, [*siblings[:index], *put, *siblings[index + 1 :]])
            mutated = ast.unparse(ast.fix_missing_locations(tree))
            setattr(parent, role, siblings)
            numbers = range(first, getattr(node, "end_lineno", first) + 1)
            if isinstance(node, ast.Try | ast.ExceptHandler):
                numbers = range(node.lineno, node.body[0].lineno + 1)
            yield Mutant(
                module,
                ".".join(names),
                lines[getattr(node, "lineno", first) - 1].strip(),
                f"{_said(node)} -> {_said(new)}",
                numbers,
                mutated,
            )


def _said(node: Any) -> str:
    if isinstance(node, list):
        return "without finally"
    return ast.unparse(node).splitlines()[0]


def copy_of_the_repository(target: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


class Chosen:
    """A plugin that runs some tests in a given order."""

    def __init__(self, tests: list[str]) -> None:
        self._rank = {test: number for number, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self._rank]
        items[:] = sorted(chosen, key=lambda item: self._rank[item.nodeid])


class Observed:
    """A plugin that measures each test, and notes what it executes."""

    def __init__(self) -> None:
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[f"*/{PACKAGE}/*"]
        )
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.starting: set[str] = set()  # those that start processes
        self._running: str | None = None
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _: object) -> None:
        if self._running and event in ("os.fork", "os.posix_spawn", "subprocess.Popen"):
            self.starting.add(self._running)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self.coverage.switch_context("")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        self._running = item.nodeid
        try:
            return (yield)
        finally:
            self._running = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration


def run_tests(copy: Path, tests: Iterable[str], plugin: object) -> int:
    """Run tests in a copy of the repository, in a process that ends with this."""
    os.chdir(copy)
    log = os.open(copy / "mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Before an installed one, also in processes that tests start.
    sys.path.insert(0, str(copy / "src"))
    os.environ["PYTHONPATH"] = str(copy / "src")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # takes as long as a quick test
    options = ["-q", "-x", "-p", "no:cacheprovider", "--broker", "embedded"]
    options += ["-k", "not job_queue"]  # these need another program, and take long
    return int(pytest.main([*options, *tests], [plugin]))


def files_of(module: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in TESTS[module]]


def fork(run: Callable[[], int]) -> int:
    """Start a process that ends with what a function returns."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = run()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


@dataclass
class Seen:
    """What a run without any change has shown."""

    seconds: dict[str, float]
    starting: list[str]
    tests: dict[str, dict[str, list[str]]]  # by module and by line


def see(copy: Path, modules: list[str]) -> Seen:
    """Run all tests once; where one fails, no mutant can be judged."""
    result = copy / "seen.json"
    result.touch()

    def run() -> int:
        observed = Observed()
        observed.coverage.start()
        files = sorted({name for module in modules for name in files_of(module)})
        code = run_tests(copy, files, observed)
        observed.coverage.stop()
        data = observed.coverage.get_data()
        tests = {
            module: data.contexts_by_lineno(str(copy / PACKAGE / f"{module}.py"))
            for module in modules
        }
        starting = sorted(observed.starting)
        seen = {"seconds": observed.seconds, "starting": starting, "tests": tests}
        result.write_text(json.dumps(seen))
        return code

    _, status = os.waitpid(fork(run), 0)
    if status:
        sys.exit((copy / "mutant.log").read_text())
    return Seen(**json.loads(result.read_text()))


def choose(mutant: Mutant, seen: Seen, most: float) -> list[str]:
    """The tests that may kill a mutant, for some seconds.

    The quick ones of each file come first, and those that start processes last.
    """
    of_module = {
        test
        for test in seen.seconds
        if test.partition("::")[0] in files_of(mutant.module)
    }
    by_line = seen.tests[mutant.module]
    found = {test for number in mutant.numbers for test in by_line.get(str(number), ())}
    # A line that only the import or another process executes concerns all.
    found.discard("")
    chosen = of_module & (found | set(seen.starting)) if found else of_module
    ranks: defaultdict[str, Iterator[int]] = defaultdict(count)
    rank = {
        test: next(ranks[test.partition("::")[0]])
        for test in sorted(chosen, key=lambda test: seen.seconds[test])
    }
    ordered = sorted(chosen, key=lambda test: (test in seen.starting, rank[test]))
    sums = accumulate(seen.seconds[test] for test in ordered)
    return [test for test, so_far in zip(ordered, sums, strict=True) if so_far <= most]


def tried(
    mutants: Iterable[Mutant], seen: Seen, copies: list[Path], most: float = math.inf
) -> Iterator[tuple[Mutant, int]]:
    """Run tests of each mutant, for so many seconds, one in each copy at a time.

    Returns:
        The mutants with the statuses of their processes.
    """
    waiting, clock = iter(mutants), count(1)
    running: dict[int, tuple[Mutant, Path]] = {}
    free = list(copies)
    while True:
        while free and (mutant := next(waiting, None)):
            copy = free.pop()
            write(copy, mutant.module, mutant.source, next(clock))
            tests = choose(mutant, seen, most)
            seconds = sum(seen.seconds[test] for test in tests)
            child = fork(partial(try_one, copy, tests, int(60 + 10 * seconds)))
            running[child] = mutant, copy
        if not running:
            return
        child, status = os.wait()
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests have started
        mutant, copy = running.pop(child)
        original = (ROOT / PACKAGE / f"{mutant.module}.py").read_text()
        write(copy, mutant.module, original, next(clock))
        free.append(copy)
        yield mutant, status


def living(
    mutants: Iterable[Mutant], seen: Seen, copies: list[Path], most: float = math.inf
) -> Iterator[tuple[Mutant, bool]]:
    """The mutants that no test kills, and whether their tests did not end.

    On a busy machine, any test may not end in time, so a mutant that only lets its
    tests wait is not killed.
    """
    for mutant, status in tried(mutants, seen, copies, most):
        if status == 0 or os.WIFSIGNALED(status):
            yield mutant, bool(status)


def try_one(copy: Path, tests: list[str], most: int) -> int:
    os.setsid()
    signal.alarm(most)
    files = {test.partition("::")[0] for test in tests}
    return run_tests(copy, sorted(files), Chosen(tests))


def write(copy: Path, module: str, source: str, time: int) -> None:
    """Write a module, with a time by which Python sees that it has changed."""
    place = copy / PACKAGE / f"{module}.py"
    place.write_text(source)
    os.utime(place, (time, time))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="MODULE")
    parser.add_argument("--at-most", type=int, help="try so many of each, at random")
    parser.add_argument("--jobs", type=int, default=4, help="at the same time")
    arguments = parser.parse_args()
    known: list[dict[str, str]] = json.loads(KNOWN.read_text())
    for name in IMPORTS:
        importlib.import_module(name)
    chosen: list[Mutant] = []
    failures = 0
    for module in arguments.modules:
        mutants = list(mutants_of(module))
        if arguments.at_most is not None:
            mutants = random.sample(mutants, min(arguments.at_most, len(mutants)))
        chosen += mutants
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder, str(number)) for number in range(arguments.jobs)]
        for copy in copies:
            copy_of_the_repository(copy)
        seen = see(copies[0], arguments.modules)
        survived = [each for each, _ in living(chosen, seen, copies, QUICK)]
        listed = [each for each in survived if any(fits(one, each) for one in known)]
        doubted = [each for each in survived if each not in listed]
        for mutant, timed_out in living(doubted, seen, copies):
            failures += 1
            print(json.dumps({**mutant.facts(), "timed out": timed_out}), flush=True)
    killed = len(chosen) - len(listed) - failures
    print(
        f"{len(chosen)} mutants: {killed} killed, {len(listed)} listed, {failures} live"
    )
    if arguments.at_most is None:
        for one in known:
            is_fit = any(fits(one, each) for each in listed)
            if one["module"] in arguments.modules and not is_fit:
                failures += 1
                print(f"fits no mutant that lives: {json.dumps(one)}")
    sys.exit(bool(failures))


def fits(known: dict[str, str], mutant: Mutant) -> bool:
    """Whether an entry is of a mutant; what an entry leaves out fits any."""
    return known.items() <= {**mutant.facts(), "why": known["why"]}.items()


if __name__ == "__main__":
    main()
