"""An error is one line that says where, what came and what was wanted, whichever stage finds it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from attnspec.spec import load
from attnspec.spec.language import EvaluationError, SpecError, evaluate, read, read_expression
from attnspec.spec.language.export import from_json, to_json
from attnspec.spec.language.symbolic import sympy_evaluate
from attnspec.tests.language_interpreter import interpret
from attnspec.tests.test_language_agreement import manual_program

LINE = re.compile(
    r"^(?P<file>[^:\n]+): (equation (?P<equation>\d+)(, column (?P<column>\d+))?: )?(?P<message>[^\n]{5,400})$"
)


def error_of(text: str, file: str = "some.toml", **more: Any) -> SpecError:
    """The error of reading `text` with the declarations of the manual's table, and evaluating it."""
    base = manual_program("0")
    with pytest.raises(SpecError) as caught:
        program = read(text, base.declarations, file=file, **more)
        evaluate(program, base.inputs, {})
    return caught.value


def test_the_attributes_are_the_parts_of_the_line() -> None:
    error = error_of("\n# a comment\ny = sum[j](x[j]) + z")
    assert (error.file, error.equation, error.column) == ("some.toml", 3, 20)
    assert str(error) == f"some.toml: equation 3, column 20: {error.message}"
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("text", "equation", "column", "words"),
    [
        ("y = (x[0] +\n     zebra)", 2, 6, "unknown name 'zebra'"),
        ("y = max(x[0],\n\n  x[0, 1])", 3, 3, "expected x[j]"),
        ("a = 1\ny = x[0]]", 2, 9, "]"),
        ("y = (x[0]", 1, 5, "never closed"),
        ("y = x[9] + x[1]", 1, 7, "subscript 1 of 'x' is 9, outside 0..3"),
        ("a[j] = x[j + 1]\ny = a[0]", 1, 10, "subscript 1 of 'x'"),
        ("y = sum[j : j != 2](x[n[j] + 2])", 1, 23, "outside 0..3 at j=0"),
        ("y = 1 // (n[0] - 2)", 1, 11, "by zero"),
        ("y = argmax[j](u[j])", 1, 15, "NaN"),
        ("y = floor(u[0])", 1, None, "finite"),
        ("y = max[j : j > 9](n[j])", 1, 5, "integers over nothing"),
        ("y = l2norm[j](z[j])", 1, 15, "unknown tensor 'z'"),
    ],
)
def test_the_place_is_where_the_reader_must_look(text: str, equation: int, column: int | None, words: str) -> None:
    error = error_of(text)
    assert words in error.message
    assert error.equation == equation
    assert column is None or error.column == column


def test_an_error_in_a_macro_is_shown_at_its_call_or_in_its_text() -> None:
    at_call = error_of("y = 1 + twice(zebra)", macros="twice(a) = a + a")
    assert (at_call.equation, at_call.column) == (1, 15)
    in_text = error_of("y = 1", macros="# two\ntwice(a) = a +")
    assert "macros" in in_text.file
    assert in_text.equation == 2


def test_an_evaluation_error_is_told_from_a_malformed_text() -> None:
    assert isinstance(error_of("y = x[9]"), EvaluationError)
    assert not isinstance(error_of("y = zebra"), EvaluationError)


def wrong_calls() -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]]:
    generator = np.random.default_rng(0)
    q, k, v = (generator.normal(size=shape) for shape in ((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 6)))
    good = {"Q": q, "K": k, "V": v}
    pages = {
        "Q": q, "k_pages": np.zeros((2, 2, 1, 4)), "v_pages": np.zeros((2, 2, 1, 6)),
        "block_table": np.array([[0, 7, 1]]),
    }  # fmt: skip
    return [
        ({"K": k, "V": v}, {}, {}, "input 'Q' is missing"),
        ({**good, "Z": q}, {}, {}, "unknown input 'Z'"),
        ({**good, "K": k[0]}, {}, {}, "expected 4 axes [b,g,j,d]"),
        ({**good, "K": generator.normal(size=(1, 1, 5, 3))}, {}, {}, "length 3 along axis 'd', but D = 4"),
        ({"Q": q, "K": k}, {}, {}, "optional input 'V' is absent here; guard its use with present(V)"),
        (good, {"causl": True}, {}, "did you mean 'causal'?"),
        (good, {"causal": 1}, {}, "expected True or False"),
        (good, {"window_left": 1.5}, {}, "expected an integer"),
        (good, {"causal_alignment": "bottom"}, {}, "expected one of bottom_right, top_left"),
        (good, {}, {"outputs": ["P2"]}, "unknown output 'P2'"),
        (good, {}, {"rows": {"i": [3]}}, "outside 0..2"),
        (good, {}, {"rows": {"zz": [0]}}, "no index"),
        (good, {}, {"sizes": {"N": 4}}, "N = 4 from sizes="),
        (pages, {}, {"sizes": {"M": 6}}, "subscript 1 of 'k_pages' is outside 0..1 at j=2, b=0: it is 7"),
    ]


@pytest.mark.parametrize(("inputs", "options", "more", "words"), wrong_calls(), ids=[c[-1] for c in wrong_calls()])
def test_a_wrong_argument_is_named_in_one_line(
    inputs: dict[str, Any], options: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate(load("softmax_attention").program, inputs, options, **more)
    parts = LINE.match(str(caught.value))
    assert parts
    assert parts["file"].startswith("softmax_attention")
    assert words in str(caught.value)


@pytest.mark.parametrize("evaluator", [evaluate, interpret, sympy_evaluate])
def test_every_evaluator_names_the_equation(evaluator: Any) -> None:
    base = manual_program("0")
    program = read("a = 1\ny = x[n[0] + 2]", base.declarations)
    with pytest.raises(EvaluationError) as caught:
        evaluator(program, base.inputs, {})
    assert caught.value.equation == 2
    assert "'x'" in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "y = zebra\x00",
        "y = 'a\nb'",
        "y = " + "q" * 500,
        "y = ééé",
        "y = \x1b[31m",
        "y = sum[j](" * 70,
        "\ud800",
        "y = '\u2028'",
    ],
)
def test_what_came_is_never_echoed_raw(text: str) -> None:
    shown = str(error_of(text))
    assert LINE.match(shown)
    assert shown.isprintable()


def test_other_stages_speak_the_same_way() -> None:
    program = load("softmax_attention").program
    data = to_json(program) | {"version": 9}
    for action in (
        lambda: from_json(data),
        lambda: read_expression("1 +"),
        lambda: read_expression("a\nb"),
        lambda: read("y = 1", program.declarations),
    ):
        with pytest.raises(SpecError) as caught:
            action()
        assert LINE.match(str(caught.value))
