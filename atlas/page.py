"""The page of one mechanism, section by section, from its file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

import attnspec.impls
from attnspec.atlas import laws
from attnspec.atlas.equations import costs, equations, forms
from attnspec.atlas.markup import Child, Html, anchor, document, el, fold, prose, recorded, section, table
from attnspec.atlas.pattern import Pattern, patterns
from attnspec.atlas.picture import figure
from attnspec.conformance import coverage
from attnspec.spec import Mechanism
from attnspec.spec.language import InputDecl, OptionDecl, unparse
from attnspec.spec.papers import papers

ARXIV = "https://arxiv.org/abs/"
_KINDS = {"real": "any real number", "int": "any integer", "bool": "true or false"}


def page(mechanism: Mechanism, others: Iterable[Mechanism]) -> Html:
    """The whole page. `others`: all mechanisms, for the identities that lead here."""
    raw = tomllib.loads(mechanism.path.read_text(encoding="utf-8"))
    pointing = laws.reduced_to(mechanism, others)
    parts: list[tuple[str, list[Child]]] = [
        ("Pattern", _pattern(mechanism)),
        ("Equations", [equations(mechanism)]),
        ("Symbols", _symbols(mechanism, raw)),
        ("Options", [_options(mechanism)] if mechanism.options else []),
        ("Outputs", [_outputs(mechanism)]),
        ("Forms", forms(mechanism)),
        ("Invariants", [laws.invariants(mechanism)] if mechanism.invariants else []),
        ("Identities", [laws.identities(mechanism)] if mechanism.identities else []),
        ("Special cases elsewhere", [_pointing(pointing)] if pointing else []),
        ("Claims", [laws.claims(mechanism)] if mechanism.claims else []),
        ("Cost", costs(mechanism)),
        ("Evidence", [laws.evidence(mechanism)] if mechanism.evidence else []),
        ("Coverage", [recorded(*_coverage(mechanism))]),
        ("Paper", _papers(mechanism)),
    ]
    shown = [(heading, content) for heading, content in parts if content]
    contents = el("ul", *(el("li", el("a", heading, href=f"#{anchor(heading)}")) for heading, _ in shown))
    family = el("a", mechanism.family, href=f"index.html#{anchor(mechanism.family)}")
    return document(
        f"{mechanism.name} - atlas of attention",
        mechanism.summary,
        el("h1", mechanism.name),
        el("p", prose(mechanism.summary), class_="lead"),
        el("p", "Family: ", family, ". ", _source(mechanism.paper)),
        el("nav", contents, class_="contents", aria_label="On this page"),
        *(section(heading, *content) for heading, content in shown),
        up=True,
    )  # fmt: skip


def _pattern(mechanism: Mechanism) -> list[Child]:
    found = patterns(mechanism)
    of_channels = patterns(mechanism, channels=True) if mechanism.family == "channel" else []
    if not found and not of_channels:
        return [
            el("p", "No input of this mechanism has the role of a value, so there is no pattern of who reads whom.")
        ]
    about = (
        "Each cell asks the equations whether one position of the output (its row) depends on one position of an input "
        "(its column), at a small random call. The shade tells the size of the derivative: "
    )
    legend: list[Child] = []
    for number, text in enumerate(("within 1/100 of the largest", "within 1/10,000", "below")):
        legend += [el("span", class_=f"swatch shade{number}"), " " + text + (", " if number < 2 else ". ")]
    rest = "An empty cell is a derivative of exactly zero; a choice such as top-k counts as made."
    pictures = [figure(pattern, number) for number, pattern in enumerate(found, 1)]
    out: list[Child] = [el("p", about, *legend, rest), el("div", *pictures, class_="figures")]
    if of_channels:
        more: list[Pattern] = of_channels
        maps = [figure(pattern, number) for number, pattern in enumerate(more, len(found) + 1)]
        out += [el("h3", "Channels"), el("p", "The same question for channels instead of positions."),
                el("div", *maps, class_="figures")]  # fmt: skip
    return out


def _symbols(mechanism: Mechanism, raw: Mapping[str, Any]) -> list[Child]:
    sizes = []
    for name, size in mechanism.sizes.items():
        value = f"at least {size.minimum}" if size.value is None else None
        indices = [index for index, node in mechanism.indices.items() if unparse(node) == name]
        sizes.append([
            el("code", name), value if size.value is None else el("code", unparse(size.value)),
            el("code", ", ".join(indices)) if indices else "", prose(raw["sizes"][name].get("doc", "")),
        ])  # fmt: skip
    inputs = [
        [
            el("code", f"{name}[{', '.join((*decl.batch, *decl.axes))}]"), decl.role, _range(decl),
            _aside(mechanism, decl), prose(decl.doc),
        ]
        for name, decl in mechanism.inputs.items()
    ]  # fmt: skip
    found: list[Child] = [
        el("h3", "Sizes"),
        table("Sizes", ("size", "value", "indices", "meaning"), sizes),
        el("h3", "Inputs"),
        table("Inputs", ("input", "role", "range", "notes", "meaning"), inputs),
    ]
    if mechanism.constraints:
        found.append(el("h3", "Constraints"))
        found.append(el("ul", *(el("li", prose(one.message)) for one in mechanism.constraints)))
    return found


def _range(decl: InputDecl) -> Child:
    if decl.domain == "normal":
        return _KINDS[decl.kind]
    return el("code", decl.domain) if "<" in decl.domain or ">" in decl.domain else prose(decl.domain)


def _aside(mechanism: Mechanism, decl: InputDecl) -> str:
    notes = ["usual"] if decl.name in mechanism.usual else ["optional"] if decl.optional else []
    notes += ["differentiable"] if decl.differentiable else []
    notes += [f"may be broadcast over {', '.join(decl.broadcast)}"] if decl.broadcast else []
    return ", ".join(notes)


def _options(mechanism: Mechanism) -> Html:
    rows = [
        [el("code", name), _type(option), el("code", _default(option)), prose(option.doc)]
        for name, option in mechanism.options.items()
    ]
    return table("Options", ("option", "type", "default", "meaning"), rows)


def _type(option: OptionDecl) -> str:
    bounds = [
        f"{sign} {bound:g}" for sign, bound in (("≥", option.minimum), ("≤", option.maximum)) if bound is not None
    ]
    what = "one of " + ", ".join(option.choices) if option.choices else " ".join([option.type, *bounds])
    return what + (" or none" if option.nullable else "")


def _default(option: OptionDecl) -> str:
    if option.formula is not None:
        return unparse(option.formula)
    value = option.default
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _outputs(mechanism: Mechanism) -> Html:
    rows = [
        [el("code", f"{name}[{', '.join((*mechanism.batch, *output.axes))}]"), prose(output.doc)]
        for name, output in mechanism.outputs.items()
    ]
    return table("Outputs", ("output", "meaning"), rows)


def _pointing(pointing: list[tuple[str, str]]) -> Html:
    return el("ul", *(el("li", laws.to_page(name), ": ", prose(statement)) for name, statement in pointing))


def _coverage(mechanism: Mechanism) -> list[Child]:
    """What exists beside the file: the row of the coverage table, and where it lies."""
    row = next(row for row in coverage.rows() if row.name == mechanism.name)
    name = mechanism.name
    places: list[tuple[str, Child]] = [("specification", el("code", f"spec/mechanisms/{mechanism.family}/{name}.toml"))]
    if row.reference:
        places.append(("reference", el("code", f"reference/{name}.py")))
    for module, _ in attnspec.impls.written(name):
        places.append(("Triton kernel", el("code", f"impls/{module}.py")))
        places.append(("judge it", el("code", f"attnspec check attnspec.impls.{module}:{name}")))
    return [
        table(f"Coverage of {name}", coverage.HEADINGS[2:], [coverage.cells(row)[2:]]),
        el("dl", *(piece for label, place in places for piece in (el("dt", label), el("dd", place)))),
    ]


def _source(paper: Mapping[str, Any]) -> Html:
    """A paper in one line, linked where it can be."""
    title = str(paper["title"])
    url = ARXIV + str(paper["arxiv"]) if paper.get("arxiv") else paper.get("url")
    number = f", arXiv {paper['arxiv']}" if paper.get("arxiv") else ""
    return el("span", el("a", title, href=str(url)) if url else title, f", {paper['year']}{number}.")


def _papers(mechanism: Mechanism) -> list[Child]:
    paper = mechanism.paper
    found: list[Child] = [el("p", _source(paper))]
    facts = [
        (label, str(paper[key])) for label, key in (("authors", "authors"), ("equations", "equation")) if paper.get(key)
    ]
    if facts:
        found.append(el("dl", *(part for label, text in facts for part in (el("dt", label), el("dd", prose(text))))))
    if paper.get("also"):
        found += [el("h3", "Also"), el("ul", *(el("li", _source(also)) for also in paper["also"]))]
    listed = [one.title for one in papers() if one.mechanism == mechanism.name]
    if listed:
        text = f"Papers of the catalogue that lead here ({len(listed)})"
        found.append(fold(text, el("ul", *(el("li", title) for title in listed))))
    return found
