"""Probes: the output names the keys that were read, at any length."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from attnspec.conformance import oracle, probes, shapes
from attnspec.conformance.case_id import make
from attnspec.conformance.data import build, visible
from attnspec.conformance.oracle import expected
from attnspec.conformance.types import Case
from attnspec.conformance.verdict import judge
from attnspec.spec import load
from attnspec.spec.mechanism import Mechanism
from attnspec.tests.conformance_kernels import outputs

PROBE = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 37, "keys": 43, "feature": 32, "value_feature": 32}
LONG = {"batch": 1, "heads": 1, "kv_heads": 1, "queries": 4099, "keys": 4101, "feature": 32, "value_feature": 32}


@pytest.fixture(scope="module")
def spec() -> Mechanism:
    return load("softmax_attention")


def probe(spec: Mechanism, values: str, *, sizes: dict[str, int] = PROBE, dtype: str = "fp32", group: str = "probes",
          inputs: tuple[str, ...] = (), **options: Any) -> Case:  # fmt: skip
    return make(
        spec, group, sizes=sizes, values=values, dtype=dtype, check=probes.CHECK, options=options, inputs=inputs
    )


def passes(case: Case, fault: str = "", tile: int = 16) -> bool:
    data = build(case)
    return all(entry.passed for entry in judge(case, expected(case, data), outputs(case, data, fault, tile)))


SETTINGS: list[dict[str, Any]] = [
    {}, {"causal": True}, {"causal": True, "causal_alignment": "top_left"}, {"window_left": 5},
    {"window_left": 3, "window_right": 2}, {"window_left": 0, "window_right": 0},
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("values", list(probes.RECIPES))
def test_an_honest_kernel_passes_every_probe(spec: Mechanism, values: str, options: dict[str, Any], dtype: str) -> None:
    case = probe(spec, values, dtype=dtype, **options)
    assert passes(case) and passes(case, tile=128)


def test_a_key_set_names_the_keys_that_a_row_read(spec: Mechanism) -> None:
    case = probe(spec, "key_set", sizes={**PROBE, "keys": 32, "queries": 20}, causal=True)
    data = build(case)
    keep = visible(spec, data, data.options)
    out = expected(case, data).exact["O"]
    assert np.allclose(out * keep.sum(axis=-1, keepdims=True), keep.astype(float))


def test_visible_is_exactly_zero_for_whoever_must_not_see(spec: Mechanism) -> None:
    case = probe(spec, "visible", causal=True)
    data = build(case)
    out = expected(case, data).exact["O"]
    assert (out == 0).any() and (out > 0).any() and out[out > 0].min() > 1.0


def test_aim_returns_the_value_of_the_key_it_aims_at(spec: Mechanism) -> None:
    for options in SETTINGS:
        case = probe(spec, "aim", **options)
        data = build(case)
        out, keep = expected(case, data).exact["O"], visible(spec, data, data.options)
        value = data.inputs["V"][0, 0]
        for row in np.flatnonzero(keep[0, 0].any(axis=-1)):
            assert np.abs(out[0, 0, row] - value[keep[0, 0, row]]).max(axis=1).min() < 1e-12


@pytest.mark.parametrize(
    ("fault", "options", "values"),
    [
        ("causal_strict", {"causal": True}, "key_set"),
        ("causal_leak", {"causal": True}, "key_set"),
        ("top_left", {"causal": True}, "key_set"),
        ("window_one_more", {"window_left": 5}, "key_set"),
        ("window_one_less", {"window_left": 5}, "key_set"),
        ("drops_last_key", {}, "key_set"),
        ("drops_tail", {}, "key_set"),
        ("drops_last_key", {}, "visible"),
        ("drops_tail", {}, "aim"),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_key_set_is_seen(spec: Mechanism, fault: str, options: dict[str, Any], values: str, dtype: str) -> None:
    assert not passes(probe(spec, values, dtype=dtype, **options), fault)


def long_rows(case: Case, step: int = 0, drop: int = -1) -> dict[str, np.ndarray]:
    """A row-sampled fake of a kernel on the `visible` probe: right but for an edge in the middle, or a lost key."""
    data = build(case)
    V, N, M = data.inputs["V"][0, 0], data.inputs["Q"].shape[2], data.inputs["K"].shape[2]
    out = np.zeros((1, 1, N, V.shape[-1]))
    for row in (case.rows or {})["i"]:
        end = row + M - N + 1 + (step if 64 < row < N - 64 else 0)
        keys = np.arange(max(0, min(end, M)))
        keys = keys[keys != drop]
        out[0, 0, row] = V[keys].sum(axis=0) / max(1, len(keys))
    return {"O": out}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_key_among_thousands_is_seen_at_the_edge_of_the_mask(spec: Mechanism, dtype: str) -> None:
    case = probe(spec, "visible", sizes=LONG, group="long", dtype=dtype, causal=True)
    want = expected(case, build(case))
    assert all(entry.passed for entry in judge(case, want, long_rows(case)))
    for step in (1, -1):
        assert not judge(case, want, long_rows(case, step))[0].passed
    for lost in (4095, 4096, 63, 0):
        assert not judge(case, want, long_rows(case, drop=lost))[0].passed


def test_places_hold_edges_of_masks_and_of_tiles(spec: Mechanism) -> None:
    case = probe(spec, "visible", sizes=LONG, group="long", causal=True)
    found = probes.places(spec, case, {"causal": True}, 32)
    assert len(found) == len(set(found)) == 32 and {4100, 0} <= set(found)
    middle = LONG["queries"] // 2
    assert {middle + 2, middle + 1, middle + 3} <= set(found)
    assert {4096, 4095} <= set(found)


def test_the_longest_probe_is_judged_in_seconds(spec: Mechanism) -> None:
    sizes = {**LONG, "queries": 131072, "keys": 131072, "feature": 8, "value_feature": 8}
    case = probe(spec, "visible", sizes=sizes, group="long", dtype="bf16", causal=True)
    started = time.process_time()
    want = expected(case, build(case))
    assert want.rows is not None and len(want.rows) >= 10
    assert time.process_time() - started < 30


def test_probes_work_with_pages(spec: Mechanism) -> None:
    pages = ("k_pages", "v_pages", "block_table", "kv_length")
    case = make(spec, "probes", sizes=shapes.BASE, values="visible", check=probes.CHECK, inputs=pages)
    want = expected(case, build(case))
    assert np.isfinite(want.exact["O"]).all() and (want.exact["O"] > 0).any()


def test_a_sum_whose_terms_cancel_is_judged_by_its_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    informer = load("informer_probsparse")  # causal: queries that are not chosen get the running sum of the values
    case = probe(informer, "aim", sizes={**PROBE, "queries": 132, "keys": 132}, causal=True)
    data = build(case)
    wide = informer.evaluate(data.inputs, data.options, intermediates=True)
    running = np.cumsum(data.inputs["V"].astype(np.float32), axis=2, dtype=np.float32)
    found = {"O": np.where(wide["chosen"][..., None], wide["O"], running).astype(np.float32)}
    assert all(entry.passed for entry in judge(case, expected(case, data), found))
    late = {"O": found["O"] + np.where(wide["chosen"][..., None], 0.0, 1e-4).astype(np.float32)}
    assert not all(entry.passed for entry in judge(case, expected(case, data), late))

    monkeypatch.setattr(probes, "unsigned", lambda *arguments: None)
    oracle._CACHE.clear()
    assert not all(entry.passed for entry in judge(case, expected(case, data), found))
    oracle._CACHE.clear()


def test_values_without_signs_are_left_alone(spec: Mechanism) -> None:
    for values in ("key_set", "visible"):
        assert probes.unsigned(spec, build(probe(spec, values)).inputs) is None
    data = build(probe(spec, "aim"))
    assert (probes.unsigned(spec, data.inputs) or {})["V"].min() >= 0.0
    exact = {"O": np.array([1.0, -2.0])}
    plain, summed = (probes.sigma(exact, "O", "fp32", 4, more)["O"] for more in (None, {"O": np.array([8.0, 2.0])}))
    assert np.allclose(summed / plain, [8.0, 1.0])
