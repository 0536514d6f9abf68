"""Launching the matrix memory of `memory_chunks`: tiles, room for the systems, and outputs."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.impls.engines import runtime
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.linear_launch import strides, tile_of, value_block
from attnspec.impls.engines.memory_chunks import VECTORS, memory_kernel, memory_system_kernel
from attnspec.impls.engines.softmax_configs import padded

TILE = 16


def forward(
    Q: Tensor, K: Tensor, V: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor, W0: Tensor, S0: Tensor | None, *,
    chunk: int, slope: float, post: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs `[b,h,t,e]` in the inputs' dtype, and memory and momentum `[b,h,e,d]` in float32.

    Args:
        Q, K: `[b,h,t,d]`. V: `[b,h,t,e]`. alpha, eta, theta: `[b,h,t]`. W0, S0: `[b,h,e,d]`.
        chunk: tokens whose gradients are taken at one memory. slope: factor of the gradients. post: read after the
            token's own update.
    """
    runtime.target_of(Q)
    (B, H, T, D), E, C = Q.shape, V.shape[-1], TILE
    held = chunk > C
    group = chunk if held else C // chunk * chunk
    per_group = -(-group // C)
    tiles = T // group * per_group + -(-(T % group) // C)
    single: dict[str, Any] = {"dtype": torch.float32, "device": Q.device}
    O = torch.empty(V.shape, dtype=V.dtype, device=V.device)
    W1, S1 = torch.empty((B, H, E, D), **single), torch.empty((B, H, E, D), **single)
    block = value_block(D, E, V.dtype, backward=True)
    shared = {
        "Q": Q, **strides("q", Q, "bhtd"), "K": K, **strides("k", K, "bhtd"),
        "INV": torch.empty((B, H, tiles, C, C), **single), "SC": torch.empty((B, H, tiles, C, C), **single),
        "VEC": torch.empty((B, H, tiles, VECTORS.value, C), **single),
        "H": H, "T": T, "tiles": tiles, "per_group": per_group, "group": group, "D": D, "D_PAD": padded(D), "C": C,
        "HELD": held,
    }  # fmt: skip
    keep, stay = torch.log1p(-alpha.float()), torch.log(eta.float())
    system = {
        **shared, "KEEP": keep, **strides("keep", keep, "bht"), "STAY": stay, **strides("stay", stay, "bht"),
        "THETA": theta, **strides("theta", theta, "bht"), "slope": slope, "part": min(chunk, C), "POST": post,
    }  # fmt: skip
    walk = {
        **shared, "V": V, **strides("v", V, "bhte"), "W0": W0, **strides("w", W0, "bhed"), "S0": S0,
        **strides("s", S0, "bhed"), "O": O, **strides("o", O, "bhte"), "W1": W1, "S1": S1, "E": E, "E_BLOCK": block,
        "E_BLOCKS": -(-E // block),
    }  # fmt: skip
    Launch("memory_system", memory_system_kernel, B * H * tiles, system, tile_of(Q)).run(Q.device)
    Launch("memory", memory_kernel, B * H * walk["E_BLOCKS"], walk, tile_of(Q, backward=True)).run(Q.device)
    return O, W1, S1
