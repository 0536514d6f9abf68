"""A mechanism's file: TOML content checked against the schema and turned into declarations and checked programs.

Used by `mechanism.load` alone. What the schema cannot say is checked here: names declared twice, axes without an index,
gradients of what is no input, rounding models that name what no equation defines.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnspec.spec import domains
from attnspec.spec.language import (
    Declarations,
    InputDecl,
    OptionDecl,
    OutputDecl,
    Program,
    SizeDecl,
    SpecError,
    read,
    read_expression,
)
from attnspec.spec.language.syntax import Node

SCHEMA = Path(__file__).parent / "schema" / "mechanism.schema.json"


@dataclass(frozen=True)
class Rounding:
    """A rounding model: the tensors that an honest implementation may round to the input's dtype.

    `stored` are definitions of the forward equations, `gradient_stored` those of the backward equations.
    """

    name: str
    stored: frozenset[str]
    gradient_stored: frozenset[str]
    doc: str = ""


@dataclass(frozen=True)
class Constraint:
    """A static condition on sizes, options and the presence of inputs, with the sentence that a user reads."""

    rule: Node
    message: str


@dataclass(frozen=True)
class StatedCase:
    """A case that the file asks for beside the general plan's: at these sizes, options and inputs a known slip shows.

    Sizes are by the size's name; what they leave open is filled in as for any case. `values` names a recipe.
    """

    reason: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    inputs: tuple[str, ...]
    values: str


@functools.cache
def _validator() -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _validate(raw: Mapping[str, Any], path: Path) -> None:
    errors = sorted(_validator().iter_errors(raw), key=lambda error: [str(part) for part in error.absolute_path])
    if errors:
        place = ".".join(str(part) for part in errors[0].absolute_path) or "top level"
        raise SpecError(f"{place}: {errors[0].message}", file=path.name)
    names = [*raw["sizes"], *raw["indices"], *raw["inputs"], *raw.get("options", {})]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"{twice[0]!r} is declared twice among sizes, indices, inputs and options", file=path.name)


def parts(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a `Mechanism` from its file's content, all but the path.

    Raises:
        SpecError: the content does not follow the schema, or contradicts itself; the message says where.
    """
    _validate(raw, path)
    file = path.name

    def expression(text: str) -> Node:
        return read_expression(text, file=file)

    sizes = {
        name: SizeDecl(name, entry.get("min", 0), expression(entry["value"]) if "value" in entry else None)
        for name, entry in raw["sizes"].items()
    }
    inputs = {name: _input(name, entry, file) for name, entry in raw["inputs"].items()}
    options = {name: _option(name, entry, expression) for name, entry in raw.get("options", {}).items()}
    outputs = {
        name: OutputDecl(name, tuple(entry["axes"]), entry.get("doc", "")) for name, entry in raw["outputs"].items()
    }
    declarations = Declarations(
        sizes=sizes,
        indices={name: expression(text) for name, text in raw["indices"].items()},
        inputs=inputs,
        options=options,
        outputs=outputs,
        batch=tuple(raw.get("batch", ())),
    )
    _check_axes(declarations, file)
    macros = raw.get("macros", "")
    program = read(raw["equations"]["text"], declarations, macros=macros, file=file)
    gradient, gradient_of = _gradient(raw, declarations, macros, file)
    forms = {
        form["name"]: read(form["text"], declarations, macros=macros, file=f"{file} [form {form['name']}]")
        for form in raw.get("form", [])
    }
    form_gradients = {
        form["name"]: _gradient(raw, declarations, macros, f"{file} [form {form['name']}]", form["gradient"])[0]
        for form in raw.get("form", [])
        if "gradient" in form
    }
    roundings, default = _roundings(raw, program, gradient, forms, file)
    return {
        "name": raw["name"],
        "family": raw["family"],
        "summary": raw["summary"],
        "paper": raw["paper"],
        "declarations": declarations,
        "program": program,
        "gradient": gradient,
        "gradient_of": gradient_of,
        "forms": forms,
        "form_gradients": form_gradients,
        "form_docs": {form["name"]: form.get("doc", "") for form in raw.get("form", [])},
        "form_gradient_texts": {form["name"]: form["gradient"] for form in raw.get("form", []) if "gradient" in form},
        "roundings": roundings,
        "default_rounding": default,
        "constraints": tuple(Constraint(expression(c["rule"]), c["message"]) for c in raw.get("constraint", [])),
        "otherwise": {
            name: expression(entry["otherwise"]) for name, entry in raw["sizes"].items() if "otherwise" in entry
        },
        "probe": _probe(raw, inputs, expression, file),
        "usual": tuple(raw.get("usual", ())),
        "invariants": tuple(raw.get("invariant", [])),
        "identities": tuple(raw.get("identity", [])),
        "claims": tuple(raw.get("claim", [])),
        "evidence": tuple(raw.get("evidence", [])),
        "equivalent_mutants": _equivalents(raw, file),
        "cases": tuple(_case(entry, sizes, options, inputs, file) for entry in raw.get("case", [])),
        "cost": raw.get("cost", {}),
    }


def _input(name: str, entry: Mapping[str, Any], file: str) -> InputDecl:
    decl = InputDecl(
        name,
        tuple(entry["axes"]),
        batch=tuple(entry.get("batch", ())),
        kind=entry.get("kind", "real"),
        role=entry["role"],
        optional=entry.get("optional", False),
        broadcast=tuple(entry.get("broadcast", ())),
        differentiable=entry.get("differentiable", False),
        domain=entry.get("domain", "normal"),
        drawn=entry.get("drawn", ""),
        doc=entry.get("doc", ""),
    )
    if decl.drawn and not domains.readable(name, decl.drawn):
        expected = f"'{domains.UNIT}', '{domains.UNIT} unless OPTION' or bounds such as '0 <= {name} <= 1'"
        raise SpecError(f"inputs.{name}.drawn is {decl.drawn!r}, expected {expected}", file=file)
    return decl


def _option(name: str, entry: Mapping[str, Any], expression: Any) -> OptionDecl:
    default = entry.get("default")
    is_formula = isinstance(default, str) and entry["type"] in ("int", "float")
    return OptionDecl(
        name,
        entry["type"],
        default=None if is_formula else default,
        formula=expression(default) if is_formula else None,
        nullable=entry.get("nullable", False),
        choices=tuple(entry.get("choices", ())),
        minimum=entry.get("min"),
        maximum=entry.get("max"),
        doc=entry.get("doc", ""),
    )


def _check_axes(declarations: Declarations, file: str) -> None:
    """Every axis of an input or output must be a declared index."""
    tensors: list[InputDecl | OutputDecl] = [*declarations.inputs.values(), *declarations.outputs.values()]
    for what in tensors:
        batch = what.batch if isinstance(what, InputDecl) else ()
        for axis in (*batch, *what.axes):
            if axis not in declarations.indices:
                raise SpecError(f"{what.name} has the axis {axis!r}, which [indices] does not declare", file=file)
        if isinstance(what, InputDecl) and (stray := set(what.broadcast) - {*what.batch, *what.axes}):
            raise SpecError(f"{what.name} is broadcast over {sorted(stray)[0]!r}, which is no axis of it", file=file)


def _gradient(
    raw: Mapping[str, Any], declarations: Declarations, macros: str, file: str, instead: str = ""
) -> tuple[Program | None, Mapping[str, str]]:
    """Forward and backward equations as one program whose inputs include the cotangents `d<output>`.

    `instead` holds definitions that replace those of the same name in both, and what these need beside them.
    """
    if "gradient" not in raw:
        if instead:
            raise SpecError("it states gradients, and the file has no [gradient]", file=file)
        return None, {}
    cotangents = {
        f"d{name}": InputDecl(f"d{name}", out.axes, batch=declarations.batch, role="cotangent", optional=number > 0)
        for number, (name, out) in enumerate(declarations.outputs.items())
    }
    gradient_of = dict(raw["gradient"]["outputs"])
    for out, source in gradient_of.items():
        if source not in declarations.inputs:
            raise SpecError(
                f"gradient.outputs: {out} is said to be the gradient of unknown input {source!r}", file=file
            )
    outputs = {out: OutputDecl(out, declarations.inputs[source].axes) for out, source in gradient_of.items()}
    extended = dataclasses.replace(declarations, inputs={**declarations.inputs, **cotangents}, outputs=outputs)
    stated = raw["gradient"]["text"]
    forward = raw["equations"]["text"].rstrip("\n") + "\n"
    if instead:
        names = set(_LEFT.findall(instead))
        if not names & set(_LEFT.findall(stated)):
            raise SpecError("its gradient defines nothing that [gradient] defines", file=file)
        stated = _without(names, stated) + instead
        forward = _without(names, forward)
    text = forward + stated
    return read(text, extended, macros=macros, file=file), gradient_of


_LEFT = re.compile(r"^([A-Za-z]\w*)(?=\s*(?:\[[^\]]*\])?\s*=[^=])", re.MULTILINE)
"""The name that a statement defines: statements begin at the left margin."""


def _without(names: Collection[str], text: str) -> str:
    """The statements that define other names."""
    return "".join(line for name, line in _statements(text) if name not in names)


def _statements(text: str) -> list[tuple[str, str]]:
    """The statements of equations, each with the name that it defines and the comments and lines that follow it."""
    starts = list(_LEFT.finditer(text))
    ends = [found.start() for found in starts[1:]] + [len(text)]
    return [(found.group(1), text[found.start() : end].rstrip("\n") + "\n") for found, end in zip(starts, ends)]


def _probe(
    raw: Mapping[str, Any], inputs: Mapping[str, InputDecl], expression: Callable[[str], Node], file: str
) -> dict[str, Node]:
    """Constants of the probes, for real inputs only."""
    for name in raw.get("probe", {}):
        if name not in inputs or inputs[name].kind != "real":
            raise SpecError(f"probe names {name!r}, which is no real input", file=file)
    return {name: expression(text) for name, text in raw.get("probe", {}).items()}


def _equivalents(raw: Mapping[str, Any], file: str) -> dict[str, str]:
    """Reason by id of the mutants that are said to be no change."""
    found: dict[str, str] = {}
    for entry in raw.get("equivalent_mutant", []):
        for name in entry.get("ids", [entry.get("id")]):
            if name in found:
                raise SpecError(f"equivalent_mutant names {name!r} twice", file=file)
            found[name] = entry["reason"]
    return found


def _case(
    entry: Mapping[str, Any], sizes: Mapping[str, Any], options: Mapping[str, Any], inputs: Mapping[str, InputDecl],
    file: str,
) -> StatedCase:  # fmt: skip
    for what, given, known in (
        ("sizes", entry.get("sizes", {}), sizes),
        ("options", entry.get("options", {}), options),
        ("inputs", entry.get("inputs", ()), inputs),
    ):
        stray = [name for name in given if name not in known]
        if stray:
            raise SpecError(f"case.{what} names {stray[0]!r}; declared: {', '.join(known) or 'none'}", file=file)
    chosen = {
        name: None if value == "null" and options[name].nullable else value
        for name, value in entry.get("options", {}).items()
    }
    return StatedCase(
        entry["reason"], dict(entry.get("sizes", {})), chosen, tuple(entry.get("inputs", ())),
        entry.get("values", "normal"),
    )  # fmt: skip


def _roundings(
    raw: Mapping[str, Any], program: Program, gradient: Program | None, forms: Mapping[str, Program], file: str
) -> tuple[dict[str, Rounding], str]:
    in_forms = {name for form in forms.values() for name in form.definitions}
    entries = raw.get("rounding") or {"fused": {"default": True, "stored": []}}
    roundings = {}
    for name, entry in entries.items():
        backward = set(gradient.definitions) if gradient else set()
        for key, known in (("stored", {*program.definitions, *in_forms}), ("gradient_stored", backward)):
            stray = sorted(set(entry.get(key, ())) - known)
            if stray:
                raise SpecError(f"rounding.{name}.{key} names {stray[0]!r}, which no equation defines", file=file)
        roundings[name] = Rounding(
            name,
            frozenset(entry["stored"]),
            frozenset(entry.get("gradient_stored", ())),
            entry.get("doc", ""),
        )
    defaults = [name for name, entry in entries.items() if entry.get("default")]
    if len(defaults) != 1:
        raise SpecError(f"exactly one rounding model must be the default, got {defaults}", file=file)
    return roundings, defaults[0]
