"""Reads equations: text -> our syntax tree, by way of Python's `ast`, and never by executing anything.

`read` is what everybody calls: it splits the text (`text`), converts each equation (`Converter`), expands
macros and hands the definitions to the checker (`check`). Whatever is not in the language (attributes,
lambdas, comprehensions, strings outside comparisons, chained subscripts, keyword arguments of functions, …)
is refused with its column.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping

from attnspec.spec.language.check import check
from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.functions import FUNCTIONS, REDUCERS, RESERVED
from attnspec.spec.language.macros import (
    MAX_NODES,
    Budget,
    Macro,
    bounded,
    expand,
    parse_macros,
    prelude,
    tree_size,
)
from attnspec.spec.language.syntax import (
    Binary,
    Bool,
    Call,
    Compare,
    Cond,
    Declarations,
    Definition,
    Logic,
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
from attnspec.spec.language.text import (
    MAX_NESTING,
    Line,
    fail,
    logical_lines,
    near,
    node_place,
    parse_expression,
    split_equation,
)

_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], str] = {ast.USub: "-", ast.UAdd: "+", ast.Not: "not"}
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip
_REFUSED: dict[type[ast.AST], str] = {
    ast.Attribute: "an attribute (a dot after a name)",
    ast.Lambda: "a lambda",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.JoinedStr: "a formatted string",
    ast.NamedExpr: "an assignment inside an expression (:=)",
    ast.Starred: "a star",
    ast.Tuple: "a comma outside subscripts and arguments",
    ast.List: "a list",
    ast.Dict: "a dictionary",
    ast.Set: "a set",
    ast.Await: "await",
    ast.Yield: "yield",
    ast.YieldFrom: "yield",
    ast.Slice: "a slice outside a reduction's brackets",
}


class Converter:
    """Converts the Python tree of one line to our nodes; macros are expanded on the way."""

    def __init__(self, line: Line, file: str, macros: Mapping[str, Macro], budget: Budget) -> None:
        self.line = line
        self.file = file
        self.macros = macros
        self.budget = budget

    def error(self, message: str, node: ast.expr) -> SpecError:
        return fail(message, node_place(node, self.line), self.file)

    def convert(self, node: ast.expr, depth: int = 1) -> Node:
        """The node of our tree. Raises SpecError for anything that is not in the language."""
        at = node_place(node, self.line)
        if depth > MAX_NESTING:
            raise fail(f"expression nested deeper than {MAX_NESTING}", at, self.file)
        match node:
            case ast.Constant():
                return self.constant(node, at)
            case ast.Name(id=name):
                return Name(name, at=at)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return Unary(_UNARY[type(op)], self.convert(operand, depth + 1), at=at)
            case ast.BinOp(left=left, op=binary, right=right) if type(binary) in _BINARY:
                return Binary(
                    _BINARY[type(binary)],
                    self.convert(left, depth + 1),
                    self.convert(right, depth + 1),
                    at=at,
                )
            case ast.BoolOp(op=logic, values=values):
                word = "and" if isinstance(logic, ast.And) else "or"
                return Logic(word, tuple(self.convert(value, depth + 1) for value in values), at=at)
            case ast.Compare(left=left, ops=ops, comparators=others):
                for compare in ops:
                    if type(compare) not in _COMPARE:
                        raise self.error(
                            "'in' and 'is' are not part of the language; compare with < <= > >= == !=", node
                        )
                operands = tuple(self.convert(part, depth + 1) for part in (left, *others))
                return Compare(tuple(_COMPARE[type(op)] for op in ops), operands, at=at)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return Cond(
                    self.convert(test, depth + 1),
                    self.convert(body, depth + 1),
                    self.convert(orelse, depth + 1),
                    at=at,
                )
            case ast.Subscript():
                return self.subscript(node, at, depth)
            case ast.Call():
                return self.call(node, at, depth)
            case ast.Tuple(elts=[]):
                raise fail("expected an expression, found empty brackets", at, self.file)
        what = _REFUSED.get(type(node))
        if what is None and isinstance(node, ast.BinOp | ast.UnaryOp):
            what = "this operator"
        raise fail(f"{what or 'this'} is not part of the language", at, self.file)

    def constant(self, node: ast.Constant, at: Place) -> Node:
        value = node.value
        if isinstance(value, bool):
            return Bool(value, at=at)
        if isinstance(value, int):
            if value > 2**63 - 1:
                raise fail("integer literal larger than 2**63 - 1", at, self.file)
            return Num(value, at=at)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise fail("number too large for float64; write inf for infinity", at, self.file)
            return Num(value, at=at)
        if isinstance(value, str):
            return Str(value, at=at)
        shown = "'...'" if value is ... else type(value).__name__
        raise fail(f"a constant of type {shown} is not part of the language", at, self.file)

    def subscript(self, node: ast.Subscript, at: Place, depth: int) -> Node:
        if not isinstance(node.value, ast.Name):
            raise self.error("subscripts belong to a name, as in T[i,j]; a second subscript is not allowed", node)
        name = node.value.id
        if name in REDUCERS:
            raise fail(f"{name}[…] needs its operand in brackets: {name}[j](expression)", at, self.file)
        if name in RESERVED:
            raise fail(f"'{name}' is a function or constant and has no subscripts", at, self.file)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if not parts:
            raise fail(f"'{name}[]' has no subscripts", at, self.file)
        return Ref(name, tuple(self.convert(part, depth + 1) for part in parts), at=at)

    def call(self, node: ast.Call, at: Place, depth: int) -> Node:
        indices: tuple[str, ...] | None = None
        condition: ast.expr | None = None
        target = node.func
        if isinstance(target, ast.Subscript):
            indices, condition = self.bound(target)
            target = target.value
        if not isinstance(target, ast.Name):
            what = "only a function, a reduction or a macro can be called"
            raise self.error(
                f"{_REFUSED[ast.Attribute]} is not part of the language" if isinstance(target, ast.Attribute) else what,
                node,
            )
        name = target.id
        if name in self.macros and not (indices is None and name in FUNCTIONS):
            return self.macro(name, indices, condition, node, at, depth)
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                raise self.error("a star is not part of the language", argument)
        if node.keywords:
            raise self.error(f"'{name}' takes no keyword arguments", node)
        if indices is not None:
            if name not in REDUCERS:
                known = [*REDUCERS, *self.macros]
                raise fail(f"unknown reduction '{name}'{near(name, known)}", at, self.file)
            if len(node.args) != 1:
                raise fail(f"{name}[…] takes one operand, got {len(node.args)}", at, self.file)
            if name in ("rank", "argsort", "argmax") and len(indices) != 1:
                raise fail(f"{name} takes exactly one index, got {len(indices)}", at, self.file)
            return Reduce(
                name,
                indices,
                None if condition is None else self.convert(condition, depth + 1),
                self.convert(node.args[0], depth + 1),
                at=at,
            )
        if name == "present":
            if len(node.args) != 1 or not isinstance(node.args[0], ast.Name):
                raise fail("present takes the name of an optional input or of a nullable option", at, self.file)
        elif name not in FUNCTIONS:
            if name in REDUCERS:
                raise fail(f"{name} needs its index: {name}[j](expression)", at, self.file)
            known = [*FUNCTIONS, *REDUCERS, *self.macros, "present"]
            raise fail(f"unknown function '{name}'{near(name, known)}", at, self.file)
        else:
            function = FUNCTIONS[name]
            count = len(node.args)
            if count < function.least or (function.most is not None and count > function.most):
                wanted = str(function.least) + ("" if function.most == function.least else " or more")
                raise fail(f"{name} takes {wanted} argument(s), got {count}", at, self.file)
        return Call(name, tuple(self.convert(argument, depth + 1) for argument in node.args), at=at)

    def bound(self, target: ast.Subscript) -> tuple[tuple[str, ...], ast.expr | None]:
        """The indices and the condition in `sum[j, k : condition]`."""
        parts = target.slice.elts if isinstance(target.slice, ast.Tuple) else [target.slice]
        names: list[str] = []
        condition: ast.expr | None = None
        for position, part in enumerate(parts):
            if isinstance(part, ast.Slice):
                if position != len(parts) - 1 or part.step is not None:
                    raise self.error("one condition is allowed, after the last index: [j, k : condition]", target)
                if part.lower is None or part.upper is None:
                    raise self.error("expected [index : condition]", target)
                condition = part.upper
                part = part.lower
            if not isinstance(part, ast.Name):
                raise self.error("expected an index name in the brackets of a reduction", part)
            names.append(part.id)
        if not names or len(set(names)) < len(names):
            raise self.error("a reduction binds each of its indices once, and at least one", target)
        return tuple(names), condition

    def macro(
        self,
        name: str,
        indices: tuple[str, ...] | None,
        condition: ast.expr | None,
        node: ast.Call,
        at: Place,
        depth: int,
    ) -> Node:
        macro = self.macros[name]
        given = indices or ()
        if condition is not None:
            raise fail(f"macro '{name}' takes no condition", at, self.file)
        if len(given) != len(macro.indices):
            raise fail(f"macro '{name}' takes {len(macro.indices)} index(es), got {len(given)}", at, self.file)
        if len(node.args) > len(macro.parameters):
            raise fail(
                f"macro '{name}' takes at most {len(macro.parameters)} argument(s), got {len(node.args)}",
                at,
                self.file,
            )
        values = dict(macro.defaults)
        for parameter, argument in zip(macro.parameters, node.args):
            values[parameter] = self.convert(argument, depth + 1)
        taken = set(macro.parameters[: len(node.args)])
        for keyword in node.keywords:
            if keyword.arg not in macro.parameters:
                raise fail(f"macro '{name}' has no parameter '{keyword.arg}'", at, self.file)
            if keyword.arg in taken:
                raise fail(f"macro '{name}' gets '{keyword.arg}' twice", at, self.file)
            taken.add(keyword.arg)
            values[keyword.arg] = self.convert(keyword.value, depth + 1)
        missing = [parameter for parameter in macro.parameters if parameter not in values]
        if missing:
            raise fail(f"macro '{name}' needs '{missing[0]}'", at, self.file)
        return expand(macro, given, values, at, self.file, self.budget)


def parse_node(text: str, *, file: str = "<text>", macros: Mapping[str, Macro] | None = None) -> Node:
    """One expression, such as a size's formula or a constraint, unchecked.

    Raises:
        SpecError: when it is not an expression of the language.
    """
    lines = logical_lines(text, file)
    if len(lines) != 1:
        raise SpecError(f"expected one expression, got {len(lines)} lines", file=file)
    line = lines[0]
    converter = Converter(line, file, prelude() if macros is None else macros, Budget())
    return bounded(converter.convert(parse_expression(line, 0, len(line.text), file)), line.place(0), file)


def read(text: str, declarations: Declarations, *, macros: str = "", file: str = "<text>") -> Program:
    """Read and check equations.

    Args:
        text: one equation per line.
        declarations: sizes, indices, inputs, options and outputs that the equations may refer to.
        macros: macro definitions of this file, beside the prelude's.
        file: name shown in errors.

    Raises:
        SpecError: with the line and the column, for anything that is not a checked program.
    """
    known = dict(prelude())
    if macros:
        known.update(parse_macros(macros, f"{file} (macros)", known))
    definitions: list[Definition] = []
    total = 0
    budget = Budget()
    for line in logical_lines(text, file):
        equal = split_equation(line, file)
        converter = Converter(line, file, known, budget)
        left = parse_expression(line, 0, equal, file)
        at = node_place(left, line)
        if not isinstance(left, ast.Name | ast.Subscript):
            raise fail("the left side must be a name or name[indices]", at, file)
        target = converter.convert(left)
        subscripts: tuple[Node, ...] = ()
        if isinstance(target, Name):
            name = target.id
        else:
            assert isinstance(target, Ref)
            name, subscripts = target.name, target.subscripts
        if name in RESERVED or name in known:
            kind = "a macro" if name in known and name not in RESERVED else "reserved"
            raise fail(f"'{name}' is {kind} and cannot be defined", at, file)
        body = converter.convert(parse_expression(line, equal + 1, len(line.text), file))
        body = bounded(body, line.place(equal + 1), file)
        total += tree_size(body)
        if total > MAX_NODES:
            raise fail(f"the equations expand to more than {MAX_NODES} nodes", at, file)
        definitions.append(Definition(name, subscripts, body, line.number, line.text.strip()))
    return check(definitions, declarations, text, file)
