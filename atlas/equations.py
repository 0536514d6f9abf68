"""Equations on a page: typeset for the default options, everything else folded away; and what they cost."""

from __future__ import annotations

import re
from typing import Any

from attnspec.atlas.markup import Child, Html, el, fold, prose, scroll, table
from attnspec.spec import Mechanism
from attnspec.spec.language import (
    Program,
    SpecError,
    cost,
    expression_to_mathml,
    read_expression,
    to_mathml,
)

ITEMSIZE = 2
"""Bytes of a number in the count of bytes: a half-precision kernel's."""
_CLAIMED = {"multiply_adds": "multiply-adds", "exponentials": "exponentials", "memory": "memory, in numbers"}


def equations(mechanism: Mechanism) -> Html:
    """The forward equations, the backward ones and the other forms."""
    usual = ", ".join(mechanism.usual)
    given = f" with {usual} given" if usual else ""
    parts: list[Child] = [
        el("p", f"Under the default options{given}, without the definitions that the outputs then do not need:"),
        _typeset("Equations under the default options", to_mathml(mechanism.program, {}, present=mechanism.usual)),
        fold("With every option and optional input", _typeset("All equations", to_mathml(mechanism.program))),
        fold("As text, the form that is evaluated", _text("Text of the equations", mechanism.program.text)),
    ]
    if mechanism.gradient is not None:
        known = set(mechanism.program.definitions)
        lines = to_mathml(mechanism.gradient)
        names = _names(mechanism.gradient)
        own = [line for name, line in zip(names, lines, strict=True) if name not in known]
        given_text = mechanism.program.text.rstrip("\n") + "\n"
        parts += [
            el("h3", "Backward"),
            el("p", "Gradients of the inputs, given the cotangents of the outputs (a leading d)."),
            fold("Typeset", _typeset("Backward equations", own)),
            fold("As text", _text("Text of the backward equations", mechanism.gradient.text.removeprefix(given_text))),
        ]
    return el("div", *parts)


def forms(mechanism: Mechanism) -> list[Child]:
    """Every other form in which the same function is computed, with the backward equations that differ."""
    found: list[Child] = []
    for name, program in mechanism.forms.items():
        found += [el("h3", el("code", name)), el("p", prose(mechanism.form_docs[name]))]
        found.append(fold("Typeset", _typeset(f"Equations of the form {name}", to_mathml(program))))
        found.append(fold("As text", _text(f"Text of the form {name}", program.text)))
        if name in mechanism.form_gradient_texts:
            what = f"Backward equations of the form {name} that differ"
            found.append(fold("Backward, as text", _text(what, mechanism.form_gradient_texts[name])))
    return found


def costs(mechanism: Mechanism) -> list[Child]:
    """The paper's complexity, and the operations counted from the equations as they are written."""
    found: list[Child] = []
    if mechanism.cost:
        rows = [
            [_CLAIMED[key], el("span", Html("O"), "(", formula(text), ")")]
            for key, text in mechanism.cost.items()
            if key in _CLAIMED
        ]
        found += [el("h3", "What the paper claims"), table("Claimed cost", ("quantity", "order of"), rows)]
        found.append(el("p", prose(mechanism.cost["doc"])) if "doc" in mechanism.cost else None)
    model = cost(mechanism.program, {}, present=list(mechanism.usual), itemsize=ITEMSIZE)
    total = model.total
    rows = [
        ["multiply-adds", formula(total.multiply_adds)],
        ["exponentials and the like", formula(total.exponentials)],
        [f"bytes that must move, {ITEMSIZE} a number", formula(model.compulsory_bytes)],
    ]
    dense = " A condition that saves work is counted as if it saved none." if total.dense else ""
    found += [
        el("h3", "What the equations take"),
        el("p", "Counted for the equations as written, under the default options." + dense),
        table("Counted cost", ("quantity", "count"), rows),
    ]
    each = [[el("code", line.name), formula(line.multiply_adds), formula(line.exponentials)]
            for line in model.equations if line.multiply_adds != 0 or line.exponentials != 0]  # fmt: skip
    found.append(fold("By equation", table("Cost by equation", ("equation", "multiply-adds", "exponentials"), each)))
    return found


def formula(value: Any) -> Html:
    """A polynomial, or an expression of the language, as MathML; what the language cannot read stays text."""
    text = re.sub(r"\b(Max|Min)\b", lambda found: found[0].lower(), str(value))
    try:
        return Html(expression_to_mathml(read_expression(text)))
    except SpecError:
        return el("code", text)


def _typeset(label: str, lines: list[str]) -> Html:
    return scroll(label, *(Html(line + "\n") for line in lines))


def _text(label: str, text: str) -> Html:
    return scroll(label, el("pre", el("code", text.strip("\n"))))


def _names(program: Program) -> list[str]:
    """The defined names in the order of the text."""
    lines = [*program.definitions.values(), *program.boundaries.values()]
    return [line.name for line in sorted(lines, key=lambda line: line.line)]
