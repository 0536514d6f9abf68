"""Values: representable, reproducible, and each recipe makes what it says."""

from __future__ import annotations

import numpy as np
import pytest

from attnspec.conformance import shapes, values
from attnspec.conformance.case_id import make
from attnspec.conformance.data import HIDDEN, KEY_SENTINEL, build, empty_rows, visible
from attnspec.conformance.recipes import RECIPES
from attnspec.conformance.types import CaseData
from attnspec.spec import load
from attnspec.spec.language.formats import round_to
from attnspec.spec.mechanism import Mechanism

PAGES = ("k_pages", "v_pages", "block_table", "kv_length")


@pytest.fixture(scope="module")
def spec() -> Mechanism:
    return load("softmax_attention")


def data(spec: Mechanism, recipe: str = "normal", *, dtype: str = "fp32", declares: dict[str, str] | None = None,
         seed: int = 0, sizes: dict[str, int] = shapes.BASE, inputs: tuple[str, ...] = (), check: str = "tolerance",
         **options: object) -> CaseData:  # fmt: skip
    case = make(spec, "values", sizes=sizes, values=recipe, dtype=dtype, seed=seed, inputs=inputs, options=options,
                check=check)  # fmt: skip
    return build(case, declares)


def logits(spec: Mechanism, given: CaseData) -> np.ndarray:
    return np.asarray(spec.evaluate(given.inputs, given.options, outputs=["S2"])["S2"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_is_representable_in_the_dtype(spec: Mechanism, recipe: str, dtype: str) -> None:
    given = data(spec, recipe, dtype=dtype, inputs=("bias", "mask", "sink"))
    for name, array in given.inputs.items():
        if array.dtype.kind == "f":
            assert np.array_equal(round_to(array, dtype), array), name
            assert not np.isnan(array).any() and not np.isposinf(array).any(), name


def test_the_same_seed_gives_the_same_values_and_another_seed_others(spec: Mechanism) -> None:
    one, two, other = (data(spec, seed=seed) for seed in (4, 4, 5))
    assert all(np.array_equal(one.inputs[name], two.inputs[name]) for name in one.inputs)
    assert not np.array_equal(one.inputs["Q"], other.inputs["Q"])


def test_dtypes_differ_by_rounding_alone(spec: Mechanism) -> None:
    fine, coarse = data(spec, dtype="fp64"), data(spec, dtype="bf16")
    assert np.array_equal(round_to(fine.inputs["K"], "bf16"), coarse.inputs["K"])


def test_an_option_leaves_the_other_inputs_as_they_are(spec: Mechanism) -> None:
    assert np.array_equal(data(spec).inputs["Q"], data(spec, causal=True, inputs=("mask",)).inputs["Q"])


def test_unknown_recipes_are_named(spec: Mechanism) -> None:
    with pytest.raises(ValueError, match="unknown values 'odd'"):
        values.draw(spec, shapes.roles(spec), sizes={}, options={}, present=(), broadcast={}, values="odd",
                    dtype="fp32", seed=0)  # fmt: skip


def test_large_logits_overflow_an_exponential_without_a_maximum(spec: Mechanism) -> None:
    assert logits(spec, data(spec, "large")).max() > 89.0


def test_low_logits_lie_below_the_finite_mask_values_in_use(spec: Mechanism) -> None:
    for dtype in ("fp32", "fp16", "bf16"):
        assert logits(spec, data(spec, "low_logits", dtype=dtype)).max() < -1e4


@pytest.mark.parametrize(("recipe", "first_wins"), [("rising", False), ("falling", True)])
def test_a_slope_puts_the_maximum_at_its_end(spec: Mechanism, recipe: str, first_wins: bool) -> None:
    found = logits(spec, data(spec, recipe, sizes=shapes.WIDE))
    end = found[..., :50].max(axis=-1) > found[..., -50:].max(axis=-1)
    assert end.mean() > 0.99 if first_wins else end.mean() < 0.01


def test_the_last_key_dominates(spec: Mechanism) -> None:
    given = data(spec, "last_key", sizes=shapes.TILES)
    weights = spec.evaluate(given.inputs, given.options, outputs=["P"])["P"]
    assert np.median(weights[..., -1]) > 0.5


def test_needles_give_nearly_one_hot_weights(spec: Mechanism) -> None:
    given = data(spec, "needles", sizes=shapes.TILES)
    weights = spec.evaluate(given.inputs, given.options, outputs=["P"])["P"]
    assert np.median(weights.max(axis=-1)) > 0.9
    assert len(set(weights.argmax(axis=-1).ravel().tolist())) > 40


def test_constant_values_come_out_unchanged(spec: Mechanism) -> None:
    given = data(spec, "constant_v")
    out = spec.evaluate(given.inputs, given.options)["O"]
    assert np.allclose(out, np.repeat(given.inputs["V"][:, :, :1], 2, axis=1), atol=1e-12)


def test_empty_rows_are_empty_and_the_others_are_not(spec: Mechanism) -> None:
    for name in ("mask", "bias"):
        given = data(spec, "empty_rows", inputs=(name,))
        empty = empty_rows(spec, given, given.options)
        assert empty[:, :, 1::3].all() and not empty[:, :, 0::3].any()


def test_a_plain_mask_leaves_no_row_empty(spec: Mechanism) -> None:
    given = data(spec, inputs=("mask",))
    assert not empty_rows(spec, given, {}).any()
    share = given.inputs["mask"].mean()
    assert 0.6 < share < 0.8


def test_lengths_stay_in_their_domain_and_differ(spec: Mechanism) -> None:
    given = data(spec, sizes={**shapes.BASE, "batch": 5}, inputs=("kv_length", "q_length"))
    for name, most in (("kv_length", 23), ("q_length", 19)):
        array = given.inputs[name]
        assert array.min() >= 0 and array.max() <= most and len(set(array.tolist())) >= 4
        assert most in array and 0 in array


def test_segments_are_consecutive_with_padding_at_the_end(spec: Mechanism) -> None:
    given = data(spec, inputs=("q_segment", "kv_segment"))
    for row in (*given.inputs["q_segment"], *given.inputs["kv_segment"]):
        real = row[row >= 0]
        assert (np.diff(real) >= 0).all() and (row[len(real) :] == -1).all()


def test_pages_are_shuffled_and_absent_entries_are_minus_one(spec: Mechanism) -> None:
    given = data(spec, inputs=PAGES)
    table, lengths = given.inputs["block_table"], given.inputs["kv_length"]
    slots = given.inputs["k_pages"].shape[1]
    for row, length in zip(table, lengths, strict=True):
        used = -(-int(length) // slots)
        assert (row[used:] == -1).all() and (row[:used] >= 0).all()
    real = table[table >= 0]
    assert len(set(real.tolist())) == real.size and not np.array_equal(real, np.sort(real))


def test_hidden_values_stand_where_nobody_looks(spec: Mechanism) -> None:
    given = data(spec, "unseen_nan", inputs=("kv_length",))
    keep = visible(spec, given, {}).any(axis=(1, 2))
    hidden = np.isnan(given.inputs["V"]).any(axis=(1, 3))
    assert hidden.any() and not (hidden & keep).any()
    out = spec.evaluate(given.inputs, {})
    assert np.isfinite(out["O"]).all()


def test_hidden_pages_are_poisoned_but_for_the_slots_in_use(spec: Mechanism) -> None:
    given = data(spec, "unseen_nan", inputs=PAGES)
    poisoned = np.isnan(given.inputs["k_pages"]).all(axis=(2, 3))
    assert (~poisoned).sum() == given.inputs["kv_length"].sum()


def test_where_zero_weights_are_multiplied_hidden_values_are_finite(spec: Mechanism) -> None:
    assert np.isnan(data(spec, "future_nan", causal=True).inputs["V"]).any()
    declared = data(spec, "future_nan", causal=True, declares={"unseen_values": "multiplied"})
    assert np.isfinite(declared.inputs["V"]).all() and declared.inputs["V"].max() == values.HUGE["fp32"]
    assert declared.inputs["K"].max() == KEY_SENTINEL
    assert set(HIDDEN) >= {"future_nan", "unseen_nan", "neighbour_nan"}


def test_rows_without_a_defined_gradient_get_no_cotangent(spec: Mechanism) -> None:
    case = make(spec, "gradients", sizes=shapes.BASE, inputs=("mask",), values="empty_rows", direction="backward")
    plain, declared = build(case), build(case, {"empty_rows": "nan"})
    assert plain.cotangents["O"][:, :, 1].any()
    assert not declared.cotangents["O"][:, :, 1::3].any() and declared.cotangents["O"][:, :, 0].any()


def test_further_calls_do_what_their_check_says(spec: Mechanism) -> None:
    sequence = data(spec, check="sequence", causal=True, scale=0.3)
    assert [call.options for call in sequence.extra["calls"]] == [
        {"scale": 0.3}, {"causal": True}, {"causal": True, "scale": 0.3},
    ]  # fmt: skip
    batch = data(spec, check="batch", sizes={**shapes.BASE, "batch": 3})
    alone, turned = batch.extra["calls"]
    assert np.array_equal(alone.inputs["Q"][0], batch.inputs["Q"][1])
    assert np.array_equal(turned.inputs["V"][0], batch.inputs["V"][2])
    changed = data(spec, check="perturb", causal=True)
    same = changed.extra["same"]["O"]
    assert same.any() and not same.all()
    assert not np.array_equal(changed.extra["calls"][0].inputs["V"], changed.inputs["V"])


def test_decoding_sees_the_keys_up_to_its_own(spec: Mechanism) -> None:
    given = data(spec, check="decode", sizes={**shapes.BASE, "queries": 21, "keys": 21}, causal=True)
    whole = spec.evaluate(given.inputs, given.options)["O"]
    for call, rows in zip(given.extra["calls"], ([0], [10], [20], [17, 18, 19]), strict=True):
        assert np.allclose(spec.evaluate(call.inputs, call.options)["O"], whole[:, :, rows], atol=1e-12)
    top = data(spec, check="decode", sizes={**shapes.BASE, "queries": 21, "keys": 21}, causal=True,
               causal_alignment="top_left")  # fmt: skip
    assert all("causal" not in call.options for call in top.extra["calls"])


def test_small_scope_is_complete(spec: Mechanism) -> None:
    from attnspec.conformance.exhaustive import SIZES

    masks = build(make(spec, "small", sizes=SIZES["every_mask"], inputs=("mask",), values="every_mask"))
    flat = masks.inputs["mask"].reshape(4096, 12)
    assert len({row.tobytes() for row in flat}) == 4096
    splits = build(
        make(spec, "small", sizes=SIZES["every_split"], inputs=("q_segment", "kv_segment"), values="every_split")
    ).inputs["q_segment"]
    assert len({row.tobytes() for row in splits}) == 1 + sum(2 ** (n - 1) for n in range(1, 7)) == 64
    tables = build(make(spec, "small", sizes=SIZES["every_table"], inputs=PAGES, values="every_table"))
    pairs = {
        (*row, n) for row, n in zip(tables.inputs["block_table"].tolist(), tables.inputs["kv_length"], strict=True)
    }
    assert {row[:3] for row in pairs if row[3] >= 5} == {
        (a, b, c) for a in range(3) for b in range(3) for c in range(3)
    }
    windows = build(
        make(spec, "small", sizes=SIZES["every_window"], options={"window_left": 0, "window_right": 0},
             values="every_window")
    )  # fmt: skip
    found = [windows.options, *(call.options for call in windows.extra["calls"])]
    assert len({(entry["window_left"], entry["window_right"]) for entry in found}) == 16
