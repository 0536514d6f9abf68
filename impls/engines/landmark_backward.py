"""Landmark attention, backward: what a row and a block have in common, then dQ, and dK and dV, from that.

For a row i and a block c that it attends to, the weight of a token is exp(S + A) and the gradient of its logit
W (dW - G): in the own block A = -LSE and G = Delta; in an earlier one A = S_landmark - LSE - LSE_block, and G is the
mean of dW under the block's own softmax; the landmark's gradient is its gate times (G - Delta). One kernel finds A and
G block by block and leaves them, `[b,h,i,c]` in float32; the other two then walk tiles of keys or queries wherever
blocks begin and end. Nothing is added atomically, and nothing leaks: see `landmark_forward`.
"""

# ruff: noqa: PIE808 (Triton takes Python only as far as this: ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.landmark_forward import SIZES, block_bounds, feature_rows, landmark_logits, opened
from attnspec.impls.engines.softmax_tiles import LOG2E, exact_product, narrowed, not_finite, product


@triton.jit
def row_terms(LSE, T, rows, inside):
    """LSE and Delta of rows; LSE is +inf for those without a key, so that their weights become 0."""
    lse = tl.load(LSE + rows, mask=inside, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse), tl.load(T + rows, mask=inside, other=0.0)


@triton.jit
def key_blocks(BLK, LM, b, j, real, M):
    """The blocks of keys, and 1 for the landmarks among them."""
    blk = tl.load(BLK + b * M + j, mask=real, other=0)
    closes = tl.load(LM + b * (M + 2) + blk, mask=real, other=-1)
    return blk, (closes == j).to(tl.int32)


@triton.jit
def logit_gradients(s, dw, A, G, common, sees, closes, lse, term):
    """Which pairs are kept, which of them with a token, and their weights and dS; all arguments broadcast.

    `sees`: pairs in which the row comes late enough for the key; the others are not looked up in A and G.
    """
    shift = tl.load(A + common, mask=sees, other=float("-inf"))
    mean = tl.load(G + common, mask=sees, other=0.0)
    keep = sees & (shift != float("-inf"))
    p = tl.where(keep, tl.exp2((s + tl.where(closes != 0, -lse, shift)) * LOG2E), 0.0)
    token = keep & (closes == 0)
    # Where a pair is not kept dw may be NaN: select, do not multiply by the weight 0.
    ds = tl.where(keep, p * tl.where(closes != 0, mean - term, dw - mean), 0.0)
    return keep, token, tl.where(token, p, 0.0), ds


@triton.jit(do_not_specialize=[*SIZES, "columns"])
def landmark_blocks_kernel(
    Q, K, V, DO, LSE, T, LM, CUR, OPEN, A, G, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, v_b, v_h, v_j, v_e,
    do_b, do_h, do_i, do_e, open_b, open_h, open_i, open_c, H, N, M, tiles, cached, columns, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A and G, of `columns` blocks. Program: a tile of query rows of one head."""
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    head = pid // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    inside = i < N
    q = feature_rows(Q + b * q_b + h * q_h, i, q_i, d, q_d, inside, D)
    do = feature_rows(DO + b * do_b + h * do_h, i, do_i, e, do_e, inside, E)
    rows = (b * H + h) * N + i
    lse, term = row_terms(LSE, T, rows, inside)
    cur = tl.load(CUR + b * N + i, mask=inside, other=-1)
    last = tl.minimum(tile * BLOCK_M + BLOCK_M, N) - 1 + M - N
    blocks = tl.where(last >= 0, tl.max(cur, axis=0) + 1, 0)
    k_base = K + b * k_b + h * k_h
    open_rows = OPEN
    if OPEN is not None:
        open_rows = OPEN + (b * open_b + h * open_h + i.to(tl.int64) * open_i)
    for c in range(0, blocks):
        start, at = block_bounds(LM + b * (M + 2), c)
        later = opened(OPEN, open_rows, open_c, c, cached, inside & (cur > c))
        own = inside & (cur == c)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        mean = tl.zeros([BLOCK_M], tl.float32)
        # Rows of the block's own know all they need.
        for first in range(start, tl.where(tl.max(later.to(tl.int32), axis=0) != 0, at, start), BLOCK_N):
            j = first + tl.arange(0, BLOCK_N)
            k = feature_rows(k_base, j, k_j, d, k_d, j < at, D)
            v = feature_rows(V + b * v_b + h * v_h, j, v_j, e, v_e, j < at, E)
            s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
            dw = product(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            keep = later[:, None] & (j < at)[None, :]
            s = tl.where(keep, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, axis=1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2((s - safe[:, None]) * LOG2E)
            shrink = tl.exp2((top - safe) * LOG2E)
            norm = norm * shrink + tl.sum(p, axis=1)
            mean = mean * shrink + tl.sum(tl.where(keep, p * dw, 0.0), axis=1)
            top = new_top
        some = tl.where(norm == 0.0, 1.0, norm)
        gate = landmark_logits(q, k_base, at, k_j, d.to(tl.int64) * k_d, d, M, scale, D)
        inner = tl.where(norm == 0.0, 0.0, top + tl.log(some))
        shift = tl.where(later, gate - inner, tl.where(own, 0.0, float("-inf"))) - lse
        tl.store(A + rows * columns + c, shift, mask=inside)
        tl.store(G + rows * columns + c, tl.where(later, mean / some, term), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "columns"])
def landmark_dq_kernel(
    Q, K, V, DO, LSE, T, LM, BLK, A, G, DQ, FLAG, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, v_b, v_h, v_j, v_e,
    do_b, do_h, do_i, do_e, dq_b, dq_h, dq_i, dq_d, H, N, M, tiles, columns, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, REPAIR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: a tile of query rows of one head."""
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    head = pid // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    bound = N
    end = tl.minimum(tile * BLOCK_M + BLOCK_M, N) + M - N
    if REPAIR:
        broken = tl.load(FLAG + head) != 0
        bound = tl.where(broken, N, 0)
        end = tl.where(broken, end, 0)
    inside = i < bound
    q = feature_rows(Q + b * q_b + h * q_h, i, q_i, d, q_d, inside, D)
    do = feature_rows(DO + b * do_b + h * do_h, i, do_i, e, do_e, inside, E)
    rows = (b * H + h) * N + i
    lse, term = row_terms(LSE, T, rows, inside)
    dq = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for first in range(0, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        real = j < end
        blk, closes = key_blocks(BLK, LM, b, j, real, M)
        k = feature_rows(K + b * k_b + h * k_h, j, k_j, d, k_d, real, D)
        # The value of a landmark is never read.
        v = feature_rows(V + b * v_b + h * v_h, j, v_j, e, v_e, real & (closes == 0), E)
        s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        dw = product(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        # A row at a landmark belongs to the block that it closes, and does not see the landmark.
        sees = inside[:, None] & real[None, :] & ((j + closes)[None, :] <= (i + M - N)[:, None])
        common = (rows * columns)[:, None] + blk[None, :]
        keep, _, _, ds = logit_gradients(s, dw, A, G, common, sees, closes[None, :], lse[:, None], term[:, None])
        if REPAIR:
            dq = exact_product(dq, ds, keep, k, BLOCK_N)
        else:
            dq = product(narrowed(ds, k.dtype), k, dq)
    if not REPAIR:
        wrong = not_finite(tl.where(inside[:, None], dq, 0.0))
        tl.store(FLAG + head, 1, mask=wrong != 0)
    tl.store(
        (DQ + (b * dq_b + h * dq_h + i.to(tl.int64) * dq_i))[:, None] + (d.to(tl.int64) * dq_d)[None, :],
        narrowed(dq * scale, DQ.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "columns"])
def landmark_dkv_kernel(
    Q, K, V, DO, LSE, T, LM, BLK, A, G, DK, DV, FLAG, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, v_b, v_h, v_j, v_e,
    do_b, do_h, do_i, do_e, dk_b, dk_h, dk_j, dk_d, dv_b, dv_h, dv_j, dv_e, H, N, M, tiles, columns, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, REPAIR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: a tile of keys of one head; tiles are [keys, queries]."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    bound = M
    queries = N
    if REPAIR:
        broken = tl.load(FLAG + head) != 0
        bound = tl.where(broken, M, 0)
        queries = tl.where(broken, N, 0)
    real = j < bound
    blk, closes = key_blocks(BLK, LM, b, j, real, M)
    k = feature_rows(K + b * k_b + h * k_h, j, k_j, d, k_d, real, D)
    v = feature_rows(V + b * v_b + h * v_h, j, v_j, e, v_e, real & (closes == 0), E)
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, E_PAD], tl.float32)
    for first in range(tl.maximum(tile * BLOCK_N - (M - N), 0) // BLOCK_M * BLOCK_M, queries, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        inside = i < N
        q = feature_rows(Q + b * q_b + h * q_h, i, q_i, d, q_d, inside, D)
        do = feature_rows(DO + b * do_b + h * do_h, i, do_i, e, do_e, inside, E)
        rows = (b * H + h) * N + i
        lse, term = row_terms(LSE, T, rows, inside)
        s = product(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) * scale
        dw = product(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        sees = real[:, None] & inside[None, :] & ((j + closes)[:, None] <= (i + M - N)[None, :])
        common = (rows * columns)[None, :] + blk[:, None]
        keep, token, p, ds = logit_gradients(s, dw, A, G, common, sees, closes[:, None], lse[None, :], term[None, :])
        if REPAIR:
            dv = exact_product(dv, p, token, do, BLOCK_M)
            dk = exact_product(dk, ds, keep, q, BLOCK_M)
        else:
            dv = product(narrowed(p, do.dtype), do, dv)
            dk = product(narrowed(ds, q.dtype), q, dk)
    if not REPAIR:
        wrong = tl.maximum(not_finite(dk), not_finite(dv))
        tl.store(FLAG + head, 1, mask=wrong != 0)
    j64 = j.to(tl.int64)
    tl.store(
        (DK + (b * dk_b + h * dk_h + j64 * dk_j))[:, None] + (d.to(tl.int64) * dk_d)[None, :],
        narrowed(dk * scale, DK.dtype.element_ty), mask=real[:, None] & (d < D)[None, :],
    )  # fmt: skip
    tl.store(
        (DV + (b * dv_b + h * dv_h + j64 * dv_j))[:, None] + (e.to(tl.int64) * dv_e)[None, :],
        narrowed(dv, DV.dtype.element_ty), mask=real[:, None] & (e < E)[None, :],
    )  # fmt: skip
