"""Length-scaled softplus attention and its re-weighting on Triton: a thin mechanism over `engines.mapped_launch`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines import runtime  # noqa: F401 (first: it decides how Triton is imported)
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.mapped_launch import ACTIVATIONS, MOST_FEATURES, Call, attend
from attnspec.impls.engines.softmax_configs import TileConfig


@candidate(mechanism="lssa_softplus_attention", outputs=("O",))
def lssa_softplus_attention(
    Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None, *, causal: bool = True, reweight: bool = False,
    power: int = 15, offset_rows: int = 3, eps: float = 1e-8, activation: str = "softplus", normalize_qk: bool = True,
    scale: float | None = None, config: TileConfig | None = None,
) -> Tensor:  # fmt: skip
    """Attention by softplus of scaled cosines over their sum, LSSA, and re-weighted, LSSAR (arXiv 2501.13428).

    Args:
        Q: `[b,h,i,d]`, the last of the positions. K: `[b,h,j,d]`. V: `[b,h,j,e]`. All of one dtype: fp16, bf16 or fp32,
            d at least 2, d and e at most 256.
        mask: bool `[b|1,h|1,i|1,j]`, True = attend.
        causal: query i sees the keys up to i + M - N.
        reweight: the second stage: what exceeds the average to a power, divided by its sum plus eps. The first
            offset_rows positions of a causal call have no average to exceed.
        activation: "softplus", "exp" or "sigmoid". normalize_qk: cosines instead of dot products.
        scale: their factor, default ln(d) times the logarithm of the number of keys that a row sees.
        config: tiles of all kernels of this call.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype, differentiable in Q, K and V.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256.
    """
    call = Arguments("lssa_softplus_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h j d")
    call.tensor("V", V, "b h j e")
    call.at_most("d e", MOST_FEATURES)
    if Q.shape[-1] < 2:
        raise call.wrong("Q", "of at least 2 features", Q.shape[-1])
    mask = call.boolean("mask", mask, "b h i j", "b h i")
    if activation not in ACTIVATIONS:
        raise call.wrong("activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    power, offset_rows = call.count("power", power), call.count("offset_rows", offset_rows, 0)
    eps = call.number("eps", eps)
    if eps < 0.0:
        raise call.wrong("eps", "at least 0", eps)
    return attend(Call(
        Q, K, V, mask, call.flag("causal", causal), None if scale is None else call.number("scale", scale),
        activation, call.flag("normalize_qk", normalize_qk), power=power if call.flag("reweight", reweight) else None,
        eps=eps, offset_rows=offset_rows, config=config,
    ))  # fmt: skip


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(mechanism, label, call) for the ahead-of-time compiler: forward and backward."""
    for label, D, reweight, masked in (
        ("first", 64, False, False),
        ("mask", 128, True, True),
        ("second", 256, True, False),
    ):

        def call(D: int = D, reweight: bool = reweight, masked: bool = masked) -> object:
            Q, K, V = (torch.zeros(1, 2, 512, D, dtype=dtype, requires_grad=True) for _ in range(3))
            mask = torch.ones(1, 1, 512, 512, dtype=torch.bool) if masked else None
            O = lssa_softplus_attention(Q, K, V, mask, reweight=reweight)
            O.sum().backward()
            return O

        yield "lssa_softplus_attention", f"{label}-d{D}", call
