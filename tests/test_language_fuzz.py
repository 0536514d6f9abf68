"""The reader survives garbage and hostile text, and the fuzzer would notice if it did not.

The full run is `python -m attnspec.tests.fuzz_language --count 100000`.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from attnspec.tests import fuzz_language
from attnspec.tests.fuzz_language import FAMILIES, fuzz


def test_only_spec_errors_come_out_quickly_and_nothing_runs() -> None:
    tally = fuzz(2000, seed=7)
    assert tally.failures == []
    assert tally.count == 2000
    assert tally.refused.total() > 1500
    assert tally.accepted.total() > 50


def test_every_family_makes_inputs_and_most_of_them_are_refused() -> None:
    tally = fuzz(600, seed=8)
    for family in FAMILIES:
        assert tally.refused[family.__name__] + tally.accepted[family.__name__] > 0
        assert tally.refused[family.__name__] > 0


def test_inputs_depend_on_seed_and_number_alone() -> None:
    for family in FAMILIES:
        assert family(random.Random("3:14")) == family(random.Random("3:14"))


@pytest.mark.parametrize(
    ("flaw", "complaint"),
    [
        (lambda text: eval("1 + 1"), "exec"),
        (lambda text: __import__("wave"), "import"),
        (lambda text: Path("/dev/null").read_bytes(), "open"),
        (lambda text: [][1], "IndexError"),
        (lambda text: time.sleep(5.0), "TookTooLong"),
        (lambda text: sum(range(30_000_000)), "took"),
    ],
)
def test_the_fuzzer_sees_a_reader_that(monkeypatch: pytest.MonkeyPatch, flaw: Any, complaint: str) -> None:
    sound = getattr(fuzz_language, "read")  # noqa: B009 - mypy takes it for private
    calls = 0

    def flawed(text: str, *arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            flaw(text)
        return sound(text, *arguments, **more)

    monkeypatch.setattr(fuzz_language, "read", flawed)
    tally = fuzz(8, seed=1, limit=0.1)
    assert any(complaint in failure for failure in tally.failures), tally.failures
