"""The account of the papers is complete and consistent with the mechanism files."""

from __future__ import annotations

from attnspec.spec import mechanisms
from attnspec.spec.papers import papers


def test_every_paper_has_a_mechanism_or_a_reason() -> None:
    for paper in papers():
        assert (paper.mechanism is None) != (paper.reason is None), paper
        assert len(paper.reason or paper.summary) > 10, paper


def test_the_numbers_run_without_gaps_over_all_321_papers() -> None:
    assert [paper.number for paper in papers()] == list(range(321))


def test_a_paper_is_done_exactly_when_its_mechanism_file_exists() -> None:
    known = frozenset(mechanisms())
    for paper in papers():
        assert (paper.status(known) == "done") == (paper.mechanism in known)
    planned = next(paper for paper in papers() if paper.mechanism)
    assert planned.status(frozenset()) == "planned"
    assert planned.status(frozenset({planned.mechanism or ""})) == "done"


def test_titles_are_unique() -> None:
    titles = [paper.title for paper in papers()]
    assert len(set(titles)) == len(titles)
