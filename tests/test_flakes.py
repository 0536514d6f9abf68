"""The sweep for flakes: what it stores, joins and tells, without running a candidate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnspec.conformance import runner
from attnspec.conformance.types import Report
from attnspec.perf import flakes


def entry(**changes: Any) -> dict[str, Any]:
    plain = {
        "exit_code": 0, "judged": 10, "failed": {}, "seconds": 1.5, "worst_rms_share": 0.5, "worst_max_share": 0.25,
    }  # fmt: skip
    return {**plain, **changes}


def store(path: Path, **runs: dict[str, Any]) -> Path:
    """A file of runs, each named by adapter and seed: `tinygrad_3`."""
    names = {name: name.rsplit("_", 1) for name in runs}
    keyed = {f"softmax_attention/standard/{a}/{seed}": runs[name] for name, (a, seed) in names.items()}
    path.write_text(json.dumps(keyed), encoding="utf-8")
    return path


def test_merging_writes_the_union_in_order_and_the_table_beside_it(tmp_path: Path) -> None:
    one = store(tmp_path / "one.json", tinygrad_10=entry(), tinygrad_9=entry(worst_rms_share=0.75))
    two = store(tmp_path / "two.json", onnx_0=entry(judged=7), tinygrad_9=entry(worst_rms_share=0.75))
    out = tmp_path / "all.json"
    assert flakes.main(["--merge", str(one), str(two), "--out", str(out)]) == 0
    assert [key.split("/", 2)[2] for key in json.loads(out.read_text())] == ["onnx/0", "tinygrad/9", "tinygrad/10"]
    rows = out.with_suffix(".md").read_text().splitlines()[2:]
    assert rows == ["| onnx | standard | 1 | 7 | 0 | 50%, 25% |", "| tinygrad | standard | 2 | 20 | 0 | 75%, 25% |"]


def test_merging_keeps_the_runs_that_the_result_already_holds(tmp_path: Path) -> None:
    out = store(tmp_path / "all.json", onnx_0=entry())
    flakes.main(["--merge", str(store(tmp_path / "one.json", onnx_1=entry())), "--out", str(out)])
    assert len(json.loads(out.read_text())) == 2


@pytest.mark.parametrize("changes", [{"failed": {"a case": "wrong"}}, {"exit_code": 2, "judged": 0}])
def test_a_run_that_failed_or_judged_nothing_is_counted_and_is_the_exit_status(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    one = store(tmp_path / "one.json", onnx_0=entry(), onnx_1=entry(**changes))
    out = tmp_path / "all.json"
    assert flakes.main(["--merge", str(one), "--out", str(out)]) == 1
    assert out.with_suffix(".md").read_text().splitlines()[-1].split("|")[5].strip() == "1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"softmax_attention/standard/onnx/0": {"failed": {"x": ""}}}', "another result for softmax_attention/"),
        ('{"runs": []}', "expected runs by mechanism/level/adapter/seed"),
        ("[1", "not JSON"),
        (None, "no such file"),
    ],
)
def test_files_that_cannot_be_merged_are_one_clear_line_and_change_nothing(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = store(tmp_path / "all.json", onnx_0=entry()), tmp_path / "other.json"
    before = out.read_text()
    if content is not None:
        other.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        flakes.main(["--merge", str(other), "--out", str(out)])
    assert stopped.value.code == 2
    assert f"{other}: " in (said := capsys.readouterr().err) and message in said
    assert out.read_text() == before


def test_a_sweep_runs_what_is_missing_and_stores_each_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = store(tmp_path / "all.json", onnx_0=entry())
    posed = []

    def judge(adapter: str, mechanism: str, level: str, seed: int) -> dict[str, Any]:
        posed.append((adapter, seed, len(json.loads(out.read_text()))))
        return entry()

    monkeypatch.setattr(flakes, "judge", judge)
    assert flakes.main(["--seeds", "2", "--adapters", "onnx,tinygrad", "--out", str(out)]) == 0
    assert posed == [("tinygrad", 0, 1), ("onnx", 1, 2), ("tinygrad", 1, 3)]


def test_an_interrupted_run_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Report("onnx", "softmax_attention", "standard", [], {}, {}, {}, 0, problems=["interrupted: 3 were judged"])
    monkeypatch.setattr(runner, "run", lambda *args, **kwargs: half)
    out = tmp_path / "all.json"
    with pytest.raises(KeyboardInterrupt):
        flakes.main(["--seeds", "1", "--adapters", "onnx", "--out", str(out)])
    assert not out.exists()
