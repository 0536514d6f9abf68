"""Gradients of softmax attention with data of the distance: queries, keys and values, and whatever a distance holds.

The weights are computed again from Q, K and LSE. Nothing is added atomically: dQ walks the keys of a query tile, dK
and dV the queries of a key tile, and the gradients of the tables walk the diagonals that a tile of the table stands
for, all batch entries (and, for a table that heads share, all heads) in order. A tile of diagonals is a parallelogram:
its logits come from a product with 2 * BLOCK keys, whose columns are shifted into place. See `relative`.
"""

# ruff: noqa: PIE808 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.relative import (
    SIZES,
    band_of,
    factors,
    key_tiles,
    relative_pairs,
    rows_of,
    seen,
    unskewed,
)
from attnspec.impls.engines.softmax_tiles import LOG2E, exact_product, narrowed, not_finite, product, widened


@triton.jit
def row_state(LSE, T, rows, real):
    """LSE and row term of some rows; +inf where a row sees nothing, so that its weights become 0."""
    lse = tl.load(LSE + rows, mask=real, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse), tl.load(T + rows, mask=real, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def relative_dq_kernel(
    Q, K, V, DO, LSE, T, DQ, REL, BETA, GAM, MASK, FLAG, BEFORE, AFTER, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d,
    v_b, v_h, v_j, v_e, do_b, do_h, do_i, do_e, l_b, l_h, l_i, dq_b, dq_h, dq_i, dq_d, rel_h, rel_m, rel_d,
    beta_h, beta_o, gam_h, gam_o, mask_b, mask_h, mask_i, mask_j, H, N, M, P, zero, block, tiles, flag_tiles, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    LOCAL: tl.constexpr, CLAMP: tl.constexpr, REPAIR: tl.constexpr, FLAG_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: one tile of queries of one head. BEFORE, AFTER: row sums of dS over keys beyond the table's ends."""
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    flag = pid // tiles * flag_tiles + tile * BLOCK // FLAG_BLOCK
    b64 = (pid // (tiles * H)).to(tl.int64)
    h64 = (pid // tiles % H).to(tl.int64)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    i64 = i.to(tl.int64)
    off = M - N
    pos = i + off
    d = tl.arange(0, D_PAD)
    d64 = d.to(tl.int64)
    e64 = tl.arange(0, E_PAD).to(tl.int64)
    q = rows_of(Q + b64 * q_b + h64 * q_h, i, N, q_i, d64 * q_d, D, D_PAD)
    do = rows_of(DO + b64 * do_b + h64 * do_h, i, N, do_i, e64 * do_e, E, E_PAD)
    state = b64 * l_b + h64 * l_h + i64 * l_i
    lse, term = row_state(LSE, T, state, i < N)
    lo, hi = key_tiles(
        tile * BLOCK + off, tl.minimum(tile * BLOCK + BLOCK, N) - 1 + off, M, block, CAUSAL, LOCAL, BLOCK
    )
    if REPAIR:
        broken = tl.load(FLAG + flag) != 0
        hi = tl.where(broken, hi, lo)
    rel_base = REL
    beta_base = BETA
    if REL is not None:
        rel_base = REL + h64 * rel_h
    if BETA is not None:
        beta_base = BETA + h64 * beta_h
    acc = tl.zeros([BLOCK, D_PAD], tl.float32)
    before = tl.zeros([BLOCK], tl.float32)
    after = tl.zeros([BLOCK], tl.float32)
    for it in range(lo, hi):
        j = it * BLOCK + tl.arange(0, BLOCK)
        j64 = j.to(tl.int64)
        k = rows_of(K + b64 * k_b + h64 * k_h, j, M, k_j, d64 * k_d, D, D_PAD)
        v = rows_of(V + b64 * v_b + h64 * v_h, j, M, v_j, e64 * v_e, E, E_PAD)
        inside = (i < N)[:, None] & (j < M)[None, :]
        mask_ptrs = MASK
        if MASK is not None:
            mask_ptrs = (MASK + (b64 * mask_b + h64 * mask_h + i64 * mask_i))[:, None] + (j64 * mask_j)[None, :]
        keep = seen(pos[:, None], j[None, :], inside, block, mask_ptrs, CAUSAL, LOCAL, MASK is not None)
        first = (it - tile) * BLOCK - BLOCK + 1 - off + zero
        s = relative_pairs(
            q, k, i, j, pos, REL, rel_base, BETA, beta_base, first, P, rel_m, rel_d, beta_o, N, M, scale, inside,
            D, D_PAD, CLAMP, BLOCK,
        )  # fmt: skip
        p = tl.exp2((tl.where(keep, s, float("-inf")) - lse[:, None]) * LOG2E)
        dp = product(do, tl.trans(v), tl.zeros([BLOCK, BLOCK], tl.float32))
        if GAM is not None:
            dp = dp * factors(GAM, GAM + h64 * gam_h, i, j, N, gam_o, inside)
        # Where a pair is masked dp may be NaN: select, do not multiply by the weight 0.
        ds = tl.where(keep, p * (dp - term[:, None]), 0.0)
        if REPAIR:
            acc = exact_product(acc, ds, keep, k, BLOCK)
        else:
            acc = product(narrowed(ds, k.dtype), k, acc)
        if REL is not None:
            band = band_of(rel_base, first, P, rel_m, d64 * rel_d, D, D_PAD, CLAMP, 2 * BLOCK)
            along = unskewed(ds, BLOCK)
            if REPAIR:
                there = unskewed(tl.where(keep, 1.0, 0.0), BLOCK) != 0.0
                acc = exact_product(acc, along, there, band, 2 * BLOCK)
            else:
                acc = product(narrowed(along, band.dtype), band, acc)
            if CLAMP:
                row = j[None, :] - pos[:, None] + zero
                before += tl.sum(tl.where(row < 0, ds, 0.0), axis=1)
                after += tl.sum(tl.where(row >= P, ds, 0.0), axis=1)
    rows = N
    if REPAIR:
        rows = tl.where(broken, N, 0)
    else:
        if FLAG is not None:
            tl.store(FLAG + flag, not_finite(acc))
        if CLAMP:
            tl.store(BEFORE + state, before, mask=i < N)
            tl.store(AFTER + state, after, mask=i < N)
    dq_rows = DQ + (b64 * dq_b + h64 * dq_h + i64 * dq_i)
    dq_mask = (i < rows)[:, None] & (d < D)[None, :]
    tl.store(dq_rows[:, None] + (d64 * dq_d)[None, :], narrowed(acc * scale, DQ.dtype.element_ty), mask=dq_mask)


@triton.jit(do_not_specialize=SIZES)
def relative_dkv_kernel(
    Q, K, V, DO, LSE, T, DK, DV, REL, BETA, GAM, MASK, FLAG, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d,
    v_b, v_h, v_j, v_e, do_b, do_h, do_i, do_e, l_b, l_h, l_i, dk_b, dk_h, dk_j, dk_d, dv_b, dv_h, dv_j, dv_e,
    rel_h, rel_m, rel_d, beta_h, beta_o, gam_h, gam_o, mask_b, mask_h, mask_i, mask_j,
    H, N, M, P, zero, block, tiles, flag_tiles, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, LOCAL: tl.constexpr, CLAMP: tl.constexpr, REPAIR: tl.constexpr, FLAG_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: one tile of keys of one head."""
    pid = tl.program_id(0)
    tile = pid % tiles
    flag = pid // tiles * flag_tiles + tile * BLOCK // FLAG_BLOCK
    b64 = (pid // (tiles * H)).to(tl.int64)
    h64 = (pid // tiles % H).to(tl.int64)
    j = tile * BLOCK + tl.arange(0, BLOCK)
    j64 = j.to(tl.int64)
    off = M - N
    d = tl.arange(0, D_PAD)
    d64 = d.to(tl.int64)
    e = tl.arange(0, E_PAD)
    e64 = e.to(tl.int64)
    k = rows_of(K + b64 * k_b + h64 * k_h, j, M, k_j, d64 * k_d, D, D_PAD)
    v = rows_of(V + b64 * v_b + h64 * v_h, j, M, v_j, e64 * v_e, E, E_PAD)
    lo = 0
    hi = tl.cdiv(N, BLOCK)
    if CAUSAL:
        lo = tl.maximum(tile * BLOCK - off, 0) // BLOCK
    if LOCAL:
        last = (tl.minimum(tile * BLOCK + BLOCK, M) - 1) // block * block + 2 * block
        hi = tl.minimum(hi, tl.cdiv(tl.maximum(last - off, 0), BLOCK))
    if REPAIR:
        broken = tl.load(FLAG + flag) != 0
        hi = tl.where(broken, hi, lo)
    rel_base = REL
    beta_base = BETA
    if REL is not None:
        rel_base = REL + h64 * rel_h
    if BETA is not None:
        beta_base = BETA + h64 * beta_h
    dk = tl.zeros([BLOCK, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK, E_PAD], tl.float32)
    for it in range(lo, hi):
        i = it * BLOCK + tl.arange(0, BLOCK)
        i64 = i.to(tl.int64)
        pos = i + off
        q = rows_of(Q + b64 * q_b + h64 * q_h, i, N, q_i, d64 * q_d, D, D_PAD)
        do = rows_of(DO + b64 * do_b + h64 * do_h, i, N, do_i, e64 * do_e, E, E_PAD)
        lse, term = row_state(LSE, T, b64 * l_b + h64 * l_h + i64 * l_i, i < N)
        inside = (i < N)[:, None] & (j < M)[None, :]
        mask_ptrs = MASK
        if MASK is not None:
            mask_ptrs = (MASK + (b64 * mask_b + h64 * mask_h + i64 * mask_i))[:, None] + (j64 * mask_j)[None, :]
        keep = seen(pos[:, None], j[None, :], inside, block, mask_ptrs, CAUSAL, LOCAL, MASK is not None)
        s = relative_pairs(
            q, k, i, j, pos, REL, rel_base, BETA, beta_base, (tile - it) * BLOCK - BLOCK + 1 - off + zero, P, rel_m,
            rel_d, beta_o, N, M, scale, inside, D, D_PAD, CLAMP, BLOCK,
        )  # fmt: skip
        p = tl.exp2((tl.where(keep, s, float("-inf")) - lse[:, None]) * LOG2E)
        dp = product(do, tl.trans(v), tl.zeros([BLOCK, BLOCK], tl.float32))
        weight = p
        if GAM is not None:
            factor = factors(GAM, GAM + h64 * gam_h, i, j, N, gam_o, inside)
            dp = dp * factor
            weight = tl.where(keep, p * factor, 0.0)
        ds = tl.where(keep, p * (dp - term[:, None]), 0.0)
        if REPAIR:
            turned = tl.trans(tl.where(keep, 1.0, 0.0)) != 0.0
            dv = exact_product(dv, tl.trans(weight), turned, do, BLOCK)
            dk = exact_product(dk, tl.trans(ds), turned, q, BLOCK)
        else:
            dv = product(tl.trans(narrowed(weight, do.dtype)), do, dv)
            dk = product(tl.trans(narrowed(ds, q.dtype)), q, dk)
    keys = M
    if REPAIR:
        keys = tl.where(broken, M, 0)
    else:
        if FLAG is not None:
            tl.store(FLAG + flag, tl.maximum(not_finite(dk), not_finite(dv)))
    rows = (j < keys)[:, None]
    dk_ptrs = (DK + (b64 * dk_b + h64 * dk_h + j64 * dk_j))[:, None] + (d64 * dk_d)[None, :]
    dv_ptrs = (DV + (b64 * dv_b + h64 * dv_h + j64 * dv_j))[:, None] + (e64 * dv_e)[None, :]
    tl.store(dk_ptrs, narrowed(dk * scale, DK.dtype.element_ty), mask=rows & (d < D)[None, :])
    tl.store(dv_ptrs, narrowed(dv, DV.dtype.element_ty), mask=rows & (e < E)[None, :])


@triton.jit
def products_of(
    x_base, x_index, x_count, x_row, x_column, y_base, y_index, y_count, y_row, y_column, acc,
    LENGTH: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """acc + x[x_index] @ y[y_index]^T over LENGTH features, STEP of them at a time: float32 products take registers."""
    x_real = ((x_index >= 0) & (x_index < x_count))[:, None]
    y_real = ((y_index >= 0) & (y_index < y_count))[:, None]
    for start in range(0, PADDED, STEP):
        f = start + tl.arange(0, STEP)
        f64 = f.to(tl.int64)
        there = (f < LENGTH)[None, :]
        x_ptrs = x_base + (x_index.to(tl.int64) * x_row)[:, None] + (f64 * x_column)[None, :]
        y_ptrs = y_base + (y_index.to(tl.int64) * y_row)[:, None] + (f64 * y_column)[None, :]
        x = tl.load(x_ptrs, mask=x_real & there, other=0.0)
        y = tl.load(y_ptrs, mask=y_real & there, other=0.0)
        acc = product(x, tl.trans(y), acc)
    return acc


@triton.jit(do_not_specialize=[*SIZES, "B", "count", "heads"])
def relative_table_kernel(
    Q, K, V, DO, LSE, T, REL, BETA, GAM, MASK, DREL, DBETA, DGAM, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d,
    v_b, v_h, v_j, v_e, do_b, do_h, do_i, do_e, l_b, l_h, l_i, rel_h, rel_m, rel_d, beta_h, beta_o, gam_h, gam_o,
    mask_b, mask_h, mask_i, mask_j, B, H, N, M, P, zero, block, tiles, count, heads, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    LOCAL: tl.constexpr, BLOCK: tl.constexpr, STEP_D: tl.constexpr, STEP_E: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK entries m of the tables of one head (or of all `heads` heads that share one).

    Entry m stands for the pairs with j = pos + m - zero. DREL [h, m, d], DBETA and DGAM [h, m], in float32.
    """
    pid = tl.program_id(0)
    m0 = pid % tiles * BLOCK
    group = pid // tiles
    a = tl.arange(0, BLOCK)
    m = m0 + a
    off = M - N
    shift = off + m0 - zero  # key of the pair (i, m0) is i + shift
    d = tl.arange(0, D_PAD)
    d64 = d.to(tl.int64)
    lo = tl.maximum(1 - BLOCK - shift, 0) // BLOCK
    hi = tl.cdiv(tl.minimum(N, tl.maximum(M - shift, 0)), BLOCK)
    each = tl.maximum(hi - lo, 0)
    at = a[:, None] + a[None, :]
    drel = tl.zeros([BLOCK, D_PAD], tl.float32)
    dbeta = tl.zeros([BLOCK], tl.float32)
    dgam = tl.zeros([BLOCK], tl.float32)
    for it in range(0, B * heads * each):
        b64 = (it // (heads * each)).to(tl.int64)
        h64 = (group * heads + it // each % heads).to(tl.int64)
        i0 = (lo + it % each) * BLOCK
        i = i0 + a
        i64 = i.to(tl.int64)
        window = i0 + shift + tl.arange(0, 2 * BLOCK)
        j = i0 + shift + at
        state = b64 * l_b + h64 * l_h + i64 * l_i
        lse, term = row_state(LSE, T, state, i < N)
        # Rows that see nothing take no part, whatever they hold.
        alive = tl.where(lse == float("inf"), N, i)
        q_base = Q + b64 * q_b + h64 * q_h
        wide = tl.zeros([BLOCK, 2 * BLOCK], tl.float32)
        wide = products_of(
            q_base, alive, N, q_i, q_d, K + b64 * k_b + h64 * k_h, window, M, k_j, k_d, wide, D, D_PAD, STEP_D
        )
        raw = tl.gather(wide, at, 1)
        if REL is not None:
            raw = products_of(
                q_base, alive, N, q_i, q_d, REL + h64 * rel_h, m, P, rel_m, rel_d, raw, D, D_PAD, STEP_D
            )
        s = raw * scale
        if BETA is not None:
            s += widened(tl.load(BETA + h64 * beta_h + m.to(tl.int64) * beta_o, mask=m < count, other=0.0))[None, :]
        inside = (i < N)[:, None] & (m < count)[None, :] & (j >= 0) & (j < M)
        mask_ptrs = MASK
        if MASK is not None:
            mask_ptrs = (MASK + (b64 * mask_b + h64 * mask_h + i64 * mask_i))[:, None] + j.to(tl.int64) * mask_j
        keep = seen((i + off)[:, None], j, inside, block, mask_ptrs, CAUSAL, LOCAL, MASK is not None)
        p = tl.exp2((tl.where(keep, s, float("-inf")) - lse[:, None]) * LOG2E)
        wide = tl.zeros([BLOCK, 2 * BLOCK], tl.float32)
        wide = products_of(
            DO + b64 * do_b + h64 * do_h, alive, N, do_i, do_e, V + b64 * v_b + h64 * v_h, window, M, v_j, v_e, wide,
            E, E_PAD, STEP_E,
        )  # fmt: skip
        dp = tl.gather(wide, at, 1)
        if DGAM is not None:
            dgam += tl.sum(tl.where(keep, p * dp, 0.0), axis=0)
        if GAM is not None:
            factor = widened(tl.load(GAM + h64 * gam_h + m.to(tl.int64) * gam_o, mask=m < count, other=0.0))
            dp = dp * factor[None, :]
        ds = tl.where(keep, p * (dp - term[:, None]), 0.0)
        if DBETA is not None:
            dbeta += tl.sum(ds, axis=0)
        if DREL is not None:
            q = rows_of(q_base, alive, N, q_i, d64 * q_d, D, D_PAD)
            drel = product(tl.trans(narrowed(ds, q.dtype)), q, drel)
    row = group.to(tl.int64) * count + m
    if DBETA is not None:
        tl.store(DBETA + row, dbeta, mask=m < count)
    if DGAM is not None:
        tl.store(DGAM + row, dgam, mask=m < count)
    if DREL is not None:
        tl.store(DREL + (row * D)[:, None] + d[None, :], drel * scale, mask=(m < count)[:, None] & (d < D)[None, :])
