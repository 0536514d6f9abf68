"""`attnspec bench`: what is wrong or only interpreted is not timed, ratios and roofline shares are computed from the
measurements, results follow their schema, bad input is one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from attnspec.conformance.case_id import CaseError, make
from attnspec.conformance.cli import main
from attnspec.conformance.cli_bench import table, validate
from attnspec.conformance.suite import Suite
from attnspec.perf.bench import _cost, bench, interleaved, peaks

KERNELS = """
import time
import numpy as np
from attnspec import candidate

def _attention(q, k, v):
    k, v = (np.repeat(t.astype(np.float64), q.shape[1] // k.shape[1], 1) for t in (k, v))
    x = np.einsum("bhid,bhjd->bhij", q.astype(np.float64), k) * q.shape[-1] ** -0.5
    p = np.exp(x - x.max(-1, keepdims=True, initial=-1e30))
    s = p.sum(-1, keepdims=True)
    p = np.divide(p, s, out=np.zeros_like(p), where=s > 0)
    return np.einsum("bhij,bhjd->bhid", p, v).astype(q.dtype)

numpy_kernel = candidate(mechanism="softmax_attention", framework="numpy", dtypes=["fp32"], outputs=["O"])

@numpy_kernel
def honest(q, k, v):
    return _attention(q, k, v)

@numpy_kernel
def slow(q, k, v):
    time.sleep(0.05)
    return _attention(q, k, v)

@numpy_kernel
def wrong(q, k, v):
    return _attention(q, k, v) * np.float32(1.01)
"""


@pytest.fixture
def kernels(tmp_path: Path) -> str:
    path = tmp_path / "kernels_to_time.py"
    path.write_text(KERNELS)
    return str(path)


def run(kernels: str, *names: str, against: str = "equations") -> dict[str, Any]:
    chosen = [f"{kernels}:{name}" for name in names]
    result = bench(
        "softmax_attention", chosen, against if against == "equations" else f"{kernels}:{against}",
        sizes=["tiny"], dtypes=["fp32"], directions=["forward"], repeats=3,
        peak={"fp32": 1e11, "fp64": 5e10, "bytes": 1e10},
    )  # fmt: skip
    return {row.contender.rpartition(":")[2]: row for row in result.rows}


def test_what_does_not_conform_is_not_timed_and_what_does_is(kernels: str) -> None:
    rows = run(kernels, "honest", "wrong")
    assert rows["wrong"].seconds is None and rows["wrong"].conforms is False
    assert "does not conform at level smoke" in rows["wrong"].why
    assert rows["honest"].conforms is True and rows["honest"].seconds > 0 and rows["honest"].samples == 3
    assert rows["equations"].speedup == 1.0 and rows["equations"].computes_in == "fp64"
    assert rows["honest"].speedup == rows["equations"].seconds / rows["honest"].seconds


def test_a_kernel_without_gradients_is_neither_judged_nor_timed_in_the_backward_pass(kernels: str) -> None:
    result = bench(
        "softmax_attention", [f"{kernels}:honest"], "reference", sizes=["tiny"], dtypes=["fp32"],
        directions=["backward"], repeats=1, peak={"fp32": 1e11, "fp64": 5e10, "bytes": 1e10},
    )  # fmt: skip
    assert not result.failed
    assert [(row.seconds, row.why.startswith("not timed: ")) for row in result.rows] == [(None, True)] * 2
    assert result.rows[1].conforms is None


def test_a_kernel_that_waits_is_slower_and_further_from_the_roofline(kernels: str) -> None:
    rows = run(kernels, "slow", against="honest")
    assert rows["slow"].seconds > 0.05
    assert rows["slow"].speedup < 1 and rows["slow"].roofline_share < rows["honest"].roofline_share
    work, traffic = _cost(
        Suite("softmax_attention"), make(Suite("softmax_attention").mechanism, "bench", sizes=rows["slow"].sizes)
    )
    assert rows["slow"].flops_per_second == work / rows["slow"].seconds
    assert rows["slow"].roofline_share == max(work / 1e11, traffic / 1e10) / rows["slow"].seconds


def test_the_work_is_that_of_the_equations() -> None:
    suite = Suite("softmax_attention")
    sizes = {"B": 2, "H": 4, "Hk": 2, "N": 8, "M": 16, "D": 4, "E": 4}
    forward = make(suite.mechanism, "bench", sizes=sizes, dtype="bf16")
    backward = make(suite.mechanism, "bench", sizes=sizes, dtype="bf16", direction="backward")
    pairs = 2 * 4 * 8 * 16
    work, traffic = _cost(suite, forward)
    assert 2 * pairs * 8 <= work <= 2 * pairs * 9  # scores and values; scaling and dividing beside them
    assert traffic >= 2 * (2 * 4 * 8 * 4 * 2 + 2 * 2 * 16 * 4 * 2)
    assert _cost(suite, backward) == (2 * work, 2 * traffic)


def test_contenders_take_turns_and_short_jobs_are_repeated() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.03)

    found = interleaved({"slow": slow, "fast": lambda: order.append("fast")}, 3, "cpu")
    assert [len(samples) for samples, _ in found.values()] == [3, 3]
    timed = order[2:].index("slow", 2)
    slots = [name for name, before in zip(order[timed:], ["", *order[timed:]]) if name != before]
    assert slots[-6:] == ["slow", "fast"] * 3
    assert order.count("fast") > 100 > order.count("slow")
    assert min(found["fast"][0]) < 0.001 < min(found["slow"][0])


def test_a_kernel_in_the_interpreter_is_not_timed(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnspec.perf.bench as module

    calls = iter(range(100))
    monkeypatch.setattr(module, "_interpreted", lambda: next(calls))
    assert all("Triton's interpreter" in row.why and row.seconds is None for row in run(kernels, "honest").values())


def test_the_machines_peaks_are_measured() -> None:
    found = peaks("cpu", ["fp32"])
    assert set(found) == {"fp32", "fp64", "bytes"} and all(value > 1e8 for value in found.values())


def test_the_command_writes_json_markdown_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "md", "svg")}
    code = main([
        "bench", "--mechanism", "softmax_attention,eca_channel_attention", "--size", "tiny", "--repeats", "1",
        "--json", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["svg"]),
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    document = json.loads(files["json"].read_text())
    validate(document)
    assert {row["mechanism"] for row in document["rows"]} == {"softmax_attention", "eca_channel_attention"}
    assert all(row["seconds"] > 0 and row["contender"] in ("equations", "reference") for row in document["rows"])
    assert table(document) + "\n" == files["md"].read_text() == printed
    assert "<svg" in files["svg"].read_text()
    document["rows"][0]["seconds"] = "fast"
    with pytest.raises(Exception, match="is not of type"):
        validate(document)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "size 'huge' is unknown; known: tiny"),
        (["--size", "W=3"], "--size names 'W'; softmax_attention has batch"),
        (["--size", "N=x"], "--size N must be an integer of at least 0, got 'x'"),
        (["--set", "speed=1"], "--set names 'speed'; the options of softmax_attention: causal"),
        (["--candidate", "no_such_module:f"], "no_such_module"),
        (["--repeats", "0"], "'0' is no count"),
        (["--device", "cuda"], "no CUDA device is available here"),
    ],
    ids=["size", "part", "number", "option", "candidate", "repeats", "device"],
)
def test_bad_input_is_one_line_and_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert main(["bench", "--mechanism", "softmax_attention", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_a_size_that_the_constraints_forbid_is_refused() -> None:
    with pytest.raises(CaseError, match="softmax_attention"):
        bench(
            "softmax_attention", ["reference"], "equations", sizes=[{"heads": 3, "kv_heads": 2}], dtypes=["fp32"],
            directions=["forward"], peak={"fp32": 1.0, "fp64": 1.0, "bytes": 1.0},
        )  # fmt: skip
