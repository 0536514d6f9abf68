"""Weighted sums of rows found by computed positions: bilinear samples of maps, and series rolled by delays.

Weights are softmaxes of logits that are read along with the positions. Launched by `attnspec.impls.deformable` and
`attnspec.impls.auto_correlation`.
"""

# ruff: noqa: E741 (O is the field's name of the output)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_tiles import LOG2E, narrowed, widened


@triton.jit
def place(REF, OFF, BOX, ref_i, off_i, box_i, side, P, inside):
    """One coordinate of the samples, in pixels; `*_i` are the offsets of the tile's queries."""
    centre = widened(tl.load(REF + ref_i, mask=inside, other=0.0))
    move = widened(tl.load(OFF + off_i, mask=inside, other=0.0))
    if BOX is not None:
        move = move * (0.5 * widened(tl.load(BOX + box_i, mask=inside, other=1.0)) / P * side)
    return centre * side - 0.5 + move


@triton.jit
def neighbour(first, side):
    """The integer coordinate of `floor`ed places; -2, which is on no map, for those far outside and for NaN."""
    return tl.where((first >= -1.0) & (first <= side), first, -2.0).to(tl.int32)


@triton.jit(do_not_specialize=["H", "N", "L", "P", "Sy", "Sx", "tiles"])
def bilinear_kernel(
    V, HEIGHT, WIDTH, REF, OFF, LOGITS, BOX, MASK, O,
    v_b, v_h, v_l, v_y, v_x, v_e, ref_b, ref_i, ref_l, ref_z, off_b, off_h, off_i, off_l, off_k, off_z,
    g_b, g_h, g_i, g_l, g_k, box_b, box_i, box_l, box_z, mask_b, mask_l, mask_y, mask_x, o_b, o_h, o_i, o_e,
    H, N, L, P, Sy, Sx, tiles,
    E: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax over levels and points of bilinear samples: a tile of queries of one head, a block of features."""
    program = tl.program_id(0)
    block = program % E_BLOCKS
    tile = program // E_BLOCKS % tiles
    head = program // E_BLOCKS // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    e = (block * E_BLOCK + tl.arange(0, E_BLOCK)).to(tl.int64)
    inside = i < N
    V += b * v_b + h * v_h
    LOGITS += b * g_b + h * g_h
    OFF += b * off_b + h * off_h
    REF += b * ref_b
    if BOX is not None:
        BOX += b * box_b
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, E_BLOCK], tl.float32)
    zero = b * 0  # loop variables are plain integers in the interpreter
    for l in range(L):
        l64 = zero + l
        # Sides beyond the arrays would be read outside of them.
        height = tl.minimum(tl.load(HEIGHT + l), Sy)
        width = tl.minimum(tl.load(WIDTH + l), Sx)
        tall, wide = height.to(tl.float32), width.to(tl.float32)
        for k in range(P):
            k64 = zero + k
            logit = widened(tl.load(LOGITS + i * g_i + l64 * g_l + k64 * g_k, mask=inside, other=0.0))
            new = tl.where(logit > top, logit, top)
            shrink = tl.where(top == float("-inf"), 0.0, tl.exp2((top - new) * LOG2E))
            p = tl.exp2((logit - new) * LOG2E)
            norm = norm * shrink + p
            acc = acc * shrink[:, None]
            top = new
            ref, off, box = i * ref_i + l64 * ref_l, i * off_i + l64 * off_l + k64 * off_k, i * box_i + l64 * box_l
            across = place(REF, OFF, BOX, ref, off, box, wide, P, inside)
            down = place(REF, OFF, BOX, ref + ref_z, off + off_z, box + box_z, tall, P, inside)
            left, above = tl.floor(across), tl.floor(down)
            for corner in tl.static_range(4):
                x = neighbour(left, wide) + corner % 2
                y = neighbour(above, tall) + corner // 2
                share = (across - left) if corner % 2 else (1.0 - (across - left))
                share = share * ((down - above) if corner // 2 else (1.0 - (down - above)))
                hit = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
                x64, y64 = x.to(tl.int64), y.to(tl.int64)
                if MASK is not None:
                    cell = MASK + b * mask_b + l64 * mask_l + y64 * mask_y + x64 * mask_x
                    hit = hit & (tl.load(cell, mask=hit, other=0) != 0)
                at = (V + l64 * v_l + y64 * v_y + x64 * v_x)[:, None] + (e * v_e)[None, :]
                value = widened(tl.load(at, mask=hit[:, None] & (e < E)[None, :], other=0.0))
                acc += tl.where(hit, p * share, 0.0)[:, None] * value
    at = (O + b * o_b + h * o_h + i * o_i)[:, None] + (e * o_e)[None, :]
    acc = acc / tl.where(inside, norm, 1.0)[:, None]
    tl.store(at, narrowed(acc, O.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["H", "N", "M", "D", "delays", "tiles", "blocks"])
def delays_kernel(
    V, DELAY, SCORE, O, v_b, v_h, v_t, v_d, a_b, a_h, a_d, a_k, s_b, s_h, s_d, s_k, o_b, o_h, o_t, o_d,
    H, N, M, D, delays, tiles, blocks, BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """Values rolled by each delay, weighted by the softmax of the delays' scores: a tile of steps, a block of features.

    DELAY and SCORE are `[b,h,d,k]`; with strides of 0 they are shared by heads and features. Values beyond M are zero.
    """
    program = tl.program_id(0)
    head = program // blocks // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    t = program // blocks % tiles * BLOCK + tl.arange(0, BLOCK)
    d = program % blocks * D_BLOCK + tl.arange(0, D_BLOCK)
    d64 = d.to(tl.int64)
    V += b * v_b + h * v_h
    top = tl.full([D_BLOCK], float("-inf"), tl.float32)
    norm = tl.zeros([D_BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D_BLOCK], tl.float32)
    zero = b * 0  # loop variables are plain integers in the interpreter
    for k in range(delays):
        k64 = zero + k
        score = tl.load(SCORE + b * s_b + h * s_h + d64 * s_d + k64 * s_k, mask=d < D, other=0.0)
        delay = tl.load(DELAY + b * a_b + h * a_h + d64 * a_d + k64 * a_k, mask=d < D, other=0).to(tl.int32)
        new = tl.where(score > top, score, top)
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp2((top - new) * LOG2E))
        p = tl.exp2((score - new) * LOG2E)
        norm = norm * shrink + p
        top = new
        source = t[:, None] + delay[None, :]
        source = tl.where(source >= N, source - N, source)
        mask = (t < N)[:, None] & (d < D)[None, :] & (source < M)
        value = widened(tl.load(V + source.to(tl.int64) * v_t + (d64 * v_d)[None, :], mask=mask, other=0.0))
        acc = acc * shrink[None, :] + value * p[None, :]
    at = (O + b * o_b + h * o_h + t.to(tl.int64) * o_t)[:, None] + (d64 * o_d)[None, :]
    acc = acc / tl.where(norm == 0.0, 1.0, norm)[None, :]
    tl.store(at, narrowed(acc, O.dtype.element_ty), mask=(t < N)[:, None] & (d < D)[None, :])
