"""A candidate in a worker process: whatever it does, the suite says what happened and goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from attnspec.conformance import wire
from attnspec.conformance.candidate import CandidateError
from attnspec.conformance.process import Worker
from attnspec.conformance.session import Session
from attnspec.conformance.types import Case, CaseResult
from attnspec.conformance.worker import Load, address
from attnspec.tests.small_suite import INTERFACE, SmallSuite, make_case

torch = pytest.importorskip("torch")

NAUGHTY = str(Path(__file__).parent / "naughty_candidates.py")
MEMORY = 8 << 30


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as shared:
        yield shared


def posed(worker: Worker, name: str, *cases: Case, timeout: float = 20.0, memory: int = MEMORY) -> list[CaseResult]:
    """The results of one naughty candidate on some cases."""
    session = Session(
        f"{NAUGHTY}:{name}", SmallSuite(), timeout=timeout, memory=memory, station=worker, oracles=0
    )
    with session:
        return list(session.judge_all(cases or (make_case(),)))


def test_an_honest_candidate_passes_with_a_receipt(worker: Worker) -> None:
    (result,) = posed(worker, "honest")
    assert result.status == "pass" and not result.message
    told = result.receipt
    assert told["entered"] == 1 and told["device"] == "cpu" and told["dtypes"] == {"O": "fp32"}
    assert told["function"].startswith(NAUGHTY) and told["oracle_calls"] == []
    assert told["memory"] == "inputs and allocations guarded" and told["watched"] == "every call"


WRONG = [
    ("returns_its_input", "error", "returns its input V as O (the same memory)"),
    ("returns_a_view_of_its_input", "fail", "returns its input V as O (the same memory)"),
    ("calls_the_oracle", "fail", "calls the oracle (attnspec.spec.mechanism.Mechanism.evaluate"),
    ("calls_the_reference", "fail", "calls the oracle (attnspec.reference.softmax_attention.softmax_attention"),
    ("writes_out_of_bounds", "fail", "writes out of bounds: 3 elements past its end (the first 0 past it)"),
    ("writes_before_its_input", "fail", "writes out of bounds: 2 elements before the input K"),
    ("reads_out_of_bounds", "fail", "reads out of bounds: the result changes with what lies around the inputs"),
    ("mutates_its_input", "fail", "changes its input K: 20 of 20 elements"),
    ("exits", "error", "called sys.exit(3)"),
    ("raises", "error", "ValueError: head size 4 is odd and this is a second line (naughty_candidates.py:"),
    ("wrong_shape", "error", "O has shape (1, 3, 2, 6), expected (1, 2, 3, 6)"),
    ("wrong_dtype", "error", "O is fp64, expected fp32"),
    ("caches_by_shape", "fail", "the result is that of an earlier call with other inputs"),
    ("reuses_its_output", "fail", "returns for O the memory that an earlier call returned"),
    ("returns_nan", "fail", "is nan, expected"),
    ("never_writes_a_row", "fail", "never writes 12 of 36 elements of O"),
    ("allocates_too_much", "error", "out of memory: RuntimeError: "),
    ("raises_in_a_thread", "fail", "a thread of the candidate raised RuntimeError: the helper failed"),
    ("returns_none", "error", "returned None for O, expected a torch tensor"),
    ("refuses_everything", "refused", "not on this machine"),
]


@pytest.mark.parametrize(("name", "status", "told"), WRONG, ids=[entry[0] for entry in WRONG])
def test_what_is_wrong_is_told_for_what_it_is(worker: Worker, name: str, status: str, told: str) -> None:
    (result,) = posed(worker, name)
    assert result.status == status
    assert told in result.message
    assert "\n" not in result.message


def test_a_candidate_that_is_right_only_for_contiguous_inputs_is_told_so(worker: Worker) -> None:
    cases = [make_case(layout=layout) for layout in ("contiguous", "transposed", "strided", "misaligned")]
    results = posed(worker, "right_only_for_contiguous", *cases)
    assert [result.status for result in results] == ["pass", "fail", "fail", "pass"]
    assert "is right only for contiguous inputs: wrong where they are transposed in memory" in results[1].message


def test_a_layout_may_be_that_of_one_input_only(worker: Worker) -> None:
    (result,) = posed(worker, "honest", make_case(layout="strided:K"))
    assert result.receipt["layouts"] == {"Q": "contiguous", "K": "strided", "V": "contiguous"}


def test_output_is_captured_and_does_not_disturb_the_protocol(worker: Worker) -> None:
    (result,) = posed(worker, "prints")
    assert result.status == "pass"
    for line in ("hello from the kernel", "and from its error stream", "and from below Python"):
        assert line in result.receipt["printed"]


def test_an_error_stays_an_error_and_a_refusal_is_none(worker: Worker) -> None:
    results = posed(worker, "refuses_decoding", make_case("small"), make_case("decode"))
    assert [(result.status, result.message) for result in results] == [
        ("pass", ""),
        ("refused", "one query is not supported"),
    ]


def test_contradicting_inputs_must_be_refused(worker: Worker) -> None:
    case = make_case(check="refusal")
    (accepted,) = posed(worker, "honest", case)
    assert (accepted.status, accepted.message) == (
        "fail",
        "computes something for inputs that contradict each other",
    )
    (refused,) = posed(worker, "raises", case)
    assert refused.status == "pass"


def test_a_determinism_case_calls_twice_with_the_same_inputs(worker: Worker) -> None:
    session = Session(f"{NAUGHTY}:differs_between_calls", SmallSuite(), station=worker, oracles=0, memory=MEMORY)
    with session:
        seen = session.examine(make_case(check="determinism"))
    (repeat,) = seen.observation.repeats
    assert not np.array_equal(repeat["outputs"]["O"], seen.observation.outputs["O"])


def test_gradients_that_do_not_reach_an_input_are_named(worker: Worker) -> None:
    (result,) = posed(worker, "breaks_its_gradient", make_case(direction="backward"))
    assert result.status == "fail"
    assert result.message.startswith("no gradient reaches K (declare differentiable=... if that is intended)")
    (lacking,) = [entry for entry in result.evidence if entry.name == "K"]
    assert lacking.worst_got == 0.0 and not lacking.passed, "no gradient means zero"
    (honest,) = posed(worker, "honest", make_case(direction="backward"))
    assert honest.status == "pass" and {entry.name for entry in honest.evidence} == {"Q", "K", "V"}


def test_a_crash_is_named_with_its_place_and_the_next_case_finds_a_fresh_worker() -> None:
    with Worker() as worker:
        results = posed(worker, "segfaults_when_decoding", make_case("decode"), make_case("small"))
        assert worker.starts == 2
    assert results[0].status == "crash"
    assert "crashed: segmentation fault (SIGSEGV) in naughty_candidates.py:" in results[0].message
    assert "(segfaults_when_decoding)" in results[0].message
    assert results[1].status == "pass"


def test_os_exit_is_a_crash_even_with_exit_code_zero() -> None:
    with Worker() as worker:
        (result,) = posed(worker, "exits_hard")
    assert (result.status, result.message) == ("crash", "ended the process with exit code 0 (os._exit)")


def test_an_endless_loop_is_stopped_and_its_place_is_told() -> None:
    with Worker() as worker:
        started = time.monotonic()
        posed(worker, "sleeps_when_decoding", make_case("small"), timeout=30.0)
        results = posed(
            worker, "sleeps_when_decoding", make_case("small"), make_case("decode"), make_case("square"), timeout=0.5
        )
        assert time.monotonic() - started < 60
    assert [result.status for result in results] == ["pass", "timeout", "pass"]
    assert results[1].message.startswith("did not return within 0.5 s in naughty_candidates.py:")


def test_a_candidate_that_never_returns_is_given_up() -> None:
    cases = [make_case(seed=seed) for seed in range(6)]
    with Worker() as worker:
        results = posed(worker, "loops_forever", *cases, timeout=0.2)
    assert [result.status for result in results] == ["timeout"] * 6
    assert results[2].message.startswith("did not return within")
    assert results[3].message == "not run: the candidate did not return in 3 cases in a row"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import os; os._exit(7)", "importing it failed: ended the process with exit code 7"),
        ("import ctypes; ctypes.string_at(0)", "importing it failed: crashed: segmentation fault (SIGSEGV)"),
        ("raise OSError('no driver')", "OSError: no driver"),
    ],
)
def test_an_import_that_ends_the_process_is_one_clear_line(tmp_path: Path, body: str, told: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(body + "\n")
    with Worker() as worker, pytest.raises(CandidateError) as caught:
        worker.load(Load(f"{path}:f", INTERFACE, "cpu"))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_device_that_is_not_there_or_not_stated_is_one_clear_line(worker: Worker, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(CandidateError, match="device cuda: torch sees no GPU here"):
            worker.load(Load(f"{NAUGHTY}:honest", INTERFACE, "cuda"))
    path = tmp_path / "gpu_only.py"
    path.write_text("import attnspec\n@attnspec.candidate(devices=['cuda'])\ndef f(q, k, v): return q\n")
    with pytest.raises(CandidateError, match="does not run on cpu; it states cuda"):
        worker.load(Load(f"{path}:f", INTERFACE, "cpu"))


def test_closing_a_worker_ends_what_the_candidate_started(tmp_path: Path) -> None:
    path = tmp_path / "spawns.py"
    path.write_text(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "def f(q, k, v): return q\n"
    )
    with Worker() as worker:
        worker.load(Load(f"{path}:f", INTERFACE, "cpu"))
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, 0)
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split(") ")[1][0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the candidate's child process is still running")


def test_functions_are_addressed_so_that_a_worker_can_import_them() -> None:
    from attnspec.conformance.candidate import resolve

    assert address("torch-sdpa") == "torch-sdpa"
    assert address(resolve("torch-sdpa")) == "torch-sdpa"
    assert address(make_case).endswith(":make_case")
    with pytest.raises(CandidateError, match="a worker process cannot import it"):
        address(lambda q, k, v: q)


@pytest.mark.parametrize(("computed", "statuses"), [(lambda: 0.0, ["pass"] * 2), (time.monotonic, ["pass", "timeout"])])
def test_the_limit_counts_what_was_computed_and_not_the_clock(
    computed: Callable[[], float], statuses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that is busy elsewhere an honest kernel is not late; the first call has time to warm up."""
    monkeypatch.setattr(Worker, "_computed", lambda self: computed())
    with Worker() as worker:
        results = posed(worker, "waits_a_second", make_case("small"), make_case("square"), timeout=0.6)
    assert [result.status for result in results] == statuses


@pytest.mark.parametrize(
    ("beyond", "computed", "late"),
    [
        (-0.1, 0.0, False),  # within its time
        (0.1, 10.0, True),  # has computed for as long as it may
        (25.0, 4.0, False),  # starved: four seconds of thirty-five
        (31.0, 0.1, True),  # asleep for four times its limit
        (191.0, 9.0, True),  # starved for twenty times its limit
    ],
)
def test_a_starved_process_gets_longer_than_a_sleeping_one(
    monkeypatch: pytest.MonkeyPatch, beyond: float, computed: float, late: bool
) -> None:
    worker = Worker()
    monkeypatch.setattr(worker, "_computed", lambda: computed)
    worker._spent = 0.0
    assert worker._is_late(beyond, 10.0) is late
    assert worker._is_late(beyond, None) is (beyond > 0)


def test_large_arrays_travel_unchanged() -> None:
    reads, writes = os.pipe()
    array = np.arange(10_000, dtype=np.float32)[::2]
    wire.send(writes, ("observed", {"O": array[:1000]}))
    kind, content = wire.receive(reads)
    os.close(writes)
    assert kind == "observed" and np.array_equal(content["O"], array[:1000])
    assert content["O"].flags.writeable
    with pytest.raises(EOFError):
        wire.receive(reads)
    os.close(reads)


