"""Writes expressions back as text of the equation language, with the fewest brackets.

`unparse` is the inverse of the reader: reading its text gives the same tree. Used for mutants, messages and `show`.
"""

from __future__ import annotations

import math

from attnspec.spec.language.syntax import (
    Binary,
    Bool,
    Call,
    Compare,
    Cond,
    Definition,
    Logic,
    Name,
    Node,
    Num,
    Reduce,
    Ref,
    Str,
    Unary,
)

_COND, _OR, _AND, _NOT, _COMPARE, _SUM, _TERM, _SIGN, _POWER, _ATOM = range(10)
_BINARY = {"+": _SUM, "-": _SUM, "*": _TERM, "/": _TERM, "//": _TERM, "%": _TERM, "**": _POWER}


def unparse(node: Node) -> str:
    """The text of an expression."""
    return _form(node)[0]


def unparse_definition(definition: Definition) -> str:
    """The text of an equation: left side, `=`, right side."""
    left = definition.name
    if definition.subscripts:
        left += "[" + ",".join(unparse(subscript) for subscript in definition.subscripts) + "]"
    return f"{left} = {unparse(definition.body)}"


def _at(node: Node, least: int) -> str:
    """The text of an operand, in brackets where it binds less tightly than `least`."""
    text, strength = _form(node)
    return text if strength >= least else f"({text})"


def _form(node: Node) -> tuple[str, int]:
    """The text of a node and how tightly its outermost operator binds."""
    match node:
        case Num(value=value):
            return _number(value)
        case Bool(value=value):
            return str(value), _ATOM
        case Str(value=value):
            quote = "'" if '"' in value else '"'
            return f"{quote}{value}{quote}", _ATOM
        case Name(id=name):
            return name, _ATOM
        case Ref(name=name, subscripts=subscripts):
            return f"{name}[{','.join(unparse(s) for s in subscripts)}]", _ATOM
        case Unary(op="not", operand=operand):
            return f"not {_at(operand, _NOT)}", _NOT
        case Unary(op=op, operand=operand):
            return f"{op}{_at(operand, _SIGN)}", _SIGN
        case Binary(op="**", left=left, right=right):
            return f"{_at(left, _ATOM)} ** {_at(right, _SIGN)}", _POWER
        case Binary(op=op, left=left, right=right):
            own = _BINARY[op]
            return f"{_at(left, own)} {op} {_at(right, own + 1)}", own
        case Compare(ops=ops, operands=operands):
            parts = [_at(operand, _SUM) for operand in operands]
            return parts[0] + "".join(f" {op} {part}" for op, part in zip(ops, parts[1:])), _COMPARE
        case Logic(op=op, operands=operands):
            own = _AND if op == "and" else _OR
            return f" {op} ".join(_at(operand, own + 1) for operand in operands), own
        case Cond(test=test, then=then, otherwise=otherwise):
            return f"{_at(then, _OR)} if {_at(test, _OR)} else {_at(otherwise, _COND)}", _COND
        case Call(function=function, arguments=arguments):
            return f"{function}({', '.join(unparse(argument) for argument in arguments)})", _ATOM
        case Reduce(op=op, indices=indices, condition=condition, body=body):
            bound = ",".join(indices) + ("" if condition is None else f" : {unparse(condition)}")
            return f"{op}[{bound}]({unparse(body)})", _ATOM
    raise TypeError(f"not an expression: {type(node).__name__}")


def _number(value: int | float) -> tuple[str, int]:
    if isinstance(value, float) and math.isinf(value):
        return ("inf", _ATOM) if value > 0 else ("-inf", _SIGN)
    return (repr(value), _ATOM) if value >= 0 else (repr(value), _SIGN)
