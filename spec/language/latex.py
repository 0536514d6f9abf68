r"""LaTeX of equations, one formula per equation, for `\[ ... \]` with amsmath.

Used by `attnspec show --format latex` and the documentation. It refuses nothing: every node has a form. Given
options, static conditions are decided first, so that a formula shows what is computed under these options only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from attnspec.spec.language.notation import (
    AND,
    ATOM,
    COMPARE,
    COND,
    GREEK,
    MOD,
    NOT,
    OR,
    POWER,
    PRODUCT,
    SIGN,
    SUM,
    branches,
    decimal,
    is_bracket,
    is_open,
    numbered,
)
from attnspec.spec.language.specialise import shown_lines
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

_COMPARISONS = {"<": "<", "<=": r"\le", ">": ">", ">=": r"\ge", "==": "=", "!=": r"\ne"}
_FUNCTIONS = {
    "exp": r"\exp", "log": r"\ln", "log2": r"\log_{2}", "sin": r"\sin", "cos": r"\cos", "tanh": r"\tanh",
    "sigmoid": r"\sigma", "min": r"\min", "max": r"\max", "sign": r"\operatorname{sgn}",
}  # fmt: skip
_BIG = {"sum": r"\sum", "prod": r"\prod", "any": r"\bigvee", "all": r"\bigwedge"}
_OPERATORS = {"max": r"\max", "min": r"\min", "argmax": r"\operatorname*{arg\,max}", "mean": r"\operatorname*{mean}"}


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
    return [" ".join((*head(line, program), at(line.body, COND))) for line in shown_lines(program, options, present)]


def expression_to_latex(node: Node) -> str:
    """The formula of one expression."""
    return at(node, COND)


def head(line: Definition, program: Program) -> tuple[str, str]:
    """The left side of an equation, and the sign between its sides."""
    relation = r"\iff" if program.kinds.get(line.name) == "bool" else "="
    return tensor(line.name, line.subscripts), relation


def at(node: Node, least: int) -> str:
    """The formula of `node`, in parentheses if it binds less tightly than `least`."""
    text, binds = _form(node)
    return text if binds >= least else parenthesised(text)


def parenthesised(text: str) -> str:
    """`text` in parentheses that grow with it."""
    return rf"\left({text}\right)"


def _form(node: Node) -> tuple[str, int]:
    match node:
        case Num(value=value):
            return _number(value)
        case Bool(value=truth):
            return rf"\text{{{'true' if truth else 'false'}}}", ATOM
        case Str(value=string):
            return rf"\text{{``{_escaped(string)}''}}", ATOM
        case Name(id="inf"):
            return r"\infty", ATOM
        case Name(id=name):
            return name_to_latex(name), ATOM
        case Ref(name=name, subscripts=subscripts):
            return tensor(name, subscripts), ATOM
        case Unary(op="not", operand=operand):
            return rf"\neg {at(operand, COMPARE + 1)}", NOT
        case Unary(op=op, operand=operand):
            return op + at(operand, PRODUCT), SUM
        case Binary():
            return _binary(node)
        case Compare(ops=ops, operands=operands):
            parts = [at(operands[0], MOD)]
            for op, operand in zip(ops, operands[1:]):
                parts += [_COMPARISONS[op], at(operand, MOD)]
            return " ".join(parts), COMPARE
        case Logic(op=op, operands=operands):
            binds = AND if op == "and" else OR
            sign = r" \wedge " if op == "and" else r" \vee "
            return sign.join(at(operand, binds + 1) for operand in operands), binds
        case Cond():
            return _cases(node)
        case Call(function=function, arguments=arguments):
            return _call(function, arguments)
        case Reduce():
            return _reduce(node)
    raise TypeError(f"not a node of the tree: {type(node).__name__}")


def _number(value: int | float) -> tuple[str, int]:
    if isinstance(value, int):
        return str(value), ATOM
    digits, exponent = decimal(value)
    if exponent is None:
        return digits, ATOM
    power = f"10^{{{exponent}}}"
    return (power, POWER) if digits == "1" else (rf"{digits} \cdot {power}", PRODUCT)


def name_to_latex(name: str) -> str:
    parts = numbered(name)
    if parts:
        return f"{_word(parts[0])}^{{({parts[1]})}}"
    return _word(name)


def _word(name: str) -> str:
    if name in GREEK:
        return f"\\{name}"
    if len(name) == 1 and name != "_":
        return name
    return rf"\mathrm{{{_escaped(name)}}}"


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    return "".join(special.get(char, f"\\{char}" if char in "_#$%&{}" else char) for char in text)


def tensor(name: str, subscripts: tuple[Node, ...]) -> str:
    """A name with its subscripts."""
    if not subscripts:
        return name_to_latex(name)
    return f"{name_to_latex(name)}_{{{', '.join(at(subscript, COND) for subscript in subscripts)}}}"


def _binary(node: Binary) -> tuple[str, int]:
    left, right = node.left, node.right
    match node.op:
        case "+" | "-":
            second = at(right, PRODUCT)
            return f"{_closed(left, SUM)} {node.op} {second}", SUM
        case "*":
            first, second = _closed(left, PRODUCT), at(right, PRODUCT)
            space = r" \cdot " if second[:1].isdigit() or (second[:2] == r"\f" and first[-1:].isdigit()) else r" \, "
            return first + space + second, PRODUCT
        case "/":
            return rf"\frac{{{at(left, COND)}}}{{{at(right, COND)}}}", PRODUCT
        case "//":
            return rf"\left\lfloor {_closed(left, PRODUCT)} / {at(right, SIGN)} \right\rfloor", ATOM
        case "%":
            return rf"{_closed(left, PRODUCT)} \bmod {at(right, SIGN)}", MOD
    base = at(left, ATOM)
    if isinstance(left, Name | Ref) and "^{" in base:
        base = parenthesised(base)
    return f"{base}^{{{at(right, COND)}}}", POWER


def _closed(node: Node, least: int) -> str:
    """A left operand: a sum sign that would swallow what follows is put in parentheses."""
    if least >= PRODUCT and is_open(node):
        return parenthesised(at(node, COND))
    return at(node, least)


def _cases(node: Cond) -> tuple[str, int]:
    if is_bracket(node):
        return rf"\left[{at(node.test, COND)}\right]", ATOM
    chosen, rest = branches(node)
    rows = [rf"{at(then, OR)} & \text{{if }} {at(test, OR)}" for then, test in chosen]
    rows.append(rf"{at(rest, OR)} & \text{{otherwise}}")
    return r"\begin{cases} " + r" \\ ".join(rows) + r" \end{cases}", COND


def _call(function: str, arguments: tuple[Node, ...]) -> tuple[str, int]:
    inside = [at(argument, COND) for argument in arguments]
    match function:
        case "sqrt":
            return rf"\sqrt{{{inside[0]}}}", ATOM
        case "rsqrt":
            return rf"\frac{{1}}{{\sqrt{{{inside[0]}}}}}", PRODUCT
        case "abs":
            return rf"\left|{inside[0]}\right|", ATOM
        case "floor":
            return rf"\left\lfloor {inside[0]} \right\rfloor", ATOM
        case "ceil":
            return rf"\left\lceil {inside[0]} \right\rceil", ATOM
        case "exp2":
            return f"2^{{{inside[0]}}}", POWER
        case "pow":
            return f"{at(arguments[0], ATOM)}^{{{inside[1]}}}", POWER
        case "log1p":
            return rf"\ln\left(1 + {at(arguments[0], PRODUCT)}\right)", ATOM
        case "present":
            return rf"{inside[0]} \text{{ is given}}", COMPARE
    return f"{function_name(function)}{parenthesised(', '.join(inside))}", ATOM


def function_name(function: str) -> str:
    """The operator of an elementwise function that is written with parentheses."""
    return _FUNCTIONS.get(function, rf"\operatorname{{{function}}}")


def _reduce(node: Reduce) -> tuple[str, int]:
    under = ", ".join(name_to_latex(index) for index in node.indices)
    if node.condition is not None:
        under += rf" \,:\, {at(node.condition, COND)}"
    sign, least = reduction(node.op)
    if node.op in _BIG:
        return rf"{sign}_{{{under}}} {at(node.body, least)}", PRODUCT
    return rf"{sign}_{{{under}}}{parenthesised(at(node.body, COND))}", ATOM


def reduction(op: str) -> tuple[str, int]:
    """The sign of a reduction, and how tightly a body that follows it must bind."""
    if op in _BIG:
        return _BIG[op], PRODUCT if op in ("sum", "prod") else ATOM
    return _OPERATORS.get(op, rf"\operatorname{{{op}}}"), COND
