"""Nothing grows with the messages; `benchmarks/soak.py` is what has many of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from soak import TOLERATED_MIB, TOLERATED_OBJECTS, Sample, broken_claims

from scripts import run

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc here")
def test_a_soak_leaves_nothing_behind() -> None:
    script = "import soak; soak.main()"
    done = run(script, "--messages", "20000", paths=(BENCHMARKS,))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20,000" in done.stdout.splitlines()[-3]  # it went all the way


FIRST = Sample(1000, 50.0, 50_000, 6, 20, 3000, 3000)
LAST = Sample(10_000, 50.0, 50_000, 6, 20, 30_000, 30_000)


def test_a_soak_in_which_nothing_grows_breaks_no_claim() -> None:
    assert broken_claims(FIRST, [FIRST, LAST], LAST) == []


@pytest.mark.parametrize(
    ("last", "after", "said"),
    [
        pytest.param(
            LAST._replace(mib=FIRST.mib + TOLERATED_MIB + 1),
            LAST,
            "9.0 MiB more after 10,000 messages than after 1,000",
            id="memory",
        ),
        pytest.param(
            LAST._replace(objects=FIRST.objects + TOLERATED_OBJECTS + 1),
            LAST,
            "1,001 objects more after 10,000 messages than after 1,000",
            id="objects",
        ),
        pytest.param(
            LAST,
            LAST._replace(started=20_000, ended=20_000),
            "20,000 spans of 10,000 messages",
            id="few spans",
        ),
        pytest.param(
            LAST,
            LAST._replace(ended=29_999),
            "30,000 spans have started, 29,999 ended",
            id="open spans",
        ),
        pytest.param(
            LAST, LAST._replace(threads=7), "7 threads, and 6 at the start", id="thread"
        ),
        pytest.param(
            LAST,
            LAST._replace(files=21),
            "21 files open, and 20 at the start",
            id="file",
        ),
    ],
)
def test_a_soak_says_which_claim_is_broken(
    last: Sample, after: Sample, said: str
) -> None:
    assert broken_claims(FIRST, [FIRST, last], after) == [said]
