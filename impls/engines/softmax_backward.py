"""Gradients of tiled softmax attention: what the backward kernels share, the row term, and dQ.

The weights are computed again from Q, K and LSE (FlashAttention, arXiv 2205.14135, Algorithm 4). Nothing is added
atomically, so that results repeat bit for bit: dQ walks the keys of a query tile, dK and dV walk the queries of a key
tile over all query heads that share the key/value head (`softmax_backward_keys`), and the bias gradient walks
whatever the bias is broadcast over (`softmax_backward_bias`). Every option of the forward kernel holds here through
the same device functions. Paged caches have no gradient.

As in the forward kernel, a product that is not finite raises a flag, and a second launch (REPAIR) takes that tile
again over kept pairs only.
"""

# ruff: noqa: E741, PIE808, RUF059, SIM102 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_forward import tile_inputs
from attnspec.impls.engines.softmax_tiles import (
    LOG2E,
    exact_product,
    kept,
    key_range,
    logits,
    narrowed,
    not_finite,
    product,
    widened,
)

SIZES = ["H", "N", "M", "left", "right", "chunk", "sink_tokens", "tiles", "flag_tiles"]


@triton.jit(do_not_specialize=SIZES)
def row_term_kernel(
    O, DO, LSE, DLSE, T, Q_LEN, Q_SEG, o_b, o_h, o_i, o_e, do_b, do_h, do_i, do_e, l_b, l_h, l_i, dl_b, dl_h, dl_i,
    H, N, tiles, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """T = sum_e dO O - dLSE, which every pair of a row subtracts from its dP; 0 for rows without a key."""
    pid = tl.program_id(0)
    b = pid // (tiles * H)
    b64 = b.to(tl.int64)
    h64 = (pid // tiles % H).to(tl.int64)
    i = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    i64 = i.to(tl.int64)
    e = tl.arange(0, E_PAD)
    e64 = e.to(tl.int64)
    inside = i < N
    real = inside
    if Q_LEN is not None:
        real = i < tl.minimum(tl.load(Q_LEN + b), N)
    if Q_SEG is not None:
        real = tl.load(Q_SEG + b * N + i, mask=inside, other=-1) >= 0
    mask = real[:, None] & (e < E)[None, :]
    o = tl.load((O + (b64 * o_b + h64 * o_h + i64 * o_i))[:, None] + (e64 * o_e)[None, :], mask=mask, other=0.0)
    do = tl.load((DO + (b64 * do_b + h64 * do_h + i64 * do_i))[:, None] + (e64 * do_e)[None, :], mask=mask, other=0.0)
    term = tl.sum(widened(o) * widened(do), axis=1)
    if DLSE is not None:
        term -= tl.load(DLSE + (b64 * dl_b + h64 * dl_h + i64 * dl_i), mask=inside, other=0.0).to(tl.float32)
    rows = b64 * l_b + h64 * l_h + i64 * l_i
    lse = tl.load(LSE + rows, mask=inside, other=float("-inf"))
    tl.store(T + rows, tl.where(lse == float("-inf"), 0.0, term), mask=inside)


@triton.jit
def query_inputs(
    i, Q, DO, LSE, T, Q_POS, Q_SEG, b, q_i, do_i, l_i, qd, de, nq, off, N,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """Queries, cotangents, LSE, row terms, positions, whether real, and segments of the rows i.

    LSE is +inf for rows without a key: their weights become 0.
    """
    inside = i < N
    if Q_SEG is None:
        pos = i + off
        real = i < tl.minimum(nq, N)
        segment = pos
    else:
        pos = tl.load(Q_POS + b * N + i, mask=inside, other=0)
        segment = tl.load(Q_SEG + b * N + i, mask=inside, other=-1)
        real = segment >= 0
    i64 = i.to(tl.int64)
    q_mask = real[:, None]
    if D != D_PAD:
        q_mask = q_mask & (tl.arange(0, D_PAD) < D)[None, :]
    e_mask = real[:, None]
    if E != E_PAD:
        e_mask = e_mask & (tl.arange(0, E_PAD) < E)[None, :]
    q = tl.load((Q + i64 * q_i)[:, None] + qd[None, :], mask=q_mask, other=0.0)
    do = tl.load((DO + i64 * do_i)[:, None] + de[None, :], mask=e_mask, other=0.0)
    lse = tl.load(LSE + i64 * l_i, mask=real, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    term = tl.load(T + i64 * l_i, mask=real, other=0.0)
    return q, do, lse, term, pos, real, segment


@triton.jit
def weight_gradients(
    raw, dp, keep, full, lse, term, scale, softcap, drop_scale, bias_ptrs, mask_ptrs, drop_ptrs, inside,
    HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROP: tl.constexpr,
    ALWAYS: tl.constexpr,
):  # fmt: skip
    """Per pair: whether kept, the weight after dropout (without 1/(1-p)), dS before and after the softcap's slope."""
    s, t = logits(
        raw, keep, full, scale, softcap, bias_ptrs, mask_ptrs, inside, HAS_SOFTCAP, HAS_BIAS, HAS_MASK, ALWAYS
    )
    keep = s != float("-inf")
    p = tl.exp2((s - lse) * LOG2E)
    weight = p
    if HAS_DROP:
        on = tl.load(drop_ptrs, mask=inside, other=0) != 0
        weight = tl.where(on, p, 0.0)
        dp = tl.where(on, dp * drop_scale, 0.0)
    # Where a pair is masked dp may be NaN: select, do not multiply by the weight 0.
    ds = tl.where(keep, p * (dp - term), 0.0)
    ds_raw = ds
    if HAS_SOFTCAP:
        ds_raw = tl.where(keep, ds * (1.0 - t * t), 0.0)
    return keep, weight, ds, ds_raw


@triton.jit(do_not_specialize=SIZES)
def softmax_dq_kernel(
    Q, K, V, DO, LSE, T, DQ, BIAS, MASK, DROP, Q_LEN, K_LEN, PAD, Q_SEG, K_SEG, Q_POS, K_LOC, Q_FIRST, Q_LAST, FLAG,
    q_b, q_h, q_i, q_d, k_b, k_g, k_j, k_d, v_b, v_g, v_j, v_e, do_b, do_h, do_i, do_e, l_b, l_h, l_i,
    dq_b, dq_h, dq_i, dq_d,
    bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, drop_b, drop_h, drop_i, drop_j,
    H, N, M, left, right, chunk, sink_tokens, tiles, flag_tiles, scale, softcap, drop_scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, G: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, REPAIR: tl.constexpr, FLAG_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: the queries of one tile of one head."""
    HAS_BIAS: tl.constexpr = BIAS is not None
    HAS_MASK: tl.constexpr = MASK is not None
    HAS_DROP: tl.constexpr = DROP is not None
    SEGMENTS: tl.constexpr = Q_SEG is not None
    ALWAYS: tl.constexpr = HAS_BIAS or HAS_MASK or SEGMENTS
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    flag = pid // tiles * flag_tiles + tile * BLOCK_M // FLAG_BLOCK
    h = pid // tiles % H
    b = pid // (tiles * H)
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    g64 = h64 // G
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i64 = i.to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    d64 = d.to(tl.int64)
    e64 = tl.arange(0, E_PAD).to(tl.int64)
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
    inside_q = i < N
    q, do, lse, term, pos, real_q, segment_q = query_inputs(
        i, Q + b64 * q_b + h64 * q_h, DO + b64 * do_b + h64 * do_h, LSE + b64 * l_b + h64 * l_h,
        T + b64 * l_b + h64 * l_h,
        Q_POS, Q_SEG, b, q_i, do_i, l_i, d64 * q_d, e64 * do_e, nq, off, N, D, E, D_PAD, E_PAD,
    )  # fmt: skip
    n_sink = 0
    s_lo = 0
    if SEGMENTS:
        t_lo = tl.min(tl.load(Q_FIRST + b * N + i, mask=inside_q, other=M), axis=0) // BLOCK_N
        t_hi = tl.cdiv(tl.max(tl.load(Q_LAST + b * N + i, mask=inside_q, other=0), axis=0), BLOCK_N)
        full_lo = 0
        full_hi = 0
    else:
        first = tile * BLOCK_M
        last = tl.minimum(first + BLOCK_M, nq) - 1
        lo, hi, full_lo, full_hi = key_range(first, last, off, nk, left, right, chunk, HAS_LEFT, HAS_RIGHT, HAS_CHUNK)
        hi = tl.minimum(hi, M - pad)
        full_hi = tl.minimum(full_hi, M - pad)
        hi = tl.where(last < first, 0, hi)
        t_lo = (pad + lo) // BLOCK_N
        t_hi = tl.cdiv(pad + tl.maximum(hi, 0), BLOCK_N)
        if HAS_LEFT:
            exempt = tl.minimum(sink_tokens, hi)
            s_lo = pad // BLOCK_N
            n_sink = tl.where(exempt > 0, tl.minimum(tl.cdiv(pad + exempt, BLOCK_N), t_lo) - s_lo, 0)
            n_sink = tl.maximum(n_sink, 0)
        t_hi = tl.where(hi > lo, t_hi, t_lo)
    end = n_sink + tl.maximum(t_hi - t_lo, 0)
    rows = N
    if REPAIR:
        broken = tl.load(FLAG + flag) != 0
        end = tl.where(broken, end, 0)
        rows = tl.where(broken, N, 0)

    k_base = K + b64 * k_b + g64 * k_g
    v_base = V + b64 * v_b + g64 * v_g
    kd = d64 * k_d
    ve = e64 * v_e
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for it in range(0, end):
        start = (it + t_lo) * BLOCK_N
        if HAS_LEFT:
            start = tl.where(it < n_sink, it + s_lo, it - n_sink + t_lo) * BLOCK_N
        start = tl.multiple_of(start, BLOCK_N)
        k, v, j, local, real_k, segment_k = tile_inputs(
            start, columns, k_base, v_base, None, 0, K_LOC, K_SEG, b, k_b, k_j, v_b, v_j, kd, ve, pad, nk, M,
            D, E, D_PAD, E_PAD, 1,
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
        bias_ptrs = BIAS
        mask_ptrs = MASK
        drop_ptrs = DROP
        if HAS_BIAS:
            bias_ptrs = (BIAS + (b64 * bias_b + h64 * bias_h + i64 * bias_i))[:, None] + (j64 * bias_j)[None, :]
        if HAS_MASK:
            mask_ptrs = (MASK + (b64 * mask_b + h64 * mask_h + i64 * mask_i))[:, None] + (j64 * mask_j)[None, :]
        if HAS_DROP:
            drop_ptrs = (DROP + (b64 * drop_b + h64 * drop_h + i64 * drop_i))[:, None] + (j64 * drop_j)[None, :]
        full = (start - pad >= full_lo) & (start - pad + BLOCK_N <= full_hi)
        keep, weight, ds, ds_raw = weight_gradients(
            raw, dp, keep, full, lse[:, None], term[:, None], scale, softcap, drop_scale, bias_ptrs, mask_ptrs,
            drop_ptrs,
            inside_q[:, None] & real_k[None, :], HAS_SOFTCAP, HAS_BIAS, HAS_MASK, HAS_DROP, ALWAYS,
        )  # fmt: skip
        if REPAIR:
            acc = exact_product(acc, ds_raw, keep, k, BLOCK_N)
        else:
            acc = product(narrowed(ds_raw, k.dtype), k, acc)
    if not REPAIR:
        if FLAG is not None:
            tl.store(FLAG + flag, not_finite(acc))
    dq_mask = (i < rows)[:, None]
    if D != D_PAD:
        dq_mask = dq_mask & (d < D)[None, :]
    dq_rows = DQ + (b64 * dq_b + h64 * dq_h + i64 * dq_i)
    tl.store(dq_rows[:, None] + (d64 * dq_d)[None, :], narrowed(acc * scale, DQ.dtype.element_ty), mask=dq_mask)
