"""The atlas's first page: the mechanisms by family, and the coverage table."""

from __future__ import annotations

from collections.abc import Iterable

from attnspec.atlas.laws import to_page
from attnspec.atlas.markup import Html, anchor, document, el, prose, recorded, section, table
from attnspec.conformance import coverage
from attnspec.spec import Mechanism

ABOUT = (
    "One page for each attention mechanism that attnspec specifies: its equations as they are evaluated, a picture of "
    "which position reads which, its options, what must hold and what was claimed, what it costs, and what was tested."
)
_NUMBERS = (5, 6, 7)


def index(mechanisms: Iterable[Mechanism]) -> Html:
    """The whole page."""
    families: dict[str, list[Mechanism]] = {}
    for mechanism in mechanisms:
        families.setdefault(mechanism.family, []).append(mechanism)
    lists = [
        el(
            "section",
            el("h3", family.replace("_", " "), id=anchor(family)),
            el("ul", *(el("li", to_page(one.name), ": ", prose(one.summary)) for one in found)),
        )
        for family, found in sorted(families.items())
    ]
    rows = [[to_page(row.name), *coverage.cells(row)[1:]] for row in coverage.rows()]
    return document(
        "Atlas of attention",
        ABOUT,
        el("h1", "Atlas of attention"),
        el("p", ABOUT, class_="lead"),
        section("Mechanisms by family", el("div", *lists, class_="families")),
        section(
            "Coverage",
            recorded(el("p", coverage.account()), table("Coverage", coverage.HEADINGS, rows, numbers=_NUMBERS)),
        ),
        up=False,
    )
