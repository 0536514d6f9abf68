"""The test run in parts: every test in one shard, and what the parts cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent
TESTS = """
import pytest

@pytest.mark.parametrize("name", ["softmax_attention", "gla", "nothing"])
@pytest.mark.parametrize("number", range(4))
def test_it(name, number):
    assert number >= 0
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest((ROOT / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(test_some=TESTS)
    return pytester


def test_every_test_is_in_exactly_one_shard(project: pytest.Pytester) -> None:
    passed = [
        project.runpytest("-p", "no:randomly", "--shard", f"{number}/3").parseoutcomes() for number in (1, 2, 3)
    ]
    assert sum(outcome.get("passed", 0) for outcome in passed) == 12
    assert all(outcome.get("passed", 0) + outcome.get("deselected", 0) == 12 for outcome in passed)


def test_a_bad_shard_is_refused(project: pytest.Pytester) -> None:
    result = project.runpytest("--shard", "4/3")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*'4/3' is no shard*"])


def test_costs_are_told_by_mechanism_and_by_file(project: pytest.Pytester) -> None:
    result = project.runpytest("--parts", "--parts-json", "parts.json")
    found = json.loads((project.path / "parts.json").read_text())
    assert {name: cost["tests"] for name, cost in found["mechanism"].items()} == {
        "softmax_attention": 4, "gla": 4, "(none)": 4
    }  # fmt: skip
    assert found["file"]["test_some.py"]["tests"] == 12
    assert all(cost["memory"] > 2**20 and cost["seconds"] >= 0 for cost in found["mechanism"].values())
    result.stdout.fnmatch_lines(["*seconds, tests and memory by mechanism*", "* s      4 * MiB  gla"])
