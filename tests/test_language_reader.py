"""The reader takes every construct of the language and refuses everything else quickly, with its place."""

from __future__ import annotations

import random
import time

import pytest

from attnspec.spec.language import Program, SpecError, read, read_expression
from attnspec.spec.language.macros import prelude
from attnspec.spec.language.syntax import (
    Binary,
    Bool,
    Call,
    Compare,
    Cond,
    Logic,
    Name,
    Num,
    OptionDecl,
    Reduce,
    Ref,
    Str,
    Unary,
)
from attnspec.tests.language_build import declared

DECLARED = declared(
    "i:N j:M d",
    "Q:id K:jd x:j bias?:ij n!int:j keep!bool:j",
    "y:i",
    options=[
        OptionDecl("causal", "bool", False),
        OptionDecl("order", "enum", "left", choices=("left", "right")),
        OptionDecl("cap", "float", None, nullable=True),
    ],
)


def reading(text: str, macros: str = "") -> Program:
    return read(text, DECLARED, macros=macros)


def test_the_tree_of_each_construct() -> None:
    assert read_expression("1") == Num(1)
    assert read_expression("1.5e-3") == Num(0.0015)
    assert read_expression("True") == Bool(True)
    assert read_expression("order == 'left'") == Compare(("==",), (Name("order"), Str("left")))
    assert read_expression("K[j + 1, T[i]]") == Ref("K", (Binary("+", Name("j"), Num(1)), Ref("T", (Name("i"),))))
    assert read_expression("-a ** 2") == Unary("-", Binary("**", Name("a"), Num(2)))
    assert read_expression("a // b % c / 2") == Binary(
        "/", Binary("%", Binary("//", Name("a"), Name("b")), Name("c")), Num(2)
    )
    assert read_expression("0 <= i < N") == Compare(("<=", "<"), (Num(0), Name("i"), Name("N")))
    assert read_expression("not a or b and c") == Logic(
        "or", (Unary("not", Name("a")), Logic("and", (Name("b"), Name("c"))))
    )
    assert read_expression("a if c else b") == Cond(Name("c"), Name("a"), Name("b"))
    assert read_expression("max(a, b, 3)") == Call("max", (Name("a"), Name("b"), Num(3)))
    assert read_expression("max[j](x)") == Reduce("max", ("j",), None, Name("x"))
    assert read_expression("sum[j, k : j < k](1)") == Reduce(
        "sum", ("j", "k"), Compare(("<",), (Name("j"), Name("k"))), Num(1)
    )
    assert read_expression("present(bias)") == Call("present", (Name("bias"),))


def test_comments_blank_lines_and_open_brackets() -> None:
    program = reading(
        "# Größe\n\ny[i] = (Q[i,0]   # a comment with ) and é\n   + Q[i,\n 1])  # end\r\n\tz = 'left' == order\n"
    )
    assert list(program.definitions) == ["y", "z"]
    assert program.definitions["y"].line == 3
    assert program.definitions["z"].line == 6
    body = program.definitions["y"].body
    assert isinstance(body, Binary)
    assert (body.right.at.line, body.right.at.column) == (4, 6)
    assert program.definitions["y"].text.startswith("y[i] = (Q[i,0]")


def test_a_hash_inside_a_string_is_no_comment() -> None:
    with pytest.raises(SpecError, match="no choice 'a#b'"):
        reading("y[i] = 1 if order == 'a#b' else 2")


def test_macros_expand_with_defaults_and_keywords() -> None:
    macros = (
        "norm[d](x, eps=1e-6, power=2) = x / (sum[d](x ** power) + eps)\ntwice(x) = x + x\nfour(x) = twice(twice(x))"
    )
    program = reading("y[i] = sum[d](norm[d](Q[i,d], power=4)) + four(n[0])", macros)
    by_hand = reading("y[i] = sum[d](Q[i,d] / (sum[d](Q[i,d] ** 4) + 1e-6)) + (n[0] + n[0] + (n[0] + n[0]))")
    assert program.definitions["y"].body == by_hand.definitions["y"].body


def test_a_macro_renames_its_index() -> None:
    program = reading("y[i] = mine[j](x[j])", "mine[k](v) = sum[k : k < 3](v * k)")
    assert program.definitions["y"].body == reading("y[i] = sum[j : j < 3](x[j] * j)").definitions["y"].body


def test_nodes_of_a_macro_stand_at_its_call() -> None:
    body = reading("y[i] = 1.0 + elu1(Q[i,0])").definitions["y"].body
    assert isinstance(body, Binary)
    assert body.right.at.column == 14


def test_every_macro_of_the_prelude_can_be_called() -> None:
    for macro in prelude().values():
        index = f"[{','.join('jd'[: len(macro.indices)])}]" if macro.indices else ""
        value = "keep[j]" if macro.name == "iverson" else "x[j]"
        required = [value for name in macro.parameters if name not in macro.defaults]
        reading(f"y[i] = sum[j]({macro.name}{index}({', '.join(required)}) * x[j])")


REFUSED = [
    # text, fragment of the message, line, column
    ("y[i] = __import__('os').system('ls')", "an attribute (a dot after a name) is not part of the language", 1, 8),
    ("y[i] = __import__('os')", "unknown function '__import__'", 1, 8),
    ("y[i] = eval('1')", "unknown function 'eval'", 1, 8),
    ("y[i] = Q.T", "an attribute", 1, 8),
    ("y[i] = (lambda: 1)()", "only a function, a reduction or a macro can be called", 1, 8),
    ("y[i] = lambda: 1", "a lambda is not part of the language", 1, 8),
    ("y[i] = [a for a in x]", "a comprehension", 1, 8),
    ("y[i] = (a for a in x)", "a comprehension", 1, 8),
    ("y[i] = {1: 2}", "a dictionary", 1, 8),
    ("y[i] = {1}", "a set", 1, 8),
    ("y[i] = [1]", "a list", 1, 8),
    ("y[i] = f'{i}'", "a formatted string", 1, 8),
    ("y[i] = (a := 1)", "an assignment inside an expression", 1, 9),
    ("y[i] = max(*x)", "a star", 1, 12),
    ("y[i] = exp(x=1)", "'exp' takes no keyword arguments", 1, 8),
    ("y[i] = x[j=1]", "not an expression", 1, None),
    ("y[i] = 1, 2", "a comma outside subscripts", 1, None),
    ("y[i] = ()", "expected an expression, found empty brackets", 1, None),
    ("y[i] = ", "expected an expression, found nothing", 1, 7),
    ("y[i]", "no '=' found", 1, 1),
    ("y[i] == 2", "no '=' found", 1, 1),
    ("y[i] += 2", "'+=' is not part of the language", 1, 6),
    ("y[i] = z = 2", "not an expression", 1, None),
    ("y[i] = 1; z = 2", "not an expression", 1, None),
    ("import os", "no '=' found", 1, 1),
    ("y[i] = Q[i,0][0]", "a second subscript is not allowed", 1, 8),
    ("y[i] = Q[i](3)", "unknown reduction 'Q'", 1, 8),
    ("y[i] = Q[:,0]", "a slice outside a reduction's brackets", 1, 10),
    ("y[i] = sum[j:j<2:3](x[j])", "one condition is allowed, after the last index", 1, 8),
    ("y[i] = sum[j:](x[j])", "expected [index : condition]", 1, 8),
    ("y[i] = sum[j : j<2, d](x[j])", "one condition is allowed, after the last index", 1, 8),
    ("y[i] = sum[j, j](x[j])", "binds each of its indices once", 1, 8),
    ("y[i] = sum[2](x[j])", "expected an index name", 1, 12),
    ("y[i] = sum[j](x[j], 2)", "sum[…] takes one operand, got 2", 1, 8),
    ("y[i] = sum(x[0])", "sum needs its index: sum[j](expression)", 1, 8),
    ("y[i] = sum[j]", "sum[…] needs its operand", 1, 8),
    ("y[i] = sun[j](x[j])", "unknown reduction 'sun'; did you mean 'sum'?", 1, 8),
    ("y[i] = exb(2)", "unknown function 'exb'; did you mean 'exp'?", 1, 8),
    ("y[i] = exp(1, 2)", "exp takes 1 argument(s), got 2", 1, 8),
    ("y[i] = clip(1, 2)", "clip takes 3 argument(s), got 2", 1, 8),
    ("y[i] = min()", "min takes 1 or more argument(s), got 0", 1, 8),
    ("y[i] = exp[2]", "'exp' is a function or constant", 1, 8),
    ("y[i] = rank[i,j](x[j])", "rank takes exactly one index, got 2", 1, 8),
    ("y[i] = argmax[i,j](x[j])", "argmax takes exactly one index, got 2", 1, 8),
    ("y[i] = present(Q[i,0])", "present takes the name of an optional input", 1, 8),
    ("y[i] = 1 in x", "'in' and 'is' are not part of the language", 1, 8),
    ("y[i] = 1 is 2", "'in' and 'is' are not part of the language", 1, 8),
    ("y[i] = 1 @ 2", "this operator is not part of the language", 1, 8),
    ("y[i] = 1 << 62", "this operator", 1, 8),
    ("y[i] = ~1", "this operator", 1, 8),
    ("y[i] = None", "a constant of type NoneType", 1, 8),
    ("y[i] = ...", "a constant of type '...'", 1, 8),
    ("y[i] = 1j", "a constant of type complex", 1, 8),
    ("y[i] = b'a'", "a constant of type bytes", 1, 8),
    ("y[i] = 9223372036854775808", "integer literal larger than 2**63 - 1", 1, 8),
    ("y[i] = 1e400", "number too large for float64", 1, 8),
    ("y[i] = 2 ** 99999999999", "static integer larger than 2**63 - 1", 1, 8),
    ("y[i] = 9 ** 9 ** 9 ** 9", "larger than 2**63 - 1", 1, None),
    ("y[i] = 10.0 ** 400", "power without a finite value", 1, 8),
    ("y[i] = 1 // 0", "'//' by zero", 1, 8),
    ("y[i] = (1", "bracket '(' is never closed", 1, 8),
    ("y[i] = 1)", "bracket ')' closes nothing", 1, 9),
    ("y[i] = (1]", "bracket ']' does not match '(' of line 1, column 8", 1, 10),
    ("y[i] = 'a", "string is not closed on its line", 1, 10),
    ("y[i] = 1 \\\n + 2", "character '\\\\' is not part of the language", 1, 10),
    ("y[i] = \x00", "character '\\x00'", 1, 8),
    ("y[i] = \x0c1", "character '\\x0c'", 1, 8),
    ("y[i] = ехр(1)", "character '\\u0435'", 1, 8),  # Cyrillic
    ("y[i] = 1\u2028", "character '\\u2028'", 1, 9),
    ("y[i] = " + "a" * 65, "name or number longer than 64 characters", 1, 8),
    ("y[i] = " + "9" * 5000, "equation longer than 4000 characters", 1, 1),
    ("y[i] = " + "(" * 61 + "1" + ")" * 61, "brackets nested deeper than 60", 1, 68),
    ("y[i] = " + "-" * 3000 + "1", "nested deeper than 60", 1, None),
    ("y[i] = " + "not " * 900 + "True", "nested deeper than 60", 1, None),
    ("y[i] = " + "1 + " * 900 + "1", "nested deeper than 60", 1, None),
    ("y[i] = " + "2 ** " * 700 + "2", "nested deeper than 60", 1, None),
    ("1 = 2", "the left side must be a name or name[indices]", 1, 1),
    ("exp = 2", "'exp' is reserved and cannot be defined", 1, 1),
    ("l2norm = 2", "'l2norm' is a macro and cannot be defined", 1, 1),
    ("y[i] = l2norm[d](Q[i,d], epsilon=2)", "macro 'l2norm' has no parameter 'epsilon'", 1, 8),
    ("y[i] = l2norm(Q[i,0])", "macro 'l2norm' takes 1 index(es), got 0", 1, 8),
    ("y[i] = l2norm[d : d < 3](Q[i,d])", "macro 'l2norm' takes no condition", 1, 8),
    ("y[i] = l2norm[d]()", "macro 'l2norm' needs 'x'", 1, 8),
    ("y[i] = elu1(1, 2)", "macro 'elu1' takes at most 1 argument(s), got 2", 1, 8),
    ("y[i] = elu1(1, x=2)", "macro 'elu1' gets 'x' twice", 1, 8),
    ("\n\ny[i] = (1 +\n  Q.T)", "an attribute", 4, 3),
]


@pytest.mark.parametrize(("text", "message", "line", "column"), REFUSED, ids=[text[:40] for text, *_ in REFUSED])
def test_what_is_not_in_the_language_is_refused_with_its_place(
    text: str, message: str, line: int, column: int | None
) -> None:
    start = time.perf_counter()
    with pytest.raises(SpecError) as caught:
        reading(text)
    assert time.perf_counter() - start < 1.0
    assert message in caught.value.message
    assert caught.value.equation == line
    if column is not None:
        assert caught.value.column == column
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"<text>: equation {line}, column ")


REFUSED_MACROS = [
    ("f = 2", "a macro is `name[index](parameter, other=1.0) = expression`"),
    ("f(x) = x\nf(x) = 2", "macro 'f' is defined twice"),
    ("exp(x) = x", "'exp' is reserved"),
    ("f(x, x) = x", "names a parameter twice"),
    ("f(pi) = 2", "'pi' is reserved and cannot be a parameter"),
    ("f(x, y=x) = x", "the default of 'y' must be a number"),
    ("f(x) = sum[j](x)", "macro 'f' binds 'j', which is not one of its index parameters"),
    ("f(x) = f(x)", "unknown function 'f'"),
    ("f(x) = g(x)\ng(x) = x", "unknown function 'g'"),
    ("f(*x) = 2", "a parameter is a name"),
    ("f(**x) = 2", "'**' is not part of the language"),
    ("f[1](x) = x", "index parameters are names"),
    ("f(x) = x[0]", "subscripts its parameter 'x'"),
]


@pytest.mark.parametrize(("macros", "message"), REFUSED_MACROS, ids=[text for text, _ in REFUSED_MACROS])
def test_malformed_macros_are_refused(macros: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        reading("y[i] = f(1.0)", macros)
    assert message in caught.value.message


def test_macros_that_explode_are_refused_quickly() -> None:
    macros = "m0(x) = x + x\n" + "\n".join(f"m{k + 1}(x) = m{k}(m{k}(x))" for k in range(30))
    deep = "m0(x) = x + 1\n" + "\n".join(f"m{k + 1}(x) = m{k}(x) + 1" for k in range(300))
    nested = "d(x) = x + x"
    wide = "m0(x) = x + x\n" + "\n".join(f"m{k + 1}(x) = m{k}(x) + m{k}(x)" for k in range(12))
    many = f"max({', '.join(['m12(1)'] * 480)})"
    for text, definitions in ((many, wide), ("m5(1)", macros), ("m300(1)", deep), ("d(" * 55 + "1" + ")" * 55, nested)):
        start = time.process_time()
        with pytest.raises(SpecError, match="macros expand this"):
            reading(f"y[i] = {text}", definitions)
        assert time.process_time() - start < 1.0


def test_too_many_equations_and_too_much_text_are_refused() -> None:
    many = "\n".join(f"t{k} = 1" for k in range(401))
    with pytest.raises(SpecError, match="more than 400 equations"):
        reading(many)
    with pytest.raises(SpecError, match="at most 400000 are read"):
        reading("#" * 400_001)
    with pytest.raises(SpecError, match="equations must be text, got bytes"):
        reading(b"y[i] = 1")  # type: ignore[arg-type]


def test_four_hundred_equations_of_any_order_are_read() -> None:
    chain = [f"t{k} = t{k - 1} + 1" for k in range(1, 399)]
    random.Random(0).shuffle(chain)
    program = reading("\n".join([*chain, "t0 = 1", "y[i] = t398 + 0 * i"]))
    assert program.order[0] == "t0"
    assert program.order[-1] == "y"


PIECES = [
    "y[i]", "=", "sum[j", ":", "]", "(", ")", "[", "x", "Q", ",", "i", "j", "+", "-", "**", "if", "else", "and", "not",
    "1", "2.5", "9" * 30, "lambda", "for", "in", "'", '"', "#", "\n", "\\", ".", "@", "{", "}", "softmax[j](",
    "__class__",
    "l2norm[d](", ":=", "*", "%", "==", "<", "present(", "é", "\x00", "\t", "True", "None", "S[-1]", "yield", "await",
]  # fmt: skip


def test_random_text_gives_a_program_or_a_spec_error() -> None:
    rng = random.Random(1)
    for _ in range(4000):
        text = "y[i] = " * (rng.random() < 0.7) + "".join(
            rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 25))
        )
        start = time.perf_counter()
        try:
            reading(text)
        except SpecError as error:
            assert "\n" not in str(error)
        assert time.perf_counter() - start < 1.0


def test_reading_executes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("executed")

    monkeypatch.setattr(builtins, "eval", forbidden)
    monkeypatch.setattr(builtins, "exec", forbidden)
    reading("y[i] = sum[j](x[j] * elu1(Q[i,0]))")
    with pytest.raises(SpecError):
        reading("y[i] = print('executed')")
