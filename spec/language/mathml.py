"""MathML of equations, one `<math>` element per equation, for pages that browsers typeset without a library.

Used by the atlas. It reads like `latex`, form by form, and keeps to MathML Core, which current browsers implement:
presentation elements alone, no line breaking. The style sheet of the page aligns the rows of `mtable.cases`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape
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

_COMPARISONS = {"<": "<", "<=": "≤", ">": ">", ">=": "≥", "==": "=", "!=": "≠"}
_FUNCTIONS = {"log": "ln", "sigmoid": "σ", "sign": "sgn"}
_BIG = {"sum": "∑", "prod": "∏", "any": "⋁", "all": "⋀"}
_OPERATORS = {"argmax": "arg max"}
_TIMES = '<mo rspace="0.17em">\u2062</mo>'
"""The invisible product, with the space that keeps two words apart."""
_MOD = '<mo lspace="0.3em" rspace="0.3em">mod</mo>'

Form = tuple[str, int]


def to_mathml(
    program: Program, options: Mapping[str, Any] | None = None, *, present: Collection[str] | None = None
) -> list[str]:
    """One `<math display="block">` element per equation, in the order of the text.

    Args:
        program: checked equations.
        options: option values; the others take their defaults. Without `options` and `present` nothing is decided,
            and every equation appears with its static conditions as cases.
        present: the optional inputs that are given (default: none), when anything is decided. Equations that no output
            needs are then left out.

    Raises:
        SpecError: an unknown option or input.
    """
    found = []
    for line in shown_lines(program, options, present):
        sign = "⟺" if program.kinds.get(line.name) == "bool" else "="
        left = _tensor(line.name, line.subscripts)
        found.append(_math(left + _mo(sign) + _at(line.body, COND), display=True))
    return found


def expression_to_mathml(node: Node) -> str:
    """An inline `<math>` element of one expression."""
    return _math(_at(node, COND), display=False)


def _math(inside: str, *, display: bool) -> str:
    # One row around everything: Firefox breaks lines between the children of the outermost element.
    start = '<math display="block">' if display else "<math>"
    return f"{start}{_grouped(inside)}</math>"


def _at(node: Node, least: int) -> str:
    """`node`, in parentheses if it binds less tightly than `least`."""
    markup, binds = _form(node)
    return markup if binds >= least else _fenced(markup)


def _row(node: Node, least: int = COND) -> str:
    """`node` as one element, for where a child is a place: a numerator, a script, a limit."""
    return _grouped(_at(node, least))


def _grouped(markup: str) -> str:
    return f"<mrow>{markup}</mrow>"


def _fenced(markup: str, left: str = "(", right: str = ")") -> str:
    return f'<mrow><mo form="prefix">{left}</mo>{markup}<mo form="postfix">{right}</mo></mrow>'


def _mo(sign: str) -> str:
    return f"<mo>{escape(sign)}</mo>"


def _mi(word: str) -> str:
    return f"<mi>{escape(word)}</mi>"


def _text(text: str) -> str:
    return f"<mtext>{escape(text)}</mtext>"


def _form(node: Node) -> Form:
    match node:
        case Num(value=value):
            return _number(value)
        case Bool(value=truth):
            return _text("true" if truth else "false"), ATOM
        case Str(value=string):
            return _text(f"“{string}”"), ATOM
        case Name(id="inf"):
            return _mi("∞"), ATOM
        case Name(id=name):
            return _name(name), ATOM
        case Ref(name=name, subscripts=subscripts):
            return _tensor(name, subscripts), ATOM
        case Unary(op="not", operand=operand):
            return _mo("¬") + _at(operand, COMPARE + 1), NOT
        case Unary(op=op, operand=operand):
            return f'<mo form="prefix">{_minus(op)}</mo>' + _at(operand, PRODUCT), SUM
        case Binary():
            return _binary(node)
        case Compare(ops=ops, operands=operands):
            markup = _at(operands[0], MOD)
            for op, operand in zip(ops, operands[1:]):
                markup += _mo(_COMPARISONS[op]) + _at(operand, MOD)
            return markup, COMPARE
        case Logic(op=op, operands=operands):
            binds = AND if op == "and" else OR
            return _mo("∧" if op == "and" else "∨").join(_at(operand, binds + 1) for operand in operands), binds
        case Cond():
            return _cases(node)
        case Call(function=function, arguments=arguments):
            return _call(function, arguments)
        case Reduce():
            return _reduce(node)
    raise TypeError(f"not a node of the tree: {type(node).__name__}")


def _minus(op: str) -> str:
    return "−" if op == "-" else op


def _number(value: int | float) -> Form:
    if isinstance(value, int):
        return f"<mn>{value}</mn>", ATOM
    digits, exponent = decimal(value)
    if exponent is None:
        return f"<mn>{digits}</mn>", ATOM
    sign = _mo("−") if exponent < 0 else ""
    power = f"<msup><mn>10</mn><mrow>{sign}<mn>{abs(exponent)}</mn></mrow></msup>"
    return (power, POWER) if digits == "1" else (f"<mn>{digits}</mn>{_mo('⋅')}{power}", PRODUCT)


def _parts(name: str) -> tuple[str, str]:
    """A name's letters, and the number that is written above them."""
    found = numbered(name)
    word, number = found or (name, "")
    return _mi(GREEK.get(word, word)), f"<mrow><mo>(</mo><mn>{number}</mn><mo>)</mo></mrow>" if found else ""


def _name(name: str) -> str:
    word, above = _parts(name)
    return f"<msup>{word}{above}</msup>" if above else word


def _tensor(name: str, subscripts: tuple[Node, ...]) -> str:
    if not subscripts:
        return _name(name)
    word, above = _parts(name)
    below = _grouped('<mo separator="true">,</mo>'.join(_at(subscript, COND) for subscript in subscripts))
    return f"<msubsup>{word}{below}{above}</msubsup>" if above else f"<msub>{word}{below}</msub>"


def _binary(node: Binary) -> Form:
    left, right = node.left, node.right
    match node.op:
        case "+" | "-":
            return _closed(left, SUM) + _mo(_minus(node.op)) + _at(right, PRODUCT), SUM
        case "*":
            second = _at(right, PRODUCT)
            return _closed(left, PRODUCT) + (_mo("⋅") if second.startswith("<mn>") else _TIMES) + second, PRODUCT
        case "/":
            return f"<mfrac>{_row(left)}{_row(right)}</mfrac>", PRODUCT
        case "//":
            return _fenced(_closed(left, PRODUCT) + _mo("/") + _at(right, SIGN), "⌊", "⌋"), ATOM
        case "%":
            return _closed(left, PRODUCT) + _MOD + _at(right, SIGN), MOD
    base = _at(left, ATOM)
    if base.startswith(("<msup>", "<msubsup>")):
        base = _fenced(base)
    return f"<msup>{_grouped(base)}{_row(right)}</msup>", POWER


def _closed(node: Node, least: int) -> str:
    """A left operand: a large sign that would swallow what follows is put in parentheses."""
    return _fenced(_at(node, COND)) if least >= PRODUCT and is_open(node) else _at(node, least)


def _cases(node: Cond) -> Form:
    if is_bracket(node):
        return _fenced(_at(node.test, COND), "[", "]"), ATOM
    chosen, rest = branches(node)
    rows = [(_at(then, OR), _text("if\u00a0") + _at(test, OR)) for then, test in chosen]
    rows.append((_at(rest, OR), _text("otherwise")))
    table = "".join(f"<mtr><mtd>{value}</mtd><mtd>{when}</mtd></mtr>" for value, when in rows)
    return f'<mrow><mo form="prefix">{{</mo><mtable class="cases" columnalign="left">{table}</mtable></mrow>', COND


def _call(function: str, arguments: tuple[Node, ...]) -> Form:
    first = arguments[0]
    match function:
        case "sqrt":
            return f"<msqrt>{_at(first, COND)}</msqrt>", ATOM
        case "rsqrt":
            return f"<mfrac><mn>1</mn><msqrt>{_at(first, COND)}</msqrt></mfrac>", PRODUCT
        case "abs":
            return _fenced(_at(first, COND), "|", "|"), ATOM
        case "floor":
            return _fenced(_at(first, COND), "⌊", "⌋"), ATOM
        case "ceil":
            return _fenced(_at(first, COND), "⌈", "⌉"), ATOM
        case "exp2":
            return f"<msup><mn>2</mn>{_row(first)}</msup>", POWER
        case "pow":
            return f"<msup>{_row(first, ATOM)}{_row(arguments[1])}</msup>", POWER
        case "log1p":
            return _mi("ln") + _fenced(f"<mn>1</mn>{_mo('+')}{_at(first, PRODUCT)}"), ATOM
        case "log2":
            return "<msub><mi>log</mi><mn>2</mn></msub>" + _fenced(_at(first, COND)), ATOM
        case "present":
            return _at(first, COND) + _text("\u00a0is given"), COMPARE
    inside = '<mo separator="true">,</mo>'.join(_at(argument, COND) for argument in arguments)
    return _mi(_FUNCTIONS.get(function, function)) + _fenced(inside), ATOM


def _reduce(node: Reduce) -> Form:
    under = '<mo separator="true">,</mo>'.join(_name(index) for index in node.indices)
    if node.condition is not None:
        under += '<mo lspace="0.2em" rspace="0.2em">:</mo>' + _at(node.condition, COND)
    if node.op in _BIG:
        body = _at(node.body, PRODUCT if node.op in ("sum", "prod") else ATOM)
        return f"<munder>{_mo(_BIG[node.op])}{_grouped(under)}</munder>{body}", PRODUCT
    # Limits below the words max, min and the like; scripts beside softmax, whose word is long.
    over = "munder" if node.op in ("max", "min", "argmax", "mean") else "msub"
    operator = _mi(_OPERATORS.get(node.op, node.op))
    return f"<{over}>{operator}{_grouped(under)}</{over}>{_fenced(_at(node.body, COND))}", ATOM
