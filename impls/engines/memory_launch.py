"""Launching the matrix memory of `memory_chunks`: tiles, room for the systems, and outputs."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.impls.engines import runtime
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.linear_launch import strides
from attnspec.impls.engines.memory_chunks import VECTORS, memory_kernel, memory_system_kernel
from attnspec.impls.engines.softmax_configs import TileConfig, padded

TILES = (16, 32)
"""Tokens of a tile: on a device, where memory and momentum fill the registers, and of long calls in the interpreter."""
BLOCK = 16
"""Value features of a program; in the interpreter's tiles all of them."""
NOTHING = -192.0
"""A binary logarithm of what is 0 in float32, for gates of 0: sums stay finite, and so do products with zeros."""
GRAIN = 2048.0
"""Coarse logarithms are multiples of 1 / GRAIN: sums of 32 down to NOTHING are then exact in float32."""


def _config(Q: Tensor, tile: int, wide: bool) -> TileConfig:
    """Products of float32 take no tensor cores on CUDA, and want their rows spread over more threads, as does a state
    of many features (`wide`). A stated limit keeps the assembler from spilling registers for more resident warps."""
    target = runtime.target_of(Q)
    cuda = target is not None and target[0] == "cuda"
    many = Q.dtype == torch.float32 or (wide and (Q.dtype == torch.float16 or padded(Q.shape[-1]) > 64))
    return TileConfig(tile, BLOCK, 8 if cuda and many else 4, 1, registers=255 if cuda else 0)


def forward(
    Q: Tensor, K: Tensor, V: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor, W0: Tensor, S0: Tensor | None, *,
    chunk: int, slope: float, post: bool, tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs `[b,h,t,e]` in the inputs' dtype, and memory and momentum `[b,h,e,d]` in float32.

    Args:
        Q, K: `[b,h,t,d]`. V: `[b,h,t,e]`. alpha, eta, theta: `[b,h,t]`. W0, S0: `[b,h,e,d]`.
        chunk: tokens whose gradients are taken at one memory. slope: factor of the gradients. post: read after the
            token's own update.
        tile: tokens taken together, one of TILES; None: what suits the device. The result does not depend on it.
    """
    (B, H, T, D), E = Q.shape, V.shape[-1]
    # In the interpreter an operation costs the same whatever its size: larger tiles, and all features in one program.
    interpreted = runtime.target_of(Q) is None
    small, large = TILES
    C = tile or (large if interpreted and small < T else small)
    block = padded(E) if interpreted and large == C else BLOCK
    held = chunk > C
    group = chunk if held else C // chunk * chunk
    per_group = -(-group // C)
    tiles = T // group * per_group + -(-(T % group) // C)
    single: dict[str, Any] = {"dtype": torch.float32, "device": Q.device}
    logs = torch.stack([torch.log1p(-alpha.double()) / math.log(2.0), torch.log2(eta.double())]).clamp(min=NOTHING)
    coarse = (logs * GRAIN).round() / GRAIN
    gates = torch.cat([coarse, logs - coarse, slope * theta.double()[None]]).float()
    O = torch.empty(V.shape, dtype=V.dtype, device=V.device)
    W1, S1 = torch.empty((B, H, E, D), **single), torch.empty((B, H, E, D), **single)
    shared = {
        "Q": Q, **strides("q", Q, "bhtd"), "K": K, **strides("k", K, "bhtd"),
        "INV": torch.empty((B, H, tiles, C, C), **single), "SC": torch.empty((B, H, tiles, C, C), **single),
        "VEC": torch.empty((B, H, tiles, VECTORS.value, C), **single),
        "H": H, "T": T, "tiles": tiles, "per_group": per_group, "group": group, "D": D, "D_PAD": padded(D), "C": C,
        "HELD": held,
    }  # fmt: skip
    system = {**shared, "GATES": gates, "gate_x": gates.stride(0), "part": min(chunk, C), "POST": post}
    walk = {
        **shared, "V": V, **strides("v", V, "bhte"), "W0": W0, **strides("w", W0, "bhed"), "S0": S0,
        **strides("s", S0, "bhed"), "O": O, **strides("o", O, "bhte"), "W1": W1, "S1": S1, "E": E, "E_BLOCK": block,
        "E_BLOCKS": -(-E // block), "WIDE": Q.dtype != torch.bfloat16,
    }  # fmt: skip
    Launch("memory_system", memory_system_kernel, B * H * tiles, system, _config(Q, C, False)).run(Q.device)
    Launch("memory", memory_kernel, B * H * walk["E_BLOCKS"], walk, _config(Q, C, True)).run(Q.device)
    return O, W1, S1
