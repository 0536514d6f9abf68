"""Named semantics: a candidate passes by what it declares, and only by that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnspec.conformance import semantics, shapes
from attnspec.conformance.case_id import make
from attnspec.conformance.data import build
from attnspec.conformance.oracle import expected
from attnspec.conformance.types import Case, CaseData
from attnspec.conformance.verdict import judge
from attnspec.spec import load
from attnspec.spec.mechanism import Mechanism
from attnspec.tests.conformance_kernels import attention

Kernel = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def spec() -> Mechanism:
    return load("softmax_attention")


def passes(spec: Mechanism, case: Case, kernel: Kernel, declares: Mapping[str, Any]) -> bool:
    """The path of a run: data, conversion, call, judgement."""
    data = build(case, declares)
    given = semantics.to_candidate(spec, data, declares)
    found = kernel(**given.inputs, **given.options, dtype=case.dtype)
    return all(entry.passed for entry in judge(case, expected(case, data, declares), found))


def window_counts(*, window_left: int | None = None, **rest: Any) -> dict[str, Any]:
    return attention(window_left=None if window_left is None else window_left - 1, **rest)


def true_is_masked(*, mask: Any = None, **rest: Any) -> dict[str, Any]:
    return attention(mask=None if mask is None else ~mask, **rest)


def base_2(**rest: Any) -> dict[str, Any]:
    return attention(fault="lse_base_2", **rest)


def strided_heads(**rest: Any) -> dict[str, Any]:
    return attention(fault="heads_strided", **rest)


def plus_infinity(**rest: Any) -> dict[str, Any]:
    found = attention(**rest)
    return {**found, "LSE": np.where(np.isneginf(found["LSE"]), np.inf, found["LSE"])}


def nan_rows(**rest: Any) -> dict[str, Any]:
    return attention(fault="nan_for_empty", **rest)


def mean_rows(*, mask: Any, V: Any, **rest: Any) -> dict[str, Any]:
    found = attention(mask=mask, V=V, **rest)
    empty = np.asarray(~np.broadcast_to(mask, (*found["O"].shape[:3], mask.shape[-1])).any(axis=-1))
    mean = np.repeat(V, found["O"].shape[1] // V.shape[1], axis=1).mean(axis=2, keepdims=True)
    return {"O": np.where(empty[..., None], mean.astype(np.float32).astype(float), found["O"])}


def top_left(*, causal: bool = False, **rest: Any) -> dict[str, Any]:
    return attention(causal=causal, causal_alignment="top_left", **rest)


def own_scale(**rest: Any) -> dict[str, Any]:
    return attention(scale=0.5, **rest)


CONVENTIONS: list[tuple[Kernel, dict[str, Any], dict[str, Any]]] = [
    (window_counts, {"window_convention": "count"}, {"options": {"window_left": 3}}),
    (true_is_masked, {"mask_polarity": "true_masked"}, {"inputs": ("mask",)}),
    (base_2, {"lse_base": "2"}, {}),
    (strided_heads, {"gqa_map": "strided"}, {"inputs": ("bias",)}),
    (plus_infinity, {"lse_empty": "+inf"}, {"inputs": ("mask",), "values": "empty_rows"}),
    (nan_rows, {"empty_rows": "nan"}, {"inputs": ("mask",), "values": "empty_rows"}),
    (mean_rows, {"empty_rows": "mean"}, {"inputs": ("mask",), "values": "empty_rows"}),
    (top_left, {"causal_alignment": "top_left"}, {"options": {"causal": True}}),
    (own_scale, {"scale": 0.5}, {}),
]


@pytest.mark.parametrize(
    ("kernel", "declares", "setting"), CONVENTIONS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_convention_passes_when_declared_and_only_then(
    spec: Mechanism, kernel: Kernel, declares: dict[str, Any], setting: dict[str, Any]
) -> None:
    case = make(spec, "options", sizes=shapes.BASE, **setting)
    assert passes(spec, case, kernel, declares)
    assert not passes(spec, case, kernel, {})
    assert not passes(spec, case, attention, declares), "declaring must not be free"


def test_undefined_rows_accept_anything_but_only_there(spec: Mechanism) -> None:
    case = make(spec, "options", sizes=shapes.BASE, inputs=("mask",), values="empty_rows")
    for kernel in (nan_rows, mean_rows, attention):
        assert passes(spec, case, kernel, {"empty_rows": "undefined"})

    def wrong_elsewhere(**rest: Any) -> dict[str, Any]:
        return attention(fault="last_row_zero", **rest)

    assert not passes(spec, case, wrong_elsewhere, {"empty_rows": "undefined"})


def test_conversions_leave_the_original_alone(spec: Mechanism) -> None:
    case = make(spec, "options", sizes=shapes.BASE, inputs=("mask",), options={"window_left": 3})
    data = build(case)
    mask = data.inputs["mask"].copy()
    declares = {"mask_polarity": "true_masked", "window_convention": "count", "gqa_map": "strided"}
    given = semantics.to_candidate(spec, data, declares)
    assert np.array_equal(data.inputs["mask"], mask) and data.options["window_left"] == 3
    assert given.options["window_left"] == 4 and not np.array_equal(given.inputs["mask"], mask)


def test_without_declarations_nothing_is_converted(spec: Mechanism) -> None:
    data = build(make(spec, "options", sizes=shapes.BASE, inputs=("mask",), options={"window_left": 3}))
    given = semantics.to_candidate(spec, data, {})
    assert given.options == data.options and all(given.inputs[name] is data.inputs[name] for name in data.inputs)


def test_strided_gradients_come_back_in_the_specs_order(spec: Mechanism) -> None:
    case = make(spec, "gradients", sizes=shapes.BASE, direction="backward")
    declares = {"gqa_map": "strided"}
    data = build(case, declares)
    given = semantics.to_candidate(spec, data, declares)
    # A strided kernel in float64: the spec on keys that are laid out for it, with the heads in the candidate's order.
    order = [
        int(np.flatnonzero((data.inputs["Q"] == given.inputs["Q"][:, h : h + 1]).all(axis=(0, 2, 3)))[0])
        for h in range(4)
    ]
    assert order == [0, 2, 1, 3]
    want = expected(case, data, declares)
    returned = {**want.exact, "Q": want.exact["Q"][:, order]}
    assert all(entry.passed for entry in judge(case, want, returned))
    assert not all(entry.passed for entry in judge(case, want, want.exact))


def test_a_base_2_lse_has_a_gradient_in_its_own_units(spec: Mechanism) -> None:
    case = make(spec, "gradients_all", sizes=shapes.TINY, direction="backward", dtype="fp64")
    data = build(case, {"lse_base": "2"})
    found = expected(case, data, {"lse_base": "2"}).exact["Q"]
    natural = CaseData(data.inputs, data.options, {**data.cotangents, "LSE": data.cotangents["LSE"] / np.log(2.0)})
    assert np.allclose(found, expected(case, natural).exact["Q"])


@pytest.mark.parametrize(
    ("declares", "message"),
    [
        ({"empty_rows": "seven"}, "legal values: zero, nan, mean, undefined"),
        ({"empty_row": "zero"}, "did you mean 'empty_rows'?"),
        ({"causal_alignment": "middle"}, "expected bottom_right, top_left"),
        ({"causal": 1}, "expected a value of type bool"),
        ({"colour": "red"}, "which is no named semantic and no option"),
    ],
)
def test_a_wrong_declaration_is_one_clear_line(spec: Mechanism, declares: dict[str, Any], message: str) -> None:
    with pytest.raises(semantics.DeclarationError) as caught:
        semantics.check(spec, declares)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_are_the_specs_own(spec: Mechanism) -> None:
    found = semantics.check(spec, {})
    assert found["empty_rows"] == "zero" and found["lse_base"] == "e" and found["gqa_map"] == "blocked"
    assert semantics.differences(found) == {}
    assert semantics.differences({**found, "lse_base": "2", "causal_alignment": "top_left"}) == {
        "lse_base": "2", "causal_alignment": "top_left",
    }  # fmt: skip


def test_every_semantic_explains_itself_and_has_several_values() -> None:
    for name, entry in semantics.TABLE.items():
        assert entry.name == name and len(entry.values) >= 2 and len(entry.doc) > 30


def test_the_documentation_lists_every_semantic_with_its_values() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "verdict.md").read_text(encoding="utf-8")
    for name, entry in semantics.TABLE.items():
        line = next(row for row in text.splitlines() if row.startswith(f"| `{name}` |"))
        assert all(f"`{value}`" in line for value in entry.values)
