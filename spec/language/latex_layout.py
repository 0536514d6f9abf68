r"""Equations as one `align*` block of LaTeX, with long formulas broken where they can be.

`attnspec show --format latex` prints it, to be pasted into a document that loads amsmath and graphicx. A formula wider
than the column is broken at sums, products, `and`, `or` and between arguments; what is still too wide is scaled down to
the column by `\resizebox`, and nothing narrower is touched. Widths are estimates in characters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from attnspec.spec.language.latex import at, expression_to_latex, function_name, head, parenthesised, reduction
from attnspec.spec.language.notation import (
    COND,
    GREEK,
    NOT,
    OR,
    PRODUCT,
    SUM,
    SWALLOWING,
    branches,
    is_bracket,
    is_open,
)
from attnspec.spec.language.specialise import specialised
from attnspec.spec.language.syntax import (
    Binary,
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
    Unary,
)

PACKAGES = "amsmath,graphicx"
COLUMN = 57.0
"""Characters that a column of 345 pt (article, 10 pt) holds."""
LEAST = 30.0
"""What a right side gets however wide the left sides are."""
_SCRIPT = 0.7
_BESIDE = frozenset({"sqrt", "rsqrt", "abs", "floor", "ceil", "exp2", "pow", "log1p", "present"})
"""Functions that are not written as a name with parentheses; they are not broken."""
Broken = tuple[str, float]
"""A formula and its estimated width."""


def latex_block(program: Program, skip: Collection[str] = ()) -> str:
    """The equations of a program as an `align*` environment that may continue on the next page.

    Args:
        skip: names of definitions that are left out, such as those of the forward equations in a backward program.
    """
    lines = [line for line in specialised(program, None) if line.name not in skip]
    left = max((width_of(Ref(line.name, line.subscripts)) for line in lines), default=0.0)
    rows = [_row(line, program, max(COLUMN - left, LEAST)) for line in lines]
    return "{\\allowdisplaybreaks\n\\begin{align*}\n" + " \\\\\n".join(rows) + "\n\\end{align*}}"


def _row(line: Definition, program: Program, room: float) -> str:
    left, relation = head(line, program)
    text, width = _broken(line.body, room)
    if width <= 0.85 * room:
        return f"{left} &{relation} {text}"
    share = f"{room / (COLUMN + 1):.2f}" + r"\linewidth"
    return (
        rf"{left} &{relation} \resizebox{{\ifdim\width>{share} {share}\else\width\fi}}{{!}}{{$\displaystyle {text}$}}"
    )


def width_of(node: Node) -> float:
    """The estimated width of a formula in characters."""
    match node:
        case Num(value=value):
            return len(str(value))
        case Name(id=name):
            return _word(name)
        case Ref(name=name, subscripts=subscripts):
            return _word(name) + _SCRIPT * sum(width_of(subscript) + 1 for subscript in subscripts)
        case Unary(operand=operand):
            return 1.5 + width_of(operand)
        case Binary(op="/", left=left, right=right):
            return max(width_of(left), width_of(right))
        case Binary(op=op, left=left, right=right):
            between = {"*": 0.5, "**": 0.0, "//": 3.0, "%": 5.0}.get(op, 2.5)
            return width_of(left) + between + (_SCRIPT if op == "**" else 1) * width_of(right)
        case Compare(operands=operands) | Logic(operands=operands):
            return sum(width_of(operand) + 2.5 for operand in operands)
        case Cond() if not is_bracket(node):
            rows, rest = branches(node)
            return max(width_of(v) for v in (rest, *(then for then, _ in rows))) + _tests(rows)
        case Cond(test=test):
            return 2 + width_of(test)
        case Call(function=function, arguments=arguments):
            return len(function) + sum(width_of(argument) + 1.5 for argument in arguments)
        case Reduce(op=op, body=body):
            return max(3.0 if op in SWALLOWING else len(op) + 2.0, _SCRIPT * _under(node)) + width_of(body)
    return 5.0


def _word(name: str) -> float:
    return 1.0 if name in GREEK else float(len(name))


def _tests(rows: Sequence[tuple[Node, Node]]) -> float:
    return max(9.0, *(3 + width_of(test) for _, test in rows)) + 2


def _under(node: Reduce) -> float:
    return 1.5 * len(node.indices) + (0 if node.condition is None else 1 + width_of(node.condition))


def _broken(node: Node, room: float) -> Broken:
    """The formula in at most `room` characters where breaking helps."""
    whole = expression_to_latex(node), width_of(node)
    if whole[1] <= room:
        return whole
    match node:
        case Binary(op="+" | "-" | "*"):
            return _chain(node, room)
        case Logic(op=op, operands=operands):
            sign = r"\wedge" if op == "and" else r"\vee"
            # An `and` within an `or` gets parentheses too: over several lines, strength alone is not seen.
            parts = [_part(operand, NOT, room - 3) for operand in operands]
            return _lines([(sign if number else "", part) for number, part in enumerate(parts)])
        case Cond() if not is_bracket(node):
            return _cases(node, room)
        case Reduce(op=op, body=body):
            return _reduce(node, op, body, room)
        case Call(function=function, arguments=arguments) if function not in _BESIDE:
            inside, width = _arguments(arguments, room - len(function) - 2)
            return function_name(function) + parenthesised(inside), width + len(function) + 2
    return whole


def _part(node: Node, least: int, room: float) -> Broken:
    """An operand, broken where needed, in parentheses where it binds less tightly than its place asks for."""
    if at(node, least) == expression_to_latex(node):
        return _broken(node, room)
    text, width = _broken(node, room - 2)
    return parenthesised(text), width + 2


def _lines(parts: Sequence[tuple[str, Broken]]) -> Broken:
    rows = [f"& {sign} {text}" if sign else f"& {text}" for sign, (text, _) in parts]
    return (
        r"\begin{aligned}[t] " + r" \\ ".join(rows) + r" \end{aligned}",
        max(width + (2 if sign else 0) for sign, (_, width) in parts),
    )


def _chain(node: Binary, room: float) -> Broken:
    """A sum or a product of several parts, as many on each line as it holds."""
    same = ("*",) if node.op == "*" else ("+", "-")
    parts: list[tuple[str, Node]] = []
    first: Node = node
    while isinstance(first, Binary) and first.op in same:
        parts.insert(0, (r"\cdot" if first.op == "*" else first.op, first.right))
        first = first.left
    found: list[tuple[str, Broken]] = []
    for number, (sign, part) in enumerate([("", first), *parts]):
        if is_open(part) and node.op == "*" and number < len(parts):
            text, width = _broken(part, room - 5)
            new = parenthesised(text), width + 2
        else:
            new = _part(part, PRODUCT if number or node.op == "*" else SUM, room - 3)
        if found and found[-1][1][1] + new[1] + 3 <= room and "aligned" not in found[-1][1][0] + new[0]:
            start, (before, taken) = found[-1]
            found[-1] = start, (f"{before} {sign} {new[0]}", taken + new[1] + 3)
        else:
            found.append((sign, new))
    return found[0][1] if len(found) == 1 else _lines(found)


def _cases(node: Cond, room: float) -> Broken:
    rows, rest = branches(node)
    for_tests = min(_tests(rows), room / 2)
    values = [_part(value, OR, room - for_tests) for value in (*(then for then, _ in rows), rest)]
    tests = [_part(test, OR, for_tests - 5) for _, test in rows]
    shown = [rf"{value[0]} & \text{{if }} {test[0]}" for value, test in zip(values, tests)]
    shown.append(rf"{values[-1][0]} & \text{{otherwise}}")
    width = max(value[1] for value in values) + max(5.0, *(test[1] for test in tests)) + 5
    return r"\begin{cases} " + r" \\ ".join(shown) + r" \end{cases}", width


def _reduce(node: Reduce, op: str, body: Node, room: float) -> Broken:
    sign, least = reduction(op)
    under = ", ".join(expression_to_latex(Name(index)) for index in node.indices)
    taken = _SCRIPT * _under(node)
    match node.condition:
        case None:
            pass
        case Logic(op="and", operands=operands) if taken > room / 3:
            lines = [expression_to_latex(operand) for operand in operands]
            under = rf"\substack{{{under} \,:\, " + r" \\ \wedge ".join(lines) + "}"
            taken = _SCRIPT * (4 + max(width_of(operand) for operand in operands))
        case condition:
            under += rf" \,:\, {expression_to_latex(condition)}"
    taken = max(taken, 3.0 if op in SWALLOWING else len(op) + 2.0)
    text, width = _part(body, least, room - taken) if least != COND else _broken(body, room - taken - 2)
    return rf"{sign}_{{{under}}} " + (text if least != COND else parenthesised(text)), taken + width


def _arguments(arguments: Sequence[Node], room: float) -> Broken:
    found = [_broken(argument, room) for argument in arguments]
    if len(found) == 1:
        return found[0]
    ended = [(text + ("," if number < len(found) - 1 else ""), width) for number, (text, width) in enumerate(found)]
    return _lines([("", part) for part in ended])
