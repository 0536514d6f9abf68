"""Neighborhood attention, forward: one fused kernel over boxes of a one- or two-dimensional grid.

Hassani, Hwu and Shi, arXiv 2403.04690, section 3.3. A program owns a box of queries of one head inside one group of
residues (dilation takes the grid apart, see `neighborhood_tiles`) and walks the boxes of keys that cover the union of
their windows, with the online softmax; extra keys that every query sees come after that.

A value outside a window cannot leak, not even NaN: where the output of a tile is not finite its head is flagged, and a
second launch (REPAIR) takes the products of that head again over the kept pairs only.
"""

# ruff: noqa: E741, PIE808 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.neighborhood_tiles import SIZES, group_of, token, window
from attnspec.impls.engines.softmax_tiles import LOG2E, exact_product, narrowed, not_finite, product


@triton.jit
def online(s, top, norm, acc):
    """One step of the online softmax: the weights of a tile of logits, and the rescaled state."""
    new_top = tl.maximum(top, tl.max(s, axis=1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2((s - safe[:, None]) * LOG2E)
    shrink = tl.exp2((top - safe) * LOG2E)
    return p, new_top, norm * shrink + tl.sum(p, axis=1), acc * shrink[:, None]


@triton.jit(do_not_specialize=SIZES)
def neighborhood_forward_kernel(
    Q, K, V, KX, VX, O, LSE, FLAG,
    q_b, q_h, q_i, q_d, k_b, k_h, k_i, k_d, v_b, v_h, v_i, v_e, kx_b, kx_h, kx_i, kx_d, vx_b, vx_h, vx_i, vx_e,
    o_b, o_h, o_i, o_e, l_b, l_h, l_i, H, X, rows, cols, wy, wx, py, px, sy, sx, tiles_y, tiles_x, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, G: tl.constexpr,
    CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, REPAIR: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, KY: tl.constexpr, KX_: tl.constexpr,
):  # fmt: skip
    """Program: TY x TX queries of one group of one head of one batch entry."""
    BLOCK_M: tl.constexpr = TY * TX
    BLOCK_N: tl.constexpr = KY * KX_
    head, ry, rx, ny, nx, ty, tx = group_of(tl.program_id(0), rows, cols, py, px, tiles_y, tiles_x)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    g = h // G
    m = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    y = ty * TY + m // TX
    x = tx * TX + m % TX
    i = token(y, x, ry, rx, py, px, cols)
    y_start, y_end = window(y, ny, wy, sy, CAUSAL_Y)
    x_start, x_end = window(x, nx, wx, sx, CAUSAL_X)
    y_lo, _ = window(ty * TY, ny, wy, sy, CAUSAL_Y)
    x_lo, _ = window(tx * TX, nx, wx, sx, CAUSAL_X)
    _, y_hi = window(tl.minimum(ty * TY + TY, ny) - 1, ny, wy, sy, CAUSAL_Y)
    _, x_hi = window(tl.minimum(tx * TX + TX, nx) - 1, nx, wx, sx, CAUSAL_X)
    boxes_x = tl.cdiv(x_hi - x_lo, KX_)
    boxes = tl.cdiv(y_hi - y_lo, KY) * boxes_x
    # Small groups have fewer boxes than the largest.
    boxes = tl.where((ty * TY < ny) & (tx * TX < nx), boxes, 0)
    extra = X
    bound = ny
    if REPAIR:
        broken = tl.load(FLAG + head) != 0
        boxes = tl.where(broken, boxes, 0)
        extra = tl.where(broken, X, 0)
        bound = tl.where(broken, ny, 0)
    inside = (y < bound) & (x < nx)

    q = tl.load(
        (Q + (b * q_b + h * q_h + i * q_i))[:, None] + (d.to(tl.int64) * q_d)[None, :],
        mask=inside[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, E_PAD], tl.float32)
    k_base = K + b * k_b + g * k_h
    v_base = V + b * v_b + g * v_h
    for it in range(0, boxes):
        ky = y_lo + it // boxes_x * KY + c // KX_
        kx = x_lo + it % boxes_x * KX_ + c % KX_
        real = (ky < y_hi) & (kx < x_hi)
        j = token(ky, kx, ry, rx, py, px, cols)
        k = tl.load(
            (k_base + j * k_i)[:, None] + (d.to(tl.int64) * k_d)[None, :], mask=real[:, None] & (d < D)[None, :],
            other=0.0,
        )  # fmt: skip
        v = tl.load(
            (v_base + j * v_i)[:, None] + (e.to(tl.int64) * v_e)[None, :], mask=real[:, None] & (e < E)[None, :],
            other=0.0,
        )  # fmt: skip
        s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        keep = (ky[None, :] >= y_start[:, None]) & (ky[None, :] < y_end[:, None]) & inside[:, None]
        keep = keep & (kx[None, :] >= x_start[:, None]) & (kx[None, :] < x_end[:, None]) & real[None, :]
        s = tl.where(keep, s, float("-inf"))
        p, top, norm, acc = online(s, top, norm, acc)
        if REPAIR:
            acc = exact_product(acc, p, keep, v, BLOCK_N)
        else:
            acc = product(narrowed(p, v.dtype), v, acc)
    if KX is not None:
        kx_base = KX + b * kx_b + g * kx_h
        vx_base = VX + b * vx_b + g * vx_h
        for first in range(0, extra, BLOCK_N):
            j = (first + c).to(tl.int64)
            real = j < X
            k = tl.load(
                (kx_base + j * kx_i)[:, None] + (d.to(tl.int64) * kx_d)[None, :],
                mask=real[:, None] & (d < D)[None, :], other=0.0,
            )  # fmt: skip
            v = tl.load(
                (vx_base + j * vx_i)[:, None] + (e.to(tl.int64) * vx_e)[None, :],
                mask=real[:, None] & (e < E)[None, :], other=0.0,
            )  # fmt: skip
            s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
            p, top, norm, acc = online(tl.where(real[None, :], s, float("-inf")), top, norm, acc)
            acc = product(narrowed(p, v.dtype), v, acc)

    some = tl.where(norm == 0.0, 1.0, norm)
    out = acc / some[:, None]
    if not REPAIR:
        broken = not_finite(tl.where(inside[:, None], out, 0.0)) != 0
        tl.store(FLAG + head, 1, mask=broken)
    tl.store(
        (O + (b * o_b + h * o_h + i * o_i))[:, None] + (e.to(tl.int64) * o_e)[None, :],
        narrowed(out, O.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :],
    )  # fmt: skip
    tl.store(LSE + (b * l_b + h * l_h + i * l_i), top + tl.log(some), mask=inside)
