"""Third-order (Kronecker) attention on Triton, over the kernel of `engines.pair_attention`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines import runtime
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.pair_attention import pair_attention_kernel
from attnspec.impls.engines.softmax_configs import TileConfig, interpreted_tile, padded

MOST_FEATURES = 256
INTERPRETED = (TileConfig(16, 32, 1, 1), TileConfig(32, 16, 1, 1))


def configs(D: int, E: int, itemsize: int, target: runtime.Target | None) -> tuple[TileConfig, ...]:
    """Tile configurations for these features, the preferred one first."""
    if target is None:
        return INTERPRETED
    wide = max(padded(D), padded(E))
    limit = 255 if target[0] == "cuda" else 0
    warps = 8 if target[0] == "cuda" and (wide > 64 or itemsize == 4) else 4
    if wide > 128:
        return (TileConfig(16, 16, warps, 1, registers=limit),)
    if itemsize == 4 and wide > 64:
        return (TileConfig(32, 16, warps, 1, registers=limit), TileConfig(16, 16, warps, 1, registers=limit))
    return (TileConfig(32, 32, warps, 1, registers=limit), TileConfig(16, 32, warps, 1, registers=limit))


def _strides(prefix: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, tensor.stride())}


@candidate(
    mechanism="kronecker_tensor_attention", outputs=("O", "LSE"), output_dtypes={"LSE": "fp32"}, form="nested",
    differentiable=False,
)  # fmt: skip
def kronecker_tensor_attention(
    Q: Tensor, K1: Tensor, K2: Tensor, V1: Tensor, V2: Tensor, *, causal: bool = False, scale: float | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax over pairs of keys by three-way products (Alman and Song, arXiv 2310.04064, Definition 1.2).

    Args:
        Q: `[b,h,i,d]`. K1: `[b,g,j,d]`, V1: `[b,g,j,e]`. K2: `[b,g,l,d]`, V2: `[b,g,l,e]`; head h reads key head
            h // (H / Hk). One dtype: fp16, bf16 or fp32, d and e at most 256.
        causal: query i sees the pairs with j <= i and l <= i. scale: default 1 / d. config: the tile of the kernel.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype and LSE `[b,h,i]` in float32; zeros and -inf without a pair. Not
        differentiable.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256.
    """
    call = Arguments("kronecker_tensor_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K1", K1, "b g j d")
    call.tensor("K2", K2, "b g l d")
    call.tensor("V1", V1, "b g j e")
    call.tensor("V2", V2, "b g l e")
    call.at_most("d e", MOST_FEATURES)
    B, H, Hk, N, M, L, D, E = call.sizes("b h g i j l d e")
    if Hk < 1 or H % Hk:
        raise call.wrong("Q", f"of a multiple of {Hk} heads, as K1 has", H)
    factor = call.number("scale", scale, 1.0 / max(D, 1))
    call.no_gradients(Q, K1, K2, V1, V2)
    target = runtime.target_of(Q)
    known = configs(D, E, Q.dtype.itemsize, target)
    tile = config or (known[0] if target else interpreted_tile(known, N, M * L))
    O = torch.empty((B, H, N, E), dtype=Q.dtype, device=Q.device)
    LSE = torch.empty((B, H, N), dtype=torch.float32, device=Q.device)
    tiles = -(-N // tile.block_m)
    arguments: dict[str, Any] = {
        "Q": Q, "K1": K1, "K2": K2, "V1": V1, "V2": V2, "O": O, "LSE": LSE, **_strides("q", Q, "bhid"),
        **_strides("k1", K1, "bgjd"), **_strides("k2", K2, "bgld"), **_strides("v1", V1, "bgje"),
        **_strides("v2", V2, "bgle"), **_strides("o", O, "bhie"), "H": H, "G": H // Hk, "N": N, "M": M, "L": L,
        "tiles": tiles, "scale": factor, "D": D, "E": E, "D_PAD": padded(D), "E_PAD": padded(E),
        "CAUSAL": call.flag("causal", causal), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip
    Launch("pair_attention", pair_attention_kernel, B * H * tiles, arguments, tile).run(Q.device)
    return O, LSE


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(mechanism, label, call) for the ahead-of-time compiler."""
    for D, causal in ((64, False), (128, True), (256, True)):

        def call(D: int = D, causal: bool = causal) -> object:
            Q, K1, K2, V1, V2 = (torch.zeros(1, 2, 128, D, dtype=dtype) for _ in range(5))
            return kronecker_tensor_attention(Q, K1, K2, V1, V2, causal=causal)

        yield "kronecker_tensor_attention", f"{'causal' if causal else 'plain'}-d{D}", call
