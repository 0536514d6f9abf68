"""Gradients of keys and values: one program per key tile of one key/value head.

Walks the queries that may see some key of the tile, over all query heads of the group in order, so that the sum over
the group needs no atomics. Tiles are [keys, queries]: weights feed the two products as they stand. See
`softmax_backward` for what all backward kernels have in common.
"""

# ruff: noqa: PIE808, RUF059, SIM102 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_backward import SIZES, query_inputs, weight_gradients
from attnspec.impls.engines.softmax_forward import tile_inputs
from attnspec.impls.engines.softmax_tiles import exact_product, kept, narrowed, not_finite, product, query_range


@triton.jit(do_not_specialize=SIZES)
def softmax_dkv_kernel(
    Q, K, V, DO, LSE, T, DK, DV, BIAS, MASK, DROP, Q_LEN, K_LEN, PAD, Q_SEG, K_SEG, Q_POS, K_LOC, K_FIRST, K_LAST, FLAG,
    q_b, q_h, q_i, q_d, k_b, k_g, k_j, k_d, v_b, v_g, v_j, v_e, do_b, do_h, do_i, do_e, l_b, l_h, l_i,
    dk_b, dk_g, dk_j, dk_d, dv_b, dv_g, dv_j, dv_e,
    bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, drop_b, drop_h, drop_i, drop_j,
    H, N, M, left, right, chunk, sink_tokens, tiles, flag_tiles, scale, softcap, drop_scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, G: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, REPAIR: tl.constexpr, FLAG_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: the keys of one tile of one key/value head of one batch entry."""
    HAS_BIAS: tl.constexpr = BIAS is not None
    HAS_MASK: tl.constexpr = MASK is not None
    HAS_DROP: tl.constexpr = DROP is not None
    SEGMENTS: tl.constexpr = Q_SEG is not None
    ALWAYS: tl.constexpr = HAS_BIAS or HAS_MASK or SEGMENTS
    Hk = H // G
    pid = tl.program_id(0)
    tile = pid % tiles
    flag = pid // tiles * flag_tiles + tile * BLOCK_N // FLAG_BLOCK
    g = pid // tiles % Hk
    b = pid // (tiles * Hk)
    b64 = b.to(tl.int64)
    g64 = g.to(tl.int64)
    start = tile * BLOCK_N
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    d64 = d.to(tl.int64)
    e64 = e.to(tl.int64)
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
    k, v, j, local, real_k, segment_k = tile_inputs(
        start, tl.arange(0, BLOCK_N), K + b64 * k_b + g64 * k_g, V + b64 * v_b + g64 * v_g, None, 0, K_LOC, K_SEG, b,
        k_b, k_j, v_b, v_j, d64 * k_d, e64 * v_e, pad, nk, M, D, E, D_PAD, E_PAD, 1,
    )  # fmt: skip
    inside_k = j < M
    if SEGMENTS:
        t_lo = tl.min(tl.load(K_FIRST + b * M + j, mask=inside_k, other=N), axis=0) // BLOCK_M
        t_hi = tl.cdiv(tl.max(tl.load(K_LAST + b * M + j, mask=inside_k, other=0), axis=0), BLOCK_M)
        full_lo = 0
        full_hi = 0
    else:
        bound = tl.minimum(nk, M - pad)
        first = tl.maximum(start - pad, 0)
        last = tl.minimum(start + BLOCK_N - pad, bound) - 1
        lo, hi, full_lo, full_hi = query_range(
            first, last, off, tl.minimum(nq, N), left, right, chunk, sink_tokens, HAS_LEFT, HAS_RIGHT, HAS_CHUNK
        )
        partial = (start < pad) | (start + BLOCK_N - pad > bound)
        full_hi = tl.where(partial, 0, full_hi)
        hi = tl.where(last < first, 0, hi)
        t_lo = lo // BLOCK_M
        t_hi = tl.where(hi > lo, tl.cdiv(tl.maximum(hi, 0), BLOCK_M), t_lo)
    per_head = tl.maximum(t_hi - t_lo, 0)
    end = per_head * G
    keys = M
    if REPAIR:
        broken = tl.load(FLAG + flag) != 0
        end = tl.where(broken, end, 0)
        keys = tl.where(broken, M, 0)

    j64 = j.to(tl.int64)
    qd = d64 * q_d
    de = e64 * do_e
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, E_PAD], tl.float32)
    for it in range(0, end):
        h64 = g64 * G + it // per_head
        i0 = tl.multiple_of((it % per_head + t_lo) * BLOCK_M, BLOCK_M)
        i = i0 + tl.arange(0, BLOCK_M)
        q, do, lse, term, pos, real_q, segment_q = query_inputs(
            i, Q + b64 * q_b + h64 * q_h, DO + b64 * do_b + h64 * do_h, LSE + b64 * l_b + h64 * l_h,
            T + b64 * l_b + h64 * l_h, Q_POS, Q_SEG, b, q_i, do_i, l_i, qd, de, nq, off, N, D, E, D_PAD, E_PAD,
        )  # fmt: skip
        raw = product(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        dp = product(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        keep = kept(
            pos[None, :], local[:, None], real_q[None, :], real_k[:, None], left, right, chunk, sink_tokens,
            HAS_LEFT, HAS_RIGHT, HAS_CHUNK,
        )  # fmt: skip
        if SEGMENTS:
            keep = keep & (segment_q[None, :] == segment_k[:, None])
        i64 = i.to(tl.int64)
        bias_ptrs = BIAS
        mask_ptrs = MASK
        drop_ptrs = DROP
        if HAS_BIAS:
            bias_ptrs = (BIAS + (b64 * bias_b + h64 * bias_h + i64 * bias_i))[None, :] + (j64 * bias_j)[:, None]
        if HAS_MASK:
            mask_ptrs = (MASK + (b64 * mask_b + h64 * mask_h + i64 * mask_i))[None, :] + (j64 * mask_j)[:, None]
        if HAS_DROP:
            drop_ptrs = (DROP + (b64 * drop_b + h64 * drop_h + i64 * drop_i))[None, :] + (j64 * drop_j)[:, None]
        full = (i0 >= full_lo) & (i0 + BLOCK_M <= full_hi)
        keep, weight, ds, ds_raw = weight_gradients(
            raw, dp, keep, full, lse[None, :], term[None, :], scale, softcap, drop_scale, bias_ptrs, mask_ptrs,
            drop_ptrs,
            real_q[None, :] & inside_k[:, None], HAS_SOFTCAP, HAS_BIAS, HAS_MASK, HAS_DROP, ALWAYS,
        )  # fmt: skip
        if REPAIR:
            dv = exact_product(dv, weight, keep, do, BLOCK_M)
            dk = exact_product(dk, ds_raw, keep, q, BLOCK_M)
        else:
            dv = product(narrowed(weight, do.dtype), do, dv)
            dk = product(narrowed(ds_raw, q.dtype), q, dk)
    if not REPAIR:
        if FLAG is not None:
            tl.store(FLAG + flag, tl.maximum(not_finite(dk), not_finite(dv)))
    if HAS_DROP:
        dv = dv * drop_scale
    rows = (j < keys)[:, None]
    dk_ptrs = (DK + (b64 * dk_b + g64 * dk_g + j64 * dk_j))[:, None] + (d64 * dk_d)[None, :]
    dv_ptrs = (DV + (b64 * dv_b + g64 * dv_g + j64 * dv_j))[:, None] + (e64 * dv_e)[None, :]
    tl.store(dk_ptrs, narrowed(dk * scale, DK.dtype.element_ty), mask=rows & (d < D)[None, :])
    tl.store(dv_ptrs, narrowed(dv, DV.dtype.element_ty), mask=rows & (e < E)[None, :])
