"""Gradients of tiled attention with mapped logits and probabilities; `mapped_tiles` says of what.

Probabilities are computed again from the row's normaliser. A program of the first kernel owns a tile of queries: it
walks the keys once for what a softmax subtracts (sum of P dP; with a plain map that is the product of dO and O) and
once for dQ. A program of the second owns a tile of keys and walks the queries. No atomics.
"""

# ruff: noqa: E741 (O is the field's name of the output)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.mapped_forward import SIZES
from attnspec.impls.engines.mapped_tiles import (
    CLIPPED,
    IDENTITY,
    SHARPENED,
    guarded_product,
    pairs,
    probabilities,
    products,
    rise,
    rows_of,
    unit_rows,
    weights,
)
from attnspec.impls.engines.softmax_tiles import narrowed, widened


@triton.jit
def row_values(
    i, TOP, REST, COUNT, PEAK, TOTAL, GATE, N, M, offset_rows, scale, growth,
    CAUSAL: tl.constexpr, GROWS: tl.constexpr, MAP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of rows i: largest T, log of the sum beside it, scale, number of keys, offset, largest excess, sum, gate."""
    inside = i < N
    one = tl.full([BLOCK_M], 1.0, tl.float32)
    top = tl.load(TOP + i, mask=inside, other=0.0)
    rest = tl.load(REST + i, mask=inside, other=0.0)
    count = one
    peak = one
    total = one
    gate = one
    offset = one
    if GROWS or MAP == SHARPENED:
        count = tl.load(COUNT + i, mask=inside, other=1.0)
    factor = one * scale
    if GROWS:
        factor = growth * tl.log(tl.maximum(count, 1.0))
    if MAP == SHARPENED:
        peak = tl.load(PEAK + i, mask=inside, other=1.0)
        total = tl.load(TOTAL + i, mask=inside, other=float("inf"))
        if CAUSAL:
            offset = tl.where(i + M - N < offset_rows, 0.0, 1.0)
    if GATE is not None:
        gate = tl.load(GATE + i, mask=inside, other=0.0)
    return top, rest, factor, count, offset, peak, total, gate


@triton.jit
def unit_gradient(dx, X, LENGTH, at, x_i, d, x_d, inside, D: tl.constexpr, D_PAD: tl.constexpr):
    """The gradient of rows from that of the rows divided by their length."""
    if LENGTH is not None:
        length = tl.load(LENGTH + at, mask=inside, other=1.0)[:, None]
        x = widened(rows_of(X, at, x_i, d, x_d, inside, D, D_PAD)) / length
        # A length at its lower bound is a constant.
        along = tl.where(length > 1e-12, tl.sum(tl.where(x == 0.0, 0.0, x * dx), 1)[:, None], 0.0)
        dx = (dx - x * along) / length
    return dx


@triton.jit(do_not_specialize=SIZES)
def mapped_dq_kernel(
    Q, K, V, O, DO, MASK, Q_LENGTH, K_LENGTH, GATE, TOP, REST, COUNT, PEAK, TOTAL, TERM, SHIFT, DQ, DGATE,
    q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, v_b, v_h, v_j, v_e, o_b, o_h, o_i, o_e, do_b, do_h, do_i, do_e,
    dq_b, dq_h, dq_i, dq_d, mask_b, mask_h, mask_i, mask_j,
    H, N, M, tiles, offset_rows, scale, growth, low, high, power,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    GROWS: tl.constexpr, ACTIVATION: tl.constexpr, MAP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, and per row (contiguous `[b,h,i]`, float32) what the softmax subtracts (TERM), what the normalisation of the
    powers subtracts (SHIFT) and the gradient of the gate.
    """
    GUARD: tl.constexpr = CAUSAL or MASK is not None
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = program // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    Q += b * q_b + h * q_h
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    O += b * o_b + h * o_h
    DO += b * do_b + h * do_h
    DQ += b * dq_b + h * dq_h
    if MASK is not None:
        MASK += b * mask_b + h * mask_h
    row = head.to(tl.int64) * N
    if K_LENGTH is not None:
        Q_LENGTH += row
        K_LENGTH += head.to(tl.int64) * M
    if GATE is not None:
        GATE += row
        DGATE += row
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < N
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    q = unit_rows(Q, Q_LENGTH, i, q_i, d, q_d, inside, D, D_PAD)
    do = rows_of(DO, i, do_i, e, do_e, inside, E, E_PAD)
    top, rest, factor, count, offset, peak, total, gate = row_values(
        i, TOP + row, REST + row, COUNT + row, PEAK + row, TOTAL + row, GATE, N, M, offset_rows, scale, growth,
        CAUSAL, GROWS, MAP, BLOCK_M,
    )  # fmt: skip
    end = M
    if CAUSAL:
        end = tl.minimum(M, (tile + 1) * BLOCK_M + M - N)
    shift = tl.zeros([BLOCK_M], tl.float32)
    term = tl.zeros([BLOCK_M], tl.float32)
    if MAP != CLIPPED:
        # sum of W dW. A gate would be in O already: mechanisms with a gate are clipped.
        o = rows_of(O, i, o_i, e, o_e, inside, E, E_PAD)
        shift = tl.sum(widened(o) * widened(do), 1)
    if MAP == IDENTITY:
        term = shift
        shift = tl.zeros([BLOCK_M], tl.float32)
    else:
        opened = tl.zeros([BLOCK_M], tl.float32)
        steep = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, end, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            k = unit_rows(K, K_LENGTH, j, k_j, d, k_d, j < M, D, D_PAD)
            v = rows_of(V, j, v_j, e, v_e, j < M, E, E_PAD)
            keep = pairs(i[:, None], j[None, :], N, M, MASK, mask_i, mask_j, CAUSAL)
            s = products(
                q, Q, Q_LENGTH, i, q_i, q_d, inside, k, K, K_LENGTH, j, k_j, k_d, j < M, D, CHUNK, BLOCK_M, BLOCK_N
            )  # fmt: skip
            s = s * factor[:, None]
            dw = products(
                do, DO, None, i, do_i, do_e, inside, v, V, None, j, v_j, v_e, j < M, E, CHUNK, BLOCK_M, BLOCK_N
            )  # fmt: skip
            p = probabilities(s, keep, top[:, None], rest[:, None], ACTIVATION)
            w, slope = weights(p, count[:, None], offset[:, None], peak[:, None], total[:, None], low, high, power, MAP)
            opened += tl.sum(tl.where(keep, w * dw, 0.0), 1)
            term += tl.sum(tl.where(keep, p * slope * (gate[:, None] * dw - shift[:, None]), 0.0), 1)
            if MAP == SHARPENED:
                steep += tl.sum(tl.where(keep, p * slope, 0.0), 1)
        if MAP == SHARPENED:
            # O was rounded, and powers have steep slopes: the exact sum takes its place, in `term` as a correction.
            term -= (opened - shift) * steep
            shift = opened
        if GATE is not None:
            tl.store(DGATE + i, opened, mask=inside)
    tl.store(TERM + row + i, term, mask=inside)
    tl.store(SHIFT + row + i, shift, mask=inside)

    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for start in range(0, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = unit_rows(K, K_LENGTH, j, k_j, d, k_d, j < M, D, D_PAD)
        v = rows_of(V, j, v_j, e, v_e, j < M, E, E_PAD)
        keep = pairs(i[:, None], j[None, :], N, M, MASK, mask_i, mask_j, CAUSAL)
        s = products(
            q, Q, Q_LENGTH, i, q_i, q_d, inside, k, K, K_LENGTH, j, k_j, k_d, j < M, D, CHUNK, BLOCK_M, BLOCK_N
        )  # fmt: skip
        s = s * factor[:, None]
        dw = products(
            do, DO, None, i, do_i, do_e, inside, v, V, None, j, v_j, v_e, j < M, E, CHUNK, BLOCK_M, BLOCK_N
        )  # fmt: skip
        p = probabilities(s, keep, top[:, None], rest[:, None], ACTIVATION)
        w, slope = weights(p, count[:, None], offset[:, None], peak[:, None], total[:, None], low, high, power, MAP)
        dp = slope * (gate[:, None] * dw - shift[:, None])
        ds = tl.where(keep, p * (dp - term[:, None]) * rise(s, ACTIVATION) * factor[:, None], 0.0)
        acc = guarded_product(acc, ds, keep, k, GUARD)
    acc = unit_gradient(acc, Q, Q_LENGTH, i, q_i, d, q_d, inside, D, D_PAD)
    mask = inside[:, None] & (d < D)[None, :]
    at = (DQ + i.to(tl.int64) * dq_i)[:, None] + (d.to(tl.int64) * dq_d)[None, :]
    tl.store(at, narrowed(acc, DQ.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def mapped_dkv_kernel(
    Q, K, V, DO, MASK, Q_LENGTH, K_LENGTH, GATE, TOP, REST, COUNT, PEAK, TOTAL, TERM, SHIFT, DK, DV,
    q_b, q_h, q_i, q_d, k_b, k_h, k_j, k_d, v_b, v_h, v_j, v_e, do_b, do_h, do_i, do_e,
    dk_b, dk_h, dk_j, dk_d, dv_b, dv_h, dv_j, dv_e, mask_b, mask_h, mask_i, mask_j,
    H, N, M, tiles, offset_rows, scale, growth, low, high, power,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    GROWS: tl.constexpr, ACTIVATION: tl.constexpr, MAP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, or the one that is not None; tiles of pairs are `[j, i]`."""
    GUARD: tl.constexpr = CAUSAL or MASK is not None
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    Q += b * q_b + h * q_h
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    DO += b * do_b + h * do_h
    if DK is not None:
        DK += b * dk_b + h * dk_h
    if DV is not None:
        DV += b * dv_b + h * dv_h
    if MASK is not None:
        MASK += b * mask_b + h * mask_h
    row = head.to(tl.int64) * N
    if K_LENGTH is not None:
        Q_LENGTH += row
        K_LENGTH += head.to(tl.int64) * M
    if GATE is not None:
        GATE += row
    TERM += row
    SHIFT += row
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = j < M
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    k = unit_rows(K, K_LENGTH, j, k_j, d, k_d, inside, D, D_PAD)
    v = rows_of(V, j, v_j, e, v_e, inside, E, E_PAD)
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, E_PAD], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(tile * BLOCK_N - M + N, 0) // BLOCK_M * BLOCK_M
    for start in range(begin, N, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        q = unit_rows(Q, Q_LENGTH, i, q_i, d, q_d, i < N, D, D_PAD)
        do = rows_of(DO, i, do_i, e, do_e, i < N, E, E_PAD)
        top, rest, factor, count, offset, peak, total, gate = row_values(
            i, TOP + row, REST + row, COUNT + row, PEAK + row, TOTAL + row, GATE, N, M, offset_rows, scale, growth,
            CAUSAL, GROWS, MAP, BLOCK_M,
        )  # fmt: skip
        term = tl.load(TERM + i, mask=i < N, other=0.0)
        shift = tl.load(SHIFT + i, mask=i < N, other=0.0)
        keep = pairs(i[None, :], j[:, None], N, M, MASK, mask_i, mask_j, CAUSAL)
        s = products(
            k, K, K_LENGTH, j, k_j, k_d, inside, q, Q, Q_LENGTH, i, q_i, q_d, i < N, D, CHUNK, BLOCK_N, BLOCK_M
        )  # fmt: skip
        s = s * factor[None, :]
        p = probabilities(s, keep, top[None, :], rest[None, :], ACTIVATION)
        w, slope = weights(p, count[None, :], offset[None, :], peak[None, :], total[None, :], low, high, power, MAP)
        if DV is not None:
            dv = guarded_product(dv, tl.where(keep, w * gate[None, :], 0.0), keep, do, GUARD)
        if DK is not None:
            dw = products(
                v, V, None, j, v_j, v_e, inside, do, DO, None, i, do_i, do_e, i < N, E, CHUNK, BLOCK_N, BLOCK_M
            )  # fmt: skip
            dp = slope * (gate[None, :] * dw - shift[None, :])
            ds = tl.where(keep, p * (dp - term[None, :]) * rise(s, ACTIVATION) * factor[None, :], 0.0)
            dk = guarded_product(dk, ds, keep, q, GUARD)
    j64 = j.to(tl.int64)
    if DK is not None:
        dk = unit_gradient(dk, K, K_LENGTH, j, k_j, d, k_d, inside, D, D_PAD)
        mask = inside[:, None] & (d < D)[None, :]
        at = (DK + j64 * dk_j)[:, None] + (d.to(tl.int64) * dk_d)[None, :]
        tl.store(at, narrowed(dk, DK.dtype.element_ty), mask=mask)
    if DV is not None:
        mask = inside[:, None] & (e < E)[None, :]
        at = (DV + j64 * dv_j)[:, None] + (e.to(tl.int64) * dv_e)[None, :]
        tl.store(at, narrowed(dv, DV.dtype.element_ty), mask=mask)
