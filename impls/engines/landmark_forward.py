"""Landmark attention, forward: the sequence block by block, an attention inside each, a softmax over them.

Mohtashami and Jaggi, arXiv 2305.16300, section 3.1. A program owns a tile of query rows and walks the blocks that are
closed by landmarks. Inside a block the tokens that a row sees are summed up by an online softmax; to a row whose own
block it is they count with their own weight, to a later row with the weight of the block's landmark. Both are one step
of an outer online softmax, over blocks, with the logit of the tokens' sum or of the landmark.

`LM [b,c]` is the position of landmark c (the number of keys where there is none), `CUR [b,i]` the number of landmarks
before query i, `OPEN [b,h,i,c]` whether a row attends to the cached block c. What a row does not see cannot leak into
it, not even NaN: heads with an output that is not finite are taken again (REPAIR), over kept pairs only.
"""

# ruff: noqa: E741, PIE808 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_tiles import LOG2E, exact_product, narrowed, not_finite, product, widened

SIZES = ["H", "N", "M", "tiles", "cached"]


@triton.jit
def feature_rows(base, i, step, features, feature_step, real, SIZE: tl.constexpr):
    """Rows i of a matrix, zero where they are not real."""
    return tl.load(
        (base + i.to(tl.int64) * step)[:, None] + (features.to(tl.int64) * feature_step)[None, :],
        mask=real[:, None] & (features < SIZE)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def block_bounds(LM, c):
    """First token of block c, and the position of the landmark that closes it."""
    start = tl.load(LM + tl.maximum(c - 1, 0)) + 1
    return tl.where(c == 0, 0, start), tl.load(LM + c)


@triton.jit
def landmark_logits(q, k_base, at, k_j, kd, d, M, scale, D: tl.constexpr):
    """`[rows]`: logits of the landmark key at position `at`; 0 where there is none."""
    k = tl.load(k_base + at.to(tl.int64) * k_j + kd, mask=d < tl.where(at < M, D, 0), other=0.0)
    return tl.sum(widened(q) * widened(k)[None, :], axis=1) * scale


@triton.jit
def opened(OPEN, open_rows, open_c, c, cached, rows):
    """Whether rows attend to the closed block c: to all that are not cached, and to those that were fetched."""
    allowed = rows
    if OPEN is not None:
        fetched = tl.load(open_rows + tl.minimum(c, cached - 1).to(tl.int64) * open_c, mask=rows, other=0)
        allowed = rows & ((fetched != 0) | (c >= cached))
    return allowed


@triton.jit(do_not_specialize=SIZES)
def landmark_forward_kernel(
    Q, K, V, O, LSE, LM, CUR, OPEN, FLAG, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, v_b, v_h, v_j, v_e,
    o_b, o_h, o_i, o_e, open_b, open_h, open_i, open_c, H, N, M, tiles, cached, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, REPAIR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: a tile of query rows of one head of one batch entry. LSE `[b,h,i]` is that of the outer softmax."""
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles  # the longest rows start first
    head = pid // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    kd = d.to(tl.int64) * k_d
    bound = N
    if REPAIR:
        bound = tl.where(tl.load(FLAG + head) != 0, N, 0)
    inside = i < bound
    pos = i + M - N
    q = feature_rows(Q + b * q_b + h * q_h, i, q_i, d, q_d, inside, D)
    cur = tl.load(CUR + b * N + i, mask=inside, other=-1)
    last = tl.minimum(tile * BLOCK_M + BLOCK_M, N) - 1 + M - N
    blocks = tl.where((last >= 0) & (bound > 0), tl.max(cur, axis=0) + 1, 0)
    lm = LM + b * (M + 2)
    k_base = K + b * k_b + h * k_h
    v_base = V + b * v_b + h * v_h
    open_rows = OPEN
    if OPEN is not None:
        open_rows = OPEN + (b * open_b + h * open_h + i.to(tl.int64) * open_i)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, E_PAD], tl.float32)
    for c in range(0, blocks):
        start, at = block_bounds(lm, c)
        later = opened(OPEN, open_rows, open_c, c, cached, inside & (cur > c))
        sees = later | (inside & (cur == c))
        in_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        in_norm = tl.zeros([BLOCK_M], tl.float32)
        in_acc = tl.zeros([BLOCK_M, E_PAD], tl.float32)
        for first in range(start, tl.minimum(at, last + 1), BLOCK_N):
            j = first + columns
            real = (j < at) & (j <= last)
            k = feature_rows(k_base, j, k_j, d, k_d, real, D)
            v = feature_rows(v_base, j, v_j, e, v_e, real, E)
            s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
            keep = sees[:, None] & real[None, :] & (j[None, :] <= pos[:, None])
            s = tl.where(keep, s, float("-inf"))
            new_top = tl.maximum(in_top, tl.max(s, axis=1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2((s - safe[:, None]) * LOG2E)
            shrink = tl.exp2((in_top - safe) * LOG2E)
            in_norm = in_norm * shrink + tl.sum(p, axis=1)
            in_acc = in_acc * shrink[:, None]
            in_top = new_top
            if REPAIR:
                in_acc = exact_product(in_acc, p, keep, v, BLOCK_N)
            else:
                in_acc = product(narrowed(p, v.dtype), v, in_acc)
        # An empty block keeps its landmark's weight and hands it to nobody.
        some = tl.where(in_norm == 0.0, 1.0, in_norm)
        mine = tl.where(in_norm == 0.0, float("-inf"), in_top + tl.log(some))
        gate = landmark_logits(q, k_base, at, k_j, kd, d, M, scale, D)
        z = tl.where(later, gate, tl.where(sees, mine, float("-inf")))
        new_top = tl.maximum(top, z)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2((z - safe) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        norm = norm * shrink + weight
        acc = acc * shrink[:, None] + tl.where(sees[:, None], (weight / some)[:, None] * in_acc, 0.0)
        top = new_top

    empty = norm == 0.0
    some = tl.where(empty, 1.0, norm)
    out = acc / some[:, None]
    rows = (b * H + h) * N + i
    if not REPAIR:
        wrong = not_finite(tl.where(inside[:, None], out, 0.0))
        tl.store(FLAG + head, 1, mask=wrong != 0)
        tl.store(LSE + rows, tl.where(empty, float("-inf"), tl.where(empty, 0.0, top) + tl.log(some)), mask=inside)
    tl.store(
        (O + (b * o_b + h * o_h + i.to(tl.int64) * o_i))[:, None] + (e.to(tl.int64) * o_e)[None, :],
        narrowed(out, O.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def landmark_scores_kernel(
    Q, K, LM, S, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, H, N, M, tiles, cached, columns_tiles, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits S `[b,h,i,c]` (float32) of the cached landmarks; -inf for those that an entry of the batch lacks."""
    pid = tl.program_id(0)
    ct = pid % columns_tiles
    tile = pid // columns_tiles % tiles
    head = pid // columns_tiles // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = ct * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    at = tl.load(LM + b * (M + 2) + c, mask=c < cached, other=M)
    real = at < M - N
    q = feature_rows(Q + b * q_b + h * q_h, i, q_i, d, q_d, i < N, D)
    k = feature_rows(K + b * k_b + h * k_h, at, k_j, d, k_d, real, D)
    s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
    s = tl.where(real[None, :], s, float("-inf"))
    out = S + (((b * H + h) * N + i) * cached)[:, None] + c[None, :]
    tl.store(out, s, mask=(i < N)[:, None] & (c < cached)[None, :])
