"""Linear attention with a decaying matrix state, chunk by chunk: forward, and the two sweeps of the backward pass.

    S[t] = diag(exp(a[t])) S[t-1] + outer(k[t], v[t]),    o[t] = scale * q[t] S[t]

A program owns one head and a block of value features, and walks the chunks with the state in registers: inside a chunk
the masked product (Q K^T) V, across chunks the state (Qin et al., arXiv 2405.17381, Algorithms 1 and 2; Yang et al.,
arXiv 2312.06635, section 4). The log decay `a` is one number per token and head, or (VECTOR) one per key feature; then
the decay between two tokens cannot leave the product, and a chunk's scores are taken column by column. Decays enter as
exponentials of differences that are never positive, so that nothing overflows however strong they are.

Query head h reads keys, values, decays and the state of head h // G; gradients of those are given per query head.
Sums over value features are left partial, one slice per program, and added by the caller: no atomics, the same bits
every time. Launched by `linear_launch`, compiled ahead of time by `attnspec.impls.aot`.
"""

# ruff: noqa: E741, RUF059 (O is the field's name of the output; Triton knows no placeholder names)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_tiles import narrowed, product, widened

SIZES = ["H", "G", "T", "chunks"]


@triton.jit
def tile(X, rows, columns, x_t, x_d, T, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of `[t, d]` at `rows`, columns at `columns`; zeros outside."""
    mask = (rows < T)[:, None]
    if D != D_PAD:
        mask = mask & (columns < D)[None, :]
    return tl.load(X + rows.to(tl.int64)[:, None] * x_t + columns[None, :] * x_d, mask=mask, other=0.0)


@triton.jit
def log_decays(
    A, rows, columns, a_t, a_d, T,
    C: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Log decays of a chunk in float32: of each token, of the token after it, from the chunk's start through it, and
    from after it to the chunk's end.

    Each sum is one of its own terms and no difference of longer sums, which would lose the digits of weak decays beside
    strong ones.
    """
    # What comes after a row, within the chunk.
    after = rows + 1
    last = tl.arange(0, C) == C - 1
    if VECTOR:
        a = widened(tile(A, rows, columns, a_t, a_d, T, D, D_PAD))
        later = tl.where(last[:, None], 0.0, widened(tile(A, after, columns, a_t, a_d, T, D, D_PAD)))
    else:
        a = widened(tl.load(A + rows.to(tl.int64) * a_t, mask=rows < T, other=0.0))
        later = tl.where(last, 0.0, widened(tl.load(A + after.to(tl.int64) * a_t, mask=after < T, other=0.0)))
    return a, later, tl.cumsum(a, 0), tl.cumsum(later, 0, reverse=True)


@triton.jit
def row(x, at, C: tl.constexpr):
    """Row `at` of a tile."""
    chosen = (tl.arange(0, C) == at)[:, None]
    return tl.sum(tl.where(chosen, x, 0.0), 0)


@triton.jit
def between(a, C: tl.constexpr):
    """`[i, j]`: the decay from token j to a token i at or after it, 0 before it; `a` is `[i]`."""
    at = tl.arange(0, C)
    gaps = tl.cumsum(tl.where(at[:, None] > at[None, :], a[:, None], 0.0), 0)
    return tl.where(at[:, None] >= at[None, :], tl.exp(gaps), 0.0)


@triton.jit
def from_row(a, j, C: tl.constexpr):
    """`[i, d]`: the decay from token j to token i, 0 before it; `a` is `[i, d]`."""
    at = tl.arange(0, C)
    gaps = tl.cumsum(tl.where((at > j)[:, None], a, 0.0), 0)
    return tl.where((at >= j)[:, None], tl.exp(gaps), 0.0)


@triton.jit
def up_to_row(later, i, C: tl.constexpr):
    """`[j, d]`: the decay from token j to token i, 0 after it; `later` is the log decay of the token after each."""
    at = tl.arange(0, C)
    gaps = tl.cumsum(tl.where((at < i)[:, None], later, 0.0), 0, reverse=True)
    return tl.where((at <= i)[:, None], tl.exp(gaps), 0.0)


@triton.jit
def scores(q, k, a, C: tl.constexpr, VECTOR: tl.constexpr):
    """`[i, j]`: decayed products of the rows of q with the rows of k at or before them, in float32."""
    at = tl.arange(0, C)
    found = tl.zeros([C, C], tl.float32)
    if VECTOR:
        for j in tl.static_range(C):
            column = tl.sum(widened(q) * row(widened(k), j, C)[None, :] * from_row(a, j, C), 1)
            found = tl.where((at == j)[None, :], column[:, None], found)
    else:
        found = product(q, tl.trans(k), found) * between(a, C)
    return found


@triton.jit
def factors(logs, VECTOR: tl.constexpr):
    """Exponentials of per-token logs `[i]` or `[i, d]`, as `[i, 1]` or `[i, d]`."""
    return tl.exp(logs) if VECTOR else tl.exp(logs)[:, None]


@triton.jit
def advance(state, a, VECTOR: tl.constexpr):
    """The state `[d, e]` decayed over a whole chunk."""
    return state * (tl.exp(tl.sum(a, 0))[:, None] if VECTOR else tl.exp(tl.sum(a, 0)))


@triton.jit(do_not_specialize=SIZES)
def linear_forward_kernel(
    Q, K, V, A, S0, O, S1,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_e, a_b, a_h, a_t, a_d, s_b, s_h, s_d, s_e,
    o_b, o_h, o_t, o_e, scale, H, G, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Outputs and, where S1 is given (contiguous `[b,h,d,e]` in float32), the state after the last token."""
    program = tl.program_id(0)
    block = program % E_BLOCKS
    head = program // E_BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    g_head = h // G
    d = tl.arange(0, D_PAD)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    Q += b * q_b + h * q_h
    K += b * k_b + g_head * k_h
    V += b * v_b + g_head * v_h
    A += b * a_b + g_head * a_h
    O += b * o_b + h * o_h
    inside = (d < D)[:, None] & (e < E)[None, :]
    state = tl.zeros([D_PAD, E_BLOCK], tl.float32)
    if S0 is not None:
        at_state = S0 + b * s_b + g_head * s_h + d[:, None] * s_d + e[None, :] * s_e
        state += widened(tl.load(at_state, mask=inside, other=0.0))
    for chunk in range(chunks):
        rows = chunk * C + tl.arange(0, C)
        q = tile(Q, rows, d, q_t, q_d, T, D, D_PAD)
        k = tile(K, rows, d, k_t, k_d, T, D, D_PAD)
        v = tile(V, rows, e, v_t, v_e, T, E, E_BLOCK * E_BLOCKS)
        a, later, before, onward = log_decays(A, rows, d, a_t, a_d, T, C, D, D_PAD, VECTOR)
        seen = narrowed(widened(q) * factors(before, VECTOR), q.dtype)
        out = product(narrowed(scores(q, k, a, C, VECTOR), v.dtype), v, tl.zeros([C, E_BLOCK], tl.float32))
        out = product(seen, narrowed(state, q.dtype), out)
        mask = (rows < T)[:, None] & (e < E)[None, :]
        at_out = O + rows.to(tl.int64)[:, None] * o_t + e[None, :] * o_e
        tl.store(at_out, narrowed(out * scale, O.dtype.element_ty), mask=mask)
        written = narrowed(widened(k) * factors(onward, VECTOR), k.dtype)
        state = product(tl.trans(written), v, advance(state, a, VECTOR))
    if S1 is not None:
        # The heads of a group share their state: the first one writes it.
        at_state = S1 + ((b * (H // G) + g_head) * D + d[:, None]) * E + e[None, :]
        tl.store(at_state, state, mask=tl.where(inside, head % G, 1) == 0)


@triton.jit(do_not_specialize=SIZES)
def linear_dq_kernel(
    K, V, A, S0, DO, DQ,
    k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_e, a_b, a_h, a_t, a_d, s_b, s_h, s_d, s_e, do_b, do_h, do_t, do_e,
    scale, H, G, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, a slice of `DQ` (contiguous `[blocks,b,h,t,d]`, float32) per block of value features.

    The state is computed again along the way.
    """
    program = tl.program_id(0)
    block = program % E_BLOCKS
    head = program // E_BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    g_head = h // G
    d = tl.arange(0, D_PAD)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    K += b * k_b + g_head * k_h
    V += b * v_b + g_head * v_h
    A += b * a_b + g_head * a_h
    DO += b * do_b + h * do_h
    DQ += (block.to(tl.int64) * (tl.num_programs(0) // E_BLOCKS) + head) * T * D
    inside = (d < D)[:, None] & (e < E)[None, :]
    state = tl.zeros([D_PAD, E_BLOCK], tl.float32)
    if S0 is not None:
        at_state = S0 + b * s_b + g_head * s_h + d[:, None] * s_d + e[None, :] * s_e
        state += widened(tl.load(at_state, mask=inside, other=0.0))
    at = tl.arange(0, C)
    for chunk in range(chunks):
        rows = chunk * C + at
        k = tile(K, rows, d, k_t, k_d, T, D, D_PAD)
        v = tile(V, rows, e, v_t, v_e, T, E, E_BLOCK * E_BLOCKS)
        g = tile(DO, rows, e, do_t, do_e, T, E, E_BLOCK * E_BLOCKS)
        a, later, before, onward = log_decays(A, rows, d, a_t, a_d, T, C, D, D_PAD, VECTOR)
        pull = product(g, tl.trans(v), tl.zeros([C, C], tl.float32))
        dq = product(g, tl.trans(narrowed(state, g.dtype)), tl.zeros([C, D_PAD], tl.float32))
        dq = dq * factors(before, VECTOR)
        if VECTOR:
            for j in tl.static_range(C):
                weight = tl.sum(tl.where((at == j)[None, :], pull, 0.0), 1)
                dq += weight[:, None] * row(widened(k), j, C)[None, :] * from_row(a, j, C)
        else:
            dq = product(narrowed(pull * between(a, C), k.dtype), k, dq)
        mask = (rows < T)[:, None] & (d < D)[None, :]
        tl.store(DQ + rows.to(tl.int64)[:, None] * D + d[None, :], dq * scale, mask=mask)
        written = narrowed(widened(k) * factors(onward, VECTOR), k.dtype)
        state = product(tl.trans(written), v, advance(state, a, VECTOR))


@triton.jit(do_not_specialize=SIZES)
def linear_dkv_kernel(
    Q, K, V, A, DO, DS1, DK, DV, DS0,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_e, a_b, a_h, a_t, a_d, do_b, do_h, do_t, do_e,
    s_b, s_h, s_d, s_e, o_b, o_h, o_t, o_e, scale, H, G, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradients of keys (slices, as in `linear_dq_kernel`), values and the initial state, from the last chunk on.

    DS1 is the cotangent of the final state or None, and counts once for a group; DS0 is contiguous `[b,h,d,e]` in
    float32 or None.
    """
    program = tl.program_id(0)
    block = program % E_BLOCKS
    head = program // E_BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    g_head = h // G
    d = tl.arange(0, D_PAD)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    Q += b * q_b + h * q_h
    K += b * k_b + g_head * k_h
    V += b * v_b + g_head * v_h
    A += b * a_b + g_head * a_h
    DO += b * do_b + h * do_h
    DV += b * o_b + h * o_h
    DK += (block.to(tl.int64) * (tl.num_programs(0) // E_BLOCKS) + head) * T * D
    inside = (d < D)[:, None] & (e < E)[None, :]
    # The gradient of the state at the end of the chunk.
    behind = tl.zeros([D_PAD, E_BLOCK], tl.float32)
    if DS1 is not None:
        at_state = DS1 + b * s_b + g_head * s_h + d[:, None] * s_d + e[None, :] * s_e
        behind += widened(tl.load(at_state, mask=tl.where(inside, head % G, 1) == 0, other=0.0))
    at = tl.arange(0, C)
    for step in range(chunks):
        rows = (chunks - 1 - step) * C + at
        q = tile(Q, rows, d, q_t, q_d, T, D, D_PAD)
        k = tile(K, rows, d, k_t, k_d, T, D, D_PAD)
        v = tile(V, rows, e, v_t, v_e, T, E, E_BLOCK * E_BLOCKS)
        g = tile(DO, rows, e, do_t, do_e, T, E, E_BLOCK * E_BLOCKS)
        a, later, before, onward = log_decays(A, rows, d, a_t, a_d, T, C, D, D_PAD, VECTOR)
        written = narrowed(widened(k) * factors(onward, VECTOR), k.dtype)
        weights = narrowed(tl.trans(scores(q, k, a, C, VECTOR)) * scale, g.dtype)
        dv = product(weights, g, tl.zeros([C, E_BLOCK], tl.float32))
        dv = product(written, narrowed(behind, k.dtype), dv)
        mask = (rows < T)[:, None] & (e < E)[None, :]
        tl.store(DV + rows.to(tl.int64)[:, None] * o_t + e[None, :] * o_e, narrowed(dv, DV.dtype.element_ty), mask=mask)
        # `[j, i]`: how much query i pulls on key j, through these value features.
        pull = product(v, tl.trans(g), tl.zeros([C, C], tl.float32)) * scale
        dk = product(v, tl.trans(narrowed(behind, v.dtype)), tl.zeros([C, D_PAD], tl.float32))
        dk = dk * factors(onward, VECTOR)
        if VECTOR:
            for i in tl.static_range(C):
                weight = tl.sum(tl.where((at == i)[None, :], pull, 0.0), 1)
                dk += weight[:, None] * row(widened(q), i, C)[None, :] * up_to_row(later, i, C)
        else:
            dk = product(narrowed(pull * tl.trans(between(a, C)), q.dtype), q, dk)
        mask = (rows < T)[:, None] & (d < D)[None, :]
        tl.store(DK + rows.to(tl.int64)[:, None] * D + d[None, :], dk, mask=mask)
        seen = narrowed(widened(q) * factors(before, VECTOR) * scale, q.dtype)
        behind = product(tl.trans(seen), g, advance(behind, a, VECTOR))
    if DS0 is not None:
        tl.store(DS0 + ((b * H + h) * D + d[:, None]) * E + e[None, :], behind, mask=inside)
