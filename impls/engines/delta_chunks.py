"""The gated delta rule, chunk by chunk: forward, and the two kernels of the backward pass.

    S[t] = exp(g[t]) S[t-1] + outer(k[t], u[t]),    u[t] = beta[t] (v[t] - exp(g[t]) k[t] S[t-1])
    o[t] = scale * q[t] S[t]

Inside a chunk the writes u depend on each other: (1 + A) U = beta (V - decay K S) with the strictly lower triangular
A[i, j] = beta[i] (k[i] . k[j]) decay[i, j] and the state S before the chunk (Yang et al., arXiv 2412.06464, section
3.3). `delta_system_kernel` inverts 1 + A, for all chunks at once; `delta_forward_kernel` and, from the last chunk on,
`delta_behind_kernel` walk the chunks with the state, or its gradient, in registers; `delta_gradients_kernel` then
needs no order and takes all chunks at once.

A walking program owns one head and a block of value features. Head h reads the queries and keys of head h // R;
gradients are given per head. Exponents are sums of log decays and never differences. No atomics: the same bits every
time. Contiguous in float32: INV `[b,h,chunks,C,C]`; U, ERR (what beta multiplies), DU `[b,h,t,e]`; ST, BH
`[b,h,chunks,D,E]`, the states before and the gradients after each chunk; per-head gradients. Launched by
`delta_launch`.
"""

# ruff: noqa: E741, RUF059 (O is the field's name of the output; Triton knows no placeholder names)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.linear_chunks import apart, between, log_decays, passing, strengths, tile
from attnspec.impls.engines.softmax_tiles import narrowed, product, widened

SIZES = ["H", "R", "T", "chunks"]


@triton.jit
def decays(A, rows, a_t, T, C: tl.constexpr):
    """Log decays of a chunk, one per token: own, from the chunk's start through it, from after it to the end."""
    a, later, before, onward = log_decays(A, rows, rows, a_t, 0, T, C, 1, 1, False)
    return a, before, onward


@triton.jit
def coupling(k, beta, a, C: tl.constexpr):
    """`[i, j]`: how much of token j's write the key of a later token i predicts, times beta."""
    at = tl.arange(0, C)
    alike = product(k, tl.trans(k), tl.zeros([C, C], tl.float32)) * between(a, C)
    return tl.where(at[:, None] > at[None, :], alike, 0.0) * beta[:, None]


@triton.jit
def place(head, chunk, chunks, rows: tl.constexpr, columns: tl.constexpr):
    """Offset of a chunk's `[rows, columns]` in a contiguous `[b,h,chunks,rows,columns]`."""
    return (head.to(tl.int64) * chunks + chunk) * (rows * columns)


@triton.jit(do_not_specialize=SIZES)
def delta_system_kernel(
    K, A, W, INV, k_b, k_h, k_t, k_d, a_b, a_h, a_t, w_b, w_h, w_t, H, R, T, chunks,
    D: tl.constexpr, D_PAD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """INV, the inverse of 1 + A of every chunk, row by row: powers of A would cancel where keys are alike."""
    program = tl.program_id(0)
    chunk, head = program % chunks, program // chunks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    at = tl.arange(0, C)
    rows = chunk * C + at
    k = tile(K + b * k_b + h // R * k_h, rows, tl.arange(0, D_PAD), k_t, k_d, T, D, D_PAD)
    beta = strengths(W + b * w_b + h * w_h, rows, w_t, T, C)
    a, before, onward = decays(A + b * a_b + h * a_h, rows, a_t, T, C)
    system = coupling(k, beta, a, C)
    inverse = tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    for i in range(1, C):
        own = (at == i)[:, None]
        line = tl.sum(tl.where(own, system, 0.0), 0)
        inverse = tl.where(own, inverse - tl.sum(line[:, None] * inverse, 0)[None, :], inverse)
    tl.store(INV + place(head, chunk, chunks, C, C) + at[:, None] * C + at[None, :], inverse)


@triton.jit(do_not_specialize=SIZES)
def delta_forward_kernel(
    Q, K, V, A, W, INV, S0, O, S1, U, ERR, ST,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_e, a_b, a_h, a_t, w_b, w_h, w_t, s_b, s_h, s_d, s_e,
    o_b, o_h, o_t, o_e, scale, H, R, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Outputs and the last state `[b,h,d,e]`; or, for the backward pass (O and S1 None), U, ERR and ST."""
    program = tl.program_id(0)
    block, head = program % E_BLOCKS, program // E_BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    d, at = tl.arange(0, D_PAD), tl.arange(0, C)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    inside = (d < D)[:, None] & (e < E)[None, :]
    Q += b * q_b + h // R * q_h
    K += b * k_b + h // R * k_h
    V += b * v_b + h * v_h
    A += b * a_b + h * a_h
    W += b * w_b + h * w_h
    state = tl.zeros([D_PAD, E_BLOCK], tl.float32)
    if S0 is not None:
        at_state = S0 + b * s_b + h * s_h + d[:, None] * s_d + e[None, :] * s_e
        state += widened(tl.load(at_state, mask=inside, other=0.0))
    for chunk in range(chunks):
        rows = chunk * C + at
        mask = (rows < T)[:, None] & (e < E)[None, :]
        k = tile(K, rows, d, k_t, k_d, T, D, D_PAD)
        v = tile(V, rows, e, v_t, v_e, T, E, E_BLOCK * E_BLOCKS)
        beta = strengths(W, rows, w_t, T, C)
        a, before, onward = decays(A, rows, a_t, T, C)
        copy = narrowed(state, k.dtype)
        predicted = product(k, copy, tl.zeros([C, E_BLOCK], tl.float32)) * tl.exp(before)[:, None]
        inverse = tl.load(INV + place(head, chunk, chunks, C, C) + at[:, None] * C + at[None, :])
        error = widened(v) - predicted
        u = product(inverse, error * beta[:, None], tl.zeros([C, E_BLOCK], tl.float32))
        if ST is not None:
            tl.store(ST + place(head, chunk, chunks, D, E) + d[:, None] * E + e[None, :], state, mask=inside)
            at_u = (head.to(tl.int64) * T + rows)[:, None] * E + e[None, :]
            tl.store(U + at_u, u, mask=mask)
            tl.store(ERR + at_u, error, mask=mask)
        if O is not None:
            apart(k)
            q = tile(Q, rows, d, q_t, q_d, T, D, D_PAD)
            weights = product(q, tl.trans(k), tl.zeros([C, C], tl.float32)) * between(a, C)
            apart(k)
            out = product(q, copy, tl.zeros([C, E_BLOCK], tl.float32)) * tl.exp(before)[:, None]
            out = product(narrowed(weights, v.dtype), narrowed(u, v.dtype), out) * scale
            at_out = O + b * o_b + h * o_h + rows.to(tl.int64)[:, None] * o_t + e[None, :] * o_e
            tl.store(at_out, narrowed(out, O.dtype.element_ty), mask=mask)
        kept = narrowed(u * tl.exp(onward)[:, None], v.dtype)
        state = product(tl.trans(k), kept, state * tl.exp(tl.sum(a, 0)))
    if S1 is not None:
        tl.store(S1 + place(head, 0, 1, D, E) + d[:, None] * E + e[None, :], state, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def delta_behind_kernel(
    Q, K, A, W, INV, DO, DS1, DU, BH, DS0,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, a_b, a_h, a_t, w_b, w_h, w_t, do_b, do_h, do_t, do_e, s_b, s_h, s_d, s_e,
    scale, H, R, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """DU, the gradient of what enters the triangular system, and BH, from the last chunk on; DS0 if it is not None."""
    program = tl.program_id(0)
    block, head = program % E_BLOCKS, program // E_BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    d, at = tl.arange(0, D_PAD), tl.arange(0, C)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    inside = (d < D)[:, None] & (e < E)[None, :]
    Q += b * q_b + h // R * q_h
    K += b * k_b + h // R * k_h
    A += b * a_b + h * a_h
    W += b * w_b + h * w_h
    DO += b * do_b + h * do_h
    behind = tl.zeros([D_PAD, E_BLOCK], tl.float32)
    if DS1 is not None:
        at_state = DS1 + b * s_b + h * s_h + d[:, None] * s_d + e[None, :] * s_e
        behind += widened(tl.load(at_state, mask=inside, other=0.0))
    for step in range(chunks):
        chunk = chunks - 1 - step
        rows = chunk * C + at
        q = tile(Q, rows, d, q_t, q_d, T, D, D_PAD)
        k = tile(K, rows, d, k_t, k_d, T, D, D_PAD)
        g = tile(DO, rows, e, do_t, do_e, T, E, E_BLOCK * E_BLOCKS)
        beta = strengths(W, rows, w_t, T, C)
        a, before, onward = decays(A, rows, a_t, T, C)
        tl.store(BH + place(head, chunk, chunks, D, E) + d[:, None] * E + e[None, :], behind, mask=inside)
        weights = tl.trans(product(q, tl.trans(k), tl.zeros([C, C], tl.float32)) * between(a, C)) * scale
        apart(k)
        du = product(k, narrowed(behind, k.dtype), tl.zeros([C, E_BLOCK], tl.float32)) * tl.exp(onward)[:, None]
        du = product(narrowed(weights, g.dtype), g, du)
        inverse = tl.load(INV + place(head, chunk, chunks, C, C) + at[:, None] * C + at[None, :])
        du = product(tl.trans(inverse), du, tl.zeros([C, E_BLOCK], tl.float32))
        at_u = DU + (head.to(tl.int64) * T + rows)[:, None] * E + e[None, :]
        tl.store(at_u, du, mask=(rows < T)[:, None] & (e < E)[None, :])
        behind = behind * tl.exp(tl.sum(a, 0))
        reached = narrowed(widened(g) * (scale * tl.exp(before))[:, None], g.dtype)
        behind = product(tl.trans(q), reached, behind)
        behind = product(tl.trans(k), narrowed(du * (-beta * tl.exp(before))[:, None], k.dtype), behind)
    if DS0 is not None:
        tl.store(DS0 + place(head, 0, 1, D, E) + d[:, None] * E + e[None, :], behind, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def delta_gradients_kernel(
    Q, K, A, W, DO, U, ERR, DU, ST, BH, DQ, DK, DW, DA, DP,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, a_b, a_h, a_t, w_b, w_h, w_t, do_b, do_h, do_t, do_e,
    scale, H, R, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, D_BLOCKS: tl.constexpr, E_BLOCK: tl.constexpr,
    E_BLOCKS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys `[b,h,t,d]`, strengths and log decays `[b,h,t]`; one program per chunk.

    A log decay stands in all that passes from before its token to the token or beyond: pairs within the chunk, reads of
    the state before the chunk, what earlier tokens of the chunk leave behind, and what only passes through. DP is a
    part of the gradient of the log decay of the token after. Features are taken block by block, so that any number of
    them fits.
    """
    program = tl.program_id(0)
    chunk, head = program % chunks, program // chunks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    at = tl.arange(0, C)
    rows = chunk * C + at
    beta = strengths(W + b * w_b + h * w_h, rows, w_t, T, C)
    a, before, onward = decays(A + b * a_b + h * a_h, rows, a_t, T, C)
    Q += b * q_b + h // R * q_h
    K += b * k_b + h // R * k_h
    DO += b * do_b + h * do_h
    ERR += head.to(tl.int64) * T * E
    U += head.to(tl.int64) * T * E
    DU += head.to(tl.int64) * T * E
    ST += place(head, chunk, chunks, D, E)
    BH += place(head, chunk, chunks, D, E)
    pull = tl.zeros([C, C], tl.float32)
    clash = tl.zeros([C, C], tl.float32)
    dbeta = tl.zeros([C], tl.float32)
    for block in range(E_BLOCKS):
        e = block * E_BLOCK + tl.arange(0, E_BLOCK)
        g = tile(DO, rows, e, do_t, do_e, T, E, E_BLOCK * E_BLOCKS)
        error = tile(ERR, rows, e, E, 1, T, E, E_BLOCK * E_BLOCKS)
        u = narrowed(tile(U, rows, e, E, 1, T, E, E_BLOCK * E_BLOCKS), g.dtype)
        du = tile(DU, rows, e, E, 1, T, E, E_BLOCK * E_BLOCKS)
        dbeta += tl.sum(du * error, 1)
        pull = product(g, tl.trans(u), pull)
        clash = product(narrowed(du, g.dtype), tl.trans(u), clash)
    alike = tl.zeros([C, C], tl.float32)
    weights = tl.zeros([C, C], tl.float32)
    for block in range(D_BLOCKS):
        d = block * D_BLOCK + tl.arange(0, D_BLOCK)
        q = tile(Q, rows, d, q_t, q_d, T, D, D_BLOCK * D_BLOCKS)
        k = tile(K, rows, d, k_t, k_d, T, D, D_BLOCK * D_BLOCKS)
        alike = product(k, tl.trans(k), alike)
        weights = product(q, tl.trans(k), weights)
    inner = between(a, C)
    clash = tl.where(at[:, None] > at[None, :], -clash * inner, 0.0)
    pull = pull * inner * scale
    dbeta += tl.sum(clash * alike, 1)
    clash *= beta[:, None]
    crossing = pull * weights + clash * alike
    pairs = narrowed(pull, K.dtype.element_ty)
    keys = narrowed(clash + tl.trans(clash), K.dtype.element_ty)
    reading = tl.zeros([C], tl.float32)
    leaving = tl.zeros([C], tl.float32)
    through = 0.0
    for block in range(D_BLOCKS):
        d = block * D_BLOCK + tl.arange(0, D_BLOCK)
        reads = tl.zeros([C, D_BLOCK], tl.float32)
        carried = tl.zeros([C, D_BLOCK], tl.float32)
        predicted = tl.zeros([C, D_BLOCK], tl.float32)
        for part in range(E_BLOCKS):
            e = part * E_BLOCK + tl.arange(0, E_BLOCK)
            g = tile(DO, rows, e, do_t, do_e, T, E, E_BLOCK * E_BLOCKS)
            u = narrowed(tile(U, rows, e, E, 1, T, E, E_BLOCK * E_BLOCKS), g.dtype)
            du = narrowed(tile(DU, rows, e, E, 1, T, E, E_BLOCK * E_BLOCKS), g.dtype)
            inside = (d < D)[:, None] & (e < E)[None, :]
            state = tl.load(ST + d[:, None] * E + e[None, :], mask=inside, other=0.0)
            behind = tl.load(BH + d[:, None] * E + e[None, :], mask=inside, other=0.0)
            through += tl.sum(state * behind)
            copy = tl.trans(narrowed(state, g.dtype))
            reads = product(g, copy, reads)
            predicted = product(du, copy, predicted)
            carried = product(u, tl.trans(narrowed(behind, g.dtype)), carried)
        reads *= (tl.exp(before) * scale)[:, None]
        predicted *= (tl.exp(before) * beta)[:, None]
        carried *= tl.exp(onward)[:, None]
        q = tile(Q, rows, d, q_t, q_d, T, D, D_BLOCK * D_BLOCKS)
        k = tile(K, rows, d, k_t, k_d, T, D, D_BLOCK * D_BLOCKS)
        reading += tl.sum(widened(q) * reads - widened(k) * predicted, 1)
        leaving += tl.sum(widened(k) * carried, 1)
        mask = (rows < T)[:, None] & (d < D)[None, :]
        at_row = (head.to(tl.int64) * T + rows)[:, None] * D + d[None, :]
        tl.store(DQ + at_row, product(pairs, k, reads), mask=mask)
        dk = product(keys, k, product(tl.trans(pairs), q, carried - predicted))
        tl.store(DK + at_row, dk, mask=mask)
    at_token = head.to(tl.int64) * T + rows
    da = tl.cumsum(reading, 0, reverse=True) + through * tl.exp(tl.sum(a, 0))
    tl.store(DW + at_token, dbeta, mask=rows < T)
    tl.store(DA + at_token, da, mask=rows < T)
    tl.store(DP + at_token, passing(crossing, leaving, C), mask=rows < T)
