"""The array evaluator agrees with the loop interpreter, on generated programs and on the manual's values."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnspec.spec.language import EvaluationError, evaluate, read
from attnspec.spec.language.reader import parse_node
from attnspec.spec.language.syntax import Declarations, InputDecl, OptionDecl, OutputDecl, SizeDecl
from attnspec.tests import language_interpreter
from attnspec.tests.language_interpreter import interpret
from attnspec.tests.language_programs import Sample, make_sample, samples, wild_samples
from attnspec.tests.language_scalars import COMPARE, FUNCTIONS, logsumexp, softmax

EXAMPLES = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MANUAL = Path(__file__).parents[1] / "docs" / "language.md"


def outcome(function: Any, sample: Sample, **more: Any) -> dict[str, np.ndarray] | str:
    """The results as NumPy arrays, or "error" where evaluation refuses."""
    program = read(sample.text, sample.declarations)
    try:
        results = function(program, sample.inputs, sample.options, sizes=sample.sizes, **more)
    except EvaluationError:
        return "error"
    return {name: np.asarray(value) for name, value in results.items()}


def assert_alike(got: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    """Equal shapes, kinds and special values, and finite values within `tolerance` of the largest one involved."""
    if isinstance(wanted, str) or isinstance(got, str):
        assert isinstance(wanted, str) and isinstance(got, str), (got, wanted)
        return
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        array = got[name]
        assert array.shape == value.shape, (name, array.shape, value.shape)
        assert array.dtype.kind == value.dtype.kind, (name, array.dtype, value.dtype)
        if value.dtype.kind != "f":
            np.testing.assert_array_equal(array, value, err_msg=name)
            continue
        finite = np.isfinite(value)
        np.testing.assert_array_equal(np.where(finite, 0.0, value), np.where(np.isfinite(array), 0.0, array), name)
        scale = np.maximum(1.0, np.abs(value[finite]).max(initial=0.0))
        np.testing.assert_allclose(array[finite], value[finite], rtol=tolerance, atol=tolerance * scale, err_msg=name)


@EXAMPLES
@given(samples() | wild_samples())
def test_arrays_agree_with_loops(sample: Sample) -> None:
    assert_alike(outcome(evaluate, sample), outcome(interpret, sample))


@EXAMPLES
@given(samples() | wild_samples())
def test_torch_agrees_with_loops(sample: Sample) -> None:
    torch = pytest.importorskip("torch")
    given_inputs = {name: torch.as_tensor(value) for name, value in sample.inputs.items()}
    moved = Sample(sample.text, sample.declarations, given_inputs, sample.options, sample.sizes)
    assert_alike(outcome(evaluate, moved, xp=torch), outcome(interpret, sample))


@EXAMPLES
@given(samples() | wild_samples(), st.data())
def test_restricted_rows_are_rows_of_the_whole(sample: Sample, data: Any) -> None:
    wanted = outcome(interpret, sample)
    if isinstance(wanted, str):
        return
    for output in sample.declarations.outputs.values():
        shape = wanted[output.name].shape[1:]
        for axis, (index, length) in enumerate(zip(output.axes, shape, strict=True)):
            if not length:
                continue
            values = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3))
            got = outcome(evaluate, sample, outputs=[output.name], rows={index: values})
            assert_alike(got, {output.name: np.take(wanted[output.name], values, axis=axis + 1)})


def manual_values() -> list[tuple[str, str]]:
    """The rows of the table of worked values in docs/language.md."""
    section = MANUAL.read_text(encoding="utf-8").split("## 17.")[1]
    return re.findall(r"^\| `(.+?)` \| (\S+) \|$", section, flags=re.MULTILINE)


def manual_program(expression: str) -> Sample:
    """The setting that the manual's table of worked values states."""
    inputs = {
        "x": np.array([3.0, 1.0, 3.0, 2.0]),
        "n": np.array([2, 0, 1, 1]),
        "u": np.array([-np.inf, 0.0, -np.inf, np.nan]),
    }
    declarations = Declarations(
        sizes={"M": SizeDecl("M")},
        indices={"j": parse_node("M"), "k": parse_node("M")},
        inputs={name: InputDecl(name, ("j",), kind="int" if name == "n" else "real") for name in inputs},
        options={"c": OptionDecl("c", "int", 2)},
        outputs={"y": OutputDecl("y", ())},
    )
    return Sample(f"y = {expression}", declarations, inputs, {}, {})


def test_the_manual_states_many_values() -> None:
    assert len(manual_values()) >= 35


@pytest.mark.parametrize(("expression", "value"), manual_values())
@pytest.mark.parametrize("evaluator", [evaluate, interpret])
def test_the_manuals_value_is_computed(expression: str, value: str, evaluator: Any) -> None:
    result = outcome(evaluator, manual_program(expression))
    assert isinstance(result, dict)
    if value in ("True", "False"):
        assert bool(result["y"]) is (value == "True")
    else:
        assert float(result["y"]) == float(value)


@pytest.mark.parametrize(
    ("equations", "why"),
    [
        ("y = x[4]", "a subscript past the end"),
        ("y = x[-1]", "a negative subscript, which does not wrap"),
        ("y = sum[j](x[j + 1])", "a subscript past the end inside a reduction"),
        ("y = sum[j](x[n[j] + 2])", "a gather past the end"),
        ("y = sum[j : x[j + 1] > 0](1)", "a condition that itself leaves the tensor"),
        ("a[j] = x[j + 1]\ny = sum[j : j < 3](a[j]) + a[3]", "an element that its own equation does not guard"),
        ("y = sum[j](argmax[k](u[k] + 0 * j))", "NaN in argmax"),
        ("y = sum[j](rank[j](u[j]))", "NaN in rank"),
        ("y = floor(1 / (x[0] - x[2]))", "floor of infinity"),
        ("y = 1 // (n[0] - 2)", "an integer division by zero"),
        ("y = 1 % (n[0] - 2)", "a remainder by zero"),
    ],
)
@pytest.mark.parametrize("evaluator", [evaluate, interpret])
def test_bad_places_are_errors(equations: str, why: str, evaluator: Any) -> None:
    base = manual_program("0")
    sample = Sample(equations, base.declarations, base.inputs, {}, {})
    assert outcome(evaluator, sample) == "error", why


@pytest.mark.parametrize(
    ("equations", "value"),
    [
        ("y = sum[j](x[j + 1] if j < 3 else 0)", 6.0),
        ("y = sum[j : j < 3](x[j + 1])", 6.0),
        ("y = sum[j : j < 3 and x[j + 1] > 1](x[j + 1])", 5.0),
        ("y = sum[j : j >= 3 or x[j + 1] > 1](1)", 3.0),
        ("y = sum[j](1 // n[j] if n[j] > 0 else 0)", 2.0),
        ("y = sum[j](floor(u[j]) if j == 1 else 5)", 15.0),
        ("y = sum[j : j == 2](rank[j : j < 3](u[j]))", 2.0),
        ("y = argmax[j : j < 3](u[j])", 1.0),
        ("y = prod[j : j == 1](u[j] + 2)", 2.0),
        ("y = mean[j : j == 1](u[j] + 2)", 2.0),
        ("y = sum[j,k : j == 1 and k == 1](u[j] * x[k])", 0.0),
        ("y = sum[j](softmax[j : j < 3](u[j]) * x[j])", 1.0),
    ],
)
@pytest.mark.parametrize("evaluator", [evaluate, interpret])
def test_what_stands_in_excluded_places_does_not_matter(equations: str, value: float, evaluator: Any) -> None:
    base = manual_program("0")
    sample = Sample(equations, base.declarations, base.inputs, {}, {})
    result = outcome(evaluator, sample)
    assert isinstance(result, dict), result
    assert float(result["y"]) == value


def test_the_comparison_rejects_what_differs() -> None:
    value = {"y": np.array([1.0, np.inf, np.nan])}
    assert_alike(value, {"y": value["y"].copy()})
    for other in ([1.0 + 1e-11, np.inf, np.nan], [1.0, -np.inf, np.nan], [1.0, np.inf, 0.0], [1.0, np.inf]):
        with pytest.raises(AssertionError):
            assert_alike({"y": np.array(other)}, value)
    with pytest.raises(AssertionError):
        assert_alike("error", value)


def _whole_line(self: Any, name: str, subscripts: Any) -> Any:
    """A recurrence that never sees its initial line."""
    return self.program.definitions[name]


def _last_of_ties(self: Any, included: dict[Any, Any]) -> list[Any]:
    return sorted(included, key=lambda place: (-included[place], -place[0]))


FLAWS: dict[str, dict[str, Any]] = {
    "softmax of an empty row is NaN": {"softmax": lambda row: softmax(row) or dict.fromkeys(row, np.nan)},
    "softmax without normalization": {"softmax": lambda row: {at: np.exp(x) for at, x in row.items()}},
    "logsumexp in base 2": {"logsumexp": lambda values: logsumexp(values) / np.log(2)},
    "< taken for <=": {"COMPARE": {**COMPARE, "<": COMPARE["<="]}},
    ">= taken for >": {"COMPARE": {**COMPARE, ">=": COMPARE[">"]}},
    "relu without its kink": {"FUNCTIONS": {**FUNCTIONS, "relu": lambda x: x}},
    "sign of zero is one": {"FUNCTIONS": {**FUNCTIONS, "sign": lambda x: FUNCTIONS["sign"](x) or type(x)(1)}},
    "floor towards zero": {"FUNCTIONS": {**FUNCTIONS, "floor": int}},
    "the tanh form of gelu": {
        "FUNCTIONS": {**FUNCTIONS, "gelu": lambda x: x / (1 + np.exp(-1.702 * x)) if np.isfinite(x) else x}
    },
    "ties go to the higher index": {"Interpreter.in_order": _last_of_ties},
    "the initial line is ignored": {"Interpreter.line_for": _whole_line},
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_generated_programs_tell_a_wrong_evaluator(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, wrong in FLAWS[flaw].items():
        owner, _, attribute = name.rpartition(".")
        monkeypatch.setattr(language_interpreter.Interpreter if owner else language_interpreter, attribute, wrong)
    for seed in range(600):
        sample = make_sample(random.Random(seed).randrange)
        try:
            assert_alike(outcome(interpret, sample), outcome(evaluate, sample))
        except Exception:  # a wrong value, or a crash of the wrong evaluator
            return
    pytest.fail(f"600 programs do not notice: {flaw}")
