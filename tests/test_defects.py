"""The defects that opentelemetry-instrumentation-kafka-python 0.66b1 has.

Each is the number of a test, marked with it, that is named for what is demanded.
"""

from __future__ import annotations

import ast
from pathlib import Path

DEFECTS = {
    1: "a reused list of headers gathers contexts, the caller's list is changed",
    2: "of several fields the first is read: a forwarded record's consumer is astray",
    3: "a field that is not UTF-8 raises out of the consumer, and the record is lost",
    4: "headers that are given by position raise TypeError",
    5: "with a broker that knows no headers, every send raises",
    6: "the span ends when the message is queued, whatever becomes of it",
    7: "attributes are set after the call: samplers see none, failed sends have none",
    8: "poll is not traced",
    9: "no context is current while a record is processed, and no baggage",
    10: "the span around the consumer is dropped without a link",
    11: "suppression is ignored",
    12: "an exception in a propagator reaches the application",
    13: "an empty value stays a str, and kafka-python refuses the message",
    14: "bootstrap servers that are a set raise, after the record was sent",
    15: "a missing topic is 'unknown', an illegal one is in the name",
    16: "headers in a tuple raise AttributeError instead of kafka-python's error",
    17: "uninstrumenting takes off whatever is outermost",
    18: "two packages at once trace everything twice",
    19: "errors of the consumer make no span",
    20: "old conventions, wrong types, few attributes",
}


def _marked() -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == (
                    "pytest.mark.defect"
                ):
                    number = ast.literal_eval(mark.args[0])
                    found.setdefault(number, []).append(node.name)
    return found


def test_each_defect_has_a_test_that_demands_better() -> None:
    assert set(_marked()) == set(DEFECTS)
