"""The record of judged kernels: what it takes from a report, and that a report is used again only where it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnspec.conformance import coverage
from attnspec.perf import judged


def report(**changes: Any) -> dict[str, Any]:
    def result(identifier: str, status: str, rms: float, largest: float) -> dict[str, Any]:
        evidence = [{"rms_z": rms, "rms_limit": 2.0, "max_z": largest, "max_limit": 20.0}]
        case = {"id": identifier, "dtype": identifier[-4:], "direction": "forward"}
        return {"case": case, "status": status, "evidence": evidence if status != "refused" else []}

    outcomes = (("a/fp32", "pass", 1.0, 2.0), ("b/bf16", "fail", 3.0, 5.0), ("c/bf16", "refused", 0, 0))
    results = [result(*outcome) for outcome in outcomes]
    plain = {
        "candidate": "attnspec.impls.one:one", "level": "standard", "seconds": 2.6, "problems": [],
        "environment": {"device": "cpu", "torch": "2.13.0"}, "counts": {"pass": 1, "fail": 1, "refused": 1},
        "results": results,
    }  # fmt: skip
    return plain | changes


def test_a_report_is_counted() -> None:
    found = judged.summarised(report())
    assert (found["judged"], found["refused"], found["failed"]) == (2, 1, ["b/bf16"])
    assert (found["worst_rms_share"], found["worst_max_share"]) == (1.5, 0.25)
    assert (found["dtypes"], found["directions"], found["seconds"]) == (["bf16", "fp32"], ["forward"], 3)
    assert "| one | `attnspec.impls.one:one` on cpu | standard | bf16, fp32 | forward | 2 | 1 | 1 | 150%, 25% |" in (
        judged.table({"one": found})
    )


@pytest.mark.parametrize(
    "changes", [{"level": "smoke"}, {"environment": {"device": "cuda"}}, {"problems": ["interrupted"]}, {"results": []}]
)
def test_a_report_of_something_else_is_not_used_again(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    assert judged._kept(path, "standard", "cpu", ["fp32", "bf16"]) is None
    path.write_text(json.dumps(report()))
    assert judged._kept(path, "standard", "cpu", ["fp32", "bf16"]) is not None
    path.write_text(json.dumps(report(**changes)))
    assert judged._kept(path, "standard", "cpu", ["fp32", "bf16"]) is None


def test_what_is_missing_is_judged_and_a_failure_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def judge(kernel: str, mechanism: str, level: str, device: str, dtypes: Any, path: Path) -> None:
        asked.append(kernel)
        path.write_text(json.dumps(report()))

    monkeypatch.setattr(judged, "_judge", judge)
    out = tmp_path / "judged.json"
    command = ["--mechanism", "mla", "--reports", str(tmp_path / "reports"), "--out", str(out)]
    assert judged.main(command) == judged.main(command) == 1
    assert asked == ["attnspec.impls.mla:mla"]
    assert judged.read(out)["mla"]["judged"] == 2 and out.with_suffix(".md").read_text() in capsys.readouterr().out


def test_a_mechanism_without_a_kernel_is_named() -> None:
    assert "mla" in judged.wanted([])
    with pytest.raises(ValueError, match="'ppf_attention_roitr' has no kernel"):
        judged.wanted(["mla", "ppf_attention_roitr"])


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a file of this program"):
        judged.read(tmp_path / "x.json")


def test_the_coverage_shows_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "_folder", lambda package: tmp_path)
    assert coverage.judged_result("one") is None
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "judged.json").write_text(json.dumps({"one": judged.summarised(report())}))
    assert coverage.judged_result("one") == (2, 1, "standard")
    assert coverage._judged(coverage.Row("one", "f", True, judged=2, judged_failed=1, judged_level="standard")) == (
        "2 cases, standard, 1 fail"
    )
    assert coverage._judged(coverage.Row("one", "f", True)) == ""
