"""Softmax attention on Triton: the public function, its launch of the engines, and its gradients for torch.autograd.

    O, LSE = softmax_attention(Q, K, V, causal=True, window_left=127)

Used directly and as a candidate of the conformance suite. Refuses (with `Unsupported`) head sizes above 256, dtypes
other than fp16, bf16 and fp32, and gradients through a paged cache. Runs on CUDA and ROCm devices, and on the CPU in
Triton's interpreter.

The mechanism: Vaswani et al., arXiv 1706.03762, Eq. 1; its options are those of
`spec/mechanisms/softmax/softmax_attention.toml`.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime  # first: it decides how Triton is imported
from attnspec.impls.engines.softmax_configs import KINDS, TileConfig
from attnspec.impls.engines.softmax_configs import configs as tile_configs
from attnspec.impls.engines.softmax_launch import empty_outputs, plan_backward, plan_forward
from attnspec.impls.softmax_arguments import Problem, check

__all__ = ["configs", "softmax_attention"]


def forward(p: Problem, config: Any = None) -> tuple[Tensor, Tensor]:
    """O in the inputs' dtype and LSE in float32."""
    if p.M == 0 or p.B * p.N == 0:
        return empty_outputs(p)
    launches, O, LSE = plan_forward(p, config, runtime.target_of(p.Q), runtime.processors(p.Q))
    for launch in launches:
        launch.run(p.Q.device)
    return O, LSE


def backward(
    p: Problem, O: Tensor, LSE: Tensor, dO: Tensor | None, dLSE: Tensor | None, wanted: dict[str, bool],
    bias: Tensor | None, config: Any = None, dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of the wanted inputs, each of its input's shape and dtype; `dtype`: another one for those of Q, K, V.

    Mechanisms that add to these gradients take them in float32, so that each is rounded once.
    """
    if p.M == 0 or p.B * p.N == 0:
        grads = {name: torch.zeros_like(x, dtype=dtype) for name, x in (("Q", p.Q), ("K", p.K), ("V", p.V))}
        if bias is not None:
            grads["bias"] = torch.zeros_like(bias)
        T = torch.zeros_like(LSE) if dLSE is None else -dLSE
    else:
        launches, grads = plan_backward(
            p, O, LSE, O.new_zeros(1).expand(O.shape) if dO is None else dO, dLSE, wanted,
            None if bias is None else tuple(bias.shape), config, runtime.target_of(p.Q), dtype,
        )  # fmt: skip
        for launch in launches:
            launch.run(p.Q.device)
        T = grads.pop("T")
        if bias is not None and "bias" in grads:
            grads["bias"] = grads["bias"].to(bias.dtype)
    if p.sink is not None and wanted["sink"]:
        s = p.sink.to(torch.float32)[None, :, None]
        # A sink of -inf takes part in nothing; where it does, LSE is finite.
        grads["sink"] = -torch.where(s > float("-inf"), torch.exp(s - LSE) * T, 0.0).sum((0, 2)).to(p.sink.dtype)
    return {name: grad for name, grad in grads.items() if wanted.get(name)}


class _SoftmaxAttention(torch.autograd.Function):  # type: ignore[misc]
    """Saves Q, K, V, O and LSE; the weights are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, bias: Any, sink: Any, problem: Problem, config: Any) -> Any:
        ctx.set_materialize_grads(False)
        O, LSE = forward(problem, config)
        # Saved for autograd's check that nobody changed them in between; the problem holds the same tensors.
        ctx.save_for_backward(Q, K, V, bias, sink, O, LSE)
        ctx.problem, ctx.config = problem, config
        return O, LSE

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor | None, dLSE: Tensor | None) -> Any:
        *_, bias, _, O, LSE = ctx.saved_tensors
        wanted = dict(zip(("Q", "K", "V", "bias", "sink"), ctx.needs_input_grad))
        if dO is None and dLSE is None:
            return (None,) * 7
        grads = backward(ctx.problem, O, LSE, dO, dLSE, wanted, bias, ctx.config)
        return (*(grads.get(name) for name in wanted), None, None)


def softmax_attention(
    Q: Tensor,
    K: Tensor | None = None,
    V: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    q_segment: Tensor | None = None,
    kv_segment: Tensor | None = None,
    q_length: Tensor | None = None,
    kv_length: Tensor | None = None,
    left_pad: Tensor | None = None,
    k_pages: Tensor | None = None,
    v_pages: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    chunk: int | None = None,
    sink_tokens: int = 0,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over [b, h, i, d] tensors with any strides; returns (O [b, h, i, e], LSE [b, h, i] in float32).

    Args:
        Q: queries [b, h, i, d]. K, V: keys [b, g, j, d], values [b, g, j, e]. Head h reads key/value head
            h // (H / Hk). All of one dtype: fp16, bf16 or fp32. Head sizes d and e are 1..256 and may differ.
        bias: [b|1, h|1, i|1, j], added to the scaled and capped logits; -inf removes the pair.
        mask: bool [b|1, h|1, i|1, j], True = attend. dropout_mask: bool [b, h, i, j], True = keep.
        sink: [h], a logit that joins the normalizer and carries no value.
        q_segment, kv_segment: [b, i], [b, j] sequence ids of packed tokens; negative = padding.
        q_length, kv_length, left_pad: [b], in tokens. Tokens outside are never read; their rows are zero.
        k_pages, v_pages: [page, slot, g, d|e] with block_table [b, k], instead of K and V; what lies beyond kv_length
            is not read.
        causal: query i sees keys up to its own position, which is i + keys - queries ("bottom_right") or i ("top_left")
            by causal_alignment; the same positions count for windows and chunks.
        window_left, window_right: inclusive distances. sink_tokens: first keys, exempt from the left bound.
        softcap: c * tanh(s / c). scale: default d ** -0.5; any sign, 0 allowed.
        dropout_p: kept weights are divided by 1 - dropout_p. chunk: query and key must share a chunk of this length.
        config: a `TileConfig` for all kernels of this call, in place of the default of the device.

    A query that may attend to nothing yields zeros and LSE = -inf (with a sink: the sink's logit). Deterministic.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for what this implementation does not offer.
    """
    problem = check(
        Q, K, V, bias=bias, mask=mask, sink=sink, dropout_mask=dropout_mask, q_segment=q_segment, kv_segment=kv_segment,
        q_length=q_length, kv_length=kv_length, left_pad=left_pad, k_pages=k_pages, v_pages=v_pages,
        block_table=block_table, causal=causal, causal_alignment=causal_alignment, window_left=window_left,
        window_right=window_right, softcap=softcap, scale=scale, dropout_p=dropout_p, chunk=chunk,
        sink_tokens=sink_tokens,
    )  # fmt: skip
    differentiable = [problem.Q, problem.K, problem.V, bias, sink]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        if problem.block_table is not None:
            raise Unsupported("softmax_attention: no gradients through a paged cache; call it under torch.no_grad()")
        O, LSE = _SoftmaxAttention.apply(problem.Q, problem.K, problem.V, bias, sink, problem, config)
        return O, LSE
    return forward(problem, config)


def configs(
    kind: str = "forward", D: int = 64, E: int | None = None, dtype: torch.dtype = torch.float16
) -> list[TileConfig]:
    """The tile configurations of one kernel on this machine, the preferred one first; each can be passed as `config=`.

    kind: "forward", "decode", "dq", "dkv" or "dbias". E: value head size, D if not given.
    """
    if kind not in KINDS:
        raise ValueError(f"configs: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return tile_configs(kind, D, D if E is None else E, dtype.itemsize, runtime.current_target())
