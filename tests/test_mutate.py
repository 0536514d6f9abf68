"""Mutants of equations: complete, checked, different from the original, stable ids."""

from __future__ import annotations

import dataclasses

import pytest

from attnspec.spec import load
from attnspec.spec.language import Declarations, InputDecl, OptionDecl, OutputDecl, Program, SizeDecl, read
from attnspec.spec.language.canonical import canonical, canonical_program
from attnspec.spec.language.mutate import Mutant, mutants
from attnspec.spec.language.reader import parse_node
from attnspec.spec.language.syntax import Name
from attnspec.spec.language.unparse import unparse, unparse_definition


def program(text: str, **outputs: tuple[str, ...]) -> Program:
    """Equations over Q[i,d], K[j,d], V[j,d], X[t,d], mask[i,j], with options scale, causal, window and c."""
    declarations = Declarations(
        sizes={name: SizeDecl(name) for name in ("N", "M", "D", "T")},
        indices={"i": Name("N"), "j": Name("M"), "d": Name("D"), "t": Name("T")},
        inputs={
            "Q": InputDecl("Q", ("i", "d")),
            "K": InputDecl("K", ("j", "d")),
            "V": InputDecl("V", ("j", "d")),
            "X": InputDecl("X", ("t", "d"), optional=True),
            "S0": InputDecl("S0", ("d",), optional=True),
            "mask": InputDecl("mask", ("i", "j"), kind="bool", optional=True),
        },
        options={
            "scale": OptionDecl("scale", "float", default=0.5),
            "causal": OptionDecl("causal", "bool", default=False),
            "window": OptionDecl("window", "int", nullable=True),
            "gamma": OptionDecl("gamma", "float", default=0.9),
        },
        outputs={name: OutputDecl(name, axes) for name, axes in outputs.items()},
    )
    return read(text, declarations)


ATTENTION = """
keep[i,j] = (j <= i if causal else True) and (mask[i,j] if present(mask) else True)
P[i,j] = softmax[j : keep[i,j]](scale * sum[d](Q[i,d] * K[j,d]))
O[i,d] = sum[j](P[i,j] * V[j,d])
"""
DECAY = """
S[-1,d] = S0[d] if present(S0) else 0
S[t,d] = gamma * S[t-1,d] + X[t,d]
Y[t,d] = tanh(S[t,d]) - 1
"""


@pytest.fixture(scope="module")
def attention() -> list[Mutant]:
    return mutants(program(ATTENTION, O=("i", "d")))


@pytest.fixture(scope="module")
def decay() -> list[Mutant]:
    return mutants(program(DECAY, Y=("t", "d")))


def described(found: list[Mutant]) -> str:
    return "\n".join(f"{mutant.id}: {mutant.description}" for mutant in found)


@pytest.mark.parametrize(
    "what",
    [
        "`<=` replaced by `<` in equation 2 (keep)",
        "`<=` replaced by `>=` in equation 2 (keep)",
        "`i` replaced by `i + 1` in equation 2 (keep)",
        "condition `keep[i,j]` of softmax dropped in equation 3 (P)",
        "softmax over i instead of j in equation 3 (P)",
        "factor `scale` dropped in equation 3 (P)",
        "option scale ignored (always 0.5) in equation 3 (P)",
        "sum replaced by mean in equation 4 (O)",
        "sum replaced by max in equation 4 (O)",
        "K replaced by V in `K[j,d]` in equation 3 (P)",
        "V replaced by K in `V[j,d]` in equation 4 (O)",
        "condition `mask[i,j] if present(mask) else True` dropped in equation 2 (keep)",
        "branches of `causal` swapped in equation 2 (keep)",
        "`and` replaced by `or` in equation 2 (keep)",
    ],
)
def test_attention_has_the_mutant(attention: list[Mutant], what: str) -> None:
    assert what in {mutant.description for mutant in attention}, described(attention)


@pytest.mark.parametrize(
    "what",
    [
        "always `else`, whatever `present(S0)` in equation 2 (S~)",
        "factor `gamma` dropped in equation 3 (S)",
        "term `gamma * S[t - 1,d]` dropped in equation 3 (S)",
        "tanh dropped in equation 4 (Y)",
        "`1` replaced by `2` in equation 4 (Y)",
        "`-` replaced by `+` before `1` in equation 4 (Y)",
    ],
)
def test_a_recurrence_has_the_mutant(decay: list[Mutant], what: str) -> None:
    assert what in {mutant.description for mutant in decay}, described(decay)


def test_a_recurrence_stays_a_recurrence(decay: list[Mutant]) -> None:
    assert decay
    for mutant in decay:
        if mutant.description.startswith("term `gamma"):
            continue
        assert [scan.index for scan in mutant.program.scans] in (["t"], []), mutant.description


@pytest.mark.parametrize("text, outputs", [(ATTENTION, {"O": ("i", "d")}), (DECAY, {"Y": ("t", "d")})])
def test_every_mutant_is_another_program_with_one_changed_equation(
    text: str, outputs: dict[str, tuple[str, ...]]
) -> None:
    original = program(text, **outputs)
    forms = [canonical_program(original)]
    for mutant in mutants(original):
        lines = {
            (line.name, line.boundary): unparse_definition(line)
            for line in (*original.definitions.values(), *original.boundaries.values())
        }
        changed = [
            key
            for line in (*mutant.program.definitions.values(), *mutant.program.boundaries.values())
            if lines[key := (line.name, line.boundary)] != unparse_definition(line)
        ]
        assert [name for name, _ in changed] == [mutant.name], mutant.description
        form = canonical_program(mutant.program)
        assert form not in forms, mutant.description
        forms.append(form)


def test_ids_are_unique_and_the_order_is_fixed(attention: list[Mutant]) -> None:
    again = mutants(program(ATTENTION, O=("i", "d")))
    assert [mutant.id for mutant in again] == [mutant.id for mutant in attention]
    assert len({mutant.id for mutant in attention}) == len(attention)
    lines = [mutant.equation for mutant in attention]
    assert lines == sorted(lines)


def test_ids_do_not_depend_on_other_equations() -> None:
    longer = ATTENTION.replace("O[i,d] =", "extra[i] = sum[d](Q[i,d] * Q[i,d])\nO[i,d] = extra[i] * 0 +")
    own = {mutant.id for mutant in mutants(program(ATTENTION, O=("i", "d"))) if mutant.name != "O"}
    assert own <= {mutant.id for mutant in mutants(program(longer, O=("i", "d")))}


def test_an_equation_that_no_output_needs_has_no_mutants() -> None:
    found = mutants(program(ATTENTION + "\nunused[i] = sum[d](Q[i,d])", O=("i", "d")))
    assert {mutant.name for mutant in found} == {"keep", "P", "O"}


def test_only_the_named_definitions_are_changed() -> None:
    assert {mutant.name for mutant in mutants(program(ATTENTION, O=("i", "d")), ["P"])} == {"P"}


@pytest.mark.parametrize(
    "one, other",
    [
        ("a + b * c", "c * b + a"),
        ("a < b", "b > a"),
        ("a <= b < c", "c > b >= a"),
        ("not (a == b)", "b != a"),
        ("not not (a < b)", "a < b"),
        ("a < b and c < d", "c < d and a < b"),
        ("a < b and a < b and True", "a < b"),
        ("a < b or True", "True"),
        ("a if b < c else a", "a"),
        ("a if not (b < c) else d", "d if b < c else a"),
        ("a * 1 + 0", "a"),
        ("-(-a)", "a"),
        ("2 * 3 - 1", "5"),
        ("max(a, b)", "max(b, a)"),
        ("min(a, a)", "min(a)"),
        ("sum[j : True](a)", "sum[j](a)"),
    ],
)
def test_the_normal_form_equates(one: str, other: str) -> None:
    assert unparse(canonical(parse_node(one))) == unparse(canonical(parse_node(other)))


@pytest.mark.parametrize(
    "one, other",
    [
        ("a - b", "b - a"),
        ("a < b", "b < a"),
        ("a / b", "b / a"),
        ("a // b", "a / b"),
        ("a and b", "a or b"),
        ("a if b < c else d", "d if b < c else a"),
        ("a ** b", "b ** a"),
        ("logaddexp(a, a)", "a"),
        ("sum[j](a)", "sum[i](a)"),
        ("a + a", "a"),
    ],
)
def test_the_normal_form_keeps_apart(one: str, other: str) -> None:
    assert unparse(canonical(parse_node(one))) != unparse(canonical(parse_node(other)))


@pytest.mark.parametrize(
    "text",
    [
        "a - (b - c)",
        "(a - b) - c",
        "a / (b * c)",
        "-a ** 2",
        "(-a) ** 2",
        "2 ** -a",
        "(a ** b) ** c",
        "a ** b ** c",
        "not (a and b) or c",
        "not a == b",
        "(a if b else c) + d",
        "a if b else c if d else e",
        "(a if b else c) if d else e",
        "a if (b if c else d) else e",
        "sum[j, k : a < b <= c](x[j,k + 1] * -y)",
        "x == 'top_left'",
        "min(a, -inf, 1e-06, 3.0)",
        "(a < b) == (c < d)",
        "a % b // c",
        "a % (b // c)",
    ],
)
def test_unparsing_gives_back_the_same_tree(text: str) -> None:
    tree = parse_node(text)
    assert parse_node(unparse(tree)) == tree


def test_the_equations_of_softmax_attention_read_back_from_their_text() -> None:
    mechanism = load("softmax_attention")
    assert mechanism.gradient is not None
    for original in (mechanism.program, mechanism.gradient):
        text = "\n".join(unparse_definition(line) for line in original.definitions.values())
        again = read(text, original.declarations)
        assert {n: d.body for n, d in again.definitions.items()} == {n: d.body for n, d in original.definitions.items()}


def test_softmax_attention_has_mutants_of_every_equation_with_more_than_a_name() -> None:
    mechanism = load("softmax_attention")
    assert mechanism.gradient is not None
    own = [name for name in mechanism.gradient.definitions if name not in mechanism.program.definitions]
    found = [*mutants(mechanism.program), *mutants(mechanism.gradient, own)]
    assert {mutant.name for mutant in found} == set(mechanism.gradient.definitions)
    assert len(found) > 500


def test_a_mutant_is_a_program_that_evaluates() -> None:
    import numpy as np

    from attnspec.spec.language import evaluate

    original = program(ATTENTION, O=("i", "d"))
    rng = np.random.default_rng(0)
    inputs = {"Q": rng.normal(size=(3, 2)), "K": rng.normal(size=(4, 2)), "V": rng.normal(size=(4, 2))}
    sizes = {"T": 1}
    want = evaluate(original, inputs, {"causal": True}, sizes=sizes)["O"]
    flipped = next(m for m in mutants(original) if m.description.startswith("`<=` replaced by `<`"))
    got = evaluate(flipped.program, inputs, {"causal": True}, sizes=sizes)["O"]
    assert not got[0].any() and want[0].any()
    same = evaluate(flipped.program, inputs, {"causal": False}, sizes=sizes)["O"]
    assert np.array_equal(same, evaluate(original, inputs, {"causal": False}, sizes=sizes)["O"])


def test_a_mutant_is_data() -> None:
    mutant = mutants(program(ATTENTION, O=("i", "d")))[0]
    assert dataclasses.is_dataclass(mutant) and mutant.program.text
