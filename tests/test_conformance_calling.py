"""Calls in every framework: arguments arrive in the candidate's layout, results come back in the spec's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnspec.conformance.candidate import Candidate, CandidateError
from attnspec.conformance.session import Session
from attnspec.conformance.types import Case, CaseResult, Unsupported
from attnspec.tests.small_suite import SmallSuite, make_case

torch = pytest.importorskip("torch")


def judged(function: Any, case: Case | None = None, **stated: Any) -> CaseResult:
    """Judge a function in this process."""
    candidate = Candidate(function=function, name="kernel", **stated)
    with Session(candidate, SmallSuite(), isolated=False) as session:
        return session.judge(case or make_case())


def by_torch(q: Any, k: Any, v: Any, bias: Any = None, causal: bool = False, scale: float | None = None) -> Any:
    """O and LSE with PyTorch, in [b,h,i,d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).float(), v.repeat_interleave(groups, 1).float()
    logits = (q.float() @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.float()
    if causal:
        N, M = logits.shape[-2:]
        logits = logits.masked_fill(~torch.ones(N, M, dtype=torch.bool).tril(M - N), float("-inf"))
    return (logits.softmax(-1) @ v).to(q.dtype), logits.logsumexp(-1)


def by_numpy(q: Any, k: Any, v: Any) -> Any:
    groups = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), groups, axis=1) for x in (k, v))
    logits = np.einsum("bhid,bhjd->bhij", q.astype(np.float64), k) * q.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhij,bhje->bhie", weights, v).astype(q.dtype)


def backward_by_numpy(dO: Any, q: Any, k: Any, v: Any, out: Any) -> Any:
    from attnspec.conformance.types import CaseData
    from attnspec.tests.small_suite import attention

    wide = {name: x.astype(np.float64) for name, x in (("Q", q), ("K", k), ("V", v))}
    assert np.allclose(out, by_numpy(q, k, v))
    _, grads = attention(CaseData(wide, {}, {"O": dO.astype(np.float64)}))
    return tuple(grads[name].astype(q.dtype) for name in ("Q", "K", "V"))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_torch_candidates_are_called_and_differentiated(dtype: str, direction: Any) -> None:
    result = judged(by_torch, make_case(dtype=dtype, direction=direction, inputs=("bias",)))
    assert result.status == "pass", result.message
    names = {entry.name for entry in result.evidence}
    assert names == ({"O", "LSE"} if direction == "forward" else {"Q", "K", "V", "bias"})
    assert result.receipt["dtypes"] == {"O": dtype, "LSE": "fp32"}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_numpy_candidates_are_called_and_bring_their_own_backward(dtype: str, direction: Any) -> None:
    pytest.importorskip("ml_dtypes")
    result = judged(
        by_numpy, make_case(dtype=dtype, direction=direction, layout="transposed"), framework="numpy",
        backward=backward_by_numpy, dtypes=("fp32", "fp16", "bf16", "fp64"),
    )  # fmt: skip
    assert result.status == "pass", result.message


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_jax_candidates_are_called_and_differentiated(direction: Any) -> None:
    pytest.importorskip("jax")
    import jax.numpy as jnp

    def kernel(q: Any, k: Any, v: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
        logits = jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        return jnp.einsum("bhij,bhje->bhie", weights / weights.sum(-1, keepdims=True), v)

    result = judged(kernel, make_case(direction=direction), framework="jax")
    assert result.status == "pass", result.message


def in_layout(order: str) -> Any:
    to_canonical = [order.index(letter) for letter in "bhid"]
    to_order = ["bhid".index(letter) for letter in order]

    def kernel(q: Any, k: Any, v: Any) -> Any:
        out, lse = by_torch(*(x.permute(to_canonical) for x in (q, k, v)))
        return out.permute(to_order), lse.transpose(1, 2)

    return kernel


@pytest.mark.parametrize("order", ["bhid", "bihd", "ibhd", "dihb"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_every_order_of_axes_is_converted_both_ways(order: str, direction: Any, layout: str) -> None:
    case = make_case(direction=direction, layout=layout)
    result = judged(in_layout(order), case, layout=order, layouts={"LSE": "bih"})
    assert result.status == "pass", result.message


def test_an_explicit_backward_may_return_a_dict_and_leave_gradients_out() -> None:
    def backward(grad_output: Any, q: Any, k: Any, v: Any) -> Any:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        grads = torch.autograd.grad(by_torch(*inputs)[0], inputs, grad_output)
        return {"dQ": grads[0], "dk": grads[1], "V": grads[2]}

    case = make_case(direction="backward", inputs=("bias",))
    result = judged(by_torch, make_case(direction="backward"), backward=backward)
    assert result.status == "pass", result.message
    lacking = judged(by_torch, case, backward=backward)
    assert {entry.name for entry in lacking.evidence} == {"Q", "K", "V"}


@pytest.mark.parametrize(
    ("backward", "status", "told"),
    [
        (lambda dO, q: torch.zeros(1), "error", "dQ has shape (1,), expected (1, 2, 3, 4)"),
        (lambda dO, q: {"dZ": q}, "error", "backward returned an unknown gradient 'dZ'; expected dQ, dK, dV, dbias"),
        (lambda dO, q: (q,) * 5, "error", "backward returned 5 values, expected at most 4"),
        (lambda dO, q: None, "error", "backward returned no gradient"),
        (lambda dLSE, q: q, "not_supported", "backward: the backward function takes no dO"),
    ],
)
def test_a_wrong_backward_is_told(backward: Any, status: str, told: str) -> None:
    result = judged(by_torch, make_case(direction="backward"), backward=backward)
    assert (result.status, result.message) == (status, told)


def test_a_backward_that_cannot_be_matched_is_told() -> None:
    with pytest.raises(CandidateError, match=r"kernel \(backward\): required parameter flavour cannot be matched"):
        judged(by_torch, make_case(direction="backward"), backward=lambda dO, q, flavour: q)


def test_a_result_without_gradient_is_not_supported_and_not_wrong() -> None:
    def kernel(q: Any, k: Any, v: Any) -> Any:
        with torch.no_grad():
            return by_torch(q, k, v)[0]

    result = judged(kernel, make_case(direction="backward"))
    assert result.status == "not_supported"
    assert result.message == "backward: O has no gradient (torch: requires_grad is False)"


def test_mask_and_bias_meet_in_one_parameter() -> None:
    def kernel(q: Any, k: Any, v: Any, attn_mask: Any = None) -> Any:
        assert attn_mask.dtype == q.dtype and torch.isneginf(attn_mask).any()
        return by_torch(q, k, v, bias=attn_mask)[0]

    result = judged(kernel, make_case("square", inputs=("mask", "bias"), seed=3))
    assert result.status == "pass", result.message


def test_a_drop_in_that_raises_for_mask_with_causal_refuses_it() -> None:
    def kernel(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
        if attn_mask is not None and is_causal:
            raise RuntimeError("explicit attn_mask should not be set when is_causal=True")
        return by_torch(q, k, v, causal=is_causal)[0]

    result = judged(kernel, make_case(inputs=("mask",), options={"causal": True}))
    assert result.status == "refused"
    assert judged(kernel, make_case(options={"causal": True})).status == "pass"


def test_what_the_candidate_refuses_beforehand_is_not_called() -> None:
    def refuses(case: Case) -> str | None:
        return "decoding only" if case.sizes["N"] > 1 else None

    def kernel(q: Any, k: Any, v: Any) -> Any:
        assert q.shape[2] == 1
        return by_torch(q, k, v)[0]

    refused = judged(kernel, refuses=refuses)
    assert (refused.status, refused.message) == ("refused", "decoding only")
    assert judged(kernel, make_case("decode"), refuses=refuses).status == "pass"


def test_a_refusal_may_come_out_of_the_call() -> None:
    def kernel(q: Any, k: Any, v: Any) -> Any:
        raise Unsupported("head size 4")

    result = judged(kernel)
    assert (result.status, result.message) == ("refused", "head size 4")


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (make_case(inputs=("sink",)), "sink: no such parameter"),
        (make_case(options={"softcap": 3.0}), "softcap=3.0: no such parameter; always None"),
        (make_case(dtype="fp64"), "fp64: the candidate states fp32, fp16, bf16"),
    ],
)
def test_what_the_candidate_does_not_take_is_not_posed(case: Case, told: str) -> None:
    result = judged(by_torch, case)
    assert (result.status, result.message) == ("not_supported", told)


def test_an_output_of_another_dtype_passes_where_it_is_declared() -> None:
    def kernel(q: Any, k: Any, v: Any) -> Any:
        return by_torch(q, k, v)[0].float()

    assert judged(kernel, make_case(dtype="fp16")).message == "O is fp32, expected fp16"
    assert judged(kernel, make_case(dtype="fp16"), output_dtypes={"O": "fp32"}).status == "pass"


def test_a_missing_framework_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(CandidateError, match="takes JAX arrays and jax is not installed"):
        judged(by_torch, framework="jax")
