"""The oracle: the equations in float64, sigma from the declared rounding, and declared differences taken in."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from attnspec.conformance import oracle, shapes
from attnspec.conformance.case_id import make
from attnspec.conformance.data import build
from attnspec.conformance.oracle import expected, rounding_model
from attnspec.conformance.semantics import DeclarationError
from attnspec.conformance.types import Case, CaseData
from attnspec.spec import load
from attnspec.spec.mechanism import Mechanism


@pytest.fixture(scope="module")
def spec() -> Mechanism:
    return load("softmax_attention")


def one(spec: Mechanism, *, values: str = "normal", inputs: tuple[str, ...] = (), dtype: str = "bf16",
        direction: Any = "forward", group: str = "options", sizes: dict[str, int] = shapes.BASE,
        broadcast: dict[str, str] | None = None, **options: object) -> tuple[Case, CaseData]:  # fmt: skip
    case = make(spec, group, sizes=sizes, values=values, inputs=inputs, dtype=dtype, direction=direction,
                options=options, broadcast=broadcast)  # fmt: skip
    return case, build(case)


def test_what_is_expected_is_what_the_equations_say(spec: Mechanism) -> None:
    case, data = one(spec, inputs=("bias", "mask"), causal=True, softcap=2.0)
    found = expected(case, data)
    want = spec.evaluate(data.inputs, data.options)
    for name in ("O", "LSE"):
        assert np.array_equal(found.exact[name], want[name]) and found.sigma[name].shape == want[name].shape
    assert (found.sigma["O"] > 0).all() and found.rounding["name"] == "fused"


def test_gradients_are_those_of_autograd_and_have_the_inputs_shapes(spec: Mechanism) -> None:
    pytest.importorskip("torch")
    case, data = one(
        spec,
        inputs=("bias", "sink"),
        direction="backward",
        group="gradients_all",
        broadcast={"bias": "bi"},
        causal=True,
    )
    assert set(data.cotangents) == {"O", "LSE"}
    found = expected(case, data)
    want = spec.gradients(data.inputs, data.options, data.cotangents, method="autograd")
    assert set(found.exact) == {"Q", "K", "V", "bias", "sink"}
    for name, value in found.exact.items():
        assert value.shape == data.inputs[name].shape == found.sigma[name].shape
        assert np.allclose(value, want[name], atol=1e-10)


def test_the_same_content_is_evaluated_once(spec: Mechanism) -> None:
    oracle.forget()
    case, data = one(spec)
    first, again = expected(case, data), expected(case, build(case))
    assert first.exact["O"] is again.exact["O"] and first.sigma["O"] is again.sigma["O"]
    assert expected(case, data, rounding="materialized").sigma["O"] is not first.sigma["O"]
    data.inputs["V"] = -data.inputs["V"]
    assert np.allclose(expected(case, data).exact["O"], -first.exact["O"])


def test_the_oracle_is_reproducible(spec: Mechanism) -> None:
    case, data = one(spec)
    first = expected(case, data).sigma["O"].copy()
    oracle.forget()
    assert np.array_equal(expected(case, data).sigma["O"], first)


def test_the_cache_stays_within_its_size(spec: Mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "CACHE_BYTES", 100_000)
    oracle.forget()
    for seed in range(6):
        case = make(spec, "shapes", sizes=shapes.BASE, seed=seed)
        expected(case, build(case))
    held = sum(array.nbytes for entry in oracle._CACHE.values() for part in entry for array in part.values())
    assert 0 < held <= 100_000


def test_coarser_rounding_models_have_larger_sigma(spec: Mechanism) -> None:
    case, data = one(spec, values="large")
    fused, materialized = (expected(case, data, rounding=name).sigma["O"] for name in ("fused", "materialized"))
    assert np.median(materialized / fused) > 1.1
    case, data = one(spec, dtype="fp32")
    plain, tensor_cores = (expected(case, data, rounding=name).sigma["O"] for name in (None, "fused+tf32"))
    assert np.median(tensor_cores / plain) > 50


def test_a_rounding_model_says_what_it_is(spec: Mechanism) -> None:
    model = rounding_model(spec, "fp32", "materialized+tf32")
    assert model.name == "materialized+tf32" and model.product == "tf32" and "P" in model.stored
    assert rounding_model(spec, "bf16", "fused+tf32").product == "ieee"
    assert rounding_model(spec, "fp64").accumulate == "fp64"
    assert rounding_model(spec, "bf16").outputs == {"LSE": "fp32"}
    with pytest.raises(DeclarationError, match="unknown product 'fp8'"):
        rounding_model(spec, "fp32", "fused+fp8")
    with pytest.raises(ValueError, match="unknown rounding model 'lazy'"):
        rounding_model(spec, "fp32", "lazy")


def test_sampled_rows_equal_the_rows_of_the_whole(spec: Mechanism) -> None:
    sizes = {**shapes.TILES, "queries": 200, "keys": 210}
    case, data = one(spec, group="long", sizes=sizes, causal=True)
    found = expected(case, data)
    assert found.rows is not None and {0, 199, 100} <= set(found.rows) and found.row_axis == {"O": 2, "LSE": 2}
    whole = spec.evaluate(data.inputs, data.options)["O"]
    assert np.allclose(found.exact["O"], whole[:, :, found.rows], atol=1e-13)


def test_a_causal_case_of_131072_tokens_takes_seconds(spec: Mechanism) -> None:
    sizes = {
        "batch": 1,
        "heads": 1,
        "kv_heads": 1,
        "queries": 131072,
        "keys": 131072,
        "feature": 16,
        "value_feature": 16,
    }
    started = time.process_time()
    case, data = one(spec, group="long", sizes=sizes, causal=True)
    found = expected(case, data)
    assert time.process_time() - started < 30
    assert found.exact["O"].shape[2] == len(found.rows or ()) and np.isfinite(found.exact["O"]).all()


def test_rows_that_see_a_nan_are_not_judged_and_the_others_are(spec: Mechanism) -> None:
    case, data = one(spec, values="future_nan", causal=True)
    found = expected(case, data)
    judged = found.judged["O"]
    assert judged.any() and not judged.all() and np.isfinite(found.exact["O"][judged]).all()
    assert np.array_equal(judged[..., 0], ~np.isnan(found.exact["O"]).any(axis=-1))


def test_further_calls_have_expectations_of_their_own(spec: Mechanism) -> None:
    case = make(spec, "calls", sizes=shapes.BASE, options={"causal": True}, check="sequence")
    data = build(case)
    found = expected(case, data)
    assert len(found.calls) == len(data.extra["calls"]) == 2
    assert np.allclose(found.calls[0].exact["O"], spec.evaluate(data.inputs, {})["O"])
    assert np.array_equal(found.calls[1].exact["O"], found.exact["O"])


def test_a_refusal_expects_nothing(spec: Mechanism) -> None:
    case = make(spec, "refusals", sizes=shapes.BASE, values="bad_keys", check="refusal")
    assert expected(case, build(case)).exact == {}


EMPTY = {"values": "empty_rows", "inputs": ("mask",)}


def test_empty_rows_are_expected_as_declared(spec: Mechanism) -> None:
    case, data = one(spec, **EMPTY)  # type: ignore[arg-type]
    zero = expected(case, data)
    assert (zero.exact["O"][:, :, 1] == 0).all() and (zero.exact["LSE"][:, :, 1] == -np.inf).all()
    nan = expected(case, data, {"empty_rows": "nan"})
    assert np.isnan(nan.exact["O"][:, :, 1]).all() and "O" not in nan.judged and not nan.judged["LSE"][:, :, 1].any()
    mean = expected(case, data, {"empty_rows": "mean"})
    assert np.allclose(mean.exact["O"][:, :, 1], np.repeat(data.inputs["V"], 2, axis=1).mean(axis=2))
    assert (mean.sigma["O"][:, :, 1] > 0).all()
    free = expected(case, data, {"empty_rows": "undefined"})
    assert not free.judged["O"][:, :, 1].any() and free.judged["O"][:, :, 0].all()
    for other in (nan, mean, free):
        assert np.array_equal(other.exact["O"][:, :, 0], zero.exact["O"][:, :, 0])


def test_gradients_of_empty_rows_are_judged_only_where_defined(spec: Mechanism) -> None:
    case = make(spec, "gradients", sizes=shapes.BASE, inputs=("mask",), values="empty_rows", direction="backward")
    declares = {"empty_rows": "nan"}
    found = expected(case, build(case, declares), declares)
    assert found.judged["Q"][:, :, 0].all() and not found.judged["Q"][:, :, 1].any() and not found.judged["K"].any()
    assert expected(case, build(case)).judged == {}


def test_padded_rows_may_be_anything_where_declared(spec: Mechanism) -> None:
    case, data = one(spec, inputs=("q_length",))
    length = int(data.inputs["q_length"][0])
    judged = expected(case, data, {"padded_rows": "undefined"}).judged["O"]
    assert judged[0, :, :length].all() and not judged[0, :, length:].any() and judged[1].all()


def test_the_sink_can_be_left_out_of_the_lse(spec: Mechanism) -> None:
    case, data = one(spec, inputs=("sink",))
    found = expected(case, data, {"lse_sink": "excluded"})
    plain = {name: value for name, value in data.inputs.items() if name != "sink"}
    assert np.allclose(found.exact["LSE"], spec.evaluate(plain)["LSE"])
    assert np.array_equal(found.exact["O"], expected(case, data).exact["O"])


def test_another_order_of_bias_and_softcap_is_another_function(spec: Mechanism) -> None:
    case, data = one(spec, inputs=("bias",), dtype="fp64", softcap=1.5)
    found = expected(case, data, {"score_order": "bias_softcap"}).exact["O"]
    Q, K, V = (data.inputs[name] for name in ("Q", "K", "V"))
    logits = Q @ np.repeat(K, 2, axis=1).swapaxes(-1, -2) * Q.shape[-1] ** -0.5 + data.inputs["bias"]
    weights = np.exp(1.5 * np.tanh(logits / 1.5))
    assert np.allclose(found, weights / weights.sum(axis=-1, keepdims=True) @ np.repeat(V, 2, axis=1))
    assert not np.allclose(found, expected(case, data).exact["O"], atol=1e-3)


def test_gradients_follow_the_declared_order_too(spec: Mechanism) -> None:
    declares = {"score_order": "bias_softcap"}
    case, data = one(spec, inputs=("bias",), dtype="fp64", direction="backward", group="gradients", softcap=1.5,
                     sizes=shapes.TINY)  # fmt: skip
    found = expected(case, data, declares).exact
    forward = make(spec, "options", sizes=shapes.TINY, inputs=("bias",), dtype="fp64", options={"softcap": 1.5})
    step = 1e-5
    for name in ("Q", "K", "bias"):
        place = tuple(size // 2 for size in data.inputs[name].shape)
        ends = []
        for sign in (1, -1):
            moved = CaseData({**data.inputs, name: data.inputs[name].copy()}, data.options)
            moved.inputs[name][place] += sign * step
            ends.append(float((expected(forward, moved, declares).exact["O"] * data.cotangents["O"]).sum()))
        assert found[name][place] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8)
