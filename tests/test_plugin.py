"""The pytest plugin gives each case as an item, and no run is green that judged nothing."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from attnspec.tests.test_cli import KERNELS

pytest_plugins = ["pytester"]
QUICK = (
    "--attnspec-level", "smoke", "--attnspec-dtype", "fp32", "--attnspec-direction", "forward",
    "--attnspec-select", "*/options/*",
)  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with kernels and an unrelated test, as in a user's repository."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytester.makepyfile(kernels=KERNELS, test_other="def test_other(): pass")


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments, timeout=300)


def outcomes(done: pytest.RunResult) -> dict[str, int]:
    return {name: number for name, number in done.parseoutcomes().items() if name != "warnings"}


def test_each_case_of_a_right_kernel_is_a_passing_item(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--attnspec", "kernels.py:right", "-v", *QUICK)
    assert done.ret == 0
    assert set(outcomes(done)) == {"passed"} and outcomes(done)["passed"] >= 2
    done.stdout.fnmatch_lines(["*kernels.py:right::softmax_attention/options/*PASSED*"])
    assert "test_other" not in done.stdout.str()


def test_a_wrong_kernel_fails_with_the_explanation(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--attnspec", "kernels.py:strict", *QUICK, "-k", "causal")
    assert done.ret == 1
    done.stdout.fnmatch_lines(
        ["where*on the diagonal j = i*", "repeat*attnspec repro softmax_attention/*--candidate kernels.py:strict"]
    )
    assert "Traceback" not in done.stdout.str()


def test_a_file_gives_every_described_function(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--attnspec", "kernels.py", *QUICK[:-1], "*/shapes/*", "--collect-only", "-q")
    names = {line.split("::")[0].rpartition(":")[2] for line in done.stdout.lines if "::softmax_attention" in line}
    assert names == {"right", "strict", "refusing"}


def test_a_file_without_a_described_function_is_a_usage_error(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--attnspec", "test_other.py")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*no function there is decorated with @attnspec.candidate*"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gone.py", "no such file"),
        ("kernels.py:rihgt", "has no 'rihgt'"),
        ("no_such_module:f", "cannot import module"),
        ("kernels.py:undescribed", "does not say what it implements"),
    ],
)
def test_a_candidate_that_cannot_be_judged_is_a_usage_error(pytester: pytest.Pytester, name: str, told: str) -> None:
    done = run(pytester, "--attnspec", name)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"*{told}*"])
    assert "Traceback" not in done.stderr.str() and "INTERNALERROR" not in done.stdout.str()


def test_a_selection_without_a_case_is_a_usage_error(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--attnspec", "kernels.py:right", "--attnspec-select", "*/no_such_group/*")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*no case matches*"])


def test_a_kernel_that_refuses_everything_does_not_pass(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--attnspec", "kernels.py:refusing", *QUICK[:-1], "*/shapes/*")
    assert done.ret == 1
    assert set(outcomes(done)) == {"skipped"}
    done.stdout.fnmatch_lines(["no case came to a verdict: the run fails"])


def test_a_run_whose_items_are_all_deselected_does_not_pass(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--attnspec", "kernels.py:right", *QUICK, "-k", "nothing_like_it")
    assert done.ret == 1


def test_other_tests_run_beside_the_cases_when_they_are_named(pytester: pytest.Pytester) -> None:
    done = run(pytester, "test_other.py", "--attnspec", "kernels.py:right", *QUICK, "-v")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["*test_other.py::test_other PASSED*", "*kernels.py:right::*PASSED*"])


def test_lists_skip_and_expect_failures(pytester: pytest.Pytester) -> None:
    Path("expect.toml").write_text(
        '[[xfail]]\ncase = "*/causal=true/*"\nreason = "off by one"\n'
        '[[skip]]\ncase = "*/options/*scale*"\nreason = "not now"\n'
        '[[skip]]\ncase = "*/options/plain/*"\nreason = "not now"\n'
    )
    select = (*QUICK[:-1], "*/options/causal=true/*")
    done = run(pytester, "--attnspec", "kernels.py:strict", *select, "--attnspec-expect", "expect.toml", "-rx")
    assert "xfailed" in outcomes(done)
    done.stdout.fnmatch_lines(["*off by one*"])
    done = run(pytester, "--attnspec", "kernels.py:right", *select, "--attnspec-expect", "expect.toml")
    assert done.ret == 1
    done.stdout.fnmatch_lines(["*expects it to fail*"])


def test_a_stale_entry_is_a_failing_item(pytester: pytest.Pytester) -> None:
    Path("expect.toml").write_text('[[skip]]\ncase = "*/no_such_group/*"\nreason = "gone"\n')
    done = run(pytester, "--attnspec", "kernels.py:right", *QUICK, "--attnspec-expect", "expect.toml")
    assert done.ret == 1 and outcomes(done)["failed"] == 1
    done.stdout.fnmatch_lines(["*matches no case: */no_such_group/*"])


def test_junit_carries_the_status_of_each_case(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--attnspec", "kernels.py:right", *QUICK, "--junitxml", "out.xml")
    assert done.ret == 0
    cases = list(ET.parse("out.xml").getroot().iter("testcase"))
    assert len(cases) == outcomes(done)["passed"]
    assert {entry.get("value") for case in cases for entry in case.iter("property")} == {"pass"}


def test_xdist_gives_the_same_verdict(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--attnspec", "kernels.py:right", *QUICK, "-n", "2")
    assert done.ret == 0 and set(outcomes(done)) == {"passed"}
    done = run(pytester, "--attnspec", "kernels.py:refusing", *QUICK[:-1], "*/shapes/*", "-n", "2")
    assert done.ret == 1


def test_without_the_option_nothing_changes(pytester: pytest.Pytester) -> None:
    done = run(pytester)
    assert done.ret == 0 and outcomes(done) == {"passed": 1}
    assert "attnspec" not in done.stdout.str().replace("plugins:", "").replace("attnspec-", "", 1)
