"""ProbSparse attention: the measure of every query on sampled keys, default rows, and attention of the active queries.

Zhou et al., arXiv 2012.07436, Algorithm 1. Default rows are the mean of the values or, in the causal form, their
running sum: `value_sum_kernel` adds up chunks, the host adds up what comes before each (a tensor shorter by the
chunk's length), and `value_rows_kernel` writes the rows. The rows of the active queries are then overwritten by
softmax attention. In the causal form a tile whose output is not finite flags its head, which is then taken again over
the keys that each row sees only (REPAIR), so that nothing leaks from later values, not even NaN.
"""

# ruff: noqa: E741, PIE808, SIM102 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.landmark_forward import feature_rows
from attnspec.impls.engines.softmax_tiles import LOG2E, exact_product, narrowed, not_finite, product, widened

SIZES = ["H", "N", "M", "U", "tiles", "active"]


@triton.jit(do_not_specialize=SIZES)
def sample_measure_kernel(
    Q, K, SAMP, MSR, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, s_i, s_s, H, N, U, tiles, divisor,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """MSR `[b,h,i]` (float32): largest sampled score minus their sum / divisor. SAMP `[i,s]`: sampled keys."""
    pid = tl.program_id(0)
    head = pid // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    inside = i < N
    q = widened(feature_rows(Q + b * q_b + h * q_h, i, q_i, d, q_d, inside, D))
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for s in range(0, U):
        j = tl.load(SAMP + (i.to(tl.int64) * s_i + s * s_s), mask=inside, other=0)
        k = widened(feature_rows(K + b * k_b + h * k_h, j, k_j, d, k_d, inside, D))
        score = tl.sum(q * k, axis=1)
        best = tl.maximum(best, score)
        total += score
    tl.store(MSR + ((b * H + h) * N + i), best - total / divisor, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def value_sum_kernel(
    V, SUM, v_b, v_h, v_j, v_e, H, M, tiles, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr
):
    """SUM `[b,h,c,e]` (float32): sums of the values of each chunk of BLOCK_N keys."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, E_PAD)
    v = feature_rows(V + b * v_b + h * v_h, j, v_j, e, v_e, j < M, E)
    tl.store(SUM + ((b * H + h) * tiles + tile) * E + e, tl.sum(widened(v), axis=0), mask=e < E)


@triton.jit(do_not_specialize=SIZES)
def value_rows_kernel(
    V, BEFORE, O, v_b, v_h, v_j, v_e, f_h, f_c, o_b, o_h, o_i, o_e, H, N, tiles,
    E: tl.constexpr, E_PAD: tl.constexpr, RUNNING: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Default rows O: BEFORE `[b * h,c,e]` of their chunk and, where RUNNING, the chunk's values up to the row."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, E_PAD)
    base = tl.load(BEFORE + (head.to(tl.int64) * f_h + tile * f_c) + e, mask=e < E, other=0.0)
    rows = tl.zeros([BLOCK_N, E_PAD], tl.float32) + base[None, :]
    if RUNNING:
        v = feature_rows(V + b * v_b + h * v_h, i, v_j, e, v_e, i < N, E)
        rows += tl.cumsum(widened(v), axis=0)
    tl.store(
        (O + (b * o_b + h * o_h + i.to(tl.int64) * o_i))[:, None] + (e.to(tl.int64) * o_e)[None, :],
        narrowed(rows, O.dtype.element_ty), mask=(i < N)[:, None] & (e < E)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def active_rows_kernel(
    Q, K, V, O, ACTIVE, FLAG, q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, v_b, v_h, v_j, v_e, o_b, o_h, o_i, o_e,
    H, M, tiles, active, scale, D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, REPAIR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of the queries ACTIVE `[b,h,r]`, in rising order. Program: BLOCK_M of them."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    bound = active
    if REPAIR:
        bound = tl.where(tl.load(FLAG + head) != 0, active, 0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < bound
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    i = tl.load(ACTIVE + (b * H + h) * active + r, mask=inside, other=-1)
    q = feature_rows(Q + b * q_b + h * q_h, i, q_i, d, q_d, inside, D)
    end = M
    if CAUSAL:
        end = tl.max(i, axis=0) + 1
    if REPAIR:
        end = tl.where(bound > 0, end, 0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, E_PAD], tl.float32)
    for first in range(0, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        k = feature_rows(K + b * k_b + h * k_h, j, k_j, d, k_d, j < end, D)
        v = feature_rows(V + b * v_b + h * v_h, j, v_j, e, v_e, j < end, E)
        s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        keep = inside[:, None] & (j < end)[None, :]
        if CAUSAL:
            keep = keep & (j[None, :] <= i[:, None])
        s = tl.where(keep, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((s - safe[:, None]) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        norm = norm * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        if REPAIR:
            acc = exact_product(acc, p, keep, v, BLOCK_N)
        else:
            acc = product(narrowed(p, v.dtype), v, acc)
        top = new_top
    out = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    if FLAG is not None:
        if not REPAIR:
            wrong = not_finite(tl.where(inside[:, None], out, 0.0))
            tl.store(FLAG + head, 1, mask=wrong != 0)
    tl.store(
        (O + (b * o_b + h * o_h + i.to(tl.int64) * o_i))[:, None] + (e.to(tl.int64) * o_e)[None, :],
        narrowed(out, O.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :],
    )  # fmt: skip
