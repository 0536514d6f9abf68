"""Multi-head latent attention on Triton, absorbed form: projections around the engine `engines.latent`."""



from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime  # noqa: F401 (first: it decides how Triton is imported)
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.latent import WIDEST_LATENT, WIDEST_ROTARY, Latent, forward

EPS = 1e-6
"""Added to the mean square under the root of the latents' norm."""


@candidate(
    mechanism="mla",
    outputs=("O", "LSE"),
    output_dtypes={"LSE": "fp32"},
    differentiable=False,
    form="absorbed",
    rounding="absorbed",
)
def mla(
    Qn: Tensor, Qr: Tensor, C: Tensor, Kr: Tensor, Wuk: Tensor, Wuv: Tensor, norm_weight: Tensor | None = None,
    freq: Tensor | None = None, mask: Tensor | None = None, kv_length: Tensor | None = None, *, causal: bool = False,
    scale: float | None = None, yarn_factor: float | None = None, yarn_mscale: float = 1.0, config: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Multi-head latent attention (DeepSeek-AI, arXiv 2405.04434, Eq. 9 to 19), keys and values never formed.

    Args:
        Qn: `[b,h,i,d]`, Qr: `[b,h,i,u]`: queries without and with rotation. C: `[b,j,r]`, latents. Kr: `[b,j,u]`,
            rotary keys of all heads. Wuk: `[h,d,r]`, Wuv: `[h,e,r]`. All of one dtype: fp16, bf16 or fp32.
        norm_weight: `[r]`, the latents pass a root-mean-square norm with this weight first.
        freq: `[u/2]`, the rotary parts are rotated here, pair by pair.
        mask: bool `[b|1,h|1,i|1,j]`, True = attend. kv_length: `[b]`, tokens in use; later ones are not read.
        causal: the queries are the last tokens and see no later ones.
        scale: default (d + u) ** -0.5. yarn_factor, yarn_mscale: the scores' further factor under YaRN.
        config: a `TileConfig`, in place of the default.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype and LSE `[b,h,i]` in float32; zeros and -inf for a query that sees nothing.

    Raises: ValueError or TypeError for wrong arguments; Unsupported for latents beyond 512 (256 in fp32) or rotary
        features beyond 128, and where a gradient is asked for.
    """
    call = Arguments("mla")
    call.tensor("Qn", Qn, "b h i d")
    call.tensor("Qr", Qr, "b h i u")
    call.tensor("C", C, "b j r")
    call.tensor("Kr", Kr, "b j u")
    call.tensor("Wuk", Wuk, "h d r")
    call.tensor("Wuv", Wuv, "h e r")
    call.tensor("norm_weight", norm_weight, "r", real=True, optional=True)
    call.at_most("r", WIDEST_LATENT[Qn.dtype.itemsize])
    call.at_most("u", WIDEST_ROTARY)
    B, H, N, M, D, U, E = call.sizes("b h i j d u e")
    if freq is not None:
        if U % 2:
            raise call.wrong("Qr", "of an even number of features, which are rotated in pairs", U)
        call.tensor("freq", freq, "m", real=True)
        if freq.shape[0] != U // 2:
            raise call.wrong("freq", f"of shape [{U // 2}]", list(freq.shape))
    seen = call.boolean("mask", mask, "b h i j", "b h i")
    length = call.integers("kv_length", kv_length, "b", 0, M)
    factor = call.number("scale", scale, (D + U) ** -0.5) * _temper(call, yarn_factor, yarn_mscale)
    causal = call.flag("causal", causal)
    inputs = (Qn, Qr, C, Kr, Wuk, Wuv, norm_weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise Unsupported("mla: no kernel has gradients; call it under torch.no_grad()")
    if B * N * M == 0:
        return Qn.new_zeros((B, H, N, E)), torch.full((B, H, N), -math.inf, dtype=torch.float32, device=Qn.device)
    latent = C if norm_weight is None else _normalized(C, norm_weight)
    if freq is not None:
        tokens = torch.arange(M, device=C.device)
        present = torch.full((B,), M, device=C.device) if length is None else length.long()
        Qr = _rotated(Qr, (present - N)[:, None, None] + torch.arange(N, device=C.device), freq)
        Kr = _rotated(Kr, tokens, freq)
    problem = Latent(
        QA=torch.matmul(Qn, Wuk), QR=Qr, C=latent, KR=Kr, mask=seen,
        length=None if length is None else length.to(torch.int32).contiguous(), causal=causal, scale=factor,
    )  # fmt: skip
    Oc, LSE = forward(problem, config)
    return torch.matmul(Oc, Wuv.transpose(1, 2)), LSE


def _temper(call: Arguments, factor: Any, mscale: Any) -> float:
    """YaRN's factor of the scores (Peng et al., arXiv 2309.00071, section 3.4), squared as DeepSeek applies it."""
    weight = call.number("yarn_mscale", mscale)
    if factor is None:
        return 1.0
    extension = call.number("yarn_factor", factor)
    if extension < 1.0:
        raise call.wrong("yarn_factor", "at least 1, or None", extension)
    return (0.1 * weight * math.log(extension) + 1.0) ** 2


def _normalized(C: Tensor, weight: Tensor) -> Tensor:
    wide = C.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(C.dtype)


def _rotated(x: Tensor, position: Tensor, freq: Tensor) -> Tensor:
    """Features 2m and 2m + 1 of x `[...,u]` turned by position `[...]` times freq `[m]`.

    Angles are taken in float64: far positions would leave float32 few digits of the fraction of a turn.
    """
    angle = position.double()[..., None] * freq.double()
    cos, sin = angle.cos().float(), angle.sin().float()
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: (mechanism, label, call)."""

    def run(queries: int, tokens: int, R: int, U: int, causal: bool) -> object:
        B, H, D = 2, 16, 128
        shapes = ((B, H, queries, D), (B, H, queries, U), (B, tokens, R), (B, tokens, U), (H, D, R), (H, D, R))
        return mla(*(torch.zeros(shape, dtype=dtype) for shape in shapes), causal=causal)

    wide = 512 if dtype.itemsize == 2 else 256
    yield "mla", f"decode-{wide}", lambda: run(1, 2048, wide, 64, False)
    yield "mla", f"prefill-{wide}", lambda: run(512, 512, wide, 64, True)
    yield "mla", f"verify-{wide}", lambda: run(4, 2048, wide, 64, True)
    yield "mla", "verify-128", lambda: run(4, 2048, 128, 32, True)
