"""3 x 3 depthwise convolution of tokens that lie on a map, row after row, and the gradient of its kernel.

Tokens stay where they are, [b, h, token, feature] with any strides; channel c = h * E + e has a kernel of its own. The
first `first` tokens (a class token) are not on the map. What lies outside the map is zero. The gradient of the input
is the same convolution with the kernel turned by 180 degrees. Nothing is added atomically: partial sums of the
kernel's gradient go to a workspace.
"""

# ruff: noqa: PIE808 (Triton takes Python only as far as this: ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.impls.engines import runtime
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.softmax_configs import padded
from attnspec.impls.engines.softmax_tiles import narrowed, widened

TOKENS = 32
WIDEST = 64
"""Tokens and features of a program's tile."""
TILES_PER_PART = 16
TAPS = 9


@triton.jit
def neighbour(cell, tap, width, cells):
    """(step, whether it is on the map) from the cells to their neighbours at tap = 3 * y + x, both 0..2."""
    y = tap // 3 - 1
    x = tap % 3 - 1
    step = y * width + x
    column = cell % width + x
    found = (cell >= 0) & (column >= 0) & (column < width) & (cell // width + y >= 0) & (cell + step < cells)
    return step, found


@triton.jit(do_not_specialize=["H", "T", "width", "first"])
def depthwise_kernel(
    X, BASE, W, BIAS, OUT, x_b, x_h, x_t, x_e, a_b, a_h, a_t, a_e, w_c, w_y, w_x, bias_c, o_b, o_h, o_t, o_e,
    H, T, width, first, own, E: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr, TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT = BASE + own * X + conv(X) + BIAS; W None: without convolution. Program: a tile of tokens and features."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK)
    t = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    e = pid // tiles % E_BLOCKS * E_BLOCK + tl.arange(0, E_BLOCK)
    h = pid // (tiles * E_BLOCKS) % H
    b = pid // (tiles * E_BLOCKS) // H
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    t64 = t.to(tl.int64)
    e64 = e.to(tl.int64)
    c64 = h64 * E + e64
    real = (t < T)[:, None] & (e < E)[None, :]
    base = BASE + (b64 * a_b + h64 * a_h + t64 * a_t)[:, None] + (e64 * a_e)[None, :]
    x_base = X + (b64 * x_b + h64 * x_h)
    acc = widened(tl.load(base, mask=real, other=0.0))
    if own != 0.0:
        acc += own * widened(tl.load(x_base + (t64 * x_t)[:, None] + (e64 * x_e)[None, :], mask=real, other=0.0))
    if W is not None:
        cell = t - first
        total = tl.zeros([BLOCK, E_BLOCK], tl.float32)
        for tap in range(0, 9):
            step, found = neighbour(cell, tap, width, T - first)
            taken = tap
            if TURNED:
                taken = 8 - tap
            weight = widened(tl.load(W + c64 * w_c + (taken // 3) * w_y + (taken % 3) * w_x, mask=e < E, other=0.0))
            there = real & found[:, None]
            x = tl.load(x_base + ((t + step).to(tl.int64) * x_t)[:, None] + (e64 * x_e)[None, :], mask=there, other=0.0)
            # A weight that is not finite must not reach a token that has no such neighbour.
            total += tl.where(there, weight[None, :] * widened(x), 0.0)
        if BIAS is not None:
            bias = widened(tl.load(BIAS + c64 * bias_c, mask=e < E, other=0.0))
            total += tl.where((cell >= 0)[:, None], bias[None, :], 0.0)
        acc += total
    out = OUT + (b64 * o_b + h64 * o_h + t64 * o_t)[:, None] + (e64 * o_e)[None, :]
    tl.store(out, narrowed(acc, OUT.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["H", "T", "width", "first", "parts"])
def depthwise_weight_kernel(
    X, DO, PART, x_b, x_h, x_t, x_e, do_b, do_h, do_t, do_e, H, T, width, first, parts,
    E: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Rows 0..8 of PART [b, part, 16, channel]: the kernel's gradient over a part of the tokens; row 9: the bias's."""
    pid = tl.program_id(0)
    part = pid % parts
    e = pid // parts % E_BLOCKS * E_BLOCK + tl.arange(0, E_BLOCK)
    h64 = (pid // (parts * E_BLOCKS) % H).to(tl.int64)
    b64 = (pid // (parts * E_BLOCKS) // H).to(tl.int64)
    e64 = e.to(tl.int64)
    rows = tl.arange(0, 16)
    x_base = X + (b64 * x_b + h64 * x_h)
    do_base = DO + (b64 * do_b + h64 * do_h)
    acc = tl.zeros([16, E_BLOCK], tl.float32)
    for it in range(0, TILES):
        t = (part * TILES + it) * BLOCK + tl.arange(0, BLOCK)
        cell = t - first
        on_map = ((t < T) & (cell >= 0))[:, None] & (e < E)[None, :]
        do = tl.load(do_base + (t.to(tl.int64) * do_t)[:, None] + (e64 * do_e)[None, :], mask=on_map, other=0.0)
        do = widened(do)
        acc += tl.where((rows == 9)[:, None], tl.sum(do, axis=0)[None, :], 0.0)
        for tap in range(0, 9):
            step, found = neighbour(cell, tap, width, T - first)
            there = on_map & found[:, None]
            x = tl.load(x_base + ((t + step).to(tl.int64) * x_t)[:, None] + (e64 * x_e)[None, :], mask=there, other=0.0)
            grad = tl.sum(tl.where(there, do * widened(x), 0.0), axis=0)
            acc += tl.where((rows == tap)[:, None], grad[None, :], 0.0)
    channels = H.to(tl.int64) * E
    out = PART + (b64 * parts + part) * 16 * channels + h64 * E
    tl.store(out + (rows.to(tl.int64) * channels)[:, None] + e64[None, :], acc, mask=(e < E)[None, :])


def _strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def _sizes(x: Tensor, width: int, first: int) -> dict[str, Any]:
    block = min(padded(x.shape[3]), WIDEST)
    return {
        "H": x.shape[1], "T": x.shape[2], "width": min(width, x.shape[2] + 1), "first": first, "E": x.shape[3],
        "E_BLOCK": block, "E_BLOCKS": -(-x.shape[3] // block), "BLOCK": TOKENS,
    }  # fmt: skip


def depthwise(
    x: Tensor, base: Tensor, weight: Tensor | None, bias: Tensor | None, *, width: int, first: int, own: float,
    dtype: torch.dtype, turned: bool = False,
) -> Tensor:  # fmt: skip
    """`base + own * x + conv(x) + bias`, all `[b,h,token,e]`, in `dtype`, rounded once.

    Args:
        weight: `[c,3,3]`; None: without the convolution. bias: `[c]`, added to the tokens on the map.
        width: columns of the map. first: tokens before the map. turned: the convolution's transpose.
    """
    runtime.target_of(x)
    out = torch.empty(base.shape, dtype=dtype, device=x.device)
    sizes = _sizes(x, width, first)
    arguments = {
        "X": x, "BASE": base, "W": weight, "BIAS": bias, "OUT": out, **_strides("x", x, "bhte"),
        **_strides("a", base, "bhte"), **_strides("w", weight, "cyx"), **_strides("bias", bias, "c"),
        **_strides("o", out, "bhte"), "own": float(own), "TURNED": turned, **sizes,
    }  # fmt: skip
    programs = x.shape[0] * x.shape[1] * sizes["E_BLOCKS"] * -(-x.shape[2] // TOKENS)
    Launch("depthwise", depthwise_kernel, programs, arguments, None).run(x.device)
    return out


def depthwise_weights(x: Tensor, dO: Tensor, *, width: int, first: int) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution's kernel `[c,3,3]` and of its bias `[c]`, in float32."""
    runtime.target_of(x)
    B, H, T, E = x.shape
    parts = -(-T // (TOKENS * TILES_PER_PART))
    found = torch.empty((B, parts, 16, H * E), dtype=torch.float32, device=x.device)
    sizes = _sizes(x, width, first)
    arguments = {
        "X": x, "DO": dO, "PART": found, **_strides("x", x, "bhte"), **_strides("do", dO, "bhte"), "parts": parts,
        "TILES": min(TILES_PER_PART, max(1, -(-T // TOKENS))), **sizes,
    }  # fmt: skip
    programs = B * H * sizes["E_BLOCKS"] * parts
    Launch("depthwise_weights", depthwise_weight_kernel, programs, arguments, None).run(x.device)
    total = found.sum((0, 1))
    return total[:TAPS].T.reshape(H * E, 3, 3), total[TAPS]
