"""What the README says is what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the source checkout")


def between(start: str) -> str:
    found = re.search(rf"<!-- {start} -->\n(.*?)\n?<!-- end -->", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"README.md has no part {start}"
    return found[1]


def test_the_coverage_table_is_the_computed_one(capsys: pytest.CaptureFixture[str]) -> None:
    from attnspec.conformance.cli import main

    assert main(["coverage"]) == 0
    assert between("coverage").strip() == capsys.readouterr().out.strip()


def test_the_python_example_runs() -> None:
    code = re.search(r"```python\n(import numpy.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    names: dict[str, object] = {}
    exec(code[1], names)
    assert names["out"]["O"].shape == (1, 8, 16, 64)  # type: ignore[index]
    assert set(names["grads"]) == {"Q", "K", "V"}  # type: ignore[call-overload]


def test_every_linked_page_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_both_commands_are_one_line_each() -> None:
    for part in ("main-command", "test-command"):
        lines = [line for line in between(part).splitlines() if line and not line.startswith("```")]
        assert len(lines) == 1
        assert lines[0].startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt torch==2.13.0")


def test_short_names_of_the_readme_are_adapters() -> None:
    from attnspec.conformance.finding import built_in

    listed = re.search(r"addressed by short names: (.*?)\.\n", README.read_text(encoding="utf-8"), re.DOTALL)
    assert listed
    names = re.findall(r"`([^`]+)`", listed[1])
    assert len(names) == 10
    known = built_in()
    assert set(names) <= set(known.candidates)
