"""Symbolic results are the formulas, agree with the numbers, and prove or refute identities."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import HealthCheck, given, settings

from attnspec.spec import load
from attnspec.spec.language import EvaluationError, read, read_expression
from attnspec.spec.language.prove import Counterexample, prove_equal
from attnspec.spec.language.symbolic import symbols, sympy_evaluate
from attnspec.spec.language.syntax import Declarations, InputDecl, OptionDecl, OutputDecl, SizeDecl
from attnspec.tests.language_interpreter import interpret
from attnspec.tests.language_programs import Sample, samples, wild_samples


def evaluate_text(text: str, inputs: dict[str, Any], **options: Any) -> Any:
    """The element `y` of equations over vectors named in `inputs`."""
    declarations = Declarations(
        {"M": SizeDecl("M")},
        {"j": read_expression("M"), "k": read_expression("M")},
        {name: InputDecl(name, ("j",) if np.ndim(value) else ()) for name, value in inputs.items()},
        {"c": OptionDecl("c", "float", 0.1), "m": OptionDecl("m", "int", None, nullable=True)},
        {"y": OutputDecl("y", ())},
    )
    sizes = {} if any(np.ndim(value) for value in inputs.values()) else {"M": 1}
    return sympy_evaluate(read(text, declarations), inputs, options, sizes=sizes)["y"][()]


x = symbols("x", 3)
x0, x1, x2 = x
exp, log = sympy.exp, sympy.log


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("y = sum[j](x[j])", x0 + x1 + x2),
        ("y = prod[j : j > 0](x[j])", x1 * x2),
        ("y = mean[j](x[j])", (x0 + x1 + x2) / 3),
        ("y = max[j : j < 2](x[j])", sympy.Max(x0, x1)),
        ("y = max[j : j > 5](x[j])", -sympy.oo),
        ("y = logsumexp[j : j != 1](x[j])", log(exp(x0) + exp(x2))),
        ("y = logsumexp[j : j > 5](x[j])", -sympy.oo),
        ("y = sum[j : j == 1](softmax[j](x[j]))", exp(x1) / (exp(x0) + exp(x1) + exp(x2))),
        ("y = sum[j : j == 1](softmax[j : j < 2](x[j]))", exp(x1) / (exp(x0) + exp(x1))),
        ("y = sum[j : j == 2](softmax[j : j < 2](x[j]))", sympy.Integer(0)),
        ("y = sum[j](softmax[j : j > 5](x[j]))", sympy.Integer(0)),
        ("y = sum[j](softmax[j](x[j] if j < 1 else -inf) * x[j])", x0),
        ("y = sum[j : j == 1](rank[j](j % 2))", sympy.Integer(0)),
        ("y = sum[j : j == 1](argsort[j](j % 2))", sympy.Integer(0)),
        ("y = argmax[j](j % 2)", sympy.Integer(1)),
        ("y = c * x[0]", x0 / 10),
        ("y = M ** -0.5", 1 / sympy.sqrt(3)),
        ("y = x[7 // 3]", x2),
        ("y = x[0] if present(m) else x[1]", x1),
        ("y = sigmoid(x[0]) + 1e-6", 1 / (1 + exp(-x0)) + sympy.Rational(1, 10**6)),
        ("y = logaddexp(x[0], -inf)", x0),
        ("y = 1 / 0 + log(0)", sympy.nan),
    ],
)
def test_the_result_is_the_formula(text: str, formula: Any) -> None:
    assert evaluate_text(text, {"x": x}) == formula


def test_an_option_may_be_a_symbol() -> None:
    c = sympy.Symbol("c", real=True)
    assert evaluate_text("y = c * x[0]", {"x": x}, c=c) == c * x0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("y = 1 if x[0] > x[1] else 0", "cannot decide"),
        ("y = sum[j : j == 0](rank[j](x[j]))", "cannot decide"),
        ("y = x[floor(x[0])]", "no number"),
        ("y = x[3]", "outside"),
        ("y = m * x[0]", "not set"),
    ],
)
def test_what_depends_on_a_symbols_value_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(EvaluationError, match=complaint):
        evaluate_text(text, {"x": x})


def test_a_large_evaluation_is_refused() -> None:
    mechanism = load("softmax_attention")
    big = np.zeros((1, 1, 30_000, 1), dtype=object)
    with pytest.raises(EvaluationError, match="at most"):
        sympy_evaluate(mechanism.program, {"Q": big, "K": big, "V": big}, outputs=["O"])


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(samples(largest=2) | wild_samples(largest=2))
def test_numbers_give_what_the_loops_give(sample: Sample) -> None:
    program = read(sample.text, sample.declarations)
    try:
        wanted = interpret(program, sample.inputs, sample.options, sizes=sample.sizes)
        got = sympy_evaluate(program, sample.inputs, sample.options, sizes=sample.sizes)
    except EvaluationError:
        return
    for name, array in wanted.items():
        assert got[name].shape == array.shape
        for place in itertools.product(*(range(length) for length in array.shape)):
            if np.isfinite(array[place]):
                exact = complex(got[name][place])
                assert abs(exact - array[place]) <= 1e-9 * max(1.0, abs(array[place])), (name, place)


def attention(**options: Any) -> dict[str, Any]:
    """Softmax attention on symbols: one head, two queries, three keys."""
    inputs = {
        "Q": symbols("q", 1, 1, 2, 2), "K": symbols("k", 1, 1, 3, 2), "V": symbols("v", 1, 1, 3, 1),
    } | options.pop("inputs", {})  # fmt: skip
    return sympy_evaluate(load("softmax_attention").program, inputs, options)


def test_adding_a_vector_to_every_key_changes_no_output() -> None:
    shift = symbols("a", 2)
    shifted = attention(inputs={"K": symbols("k", 1, 1, 3, 2) + shift}, scale=1.0)
    plain = attention(scale=1.0)
    assert prove_equal(plain["O"], shifted["O"]) is True
    moved = plain["LSE"] + (symbols("q", 1, 1, 2, 2) * shift).sum(-1)
    assert prove_equal(shifted["LSE"], moved) is True
    found = prove_equal(plain["LSE"], shifted["LSE"])
    assert isinstance(found, Counterexample)
    assert not found
    assert "a_0" in found.values
    assert found.left != found.right


def test_a_sink_is_a_sigmoid_of_the_lse() -> None:
    sink = symbols("s", 1)
    plain, with_sink = attention(), attention(inputs={"sink": sink})
    gate = np.vectorize(lambda lse: 1 / (1 + exp(sink[0] - lse)), otypes=[object])(plain["LSE"])
    assert prove_equal(with_sink["O"], plain["O"] * gate[..., None]) is True
    assert prove_equal(with_sink["O"], plain["O"]) is not True


def test_a_wide_window_is_full_attention() -> None:
    assert prove_equal(attention(window_left=3, window_right=3), attention()) is True
    assert prove_equal(attention(window_left=1, window_right=3), attention()) is not True


@pytest.mark.parametrize(
    ("left", "right", "verdict"),
    [
        ((x0 + x1) ** 2, x0**2 + 2 * x0 * x1 + x1**2, True),
        (exp(x0) * exp(x1 / 2) ** 2, exp(x0 + x1), True),
        (log(exp(x0) + exp(x1)), x0 + log(1 + exp(x1 - x0)), True),
        (sympy.tanh(x0), 2 / (1 + exp(-2 * x0)) - 1, True),
        (exp(1) * exp(x0), exp(x0 + 1), True),
        (sympy.sqrt(2) * x0 / 2, x0 / sympy.sqrt(2), True),
        (sympy.oo, sympy.oo, True),
        (sympy.nan, sympy.nan, True),
        (sympy.oo, -sympy.oo, False),
        (exp(x0), 1 + x0, False),
        (x0, x0 + sympy.Rational(1, 10**15), False),
        (1 / (1 + exp(x0)), 1 / (1 + exp(x1)), False),
    ],
)
def test_equality_is_decided(left: Any, right: Any, verdict: bool) -> None:
    result = prove_equal(left, right)
    assert (result is True) is verdict
    if not verdict:
        assert isinstance(result, Counterexample)
        assert "differ" in str(result)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        prove_equal(x, x[:2])
    with pytest.raises(ValueError, match="names"):
        prove_equal({"a": x}, {"b": x})
