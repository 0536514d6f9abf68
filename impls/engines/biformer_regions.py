"""Bi-level routing attention: means of regions, scores of region pairs, and attention over the kept regions.

Zhu et al., arXiv 2303.08810, Eq. 3-8. A region is a box of cells of the map, the last ones cut at its edge. The keys of
a query region are its kept regions one after the other, cell by cell: key number n is cell n % CELLS of the kept region
n // CELLS, so that a tile of keys spans regions when they are small. All queries of a region see the same keys, and no
value that a query does not see enters a product.
"""

# ruff: noqa: E741, PIE808 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_tiles import LOG2E, narrowed, product, widened

SIZES = ["H", "Y", "X", "high", "wide", "across", "regions", "kept", "tiles", "S"]


@triton.jit
def cell(n, region, Y, X, high, wide, across):
    """Row and column on the map of cell n < high * wide of a region, and whether the region, if cut, has it."""
    y = region // across * high + n // wide
    x = region % across * wide + n % wide
    return y, x, (y < Y) & (x < X)


@triton.jit(do_not_specialize=SIZES)
def region_mean_kernel(
    A, MEAN, a_b, a_h, a_y, a_x, a_d, H, Y, X, high, wide, across, regions, tiles,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """MEAN `[b,a,h,d]` (float32) of A `[b,h,y,x,d]` over the cells of a region. Program: BLOCK regions of one head."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    region = tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    total = tl.zeros([BLOCK, D_PAD], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for n in range(0, high * wide):
        y, x, real = cell(n, region, Y, X, high, wide, across)
        real = real & (region < regions)
        rows = A + (b * a_b + h * a_h + y.to(tl.int64) * a_y + x.to(tl.int64) * a_x)
        a = tl.load(
            rows[:, None] + (d.to(tl.int64) * a_d)[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
        )
        total += widened(a)
        count += real.to(tl.float32)
    out = MEAN + ((b * regions + region) * H + h) * D
    mean = total / tl.maximum(count, 1.0)[:, None]
    tl.store(out[:, None] + d[None, :], mean, mask=(region < regions)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=[*SIZES, "F"])
def region_score_kernel(
    Q, K, A, regions, tiles, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr
):
    """A `[b,a,n]` = Q `[b,a,f]` K `[b,n,f]`^T, all float32 and contiguous; f runs over heads and features."""
    pid = tl.program_id(0)
    b = (pid // (tiles * tiles)).to(tl.int64)
    m = pid // tiles % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        q = tl.load(Q + ((b * regions + m) * F)[:, None] + f[None, :],
                    mask=(m < regions)[:, None] & (f < F)[None, :], other=0.0)  # fmt: skip
        k = tl.load(K + ((b * regions + n) * F)[:, None] + f[None, :],
                    mask=(n < regions)[:, None] & (f < F)[None, :], other=0.0)  # fmt: skip
        acc = product(q, tl.trans(k), acc)
    out = A + ((b * regions + m) * regions)[:, None] + n[None, :]
    tl.store(out, acc, mask=(m < regions)[:, None] & (n < regions)[None, :])


@triton.jit(do_not_specialize=SIZES)
def region_attention_kernel(
    Q, K, V, O, PICK, SHARE, LEPE, LEPE_BIAS, q_b, q_h, q_y, q_x, q_d, k_b, k_h, k_y, k_x, k_d,
    v_b, v_h, v_y, v_x, v_e, o_b, o_h, o_y, o_x, o_e, w_c, w_p, w_q, bias_c,
    H, Y, X, high, wide, across, regions, kept, tiles, S, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: a tile of the queries of one region of one head.

    PICK `[b,a,r]` int32 are the kept regions, SHARE `[b,a,r]` what their keys and values are multiplied by. ZEROS:
    cells that a cut region lacks count with a logit of 0. LEPE `[c,p,q]`: depthwise convolution of V, added in float32.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    region = pid // tiles % regions
    head = pid // tiles // regions
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    d64 = d.to(tl.int64)
    e64 = e.to(tl.int64)
    own = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x, real = cell(own, region, Y, X, high, wide, across)
    real = real & (own < high * wide)
    q = tl.load(
        (Q + (b * q_b + h * q_h + y.to(tl.int64) * q_y + x.to(tl.int64) * q_x))[:, None] + (d64 * q_d)[None, :],
        mask=real[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    chosen = (b * regions + region) * kept
    cells = high * wide
    v_base = V + b * v_b + h * v_h
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, E_PAD], tl.float32)
    for first in range(0, kept * cells, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        listed = n < kept * cells
        other = tl.load(PICK + chosen + n // cells, mask=listed, other=0)
        ky, kx, there = cell(n % cells, other, Y, X, high, wide, across)
        there = there & listed
        ky = ky.to(tl.int64)
        kx = kx.to(tl.int64)
        k = tl.load(
            (K + (b * k_b + h * k_h + ky * k_y + kx * k_x))[:, None] + (d64 * k_d)[None, :],
            mask=there[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        v = tl.load(
            (v_base + (ky * v_y + kx * v_x))[:, None] + (e64 * v_e)[None, :],
            mask=there[:, None] & (e < E)[None, :], other=0.0,
        )  # fmt: skip
        s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        if SHARE is not None:
            share = tl.load(SHARE + chosen + n // cells, mask=listed, other=0.0)
            s = s * share[None, :]
        if ZEROS:
            s = tl.where(there[None, :], s, 0.0)
            s = tl.where(listed[None, :], s, float("-inf"))
        else:
            s = tl.where(there[None, :], s, float("-inf"))
        # The cells that a cut region lacks may fill a whole tile.
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((s - safe[:, None]) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        norm = norm * shrink + tl.sum(p, axis=1)
        if SHARE is not None:
            p = p * share[None, :]
        acc = product(narrowed(p, v.dtype), v, acc * shrink[:, None])
        top = new_top
    out = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    if LEPE is not None:
        channel = h * E + e64
        bent = tl.zeros([BLOCK_M, E_PAD], tl.float32)
        for tap in range(0, S * S):
            ny = y + tap // S - S // 2
            nx = x + tap % S - S // 2
            near = real & (ny >= 0) & (ny < Y) & (nx >= 0) & (nx < X)
            w = tl.load(LEPE + channel * w_c + tap // S * w_p + tap % S * w_q, mask=e < E, other=0.0)
            v = tl.load(
                (v_base + (ny.to(tl.int64) * v_y + nx.to(tl.int64) * v_x))[:, None] + (e64 * v_e)[None, :],
                mask=near[:, None] & (e < E)[None, :], other=0.0,
            )  # fmt: skip
            # Beyond the edge there is no tap at all, whatever the weight is.
            bent += tl.where(near[:, None], widened(w)[None, :] * widened(v), 0.0)
        if LEPE_BIAS is not None:
            bent += widened(tl.load(LEPE_BIAS + channel * bias_c, mask=e < E, other=0.0))[None, :]
        out += bent
    tl.store(
        (O + (b * o_b + h * o_h + y.to(tl.int64) * o_y + x.to(tl.int64) * o_x))[:, None] + (e64 * o_e)[None, :],
        narrowed(out, O.dtype.element_ty), mask=real[:, None] & (e < E)[None, :],
    )  # fmt: skip
