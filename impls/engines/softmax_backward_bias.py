"""Gradient of the bias: one program per tile of dbias.

It adds up, in order, the batch entries, heads and query tiles that the bias is broadcast over, so that no tensor of
all pairs is written unless the bias itself has that shape. See `softmax_backward` for what all backward kernels
share.
"""

# ruff: noqa: PIE808, RUF059 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_backward import query_inputs, weight_gradients
from attnspec.impls.engines.softmax_forward import tile_inputs
from attnspec.impls.engines.softmax_tiles import kept, product

SIZES = ["B", "H", "N", "M", "left", "right", "chunk", "sink_tokens", "bias_B", "bias_H", "bias_N"]


@triton.jit(do_not_specialize=SIZES)
def softmax_dbias_kernel(
    Q, K, V, DO, LSE, T, DBIAS, BIAS, MASK, DROP, Q_LEN, K_LEN, PAD, Q_SEG, K_SEG, Q_POS, K_LOC,
    q_b, q_h, q_i, q_d, k_b, k_g, k_j, k_d, v_b, v_g, v_j, v_e, do_b, do_h, do_i, do_e, l_b, l_h, l_i,
    db_b, db_h, db_i, db_j,
    bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, drop_b, drop_h, drop_i, drop_j,
    B, H, N, M, bias_B, bias_H, bias_N, left, right, chunk, sink_tokens, scale, softcap, drop_scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, G: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: one tile of one head and batch entry of dbias."""
    HAS_MASK: tl.constexpr = MASK is not None
    HAS_DROP: tl.constexpr = DROP is not None
    SEGMENTS: tl.constexpr = Q_SEG is not None
    key_tiles = tl.cdiv(M, BLOCK_N)
    all_rows = tl.cdiv(N, BLOCK_M)
    one_row = (bias_N == 1) & (N != 1)
    row_tiles = tl.where(one_row, 1, all_rows)
    pid = tl.program_id(0)
    start = pid % key_tiles * BLOCK_N
    i_tile = pid // key_tiles % row_tiles
    bh = pid // (key_tiles * row_tiles)
    out_h = bh % bias_H
    out_b = bh // bias_H
    inner_rows = tl.where(one_row, all_rows, 1)
    inner_h = tl.where(bias_H == 1, H, 1)
    inner_b = tl.where(bias_B == 1, B, 1)
    d64 = tl.arange(0, D_PAD).to(tl.int64)
    e64 = tl.arange(0, E_PAD).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for it in range(0, inner_b * inner_h * inner_rows):
        b = out_b + it // (inner_rows * inner_h)
        h = out_h + it // inner_rows % inner_h
        i = (i_tile + it % inner_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
        b64 = b.to(tl.int64)
        h64 = h.to(tl.int64)
        g64 = h64 // G
        i64 = i.to(tl.int64)
        nq = N
        pad = 0
        if Q_LEN is not None:
            nq = tl.load(Q_LEN + b)
        if PAD is not None:
            pad = tl.load(PAD + b)
        nk = M - pad
        if K_LEN is not None:
            nk = tl.load(K_LEN + b)
        off = 0
        if BOTTOM_RIGHT:
            off = nk - nq
        q, do, lse, term, pos, real_q, segment_q = query_inputs(
            i, Q + b64 * q_b + h64 * q_h, DO + b64 * do_b + h64 * do_h, LSE + b64 * l_b + h64 * l_h,
            T + b64 * l_b + h64 * l_h, Q_POS, Q_SEG, b, q_i, do_i, l_i, d64 * q_d, e64 * do_e, nq, off, N,
            D, E, D_PAD, E_PAD,
        )  # fmt: skip
        k, v, j, local, real_k, segment_k = tile_inputs(
            start, tl.arange(0, BLOCK_N), K + b64 * k_b + g64 * k_g, V + b64 * v_b + g64 * v_g, None, 0, K_LOC,
            K_SEG, b,
            k_b, k_j, v_b, v_j, d64 * k_d, e64 * v_e, pad, nk, M, D, E, D_PAD, E_PAD, 1,
        )  # fmt: skip
        raw = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        dp = product(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        keep = kept(
            pos[:, None], local[None, :], real_q[:, None], real_k[None, :], left, right, chunk, sink_tokens,
            HAS_LEFT, HAS_RIGHT, HAS_CHUNK,
        )  # fmt: skip
        if SEGMENTS:
            keep = keep & (segment_q[:, None] == segment_k[None, :])
        j64 = j.to(tl.int64)
        bias_ptrs = (BIAS + (b64 * bias_b + h64 * bias_h + i64 * bias_i))[:, None] + (j64 * bias_j)[None, :]
        mask_ptrs = MASK
        drop_ptrs = DROP
        if HAS_MASK:
            mask_ptrs = (MASK + (b64 * mask_b + h64 * mask_h + i64 * mask_i))[:, None] + (j64 * mask_j)[None, :]
        if HAS_DROP:
            drop_ptrs = (DROP + (b64 * drop_b + h64 * drop_h + i64 * drop_i))[:, None] + (j64 * drop_j)[None, :]
        keep, weight, ds, ds_raw = weight_gradients(
            raw, dp, keep, False, lse[:, None], term[:, None], scale, softcap, drop_scale, bias_ptrs, mask_ptrs,
            drop_ptrs,
            real_q[:, None] & real_k[None, :], HAS_SOFTCAP, True, HAS_MASK, HAS_DROP, True,
        )  # fmt: skip
        acc += ds
    j = start + tl.arange(0, BLOCK_N)
    i = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    base = DBIAS + (out_b.to(tl.int64) * db_b + out_h.to(tl.int64) * db_h)
    if one_row:
        tl.store(base + j.to(tl.int64) * db_j, tl.sum(acc, axis=0), mask=j < M)
    else:
        ptrs = (base + i.to(tl.int64) * db_i)[:, None] + (j.to(tl.int64) * db_j)[None, :]
        tl.store(ptrs, acc, mask=(i < N)[:, None] & (j < M)[None, :])
