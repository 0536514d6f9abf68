"""Neighborhood attention, backward: dQ over boxes of queries, dK and dV over boxes of keys, and the extra keys' own.

The weights are computed again from Q, K and LSE. Nothing is added atomically: a box of queries walks the keys that it
sees, a box of keys the queries that may see it (`neighborhood_tiles.viewers`), over the query heads of its group in
order. Hassani, Hwu and Shi, arXiv 2403.04690, have no equations for it: it is the softmax's gradient on the windows.
What is outside a window cannot leak: as in the forward kernel, heads with a result that is not finite are repaired.
"""

# ruff: noqa: PIE808 (Triton takes Python only as far as this: ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.neighborhood_tiles import SIZES, group_of, token, viewers, window
from attnspec.impls.engines.softmax_tiles import LOG2E, exact_product, narrowed, not_finite, product


@triton.jit
def rows_of(base, i, step, features, feature_step, real, SIZE: tl.constexpr):
    """Rows i of a matrix, zero where they are not real."""
    return tl.load(
        (base + i * step)[:, None] + (features.to(tl.int64) * feature_step)[None, :],
        mask=real[:, None] & (features < SIZE)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def neighborhood_dq_kernel(
    Q, K, V, KX, VX, DO, LSE, T, DQ, FLAG,
    q_b, q_h, q_i, q_d, k_b, k_h, k_i, k_d, v_b, v_h, v_i, v_e, kx_b, kx_h, kx_i, kx_d, vx_b, vx_h, vx_i, vx_e,
    do_b, do_h, do_i, do_e, l_b, l_h, l_i, dq_b, dq_h, dq_i, dq_d,
    H, X, rows, cols, wy, wx, py, px, sy, sx, tiles_y, tiles_x, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, G: tl.constexpr,
    CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, REPAIR: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, KY: tl.constexpr, KX_: tl.constexpr,
):  # fmt: skip
    """Program: TY x TX queries of one group of one head of one batch entry."""
    BLOCK_M: tl.constexpr = TY * TX
    BLOCK_N: tl.constexpr = KY * KX_
    head, ry, rx, ny, nx, ty, tx = group_of(tl.program_id(0), rows, cols, py, px, tiles_y, tiles_x)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    g = h // G
    m = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    y = ty * TY + m // TX
    x = tx * TX + m % TX
    i = token(y, x, ry, rx, py, px, cols)
    y_start, y_end = window(y, ny, wy, sy, CAUSAL_Y)
    x_start, x_end = window(x, nx, wx, sx, CAUSAL_X)
    y_lo, _ = window(ty * TY, ny, wy, sy, CAUSAL_Y)
    x_lo, _ = window(tx * TX, nx, wx, sx, CAUSAL_X)
    _, y_hi = window(tl.minimum(ty * TY + TY, ny) - 1, ny, wy, sy, CAUSAL_Y)
    _, x_hi = window(tl.minimum(tx * TX + TX, nx) - 1, nx, wx, sx, CAUSAL_X)
    boxes_x = tl.cdiv(x_hi - x_lo, KX_)
    boxes = tl.cdiv(y_hi - y_lo, KY) * boxes_x
    boxes = tl.where((ty * TY < ny) & (tx * TX < nx), boxes, 0)
    extra = X
    bound = ny
    if REPAIR:
        broken = tl.load(FLAG + head) != 0
        boxes = tl.where(broken, boxes, 0)
        extra = tl.where(broken, X, 0)
        bound = tl.where(broken, ny, 0)
    inside = (y < bound) & (x < nx)

    q = rows_of(Q + b * q_b + h * q_h, i, q_i, d, q_d, inside, D)
    do = rows_of(DO + b * do_b + h * do_h, i, do_i, e, do_e, inside, E)
    lse = tl.load(LSE + (b * l_b + h * l_h + i * l_i), mask=inside, other=float("inf"))
    term = tl.load(T + (b * l_b + h * l_h + i * l_i), mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for it in range(0, boxes):
        ky = y_lo + it // boxes_x * KY + c // KX_
        kx = x_lo + it % boxes_x * KX_ + c % KX_
        real = (ky < y_hi) & (kx < x_hi)
        j = token(ky, kx, ry, rx, py, px, cols)
        k = rows_of(K + b * k_b + g * k_h, j, k_i, d, k_d, real, D)
        v = rows_of(V + b * v_b + g * v_h, j, v_i, e, v_e, real, E)
        s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        dp = product(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        keep = (ky[None, :] >= y_start[:, None]) & (ky[None, :] < y_end[:, None]) & inside[:, None]
        keep = keep & (kx[None, :] >= x_start[:, None]) & (kx[None, :] < x_end[:, None]) & real[None, :]
        # Outside the windows s and dp may be NaN: select, do not multiply by a weight of 0.
        ds = tl.where(keep, tl.exp2((s - lse[:, None]) * LOG2E) * (dp - term[:, None]), 0.0)
        if REPAIR:
            dq = exact_product(dq, ds, keep, k, BLOCK_N)
        else:
            dq = product(narrowed(ds, k.dtype), k, dq)
    if KX is not None:
        for first in range(0, extra, BLOCK_N):
            j = (first + c).to(tl.int64)
            k = rows_of(KX + b * kx_b + g * kx_h, j, kx_i, d, kx_d, j < X, D)
            v = rows_of(VX + b * vx_b + g * vx_h, j, vx_i, e, vx_e, j < X, E)
            s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
            dp = product(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            ds = tl.exp2((s - lse[:, None]) * LOG2E) * (dp - term[:, None])
            ds = tl.where((j < X)[None, :], ds, 0.0)
            dq = product(narrowed(ds, k.dtype), k, dq)
    if not REPAIR:
        broken = not_finite(tl.where(inside[:, None], dq, 0.0)) != 0
        tl.store(FLAG + head, 1, mask=broken)
    tl.store(
        (DQ + (b * dq_b + h * dq_h + i * dq_i))[:, None] + (d.to(tl.int64) * dq_d)[None, :],
        narrowed(dq * scale, DQ.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def neighborhood_dkv_kernel(
    Q, K, V, DO, LSE, T, DK, DV, FLAG,
    q_b, q_h, q_i, q_d, k_b, k_h, k_i, k_d, v_b, v_h, v_i, v_e, do_b, do_h, do_i, do_e, l_b, l_h, l_i,
    dk_b, dk_h, dk_i, dk_d, dv_b, dv_h, dv_i, dv_e,
    H, rows, cols, wy, wx, py, px, sy, sx, tiles_y, tiles_x, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, G: tl.constexpr,
    CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, REPAIR: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, KY: tl.constexpr, KX_: tl.constexpr,
):  # fmt: skip
    """Program: KY x KX_ keys of one group of one key/value head; tiles are [keys, queries]."""
    BLOCK_M: tl.constexpr = TY * TX
    BLOCK_N: tl.constexpr = KY * KX_
    Hk = H // G
    head, ry, rx, ny, nx, ty, tx = group_of(tl.program_id(0), rows, cols, py, px, tiles_y, tiles_x)
    b = (head // Hk).to(tl.int64)
    g = (head % Hk).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    ky = ty * KY + c // KX_
    kx = tx * KX_ + c % KX_
    j = token(ky, kx, ry, rx, py, px, cols)
    y_lo, y_hi = viewers(ty * KY, tl.minimum(ty * KY + KY, ny) - 1, ny, wy, sy, CAUSAL_Y)
    x_lo, x_hi = viewers(tx * KX_, tl.minimum(tx * KX_ + KX_, nx) - 1, nx, wx, sx, CAUSAL_X)
    boxes_x = tl.cdiv(x_hi - x_lo, TX)
    boxes = tl.cdiv(y_hi - y_lo, TY) * boxes_x
    boxes = tl.where((ty * KY < ny) & (tx * KX_ < nx), boxes, 0)
    bound = ny
    if REPAIR:
        broken = tl.load(FLAG + head) != 0
        boxes = tl.where(broken, boxes, 0)
        bound = tl.where(broken, ny, 0)
    real = (ky < bound) & (kx < nx)

    k = rows_of(K + b * k_b + g * k_h, j, k_i, d, k_d, real, D)
    v = rows_of(V + b * v_b + g * v_h, j, v_i, e, v_e, real, E)
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, E_PAD], tl.float32)
    for it in range(0, boxes * G):
        h = g * G + it // boxes
        y = y_lo + it % boxes // boxes_x * TY + m // TX
        x = x_lo + it % boxes % boxes_x * TX + m % TX
        inside = (y < y_hi) & (x < x_hi)
        i = token(y, x, ry, rx, py, px, cols)
        q = rows_of(Q + b * q_b + h * q_h, i, q_i, d, q_d, inside, D)
        do = rows_of(DO + b * do_b + h * do_h, i, do_i, e, do_e, inside, E)
        lse = tl.load(LSE + (b * l_b + h * l_h + i * l_i), mask=inside, other=float("inf"))
        term = tl.load(T + (b * l_b + h * l_h + i * l_i), mask=inside, other=0.0)
        y_start, y_end = window(y, ny, wy, sy, CAUSAL_Y)
        x_start, x_end = window(x, nx, wx, sx, CAUSAL_X)
        s = product(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) * scale
        dp = product(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        keep = (ky[:, None] >= y_start[None, :]) & (ky[:, None] < y_end[None, :]) & inside[None, :]
        keep = keep & (kx[:, None] >= x_start[None, :]) & (kx[:, None] < x_end[None, :]) & real[:, None]
        p = tl.where(keep, tl.exp2((s - lse[None, :]) * LOG2E), 0.0)
        ds = tl.where(keep, p * (dp - term[None, :]), 0.0)
        if REPAIR:
            dv = exact_product(dv, p, keep, do, BLOCK_M)
            dk = exact_product(dk, ds, keep, q, BLOCK_M)
        else:
            dv = product(narrowed(p, do.dtype), do, dv)
            dk = product(narrowed(ds, q.dtype), q, dk)
    if not REPAIR:
        wrong = tl.maximum(not_finite(dk), not_finite(dv))
        tl.store(FLAG + head, 1, mask=wrong != 0)
    tl.store(
        (DK + (b * dk_b + g * dk_h + j * dk_i))[:, None] + (d.to(tl.int64) * dk_d)[None, :],
        narrowed(dk * scale, DK.dtype.element_ty), mask=real[:, None] & (d < D)[None, :],
    )  # fmt: skip
    tl.store(
        (DV + (b * dv_b + g * dv_h + j * dv_i))[:, None] + (e.to(tl.int64) * dv_e)[None, :],
        narrowed(dv, DV.dtype.element_ty), mask=real[:, None] & (e < E)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def neighborhood_extra_kernel(
    Q, KX, VX, DO, LSE, T, DK, DV,
    q_b, q_h, q_i, q_d, kx_b, kx_h, kx_i, kx_d, vx_b, vx_h, vx_i, vx_e, do_b, do_h, do_i, do_e, l_b, l_h, l_i,
    dk_s, dk_b, dk_h, dk_i, dk_d, dv_s, dv_b, dv_h, dv_i, dv_e, H, N, X, tiles_x, share, splits, scale,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N extra keys of one key/value head and `share` queries of each of its heads; partial sums."""
    pid = tl.program_id(0)
    Hk = H // G
    tile = pid % tiles_x
    split = pid // tiles_x % splits
    head = pid // tiles_x // splits
    b = (head // Hk).to(tl.int64)
    g = (head % Hk).to(tl.int64)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    j = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    real = j < X
    k = rows_of(KX + b * kx_b + g * kx_h, j, kx_i, d, kx_d, real, D)
    v = rows_of(VX + b * vx_b + g * vx_h, j, vx_i, e, vx_e, real, E)
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, E_PAD], tl.float32)
    steps = tl.cdiv(share, BLOCK_M)
    for it in range(0, steps * G):
        h = g * G + it // steps
        within = it % steps * BLOCK_M + tl.arange(0, BLOCK_M)
        i = (split * share + within).to(tl.int64)
        inside = (within < share) & (i < N)
        q = rows_of(Q + b * q_b + h * q_h, i, q_i, d, q_d, inside, D)
        do = rows_of(DO + b * do_b + h * do_h, i, do_i, e, do_e, inside, E)
        lse = tl.load(LSE + (b * l_b + h * l_h + i * l_i), mask=inside, other=float("inf"))
        term = tl.load(T + (b * l_b + h * l_h + i * l_i), mask=inside, other=0.0)
        s = product(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) * scale
        dp = product(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        p = tl.where(inside[None, :] & real[:, None], tl.exp2((s - lse[None, :]) * LOG2E), 0.0)
        ds = tl.where(inside[None, :] & real[:, None], p * (dp - term[None, :]), 0.0)
        dv = product(narrowed(p, do.dtype), do, dv)
        dk = product(narrowed(ds, q.dtype), q, dk)
    s64 = split.to(tl.int64)
    tl.store(
        (DK + (s64 * dk_s + b * dk_b + g * dk_h + j * dk_i))[:, None] + (d.to(tl.int64) * dk_d)[None, :], dk * scale,
        mask=real[:, None] & (d < D)[None, :],
    )  # fmt: skip
    tl.store(
        (DV + (s64 * dv_s + b * dv_b + g * dv_h + j * dv_i))[:, None] + (e.to(tl.int64) * dv_e)[None, :], dv,
        mask=real[:, None] & (e < E)[None, :],
    )  # fmt: skip
