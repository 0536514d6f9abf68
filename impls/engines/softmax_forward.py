"""Tiled softmax attention, forward, for any combination of the mechanism's options.

One kernel. A program owns a tile of query rows of one head (or, with PACK = G, the rows of the G query heads that
share a key/value head) and walks the key tiles that some row may see, with the online softmax of FlashAttention
(arXiv 2205.14135, Algorithm 1; arXiv 2307.08691). Absent optional tensors are passed as None and cost nothing. With
SPLITS > 1 the key tiles are divided over programs and partial results go to a workspace; `softmax_decode` merges
them. SPLIT_AT [b, SPLITS + 1] states where each split begins and ends, without segments, left padding and sink tokens;
without it the splits share out what there is.

Products are accumulated in float32; weights are rounded to the values' dtype before the product with V. What is
masked cannot leak, not even NaN: keys and values outside the lengths are not read; and where the product of a tile is
not finite a flag is raised, upon which a second launch (REPAIR) takes that tile's product again over the kept pairs
only. Where the keys that a row sees do not depend on the row, masked values never enter a product and the second
launch is left out.

Launched by `attnspec.impls.softmax` and compiled ahead of time by `attnspec.impls.aot`.
"""

# ruff: noqa: E741, RUF059 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

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


@triton.jit
def tile_inputs(
    start, columns, K, V, TABLE, TABLE_ROW, K_LOC, K_SEG, b, k_b, k_j, v_b, v_j, kd, ve, pad, nk, M,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Keys, values, local positions, reality and segment of the keys start .. start + BLOCK_N."""
    j = start + columns
    if K_SEG is None:
        local = j - pad
        real = (local >= 0) & (local < nk) & (j < M)
        segment = local
    else:
        real = j < M
        local = tl.load(K_LOC + b * M + j, mask=real, other=0)
        segment = tl.load(K_SEG + b * M + j, mask=real, other=-1)
    if TABLE is None:
        k_rows = j.to(tl.int64) * k_j
        v_rows = j.to(tl.int64) * v_j
    else:
        # Entries beyond the length may hold anything: they are neither read nor followed.
        page = tl.load(TABLE + (TABLE_ROW + j // PAGE), mask=real, other=0).to(tl.int64)
        slot = (j % PAGE).to(tl.int64)
        k_rows = page * k_b + slot * k_j
        v_rows = page * v_b + slot * v_j
    k_mask = real[:, None]
    if D != D_PAD:
        k_mask = k_mask & (tl.arange(0, D_PAD) < D)[None, :]
    v_mask = real[:, None]
    if E != E_PAD:
        v_mask = v_mask & (tl.arange(0, E_PAD) < E)[None, :]
    k = tl.load((K + k_rows)[:, None] + kd[None, :], mask=k_mask, other=0.0)
    v = tl.load((V + v_rows)[:, None] + ve[None, :], mask=v_mask, other=0.0)
    return k, v, j, local, real, segment


@triton.jit(do_not_specialize=SIZES)
def softmax_forward_kernel(
    Q, K, V, O, LSE, BIAS, MASK, SINK, DROP, TABLE, Q_LEN, K_LEN, PAD, Q_SEG, K_SEG, Q_POS, K_LOC, Q_FIRST, Q_LAST,
    q_b, q_h, q_i, q_d, k_b, k_g, k_j, k_d, v_b, v_g, v_j, v_e, o_s, o_b, o_h, o_i, o_e, l_s, l_b, l_h, l_i,
    bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, drop_b, drop_h, drop_i, drop_j, table_b,
    FLAG, SPLIT_AT,
    H, N, M, left, right, chunk, sink_tokens, tiles, flag_tiles, scale, softcap, drop_scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, G: tl.constexpr, PACK: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    REPAIR: tl.constexpr, FLAG_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: one tile of query rows, one head (or group of heads), one batch entry, one split.

    The grid has one axis, the only one without a low limit.
    """
    HAS_BIAS: tl.constexpr = BIAS is not None
    HAS_MASK: tl.constexpr = MASK is not None
    SEGMENTS: tl.constexpr = Q_SEG is not None
    ALWAYS: tl.constexpr = HAS_BIAS or HAS_MASK or SEGMENTS

    heads = H // PACK
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles  # the longest rows of a causal problem start first
    flag = pid // tiles * flag_tiles + tile * BLOCK_M // FLAG_BLOCK
    split = pid // tiles % SPLITS
    head = pid // (tiles * SPLITS) % heads
    b = pid // (tiles * SPLITS) // heads
    g = head * PACK // G
    b64 = b.to(tl.int64)
    g64 = g.to(tl.int64)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = row // PACK
    h = head * PACK + row % PACK
    i64 = i.to(tl.int64)
    h64 = h.to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)

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
    n_sink = 0
    s_lo = 0
    if SEGMENTS:
        pos = tl.load(Q_POS + b * N + i, mask=inside_q, other=0)
        segment_q = tl.load(Q_SEG + b * N + i, mask=inside_q, other=-1)
        real_q = segment_q >= 0
        t_lo = tl.min(tl.load(Q_FIRST + b * N + i, mask=inside_q, other=M), axis=0) // BLOCK_N
        t_hi = tl.cdiv(tl.max(tl.load(Q_LAST + b * N + i, mask=inside_q, other=0), axis=0), BLOCK_N)
        full_lo = 0
        full_hi = 0
    else:
        pos = i + off
        segment_q = pos
        real_q = i < tl.minimum(nq, N)
        first = tile * BLOCK_M // PACK
        last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // PACK, nq - 1)
        lo, hi, full_lo, full_hi = key_range(first, last, off, nk, left, right, chunk, HAS_LEFT, HAS_RIGHT, HAS_CHUNK)
        hi = tl.minimum(hi, M - pad)
        full_hi = tl.minimum(full_hi, M - pad)
        hi = tl.where(last < first, 0, hi)
        if SPLIT_AT is not None:
            split_lo = tl.load(SPLIT_AT + b * (SPLITS + 1) + split)
            nk = tl.minimum(nk, tl.load(SPLIT_AT + b * (SPLITS + 1) + split + 1))
            lo = tl.maximum(lo, split_lo)
            hi = tl.minimum(hi, nk)
            full_lo = tl.maximum(full_lo, split_lo)
            full_hi = tl.minimum(full_hi, nk)
        t_lo = (pad + lo) // BLOCK_N
        t_hi = tl.cdiv(pad + tl.maximum(hi, 0), BLOCK_N)
        if HAS_LEFT:
            # The tokens that are exempt from the left bound come first, then the window.
            exempt = tl.minimum(sink_tokens, hi)
            s_lo = pad // BLOCK_N
            n_sink = tl.where(exempt > 0, tl.minimum(tl.cdiv(pad + exempt, BLOCK_N), t_lo) - s_lo, 0)
            n_sink = tl.maximum(n_sink, 0)
        t_hi = tl.where(hi > lo, t_hi, t_lo)
    total = n_sink + tl.maximum(t_hi - t_lo, 0)
    begin = 0
    end = total
    if SPLITS > 1 and SPLIT_AT is None:
        share = tl.cdiv(total, SPLITS)
        begin = split * share
        end = tl.minimum(begin + share, total)
    if REPAIR:
        broken = tl.load(FLAG + flag) != 0
        end = tl.where(broken, end, begin)

    q_mask = real_q[:, None]
    if D != D_PAD:
        q_mask = q_mask & (d < D)[None, :]
    q = tl.load(
        (Q + (b64 * q_b + h64 * q_h + i64 * q_i))[:, None] + (d.to(tl.int64) * q_d)[None, :], mask=q_mask, other=0.0
    )
    # With pages, k_b and v_b are the pages' strides.
    k_base = K + g64 * k_g
    v_base = V + g64 * v_g
    if TABLE is None:
        k_base += b64 * k_b
        v_base += b64 * v_b
    kd = d.to(tl.int64) * k_d
    ve = e.to(tl.int64) * v_e
    if HAS_BIAS:
        bias_row = BIAS + (b64 * bias_b + h64 * bias_h + i64 * bias_i)
    if HAS_MASK:
        mask_row = MASK + (b64 * mask_b + h64 * mask_h + i64 * mask_i)
    if DROP is not None:
        drop_row = DROP + (b64 * drop_b + h64 * drop_h + i64 * drop_i)

    split64 = split.to(tl.int64)
    lse_rows = LSE + (split64 * l_s + b64 * l_b + h64 * l_h + i64 * l_i)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, E_PAD], tl.float32)
    for it in range(begin, end):
        start = (it + t_lo) * BLOCK_N
        if HAS_LEFT:
            start = tl.where(it < n_sink, it + s_lo, it - n_sink + t_lo) * BLOCK_N
        start = tl.multiple_of(start, BLOCK_N)
        k, v, j, local, real_k, segment_k = tile_inputs(
            start, columns, k_base, v_base, TABLE, b64 * table_b, K_LOC, K_SEG, b, k_b, k_j, v_b, v_j, kd, ve,
            pad, nk, M, D, E, D_PAD, E_PAD, PAGE,
        )  # fmt: skip
        raw = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        keep = kept(
            pos[:, None], local[None, :], real_q[:, None], real_k[None, :], left, right, chunk, sink_tokens,
            HAS_LEFT, HAS_RIGHT, HAS_CHUNK,
        )  # fmt: skip
        if SEGMENTS:
            keep = keep & (segment_q[:, None] == segment_k[None, :])
        if SPLIT_AT is not None:
            keep = keep & (local >= split_lo)[None, :]
        inside = inside_q[:, None] & real_k[None, :]
        bias_ptrs = BIAS
        mask_ptrs = MASK
        if HAS_BIAS:
            bias_ptrs = bias_row[:, None] + (j.to(tl.int64) * bias_j)[None, :]
        if HAS_MASK:
            mask_ptrs = mask_row[:, None] + (j.to(tl.int64) * mask_j)[None, :]
        full = (start - pad >= full_lo) & (start - pad + BLOCK_N <= full_hi)
        s, t = logits(
            raw, keep, full, scale, softcap, bias_ptrs, mask_ptrs, inside, HAS_SOFTCAP, HAS_BIAS, HAS_MASK, ALWAYS
        )
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # A row that has seen no key yet keeps top = -inf; subtracting it would give -inf - -inf.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((s - safe[:, None]) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        norm = norm * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        top = new_top
        if DROP is not None:
            on = tl.load(drop_row[:, None] + (j.to(tl.int64) * drop_j)[None, :], mask=inside, other=0)
            p = tl.where(on != 0, p, 0.0)
        if REPAIR:
            acc = exact_product(acc, p, s != float("-inf"), v, BLOCK_N)
        else:
            acc = product(narrowed(p, v.dtype), v, acc)

    if Q_LEN is not None:
        # Tiles that all real queries see are not masked, so that the other rows have picked something up.
        norm = tl.where(real_q, norm, 0.0)
        acc = tl.where(real_q[:, None], acc, 0.0)
    empty = norm == 0.0
    lse = tl.where(empty, float("-inf"), tl.where(empty, 0.0, top) + tl.log(tl.where(empty, 1.0, norm)))
    acc = acc / tl.where(empty, 1.0, norm)[:, None]
    if SINK is not None:
        sink = widened(tl.load(SINK + h))
        both = tl.maximum(lse, sink)
        safe = tl.where(both == float("-inf"), 0.0, both)
        joined = tl.exp2((lse - safe) * LOG2E) + tl.exp2((sink - safe) * LOG2E)
        joined = tl.where(both == float("-inf"), both, safe + tl.log(tl.where(both == float("-inf"), 1.0, joined)))
        weight = tl.exp2((lse - tl.where(both == float("-inf"), 0.0, joined)) * LOG2E)
        acc = tl.where(empty[:, None], 0.0, acc * weight[:, None])
        lse = joined
    rows = N
    if REPAIR:
        rows = tl.where(broken, N, 0)
    else:
        if FLAG is not None:
            tl.store(FLAG + flag, not_finite(acc))
        tl.store(lse_rows, lse, mask=inside_q)
    if DROP is not None:
        acc = acc * drop_scale
    e_mask = (i < rows)[:, None]
    if E != E_PAD:
        e_mask = e_mask & (e < E)[None, :]
    o_rows = O + (split64 * o_s + b64 * o_b + h64 * o_h + i64 * o_i)
    tl.store(o_rows[:, None] + (e.to(tl.int64) * o_e)[None, :], narrowed(acc, O.dtype.element_ty), mask=e_mask)
