"""A normal form of equations: two programs with the same normal form compute the same values.

Used to recognise mutants that are no mutants. It knows the algebra that needs no thought (order of sums, products,
conditions and comparisons, neutral elements, double negation, equal branches, literal arithmetic) and follows only the
definitions that an output needs. Equality of normal forms proves equality of programs in exact arithmetic; the reverse
does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnspec.spec.language.macros import children, rebuild, subexpressions
from attnspec.spec.language.syntax import (
    Binary,
    Bool,
    Call,
    Compare,
    Cond,
    Logic,
    Name,
    Node,
    Num,
    Program,
    Reduce,
    Ref,
    Unary,
)
from attnspec.spec.language.unparse import unparse

_SYMMETRIC = ("min", "max", "logaddexp")
_TURNED = {">": "<", ">=": "<="}
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def canonical_program(program: Program) -> dict[str, str]:
    """The normal forms of the definitions that the outputs need, as text by name (`name~` for an initial line)."""
    forms: dict[str, str] = {}
    names = aliases(program)
    pending = [output.name for output in program.declarations.outputs.values()]
    while pending:
        name = pending.pop()
        if name in forms or name not in program.definitions:
            continue
        tables = [("", program.definitions), ("~", program.boundaries)]
        for suffix, table in tables:
            if name in table:
                body = canonical(table[name].body, names)
                forms[name + suffix] = unparse(body)
                pending.extend(_names(body))
    return forms


def aliases(program: Program) -> dict[str, str]:
    """Definitions that repeat another tensor element by element, with what they repeat."""
    found: dict[str, str] = {}
    for name in program.order:
        line = program.definitions[name]
        if isinstance(line.body, Ref) and line.body.subscripts == line.subscripts and name not in program.boundaries:
            found[name] = found.get(line.body.name, line.body.name)
    return found


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    node = rebuild(node, tuple(_renamed(child, names) for child in children(node)))
    if isinstance(node, Ref) and node.name in names:
        return Ref(names[node.name], node.subscripts)
    return node


def canonical(node: Node, names: Mapping[str, str] | None = None) -> Node:
    """The normal form of an expression; `names` are aliases to see through."""
    if names:
        node = _renamed(node, names)
    node = rebuild(node, tuple(canonical(child) for child in children(node)))
    match node:
        case Binary():
            return _binary(node)
        case Unary(op="+", operand=operand):
            return operand
        case Unary(op="-", operand=Num(value=value)):
            return Num(-value)
        case Unary(op="not", operand=operand):
            return _not(node, operand)
        case Unary(op=op, operand=Unary(op=inner, operand=operand)) if op == inner == "-":
            return operand
        case Compare():
            return _compare(node)
        case Logic(op=op, operands=operands):
            return _logic(op, operands)
        case Cond():
            return _cond(node)
        case Call(function=function, arguments=arguments) if function in _SYMMETRIC:
            return Call(function, _sorted(set(arguments) if function != "logaddexp" else arguments))
        case Reduce(condition=Bool(value=True)):
            return Reduce(node.op, node.indices, None, node.body)
    return node


def _sorted(nodes: Sequence[Node] | set[Node]) -> tuple[Node, ...]:
    return tuple(sorted(nodes, key=unparse))


def _is(node: Node, value: int) -> bool:
    return isinstance(node, Num) and node.value == value


def _binary(node: Binary) -> Node:
    left, right, op = node.left, node.right, node.op
    if isinstance(left, Num) and isinstance(right, Num) and op in ("+", "-", "*"):
        a, b = left.value, right.value
        return Num(a + b if op == "+" else a - b if op == "-" else a * b)
    if (op in ("+", "-") and _is(right, 0)) or (op in ("*", "**") and _is(right, 1)):
        return left
    if (op == "+" and _is(left, 0)) or (op == "*" and _is(left, 1)):
        return right
    if op not in ("+", "*"):
        return node
    parts: list[Node] = []
    for side in (left, right):
        while isinstance(side, Binary) and side.op == op:
            parts.append(side.right)
            side = side.left
        parts.append(side)
    ordered = _sorted(parts)
    result = ordered[0]
    for part in ordered[1:]:
        result = Binary(op, result, part)
    return result


def _not(node: Unary, operand: Node) -> Node:
    match operand:
        case Unary(op="not", operand=inner):
            return inner
        case Bool(value=value):
            return Bool(not value)
        case Compare(ops=(op,), operands=operands) if op in ("==", "!="):
            return canonical(Compare((_NEGATED[op],), operands))
    return node


def _compare(node: Compare) -> Node:
    if all(op in _TURNED for op in node.ops):
        return Compare(tuple(_TURNED[op] for op in reversed(node.ops)), tuple(reversed(node.operands)))
    if len(node.ops) == 1 and node.ops[0] in ("==", "!="):
        return Compare(node.ops, _sorted(node.operands))
    return node


def _logic(op: str, operands: Sequence[Node]) -> Node:
    decisive = op == "or"
    kept: set[Node] = set()
    for operand in operands:
        inside = operand.operands if isinstance(operand, Logic) and operand.op == op else (operand,)
        for part in inside:
            if isinstance(part, Bool):
                if part.value == decisive:
                    return Bool(decisive)
                continue
            kept.add(part)
    if not kept:
        return Bool(not decisive)
    ordered = _sorted(kept)
    return ordered[0] if len(ordered) == 1 else Logic(op, ordered)


def _cond(node: Cond) -> Node:
    test, then, otherwise = node.test, node.then, node.otherwise
    if isinstance(test, Unary) and test.op == "not":
        test, then, otherwise = test.operand, otherwise, then
    if isinstance(test, Bool):
        return then if test.value else otherwise
    if then == otherwise:
        return then
    return Cond(test, then, otherwise)


def _names(node: Node) -> list[str]:
    return [
        here.name if isinstance(here, Ref) else here.id
        for here in subexpressions(node) if isinstance(here, Ref | Name)
    ]  # fmt: skip
