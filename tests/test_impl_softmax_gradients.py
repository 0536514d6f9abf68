"""Gradients of the Triton softmax attention against float64 autograd through the plain formula, in Triton's
interpreter.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.engines.softmax_configs import TileConfig  # noqa: E402
from attnspec.impls.softmax import configs, softmax_attention  # noqa: E402
from attnspec.tests.test_impl_softmax import CASES, close, extra, formula, tensors  # noqa: E402

INF = float("inf")
SMALL = TileConfig(16, 16, 1, 1)
DIFFERENTIABLE = ("Q", "K", "V", "bias", "sink")


def gradients(function: Any, x: dict[str, Any], dO: Any, dLSE: Any, dtype: Any) -> tuple[Any, Any, dict[str, Any]]:
    """O, LSE and the gradients of whatever is differentiable; a cotangent of None leaves its output unused."""
    leaves = {n: x[n].detach().to(dtype).requires_grad_() for n in DIFFERENTIABLE if n in x}
    O, LSE = function(x | leaves)
    outputs, cotangents = [], []
    if dO is not None:
        outputs.append(O)
        cotangents.append(dO.to(O.dtype))
    if dLSE is not None:
        # An infinite LSE has no gradient; autograd through the formula would make NaN of it.
        outputs.append(torch.where(torch.isfinite(LSE), LSE, 0.0))
        cotangents.append(dLSE.to(LSE.dtype))
    got = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    return O.detach(), LSE.detach(), dict(zip(leaves, got))


def cotangents(x: dict[str, Any]) -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(3)
    B, H, N = x["Q"].shape[:3]
    return torch.randn(B, H, N, x["V"].shape[3], generator=g), torch.randn(B, H, N, generator=g)


def ours(x: dict[str, Any], dO: Any, dLSE: Any, config: Any = SMALL) -> tuple[Any, Any, dict[str, Any]]:
    return gradients(lambda y: softmax_attention(**y, config=config), x, dO, dLSE, x["Q"].dtype)


def check(
    x: dict[str, Any], config: Any = SMALL, tolerance: float = 1e-5, use: tuple[bool, bool] = (True, True)
) -> None:
    dO, dLSE = (c if used else None for c, used in zip(cotangents(x), use))
    O, LSE, got = ours(x, dO, dLSE, config)
    want_O, want_LSE, want = gradients(formula, x, dO, dLSE, torch.float64)
    close(O, want_O, tolerance)
    close(LSE, want_LSE, tolerance)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == x[name].dtype
        close(got[name], want[name], tolerance)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_formula(name: str) -> None:
    names, options = CASES[name]
    check(tensors(H=2, Hk=1) | {n: extra(H=2)[n] for n in names} | options)


def test_a_wrong_gradient_is_noticed() -> None:
    """The comparison has teeth: against the formula without the softcap's slope it fails."""
    x = tensors(B=1, H=2, Hk=1, N=5, M=6)
    dO, dLSE = cotangents(x)
    got = ours(x | {"softcap": 0.8}, dO, dLSE)[2]
    want = gradients(formula, x, dO, dLSE, torch.float64)[2]
    with pytest.raises(AssertionError):
        close(got["Q"], want["Q"], 1e-3)


@pytest.mark.parametrize(("H", "Hk"), [(6, 2), (3, 3), (5, 1)])
def test_key_gradients_are_sums_over_the_heads_that_share_a_key_head(H: int, Hk: int) -> None:
    check(tensors(B=1, H=H, Hk=Hk, N=9, M=20, D=6, E=4) | {"causal": True})


@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["only-O", "only-LSE"])
def test_each_output_may_be_used_alone(use: tuple[bool, bool]) -> None:
    check(tensors(B=1, H=2, Hk=1) | {"sink": torch.randn(2), "causal": True, "causal_alignment": "top_left"}, use=use)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 20), (2, 1, 18, 20), (1, 2, 1, 20), (2, 2, 18, 20), (1, 1, 18, 20), (2, 2, 1, 20)], ids=str
)
def test_bias_gradient_has_the_shape_of_the_bias(shape: tuple[int, ...]) -> None:
    check(tensors(H=2, Hk=1, N=18, M=20) | {"bias": torch.randn(shape), "causal": True})


def test_bias_of_a_single_query_has_a_gradient() -> None:
    check(tensors(H=2, Hk=1, N=1, M=20) | {"bias": torch.randn(1, 2, 1, 20)})


@pytest.mark.parametrize(("N", "M", "D", "E"), [(1, 1, 1, 1), (17, 1, 16, 3), (1, 33, 130, 5), (20, 20, 40, 130)])
def test_any_size_has_gradients(N: int, M: int, D: int, E: int) -> None:
    check(tensors(B=1, H=2, Hk=1, N=N, M=M, D=D, E=E) | {"causal": True})


@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}], ids=str)
def test_empty_sizes_give_zero_gradients(sizes: dict[str, int]) -> None:
    x = tensors(**sizes) | {"sink": torch.arange(4.0)}
    dO, dLSE = cotangents(x)
    got = ours(x, dO, dLSE, None)[2]
    for name in ("Q", "K", "V"):
        assert got[name].shape == x[name].shape and not got[name].any()
    # Without keys LSE is the sink, and its gradient the cotangent's sum.
    torch.testing.assert_close(got["sink"], dLSE.sum((0, 2)) if "M" in sizes else torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_gradients_are_near_the_formula(dtype: Any) -> None:
    x = tensors(B=1, H=2, Hk=1, M=40, dtype=dtype) | {"causal": True}
    check(x, tolerance=4 * torch.finfo(dtype).eps)


def test_gradients_of_masked_positions_are_exactly_zero() -> None:
    x = tensors(H=2, Hk=1) | {n: extra()[n] for n in ("q_length", "kv_length")}
    got = ours(x, *cotangents(x))[2]
    assert not got["Q"][0, :, 17:].any() and not got["K"][1, :, 9:].any() and not got["V"][1, :, 9:].any()
    assert got["Q"][0, :, :17].any() and got["K"][1, :, :9].any()


def test_poison_in_padding_does_not_reach_gradients() -> None:
    x = tensors(H=2, Hk=1) | {n: extra()[n] for n in ("q_length", "kv_length")} | {"causal": True}
    dO, dLSE = cotangents(x)
    bad = {n: x[n].clone() for n in ("Q", "K", "V")}
    bad["Q"][0, :, 17:] = torch.nan
    bad["K"][1, :, 9:] = torch.nan
    bad["V"][1, :, 9:] = INF
    poisoned = dO.clone()
    poisoned[0, :, 17:] = torch.nan
    got = ours(x | bad, poisoned, dLSE)[2]
    for name, want in ours(x, dO, dLSE)[2].items():
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize(
    "rule", [{"causal": True}, {"mask": torch.ones(1, 1, 20, 20).tril().bool()}], ids=["causal", "mask"]
)
def test_poison_reaches_only_the_gradients_of_pairs_that_see_it(rule: dict[str, Any]) -> None:
    x = tensors(B=1, H=2, Hk=1, N=20, M=20) | rule
    dO, _ = cotangents(x)
    clean = ours(x, dO, None)[2]
    bad = x | {"K": x["K"].clone(), "V": x["V"].clone()}
    bad["K"][:, :, 13, 0] = torch.nan
    bad["V"][:, :, 17, 1] = torch.nan
    got = ours(bad, dO, None)[2]
    assert torch.equal(got["Q"][:, :, :13], clean["Q"][:, :, :13])
    assert torch.isnan(got["Q"][:, :, 13:]).any(-1).all()
    late = dO.clone()
    late[:, :, 3] = torch.nan  # row 3 sees keys 0..3 only
    got = ours(x, late, None)[2]
    for name in ("K", "V"):
        assert torch.equal(got[name][:, :, 4:], clean[name][:, :, 4:]) and torch.isnan(got[name][:, :, :4]).all()


def test_cotangents_in_any_layout_give_the_same_gradients() -> None:
    x = tensors(B=1, H=2, Hk=1) | {"causal": True}
    dO, dLSE = cotangents(x)
    want = ours(x, dO, dLSE)[2]
    turned = dO.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for name, got in ours(x, turned, dLSE.transpose(1, 2).contiguous().transpose(1, 2))[2].items():
        assert torch.equal(got, want[name])
    ones = ours(x, torch.ones(1).expand(dO.shape), None)[2]
    for name, got in ours(x, torch.ones(dO.shape), None)[2].items():
        assert torch.equal(got, ones[name])


def test_gradients_repeat_bit_for_bit_and_inputs_stay_unchanged() -> None:
    x = tensors(B=1, H=2, Hk=1) | {
        "bias": extra(H=2)["bias"],
        "sink": extra(H=2)["sink"],
        "mask": extra(H=2)["mask"][:1],
    }
    before = {n: v.clone() for n, v in x.items()}
    dO, dLSE = cotangents(x)
    first, second = ours(x, dO, dLSE)[2], ours(x, dO, dLSE)[2]
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(x[n], before[n]) for n in x)


@pytest.mark.parametrize("kind", ["dq", "dkv", "dbias"])
def test_every_configuration_gives_the_gradients(kind: str) -> None:
    found = configs(kind, 20, 12, torch.float32)
    assert len(found) >= 2
    for config in found:
        check(tensors(B=1, H=2, Hk=1, N=40, M=40) | {"bias": torch.randn(1, 1, 40, 40), "causal": True}, config)


def test_only_what_is_wanted_is_computed() -> None:
    x = tensors(B=1, H=2, Hk=1, N=5, M=6)
    K = x["K"].requires_grad_()
    O, _ = softmax_attention(**x)
    O.sum().backward()
    assert K.grad is not None and x["Q"].grad is None and x["V"].grad is None


def test_second_derivatives_are_refused() -> None:
    x = tensors(B=1, H=1, Hk=1, N=2, M=2)
    Q = x["Q"].requires_grad_()
    O, _ = softmax_attention(**x)
    (dQ,) = torch.autograd.grad((O * O).sum(), Q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dQ.sum().backward()


def test_gradients_through_pages_are_refused() -> None:
    x = {
        "Q": torch.randn(1, 2, 3, 4, requires_grad=True), "k_pages": torch.randn(2, 4, 1, 4),
        "v_pages": torch.randn(2, 4, 1, 4),
        "block_table": torch.tensor([[1, 0]]),
    }  # fmt: skip
    with pytest.raises(Unsupported, match="no gradients through a paged cache"):
        softmax_attention(**x)
    with torch.no_grad():
        assert softmax_attention(**x)[0].shape == (1, 2, 3, 4)
