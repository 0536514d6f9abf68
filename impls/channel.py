"""Attention between channels and gates of channels on Triton, over the kernels of `engines.channel_maps`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.channel_maps import (
    channel_gates_kernel,
    channel_means_kernel,
    channel_mixing_kernel,
    channel_products_kernel,
    channel_softmax_kernel,
)
from attnspec.impls.engines.launch import Launch, without_spills
from attnspec.impls.engines.softmax_configs import padded

MOST_CHANNELS = 1024
"""Of a group: one program takes a row of the channel map."""
MOST_TAPS = 1024
BLOCKS = (32, 16, 64)
"""Positions of a tile, and the most channels of a block; the first is taken by default."""
SPAN = 1024
"""Positions whose products one program adds up, on a device."""
CELLS = 1024
"""Cells of a plane that one program takes."""


def _launch(name: str, kernel: Any, programs: int, arguments: dict[str, Any], near: Tensor, warps: int = 4) -> None:
    taken = {entry: arguments[entry] for entry in kernel.arg_names}
    Launch(name, kernel, programs, taken, without_spills(warps, runtime.target_of(near))).run(near.device)


def _strides(prefix: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, tensor.stride())}


@dataclass(frozen=True)
class _Groups:
    """One call on Q, K, V `[b,g,i,c]`."""

    Q: Tensor
    K: Tensor
    V: Tensor
    scale: float
    block: int

    def run(self) -> tuple[Tensor, Tensor]:
        B, G, N, C = self.Q.shape
        device = self.Q.device
        wide = min(padded(C), self.block)
        on_device = runtime.target_of(self.Q) is not None
        steps = max(1, min(-(-N // self.block), (SPAN if on_device else 64) // self.block))
        spans, blocks, tiles = -(-N // (steps * self.block)), -(-C // wide), -(-N // self.block)
        parts = torch.empty((B, G, spans, C, C), dtype=torch.float32, device=device)
        A = torch.empty((B, G, C, C), dtype=self.Q.dtype, device=device)
        O = torch.empty((B, G, N, C), dtype=self.Q.dtype, device=device)
        arguments = {
            "Q": self.Q, "K": self.K, "V": self.V, "PARTIAL": parts, "A": A, "O": O, **_strides("q", self.Q, "bgic"),
            **_strides("k", self.K, "bgic"), **_strides("v", self.V, "bgic"), **_strides("a", A, "bgck"),
            **_strides("o", O, "bgic"), "G": G, "N": N, "C": C, "spans": spans, "steps": steps, "blocks": blocks,
            "tiles": tiles, "scale": self.scale, "BLOCK": self.block, "BLOCK_C": wide, "C_PAD": padded(C),
        }  # fmt: skip
        # Products of float32 take no tensor cores on CUDA, and want their rows spread over more threads.
        heads, warps = B * G, 8 if self.Q.element_size() == 4 and padded(C) > 64 else 4
        _launch("channel_products", channel_products_kernel, heads * spans * blocks * blocks, arguments, self.Q, warps)
        _launch("channel_softmax", channel_softmax_kernel, heads * C, arguments, self.Q, warps)
        _launch("channel_mixing", channel_mixing_kernel, heads * tiles * blocks, arguments, self.Q, warps)
        return O, A


@candidate(mechanism="davit_channel_attention", outputs=("O", "A"), differentiable=False)
def davit_channel_attention(
    Q: Tensor, K: Tensor, V: Tensor, *, scale: float | None = None, block: int = BLOCKS[0]
) -> tuple[Tensor, Tensor]:
    """Attention between the channels of a group (Ding et al., arXiv 2204.03645, Eq. 3).

    Args:
        Q, K, V: `[b,g,i,c]`, groups of channels over pixels; K and V make the map, the channels of Q are mixed. One
            dtype: fp16, bf16 or fp32.
        scale: of the sums over pixels, default c ** -0.5.
        block: pixels of a tile, one of BLOCKS; the result does not depend on it.

    Returns:
        O `[b,g,i,c]` and the map A `[b,g,c,k]`, whose rows sum to 1, in the inputs' dtype. Not differentiable.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for groups of more than MOST_CHANNELS channels.
    """
    call = Arguments("davit_channel_attention")
    call.tensor("Q", Q, "b g i c")
    call.tensor("K", K, "b g i c")
    call.tensor("V", V, "b g i c")
    call.at_most("c", MOST_CHANNELS)
    if block not in BLOCKS:
        raise call.wrong("block", f"one of {BLOCKS}", block)
    call.no_gradients(Q, K, V)
    return _Groups(Q, K, V, call.number("scale", scale, max(Q.shape[-1], 1) ** -0.5), block).run()


@candidate(mechanism="eca_channel_attention", outputs=("O", "g"), differentiable=False)
def eca_channel_attention(X: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A gate per channel from the means of neighbouring channels (Wang et al., arXiv 1910.03151, Eq. 4-9).

    Args:
        X: `[b,c,y,x]`, fp16, bf16 or fp32. w: `[c|1,m]`, an odd number of taps: one row for all channels (ECA) or one
            per channel (ECA-NS).

    Returns:
        O `[b,c,y,x]` and the gates g `[b,c]`, in the inputs' dtype. Not differentiable.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for more than MOST_TAPS taps.
    """
    call = Arguments("eca_channel_attention")
    call.tensor("X", X, "b c y x")
    call.tensor("w", w, "r m", real=True)
    B, C, Sy, Sx, rows, T = call.sizes("b c y x r m")
    if rows not in (1, C):
        raise call.wrong("w", f"of 1 or {C} rows", rows)
    if T % 2 == 0:
        raise call.wrong("w", "of an odd number of taps", T)
    if T > MOST_TAPS:
        raise Unsupported(f"eca_channel_attention: {T} taps, the kernels hold at most {MOST_TAPS}")
    if Sy * Sx >= 2**31 - CELLS:
        raise Unsupported("eca_channel_attention: planes of 2^31 cells or more")
    call.no_gradients(X, w)
    runtime.target_of(X)
    mean = torch.empty((B, C), dtype=torch.float32, device=X.device)
    O = torch.empty(X.shape, dtype=X.dtype, device=X.device)
    gate = torch.empty((B, C), dtype=X.dtype, device=X.device)
    tiles = -(-Sy * Sx // CELLS)
    arguments = {
        "X": X, "MEAN": mean, "W": w, "O": O, "GATE": gate, **_strides("x", X, "bcyx"), **_strides("o", O, "bcyx"),
        "w_c": 0 if rows == 1 else w.stride(0), "w_m": w.stride(1), "C": C, "T": T, "area": Sy * Sx, "WIDTH": Sx,
        "tiles": tiles, "T_PAD": padded(T), "BLOCK": CELLS,
    }  # fmt: skip
    _launch("channel_means", channel_means_kernel, B * C, arguments, X)
    _launch("channel_gates", channel_gates_kernel, B * C * tiles, arguments, X)
    return O, gate


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(mechanism, label, call) for the ahead-of-time compiler."""

    def groups() -> object:
        Q, K, V = (torch.zeros(1, 3, 784, 32, dtype=dtype) for _ in range(3))
        return davit_channel_attention(Q, K, V)

    def large_groups() -> object:
        Q, K, V = (torch.zeros(1, 2, 784, 128, dtype=dtype) for _ in range(3))
        return davit_channel_attention(Q, K, V, block=64)

    def gates() -> object:
        return eca_channel_attention(torch.zeros(2, 64, 28, 28, dtype=dtype), torch.zeros(1, 3, dtype=dtype))

    yield "davit_channel_attention", "c32", groups
    yield "davit_channel_attention", "c128", large_groups
    yield "eca_channel_attention", "taps3", gates
