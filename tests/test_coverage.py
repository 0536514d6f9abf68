"""The coverage table is computed from the files, and says no more than they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import attnspec.reference
from attnspec import impls
from attnspec.conformance import coverage
from attnspec.spec import load, mechanisms
from attnspec.spec.laws import laws
from attnspec.spec.papers import papers


def test_every_mechanism_has_a_row_with_what_its_file_states() -> None:
    rows = {row.name: row for row in coverage.rows()}
    assert sorted(rows) == mechanisms()
    for name, row in rows.items():
        mechanism = load(name)
        assert (row.family, row.spec) == (mechanism.family, True)
        assert row.gradient == (mechanism.gradient is not None)
        claims = row.claims_confirmed + row.claims_conditional + row.claims_refuted
        assert (row.invariants, row.identities, claims) == tuple(
            len(part) for part in (mechanism.invariants, mechanism.identities, mechanism.claims)
        )
        assert row.claims_refuted == sum(law.kind == "claim" and bool(law.refuted) for law in laws(mechanism))


def test_the_reference_is_found_exactly_where_there_is_a_function() -> None:
    folder = Path(next(iter(attnspec.reference.__path__)))
    for row in coverage.rows():
        path = folder / f"{row.name}.py"
        text = path.read_text() if path.exists() else ""
        assert row.reference == (f"\ndef {row.name}(" in text)
        assert row.reference_backward == (f"\ndef {row.name}_backward(" in text)


def test_planned_rows_are_the_mechanisms_of_papers_without_a_file() -> None:
    planned = {row.name for row in coverage.rows(planned=True) if not row.spec}
    wanted = {paper.mechanism for paper in papers() if paper.mechanism} - set(mechanisms())
    assert planned == wanted


def test_the_totals_account_for_every_paper() -> None:
    totals = coverage.totals()
    assert totals.papers == len(papers()) == totals.papers_done + totals.papers_planned + totals.papers_without


def test_an_implementation_is_a_function_of_the_mechanisms_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "softmax.py").write_text(
        "@candidate(mechanism='one', outputs=('O',))\ndef one(q): ...\nclass Other:\n    def three(self): ...\n"
    )
    (tmp_path / "linear.py").write_text("@candidate(mechanism='two', differentiable=False)\ndef two(q): ...\n")
    monkeypatch.setattr(impls, "__path__", [str(tmp_path)])
    impls._sources.cache_clear()
    assert dict(impls.written("one")) == {"softmax": True}
    assert dict(impls.written("two")) == {"linear": False}
    assert dict(impls.written("three")) == {}
    with pytest.raises(LookupError, match="three"):
        impls.find("three")
    impls._sources.cache_clear()


def test_mutants_are_those_of_the_recorded_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "_folder", lambda package: tmp_path)
    assert coverage.mutation_result("m") is None
    (tmp_path / "results").mkdir()
    path = coverage.record({"mechanism": "m", "killed": 3, "total": 4, "equivalent": 2, "mutants": [1, 2]})
    assert json.loads(path.read_text()) == {"mechanism": "m", "killed": 3, "total": 4, "equivalent": 2}
    assert coverage.mutation_result("m") == (3, 6)
    path.write_text("{")
    assert coverage.mutation_result("m") is None


def test_the_document_and_the_table_agree() -> None:
    document = coverage.document()
    table = coverage.table()
    assert json.loads(json.dumps(document)) == document
    for row in document["mechanisms"]:
        line = next(line for line in table.splitlines() if line.startswith(f"| {row['name']} "))
        assert f"| {row['invariants']} | {row['identities']} | {row['proved']} | " in line
        for kind in ("confirmed", "conditional", "refuted"):
            assert (f"{row[f'claims_{kind}']} {kind}" in line) == bool(row[f"claims_{kind}"])
    assert f"{document['totals']['papers']} papers" in table
