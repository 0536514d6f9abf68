"""Clipped softmax and gated attention on Triton: a thin mechanism over the engine `engines.mapped_launch`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines import runtime  # noqa: F401 (first: it decides how Triton is imported)
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.mapped_launch import MOST_FEATURES, Call, attend
from attnspec.impls.engines.softmax_configs import TileConfig


@candidate(mechanism="clipped_softmax_gated_attention", outputs=("O",))
def clipped_softmax_gated_attention(
    Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None, X: Tensor | None = None, bg: Tensor | None = None,
    w: Tensor | None = None, w1: Tensor | None = None, b1: Tensor | None = None, w2: Tensor | None = None,
    wa: Tensor | None = None, *, zeta: float = 1.0, gamma: float = 0.0, alpha: float | None = None,
    max_length: int | None = None, causal: bool = False, gate_mean: bool = False, gsf: float = 1.0,
    scale: float | None = None, config: TileConfig | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention with probabilities stretched to [gamma, zeta] and clipped to [0, 1], and a gate per head.

    Bondarenko et al., arXiv 2306.12929, Eq. 4 (clipped softmax), Eq. 5-6 and appendix B (gates).

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. All of one dtype: fp16, bf16 or fp32, d and e at most 256.
        mask: bool `[b|1,h|1,i|1,j]`, True = attend.
        X: `[b,i,h*d]`, the layer's input, with a gate's weights: w `[h,d]`, or w1 `[h,z,d]`, b1 `[h,z]` and w2 `[h,z]`,
            or wa `[h,h*d]`. bg: `[h]`, the gate's bias; alone it is the unconditional gate.
        zeta, gamma: ends of the stretch. alpha: gamma = -alpha / max_length instead.
        causal: query i sees the keys up to i + M - N. gate_mean: gate logits are averaged over the queries.
        gsf: factor of the gates that read X. scale: default d ** -0.5. config: tiles of all kernels of this call.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype, differentiable in all inputs but the mask.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256.
    """
    call = Arguments("clipped_softmax_gated_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h j d")
    call.tensor("V", V, "b h j e")
    call.at_most("d e", MOST_FEATURES)
    mask = call.boolean("mask", mask, "b h i j", "b h i")
    h, d = call.sizes("h d")
    call.lengths["f"] = h * d
    for name, value, axes in (
        ("X", X, "b i f"), ("bg", bg, "h"), ("w", w, "h d"), ("w1", w1, "h z d"), ("b1", b1, "h z"), ("w2", w2, "h z"),
        ("wa", wa, "h f"),
    ):  # fmt: skip
        call.tensor(name, value, axes, real=True, optional=True)
    if (w1 is None) != (w2 is None) or (w1 is None) != (b1 is None):
        raise ValueError("clipped_softmax_gated_attention: w1, b1 and w2 go together")
    gates = sum(x is not None for x in (w, w1, wa))
    if gates > 1:
        raise ValueError("clipped_softmax_gated_attention: give one gate: w, or w1 with b1 and w2, or wa")
    if (X is not None) != (gates == 1):
        raise ValueError("clipped_softmax_gated_attention: X and a gate's weights (w, w1 or wa) go together")
    if X is not None and bg is None:
        raise ValueError("clipped_softmax_gated_attention: a gate needs its bias bg")
    low, high = call.number("gamma", gamma), call.number("zeta", zeta)
    if high < 0.0:
        raise call.wrong("zeta", "at least 0", zeta)
    if not -1.0 <= low <= 0.0:
        raise call.wrong("gamma", "within -1..0", gamma)
    if alpha is not None:
        if max_length is None:
            raise ValueError("clipped_softmax_gated_attention: alpha needs max_length")
        low = -call.number("alpha", alpha) / call.count("max_length", max_length)
        if low > 0.0:
            raise call.wrong("alpha", "at least 0", alpha)
    problem = Call(
        Q, K, V, mask, call.flag("causal", causal), call.number("scale", scale, d**-0.5), clip=(low, high),
        config=config,
    )  # fmt: skip
    gate = None
    if bg is not None:
        mean = call.flag("gate_mean", gate_mean)
        gate = _gate(Q, X, bg, w, w1, b1, w2, wa, mean, call.number("gsf", gsf))
    return attend(problem, gate)


def _gate(
    Q: Tensor, X: Tensor | None, bg: Tensor, w: Tensor | None, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None,
    wa: Tensor | None, mean: bool, factor: float,
) -> Tensor:  # fmt: skip
    """`[b,h,i]` in float32, contiguous; differentiated by autograd, as it is small beside the attention."""
    B, H, N, D = Q.shape
    logit = bg.float()[None, :, None].expand(B, H, N)
    if X is not None:
        x = X.float()
        heads = x.unflatten(2, (H, D)).transpose(1, 2)
        if w is not None:
            logit = logit + torch.matmul(heads, w.float()[:, :, None]).squeeze(-1)
        elif wa is not None:
            logit = logit + torch.matmul(x, wa.float().t()).transpose(1, 2)
        else:
            assert w1 is not None and b1 is not None and w2 is not None
            hidden = torch.relu(torch.matmul(heads, w1.float().transpose(1, 2)) + b1.float()[:, None, :])
            logit = logit + torch.matmul(hidden, w2.float()[:, :, None]).squeeze(-1)
    if mean:
        logit = logit.mean(-1, keepdim=True).expand(B, H, N)
    gate = torch.sigmoid(logit)
    return (gate if X is None else gate * factor).contiguous()


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(mechanism, label, call) for the ahead-of-time compiler: forward and backward."""
    for label, D, causal, masked in (
        ("causal", 64, True, False),
        ("mask", 128, True, True),
        ("plain", 256, False, False),
    ):

        def call(D: int = D, causal: bool = causal, masked: bool = masked) -> object:
            Q, K, V = (torch.zeros(1, 2, 512, D, dtype=dtype, requires_grad=True) for _ in range(3))
            mask = torch.ones(1, 1, 512, 512, dtype=torch.bool) if masked else None
            bg = torch.zeros(2, dtype=dtype)
            O = clipped_softmax_gated_attention(Q, K, V, mask, bg=bg, gamma=-0.03, causal=causal)
            O.sum().backward()
            return O

        yield "clipped_softmax_gated_attention", f"{label}-d{D}", call
