"""The tests' tests: the suite's standard cases reject every known wrong variant, and the harness cannot fool itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import attnspec.perf
from attnspec.conformance import mutation
from attnspec.conformance.cases import cases_for
from attnspec.conformance.coverage import mutation_result
from attnspec.conformance.mechanical import Arena, Outcome, all_mutants, everything
from attnspec.conformance.mutation import MutationReport, kill_matrix, run, table
from attnspec.conformance.suite import Suite
from attnspec.conformance.types import Case
from attnspec.spec import load, mechanisms
from attnspec.spec.language.mutate import Mutant

NAME = "softmax_attention"
RECORDS = Path(next(iter(attnspec.perf.__path__))) / "results"


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite(NAME)


@pytest.fixture(scope="module")
def forward(suite: Suite) -> list[Case]:
    return suite.cases("standard", ("fp32",), "forward", 0, everything(suite.interface))


def causal_case(forward: list[Case]) -> Case:
    causal = [case for case in forward if case.group == "options" and dict(case.options) == {"causal": True}]
    return next(case for case in causal if len(case.inputs) == 2)


def mutant(identifier: str) -> Mutant:
    return next(entry for _, entry in all_mutants(load(NAME)) if entry.id == identifier)


def identifiers(description: str) -> list[str]:
    return [entry.id for _, entry in all_mutants(load(NAME)) if entry.description.startswith(description)]


def test_a_case_kills_the_mutants_that_its_options_bring_into_play(forward: list[Case]) -> None:
    matrix = kill_matrix(causal_case(forward))
    assert set(matrix) == {entry.id for way, entry in all_mutants(load(NAME)) if way == "forward"}
    past = {name: killed for name, killed in matrix.items() if name.startswith("past:")}
    assert past["past:comparison-flipped:1"] and past["past:comparison-off-by-one:1"]
    windows = [name for name in matrix if name.startswith(("near:comparison", "ahead:comparison", "block:operator"))]
    assert windows and not any(matrix[name] for name in windows)
    assert sum(matrix.values()) > 60


def test_without_the_option_the_mutant_does_not_matter(suite: Suite, forward: list[Case]) -> None:
    plain = next(case for case in forward if not case.options and len(case.inputs) == 2)
    arena = Arena(suite, "forward", [plain, causal_case(forward)])
    flipped = mutant("past:comparison-flipped:1")
    assert [arena.matters(flipped, case) for case in (plain, causal_case(forward))] == [False, True]
    found = arena.run(flipped)
    assert (found.status, found.case, found.reached) == ("killed", causal_case(forward).id, 1)
    assert found.ratio > 1


def test_a_mutant_that_no_case_reaches_is_an_error(suite: Suite, forward: list[Case]) -> None:
    plain = next(case for case in forward if not case.options and len(case.inputs) == 2)
    found = Arena(suite, "forward", [plain]).run(mutant("past:comparison-flipped:1"))
    assert (found.status, found.message) == ("error", "takes part in no case")


def test_a_mutant_that_can_be_evaluated_nowhere_is_invalid_and_no_kill(suite: Suite, forward: list[Case]) -> None:
    case = causal_case(forward)
    original = mutant("past:comparison-flipped:1")
    arena = Arena(suite, "forward", [case])

    def fails(*_: object) -> None:
        from attnspec.spec.language import EvaluationError

        raise EvaluationError("made up")

    arena.compute = fails  # type: ignore[method-assign,assignment]
    found = arena.run(original)
    assert (found.status, found.reached, found.raised) == ("invalid", 1, 1) and "made up" in found.message


def test_a_mutant_that_fails_on_a_legal_call_is_killed_by_it(suite: Suite, forward: list[Case]) -> None:
    right, wrong = [case for case in forward if case.options.get("causal") and case.group == "options"][:2]
    arena = Arena(suite, "forward", [right, wrong])
    compute = arena.compute

    def fails(case: Case, program: object = None) -> object:
        from attnspec.spec.language import EvaluationError

        if case is wrong and program is not None:
            raise EvaluationError("made up")
        return compute(case)  # the original's values

    arena.compute = fails  # type: ignore[method-assign,assignment]
    found = arena.run(mutant("past:comparison-flipped:1"))
    assert (found.status, found.case, found.raised) == ("killed", wrong.id, 1) and "made up" in found.message


def test_the_original_as_its_own_mutant_survives(suite: Suite, forward: list[Case]) -> None:
    case = causal_case(forward)
    arena = Arena(suite, "forward", [case])
    arena.matters = lambda *_: True  # type: ignore[method-assign]
    same = dataclasses.replace(mutant("past:comparison-flipped:1"), program=suite.mechanism.program)
    assert arena.run(same).status == "survived"


def test_a_case_that_rejects_the_original_cannot_kill(suite: Suite, forward: list[Case]) -> None:
    case = causal_case(forward)
    arena = Arena(suite, "forward", [case])
    arena._exact[case.id] = {name: value + 1.0 for name, value in arena.exact(case).items()}
    with pytest.raises(AssertionError, match="rejects the original"):
        arena.run(mutant("past:comparison-flipped:1"))


def report(*outcomes: Outcome) -> MutationReport:
    return MutationReport(NAME, list(outcomes))


def outcome(identifier: str, status: str, message: str = "") -> Outcome:
    return Outcome(identifier, "forward", "some change", status, message=message)


def test_survivors_need_an_explanation_and_explanations_a_survivor() -> None:
    spec = dataclasses.replace(
        load(NAME),
        equivalent_mutants=dict.fromkeys(("a", "b", "gone"), "for a reason"),
    )
    statuses = {"a": "survived", "b": "killed", "c": "survived"}
    found = report(*(outcome(name, status) for name, status in statuses.items()), outcome("d", "error", "no"))
    mutation._explain(found, spec, complete=True)
    assert found.explained == {"a": "for a reason"}
    assert [entry.id for entry in found.survivors] == ["c"]
    assert found.problems == [
        "equivalent_mutant 'b': the mutant is killed, so it is no equivalent",
        "equivalent_mutant 'gone': no mutant has this id",
        "d: no (some change)",
    ]
    assert not found.ok and (found.killed, found.total) == (1, 3)
    text = table(found)
    assert "1 of 3 mechanical mutants killed" in text and "survived: c" in text and "problem: d: no" in text


def test_a_clean_report_is_ok() -> None:
    found = report(outcome("a", "killed"))
    assert found.ok and found.document()["killed"] == found.document()["total"] == 1


def test_a_sample_of_mechanical_mutants_is_killed_by_both_directions() -> None:
    chosen = {*identifiers("factor `scale` dropped"), *identifiers("option scale ignored"), "LSE:function-replaced:1"}
    found = run(NAME, processes=0, mechanical=lambda name: name in chosen, planted=False)
    assert {entry.id for entry in found.mechanical} == chosen
    assert {entry.kind for entry in found.mechanical} == {"forward", "backward"}
    assert found.ok and found.killed == len(chosen), table(found)


@pytest.mark.slow
def test_a_sample_of_planted_kernels_is_rejected_where_they_are_wrong() -> None:
    pytest.importorskip("torch")
    chosen = {"causal_strict", "gqa_heads_tiled", "dk_lacks_scale", "lse_is_base_2", "writes_behind_the_keys"}
    found = run(NAME, processes=0, mechanical=False, planted=lambda name: name in chosen)
    assert {entry.id for entry in found.planted} == chosen
    assert found.ok, table(found)
    assert {entry.id: entry.region for entry in found.planted} == {
        entry.id: entry.expected_region for entry in found.planted
    }


@pytest.mark.slow
def test_the_parts_do_not_depend_on_the_number_of_processes() -> None:
    chosen = set(identifiers("`<=` replaced by"))
    here = run(NAME, processes=0, mechanical=lambda name: name in chosen, planted=False)
    apart = run(NAME, processes=2, mechanical=Members(frozenset(chosen)), planted=False)
    assert here.document() == apart.document()


@dataclasses.dataclass(frozen=True)
class Members:
    """Membership as a function."""

    names: frozenset[str]

    def __call__(self, name: str) -> bool:
        return name in self.names


@pytest.mark.slow
def test_honest_kernels_pass_every_standard_case() -> None:
    pytest.importorskip("torch")
    from attnspec.conformance.planted.honest import HONEST
    from attnspec.conformance.planted_run import CachedSuite, standard
    from attnspec.conformance.session import Session

    shared = CachedSuite(NAME)
    cases = standard(shared)
    wrong = []
    for name, function in HONEST.items():
        with Session(function, shared, isolated=False, oracles=0) as session:
            for case in cases if name in ("honest_tiles_16", "honest_splits_3") else cases[:: 7]:
                result = session.judge(case)
                if result.status != "pass":
                    wrong.append(f"{name}: {result.status} {case.id}: {result.message[:200]}")
    assert not wrong, "\n".join(wrong[:10])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_mutant_is_killed_or_explained_and_every_planted_kernel_rejected() -> None:
    pytest.importorskip("torch")
    found = run(NAME, processes=2)
    assert found.ok, table(found)
    assert found.killed >= 0.95 * found.total
    assert all(entry.status == "killed" for entry in found.planted) and len(found.planted) >= 100
    assert found.regions_right >= 80, table(found)


@pytest.mark.parametrize("name", mechanisms())
def test_every_explained_survivor_exists(name: str) -> None:
    known = {entry.id for _, entry in all_mutants(load(name))}
    assert set(load(name).equivalent_mutants) <= known


@pytest.mark.parametrize("name", [name for name in mechanisms() if mutation_result(name)])
def test_a_record_is_of_the_file_as_it_stands(name: str) -> None:
    killed, counted = mutation_result(name) or (0, 0)
    record = json.loads((RECORDS / f"mutants.{name}.json").read_text(encoding="utf-8"))
    assert counted + record["invalid"] == len(all_mutants(load(name))), f"attnspec mutants --mechanism {name} --record"
    assert record["equivalent"] == len(load(name).equivalent_mutants)
    assert killed == record["total"], "a survivor without a reason"


def test_mutants_that_can_be_evaluated_nowhere_are_shown() -> None:
    found = report(outcome("a", "killed"), outcome("b", "invalid", "division by zero"))
    assert found.ok and (found.killed, found.total) == (1, 1)
    assert "1 can be evaluated nowhere" in table(found) and "evaluated nowhere: b: division by zero" in table(found)


def test_cases_of_the_arena_are_the_suites_own(suite: Suite, forward: list[Case]) -> None:
    assert {case.id for case in Arena(suite, "forward", forward).cases} <= {case.id for case in cases_for(load(NAME))}
