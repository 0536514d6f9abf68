"""Softmax attention over pairs of keys, forward: third-order attention with products of keys and of values.

    o[i] = sum_jl softmax_jl(scale * sum_d q[i,d] k1[j,d] k2[l,d]) v1[j] * v2[l]

A program owns a tile of queries of one head. A tile of the first keys stays at hand while the keys of the second kind
pass by one at a time: the query times that key attends over the tile, and what it gathers is multiplied by the second
value (Alman and Song, arXiv 2310.04064, Definition 1.2). Launched by `attnspec.impls.kronecker`.
"""

# ruff: noqa: E741 (O is the field's name of the output)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.mapped_tiles import guarded_product, rows_of
from attnspec.impls.engines.softmax_tiles import LOG2E, narrowed, product, widened


@triton.jit(do_not_specialize=["H", "G", "N", "M", "L", "tiles"])
def pair_attention_kernel(
    Q, K1, K2, V1, V2, O, LSE,
    q_b, q_h, q_i, q_d, k1_b, k1_g, k1_j, k1_d, k2_b, k2_g, k2_l, k2_d, v1_b, v1_g, v1_j, v1_e, v2_b, v2_g, v2_l, v2_e,
    o_b, o_h, o_i, o_e, H, G, N, M, L, tiles, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Outputs and LSE `[b,h,i]` (contiguous, float32); head h reads key head h // G."""
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # the longest rows of a causal problem start first
    head = program // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    g = h // G
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    q = widened(rows_of(Q + b * q_b + h * q_h, i, q_i, d, q_d, i < N, D, D_PAD))
    K1 += b * k1_b + g * k1_g
    V1 += b * v1_b + g * v1_g
    firsts, seconds = M, L
    if CAUSAL:
        firsts = tl.minimum(M, (tile + 1) * BLOCK_M)
        seconds = tl.minimum(L, (tile + 1) * BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, E_PAD], tl.float32)
    for start in range(0, firsts, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k1 = rows_of(K1, j, k1_j, d, k1_d, j < M, D, D_PAD)
        v1 = rows_of(V1, j, v1_j, e, v1_e, j < M, E, E_PAD)
        second_k = K2 + b * k2_b + g * k2_g
        second_v = V2 + b * v2_b + g * v2_g
        for l in range(seconds):
            k2 = widened(tl.load(second_k + d.to(tl.int64) * k2_d, mask=d < D, other=0.0))
            v2 = widened(tl.load(second_v + e.to(tl.int64) * v2_e, mask=e < E, other=0.0))
            second_k += k2_l
            second_v += v2_l
            sees = i < N
            keep = sees[:, None] & (j < M)[None, :]
            if CAUSAL:
                sees = sees & (l <= i)
                keep = keep & (j[None, :] <= i[:, None]) & sees[:, None]
            joined = narrowed(q * k2[None, :], k1.dtype)
            s = product(joined, tl.trans(k1), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
            s = tl.where(keep, s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2((s - safe[:, None]) * LOG2E)
            shrink = tl.exp2((top - safe) * LOG2E)
            norm = norm * shrink + tl.sum(p, 1)
            top = new
            part = guarded_product(tl.zeros([BLOCK_M, E_PAD], tl.float32), p, keep, v1, CAUSAL)
            # A key that a row does not see adds nothing, even if its value is not finite.
            acc = acc * shrink[:, None] + tl.where(sees[:, None], part * v2[None, :], 0.0)
    empty = norm == 0.0
    rest = tl.where(empty, 1.0, norm)
    lse = tl.where(empty, float("-inf"), top + tl.log(rest))
    tl.store(LSE + head.to(tl.int64) * N + i, lse, mask=i < N)
    at = (O + b * o_b + h * o_h + i.to(tl.int64) * o_i)[:, None] + (e.to(tl.int64) * o_e)[None, :]
    mask = (i < N)[:, None] & (e < E)[None, :]
    tl.store(at, narrowed(acc / rest[:, None], O.dtype.element_ty), mask=mask)
