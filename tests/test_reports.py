"""Reports say what happened, in every format, and no format shows green what is not."""

from __future__ import annotations

import io
import json
import math
import stat
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnspec.conformance import outcome
from attnspec.conformance.progress import bar, steps
from attnspec.conformance.report import json_report, text
from attnspec.conformance.report.files import FileError, check_writable, write
from attnspec.conformance.report.junit import junit
from attnspec.conformance.report.markdown import markdown
from attnspec.conformance.report.terminal import render, show
from attnspec.conformance.types import Report
from attnspec.tests import fakes

AXES = {"O": ("b", "h", "i", "e")}
DIAGNOSIS = {
    "sentence": "the last row (i = 4 of 5); equals the spec with `<=` replaced by `<`",
    "region": {"kind": "row", "sentence": "the last row (i = 4 of 5)"},
    "cause": {"variant": "m1", "sentence": "equals the spec with `<=` replaced by `<`"},
    "smallest": "softmax_attention/edges/N2",
}


def failing() -> Report:
    """One case of every status, with an explained failure."""
    return fakes.report(
        fakes.result("a"),
        fakes.result("b", "fail", diagnosis=DIAGNOSIS),
        fakes.result("c", "crash", message="crashed: segmentation fault (SIGSEGV)"),
        fakes.result("d", "timeout", message="did not return within 30 s"),
        fakes.result("e", "error", message="ValueError: no"),
        fakes.result("f", "refused", message="window is not supported"),
        fakes.result("g", "not_supported", message="takes no mask"),
        fakes.result("h", "xfail", message="expected: known"),
        fakes.result("i", "xpass", message="passes although"),
        fakes.result("j", "skip", message="too large"),
        declares={"causal_alignment": "top_left"},
        not_supported={"mask": "takes no such argument", "bias": "takes no such argument"},
        rounding={"name": "fused", "stored": ["Pd"], "false_rejection": 1e-7},
        problems=["expect.toml: xfail 2: matches no case: */gone"],
    )


# -- outcome ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "problems", "code"),
    [
        (["pass"], [], 0),
        (["pass", "refused", "not_supported", "skip", "xfail"], [], 0),
        (["xfail"], [], 0),
        (["pass", "fail"], [], 1),
        (["pass", "crash"], [], 1),
        (["pass", "timeout"], [], 1),
        (["error"], [], 1),
        (["pass", "xpass"], [], 1),
        (["pass"], ["an entry matches no case"], 1),
        ([], [], 2),
        (["refused", "refused"], [], 2),
        (["skip", "not_supported"], [], 2),
        ([], ["an entry matches no case"], 2),
    ],
)
def test_the_exit_code_follows_from_what_was_judged(statuses: list[str], problems: list[str], code: int) -> None:
    results = [fakes.result(str(number), status) for number, status in enumerate(statuses)]
    assert outcome.exit_code(results, problems) == code
    report = fakes.report(*results, problems=problems)
    assert report.exit_code == code
    assert report.summary.startswith(outcome.VERDICTS[code])


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_the_json_report_follows_its_schema_and_reads_back_as_it_was(tmp_path: Path) -> None:
    report = failing()
    path = tmp_path / "report.json"
    json_report.write_json(report, path)
    assert json_report.read_json(path) == report
    content = json.loads(path.read_text())
    assert content["counts"] == dict.fromkeys(outcome.STATUSES, 1)
    assert content["verdict"] == "does not conform"
    repeats = {entry["status"]: entry["repeat"] for entry in content["results"]}
    assert repeats["fail"] == "attnspec repro b --candidate my_kernels:attention"
    assert repeats["pass"] is None


def test_numbers_that_json_cannot_hold_survive(tmp_path: Path) -> None:
    figures = fakes.evidence(False, max_z=math.inf, worst_got=math.nan, worst_want=-math.inf)
    report = fakes.report(fakes.result("a", "fail", evidence=[figures]))
    path = tmp_path / "report.json"
    json_report.write_json(report, path)
    assert "Infinity" not in path.read_text() and "NaN" not in path.read_text()
    back = json_report.read_json(path).results[0].evidence[0]
    assert back.max_z == math.inf and math.isnan(back.worst_got) and back.worst_want == -math.inf


def test_numpy_values_and_sets_become_plain_json() -> None:
    values = {"a": np.float32(0.5), "b": np.arange(3), "c": frozenset({"y", "x"}), "d": (1, None, True), "e": np.inf}
    assert json_report.plain(values) == {"a": 0.5, "b": [0, 1, 2], "c": ["x", "y"], "d": [1, None, True], "e": "inf"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("verdict", "fine"),
        ("exit_code", 3),
        ("counts", {"passed": 3}),
        ("surprise", 1),
        ("results", [{"status": "pass"}]),
    ],
)
def test_a_document_that_departs_from_the_schema_is_refused(place: str, value: Any) -> None:
    content = json_report.document(failing())
    json_report.validate(content)
    content[place] = value
    with pytest.raises(FileError, match=place):
        json_report.validate(content)


@pytest.mark.parametrize("content", ["{", '{"format": "other"}', "[]"])
def test_a_file_that_is_no_report_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(FileError, match=r"other\.json"):
        json_report.read_json(path)


# -- JUnit ------------------------------------------------------------------------------------------------------------


def test_junit_counts_each_status_as_a_ci_server_expects() -> None:
    root = ET.fromstring(junit(failing()))
    suite = root[0]
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "11",
        "failures": "3",  # fail, xpass, the problem of the expectation list
        "errors": "3",  # crash, timeout, error
        "skipped": "4",  # refused, not supported, xfail, skip
    }
    failure = next(node for node in suite.iter("failure") if node.get("type") == "fail")
    assert "last row" in (failure.text or "") and "attnspec repro" in (failure.text or "")


def test_junit_of_a_run_that_judged_nothing_is_not_green() -> None:
    root = ET.fromstring(junit(fakes.report(fakes.result("a", "refused"))))
    assert root[0].get("failures") == "1"


def test_junit_survives_what_a_kernel_prints() -> None:
    report = fakes.report(fakes.result("a", "error", message="boom \x00\x1b[31m <&> \ud800"))
    root = ET.fromstring(junit(report))
    node = next(root.iter("error"))
    assert "boom" in (node.get("message") or "") and "<&>" in (node.get("message") or "")


# -- Markdown and terminal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [markdown, render])
def test_a_failure_explains_itself(form: Any) -> None:
    told = form(failing(), AXES)
    for part in (
        "does not conform",
        "O[b=0,h=1,i=4,e=3]",
        "412.7",
        "limit 6",
        "last row (i = 4 of 5)",
        "`<=` replaced by `<`".replace("<", "&lt;") if form is markdown else "`<=` replaced by `<`",
        "attnspec repro softmax_attention/edges/N2 --candidate my_kernels:attention",
        "segmentation fault",
        "causal_alignment",
        "takes no such argument",
        "matches no case",
        "fused",
    ):
        assert part.lower() in told.lower(), part


def test_the_terminal_report_starts_with_the_verdict() -> None:
    assert render(fakes.report(fakes.result())).splitlines()[0] == "CONFORMS: 1 cases judged"
    assert render(failing()).splitlines()[0].startswith("DOES NOT CONFORM: 5 of 7 judged cases fail")
    assert render(fakes.report()).splitlines()[0].startswith("COULD NOT JUDGE: no case came to a verdict")


def test_the_terminal_report_states_the_margin_of_what_passed() -> None:
    told = render(fakes.report(fakes.result("a"), fakes.result("b", evidence=[fakes.evidence(max_z=5.5)])))
    assert "worst |z| 5.5 of 6 (b)" in told


def test_a_quiet_report_leaves_out_the_table_and_keeps_the_failures() -> None:
    told = render(failing(), quiet=True)
    assert "group" not in told and "FAIL b" in told and "matches no case" in told


def test_many_failures_are_told_one_of_each_group_first() -> None:
    results = [fakes.result(f"a{number}", "fail") for number in range(30)]
    other = fakes.result("z", "fail", case=fakes.case("z", group="window"))
    told = render(fakes.report(*results, other))
    assert "FAIL z" in told and "and 21 more failing cases" in told


def test_only_a_terminal_gets_colours() -> None:
    pipe, terminal = io.StringIO(), Terminal()
    show(failing(), stream=pipe)
    show(failing(), stream=terminal)
    assert "\x1b" not in pipe.getvalue() and "\x1b" in terminal.getvalue()


def test_a_repro_command_can_be_pasted_into_a_shell() -> None:
    report = fakes.report(candidate="my kernels.py:f", environment={"device": "cuda"})
    assert text.repeat_command("a/b[N=5]", report) == (
        "attnspec repro 'a/b[N=5]' --candidate 'my kernels.py:f' --device cuda"
    )


def test_the_ratio_to_the_tolerance_is_infinite_for_nan() -> None:
    assert text.ratio(fakes.evidence(False, rms_z=math.nan)) == math.inf
    assert text.ratio(fakes.evidence(False)) == pytest.approx(412.7 / 6)
    assert text.ratio(fakes.evidence()) < 1


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_write_replaces_the_file_in_one_step_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    path.chmod(0o640)
    write(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(FileError, match="No space left"):
        write(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_an_output_path_is_refused_before_the_run(tmp_path: Path) -> None:
    check_writable(tmp_path / "report.json")
    with pytest.raises(FileError, match="there is no folder"):
        check_writable(tmp_path / "missing" / "report.json")
    with pytest.raises(FileError, match="is a folder"):
        check_writable(tmp_path)


# -- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_and_counts_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with bar("judging") as step:
        assert step is not None
        step(1, 2, fakes.result())
        step(2, 2, fakes.result("b", "fail"))
    assert "judging" in terminal.getvalue() and "2/2" in terminal.getvalue() and "1 failed" in terminal.getvalue()


def test_progress_stays_out_of_pipes_and_quiet_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stderr", pipe)
    with bar("judging") as step, steps("mutants") as other:
        assert step is None and other is None
    assert pipe.getvalue() == ""
    monkeypatch.setattr("sys.stderr", Terminal())
    with bar("judging", quiet=True) as step:
        assert step is None
