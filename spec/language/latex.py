r"""LaTeX of equations, one formula per equation, for `\[ ... \]` with amsmath.

Used by `attnspec show --format latex` and the documentation. It refuses nothing: every node has a form. Given
options, static conditions are decided first, so that a formula shows what is computed under these options only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from attnspec.spec.language.specialise import choices, needed, specialised
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
    Program,
    Reduce,
    Ref,
    Str,
    Unary,
)

# How tightly a form binds; a part that binds less tightly than its place asks for is put in parentheses.
_COND, _OR, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(10)

_GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "pi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Pi",
        "Sigma",
        "Upsilon",
        "Phi",
        "Psi",
        "Omega",
    ]
)
_COMPARISONS = {"<": "<", "<=": r"\le", ">": ">", ">=": r"\ge", "==": "=", "!=": r"\ne"}
_FUNCTIONS = {
    "exp": r"\exp", "log": r"\ln", "log2": r"\log_{2}", "sin": r"\sin", "cos": r"\cos", "tanh": r"\tanh",
    "sigmoid": r"\sigma", "min": r"\min", "max": r"\max", "sign": r"\operatorname{sgn}",
}  # fmt: skip
_BIG = {"sum": r"\sum", "prod": r"\prod", "any": r"\bigvee", "all": r"\bigwedge"}
_OPERATORS = {"max": r"\max", "min": r"\min", "argmax": r"\operatorname*{arg\,max}", "mean": r"\operatorname*{mean}"}
_NAMED = re.compile(r"([A-Za-z]+?)_?(\d+)")


def to_latex(
    program: Program, options: Mapping[str, Any] | None = None, *, present: Collection[str] | None = None
) -> list[str]:
    """One LaTeX formula per equation, in the order of the text.

    Args:
        program: checked equations.
        options: option values; the others take their defaults. Without `options` and `present` nothing is decided,
            and every equation appears with its static conditions as cases.
        present: the optional inputs that are given (default: none), when anything is decided. Equations that no output
            needs are then left out.

    Raises:
        SpecError: an unknown option or input.
    """
    if options is None and present is None:
        return [_equation(line, program) for line in specialised(program, None)]
    lines = specialised(program, choices(program, options, present))
    wanted = needed(program, lines)
    return [_equation(line, program) for line in lines if line.name in wanted]


def expression_to_latex(node: Node) -> str:
    """The formula of one expression."""
    return _at(node, _COND)


def _equation(line: Definition, program: Program) -> str:
    left = _tensor(line.name, line.subscripts)
    relation = r"\iff" if program.kinds.get(line.name) == "bool" else "="
    return f"{left} {relation} {_at(line.body, _COND)}"


def _at(node: Node, least: int) -> str:
    """`node`, in parentheses if it binds less tightly than `least`."""
    text, binds = _form(node)
    return text if binds >= least else _parenthesised(text)


def _parenthesised(text: str) -> str:
    return rf"\left({text}\right)"


def _form(node: Node) -> tuple[str, int]:
    match node:
        case Num(value=value):
            return _number(value)
        case Bool(value=truth):
            return rf"\text{{{'true' if truth else 'false'}}}", _ATOM
        case Str(value=string):
            return rf"\text{{``{_escaped(string)}''}}", _ATOM
        case Name(id="inf"):
            return r"\infty", _ATOM
        case Name(id=name):
            return _name(name), _ATOM
        case Ref(name=name, subscripts=subscripts):
            return _tensor(name, subscripts), _ATOM
        case Unary(op="not", operand=operand):
            return rf"\neg {_at(operand, _COMPARE + 1)}", _NOT
        case Unary(op=op, operand=operand):
            return op + _at(operand, _PRODUCT), _SUM
        case Binary():
            return _binary(node)
        case Compare(ops=ops, operands=operands):
            parts = [_at(operands[0], _SUM)]
            for op, operand in zip(ops, operands[1:]):
                parts += [_COMPARISONS[op], _at(operand, _SUM)]
            return " ".join(parts), _COMPARE
        case Logic(op=op, operands=operands):
            binds = _AND if op == "and" else _OR
            sign = r" \wedge " if op == "and" else r" \vee "
            return sign.join(_at(operand, binds + 1) for operand in operands), binds
        case Cond():
            return _cases(node)
        case Call(function=function, arguments=arguments):
            return _call(function, arguments)
        case Reduce():
            return _reduce(node)
    raise TypeError(f"not a node of the tree: {type(node).__name__}")


def _number(value: int | float) -> tuple[str, int]:
    if isinstance(value, int):
        return str(value), _ATOM
    digits, _, exponent = repr(value).partition("e")
    digits = digits.removesuffix(".0")
    if not exponent:
        return digits, _ATOM
    power = f"10^{{{int(exponent)}}}"
    return (power, _POWER) if digits == "1" else (rf"{digits} \cdot {power}", _PRODUCT)


def _name(name: str) -> str:
    numbered = _NAMED.fullmatch(name)
    if numbered:
        return f"{_word(numbered[1])}^{{({numbered[2]})}}"
    return _word(name)


def _word(name: str) -> str:
    if name in _GREEK:
        return f"\\{name}"
    if len(name) == 1 and name != "_":
        return name
    return rf"\mathrm{{{_escaped(name)}}}"


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    return "".join(special.get(char, f"\\{char}" if char in "_#$%&{}" else char) for char in text)


def _tensor(name: str, subscripts: tuple[Node, ...]) -> str:
    if not subscripts:
        return _name(name)
    return f"{_name(name)}_{{{', '.join(_at(subscript, _COND) for subscript in subscripts)}}}"


def _binary(node: Binary) -> tuple[str, int]:
    left, right = node.left, node.right
    match node.op:
        case "+" | "-":
            second = _at(right, _PRODUCT)
            return f"{_closed(left, _SUM)} {node.op} {second}", _SUM
        case "*":
            first, second = _closed(left, _PRODUCT), _at(right, _PRODUCT)
            space = r" \cdot " if second[:1].isdigit() or (second[:2] == r"\f" and first[-1:].isdigit()) else r" \, "
            return first + space + second, _PRODUCT
        case "/":
            return rf"\frac{{{_at(left, _COND)}}}{{{_at(right, _COND)}}}", _PRODUCT
        case "//":
            return rf"\left\lfloor {_closed(left, _PRODUCT)} / {_at(right, _SIGN)} \right\rfloor", _ATOM
        case "%":
            return rf"{_closed(left, _PRODUCT)} \bmod {_at(right, _SIGN)}", _PRODUCT
    base = _at(left, _ATOM)
    if isinstance(left, Name | Ref) and "^{" in base:
        base = _parenthesised(base)
    return f"{base}^{{{_at(right, _COND)}}}", _POWER


def _closed(node: Node, least: int) -> str:
    """A left operand: a sum sign that would swallow what follows is put in parentheses."""
    if least >= _PRODUCT and _open(node):
        return _parenthesised(_at(node, _COND))
    return _at(node, least)


def _open(node: Node) -> bool:
    if isinstance(node, Binary) and node.op in ("*", "%"):
        return _open(node.right)
    return isinstance(node, Reduce) and node.op in _BIG


def _cases(node: Cond) -> tuple[str, int]:
    if isinstance(node.then, Num) and isinstance(node.otherwise, Num):
        values = (node.then.value, node.otherwise.value)
        if values == (1, 0):
            return rf"\left[{_at(node.test, _COND)}\right]", _ATOM
    rows = []
    rest: Node = node
    while isinstance(rest, Cond):
        rows.append(rf"{_at(rest.then, _OR)} & \text{{if }} {_at(rest.test, _OR)}")
        rest = rest.otherwise
    rows.append(rf"{_at(rest, _OR)} & \text{{otherwise}}")
    return r"\begin{cases} " + r" \\ ".join(rows) + r" \end{cases}", _COND


def _call(function: str, arguments: tuple[Node, ...]) -> tuple[str, int]:
    inside = [_at(argument, _COND) for argument in arguments]
    match function:
        case "sqrt":
            return rf"\sqrt{{{inside[0]}}}", _ATOM
        case "rsqrt":
            return rf"\frac{{1}}{{\sqrt{{{inside[0]}}}}}", _PRODUCT
        case "abs":
            return rf"\left|{inside[0]}\right|", _ATOM
        case "floor":
            return rf"\left\lfloor {inside[0]} \right\rfloor", _ATOM
        case "ceil":
            return rf"\left\lceil {inside[0]} \right\rceil", _ATOM
        case "exp2":
            return f"2^{{{inside[0]}}}", _POWER
        case "pow":
            return f"{_at(arguments[0], _ATOM)}^{{{inside[1]}}}", _POWER
        case "log1p":
            return rf"\ln\left(1 + {_at(arguments[0], _PRODUCT)}\right)", _ATOM
        case "present":
            return rf"{inside[0]} \text{{ is given}}", _COMPARE
    name = _FUNCTIONS.get(function, rf"\operatorname{{{function}}}")
    return f"{name}{_parenthesised(', '.join(inside))}", _ATOM


def _reduce(node: Reduce) -> tuple[str, int]:
    under = ", ".join(_name(index) for index in node.indices)
    if node.condition is not None:
        under += rf" \,:\, {_at(node.condition, _COND)}"
    if node.op in _BIG:
        body = _at(node.body, _PRODUCT if node.op in ("sum", "prod") else _ATOM)
        return rf"{_BIG[node.op]}_{{{under}}} {body}", _PRODUCT
    name = _OPERATORS.get(node.op, rf"\operatorname{{{node.op}}}")
    return rf"{name}_{{{under}}}{_parenthesised(_at(node.body, _COND))}", _ATOM
