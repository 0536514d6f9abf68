"""Pointwise maps between channels, each followed by a gate from a depthwise convolution: one kernel for both.

    o[b,o,p] = (sum_c w[o,c] x[b,c,p] + bias[o]) * scale * (sum_vu dw[o,v,u] group[b,o,p + (v,u)] + dw_bias[o])

p runs over the cells of a plane, row by row; the gate's factor is left out where there is no group, and without w the
channels of x are taken as they are (Rao et al., arXiv 2207.14284, Eq. 3.3-3.6). Launched by `attnspec.impls.hornet`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.channel_maps import plane
from attnspec.impls.engines.softmax_tiles import narrowed, product, widened

SIZES = ["C_IN", "C_OUT", "Sy", "Sx", "tiles", "blocks"]


@triton.jit(do_not_specialize=SIZES)
def gated_map_kernel(
    X, W, BIAS, GROUP, DW, DW_BIAS, OUT,
    x_b, x_c, x_y, x_x, w_o, w_c, group_b, group_c, group_y, group_x, dw_c, dw_v, dw_u, out_b, out_c, out_y, out_x,
    bias_o, dw_bias_c, C_IN, C_OUT, Sy, Sx, tiles, blocks, scale,
    R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A block of output channels of a tile of cells."""
    program = tl.program_id(0)
    o = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    at = program // blocks % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (program // blocks // tiles).to(tl.int64)
    o64 = o.to(tl.int64)
    real = o < C_OUT
    inside = at < Sy * Sx
    mask = real[:, None] & inside[None, :]
    cells = plane(at, x_y, x_x, Sx)
    X += b * x_b
    if W is None:
        acc = widened(tl.load(X + (o64 * x_c)[:, None] + cells[None, :], mask=mask, other=0.0))
    else:
        acc = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for start in range(0, C_IN, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            c64 = c.to(tl.int64)
            w_mask = real[:, None] & (c < C_IN)[None, :]
            w = tl.load(W + (o64 * w_o)[:, None] + (c64 * w_c)[None, :], mask=w_mask, other=0.0)
            x_mask = (c < C_IN)[:, None] & inside[None, :]
            x = tl.load(X + (c64 * x_c)[:, None] + cells[None, :], mask=x_mask, other=0.0)
            acc = product(w, x, acc)
        if BIAS is not None:
            acc += widened(tl.load(BIAS + o64 * bias_o, mask=real, other=0.0))[:, None]
    if GROUP is not None:
        GROUP += b * group_b
        y = at // Sx
        x = at % Sx
        reach = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for tap in range(R * R):
            v = tap // R
            u = tap % R
            row = y + v - R // 2
            column = x + u - R // 2
            found = inside & (row >= 0) & (row < Sy) & (column >= 0) & (column < Sx)
            cell = row.to(tl.int64) * group_y + column.to(tl.int64) * group_x
            value = tl.load(
                GROUP + (o64 * group_c)[:, None] + cell[None, :], mask=real[:, None] & found[None, :], other=0.0
            )
            weight = tl.load(DW + o64 * dw_c + v * dw_v + u * dw_u, mask=real, other=0.0)
            reach += widened(weight)[:, None] * widened(value)
        if DW_BIAS is not None:
            reach += widened(tl.load(DW_BIAS + o64 * dw_bias_c, mask=real, other=0.0))[:, None]
        acc = acc * (reach * scale)
    here = OUT + b * out_b + (o64 * out_c)[:, None] + plane(at, out_y, out_x, Sx)[None, :]
    tl.store(here, narrowed(acc, OUT.dtype.element_ty), mask=mask)
