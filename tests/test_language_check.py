"""The checker accepts what has a meaning and names what has none: names, indices, kinds, cycles, outputs."""

from __future__ import annotations

import pytest

from attnspec.spec.language import Declarations, SpecError, kind_of, read, read_expression
from attnspec.spec.language.syntax import OptionDecl
from attnspec.tests.language_build import ATTENTION, attention, declared

DECLARED = declared(
    "i:N j:M d b",
    "Q:id K:jd x:j bias?:ij n!int:j keep!bool:j length!int:.",
    "y:i",
    options=[
        OptionDecl("causal", "bool", False),
        OptionDecl("order", "enum", "left", choices=("left", "right")),
        OptionDecl("side", "enum", "left", choices=("left", "right")),
        OptionDecl("cap", "float", None, nullable=True),
        OptionDecl("count", "int", 3),
    ],
    batch="",
)

REFUSED = [
    # names
    ("y[i] = Qq[i,0]", "unknown tensor 'Qq'", 8),
    ("y[i] = bios[i,0]", "unknown tensor 'bios'; did you mean 'bias'?", 8),
    ("y[i] = caussal", "unknown name 'caussal'; did you mean 'causal'?", 8),
    ("y[i] = N[i]", "'N' is a size and has no subscripts", 8),
    ("y[i] = count[i]", "'count' is an option and has no subscripts", 8),
    ("y[i] = i[0]", "'i' is an index and has no subscripts", 8),
    ("y[i] = x", "'x' has 1 axes, got 0 subscripts; expected x[j]", 8),
    ("y[i] = Q[i]", "'Q' has 2 axes, got 1 subscripts; expected Q[i,d]", 8),
    ("y[i] = length[0]", "'length' has 0 axes, got 1 subscripts; expected length without subscripts", 8),
    ("y[i] = 1\ny[i] = 2", "'y' is already defined in equation 1", 1),
    ("Q[i,d] = 1", "'Q' is an input and cannot be defined", 1),
    ("N = 1", "'N' is a size and cannot be defined", 1),
    ("count = 1", "'count' is an option and cannot be defined", 1),
    ("d = 1", "'d' is an index and cannot be defined", 1),
    # indices
    ("y[i] = x[j]", "index 'j' is free: it is neither on the left side y[i] nor bound by a reduction", 10),
    ("y[i] = sum[j](x[j]) + j", "index 'j' is free", 23),
    ("y[i] = sum[q](x[0])", "index 'q' has no size", 8),
    ("y[q] = 1", "index 'q' has no size", 3),
    ("y[i,i] = 1", "'y' has the same index twice on its left side", 1),
    ("y[i] = sum[j](1)", "sum binds 'j' but its operand and condition do not use it", 8),
    ("y[i] = sum[j](sum[j](x[j]))", "sum binds 'j' but its operand and condition do not use it", 8),
    ("y[i] = softmax[j](x[j])", "softmax[j] has one value for each j, but 'j' is neither on the left side", 8),
    ("y[i] = rank[j](x[j])", "rank[j] has one value for each j", 8),
    ("y[i + 1] = 1", "on the left side, subscripts are plain indices", 1),
    ("y[0,0] = 1", "on the left side, subscripts are plain indices", 5),
    # kinds
    ("y[i] = Q[i + 0.5, 0]", "subscript 1 of 'Q' must be an integer, got a real number", 10),
    ("y[i] = Q[True, 0]", "subscript 1 of 'Q' must be an integer, got a condition", 10),
    ("y[i] = 1 + keep[0]", "the right operand of '+' must be a number, got a condition; write `1 if … else 0`", 12),
    ("y[i] = -keep[0]", "the operand of '-' must be a number, got a condition", 9),
    ("y[i] = 1 if 2 else 3", "the test of 'if' must be a condition, got an integer", 13),
    ("y[i] = 1 if causal else keep[0]", "one branch is an integer, the other a condition", 25),
    ("y[i] = not 1", "the operand of 'not' must be a condition, got an integer", 12),
    ("y[i] = causal and 1.5", "the operand of 'and' must be a condition, got a real number", 19),
    ("y[i] = sum[j : x[j]](1)", "the condition of sum must be a condition, got a real number", 16),
    ("y[i] = sum[j](keep[j])", "the operand of sum must be a number, got a condition", 15),
    ("y[i] = any[j](x[j])", "the operand of any must be a condition, got a real number", 15),
    ("y[i] = 1.5 // 2", "'//' needs integers, got a real number; use floor(a / b) for reals", 8),
    ("y[i] = 3 % x[0]", "'%' needs integers", 12),
    ("y[i] = exp(causal)", "the argument of exp must be a number, got a condition", 12),
    ("y[i] = 1 if causal < True else 0", "a condition is compared with == or != to a condition only", 13),
    ("y[i] = 1 if causal == 1 else 0", "a condition is compared with == or != to a condition only", 13),
    ("y[i] = 1 if order == 'middle' else 0", "option 'order' has no choice 'middle'; it is one of left, right", 22),
    ("y[i] = 1 if order < 'left' else 0", "a string is only compared", 13),
    ("y[i] = 1 if order == side else 0", "a string is only compared", 13),
    ("y[i] = 1 if 'left' == 'left' else 0", "a string is only compared", 13),
    ("y[i] = 'left'", "'y' would be a string", 8),
    ("y[i] = order", "'y' would be a string", 8),
    # presence
    ("y[i] = 1 if present(Q) else 0", "input 'Q' is not optional, so it is always present", 21),
    ("y[i] = 1 if present(count) else 0", "option 'count' is not nullable, so it is always present", 21),
    ("y[i] = 1 if present(bais) else 0", "got 'bais'; did you mean 'bias'?", 21),
    # cycles and boundaries
    ("y[i] = y[i]", "cycle that is no recurrence: y -> y", 1),
    ("y[i] = z[i]\nz[i] = y[i] + 1", "cycle that is no recurrence: y -> z -> y", 1),
    ("y[i] = y[i - 2]\ny[-1] = 0", "cycle that is no recurrence", 1),
    ("y[i] = y[i - 1] + y[i + 1]\ny[-1] = 0", "cycle that is no recurrence", 1),
    ("y[i] = sum[i](y[i - 1])\ny[-1] = 0", "cycle that is no recurrence", 1),
    ("y[i] = y[i - 1] + 1", "recurrence of 'y' along 'i' has no initial line", 8),
    ("y[i] = y[i - 1] + 1\ny[0] = 1", "subscript 1 must be -1", 3),
    ("y[i] = y[i + 1] + 1\ny[-1] = 1", "subscript 1 must be the size of 'i'", 3),
    ("y[i] = y[i - 1] + 1\ny[-1] = y[0]", "initial line of 'y' refers to 'y'", 1),
    ("y[i] = 1\ny[-1] = 2", "'y' has an initial line but does not refer to its own previous value", 1),
    ("z[-1] = 2\ny[i] = 1", "boundary of 'z', but no equation defines 'z' itself", 1),
    ("y[i] = S[i,0]\nS[i,d] = S[i - 1,d]\nS[-1,j] = 0", "subscript 2 must be the same index as in its equation", 6),
    # outputs
    ("z[i] = 1", "output 'y' is not defined", None),
    ("y[j] = 1", "output 'y' is declared with axes [i] but defined with [j]", 1),
]


@pytest.mark.parametrize(("text", "message", "column"), REFUSED, ids=[text.replace("\n", "; ") for text, *_ in REFUSED])
def test_what_has_no_meaning_is_refused_with_its_place(text: str, message: str, column: int | None) -> None:
    with pytest.raises(SpecError) as caught:
        read(text, DECLARED, file="some.toml")
    assert message in caught.value.message
    assert caught.value.column == column
    assert str(caught.value).startswith("some.toml: ")


def test_a_batch_axis_stays_implicit() -> None:
    declarations = declared("i:N b", "x:i", "y:i", batch="b")
    for text in ("y[i] = x[i] + b", "y[i] = x[i]\nz[b] = 1", "y[i] = sum[b](x[i] * b)"):
        with pytest.raises(SpecError, match="'b' is a batch axis"):
            read(text, declarations)


DECLARATIONS = [
    ({"indices": "i:N", "inputs": "N:i", "outputs": "y:i"}, "'N' is declared as size and as input"),
    ({"indices": "exp:N", "inputs": "x:i", "outputs": "y:i"}, "index 'exp' is a reserved name"),
    ({"indices": "i:N", "inputs": "x:k", "outputs": "y:i"}, "input 'x' has axis 'k', which is no index"),
    ({"indices": "i:N", "inputs": "x:ii", "outputs": "y:i"}, "input 'x' has an axis twice"),
    ({"indices": "i:N", "inputs": "x:i", "outputs": "y:i", "broadcast": {"x": "k"}}, "input 'x' broadcasts 'k'"),
    ({"indices": "i:N+Z", "inputs": "x:i", "outputs": "y:i"}, "size of index 'i' uses 'Z', which is no declared size"),
]


@pytest.mark.parametrize(("parts", "message"), DECLARATIONS, ids=[message for _, message in DECLARATIONS])
def test_contradictory_declarations_are_refused(parts: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=r"^[^\n]*$") as caught:
        read("y[i] = 1", declared(**parts))  # type: ignore[arg-type]
    assert message in caught.value.message


KINDS = [
    ("1", "int"), ("1.0", "real"), ("inf", "real"), ("N", "int"), ("count", "int"), ("cap", "real"), ("causal", "bool"),
    ("1 + 1", "int"), ("1 + 1.0", "real"), ("1 / 1", "real"), ("7 // 2", "int"), ("7 % 2", "int"), ("2 ** 3", "int"),
    ("2 ** -1", "real"), ("N ** 0.5", "real"), ("floor(1.5)", "int"), ("ceil(1.5)", "int"), ("abs(-1)", "int"),
    ("abs(-1.0)", "real"), ("max(1, 2)", "int"), ("max(1, 2.0)", "real"), ("clip(1, 2, 3)", "int"), ("exp(1)", "real"),
    ("1 < 2", "bool"), ("not causal", "bool"), ("1 if causal else 2.0", "real"), ("1 if causal else 2", "int"),
    ("sum[j](n[j])", "int"), ("sum[j](x[j])", "real"), ("mean[j](n[j])", "real"), ("max[j](n[j])", "int"),
    ("prod[j](n[j])", "int"), ("any[j](keep[j])", "bool"), ("argmax[j](x[j])", "int"), ("logsumexp[j](n[j])", "real"),
    ("present(bias)", "bool"), ("order == 'left'", "bool"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind"), KINDS, ids=[text for text, _ in KINDS])
def test_kinds(text: str, kind: str) -> None:
    program = read(f"z = {text}\ny[i] = 1", DECLARED)
    assert program.kinds["z"] == kind
    assert kind_of(read_expression(text), program) == kind


def test_a_recurrence_is_real_when_its_step_is() -> None:
    program = read("y[-1] = 0\ny[i] = y[i-1] + 0.5", DECLARED)
    assert program.kinds["y"] == "real"
    assert read("y[-1] = 0\ny[i] = y[i-1] + 1", DECLARED).kinds["y"] == "int"
    assert read("y[-1] = True\ny[i] = not y[i-1]", DECLARED).kinds["y"] == "bool"
    with pytest.raises(SpecError, match="one branch is"):
        read("y[-1] = 0\ny[i] = y[i-1] > 0", DECLARED)


def test_definitions_are_ordered_after_what_they_use() -> None:
    lines = [line for line in ATTENTION.replace("(\n    ", "(").replace("\n    +", " +").split("\n") if line]
    program = read("\n".join(reversed(lines)), attention().declarations)
    assert program.order.index("P") > max(program.order.index("allowed"), program.order.index("scale"))
    assert program.order[-1] == "O"


def test_recurrences_are_recognised_with_their_direction_and_inner_order() -> None:
    declarations: Declarations = declared("t:T d", "x:td", "y:t")
    forward = read(
        "u[t] = s[t-1] * 2\ns[-1] = 0\ns[t] = u[t] + x[t,0]\nr[T] = 1\nr[t] = r[t+1] * x[t,1]\ny[t] = s[t] + r[t]",
        declarations,
    )
    assert [(scan.names, scan.index, scan.step) for scan in forward.scans] == [(("u", "s"), "t", 1), (("r",), "t", -1)]
    assert set(forward.boundaries) == {"s", "r"}


def test_an_index_may_be_bound_again_inside() -> None:
    read("y[i] = sum[i](x[0] * i) + i", DECLARED)
