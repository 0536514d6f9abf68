"""Softmax attention with data of the distance between query and key, forward: a tiled online softmax.

Three hooks, each left out where its tensor is None: REL, a table of vectors whose product with the query joins the
logit before the scale (Huang et al., arXiv 1809.04281, Eq. 3); BETA, numbers added to the scaled logit; GAM, factors
of the weights that the normalizer does not see (Luo et al., arXiv 2205.13401, section 4).

For REL a tile of queries meets a band of 2 * BLOCK rows of the table, one product for all of its pairs; the band's
columns are then shifted into place row by row, which is the paper's skewing, one tile at a time and in registers.
What a query does not see does not reach it, not even NaN: a tile that is not finite is taken again (REPAIR).
"""

# ruff: noqa: E741 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_tiles import LOG2E, exact_product, narrowed, not_finite, product, widened

SIZES = ["H", "N", "M", "P", "zero", "block", "tiles", "flag_tiles"]


@triton.jit
def rows_of(base, index, count, step, columns, LENGTH: tl.constexpr, PADDED: tl.constexpr):
    """The tile base[index, :LENGTH]; rows outside 0..count - 1 are not read and hold zeros."""
    real = ((index >= 0) & (index < count))[:, None]
    if LENGTH != PADDED:
        real = real & (tl.arange(0, PADDED) < LENGTH)[None, :]
    return tl.load(base + (index.to(tl.int64) * step)[:, None] + columns[None, :], mask=real, other=0.0)


@triton.jit
def band_of(base, first, P, step, columns, D: tl.constexpr, D_PAD: tl.constexpr, CLAMP: tl.constexpr, W: tl.constexpr):
    """Rows first .. first + W of the relative table; beyond its ends zeros, or with CLAMP the outermost row."""
    m = first + tl.arange(0, W)
    if CLAMP:
        m = tl.minimum(tl.maximum(m, 0), P - 1)
    return rows_of(base, m, P, step, columns, D, D_PAD)


@triton.jit
def skewed(logits, BLOCK: tl.constexpr):
    """[BLOCK, 2 * BLOCK] by row of the band to [query, key]: entry (a, c) is column c - a + BLOCK - 1."""
    a = tl.arange(0, BLOCK)
    return tl.gather(logits, a[None, :] - a[:, None] + (BLOCK - 1), 1)


@triton.jit
def unskewed(x, BLOCK: tl.constexpr):
    """The transpose of `skewed`: [query, key] to [query, row of the band], zeros where no key stands."""
    a = tl.arange(0, BLOCK)[:, None]
    at = tl.arange(0, 2 * BLOCK)[None, :] + a - (BLOCK - 1)
    found = tl.gather(x, tl.minimum(tl.maximum(at, 0), BLOCK - 1), 1)
    return tl.where((at >= 0) & (at < BLOCK), found, 0.0)


@triton.jit
def seen(pos, j, real, block, mask_ptrs, CAUSAL: tl.constexpr, LOCAL: tl.constexpr, MASKED: tl.constexpr):
    """Which pairs are kept; LOCAL: a query sees its own block and the one before."""
    keep = real
    if CAUSAL:
        keep = keep & (j <= pos)
    if LOCAL:
        keep = keep & (j // block >= pos // block - 1)
    if MASKED:
        keep = keep & (tl.load(mask_ptrs, mask=keep, other=0) != 0)
    return keep


@triton.jit
def key_tiles(first, last, M, block, CAUSAL: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr):
    """The key tiles [lo, hi) that queries at the positions first..last may see."""
    lo = 0
    hi = tl.cdiv(M, BLOCK)
    if CAUSAL:
        hi = tl.cdiv(tl.minimum(tl.maximum(last + 1, 0), M), BLOCK)
    if LOCAL:
        lo = tl.maximum(tl.maximum(first, 0) // block - 1, 0) * block // BLOCK
    return lo, hi


@triton.jit
def relative_pairs(
    q, k, i, j, pos, REL, rel_base, BETA, beta_base, first, P, rel_m, rel_d, beta_o, N, M, scale, inside,
    D: tl.constexpr, D_PAD: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scaled logits of a tile [query, key], all terms included, not masked. `first`: the band's row of w = 0."""
    raw = product(q, tl.trans(k), tl.zeros([BLOCK, BLOCK], tl.float32))
    if REL is not None:
        columns = tl.arange(0, D_PAD).to(tl.int64) * rel_d
        band = band_of(rel_base, first, P, rel_m, columns, D, D_PAD, CLAMP, 2 * BLOCK)
        raw += skewed(product(q, tl.trans(band), tl.zeros([BLOCK, 2 * BLOCK], tl.float32)), BLOCK)
    s = raw * scale
    if BETA is not None:
        at = (j[None, :] - i[:, None] + N - 1).to(tl.int64)
        s += widened(tl.load(beta_base + at * beta_o, mask=inside, other=0.0))
    return s


@triton.jit
def factors(GAM, gam_base, i, j, N, gam_o, inside):
    """The factors of a tile's weights."""
    at = (j[None, :] - i[:, None] + N - 1).to(tl.int64)
    return widened(tl.load(gam_base + at * gam_o, mask=inside, other=0.0))


@triton.jit(do_not_specialize=SIZES)
def relative_forward_kernel(
    Q, K, V, O, LSE, REL, BETA, GAM, MASK, FLAG, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, v_b, v_h, v_j, v_e,
    o_b, o_h, o_i, o_e, l_b, l_h, l_i, rel_h, rel_m, rel_d, beta_h, beta_o, gam_h, gam_o,
    mask_b, mask_h, mask_i, mask_j, H, N, M, P, zero, block, tiles, flag_tiles, scale, D: tl.constexpr, E: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, CAUSAL: tl.constexpr, LOCAL: tl.constexpr, CLAMP: tl.constexpr,
    REPAIR: tl.constexpr, FLAG_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: one tile of queries of one head."""
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles  # the longest rows of a causal problem start first
    flag = pid // tiles * flag_tiles + tile * BLOCK // FLAG_BLOCK
    b64 = (pid // (tiles * H)).to(tl.int64)
    h64 = (pid // tiles % H).to(tl.int64)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    i64 = i.to(tl.int64)
    off = M - N
    pos = i + off
    d64 = tl.arange(0, D_PAD).to(tl.int64)
    e = tl.arange(0, E_PAD)
    e64 = e.to(tl.int64)
    q = rows_of(Q + b64 * q_b + h64 * q_h, i, N, q_i, d64 * q_d, D, D_PAD)
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
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, E_PAD], tl.float32)
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
        s = relative_pairs(
            q, k, i, j, pos, REL, rel_base, BETA, beta_base, (it - tile) * BLOCK - BLOCK + 1 - off + zero, P, rel_m,
            rel_d, beta_o, N, M, scale, inside, D, D_PAD, CLAMP, BLOCK,
        )  # fmt: skip
        s = tl.where(keep, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # A row that has seen no key yet keeps top = -inf; subtracting it would give -inf - -inf.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((s - safe[:, None]) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        norm = norm * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        top = new_top
        if GAM is not None:
            p = tl.where(keep, p * factors(GAM, GAM + h64 * gam_h, i, j, N, gam_o, inside), 0.0)
        if REPAIR:
            acc = exact_product(acc, p, keep, v, BLOCK)
        else:
            acc = product(narrowed(p, v.dtype), v, acc)
    empty = norm == 0.0
    acc = acc / tl.where(empty, 1.0, norm)[:, None]
    rows = N
    if REPAIR:
        rows = tl.where(broken, N, 0)
    else:
        lse = tl.where(empty, float("-inf"), tl.where(empty, 0.0, top) + tl.log(tl.where(empty, 1.0, norm)))
        tl.store(LSE + (b64 * l_b + h64 * l_h + i64 * l_i), lse, mask=i < N)
        if FLAG is not None:
            tl.store(FLAG + flag, not_finite(acc))
    o_rows = O + (b64 * o_b + h64 * o_h + i64 * o_i)
    o_mask = (i < rows)[:, None] & (e < E)[None, :]
    tl.store(o_rows[:, None] + (e64 * o_e)[None, :], narrowed(acc, O.dtype.element_ty), mask=o_mask)
