"""The cost polynomials equal the operations that the loop interpreter counts one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import HealthCheck, given, settings

from attnspec.spec import load
from attnspec.spec.language import EvaluationError, SpecError, read, read_expression
from attnspec.spec.language.cost import Cost, cost, symbol
from attnspec.spec.language.syntax import Declarations, InputDecl, OptionDecl, OutputDecl, SizeDecl
from attnspec.tests.language_interpreter import Counts, interpret
from attnspec.tests.language_programs import Sample, samples, wild_samples

SIZES = {"B": 2, "N": 4, "M": 3, "D": 2}
N, M, D, B = (symbol(name) for name in "NMDB")


def small_program(text: str) -> tuple[Any, dict[str, Any]]:
    """A program over a few inputs, with inputs of the sizes SIZES."""
    inputs = {
        "Q": InputDecl("Q", ("i", "d"), ("b",)),
        "K": InputDecl("K", ("j", "d"), ("b",)),
        "w": InputDecl("w", ("i", "r")),
        "n": InputDecl("n", ("i",), kind="int"),
        "ok": InputDecl("ok", ("i", "j"), kind="bool"),
    }
    declarations = Declarations(
        {name: SizeDecl(name) for name in SIZES},
        {i: read_expression(size) for i, size in {"b": "B", "i": "N", "r": "N", "j": "M", "d": "D", "t": "N"}.items()},
        inputs,
        {"scale": OptionDecl("scale", "float", 0.5), "cap": OptionDecl("cap", "float", None, nullable=True)},
        {"y": OutputDecl("y", _axes(text))},
        ("b",),
    )
    generator = np.random.default_rng(0)
    shapes = {"Q": (2, 4, 2), "K": (2, 3, 2), "w": (4, 4)}
    arrays: dict[str, Any] = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    arrays |= {"n": np.arange(4), "ok": np.arange(12).reshape(4, 3) % 2 == 0}
    return read(text, declarations), arrays


def _axes(text: str) -> tuple[str, ...]:
    left = text.splitlines()[-1].split("=")[0].strip()
    return tuple(left[2:-1].split(",")) if "[" in left else ()


@pytest.mark.parametrize(
    ("text", "multiply_adds", "exponentials", "dense"),
    [
        ("y[i,j] = scale * sum[d](Q[i,d] * K[j,d])", B * N * M * (D + 1), 0, False),
        ("y[i,j] = Q[i,0] + K[j,0]", 0, 0, False),
        ("y[i,j] = Q[i,0] / K[j,0]", B * N * M, 0, False),
        ("y[i,d] = exp(Q[i,d]) + tanh(Q[i,d]) * 2", B * N * D, 2 * B * N * D, False),
        ("y[i,j] = softmax[j](Q[i,0] * K[j,0])", 2 * B * N * M, B * N * M, False),
        ("y[i] = logsumexp[j](K[j,0])", 0, B * N * (M + 1), False),
        ("y[i] = mean[j](K[j,0])", B * N, 0, False),
        ("y[i] = prod[j](K[j,0])", B * N * M, 0, False),
        ("y[i] = max[j](K[j,0] * Q[i,0])", B * N * M, 0, False),
        ("y[i,d] = Q[i,d] ** 2 + Q[i,d] ** 4", 4 * B * N * D, 0, False),
        ("y[i,d] = Q[i,d] ** 0.5 + abs(Q[i,d]) ** 7", 0, 2 * B * N * D, False),
        ("y[i] = n[i] * n[i] + 3 * n[i]", 0, 0, False),
        ("y[i] = (n[i] + 1) / 2", B * N, 0, False),
        ("y[i] = Q[(i * 2) % N,0]", 0, 0, False),
        ("y[i] = scale ** 0.5 * D ** -0.5 * 3.0", 0, 0, False),
        ("y[i] = sum[r : r <= i](w[i,r] * w[r,i])", B * N * (N + 1) / 2, 0, False),
        ("y[i] = sum[r : i > r](w[i,r] * w[r,i])", B * N * (N - 1) / 2, 0, False),
        ("y[i] = sum[r,d : r < i](w[i,r] * Q[r,d])", B * D * N * (N - 1) / 2, 0, False),
        ("y[i] = logsumexp[r : r >= i](w[i,r])", 0, B * N * ((N + 1) / 2 + 1), False),
        ("y[i] = sum[j : ok[i,j]](K[j,0] * K[j,1])", B * N * M, 0, True),
        ("y[i] = sum[j : ok[i,j]](K[j,0])", 0, 0, False),
        ("y[i,j] = Q[i,0] * K[j,0] if ok[i,j] else 0", B * N * M, 0, True),
        ("y[i] = cap * tanh(Q[i,0] / cap) if present(cap) else Q[i,0]", 0, 0, False),
        ("S[-1] = 0\nS[t] = scale * S[t-1] + exp(Q[t,0])\ny[t] = S[t] * 2", 2 * B * N, B * N, False),
        ("unused[i] = exp(Q[i,0])\ny[i] = Q[i,0]", 0, 0, False),
    ],
)
def test_the_polynomials_are(text: str, multiply_adds: Any, exponentials: Any, dense: bool) -> None:
    program, arrays = small_program(text)
    total = cost(program).total
    assert sympy.expand(total.multiply_adds - multiply_adds) == 0
    assert sympy.expand(total.exponentials - exponentials) == 0
    assert total.dense is dense
    counts = Counts()
    interpret(program, arrays, counts=counts)
    if dense:
        assert counts.multiplies < total.at(SIZES)["multiply_adds"]
    else:
        assert (counts.multiplies, counts.exponentials) == _operations(total, SIZES)


def _operations(total: Cost, sizes: dict[str, int]) -> tuple[int, int]:
    numbers = total.at(sizes)
    return numbers["multiply_adds"], numbers["exponentials"]


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(samples() | wild_samples())
def test_generated_programs_cost_what_is_counted(sample: Sample) -> None:
    program = read(sample.text, sample.declarations)
    total = cost(program, sample.options, present=["o"] if "o" in sample.inputs else []).total
    counts = Counts()
    try:
        interpret(program, sample.inputs, sample.options, sizes=sample.sizes, counts=counts)
    except EvaluationError:  # a NaN that is to be ordered
        return
    multiplies, exponentials = _operations(total, sample.sizes)
    assert counts.multiplies <= multiplies
    assert counts.exponentials <= exponentials
    if not total.dense:
        assert (counts.multiplies, counts.exponentials) == (multiplies, exponentials)


def test_softmax_attention_costs_what_is_counted() -> None:
    mechanism = load("softmax_attention")
    generator = np.random.default_rng(1)
    shapes = {"Q": (2, 4, 3, 5), "K": (2, 2, 6, 5), "V": (2, 2, 6, 4)}
    inputs = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    model = cost(mechanism.program, {}, present=["K", "V"])
    sizes = {"B": 2, "H": 4, "Hk": 2, "G": 2, "N": 3, "M": 6, "D": 5, "E": 4}
    counts = Counts()
    interpret(mechanism.program, inputs, {}, counts=counts)
    assert (counts.multiplies, counts.exponentials) == _operations(model.total, sizes)
    assert not model.total.dense
    causal = cost(mechanism.program, {"causal": True}, present=["K", "V"])
    assert causal.total.dense
    assert {entry.name for entry in causal.equations if entry.dense} == {"L", "P", "O"}
    counts = Counts()
    interpret(mechanism.program, inputs, {"causal": True}, counts=counts)
    assert counts.exponentials < causal.total.at(sizes)["exponentials"]


def test_the_leading_terms_are_the_papers() -> None:
    total = cost(load("softmax_attention").program, {}, present=["K", "V"]).total
    claimed = load("softmax_attention").cost["multiply_adds"]
    paper = sympy.sympify(claimed, locals={name: symbol(name) for name in ("B", "H", "N", "M", "D", "E")})
    surplus = sympy.expand(total.multiply_adds - paper)
    assert sympy.Poly(surplus, symbol("D"), symbol("E")).total_degree() == 0


def test_bytes_are_tensors_read_and_written() -> None:
    program, _ = small_program("a[i,j] = sum[d](Q[i,d] * K[j,d])\ny[i] = sum[j : ok[i,j]](a[i,j]) + n[i]")
    model = cost(program, itemsize=2)
    first, second = model.equations
    assert sympy.expand(first.bytes - 2 * B * (N * D + M * D + N * M)) == 0
    assert sympy.expand(second.bytes - (2 * B * N * M + N * M + 8 * N + 2 * B * N)) == 0
    assert sympy.expand(model.total.bytes - first.bytes - second.bytes) == 0
    assert sympy.expand(model.compulsory_bytes - (2 * B * (N * D + M * D + N) + N * M + 8 * N)) == 0


def test_unknown_options_and_inputs_are_named() -> None:
    program = load("softmax_attention").program
    with pytest.raises(SpecError, match="causl"):
        cost(program, {"causl": True})
    with pytest.raises(SpecError, match="biass"):
        cost(program, present=["biass"])
