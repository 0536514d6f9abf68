"""HTML from nested calls: `el("p", "a < b", class_="note")`. Whatever is not `Html` already is escaped.

The pages need a dozen elements and no template language; this is all of it. Block elements end with a line break, so
that a change of a page reads as a change of lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Html(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


Child = str | None
"""Text to be escaped, markup, or nothing."""

_VOID = frozenset({"meta", "link", "br", "hr"})
_INLINE = frozenset({"a", "b", "code", "em", "span"})


def el(tag: str, *children: Child, **attributes: str | int | None) -> Html:
    """An element. Of an attribute's name a trailing underscore is dropped, others become hyphens; None: left out."""
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{shown}>\n")
    end = "" if tag in _INLINE else "\n"
    return Html(f"<{tag}{shown}>{join(children)}</{tag}>{end}")


def join(children: Iterable[Child]) -> Html:
    """Several pieces after one another, each escaped unless it is markup."""
    return Html("".join(child if isinstance(child, Html) else escape(child or "", quote=False) for child in children))


def prose(text: str) -> Html:
    """Text in which `code` stands in backticks."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return join([text])
    return join(el("code", part) if number % 2 else part for number, part in enumerate(parts))


def anchor(text: str) -> str:
    """The id of a heading: `Where it is` gives `where-it-is`."""
    return "-".join("".join(char if char.isalnum() else " " for char in text.lower()).split())


def section(heading: str, *children: Child) -> Html:
    """A part of the page under a second-level heading that can be linked to."""
    return el("section", el("h2", heading, id=anchor(heading)), *children)


def fold(summary: Child, *children: Child) -> Html:
    """Something that is closed at first."""
    return el("details", el("summary", summary), *children)


def recorded(*children: Child) -> Html:
    """What depends on more than the mechanism files (kernels, recorded runs), between two comments that say so."""
    return join([Html("<!-- recorded -->\n"), *children, Html("<!-- end -->\n")])


def scroll(label: str, *children: Child) -> Html:
    """A box that scrolls sideways in itself, by keyboard too, so that the page never does."""
    return el("div", *children, class_="scroll", role="region", aria_label=label, tabindex=0)


def table(label: str, headings: Iterable[str], rows: Iterable[Iterable[Child]], numbers: Iterable[int] = ()) -> Html:
    """A table whose first column names its rows; the columns `numbers` are aligned to the right."""
    right = frozenset(numbers)

    def style(column: int) -> str | None:
        return "number" if column in right else None

    head = el("tr", *(el("th", text, scope="col", class_=style(n)) for n, text in enumerate(headings)))
    body = [
        el("tr", *(
            el("td", cell, class_=style(n)) if n else el("th", cell, scope="row") for n, cell in enumerate(row)
        ))
        for row in rows
    ]  # fmt: skip
    return scroll(label, el("table", el("thead", head), el("tbody", *body)))


def document(title: str, description: str, *body: Child, up: bool) -> Html:
    """A whole page. `up`: with a link to the index above the body."""
    way = el("a", "Atlas of attention", href="index.html") if up else el("span", "attnspec")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="description", content=description),
        el("title", title),
        el("link", rel="stylesheet", href="atlas.css"),
    )
    page = el(
        "body",
        el("a", "Skip to the content", href="#content", class_="skip"),
        el("header", el("nav", way, aria_label="Atlas")),
        el("main", *body, id="content"),
        el("footer", el("p", "Written by ", el("code", "attnspec atlas"), " from the mechanism files; nothing on it is "
                        "typed by hand.")),
    )  # fmt: skip
    return join([Html("<!DOCTYPE html>\n"), el("html", head, page, lang="en")])
