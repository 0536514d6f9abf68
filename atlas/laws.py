"""Invariants, identities, claims and evidence of a mechanism on its page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnspec.atlas.markup import Child, Html, el, fold, prose
from attnspec.spec import Mechanism


def invariants(mechanism: Mechanism) -> Html:
    """What holds between calls of the mechanism."""
    return el("ul", *(el("li", *_law(law)) for law in mechanism.invariants), class_="laws")


def identities(mechanism: Mechanism) -> Html:
    """Settings under which it equals something else, with links to the other mechanisms."""
    return el("ul", *(el("li", *_law(law)) for law in mechanism.identities), class_="laws")


def claims(mechanism: Mechanism) -> Html:
    """The papers' checkable statements, and what became of them."""
    return el("ul", *(el("li", *_law(law, status(law))) for law in mechanism.claims), class_="laws")


def status(claim: Mapping[str, Any]) -> str:
    """`confirmed`, `conditional` (it needs a condition that the paper does not state) or `refuted`."""
    return "refuted" if claim.get("refuted") else "conditional" if claim.get("where") else "confirmed"


def evidence(mechanism: Mechanism) -> Html:
    """What was compared with other people's code, and what was found there."""
    return el("ul", *(el("li", *_evidence(entry)) for entry in mechanism.evidence), class_="laws")


def reduced_to(mechanism: Mechanism, others: Iterable[Mechanism]) -> list[tuple[str, str]]:
    """Identities of other mechanisms that lead to this one: the other's name and the statement."""
    return [
        (other.name, str(law["statement"]))
        for other in others
        for law in (*other.invariants, *other.identities)
        if law.get("mechanism") == mechanism.name
    ]


def to_page(name: str) -> Html:
    """A link to a mechanism's page."""
    return el("a", name, href=f"{name}.html")


def _law(law: Mapping[str, Any], verdict: str = "") -> list[Child]:
    marks = [(verdict, f"badge {verdict}")] if verdict else []
    marks += [(key, "badge") for key, known in (("proved", "prove"), ("exact", "exact")) if law.get(known)]
    parts: list[Child] = [el("b", el("code", str(law["name"]))), " "]
    parts += [piece for text, style in marks for piece in (el("span", text, class_=style), " ")]
    parts.append(prose(str(law["statement"])))
    if law.get("where"):
        parts += ["; where ", el("code", str(law["where"]))]
    if law.get("mechanism"):
        parts += [" (see ", to_page(str(law["mechanism"])), ")"]
    for label, key in (("Refuted: ", "refuted"), ("Source: ", "source")):
        if law.get(key):
            parts.append(el("p", label, prose(str(law[key]))))
    parts.append(fold("Formula", el("pre", el("code", "\n".join(_lines(law))), tabindex=0)))
    return parts


def _lines(law: Mapping[str, Any]) -> list[str]:
    """The law's own text: its setting, the second call, what must hold."""
    lines = [f"{label}: {_listed(law[key])}" for label, key in (("given", "given"), ("without", "without"),
             ("options", "options"), ("options of the second call", "other_options")) if law.get(key)]  # fmt: skip
    if law.get("other"):
        lines += ["second call:", *(f"    {line}" for line in str(law["other"]).strip().splitlines())]
    return lines + str(law.get("equal") or law.get("holds")).strip().splitlines()


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_listed(entry)}" for name, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_listed(entry) for entry in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _evidence(entry: Mapping[str, Any]) -> list[Child]:
    parts: list[Child] = [prose(str(entry["statement"]))]
    origin = [f"{key}: {entry[key]}" for key in ("source", "commit") if entry.get(key)]
    return [*parts, el("p", "; ".join(origin), class_="aside")] if origin else parts
