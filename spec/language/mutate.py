"""Mutants: wrong variants of equations, made mechanically, one change each.

A suite that cannot tell a mutant from the original has not tested that part of the equation. `mutants` walks every
equation and applies the operators of `mutation_rules`; each mutant is checked like any program, differs from the
original and from the other mutants in normal form (`canonical`), and has an id that does not depend on the other
equations. Used by `conformance.mutation` (do the cases kill it?) and by the diagnosis (does it explain a failure?).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attnspec.spec.language.canonical import aliases, canonical, canonical_program
from attnspec.spec.language.check import check, left_indices
from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.macros import children, rebuild
from attnspec.spec.language.mutation_rules import Context, inside, variants
from attnspec.spec.language.syntax import Call, Definition, Node, Program, Reduce, Ref
from attnspec.spec.language.unparse import unparse_definition


@dataclass(frozen=True)
class Mutant:
    """A wrong variant of a program.

    Attributes:
        id: `definition:operator:number`, stable while the definition itself stays as it is.
        name: the definition that changed.
        equation: the line of the equation in the program's text.
        operator: the kind of change.
        description: one line, such as "`<=` replaced by `<` in equation 7 (past)".
        program: the checked program with the change.
    """

    id: str
    name: str
    equation: int
    operator: str
    description: str
    program: Program


def mutants(program: Program, names: Sequence[str] | None = None) -> list[Mutant]:
    """All mutants of a program, in the order of its text.

    Args:
        names: the definitions to change; all by default. A definition that no output needs has no mutants.

    Variants that the checker refuses, that have the normal form of the original, or that repeat an earlier mutant's
    normal form are left out. The changed equation's subscripts are kept inside their tensors, so that a mutant can be
    evaluated where the original can.
    """
    own = id(program)
    cached = _CACHE.get(own)
    if cached is None or cached[0]() is not program:
        cached = _CACHE[own] = (weakref.ref(program, lambda _: _forget(own)), {})
    lines = sorted((*program.definitions.values(), *program.boundaries.values()), key=lambda entry: entry.line)
    needed = canonical_program(program)
    found: list[Mutant] = []
    for place, line in enumerate(lines):
        if line.name not in needed or (names is not None and line.name not in names):
            continue
        key = line.name, line.boundary
        if key not in cached[1]:
            cached[1][key] = _of_line(program, lines, place)
        found += cached[1][key]
    return found


_CACHE: dict[int, tuple[weakref.ref[Program], dict[tuple[str, bool], list[Mutant]]]] = {}


def _forget(key: int) -> None:
    _CACHE.pop(key, None)


def _of_line(program: Program, lines: Sequence[Definition], place: int) -> list[Mutant]:
    """The mutants of one equation."""
    line = lines[place]
    label = line.name + ("~" if line.boundary else "")
    names = aliases(program)
    seen = {canonical(line.body, names)}
    counts: dict[str, int] = {}
    found: list[Mutant] = []
    for operator, body, what in _changes(line, program):
        number = counts[operator] = counts.get(operator, 0) + 1
        form = canonical(body, names)
        if form in seen:
            continue
        changed = dataclasses.replace(line, body=inside(body, program))
        mutated = _checked(program, lines, place, dataclasses.replace(changed, text=unparse_definition(changed)))
        if mutated is None:
            continue
        seen.add(form)
        description = f"{what} in equation {line.line} ({label})"
        found.append(Mutant(f"{label}:{operator}:{number}", line.name, line.line, operator, description, mutated))
    return found


def _checked(program: Program, lines: Sequence[Definition], place: int, changed: Definition) -> Program | None:
    """The program with one equation changed, or None where that is no program."""
    plain = [
        Definition(d.name, d.subscripts, d.body, d.line, d.text) for d in (*lines[:place], changed, *lines[place + 1 :])
    ]
    attempts = [plain]
    if changed.name in program.boundaries and not changed.boundary:
        # A recurrence that no longer looks back is a program without its initial line.
        attempts.append([d for d, line in zip(plain, lines) if line.name != changed.name or not line.boundary])
    for attempt in attempts:
        try:
            return check(attempt, program.declarations, "\n".join(entry.text for entry in attempt), program.file)
        except SpecError:
            continue
    return None


def _changes(line: Definition, program: Program) -> Iterator[tuple[str, Node, str]]:
    """Every changed right side of an equation, with the operator's name and what was changed."""
    scans = {name: scan.index for scan in program.scans for name in scan.names}
    context = Context(program, line, frozenset(left_indices(line)), scans)
    yield from _visit(line.body, context)


def _visit(node: Node, context: Context) -> Iterator[tuple[str, Node, str]]:
    for operator, changed, what in variants(node, context):
        yield operator, changed, what
    if isinstance(node, Call) and node.function == "present":
        return
    parts = children(node)
    inner = context
    if isinstance(node, Reduce):
        inner = dataclasses.replace(context, scope=context.scope | frozenset(node.indices))
    elif isinstance(node, Ref):
        inner = dataclasses.replace(context, in_subscript=True)
    for number, part in enumerate(parts):
        for operator, changed, what in _visit(part, inner):
            yield operator, rebuild(node, (*parts[:number], changed, *parts[number + 1 :])), what
