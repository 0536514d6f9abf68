"""A diagnosis names the place and the cause of an error that was put there on purpose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from attnspec.conformance import causes, readout
from attnspec.conformance.causes import Observed
from attnspec.conformance.diagnose import diagnose, region_of
from attnspec.conformance.outcome import headline
from attnspec.conformance.regions import KINDS, constant_factor, locate, locate_weights, wrong
from attnspec.conformance.types import Case, CaseData
from attnspec.spec import Mechanism, load
from attnspec.tests import fakes

AXES = ("b", "h", "i", "e")


@pytest.fixture(scope="module")
def mechanism() -> Mechanism:
    return load("softmax_attention")


def data(**changes: Any) -> CaseData:
    """Two heads over one key head, five queries, seven keys."""
    rng = np.random.default_rng(1)
    inputs = {
        "Q": rng.standard_normal((2, 2, 5, 4)),
        "K": rng.standard_normal((2, 1, 7, 4)),
        "V": rng.standard_normal((2, 1, 7, 3)),
    }
    inputs.update(changes.pop("inputs", {}))
    options = {"causal": True}
    options.update(changes)
    return CaseData(inputs, options)


def case(made: CaseData, **changes: Any) -> Case:
    return fakes.case(options=dict(made.options), inputs=tuple(set(made.inputs) - {"Q"}), **changes)


def observed(mechanism: Mechanism, made: CaseData, got: Mapping[str, Any]) -> Observed:
    """What came beside what the equations say, at float32 noise."""
    want = mechanism.evaluate(made.inputs, made.options, outputs=list(got))
    sigma = {name: 1e-7 * (1 + np.abs(np.nan_to_num(value, neginf=0.0))) for name, value in want.items()}
    return Observed({name: np.asarray(value) for name, value in got.items()}, want, sigma, 8.0)


def spoiled(mechanism: Mechanism, made: CaseData, definition: str, text: str) -> dict[str, Any]:
    """Outputs of the equations with one definition replaced: a wrong kernel."""
    from attnspec.spec.language import read

    lines = [
        f"{line.split(' = ')[0]} = {text}" if line.startswith(f"{definition}[") else line
        for line in mechanism.program.text.splitlines()
    ]
    program = read("\n".join(lines), mechanism.declarations)
    changed = dataclasses.replace(mechanism, program=program)
    return changed.evaluate(made.inputs, made.options)


# -- regions of outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "kind", "words"),
    [
        ((slice(None), 1), "head", "the last head (h = 1 of 2)"),
        ((1,), "batch", "the last batch element (b = 1 of 2)"),
        ((slice(None), slice(None), 69), "row", "the last row (i = 69 of 70)"),
        ((slice(None), slice(None), slice(64, 70)), "block", "the last block of rows (i = 64..69 of 70, tile 64"),
        ((slice(None), slice(None), slice(3, 9)), "row", "rows 3..8 of 70"),
        ((slice(None), slice(None), slice(0, 70, 4)), "row", "every 4th of the rows from 0 on"),
        ((..., slice(8, 12)), "column", "columns 8..11 of 12"),
        ((), "everything", "everywhere"),
    ],
)
def test_the_wrong_axis_is_named(place: Any, kind: str, words: str) -> None:
    bad = np.zeros((2, 2, 70, 12), bool)
    bad[place] = True
    region = locate(bad, AXES)
    assert region is not None and region.kind == kind
    assert words in region.sentence
    assert region.kind in KINDS


def test_nothing_wrong_has_no_region() -> None:
    assert locate(np.zeros((2, 2, 3, 4), bool), AXES) is None


def test_a_head_comes_before_the_rows_inside_it() -> None:
    bad = np.zeros((2, 4, 70, 12), bool)
    bad[:, 2, 64:] = True
    region = locate(bad, AXES)
    assert region is not None and region.kind == "head" and "block of rows" in region.sentence


def test_rows_that_see_nothing_are_told_from_other_rows() -> None:
    bad, empty = np.zeros((1, 1, 8, 2), bool), np.zeros((1, 1, 8, 1), bool)
    bad[:, :, :3] = True
    empty[:, :, :3] = True
    region = locate(bad, AXES, empty=empty)
    assert region is not None and region.kind == "row" and "attend to nothing" in region.sentence
    empty[:, :, 2] = False
    region = locate(bad, AXES, empty=empty)
    assert region is not None and "attend to nothing" not in region.sentence


def test_nan_and_infinity_are_wrong_where_they_are_not_wanted() -> None:
    got = np.array([np.nan, np.nan, np.inf, -np.inf, 1.0, 1.0])
    want = np.array([np.nan, 0.0, np.inf, np.inf, np.nan, 1.0])
    assert wrong(got, want, np.ones(6), 8.0).tolist() == [False, True, False, True, True, False]


def test_a_constant_factor_is_found_only_where_there_is_one() -> None:
    want = np.random.default_rng(0).standard_normal(50)
    sigma = np.full(50, 1e-7)
    assert constant_factor(0.5 * want, want, sigma, 8.0) == pytest.approx(0.5)
    assert constant_factor(want, want, sigma, 8.0) is None
    assert constant_factor(want + 0.1, want, sigma, 8.0) is None


# -- regions of weights -----------------------------------------------------------------------------------------------


def weights(rows: int = 12, keys: int = 20, *, causal: int | None = None) -> Any:
    """Attention weights of one head; `causal` is the offset of the last visible key."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 1, rows, keys))
    if causal is not None:
        hidden = np.arange(keys)[None] > np.arange(rows)[:, None] + causal
        logits[..., hidden] = -np.inf
    with np.errstate(invalid="ignore"):
        top = np.where(np.isneginf(logits.max(-1, keepdims=True)), 0.0, logits.max(-1, keepdims=True))
    raw = np.exp(logits - top)
    return raw / np.maximum(raw.sum(-1, keepdims=True), 1e-300)


def renormalised(raw: Any) -> Any:
    return raw / np.maximum(raw.sum(-1, keepdims=True), 1e-300)


def test_one_key_beyond_the_causal_edge_is_a_diagonal() -> None:
    region = locate_weights(weights(causal=9), weights(causal=8), 1e-5)
    assert region is not None and region.kind == "diagonal"
    assert "must not be seen are seen on the diagonal j = i + 9" in region.sentence


def test_the_other_alignment_is_a_band_of_diagonals() -> None:
    region = locate_weights(weights(causal=0), weights(causal=8), 1e-5)
    assert region is not None and region.kind == "diagonal"
    assert "must be seen are not in the band of diagonals j - i = 1..8" in region.sentence


def test_a_dropped_last_tile_is_a_block_of_keys() -> None:
    want = weights()
    got = want.copy()
    got[..., 16:] = 0
    region = locate_weights(renormalised(got), want, 1e-5)
    assert region is not None and region.kind == "block"
    assert "the last block of keys (j = 16..19 of 20, tile 16" in region.sentence


def test_a_single_dropped_key_is_named() -> None:
    want = weights()
    got = want.copy()
    got[..., 7] = 0
    region = locate_weights(renormalised(got), want, 1e-5)
    assert region is not None and region.kind == "block" and "key 7 of 20" in region.sentence


def test_rows_that_are_not_normalised_are_no_keys() -> None:
    want = weights()
    got = want.copy()
    got[:, :, 4] *= 1.5
    region = locate_weights(got, want, 1e-5)
    assert region is not None and region.kind == "row" and "scaled by 1.5" in region.sentence


def test_a_wrong_scale_is_everywhere() -> None:
    want = weights()
    region = locate_weights(renormalised(want**1.1), want, 1e-5)
    assert region is not None and region.kind == "everything"


def test_right_weights_have_no_region() -> None:
    want = weights(causal=8)
    noise = 1 + 1e-6 * np.random.default_rng(0).standard_normal(want.shape)
    assert locate_weights(want * noise, want, 1e-5) is None


def test_weights_of_empty_rows_are_told_apart() -> None:
    want = weights(causal=-3)
    got = want.copy()
    got[:, :, :2] = 1 / 20
    region = locate_weights(got, want, 1e-5)
    assert region is not None and region.kind == "row" and "attend to nothing" in region.sentence


# -- reading the weights ----------------------------------------------------------------------------------------------


def test_the_weights_of_a_kernel_are_read_through_its_output(mechanism: Mechanism) -> None:
    made = data()

    def call(asked: CaseData) -> Mapping[str, Any]:
        return spoiled(mechanism, asked, "past", "local_k[j] < pos[i] if causal else True")

    read = readout.weights(mechanism, made, call)
    assert read is not None
    got, want = read
    assert got.shape == want.shape == (2, 2, 5, 7)
    np.testing.assert_allclose(want.sum(-1), 1)
    region = locate_weights(got, want, 1e-6)
    assert region is not None and region.kind == "diagonal" and "j = i + 2" in region.sentence


def test_a_candidate_that_does_not_answer_has_no_weights(mechanism: Mechanism) -> None:
    assert readout.weights(mechanism, data(), lambda asked: {}) is None


# -- causes and whole diagnoses ---------------------------------------------------------------------------------------


def told(mechanism: Mechanism, made: CaseData, got: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return diagnose(mechanism, case(made, **changes), made, observed(mechanism, made, got), budget_seconds=60.0)


def test_a_flipped_comparison_is_recognised_as_the_mutant(mechanism: Mechanism) -> None:
    made = data()
    got = spoiled(mechanism, made, "past", "local_k[j] < pos[i] if causal else True")
    found = told(mechanism, made, {"O": got["O"]})
    assert "<" in found["cause"]["sentence"] and "equals the spec with" in found["cause"]["sentence"]


def test_the_other_alignment_is_recognised_and_can_be_declared(mechanism: Mechanism) -> None:
    made = data()
    got = mechanism.evaluate(made.inputs, {"causal": True, "causal_alignment": "top_left"})
    found = told(mechanism, made, {"O": got["O"]})
    assert "causal_alignment = top_left" in found["cause"]["sentence"] and "declare" in found["cause"]["sentence"]


def test_an_ignored_option_is_recognised(mechanism: Mechanism) -> None:
    made = data(window_left=2)
    got = mechanism.evaluate(made.inputs, {"causal": True})
    assert "without window_left" in told(mechanism, made, {"O": got["O"]})["cause"]["sentence"]


def test_a_window_counted_in_keys_is_recognised(mechanism: Mechanism) -> None:
    made = data(window_left=3)
    got = mechanism.evaluate(made.inputs, {"causal": True, "window_left": 2})
    assert "window_left = 2 where window_left = 3" in told(mechanism, made, {"O": got["O"]})["cause"]["sentence"]


def test_an_inverted_mask_is_recognised(mechanism: Mechanism) -> None:
    mask = np.random.default_rng(3).random((2, 2, 5, 7)) < 0.5
    made = data(inputs={"mask": mask})
    got = mechanism.evaluate({**made.inputs, "mask": ~mask}, made.options)
    assert "mask inverted" in told(mechanism, made, {"O": got["O"]})["cause"]["sentence"]


def test_a_base_two_log_sum_exp_is_recognised(mechanism: Mechanism) -> None:
    made = data()
    got = mechanism.evaluate(made.inputs, made.options)
    found = told(mechanism, made, {"O": got["O"], "LSE": got["LSE"] / math.log(2)})
    assert found["region"]["kind"] == "lse" and "base 2" in found["region"]["sentence"]
    assert "base 2" in found["cause"]["sentence"]


def test_a_shifted_log_sum_exp_is_told_with_its_constant(mechanism: Mechanism) -> None:
    made = data()
    got = mechanism.evaluate(made.inputs, made.options)
    found = told(mechanism, made, {"O": got["O"], "LSE": got["LSE"] + 0.25})
    assert "by the constant +0.25" in found["region"]["sentence"]


def test_returning_an_input_is_recognised(mechanism: Mechanism) -> None:
    made = data()
    made.inputs["V"] = made.inputs["V"][..., [0, 1, 2, 0]]
    found = told(mechanism, made, {"O": made.inputs["Q"]})
    assert found["cause"]["sentence"].startswith("equals the input Q")


def test_right_numbers_have_no_cause(mechanism: Mechanism) -> None:
    made = data()
    got = mechanism.evaluate(made.inputs, made.options)
    assert causes.guess(mechanism, case(made), made, observed(mechanism, made, got)) is None


def test_random_numbers_have_no_cause(mechanism: Mechanism) -> None:
    made = data()
    got = np.random.default_rng(5).standard_normal((2, 2, 5, 3))
    found = told(mechanism, made, {"O": got})
    assert "cause" not in found and found["region"]["kind"] == "everything"


def test_wrong_gradients_beside_right_ones_are_told_by_name(mechanism: Mechanism) -> None:
    made = data()
    made.cotangents = {"O": np.random.default_rng(2).standard_normal((2, 2, 5, 3))}
    exact = mechanism.gradients(made.inputs, made.options, made.cotangents)
    want = {f"d{name}": value for name, value in exact.items()}
    got = {**want, "dQ": 2 * want["dQ"]}
    sigma = {name: 1e-7 * (1 + np.abs(value)) for name, value in want.items()}
    region = region_of(mechanism, case(made, direction="backward"), Observed(got, want, sigma, 8.0), made)
    assert region is not None and region.kind == "gradient"
    assert "gradients dQ; dK, dV right" in region.sentence and "2 times" in region.sentence


def test_the_headline_prefers_a_structure_over_everywhere() -> None:
    def made(kind: str) -> Any:
        return fakes.result(kind, "fail", diagnosis={"region": {"kind": kind, "sentence": kind}, "sentence": kind})

    assert headline([fakes.result()]) is None
    results = [made("everything"), made("row"), made("diagonal"), made("diagonal")]
    found = headline(results)
    assert found is not None and found["region"]["kind"] == "diagonal"
