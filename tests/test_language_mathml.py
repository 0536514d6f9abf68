"""MathML of equations: exact markup, well formed with the right number of children, bracketed where the LaTeX is."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import HealthCheck, given, settings

from attnspec.spec import load, mechanisms
from attnspec.spec.language import expression_to_mathml, read, read_expression, to_latex, to_mathml
from attnspec.tests.language_programs import Sample, samples, wild_samples

CHILDREN = {"msub": 2, "msup": 2, "munder": 2, "mfrac": 2, "msubsup": 3}
KNOWN = frozenset(CHILDREN) | {
    "math", "mrow", "mi", "mn", "mo", "mtext", "msqrt", "mtable", "mtr", "mtd",
}  # fmt: skip


def assert_sound(markup: str) -> None:
    """Well formed, MathML Core alone, scripts and fractions with all their parts, text in leaves only."""
    for element in ET.fromstring(markup).iter():
        assert element.tag in KNOWN, element.tag
        assert len(element) == CHILDREN.get(element.tag, len(element)), ET.tostring(element)
        leaf = element.tag in ("mi", "mn", "mo", "mtext")
        assert not (leaf and len(element)) and (leaf or not (element.text or "").strip()), ET.tostring(element)
        assert not (element.tail or "").strip()


@pytest.mark.parametrize("markup", ["<math><msub><mi>a</mi></msub></math>", "<math>a</math>", "<math><b/></math>"])
def test_the_check_rejects(markup: str) -> None:
    with pytest.raises(AssertionError):
        assert_sound(markup)


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("x", "<mi>x</mi>"),
        ("gamma", "<mi>γ</mi>"),
        ("S0[i]", "<msubsup><mi>S</mi><mrow><mi>i</mi></mrow><mrow><mo>(</mo><mn>0</mn><mo>)</mo></mrow></msubsup>"),
        ("Q[i,d]", '<msub><mi>Q</mi><mrow><mi>i</mi><mo separator="true">,</mo><mi>d</mi></mrow></msub>'),
        ("a - b", "<mi>a</mi><mo>−</mo><mi>b</mi>"),
        ("x * 2", "<mi>x</mi><mo>⋅</mo><mn>2</mn>"),
        ("a / b", "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>"),
        ("a ** 2", "<msup><mrow><mi>a</mi></mrow><mrow><mn>2</mn></mrow></msup>"),
        ("1e-6", "<msup><mn>10</mn><mrow><mo>−</mo><mn>6</mn></mrow></msup>"),
        ("a < b", "<mi>a</mi><mo>&lt;</mo><mi>b</mi>"),
        ("sqrt(x)", "<msqrt><mi>x</mi></msqrt>"),
        ("sum[d](x)", "<munder><mo>∑</mo><mrow><mi>d</mi></mrow></munder><mi>x</mi>"),
        ("mode == 'a_b'", "<mi>mode</mi><mo>=</mo><mtext>“a_b”</mtext>"),
    ],
)  # fmt: skip
def test_the_markup_is(text: str, markup: str) -> None:
    assert expression_to_mathml(read_expression(text)) == f"<math><mrow>{markup}</mrow></math>"
    assert_sound(f"<math>{markup}</math>")


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("(a + b) * c", "(a+b)c"),
        ("a - (b - c)", "a−(b−c)"),
        ("h % G * N + i", "(hmodG)N+i"),
        ("a * (b % c)", "a(bmodc)"),
        ("a % b == 0", "amodb=0"),
        ("sum[d](x[d]) * y", "(∑dxd)y"),
        ("not (a < b or c < d)", "¬(a<b∨c<d)"),
        ("(a or b) and c", "(a∨b)∧c"),
        ("h // G", "⌊h/G⌋"),
        ("1 if a < b else 0", "[a<b]"),
        ("x if a else y if b else z", "{xif\u00a0ayif\u00a0bzotherwise"),
        ("softmax[j : j <= i](x[j])", "softmaxj:j≤i(xj)"),
        ("exp(-x)", "exp(−x)"),
    ],
)
def test_a_formula_reads(text: str, read_as: str) -> None:
    markup = expression_to_mathml(read_expression(text))
    assert_sound(markup)
    assert "".join(ET.fromstring(markup).itertext()).replace("\u2062", "") == read_as


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(samples() | wild_samples())
def test_generated_programs_have_sound_formulas(sample: Sample) -> None:
    program = read(sample.text, sample.declarations)
    for formulas in (to_mathml(program), to_mathml(program, sample.options, present=["o"])):
        assert formulas
        for formula in formulas:
            assert_sound(formula)


@pytest.mark.parametrize("name", mechanisms())
def test_a_mechanism_has_the_brackets_of_its_latex(name: str) -> None:
    mechanism = load(name)
    for program in (mechanism.program, mechanism.gradient, *mechanism.forms.values()):
        if program is None:
            continue
        for markup, latex in zip(to_mathml(program), to_latex(program), strict=True):
            assert_sound(markup)
            for opening, sign in (("(", r"\\left\("), ("⌊", r"\\left\\lfloor"), ("[", r"\\left\[")):
                fences = markup.count(f'<mo form="prefix">{opening}</mo>')
                assert fences == len(re.findall(sign, latex)), latex
            assert markup.count("<mtable") == latex.count(r"\begin{cases}")
