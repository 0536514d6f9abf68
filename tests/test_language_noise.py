"""sigma is what rounding really does: it follows measured errors of real low-precision arithmetic, and nothing more."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from attnspec.spec.language import RoundingModel, SpecError, evaluate, read, round_to, sigma, unit_roundoff
from attnspec.spec.language.arithmetic import Arithmetic
from attnspec.spec.language.backend import Backend
from attnspec.spec.language.named import Named
from attnspec.spec.language.syntax import OptionDecl
from attnspec.tests.language_build import attention, declared

RNG = np.random.default_rng(0)
FP32, BF16 = RoundingModel("fp32"), RoundingModel("bf16", frozenset({"P"}))


def drawn(n: int, m: int, d: int, dtype: str = "fp32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n * m + d)
    return {k: round_to(rng.standard_normal((s, d)), dtype) for k, s in (("Q", n), ("K", m), ("V", m))}


def z_of(got: np.ndarray, exact: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return np.asarray((got - exact) / spread)


def attention_in(dtype: Any, inputs: dict[str, np.ndarray], stored: bool) -> np.ndarray:
    """Softmax attention in float32, weights and output rounded to `dtype`."""
    q, k, v = (value.astype(np.float32) for value in inputs.values())
    scores = (q @ k.T) * np.float32(q.shape[1] ** -0.5)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights = weights / weights.sum(1, keepdims=True)
    if stored:
        weights = round_to(weights, dtype).astype(np.float32)
    return round_to((weights @ v).astype(np.float64), dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(64, 200, 32), (3, 1000, 64), (50, 17, 128)])
def test_honest_attention_lies_within_a_few_sigma_and_a_wrong_scale_does_not(
    dtype: str, shape: tuple[int, int, int]
) -> None:
    inputs = drawn(*shape, dtype)
    exact, spread = sigma(attention(), inputs, rounding=RoundingModel(dtype, frozenset({"P"})), seed=1)
    z = z_of(attention_in(dtype, inputs, True), exact["O"], spread["O"])
    assert 0.15 < np.sqrt((z**2).mean()) < 1.2
    assert np.abs(z).max() < 6
    wrong = evaluate(attention(), inputs | {"Q": inputs["Q"] * 1.02})["O"]
    z = z_of(wrong, exact["O"], spread["O"])
    assert np.sqrt((z**2).mean()) > 3


@pytest.mark.parametrize("n", [16, 256, 4096])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_sums_err_like_sequential_summation_in_float32(n: int, shift: float) -> None:
    declarations = declared("i:N j:M", "x:ij", "y:i")
    x = round_to(np.random.default_rng(n).standard_normal((400, n)) + shift, "fp32")
    exact, spread = sigma(read("y[i] = sum[j](x[i,j])", declarations), {"x": x}, rounding=FP32)
    total = np.zeros(400, dtype=np.float32)
    for j in range(n):
        total = total + x[:, j].astype(np.float32)
    measured = np.sqrt(((total - exact["y"]) ** 2).mean())
    predicted = np.sqrt((spread["y"] ** 2).mean())
    assert 0.4 < measured / predicted < 1.5


def test_sigma_of_a_product_sum_grows_with_the_square_root_of_its_length() -> None:
    declarations = declared("i:N j:M d", "a:id c:jd", "y:ij")
    program = read("y[i,j] = sum[d](a[i,d] * c[j,d])", declarations)
    ratio = []
    for d in (64, 1024):
        a, c = RNG.choice([-1.0, 1.0], (30, d)), RNG.choice([-1.0, 1.0], (30, d))
        spread = sigma(program, {"a": a, "c": c}, rounding=FP32)[1]["y"]
        ratio.append(np.median(spread) / math.sqrt(d))
    assert ratio[1] / ratio[0] == pytest.approx(4.0, rel=0.2)  # sqrt(n) terms, each partial sum sqrt(n) larger


def test_the_rounding_of_the_output_is_the_least_sigma() -> None:
    declarations = declared("i:N", "x:i", "y:i")
    x = round_to(RNG.standard_normal(100), "bf16")
    exact, spread = sigma(read("y[i] = x[i]", declarations), {"x": x}, rounding=RoundingModel("bf16"))
    np.testing.assert_array_equal(exact["y"], x)
    np.testing.assert_allclose(spread["y"], unit_roundoff("bf16") * np.abs(x) / math.sqrt(3), rtol=1e-3)


def test_zeros_without_noise_and_special_values_have_no_sigma() -> None:
    declarations = declared("i:N j:M", "S:ij", "y:i z:i")
    S = RNG.standard_normal((4, 6))
    S[1] = -math.inf
    S[2, 3] = math.nan
    S[3, 0] = math.inf
    program = read("P[i,j] = softmax[j](S[i,j])\ny[i] = sum[j](P[i,j] * j)\nz[i] = logsumexp[j](S[i,j])", declarations)
    exact, spread = sigma(program, {"S": S}, rounding=BF16)
    assert spread["y"][0] > 0 and spread["z"][0] > 0
    assert exact["y"][1] == 0 and spread["y"][1] == 0
    assert exact["z"][1] == -math.inf and spread["z"][1] == 0
    for name in ("y", "z"):
        assert np.isfinite(spread[name]).all()
        assert spread[name][~np.isfinite(exact[name])].max() == 0


def test_sigma_is_never_zero_where_the_exact_value_is_not() -> None:
    inputs = drawn(9, 13, 8)
    exact, spread = sigma(attention(), inputs, {"causal": True}, rounding=FP32, samples=1)
    assert (spread["O"] > 0).all()
    tiny = {name: value * 1e-30 for name, value in inputs.items()}
    exact, spread = sigma(attention(), tiny, rounding=RoundingModel("fp16"))
    assert (spread["O"][exact["O"] != 0] > 0).all()


def test_the_same_seed_gives_the_same_sigma_and_another_seed_another() -> None:
    inputs = drawn(5, 9, 8)
    first = sigma(attention(), inputs, rounding=BF16, seed=3)[1]["O"]
    np.testing.assert_array_equal(first, sigma(attention(), inputs, rounding=BF16, seed=3)[1]["O"])
    other = sigma(attention(), inputs, rounding=BF16, seed=4)[1]["O"]
    assert (first != other).any()
    np.testing.assert_allclose(first, other, rtol=0.8)


def test_stored_tensors_and_operand_formats_widen_sigma_and_wide_accumulators_narrow_it() -> None:
    inputs = drawn(20, 300, 64, "bf16")

    def typical(model: RoundingModel) -> float:
        return float(np.median(sigma(attention(), inputs, rounding=model)[1]["O"]))

    fp32 = typical(FP32)
    assert typical(RoundingModel("fp32", accumulate="fp64")) < 0.7 * fp32
    assert typical(RoundingModel("fp32", product="tf32")) > 100 * fp32
    assert typical(RoundingModel("bf16", accumulate="io")) > 3 * typical(RoundingModel("bf16"))
    assert typical(RoundingModel("bf16", frozenset({"P"}))) > typical(RoundingModel("bf16"))
    assert typical(RoundingModel("bf16", outputs={"O": "fp32"})) < 0.1 * typical(RoundingModel("bf16"))


def test_operands_that_fit_the_product_format_are_not_disturbed() -> None:
    declarations = declared("i:N j:M d", "a:id c:jd", "y:ij")
    program = read("y[i,j] = sum[d](a[i,d] * c[j,d])", declarations)
    a, c = round_to(RNG.standard_normal((5, 8)), "bf16"), round_to(RNG.standard_normal((6, 8)), "bf16")
    plain = sigma(program, {"a": a, "c": c}, rounding=FP32)[1]["y"]
    rounded = sigma(program, {"a": a, "c": c}, rounding=RoundingModel("fp32", product="tf32"))[1]["y"]
    np.testing.assert_array_equal(plain, rounded)


def test_tf32_products_stay_within_their_sigma() -> None:
    inputs = drawn(40, 100, 64)
    exact, spread = sigma(attention(), inputs, rounding=RoundingModel("fp32", product="tf32"))
    q, k, v = inputs.values()
    scores = round_to(q, "tf32") @ round_to(k, "tf32").T / 8
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    z = z_of(round_to(weights, "tf32") @ round_to(v, "tf32"), exact["O"], spread["O"])
    assert 0.2 < np.sqrt((z**2).mean()) < 1.5


def test_recurrences_accumulate_noise_step_by_step() -> None:
    declarations = declared("t:T", "x:t", "y:t", options=[OptionDecl("gamma", "float", 1.0)])
    program = read("y[-1] = 0\ny[t] = gamma * y[t-1] + x[t]", declarations)
    x = RNG.uniform(0.5, 1.5, 400)
    spread = sigma(program, {"x": x}, rounding=RoundingModel("fp32", outputs={"y": "fp64"}), samples=64)[1]["y"]
    assert spread[390] > 5 * spread[10]
    kept = sigma(program, {"x": x}, {"gamma": 0.0}, rounding=RoundingModel("fp32", outputs={"y": "fp64"}))[1]["y"]
    assert kept[390] < 3 * kept[10]


def test_a_definition_that_only_renames_another_adds_no_rounding() -> None:
    declarations = declared("i:N", "x:i", "y:i")
    x = RNG.standard_normal(500)
    model = RoundingModel("fp32", outputs={"y": "fp64"})
    plain = sigma(read("y[i] = exp(x[i])", declarations), {"x": x}, rounding=model)[1]["y"]
    names = ["a0[i] = exp(x[i])", *(f"a{k}[i] = a{k - 1}[i]" for k in range(1, 20)), "y[i] = a19[i]"]
    renamed = sigma(read("\n".join(names), declarations), {"x": x}, rounding=model)[1]["y"]
    assert np.median(renamed) == pytest.approx(np.median(plain), rel=0.1)


def test_rows_and_chosen_outputs_are_those_of_evaluate() -> None:
    inputs = drawn(9, 13, 8)
    exact, spread = sigma(attention(), inputs, rounding=FP32, rows={"i": [7, 2]}, outputs=["O", "P"])
    full = evaluate(attention(), inputs, outputs=["O", "P"], rows={"i": [7, 2]})
    for name in ("O", "P"):
        np.testing.assert_array_equal(exact[name], full[name])
        assert spread[name].shape == full[name].shape


def test_samples_that_do_not_fit_at_once_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnspec.spec.language import noise

    inputs = drawn(20, 30, 8)
    together = sigma(attention(), inputs, rounding=BF16, samples=32)[1]["O"]
    monkeypatch.setattr(noise, "_ELEMENTS", 2000)
    apart = sigma(attention(), inputs, rounding=BF16, samples=32)[1]["O"]
    np.testing.assert_allclose(together, apart, rtol=0.8)
    assert np.median(together) == pytest.approx(np.median(apart), rel=0.15)


def test_conditions_and_integers_have_no_noise() -> None:
    declarations = declared("i:N j:M", "x:ij", "r:ij c:i")
    x = RNG.standard_normal((4, 6))
    program = read("r[i,j] = rank[j](x[i,j])\nc[i] = any[j](x[i,j] > 0)", declarations)
    exact, spread = sigma(program, {"x": x}, rounding=RoundingModel("bf16"))
    assert exact["r"].dtype == np.int64
    assert spread["r"].max() == 0 and spread["c"].max() == 0


def test_wrong_rounding_models_are_named() -> None:
    with pytest.raises(SpecError, match="stored names 'Pp', which no equation defines"):
        sigma(attention(), drawn(2, 2, 2), rounding=RoundingModel("bf16", frozenset({"Pp"})))
    with pytest.raises(SpecError, match="unknown floating-point format 'bfloat'"):
        RoundingModel("bfloat")
    with pytest.raises(SpecError, match="accumulate is 'fp16', expected fp32, fp64 or io"):
        RoundingModel("bf16", accumulate="fp16")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="product is 'bf16', expected ieee, tf32 or io"):
        RoundingModel("bf16", product="bf16")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="samples is 0, expected at least 1"):
        sigma(attention(), drawn(2, 2, 2), rounding=FP32, samples=0)


def test_hooks_are_called_for_every_operation_that_rounds() -> None:
    calls: list[str] = []

    class Listening(Arithmetic):
        samples = 1

        def tensor(self, name: str, value: Named, computed: bool, backend: Backend) -> Named:
            calls.append(f"{name} {computed}")
            return value

        def contract(self, operands: Any, run: Any, terms: int, backend: Backend) -> Named:
            calls.append(f"contract {terms}")
            return run(operands)  # type: ignore[no-any-return]

        def reduced(self, op: str, value: Named, source: Named, axes: tuple[str, ...], backend: Backend) -> Named:
            calls.append(f"{op} {''.join(axes)}")
            return value

        def elementwise(self, function: str, value: Named, arguments: Any, backend: Backend) -> Named:
            calls.append(function)
            return value

    declarations = declared("i:N j:M d", "Q:id K:jd", "y:i")
    program = read(
        "S[i,j] = sum[d](Q[i,d] * K[j,d])\nA[i,j] = S[i,j]\nP[i,j] = softmax[j](tanh(A[i,j]))\n"
        "y[i] = sum[j](P[i,j]) + logsumexp[j](A[i,j]) + relu(Q[i,0])",
        declarations,
    )
    evaluate(program, {"Q": np.ones((2, 3)), "K": np.ones((4, 3))}, arithmetic=Listening())
    assert calls == ["contract 3", "S True", "A False", "tanh", "softmax j", "P True", "sum j", "logsumexp j", "y True"]


def test_a_softmax_that_is_computed_again_errs_by_the_rounding_of_its_logsumexp() -> None:
    rng = np.random.default_rng(0)
    logits = round_to(80.0 + rng.standard_normal((50, 40)), "fp32")
    program = read("P[i,j] = softmax[j](S[i,j])\ny[i,j] = P[i,j]", declared("i:N j:M", "S:ij", "y:ij"))
    exact, once = sigma(program, {"S": logits}, rounding=FP32)
    _, again = sigma(program, {"S": logits}, rounding=RoundingModel("fp32", recomputed=True))
    narrow = logits.astype(np.float32)
    kept = (narrow.max(1) + np.log(np.exp(narrow - narrow.max(1, keepdims=True)).sum(1))).astype(np.float32)
    z = z_of(np.exp(narrow - kept[:, None]), exact["y"], again["y"])
    assert 0.15 < np.sqrt((z**2).mean()) < 1.2
    assert np.sqrt((z_of(np.exp(narrow - kept[:, None]), exact["y"], once["y"]) ** 2).mean()) > 3
    _, small = sigma(program, {"S": logits - 80.0}, rounding=RoundingModel("fp32", recomputed=True))
    assert np.median(small["y"] / once["y"]) < 4
