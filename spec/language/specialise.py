"""Equations under given options: static conditions decided, sizes left as symbols.

Used by the LaTeX and cost evaluators, which know options and which inputs are present, but no sizes. A condition that
depends on a size (`N > 1`) stays as it is, and so do numbers: `scale` remains `scale`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.macros import children, rebuild
from attnspec.spec.language.static import static_value
from attnspec.spec.language.syntax import (
    Bool,
    Call,
    Compare,
    Cond,
    Definition,
    Logic,
    Name,
    Node,
    Program,
    Reduce,
    Ref,
    Unary,
)


@dataclass(frozen=True)
class Choices:
    """Options by name (None: absent) and the names of everything that is present."""

    options: Mapping[str, Any]
    present: frozenset[str]


def choices(
    program: Program, options: Mapping[str, Any] | None = None, present: Collection[str] | None = None
) -> Choices:
    """The choices for `options` (the others take their defaults) with the optional inputs `present` (default: none).

    Raises:
        SpecError: an unknown option, or a name in `present` that is no input.
    """
    decl = program.declarations
    given = dict(options or {})
    for name in given:
        if name not in decl.options:
            known = ", ".join(decl.options) or "none"
            raise SpecError(f"unknown option {name!r}; options: {known}", file=program.file)
    for name in present or ():
        if name not in decl.inputs:
            known = ", ".join(decl.inputs) or "none"
            raise SpecError(f"present names {name!r}, which is no input; inputs: {known}", file=program.file)
    values = {name: given.get(name, option.default) for name, option in decl.options.items()}
    inputs = {name for name, entry in decl.inputs.items() if not entry.optional or name in (present or ())}
    switched = {name for name, value in values.items() if value is not None or decl.options[name].formula is not None}
    return Choices(values, frozenset(inputs | switched))


def specialised(program: Program, under: Choices | None) -> list[Definition]:
    """Definitions and initial lines in the order of the text; with `under`, every condition that it decides is decided.

    A definition that becomes True or False (an inactive mask rule) is put in where it is used.
    """
    done: dict[tuple[str, bool], Definition] = {}
    visitor = None if under is None else _Specialiser(under)
    for name in program.order:
        for table in (program.boundaries, program.definitions):
            if name in table:
                line = table[name]
                body = line.body if visitor is None else visitor.visit(line.body)
                if visitor is not None and isinstance(body, Bool) and name not in program.boundaries:
                    visitor.known[name] = (line.subscripts, body)
                done[name, line.boundary] = replace(line, body=body)
    return sorted(done.values(), key=lambda entry: entry.line)


class _Specialiser:
    def __init__(self, under: Choices) -> None:
        self.under = under
        self.known: dict[str, tuple[tuple[Node, ...], Bool]] = {}

    def visit(self, node: Node) -> Node:
        match node:
            case Cond(test=test, then=then, otherwise=otherwise):
                chosen = self.visit(test)
                if isinstance(chosen, Bool):
                    return self.visit(then if chosen.value else otherwise)
                return replace(node, test=chosen, then=self.visit(then), otherwise=self.visit(otherwise))
            case Logic():
                return self.logic(node)
            case Compare() | Call(function="present"):
                value = self.static(node)
                if isinstance(value, bool):
                    return Bool(value, at=node.at)
                if isinstance(node, Call):
                    return node
            case Name(id=name) | Ref(name=name):
                if name in self.known:
                    left, truth = self.known[name]
                    if isinstance(node, Name) or node.subscripts == left:
                        return truth
                if isinstance(self.under.options.get(name), bool):
                    return Bool(bool(self.under.options[name]), at=node.at)
            case Reduce(condition=condition, body=body):
                kept = None if condition is None else self.visit(condition)
                always = isinstance(kept, Bool) and kept.value
                return replace(node, condition=None if always else kept, body=self.visit(body))
        built = rebuild(node, tuple(self.visit(child) for child in children(node)))
        if isinstance(built, Unary) and built.op == "not" and isinstance(built.operand, Bool):
            return Bool(not built.operand.value, at=node.at)
        return built

    def logic(self, node: Logic) -> Node:
        decides = node.op == "or"
        kept: list[Node] = []
        for operand in node.operands:
            part = self.visit(operand)
            if not isinstance(part, Bool):
                kept.append(part)
            elif part.value is decides:
                return Bool(decides, at=node.at)
        if not kept:
            return Bool(not decides, at=node.at)
        return kept[0] if len(kept) == 1 else replace(node, operands=tuple(kept))

    def static(self, node: Node) -> Any:
        return static_value(node, sizes={}, options=dict(self.under.options), present=self.under.present)


def references(node: Node) -> set[str]:
    """The names of tensors (and of everything else that has a name) in an expression."""
    found: set[str] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, Ref):
            found.add(current.name)
        elif isinstance(current, Name):
            found.add(current.id)
        if not (isinstance(current, Call) and current.function == "present"):
            stack.extend(children(current))
    return found


def needed(program: Program, lines: list[Definition]) -> set[str]:
    """The definitions that the outputs need, given specialised `lines`."""
    uses: dict[str, set[str]] = {}
    for line in lines:
        uses.setdefault(line.name, set()).update(references(line.body))
    found: set[str] = set()
    queue = list(program.declarations.outputs)
    while queue:
        name = queue.pop()
        if name in uses and name not in found:
            found.add(name)
            queue += uses[name]
    return found


def shown_lines(
    program: Program, options: Mapping[str, Any] | None, present: Collection[str] | None
) -> list[Definition]:
    """What a formula's reader sees: everything, undecided; or, given choices, what the outputs then need."""
    if options is None and present is None:
        return specialised(program, None)
    lines = specialised(program, choices(program, options, present))
    wanted = needed(program, lines)
    return [line for line in lines if line.name in wanted]
