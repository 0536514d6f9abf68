"""Checks definitions against declarations and orders them: names, indices, subscripts, kinds, outputs.

Called by `reader.read` and by everything that builds a program another way (mutants, the JSON import). It
refuses unknown names, unbound indices, wrong numbers of subscripts, kinds that do not fit, missing outputs
and (through `order`) cycles that are no recurrence. Static branches are all checked for names and kinds;
whether an absent input is really used is known only when options and inputs are (`static`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.functions import CONSTANTS, RESERVED
from attnspec.spec.language.kinds import Kinds, kind_of
from attnspec.spec.language.macros import children, rebuild
from attnspec.spec.language.order import arrange
from attnspec.spec.language.static import Folder, Setting
from attnspec.spec.language.syntax import (
    NORMALIZERS,
    Binary,
    Call,
    Declarations,
    Definition,
    Name,
    Node,
    Num,
    Place,
    Program,
    Reduce,
    Ref,
    Str,
    Unary,
)
from attnspec.spec.language.text import fail, near


def check(definitions: Sequence[Definition], declarations: Declarations, text: str, file: str) -> Program:
    """The checked program.

    Raises:
        SpecError: with the equation and the column.
    """
    _check_declarations(declarations, file)
    mains: dict[str, Definition] = {}
    boundaries: dict[str, Definition] = {}
    for definition in definitions:
        _check_left(definition, declarations, file)
        boundary = definition.boundary or any(not _plain(s, declarations) for s in definition.subscripts)
        table = boundaries if boundary else mains
        if definition.name in table:
            first = table[definition.name].line
            raise fail(f"'{definition.name}' is already defined in equation {first}", _start(definition), file)
        table[definition.name] = Definition(
            definition.name,
            definition.subscripts,
            definition.body,
            definition.line,
            definition.text,
            boundary,
        )
    for name, definition in boundaries.items():
        if name not in mains:
            raise fail(
                f"boundary of '{name}', but no equation defines '{name}' itself; on the left side, "
                "subscripts are plain indices",
                _start(definition),
                file,
            )
    checker = _Checker(declarations, mains, file)
    for definition in definitions:
        checker.names(definition)
        _check_literals(definition.body, file)
    order, scans = arrange(mains, boundaries, declarations, file)
    groups = {name: scan.names for scan in scans for name in scan.names}
    kinds = Kinds(declarations, mains, file).all(order, boundaries, groups)
    for output in declarations.outputs.values():
        if output.name not in mains:
            raise SpecError(f"output '{output.name}' is not defined{near(output.name, mains)}", file=file)
        left = left_indices(mains[output.name])
        if sorted(left) != sorted(output.axes):
            raise fail(
                f"output '{output.name}' is declared with axes [{','.join(output.axes)}] but defined with "
                f"[{','.join(left)}]",
                _start(mains[output.name]),
                file,
            )
    return Program(declarations, mains, boundaries, order, scans, kinds, text, file)


def left_indices(definition: Definition) -> tuple[str, ...]:
    """The index names on the left side, in order (of a boundary line: without the boundary subscript)."""
    return tuple(s.id for s in definition.subscripts if isinstance(s, Name))


def _start(definition: Definition) -> Place:
    return Place(definition.line, 1)


def _plain(subscript: Node, declarations: Declarations) -> bool:
    return isinstance(subscript, Name) and subscript.id in declarations.indices


def _check_declarations(declarations: Declarations, file: str) -> None:
    owner: dict[str, str] = {}
    groups: tuple[tuple[str, Mapping[str, object]], ...] = (
        ("size", declarations.sizes),
        ("index", declarations.indices),
        ("input", declarations.inputs),
        ("option", declarations.options),
    )
    for kind, group in groups:
        for name in group:
            if name in RESERVED:
                raise SpecError(f"{kind} '{name}' is a reserved name", file=file)
            if name in owner:
                raise SpecError(f"'{name}' is declared as {owner[name]} and as {kind}", file=file)
            owner[name] = kind
    for index, size in declarations.indices.items():
        _only_sizes(size, f"size of index '{index}'", declarations, file)
    for decl in declarations.inputs.values():
        axes = (*decl.batch, *decl.axes)
        for axis in decl.axes:
            if axis not in declarations.indices:
                raise SpecError(
                    f"input '{decl.name}' has axis '{axis}', which is no index{near(axis, declarations.indices)}",
                    file=file,
                )
        for axis in decl.batch:
            if axis not in declarations.batch:
                raise SpecError(
                    f"input '{decl.name}' has batch axis '{axis}', which is not in the declared batch "
                    f"axes [{','.join(declarations.batch)}]",
                    file=file,
                )
        if len(set(axes)) < len(axes):
            raise SpecError(f"input '{decl.name}' has an axis twice: [{','.join(axes)}]", file=file)
        for axis in decl.broadcast:
            if axis not in axes:
                raise SpecError(f"input '{decl.name}' broadcasts '{axis}', which is not one of its axes", file=file)


def _only_sizes(node: Node, what: str, declarations: Declarations, file: str) -> None:
    stack = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, Name) and current.id not in declarations.sizes:
            if current.id not in declarations.options and current.id not in declarations.inputs:
                raise SpecError(
                    f"{what} uses '{current.id}', which is no declared size{near(current.id, declarations.sizes)}",
                    file=file,
                )
        elif isinstance(current, Ref | Reduce | Str):
            raise SpecError(f"{what} must be an integer expression of sizes", file=file)
        stack.extend(children(current))


def _check_left(definition: Definition, declarations: Declarations, file: str) -> None:
    name, at = definition.name, _start(definition)
    for kind, group in (
        ("an input", declarations.inputs),
        ("a size", declarations.sizes),
        ("an index", declarations.indices),
        ("an option", declarations.options),
    ):
        if name in cast(Mapping[str, object], group):
            raise fail(f"'{name}' is {kind} and cannot be defined", at, file)
    plain = [s.id for s in definition.subscripts if isinstance(s, Name) and s.id in declarations.indices]
    for index in plain:
        if index in declarations.batch:
            raise fail(f"'{index}' is a batch axis; equations are written for one slice without it", at, file)
    if len(set(plain)) < len(plain):
        raise fail(f"'{name}' has the same index twice on its left side", at, file)
    odd = [s for s in definition.subscripts if not _plain(s, declarations)]
    for subscript in odd:
        if isinstance(subscript, Name) and subscript.id not in declarations.sizes:
            raise fail(
                f"index '{subscript.id}' has no size{near(subscript.id, declarations.indices)}",
                subscript.at,
                file,
            )
    if len(odd) > 1:
        raise fail(
            "on the left side, subscripts are plain indices (one boundary value in an initial line)",
            odd[1].at,
            file,
        )


def _check_literals(node: Node, file: str) -> Node | None:
    """The value of an expression of literal numbers alone, None for any other; refuses one that has no value."""
    if isinstance(node, Num):
        return node
    parts = [_check_literals(child, file) for child in children(node)]
    if not parts or None in parts or not isinstance(node, Unary | Binary) or node.op == "not":
        return None
    folded = rebuild(node, tuple(part for part in parts if part is not None))
    return Folder(Setting({}, {}, frozenset()), file).fold(folded)


class _Checker:
    """Names, indices and subscripts of expressions."""

    def __init__(self, declarations: Declarations, mains: Mapping[str, Definition], file: str) -> None:
        self.declarations = declarations
        self.mains = mains
        self.file = file
        self.everything = [
            *mains,
            *declarations.inputs,
            *declarations.sizes,
            *declarations.options,
            *declarations.indices,
            *CONSTANTS,
        ]

    def error(self, message: str, node: Node) -> SpecError:
        return fail(message, node.at, self.file)

    def names(self, definition: Definition) -> None:
        """Every name is known, every index bound, every tensor has its number of subscripts."""
        scope = frozenset(s.id for s in definition.subscripts if _plain(s, self.declarations) and isinstance(s, Name))
        self.visit(definition.body, scope, definition)

    def visit(self, node: Node, scope: frozenset[str], definition: Definition) -> None:
        match node:
            case Name(id=name):
                self.name(node, name, scope, definition)
            case Ref(name=name, subscripts=subscripts):
                self.reference(node, name, len(subscripts))
                for subscript in subscripts:
                    self.visit(subscript, scope, definition)
            case Call(function="present", arguments=arguments):
                self.present(arguments[0])
            case Reduce():
                self.reduce(node, scope, definition)
            case _:
                for child in children(node):
                    self.visit(child, scope, definition)

    def name(self, node: Node, name: str, scope: frozenset[str], definition: Definition) -> None:
        decl = self.declarations
        if name in decl.indices:
            if name in decl.batch:
                raise self.error(f"'{name}' is a batch axis; equations are written for one slice without it", node)
            if name not in scope:
                left = ",".join(left_indices(definition))
                raise self.error(
                    f"index '{name}' is free: it is neither on the left side {definition.name}[{left}] "
                    "nor bound by a reduction",
                    node,
                )
        elif name in self.mains or name in decl.inputs:
            self.reference(node, name, 0)
        elif name not in decl.sizes and name not in decl.options and name not in CONSTANTS:
            raise self.error(f"unknown name '{name}'{near(name, self.everything)}", node)

    def reference(self, node: Node, name: str, count: int) -> None:
        decl = self.declarations
        if name in self.mains:
            axes: Sequence[str] = [s.id if isinstance(s, Name) else "?" for s in self.mains[name].subscripts]
        elif name in decl.inputs:
            axes = decl.inputs[name].axes
        else:
            if name in decl.sizes or name in decl.options or name in decl.indices:
                kind = "a size" if name in decl.sizes else "an option" if name in decl.options else "an index"
                raise self.error(f"'{name}' is {kind} and has no subscripts", node)
            raise self.error(f"unknown tensor '{name}'{near(name, [*self.mains, *decl.inputs])}", node)
        if count != len(axes):
            shape = f"{name}[{','.join(axes)}]" if axes else f"{name} without subscripts"
            raise self.error(f"'{name}' has {len(axes)} axes, got {count} subscripts; expected {shape}", node)

    def present(self, argument: Node) -> None:
        assert isinstance(argument, Name)
        name, decl = argument.id, self.declarations
        if name in decl.inputs:
            if not decl.inputs[name].optional:
                raise self.error(f"input '{name}' is not optional, so it is always present", argument)
        elif name in decl.options:
            if not decl.options[name].nullable:
                raise self.error(f"option '{name}' is not nullable, so it is always present", argument)
        else:
            known = [*decl.inputs, *decl.options]
            raise self.error(
                f"present takes an optional input or a nullable option, got '{name}'{near(name, known)}",
                argument,
            )

    def reduce(self, node: Reduce, scope: frozenset[str], definition: Definition) -> None:
        decl = self.declarations
        for index in node.indices:
            if index not in decl.indices:
                raise self.error(f"index '{index}' has no size{near(index, decl.indices)}", node)
            if index in decl.batch:
                raise self.error(f"'{index}' is a batch axis and cannot be reduced in the equations", node)
            if node.op in NORMALIZERS and index not in scope:
                raise self.error(
                    f"{node.op}[{index}] has one value for each {index}, but '{index}' is neither on the "
                    "left side nor bound by an enclosing reduction",
                    node,
                )
        inner = scope | frozenset(node.indices)
        parts = [node.body] if node.condition is None else [node.condition, node.body]
        used = {index for part in parts for index in _free_names(part)}
        for index in node.indices:
            if index not in used:
                raise self.error(f"{node.op} binds '{index}' but its operand and condition do not use it", node)
        for part in parts:
            self.visit(part, inner, definition)


def _free_names(node: Node) -> Iterator[str]:
    """Names used in an expression and not bound inside it."""
    if isinstance(node, Name):
        yield node.id
    elif isinstance(node, Reduce):
        inside = {name for child in children(node) for name in _free_names(child)}
        yield from inside - set(node.indices)
        if node.op in NORMALIZERS:
            yield from node.indices
    else:
        for child in children(node):
            yield from _free_names(child)


__all__ = ["check", "kind_of", "left_indices"]
