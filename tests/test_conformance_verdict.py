"""The verdict: honest kernels pass, wrong ones do not, and nothing slips through unjudged."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from attnspec.conformance import shapes
from attnspec.conformance.case_id import make
from attnspec.conformance.cases import cases_for
from attnspec.conformance.data import build
from attnspec.conformance.oracle import Expected, expected
from attnspec.conformance.types import Case, Observation, OutputEvidence
from attnspec.conformance.verdict import judge, judge_array, judge_observation
from attnspec.spec import load
from attnspec.spec.language.formats import round_to
from attnspec.spec.mechanism import Mechanism
from attnspec.tests.conformance_kernels import FAULTS, TAKES, outputs

SHAPE = (2, 3, 40, 16)


@pytest.fixture(scope="module")
def spec() -> Mechanism:
    return load("softmax_attention")


def evidence(case: Case, fault: str = "", tile: int = 16) -> list[OutputEvidence]:
    data = build(case)
    repeats = [outputs(case, call, fault, tile) for call in data.extra["calls"]]
    found = outputs(case, data, fault, tile)
    if case.check == "determinism":
        repeats = [found]
    return judge(case, expected(case, data), found, repeats=repeats)


def posed(spec: Mechanism, dtype: str, seed: int) -> list[Case]:
    chosen = cases_for(spec, "standard", [dtype], "forward", seed, TAKES)
    small = [case for case in chosen if case.sizes["B"] <= 8 and case.sizes["N"] * case.sizes["M"] <= 10_000]
    return [case for case in small if case.check != "refusal" and case.group != "long"]


@pytest.mark.parametrize(("dtype", "seed", "tile"), [("fp32", 0, 16), ("bf16", 1, 64), ("fp16", 2, 128)])
def test_an_honest_kernel_passes_standard_cases(spec: Mechanism, dtype: str, seed: int, tile: int) -> None:
    # The seed picks a third of the cases: the three dtypes together see all of them.
    for case in posed(spec, dtype, seed)[seed::3]:
        wrong = [entry for entry in evidence(case, tile=tile) if not entry.passed]
        assert not wrong, case.id


SUBTLE = ("scale_1_percent", "heads_strided", "drops_last_key", "one_element_zero", "causal_leak", "lse_base_2")


@pytest.mark.parametrize(
    ("fault", "dtype"), [*((fault, "fp32") for fault in FAULTS), *((fault, "bf16") for fault in SUBTLE)]
)
def test_every_fault_is_rejected_in_several_groups(spec: Mechanism, fault: str, dtype: str) -> None:
    seen: set[str] = set()
    cases = posed(spec, dtype, 0)
    for case in cases:
        if case.group not in seen and any(not entry.passed for entry in evidence(case, fault)):
            seen.add(case.group)
        if len(seen) >= 2:
            return
    assert fault in ("no_maximum", "softcap_after_mask", "nan_for_empty", "scaled_bias", "bias_of_head_0") and seen


def plain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    want = rng.standard_normal(SHAPE)
    sigma = np.full(SHAPE, 1e-3)
    return want + sigma * rng.standard_normal(SHAPE), want, sigma


def verdict(got: Any, want: Any, sigma: Any, **more: Any) -> OutputEvidence:
    return judge_array("O", got, want, sigma, dtype="fp32", **more)


def test_noise_of_the_expected_size_passes_with_its_figures() -> None:
    entry = verdict(*plain())
    assert entry.passed and entry.elements == np.prod(SHAPE)
    assert entry.rms_z == pytest.approx(1.0, abs=0.05) and 3 < entry.max_z < 5
    assert entry.rms_limit > 1.5 and entry.max_limit > 15


def test_one_wrong_element_is_seen() -> None:
    got, want, sigma = plain()
    got[1, 2, 39, 15] += 0.1
    entry = verdict(got, want, sigma)
    assert not entry.passed and entry.worst_index == (1, 2, 39, 15) and "largest |z|" in entry.message
    assert entry.worst_got == got[1, 2, 39, 15] and entry.worst_want == want[1, 2, 39, 15]


@pytest.mark.parametrize(("axis", "index"), [(0, 1), (1, 2), (2, 17), (3, 5)])
def test_one_slightly_wrong_slice_is_seen(axis: int, index: int) -> None:
    got, want, sigma = plain()
    place: list[Any] = [slice(None)] * 4
    place[axis] = index
    rows = got[tuple(place)].size / (SHAPE[-1] if axis < 3 else 1)
    got[tuple(place)] += sigma[tuple(place)] * (4.0 if rows > 50 else 8.0) * np.sign(want[tuple(place)])
    entry = verdict(got, want, sigma)
    assert not entry.passed and ("slice" in entry.message or "RMS" in entry.message)


def test_a_slice_is_seen_that_the_whole_would_hide() -> None:
    rng = np.random.default_rng(0)
    want, sigma = rng.standard_normal((1, 2, 2000, 16)), np.full((1, 2, 2000, 16), 1e-3)
    got = want + sigma * rng.standard_normal(want.shape)
    got[:, :, 1234] += 12 * sigma[:, :, 1234]
    entry = verdict(got, want, sigma)
    assert entry.rms_z < entry.rms_limit and entry.max_z < entry.max_limit
    assert not entry.passed and "slice 1234 of axis 2" in entry.message


def test_nothing_is_broadcast() -> None:
    got, want, sigma = plain()
    for wrong in (got[:1], got[..., :1], got[0], got.reshape(6, 40, 16), got[..., None]):
        entry = verdict(wrong, want, sigma)
        assert not entry.passed and "has shape" in entry.message


def test_a_nan_never_counts_as_a_match() -> None:
    got, want, sigma = plain()
    for value in (np.nan, np.inf, -np.inf):
        bad = got.copy()
        bad[0, 0, 3, 4] = value
        entry = verdict(bad, want, sigma)
        assert not entry.passed and entry.worst_index == (0, 0, 3, 4) and entry.max_z == np.inf
    everything = verdict(np.full(SHAPE, np.nan), want, sigma)
    assert not everything.passed


def test_special_values_must_match_exactly() -> None:
    want = np.array([0.5, -np.inf, np.nan, np.inf])
    sigma = np.array([1e-3, 0.0, 0.0, 0.0])
    assert verdict(want.copy(), want, sigma).passed
    for place, value in ((1, np.inf), (1, -1e30), (1, np.nan), (2, 0.0), (3, 1e38), (0, -np.inf)):
        bad = want.copy()
        bad[place] = value
        assert not verdict(bad, want, sigma).passed, (place, value)


def test_an_exact_zero_without_noise_must_be_zero_up_to_vanishing_weights() -> None:
    want, sigma = np.zeros(SHAPE), np.zeros(SHAPE)
    assert verdict(np.zeros(SHAPE), want, sigma).passed
    assert verdict(np.full(SHAPE, 1e-38), want, sigma).passed
    assert not verdict(np.full(SHAPE, 1e-30), want, sigma).passed


def test_flushed_denormals_are_honest_and_lost_normal_numbers_are_not() -> None:
    want, sigma = np.full(SHAPE, 2.0**-130), np.full(SHAPE, 2.0**-160)
    assert verdict(np.zeros(SHAPE), want, sigma).passed
    assert not verdict(np.zeros(SHAPE), want * 2.0**20, sigma).passed


def test_overflow_counts_only_at_the_edge_of_the_format() -> None:
    want, sigma = np.full((2, 4), 66000.0), np.full((2, 4), 30.0)
    assert judge_array("O", np.full((2, 4), np.inf), want, sigma, dtype="fp16").passed
    assert not judge_array("O", np.full((2, 4), -np.inf), want, sigma, dtype="fp16").passed
    assert not judge_array("O", np.full((2, 4), np.inf), want / 2, sigma, dtype="fp16").passed


def test_what_is_not_judged_does_not_count_and_is_counted() -> None:
    got, want, sigma = plain()
    judged = np.ones(SHAPE, dtype=bool)
    judged[0, 0, 0] = False
    got[0, 0, 0] = np.nan
    entry = verdict(got, want, sigma, judged=judged)
    assert entry.passed and entry.elements == np.prod(SHAPE) - SHAPE[-1]
    got[0, 0, 1, 0] = 9.0
    assert not verdict(got, want, sigma, judged=judged).passed


def test_sampled_rows_are_cut_out_of_the_result() -> None:
    got, want, sigma = plain()
    rows = (0, 7, 39)
    some = verdict(got, want[:, :, rows], sigma[:, :, rows], rows=rows, row_axis=2)
    assert some.passed and some.elements == 2 * 3 * 3 * 16
    short = verdict(got[:, :, :20], want[:, :, rows], sigma[:, :, rows], rows=rows, row_axis=2)
    assert not short.passed and "row 39" in short.message


def test_a_statistic_in_the_narrow_dtype_gets_its_rounding_and_no_more() -> None:
    rng = np.random.default_rng(3)
    want, sigma = 3 + rng.random((2, 4, 50)), np.full((2, 4, 50), 1e-6)
    coarse = round_to(want, "bf16")
    as_bf16: dict[str, Any] = {"dtype": "bf16", "first": False}
    assert judge_array("LSE", coarse, want, sigma, returned="bf16", **as_bf16).passed
    assert judge_array("LSE", coarse, want, sigma, **as_bf16).passed  # seen from the values
    assert not judge_array("LSE", coarse, want, sigma, returned="fp32", **as_bf16).passed
    assert not judge_array("LSE", coarse, want, sigma, dtype="bf16", first=True).passed
    assert not judge_array("LSE", round_to(want * 1.01, "bf16"), want, sigma, returned="bf16", **as_bf16).passed


def test_arrays_of_other_kinds_are_refused() -> None:
    _, want, sigma = plain()
    assert "expected real numbers" in verdict(want > 0, want, sigma).message
    assert not verdict(want + 0j, want, sigma).passed


def test_an_empty_output_of_the_right_shape_passes() -> None:
    empty = np.zeros((1, 2, 0, 8))
    assert verdict(empty, empty, empty).passed
    assert not verdict(np.zeros((1, 2, 0, 7)), empty, empty).passed


def test_a_missing_result_fails(spec: Mechanism) -> None:
    case = make(spec, "shapes", sizes=shapes.TINY)
    want = expected(case, build(case))
    (entry,) = judge(case, want, {})
    assert not entry.passed and "not among the results" in entry.message
    backward = make(spec, "gradients", sizes=shapes.TINY, direction="backward")
    (entry,) = judge(backward, expected(backward, build(backward)), {})
    assert not entry.passed and entry.name == "dQ"


def test_outputs_that_are_not_returned_are_left_out_but_the_first(spec: Mechanism) -> None:
    case = make(spec, "shapes", sizes=shapes.TINY)
    data = build(case)
    found = outputs(case, data)
    assert [entry.name for entry in judge(case, expected(case, data), {"O": found["O"]})] == ["O"]
    assert [entry.name for entry in judge(case, expected(case, data), found)] == ["O", "LSE"]


def test_gradients_are_judged_by_input(spec: Mechanism) -> None:
    case = make(spec, "gradients", sizes=shapes.BASE, direction="backward", dtype="bf16", inputs=("bias",))
    want = expected(case, build(case))
    right = {name: round_to(value, "bf16") for name, value in want.exact.items()}
    assert {entry.name for entry in judge(case, want, right)} == {"dQ", "dK", "dV", "dbias"}
    assert all(entry.passed for entry in judge(case, want, right))
    for name in right:
        scaled = judge(case, want, {**right, name: round_to(1.05 * want.exact[name], "bf16")})
        assert [entry.name for entry in scaled if not entry.passed] == [f"d{name}"]


def test_repeats_must_have_the_same_bits_unless_declared(spec: Mechanism) -> None:
    case = make(spec, "calls", sizes=shapes.BASE, check="determinism")
    data = build(case)
    found = outputs(case, data)
    other = {name: np.nextafter(value, 9.0) for name, value in found.items()}
    want = expected(case, data)
    assert all(entry.passed for entry in judge(case, want, found, repeats=[found]))
    told = judge(case, want, found, repeats=[other])
    assert not any(entry.passed for entry in told) and "other bits" in told[0].message
    assert "not repeated" in judge(case, want, found)[0].message
    loose = expected(case, data, {"determinism": "none"})
    assert all(entry.passed for entry in judge(case, loose, found, repeats=[other]))


def test_further_calls_are_judged_and_must_be_made(spec: Mechanism) -> None:
    case = make(spec, "calls", sizes=shapes.BASE, check="sequence", options={"causal": True})
    data = build(case)
    found = outputs(case, data)
    stale = [found for _ in data.extra["calls"]]  # a kernel that is cached by shape alone
    names = [entry.name for entry in judge(case, expected(case, data), found, repeats=stale) if not entry.passed]
    assert names == ["O (call 2)", "LSE (call 2)"]
    assert any("were not made" in entry.message for entry in judge(case, expected(case, data), found))


def test_a_leak_from_unseen_keys_is_seen_bit_by_bit(spec: Mechanism) -> None:
    case = make(spec, "calls", sizes=shapes.BASE, check="perturb", options={"causal": True})
    assert all(entry.passed for entry in evidence(case))
    data = build(case)
    found, again = outputs(case, data), outputs(case, data.extra["calls"][0])
    again["O"] = np.where(data.extra["same"]["O"], np.nextafter(again["O"], 9.0), again["O"])
    wrong = [entry for entry in judge(case, expected(case, data), found, repeats=[again]) if not entry.passed]
    assert [entry.name for entry in wrong] == ["O (unseen keys changed)"]
    loose = expected(case, data, {"unseen_keys": "rounding"})
    assert all(entry.passed for entry in judge(case, loose, found, repeats=[again]))


def test_an_observation_is_judged_by_its_direction(spec: Mechanism) -> None:
    case = make(spec, "shapes", sizes=shapes.TINY, dtype="bf16")
    data = build(case)
    found = outputs(case, data)
    seen = Observation("returned", outputs=found, receipt={"dtypes": {"O": "bf16", "LSE": "fp32"}})
    assert all(entry.passed for entry in judge_observation(case, expected(case, data), seen))
    coarse = dataclasses.replace(seen, outputs={**found, "LSE": round_to(found["LSE"], "bf16")})
    assert not all(entry.passed for entry in judge_observation(case, expected(case, data), coarse))


def test_a_chance_is_stated_with_every_limit() -> None:
    want: Expected = Expected({}, {})
    assert want.rounding == {} and verdict(*plain()).rms_limit > 0
