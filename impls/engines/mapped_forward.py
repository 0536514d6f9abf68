"""Tiled attention with mapped logits and probabilities, forward; `mapped_tiles` says what it computes.

A program owns a tile of query rows of one head. Where the map needs the finished probabilities (a clip, a power of
what is above average) the keys are walked twice, first for the row's normaliser, as no rescaling can pass through such
a map; otherwise once. Launched by `mapped_launch`.
"""

# ruff: noqa: E741, RUF059 (O is the field's name of the output; Triton knows no placeholder names)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.mapped_tiles import (
    IDENTITY,
    SHARPENED,
    activated,
    guarded_product,
    pairs,
    probabilities,
    products,
    rows_of,
    sharpened,
    unit_rows,
    weights,
)
from attnspec.impls.engines.softmax_tiles import LOG2E, narrowed

SIZES = ["H", "N", "M", "tiles", "offset_rows"]


@triton.jit
def visible(i, N, M, MASK, mask_i, mask_j, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many keys each row of a tile keeps, in float32."""
    if MASK is None:
        if CAUSAL:
            count = tl.minimum(tl.maximum(i + M - N + 1, 0), M).to(tl.float32)
        else:
            count = tl.zeros([BLOCK_M], tl.float32) + M
    else:
        count = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, M, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            count += tl.sum(pairs(i[:, None], j[None, :], N, M, MASK, mask_i, mask_j, CAUSAL).to(tl.float32), 1)
    return count


@triton.jit(do_not_specialize=SIZES)
def mapped_forward_kernel(
    Q, K, V, O, MASK, Q_LENGTH, K_LENGTH, GATE, TOP, REST, COUNT, PEAK, TOTAL,
    q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, v_b, v_h, v_j, v_e, o_b, o_h, o_i, o_e, mask_b, mask_h, mask_i, mask_j,
    H, N, M, tiles, offset_rows, scale, growth, low, high, power, log_eps,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    GROWS: tl.constexpr, ACTIVATION: tl.constexpr, MAP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Outputs, and what the backward pass wants of a row (contiguous `[b,h,i]`, float32): its largest logit, the
    logarithm of its sum beside that, its number of keys, its largest excess and the sum of the powers.

    With GROWS the scale of a row is `growth` times the logarithm of its number of keys.
    """
    GUARD: tl.constexpr = CAUSAL or MASK is not None
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # the longest rows of a causal problem start first
    head = program // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    Q += b * q_b + h * q_h
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    O += b * o_b + h * o_h
    if MASK is not None:
        MASK += b * mask_b + h * mask_h
    if K_LENGTH is not None:
        Q_LENGTH += head.to(tl.int64) * N
        K_LENGTH += head.to(tl.int64) * M
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    q = unit_rows(Q, Q_LENGTH, i, q_i, d, q_d, i < N, D, D_PAD)
    count = tl.zeros([BLOCK_M], tl.float32)
    if GROWS or MAP == SHARPENED:
        count = visible(i, N, M, MASK, mask_i, mask_j, CAUSAL, BLOCK_M, BLOCK_N)
    factor = tl.zeros([BLOCK_M], tl.float32) + scale
    if GROWS:
        factor = growth * tl.log(tl.maximum(count, 1.0))
    end = M
    if CAUSAL:
        end = tl.minimum(M, (tile + 1) * BLOCK_M + M - N)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, E_PAD], tl.float32)
    for start in range(0, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = unit_rows(K, K_LENGTH, j, k_j, d, k_d, j < M, D, D_PAD)
        keep = pairs(i[:, None], j[None, :], N, M, MASK, mask_i, mask_j, CAUSAL)
        s = products(
            q, Q, Q_LENGTH, i, q_i, q_d, i < N, k, K, K_LENGTH, j, k_j, k_d, j < M, D, CHUNK, BLOCK_M, BLOCK_N
        )  # fmt: skip
        s = s * factor[:, None]
        t = tl.where(keep, activated(s, ACTIVATION), float("-inf"))
        new = tl.maximum(top, tl.max(t, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2((t - safe[:, None]) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        norm = norm * shrink + tl.sum(p, 1)
        top = new
        if MAP == IDENTITY:
            v = rows_of(V, j, v_j, e, v_e, j < M, E, E_PAD)
            acc = guarded_product(acc * shrink[:, None], p, keep, v, GUARD)
    empty = norm == 0.0
    rest = tl.log(tl.where(empty, 1.0, norm))
    top = tl.where(empty, 0.0, top)
    at = head.to(tl.int64) * N + i
    tl.store(TOP + at, top, mask=i < N)
    tl.store(REST + at, rest, mask=i < N)
    if GROWS or MAP == SHARPENED:
        tl.store(COUNT + at, count, mask=i < N)

    if MAP == IDENTITY:
        acc = acc / tl.where(empty, 1.0, norm)[:, None]
    else:
        offset = tl.full([BLOCK_M], 1.0, tl.float32)
        if CAUSAL:
            offset = tl.where(i + M - N < offset_rows, 0.0, 1.0)
        peak = tl.where(empty, 0.0, count * tl.exp2(-rest * LOG2E) - offset)
        some = peak > 0.0
        peak = tl.where(peak <= 0.0, 1.0, peak)
        total = tl.where(some, tl.exp2((log_eps - power * tl.log(peak)) * LOG2E), float("inf"))
        for start in range(0, end, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            k = unit_rows(K, K_LENGTH, j, k_j, d, k_d, j < M, D, D_PAD)
            v = rows_of(V, j, v_j, e, v_e, j < M, E, E_PAD)
            keep = pairs(i[:, None], j[None, :], N, M, MASK, mask_i, mask_j, CAUSAL)
            s = products(
                q, Q, Q_LENGTH, i, q_i, q_d, i < N, k, K, K_LENGTH, j, k_j, k_d, j < M, D, CHUNK, BLOCK_M, BLOCK_N
            )  # fmt: skip
            s = s * factor[:, None]
            p = probabilities(s, keep, top[:, None], rest[:, None], ACTIVATION)
            if MAP == SHARPENED:
                w, x = sharpened(p, count[:, None], offset[:, None], peak[:, None], power)
            else:
                w, slope = weights(p, 0.0, 0.0, 1.0, 1.0, low, high, power, MAP)
            w = tl.where(keep, w, 0.0)
            if MAP == SHARPENED:
                total += tl.sum(w, 1)
            acc = guarded_product(acc, w, keep, v, GUARD)
        if MAP == SHARPENED:
            acc = acc / total[:, None]
            tl.store(PEAK + at, peak, mask=i < N)
            tl.store(TOTAL + at, total, mask=i < N)
    if GATE is not None:
        acc = acc * tl.load(GATE + at, mask=i < N, other=0.0)[:, None]
    mask = (i < N)[:, None] & (e < E)[None, :]
    at_out = (O + i.to(tl.int64) * o_i)[:, None] + (e.to(tl.int64) * o_e)[None, :]
    tl.store(at_out, narrowed(acc, O.dtype.element_ty), mask=mask)
