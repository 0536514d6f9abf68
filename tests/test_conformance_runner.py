"""A run ends with a report, whatever the candidate does; green only where something was judged and nothing fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnspec.conformance.candidate import CandidateError
from attnspec.conformance.expectations import load as load_lists
from attnspec.conformance.process import Worker
from attnspec.conformance.runner import run
from attnspec.conformance.types import CaseResult, Report
from attnspec.tests.small_suite import LAYOUTS, SHAPES, SmallSuite

torch = pytest.importorskip("torch")

NAUGHTY = str(Path(__file__).parent / "naughty_candidates.py")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as shared:
        yield shared


def ran(worker: Worker | None, name: str, suite: SmallSuite | None = None, **arguments: Any) -> Report:
    stated: dict[str, Any] = {"directions": ("forward",), "oracles": 0, "timeout": 20.0, "memory": 8 << 30, **arguments}
    return run(f"{NAUGHTY}:{name}", suite or SmallSuite(), level="smoke", worker=worker, **stated)


def statuses(report: Report) -> set[str]:
    return {result.status for result in report.results}


def test_an_honest_candidate_conforms(worker: Worker) -> None:
    report = ran(worker, "honest", directions=("forward", "backward"))
    assert report.exit_code == 0 and statuses(report) == {"pass"}
    assert len(report.results) == 2 * 3 * len(SHAPES) * len(LAYOUTS)
    assert report.not_supported["softcap"] == "no such parameter; always None"
    assert report.not_supported["output LSE"] == "not returned"
    assert report.environment["framework"] == "torch" and report.environment["device"] == "cpu"
    assert report.candidate == f"{NAUGHTY}:honest"
    for result in report.results:
        assert result.evidence and result.receipt["entered"] == 1 and result.seconds > 0
    json.dumps(report.environment), json.dumps([result.receipt for result in report.results])


def test_the_order_is_that_of_the_cases_and_the_same_every_time(worker: Worker) -> None:
    first, second = (ran(worker, "refuses_decoding") for _ in range(2))
    ids = [result.case.id for result in first.results]
    assert ids == [result.case.id for result in second.results]
    assert [r.message for r in first.results] == [r.message for r in second.results]
    directions = [result.case.direction for result in ran(worker, "honest", directions=("backward", "forward")).results]
    assert directions == sorted(directions, reverse=True), "forward comes first"


@pytest.mark.parametrize(
    ("name", "code", "found"),
    [
        ("honest", 0, {"pass"}),
        ("refuses_decoding", 0, {"pass", "refused"}),
        ("refuses_everything", 2, {"refused"}),
        ("raises", 1, {"error"}),
        ("wrong_shape", 1, {"error"}),
        ("returns_nan", 1, {"fail"}),
        ("right_only_for_contiguous", 1, {"pass", "fail"}),
    ],
)
def test_exit_codes(worker: Worker, name: str, code: int, found: set[str]) -> None:
    report = ran(worker, name)
    assert (report.exit_code, statuses(report)) == (code, found)
    assert report.summary


def test_a_run_goes_on_after_crashes_and_timeouts() -> None:
    for name, status in (("segfaults_when_decoding", "crash"), ("sleeps_when_decoding", "timeout")):
        report = ran(None, name, dtypes=["fp32"], timeout=0.5)
        assert report.exit_code == 1
        got = {(result.case.group, result.status) for result in report.results}
        assert got == {("small", "pass"), ("square", "pass"), ("decode", status)}


def test_a_run_without_cases_could_not_judge(worker: Worker) -> None:
    assert ran(worker, "honest", select="no/such/*").exit_code == 2
    report = ran(worker, "honest", dtypes=["fp64"])
    assert report.exit_code == 2 and not report.results
    assert report.not_supported["fp64"] == "the candidate states fp32, fp16, bf16"


def test_select_takes_patterns_or_a_function(worker: Worker) -> None:
    report = ran(worker, "honest", select=["*/transposed/fp32/*", "small/decode/*/bf16/*"])
    assert {result.case.id.split("/")[3] for result in report.results} == {"fp32", "bf16"}
    assert len(report.results) == len(SHAPES) + len(LAYOUTS)
    assert len(ran(worker, "honest", select=lambda case: case.layout == "strided").results) == 3 * len(SHAPES)


def test_what_cannot_be_posed_is_listed_and_not_run(worker: Worker) -> None:
    suite = SmallSuite([(("bias",), {}), ((), {"scale": 0.3}), ((), {"softcap": 2.0})])
    report = ran(worker, "honest", suite, dtypes=["fp32"])
    told = {result.message for result in report.results if result.status == "not_supported"}
    assert told == {
        "bias: no such parameter",
        "scale=0.3: no such parameter; always the mechanism's default",
        "softcap=2.0: no such parameter; always None",
    }
    assert {"bias", "scale", "softcap", "sink", "mask"} <= set(report.not_supported)


def test_a_direction_without_gradients_is_listed(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "forward_only.py"
    path.write_text(
        "import attnspec\nfrom attnspec.tests.naughty_candidates import attention\n"
        "@attnspec.candidate(differentiable=False)\ndef f(q, k, v): return attention(q, k, v)\n"
    )
    report = run(f"{path}:f", SmallSuite(), worker=worker, oracles=0, memory=8 << 30)
    assert report.exit_code == 0 and {result.case.direction for result in report.results} == {"forward"}
    assert report.not_supported["backward"] == "the candidate states no gradient"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"level": "quick"}, "level 'quick' is unknown; expected smoke, standard, exhaustive"),
        ({"dtypes": ["float16"]}, "dtype 'float16' is unknown; expected fp32, fp16, bf16, fp64"),
        ({"device": "tpu"}, "device 'tpu' is unknown; expected cpu, cuda"),
        ({"directions": ("sideways",)}, "direction 'sideways' is unknown; expected forward, backward"),
        ({"directions": ()}, "no direction is given"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(CandidateError) as caught:
        run("torch-sdpa", SmallSuite(), **arguments)
    assert told in str(caught.value)


def test_progress_is_told_after_every_case(worker: Worker) -> None:
    seen: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, result: CaseResult) -> None:
        seen.append((done, total, result.status))

    report = ran(worker, "honest", dtypes=["fp32"], progress=progress)
    assert seen == [(number + 1, 9, "pass") for number in range(9)] and len(report.results) == 9


def test_an_interrupted_run_reports_what_was_done(worker: Worker) -> None:
    def progress(done: int, total: int, result: CaseResult) -> None:
        if done == 4:
            raise KeyboardInterrupt

    report = ran(worker, "honest", dtypes=["fp32"], progress=progress)
    assert len(report.results) == 4 and statuses(report) == {"pass"}
    assert report.exit_code == 2, "what was not run may have failed"
    assert report.problems == ["interrupted: 4 cases were judged, the others were not run"]
    again = ran(worker, "honest", dtypes=["fp32"])
    assert len(again.results) == 9 and again.exit_code == 0, "the worker is usable afterwards"


def test_skipped_cases_are_not_run_and_expected_failures_do_not_fail(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    path.write_text(
        '[[xfail]]\ncase = "*/transposed/*"\nreason = "strides are ignored"\n'
        '[[skip]]\ncase = "*/strided/*"\nreason = "too slow"\n'
    )
    report = ran(worker, "right_only_for_contiguous", expectations=load_lists([path]))
    by_layout = {(result.case.layout, result.status) for result in report.results}
    assert by_layout == {("contiguous", "pass"), ("transposed", "xfail"), ("strided", "skip")}
    assert report.exit_code == 0
    assert ran(worker, "honest", expectations=load_lists([path])).exit_code == 1, "an xfail that passes fails the run"


def test_a_failed_run_is_explained_while_the_candidate_is_loaded(worker: Worker) -> None:
    told: list[str] = []

    def explain(session: Any, report: Report) -> None:
        told.append(session.judge(report.results[0].case).status)

    ran(worker, "returns_nan", dtypes=["fp32"], explain=explain)
    ran(worker, "honest", dtypes=["fp32"], explain=explain)
    assert told == ["fail"]


def test_oracle_processes_give_the_same_results(worker: Worker) -> None:
    alone = ran(worker, "returns_a_view_of_its_input", oracles=0, directions=("forward", "backward"))
    ahead = ran(worker, "returns_a_view_of_its_input", oracles=2, directions=("forward", "backward"))
    assert [r.evidence for r in alone.results] == [r.evidence for r in ahead.results]
    assert [(r.case.id, r.status, r.message) for r in alone.results] == [
        (r.case.id, r.status, r.message) for r in ahead.results
    ]


def test_the_real_suite_judges_a_kernel_from_end_to_end(worker: Worker) -> None:
    arguments: dict[str, Any] = {"level": "smoke", "dtypes": ["bf16"], "worker": worker, "oracles": 0}
    report = run(f"{NAUGHTY}:honest", "softmax_attention", select="*/shapes/plain/*", **arguments)
    assert report.exit_code == 0, report.summary
    assert report.rounding["name"] == "fused"
    wrong = run(f"{NAUGHTY}:mutates_its_input", "softmax_attention", select="*/shapes/plain/*", **arguments)
    assert wrong.exit_code == 1
    assert all(r.message.startswith("changes its input K") for r in wrong.results if r.case.sizes["M"])


def test_a_declaration_that_does_not_exist_is_one_clear_line(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text(
        "import attnspec\n@attnspec.candidate(declares={'causal_allignment': 'top_left'})\ndef f(q, k, v): return q\n"
    )
    with pytest.raises(CandidateError) as caught:
        run(f"{path}:f", "softmax_attention", worker=worker)
    assert "declares 'causal_allignment', which is no named semantic" in str(caught.value)
    assert "did you mean 'causal_alignment'?" in str(caught.value)
