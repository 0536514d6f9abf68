"""Skip and xfail lists cannot outlive their reason."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from attnspec.conformance import outcome
from attnspec.conformance.expectations import Entry, Expectations, covers, load
from attnspec.conformance.report.files import FileError
from attnspec.tests import fakes

TODAY = datetime.date(2026, 6, 1)


def lists(tmp_path: Path, text: str) -> Expectations:
    path = tmp_path / "expect.toml"
    path.write_text(text)
    made = load([path])
    made.today = TODAY
    return made


GOOD = """
[[xfail]]
case = "m/window/*"
reason = "off by one"
until = 2026-12-31
link = "https://example.org/7"

[[skip]]
case = "*/N131072/*"
reason = "does not fit"
"""


def test_an_entry_that_holds_changes_the_status_and_keeps_the_reason(tmp_path: Path) -> None:
    made = lists(tmp_path, GOOD)
    report = fakes.report(fakes.result("m/window/a", "fail"), fakes.result("m/edges/a"))
    made.apply(report, lambda: ["m/long/N131072/x"])
    outcome.conclude(report)
    assert [result.status for result in report.results] == ["xfail", "pass"]
    assert "off by one (https://example.org/7, until 2026-12-31)" in report.results[0].message
    assert report.problems == [] and report.exit_code == 0
    assert made.skips("m/long/N131072/x") == "does not fit"
    assert made.skips("m/edges/a") is None


@pytest.mark.parametrize("status", sorted(outcome.BROKEN))
def test_every_way_of_failing_can_be_expected(tmp_path: Path, status: str) -> None:
    result = lists(tmp_path, GOOD).settle(fakes.result("m/window/a", status))
    assert result.status == "xfail"


def test_an_expected_failure_that_passes_fails_the_run(tmp_path: Path) -> None:
    report = fakes.report(fakes.result("m/window/a"), fakes.result("m/window/b", "fail"))
    lists(tmp_path, GOOD).apply(report, lambda: ["m/N131072/"])
    outcome.conclude(report)
    assert [result.status for result in report.results] == ["xpass", "xfail"]
    assert "xfail 1 expects it to fail" in report.results[0].message
    assert report.exit_code == 1


def test_a_refused_case_is_neither_an_expected_failure_nor_an_error(tmp_path: Path) -> None:
    report = fakes.report(fakes.result("m/window/a", "refused"), fakes.result("m/N131072/b"))
    lists(tmp_path, GOOD).apply(report)
    assert [result.status for result in report.results] == ["refused", "pass"]
    assert report.problems == ["" + problem for problem in report.problems if "window" not in problem]


def test_an_entry_that_matches_no_case_fails_the_run(tmp_path: Path) -> None:
    made = lists(tmp_path, GOOD)
    report = fakes.report(fakes.result("m/edges/a"))
    made.apply(report)
    outcome.conclude(report)
    assert len(report.problems) == 2 and all("matches no case" in problem for problem in report.problems)
    assert report.exit_code == 1
    assert "2 problems beside the cases" in report.summary


def test_an_entry_may_match_a_case_outside_a_restricted_run(tmp_path: Path) -> None:
    made = lists(tmp_path, GOOD)
    made.everything = lambda: ["m/window/a", "m/N131072/a", "m/x/N131072/a"]
    assert made.problems(["m/edges/a"]) == []
    made.everything = lambda: ["m/window/a"]
    assert len(made.problems(["m/edges/a"])) == 1


def test_an_entry_past_its_date_is_an_error_and_no_longer_excuses(tmp_path: Path) -> None:
    made = lists(tmp_path, GOOD)
    made.today = datetime.date(2026, 12, 31)
    assert made.find("m/window/a") is not None
    made.today = datetime.date(2027, 1, 1)
    report = fakes.report(fakes.result("m/window/a", "fail"), fakes.result("m/N131072/b"))
    made.apply(report)
    assert report.results[0].status == "fail"
    assert report.problems == [f"{tmp_path}/expect.toml: xfail 1: is past its date 2026-12-31: m/window/*"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[[xfail]]\ncase = "a"', "xfail 1: needs a reason"),
        ('[[skip]]\ncase = "a"\nreason = "  "', "skip 1: needs a reason"),
        ('[[skip]]\nreason = "a"', "skip 1: needs a case"),
        ('[[xfail]]\ncase = "a"\nreason = "b"\nexpires = 2026-01-01', "unknown field 'expires'"),
        ('[[xfail]]\ncase = "a"\nreason = "b"\nuntil = "2026-01-01"', "until must be a date"),
        ('[[xfail]]\ncase = "a"\nreason = "b"\nuntil = 2026-01-01T00:00:00', "until must be a date"),
        ('[[xfail]]\ncase = ["a"]\nreason = "b"', "case must be text"),
        ('[[fail]]\ncase = "a"\nreason = "b"', "unknown table 'fail'"),
        ('[xfail]\ncase = "a"\nreason = "b"', "must be an array of tables"),
        ("[[xfail]", "not TOML"),
    ],
)
def test_a_malformed_list_is_refused_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(FileError, match=r"expect\.toml") as caught:
        lists(tmp_path, text)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        load([tmp_path / "gone.toml"])


@pytest.mark.parametrize(
    ("pattern", "case", "matches"),
    [
        ("m/a", "m/a", True),
        ("m/a", "m/ab", False),
        ("m/*", "m/a/b", True),
        ("m/?", "m/ab", False),
        ("m/[ab]", "m/a", False),
        ("m/[ab]", "m/[ab]", True),
        ("m/N1.*", "m/N10", False),
    ],
)
def test_only_star_and_question_mark_are_special(pattern: str, case: str, matches: bool) -> None:
    assert covers(pattern, case) is matches


def test_several_lists_count_together(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text('[[skip]]\ncase = "a"\nreason = "first"')
    two.write_text('[[xfail]]\ncase = "b"\nreason = "second"')
    made = load([one, two])
    assert [entry.place for entry in made.entries] == [f"{one}: skip 1", f"{two}: xfail 1"]
    assert isinstance(made.find("b"), Entry)
