"""LaTeX of equations: exact formulas for every construct, balanced brackets always, options decided on request."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from attnspec.conformance import cli
from attnspec.spec import load, mechanisms
from attnspec.spec.language import SpecError, latex_block, read, read_expression
from attnspec.spec.language.latex import expression_to_latex, to_latex
from attnspec.spec.language.latex_layout import PACKAGES, width_of
from attnspec.spec.language.syntax import Declarations, InputDecl, OutputDecl, SizeDecl
from attnspec.tests.language_programs import Sample, samples, wild_samples


def assert_balanced(formula: str) -> None:
    """Braces, `\\left`/`\\right` and environments close in the order in which they open."""
    stack: list[str] = []
    for token in re.findall(r"\\left|\\right|\\begin\{cases\}|\\end\{cases\}|\\[{}]|[{}]", formula):
        if token in ("\\{", "\\}"):
            continue
        if token in ("{", "\\left", "\\begin{cases}"):
            stack.append(token)
        else:
            assert stack, formula
            assert {"}": "{", "\\right": "\\left", "\\end{cases}": "\\begin{cases}"}[token] == stack.pop(), formula
    assert not stack, formula
    assert "&" not in re.sub(r"\\begin\{cases\}.*\\end\{cases\}|\\&", "", formula)
    assert not re.search(r"[#%~]|\^\^|(?<!\\)_$", formula)
    assert not re.search(r"\}\^\{[^}]*\}\^|_\{[^{}]*\}_", formula), f"double script in {formula}"


@pytest.mark.parametrize("formula", ["{", "\\left(x", "{\\left(}\\right)", "\\begin{cases} 1", "a & b"])
def test_the_balance_check_rejects(formula: str) -> None:
    with pytest.raises(AssertionError):
        assert_balanced(formula)


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("Q[h,i,d]", r"Q_{h, i, d}"),
        ("K[h // G,j,d]", r"K_{\left\lfloor h / G \right\rfloor, j, d}"),
        ("K[T[i,s],d]", r"K_{T_{i, s}, d}"),
        ("S0[i]", r"S^{(0)}_{i}"),
        ("q_length", r"\mathrm{q\_length}"),
        ("gamma * Delta[i]", r"\gamma \, \Delta_{i}"),
        ("a + b * c", r"a + b \, c"),
        ("(a + b) * c", r"\left(a + b\right) \, c"),
        ("a - (b - c)", r"a - \left(b - c\right)"),
        ("-a ** 2", r"-a^{2}"),
        ("(-a) ** 2", r"\left(-a\right)^{2}"),
        ("(a * b) ** -0.5", r"\left(a \, b\right)^{-0.5}"),
        ("S0[i] ** 2", r"\left(S^{(0)}_{i}\right)^{2}"),
        ("x * 2", r"x \cdot 2"),
        ("a / (b + c)", r"\frac{a}{b + c}"),
        ("(i + 1) % n", r"\left(i + 1\right) \bmod n"),
        ("h % G * N + i", r"\left(h \bmod G\right) \, N + i"),
        ("a * (b % c)", r"a \, \left(b \bmod c\right)"),
        ("i % 2 == 0", r"i \bmod 2 = 0"),
        ("1e-6", r"10^{-6}"),
        ("2.5e-6 + inf", r"2.5 \cdot 10^{-6} + \infty"),
        ("sqrt(x) + rsqrt(y)", r"\sqrt{x} + \frac{1}{\sqrt{y}}"),
        ("exp(x) * abs(y)", r"\exp\left(x\right) \, \left|y\right|"),
        ("softplus(x)", r"\operatorname{softplus}\left(x\right)"),
        ("floor(x / 2)", r"\left\lfloor \frac{x}{2} \right\rfloor"),
        ("exp2(x)", r"2^{x}"),
        ("sum[d](Q[d] * K[d])", r"\sum_{d} Q_{d} \, K_{d}"),
        ("sum[d](Q[d] + K[d]) * x", r"\left(\sum_{d} \left(Q_{d} + K_{d}\right)\right) \, x"),
        ("sum[j,k : j <= i and k < j](x[j,k])", r"\sum_{j, k \,:\, j \le i \wedge k < j} x_{j, k}"),
        ("softmax[j : on[i,j]](S[i,j])", r"\operatorname{softmax}_{j \,:\, \mathrm{on}_{i, j}}\left(S_{i, j}\right)"),
        ("argmax[j](x[j])", r"\operatorname*{arg\,max}_{j}\left(x_{j}\right)"),
        ("any[j](x[j] > 0)", r"\bigvee_{j} \left(x_{j} > 0\right)"),
        ("1 if a < b <= c else 0", r"\left[a < b \le c\right]"),
        ("x if a == b else 0", r"\begin{cases} x & \text{if } a = b \\ 0 & \text{otherwise} \end{cases}"),
        ("not (a != b or c < d)", r"\neg \left(a \ne b \vee c < d\right)"),
        ("present(x) and mode == 'a_b'", r"x \text{ is given} \wedge \mathrm{mode} = \text{``a\_b''}"),
    ],
)  # fmt: skip
def test_the_formula_is(text: str, latex: str) -> None:
    assert expression_to_latex(read_expression(text)) == latex
    assert_balanced(latex)


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(samples() | wild_samples())
def test_generated_programs_have_balanced_formulas(sample: Sample) -> None:
    program = read(sample.text, sample.declarations)
    for formulas in (to_latex(program), to_latex(program, sample.options, present=["o"])):
        assert formulas
        for formula in formulas:
            assert_balanced(formula)
    assert len(to_latex(program)) == len(sample.text.splitlines())


@pytest.mark.parametrize("name", mechanisms())
def test_mechanisms_have_balanced_formulas(name: str) -> None:
    mechanism = load(name)
    for program in (mechanism.program, mechanism.gradient):
        if program is not None:
            for formula in to_latex(program):
                assert_balanced(formula)


def test_options_decide_what_is_shown() -> None:
    program = load("softmax_attention").program
    plain = "\n".join(to_latex(program, {}, present=["K", "V"]))
    assert "cases" not in plain
    assert "tanh" not in plain
    assert "is given" not in plain
    capped = "\n".join(to_latex(program, {"softcap": 5.0, "causal": True}, present=["K", "V"]))
    assert r"\tanh" in capped
    assert r"\mathrm{past}_{i, j}" in capped
    assert r"\mathrm{past}_{i, j}" not in plain
    assert len(to_latex(program)) == len(program.definitions) + len(program.boundaries)


def test_a_recurrence_shows_its_initial_line() -> None:
    sample_program = read("S[-1] = 0\nS[t] = 0.5 * S[t-1] + w\nO[t] = S[t]", _scan_declarations())
    assert to_latex(sample_program) == ["S_{-1} = 0", r"S_{t} = 0.5 \, S_{t - 1} + w", "O_{t} = S_{t}"]


def _scan_declarations() -> Declarations:
    return Declarations(
        {"T": SizeDecl("T")}, {"t": read_expression("T")}, {"w": InputDecl("w", ())}, {}, {"O": OutputDecl("O", ("t",))}
    )


def test_unknown_options_and_inputs_are_named() -> None:
    program = load("softmax_attention").program
    with pytest.raises(SpecError, match="causl"):
        to_latex(program, {"causl": True})
    with pytest.raises(SpecError, match="biass"):
        to_latex(program, present=["biass"])


# -- the block that is pasted into a document --------------------------------------------------------------------------


def assert_nested(block: str) -> None:
    """Braces, growing brackets and environments close in order; every row of an alignment has one `&` of its own."""
    stack: list[str] = []
    for token in re.findall(r"\\left(?![a-z])|\\right(?![a-z])|\\(?:begin|end)\{[a-z*]+\}|\\[{}\\]|[{}&]|\$", block):
        match token:
            case "\\{" | "\\}" | "\\\\":
                continue
            case "$" if stack and stack[-1] == "$":
                stack.pop()
            case "{" | "\\left" | "$":
                stack.append(token)
            case "}" | "\\right":
                assert stack and stack.pop() == {"}": "{", "\\right": "\\left"}[token], block
            case "&":
                assert stack and stack[-1].startswith("\\begin"), block
            case _ if token.startswith("\\begin"):
                stack.append(token)
            case _:
                assert stack and stack.pop() == token.replace("end", "begin"), block
    assert not stack, block


@pytest.mark.parametrize(
    "block", ["{", r"\left( x", r"\begin{aligned} x", r"{\begin{cases} x}\end{cases}", "a & b", "$x"]
)
def test_the_nesting_check_rejects(block: str) -> None:
    with pytest.raises(AssertionError):
        assert_nested(block)


@pytest.mark.parametrize("name", mechanisms())
def test_the_shown_block_is_nested_and_holds_every_equation(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", name, "--format", "latex"]) == 0
    shown = capsys.readouterr().out
    text = "\n".join(line for line in shown.splitlines() if not line.startswith("%"))
    assert_nested(text)
    mechanism = load(name)
    backward = [] if mechanism.gradient is None else to_latex(mechanism.gradient)[len(to_latex(mechanism.program)) :]
    blocks = len(re.findall(r"\\begin\{align\*\}", text))
    forms = [to_latex(program) for program in mechanism.forms.values()]
    assert blocks == 1 + bool(backward) + len(forms)
    rows = [line for line in text.splitlines() if " &=" in line or r" &\iff" in line]
    assert len(rows) == len(to_latex(mechanism.program)) + len(backward) + sum(map(len, forms))
    assert f"usepackage{{{PACKAGES}}}" in shown.splitlines()[0]


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(samples() | wild_samples())
def test_generated_programs_have_nested_blocks(sample: Sample) -> None:
    assert_nested(latex_block(read(sample.text, sample.declarations)))


def test_a_long_sum_is_broken_and_a_short_one_is_not() -> None:
    names = [f"number_{letter}" for letter in "abcdefgh"]
    declarations = Declarations({}, {}, {name: InputDecl(name, ()) for name in names}, {}, {"O": OutputDecl("O", ())})
    text = latex_block(read(f"O = {' + '.join(names)}", declarations))
    assert text.count("aligned") == 2 and text.count("& +") == 1
    assert "aligned" not in latex_block(read(f"O = {' + '.join(names[:2])}", declarations))
    assert width_of(read_expression(" + ".join(names))) > 2 * width_of(read_expression(" + ".join(names[:3])))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_every_mechanism_compiles_and_fits_the_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [rf"\documentclass{{article}}\usepackage{{{PACKAGES}}}\begin{{document}}"]
    for name in mechanisms():
        assert cli.main(["show", name, "--format", "latex"]) == 0
        parts += [capsys.readouterr().out, ""]
    (tmp_path / "all.tex").write_text("\n".join([*parts, r"\end{document}"]))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    over = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", done.stdout)]
    assert max(over, default=0) < 15, over
