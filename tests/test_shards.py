"""A run in parts: every case in one part, and the joined report says what the whole run would have said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from attnspec.conformance import cli, shards
from attnspec.conformance.report.json_report import read_json
from attnspec.conformance.types import Report
from attnspec.tests.test_cli import KERNELS

PARTS = 3


@pytest.fixture(scope="module")
def whole_and_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, list[Report], list[Path]]:
    folder = tmp_path_factory.mktemp("shards")
    kernels = folder / "kernels.py"
    kernels.write_text(KERNELS)

    def run(name: str, *more: str) -> Path:
        path = folder / f"{name}.json"
        cli.main(
            ["check", f"{kernels}:strict", "--level", "smoke", "--no-explain", "-q", "--json", str(path), *more]
        )
        return path

    paths = [run(str(number), "--shard", f"{number}/{PARTS}") for number in range(1, PARTS + 1)]
    return read_json(run("whole")), [read_json(path) for path in paths], paths


def test_every_case_is_in_exactly_one_part(whole_and_parts: tuple[Report, list[Report], list[Path]]) -> None:
    whole, parts, _ = whole_and_parts
    cases = [result.case.id for part in parts for result in part.results]
    assert sorted(cases) == sorted(result.case.id for result in whole.results)
    assert all(part.results for part in parts)
    assert [part.environment[shards.KEY] for part in parts] == ["1/3", "2/3", "3/3"]


def test_the_joined_report_has_the_verdict_of_the_whole(
    whole_and_parts: tuple[Report, list[Report], list[Path]],
) -> None:
    whole, parts, _ = whole_and_parts
    merged = shards.merge(parts)
    assert (merged.exit_code, merged.summary) == (whole.exit_code, whole.summary)
    assert {r.case.id: r.status for r in merged.results} == {r.case.id: r.status for r in whole.results}
    assert merged.problems == whole.problems == [] and merged.exit_code == 1, "`strict` is wrong"


def test_a_missing_part_fails_the_joined_report(whole_and_parts: tuple[Report, list[Report], list[Path]]) -> None:
    _, parts, _ = whole_and_parts
    assert shards.merge([parts[0], parts[2]]).problems == ["shard 2/3 is missing"]
    right = [dataclasses.replace(part, results=[r for r in part.results if r.status == "pass"]) for part in parts]
    assert shards.merge(right).exit_code == 0
    assert shards.merge(right[:2]).exit_code == 1


def test_a_case_that_two_reports_judged_is_a_problem(
    whole_and_parts: tuple[Report, list[Report], list[Path]],
) -> None:
    _, parts, _ = whole_and_parts
    (problem,) = shards.merge([*parts, parts[0]]).problems
    assert problem.startswith("judged by two reports: softmax_attention/")


@pytest.mark.parametrize("name", ["seed", "level", "candidate"])
def test_reports_of_different_runs_are_refused(
    name: str, whole_and_parts: tuple[Report, list[Report], list[Path]]
) -> None:
    _, parts, _ = whole_and_parts
    other = dataclasses.replace(parts[1], **{name: 7 if name == "seed" else "other"})  # type: ignore[arg-type]
    with pytest.raises(shards.ShardError, match=name):
        shards.merge([parts[0], other])


def test_the_command_line_joins_reports(
    whole_and_parts: tuple[Report, list[Report], list[Path]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole, _, paths = whole_and_parts
    out = tmp_path / "merged.json"
    assert cli.main(["merge", *map(str, paths), "-q", "--json", str(out)]) == whole.exit_code
    assert read_json(out).summary == whole.summary
    assert "DOES NOT CONFORM" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_a_bad_shard_is_one_clear_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(shards.ShardError, match="expected NUMBER/COUNT"):
        shards.parse(text)
